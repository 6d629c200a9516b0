"""
INT8 with ranges of calibration images: images -> statistics -> range method -> bias correction -> budget of AP.

Needs onnx and onnxruntime; to compare models by AP also what benchmarks.accuracy needs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from calibration.activation_statistics import Statistics
from calibration.collect import statistics_of_images
from calibration.images import calibration_images, check_no_overlap, choose_images, sha256_of_images
from calibration.measure import ERROR_IMAGES, OutputError, accuracy_numbers, saved, total_error
from calibration.messages import say, warn
from calibration.placement import FloatGraph, node_name
from calibration.quantizer import (
    Quantized,
    Quantizer,
    key_of_measurements,
    tensors_of_any_choice,
    tensors_of_placement,
)
from calibration.ranges import PERCENTILE, RANGE_METHODS
from calibration.search import Journal, journal_path, kept_for_budget, text_of_result
from deploy.contract import ModelContract
from deploy.dataset import CocoImage, CocoSet, check_image_files, coco_document
from deploy.errors import ConfigError
from deploy.files import AnyPath, write_json
from deploy.int8_format import FloatReason

if TYPE_CHECKING:
    import onnx

AUTO = "auto"
"""In place of a range method: the one whose model has the best AP on held-out images."""
NUM_IMAGES = 512
"""How many images are calibrated on, unless somebody says so."""
HELD_OUT_IMAGES = 128
"""How many images of the calibration split models are compared on, beyond those that are calibrated on."""


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """What a user may ask of calibration on images."""

    model: Path
    """The float ONNX file."""
    output: Path
    """The INT8 file to write; beside it the search for the budget keeps what it has measured."""
    target: str
    """The runtime that will run it, of `PLACEMENTS`."""
    method: str = "max"
    """How a range is taken from what was seen: a name of `RANGE_METHODS`, or AUTO."""
    percentile: float = PERCENTILE
    """How many values in a hundred the method of that name does not clip."""
    bias_correction: bool = False
    """Whether to take off biases what rounding adds to the mean of each channel."""
    keep_float: Tuple[str, ...] = ()
    """Products or blocks to keep in float, as `FloatGraph` takes them."""
    max_ap_drop: Optional[float] = None
    """How many points of AP, of 100, INT8 may cost; None: it is not measured."""
    nearest: bool = False
    """Where that budget cannot be met, whether to write the model that comes nearest to it."""
    int8_predictors: bool = False
    """Whether the products of the final predictions are quantised, whatever it costs; with a budget: within it."""
    num_images: Optional[int] = None
    """How many images to calibrate on, at most; None: NUM_IMAGES, and where models are compared four fifths of all."""
    choice: str = "random"
    """How the images are chosen: a name of `calibration.images.CHOICES`."""
    seed: int = 0
    """Seed of the choice of images."""
    statistics: Optional[Path] = None
    """File that keeps what was seen of the activations; None: it is not kept."""

    @property
    def compares_models(self) -> bool:
        """Whether models are compared on images that are not calibrated on."""
        return self.method == AUTO or self.bias_correction

    @property
    def methods(self) -> Tuple[str, ...]:
        """The range methods that are tried."""
        return tuple(RANGE_METHODS) if self.method == AUTO else (self.method,)


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """The annotation files whose images a model is calibrated and measured on."""

    calibration: CocoSet
    """The set that calibration images are chosen from."""
    evaluations: Tuple[CocoSet, ...]
    """The sets that no calibration image may be in."""
    budget: Optional[CocoSet] = None
    """The set that the drop of AP is measured on, one of the evaluations; None without a budget."""

    @property
    def files(self) -> Dict[str, AnyPath]:
        """The annotation files that a model depends on, by their role."""
        files: Dict[str, AnyPath] = {"annotations": self.calibration.annotations_path}
        if self.budget is not None:
            files["budget_annotations"] = self.budget.annotations_path
        return files


def int8_from_images(
    options: QuantizeOptions, data: CalibrationData, graph: FloatGraph, contract: ModelContract
) -> Quantized:
    """
    The model quantised with ranges over calibration images.

    Args:
        graph: of the float model, with what is kept in float as asked.

    Raises:
        ConfigError: the number of images does not do.
        DataError: an image cannot be read.
        CalibrationError: an image is in an evaluation set, activations or statistics will not do, AP cannot be
            measured, or the budget cannot be met.
    """
    images, held_out = images_to_use(options, data)
    statistics = statistics_to_use(options, data, graph, images, contract)
    quantizer, method_details = quantizer_to_use(options, data, graph, statistics, held_out, contract)
    quantizer, correction_details = with_bias_correction(options, quantizer, images, held_out, contract)
    graph, budget_details, budget_summary = within_budget(options, data.budget, quantizer, images, contract)
    details = {
        "method": quantizer.method,
        **method_details,
        **correction_details,
        **budget_details,
        **details_of_images(options, data, images, held_out, statistics),
    }
    summary = (
        f"method {quantizer.method}, {len(images)} images of {data.calibration.annotations_path}, seed {options.seed}"
        f"{budget_summary}"
    )
    model = quantizer.quantize(graph)
    return Quantized(model, graph, options.target, options.keep_float, data.files, details, summary)


def details_of_images(
    options: QuantizeOptions,
    data: CalibrationData,
    images: Sequence[CocoImage],
    held_out: Sequence[CocoImage],
    statistics: Dict[str, Statistics],
) -> Dict[str, Any]:
    """Details for the sidecar: the images, and the extremes of each activation over them."""
    details = {
        "choice": options.choice,
        "seed": options.seed,
        "num_images": len(images),
        "image_ids": [image.image_id for image in images],
        "images_sha256": sha256_of_images(images),
        "evaluation_annotations": [str(evaluation.annotations_path) for evaluation in data.evaluations],
        "ranges": {name: (float(seen.minimum), float(seen.maximum)) for name, seen in sorted(statistics.items())},
    }
    if held_out:
        details["held_out_image_ids"] = [image.image_id for image in held_out]
    return details


def images_to_use(options: QuantizeOptions, data: CalibrationData) -> Tuple[List[CocoImage], List[CocoImage]]:
    """
    The images to calibrate on, and the held-out ones to compare models on, where models are to be compared.

    Raises:
        ConfigError: there are no images, or none is left to hold out.
        DataError: an image cannot be read.
        CalibrationError: an image is in an evaluation set.
    """
    number, there = options.num_images, len(data.calibration.images)
    if number is None:
        number = min(NUM_IMAGES, max(1, there * 4 // 5)) if options.compares_models else NUM_IMAGES
        if number < min(NUM_IMAGES, there):
            say(f"{number} of {there} images are calibrated on, models compared on the others; --num-images to choose")
    images = calibration_images(data.calibration, number, options.seed, data.evaluations, options.choice)
    held_out: List[CocoImage] = []
    if options.compares_models:
        held_out = choose_held_out(data.calibration.images, images, options.seed)
    check_image_files(held_out)
    for evaluation in data.evaluations:
        check_no_overlap(held_out, evaluation)
    if not data.evaluations:
        warn("no evaluation set is known, so that no overlap was looked for; name it with --evaluation-annotations")
    return images, held_out


def choose_held_out(images: Sequence[CocoImage], calibrated: Sequence[CocoImage], seed: int) -> List[CocoImage]:
    """
    Up to HELD_OUT_IMAGES of the images that are not calibrated on.

    Raises:
        ConfigError: there is none.
    """
    chosen = {image.image_id for image in calibrated}
    rest = [image for image in images if image.image_id not in chosen]
    if not rest:
        raise ConfigError(
            "--method auto and --bias-correction compare models on images that are not calibrated on, and --num-images "
            f"takes all {len(images)} of the split; expected some to be left. Lower --num-images."
        )
    return choose_images(rest, HELD_OUT_IMAGES, seed)


def statistics_to_use(
    options: QuantizeOptions,
    data: CalibrationData,
    graph: FloatGraph,
    images: Sequence[CocoImage],
    contract: ModelContract,
) -> Dict[str, Statistics]:
    """Tensor -> statistics over the images, of every tensor whose range the methods and the search may ask."""
    choose_tensors = tensors_of_placement if data.budget is None else tensors_of_any_choice
    tensors = choose_tensors(graph, options.target)
    return statistics_of_images(
        graph.model, tensors, images, contract, options.statistics, options.model, options.methods
    )


def quantizer_to_use(
    options: QuantizeOptions,
    data: CalibrationData,
    graph: FloatGraph,
    statistics: Dict[str, Statistics],
    held_out: Sequence[CocoImage],
    contract: ModelContract,
) -> Tuple[Quantizer, Dict[str, Any]]:
    """The quantizer of the method that was asked for, or of the best of all; and details of that for the sidecar."""
    quantizers = {
        method: Quantizer(
            graph.model,
            options.target,
            method,
            options.percentile,
            options.keep_float,
            statistics,
            int8_predictors=options.int8_predictors,
        )
        for method in options.methods
    }
    method = options.method
    details: Dict[str, Any] = {}
    if method == AUTO:
        candidates = {name: quantizer.quantize(graph) for name, quantizer in quantizers.items()}
        method, details["auto_ap"] = best_method(candidates, held_out, data.calibration, contract)
    if method == "percentile":
        details["percentile"] = options.percentile
    return quantizers[method], details


def best_method(
    candidates: Dict[str, onnx.ModelProto], held_out: Sequence[CocoImage], calibration: CocoSet, contract: ModelContract
) -> Tuple[str, Dict[str, float]]:
    """
    The method whose model has the best AP on the held-out images, the first of equals; and the AP of each.

    Args:
        candidates: method -> quantised model.
        calibration: the set that the images are of.

    Raises:
        CalibrationError: an AP cannot be measured.
    """
    document = coco_document(dataclasses.replace(calibration, images=list(held_out)), as_annotated=True)
    ap: Dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "held_out.json"
        write_json(annotations, document)
        for method, model in candidates.items():
            with saved(model, contract) as path:
                ap[method] = float(accuracy_numbers(path, annotations, calibration.images_dir)["AP"])
            say(f"{method}: AP {100 * ap[method]:.2f} on {len(held_out)} held-out images")
    if not any(ap.values()):
        warn("no model finds anything in the held-out images, so that their AP says nothing of the methods")
    return max(ap, key=lambda method: ap[method]), ap


def with_bias_correction(
    options: QuantizeOptions,
    quantizer: Quantizer,
    images: Sequence[CocoImage],
    held_out: Sequence[CocoImage],
    contract: ModelContract,
) -> Tuple[Quantizer, Dict[str, Any]]:
    """The quantizer, with bias corrections where they are asked for; and details of their effect for the sidecar."""
    if not options.bias_correction:
        return quantizer, {}
    compared_on = choose_images(held_out, ERROR_IMAGES, options.seed)
    corrected = quantizer.corrected(images, contract)
    return corrected, {"bias_correction": effect_of_correction(corrected, options.model, compared_on, contract)}


def effect_of_correction(
    quantizer: Quantizer, model_path: Path, images: Sequence[CocoImage], contract: ModelContract
) -> Dict[str, Any]:
    """
    `error_without` and `error_with` bias correction, as `OutputError.of` on images that are not calibrated on.

    Args:
        quantizer: with corrections.
        model_path: of the float model.

    Raises:
        CalibrationError: the float model detects nothing.
    """
    output_error, effect = OutputError(model_path, images), {}
    for key, tried in (("error_without", dataclasses.replace(quantizer, corrections={})), ("error_with", quantizer)):
        with saved(tried.quantize(tried.graph()), contract) as path:
            effect[key] = output_error.of(path)
    before, after = (100 * total_error(error) for error in effect.values())
    say(
        f"bias correction: the error of boxes and scores goes from {before:.2f} % to {after:.2f} % on {len(images)} "
        "held-out images"
    )
    if after > before:
        warn("bias correction does not help here; do without it")
    return effect


def within_budget(
    options: QuantizeOptions,
    budget: Optional[CocoSet],
    quantizer: Quantizer,
    images: Sequence[CocoImage],
    contract: ModelContract,
) -> Tuple[FloatGraph, Dict[str, Any], str]:
    """
    The float graph with what is kept in float, for the budget too; what the sidecar and people are told of the search.

    Raises:
        CalibrationError: AP cannot be measured, or the budget cannot be met.
    """
    graph = quantizer.graph()
    if budget is None or options.max_ap_drop is None:
        return graph, {}, ""
    settings = {
        "target": options.target,
        "method": quantizer.method,
        "percentile": options.percentile,
        "bias correction": options.bias_correction,
        "predictors": options.int8_predictors,
    }
    key = key_of_measurements(options.model, contract, graph, settings, images, budget)
    journal = Journal(journal_path(options.output), key)
    kept, step, details = kept_for_budget(
        quantizer, options.max_ap_drop, options.model, budget, contract, journal, options.nearest
    )
    int8_predictors = options.int8_predictors or step.int8_predictors
    graph = dataclasses.replace(quantizer, int8_predictors=int8_predictors).graph(kept)
    graph.kept.update((node.output[0], FloatReason.AP_BUDGET) for node in graph.products if node_name(node) in kept)
    return graph, {"budget": details}, f"\n{text_of_result(step, options.max_ap_drop, budget)}"
