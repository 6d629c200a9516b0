"""
A float ONNX detector -> an INT8 one, with Q/DQ pairs (QuantizeLinear, DequantizeLinear) where its runtime wants them.

    python -m calibration.quantize student.onnx --data DIR -o student.int8.onnx
    python -m calibration.quantize student.onnx --annotations train.json --images-dir train/ \\
        --evaluation-annotations val.json --evaluation-images-dir val/ -o student.int8.onnx

    python -m calibration.quantize student.onnx --data DIR --max-ap-drop 0.3 -o student.int8.onnx

Needs onnx, onnxruntime, OpenCV, and the sidecar that `deploy.export`, or `deploy.adopt_onnx` for a detector from
elsewhere, wrote beside the model; `--method auto` and `--max-ap-drop` also what `benchmarks.accuracy` needs.

What is quantised and where the pairs go, for each target: see `calibration.placement`. On x86 CPUs without VNNI ONNX
Runtime's integer kernels add pairs of products in 16 bits, which can saturate: measure AP there.

The ranges of activations come from calibration images, by a method of `calibration.ranges`; `--method auto` quantises
with each and takes the one of the best AP on images of the same split that were not calibrated on. Or they come from a
calibration cache of TensorRT, or from a training with INT8 in the loop (`--ranges`), and no images are needed.
`--bias-correction`: see `calibration.correction`.

With `--max-ap-drop` blocks of convolutions are kept in float until INT8 costs no more AP than that, measured on the
images of `--budget-split`: see `calibration.search`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from calibration.collect import statistics_of_images
from calibration.float_model import read_model
from calibration.given_ranges import check_weights, graph_as_trained, ranges_from_cache, read_trained_ranges
from calibration.images import calibration_images, check_no_overlap, choose_images, sha256_of_images
from calibration.measure import ERROR_IMAGES, OutputError, accuracy_numbers, saved, total_error
from calibration.messages import warn
from calibration.placement import PLACEMENTS, FloatGraph, node_name
from calibration.qdq import quantize_graph
from calibration.quantizer import (
    Quantizer,
    key_of_measurements,
    tensors_of_any_choice,
    tensors_of_placement,
)
from calibration.ranges import PERCENTILE, RANGE_METHODS, Ranges
from calibration.search import Journal, journal_path, kept_for_budget, text_of_result
from deploy.contract import ModelContract, write_sidecar
from deploy.dataset import SPLITS, CocoImage, CocoSet, check_image_files, load_coco, load_split, split_paths
from deploy.errors import CalibrationError, ConfigError, command
from deploy.files import AnyPath, check_writable, read_json, write_json
from deploy.graphs.calibration_cache import amax_from_quantised, write_cache
from deploy.graphs.graph import check_graph, save_onnx
from deploy.int8_format import FloatReason

if TYPE_CHECKING:
    import onnx

HELD_OUT_IMAGES = 128
"""Of the calibration split, for `--method auto` to compare methods on; beyond those that are calibrated on."""
TARGET = "tensorrt"
NUM_IMAGES = 512


@dataclasses.dataclass
class Quantized:
    """A quantised model and where its ranges come from, for the sidecar."""

    graph: FloatGraph
    """The float one, with what is kept in float."""
    model: onnx.ModelProto
    inputs: Dict[str, AnyPath]
    details: Dict[str, Any]
    source: str
    """In words, for people."""


def int8_from_ranges(
    graph: FloatGraph, ranges: Ranges, target: str, method: str, inputs: Dict[str, AnyPath]
) -> Quantized:
    """
    The model quantised with ranges that are given.

    Args:
        method: where they come from, in words.
        inputs: the file that they are in.
    """
    model = quantize_graph(graph, PLACEMENTS[target](graph), ranges, target)
    files = ", ".join(map(str, inputs.values()))
    return Quantized(graph, model, inputs, {"method": method, "ranges": ranges}, f"ranges of {files}")


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
    document = read_json(calibration.annotations_path, CalibrationError, "COCO annotations")
    ids = {image.image_id for image in held_out}
    document["images"] = [entry for entry in document["images"] if entry["id"] in ids]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in ids]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "held_out.json"
        write_json(annotations, document)
        for method, model in candidates.items():
            with saved(model, contract) as path:
                found[method] = float(accuracy_numbers(path, annotations, calibration.images_dir)["AP"])
            print(f"{method}: AP {100 * found[method]:.2f} on {len(held_out)} held-out images", file=sys.stderr)
    if not any(found.values()):
        warn("no model finds anything in the held-out images, so that their AP says nothing of the methods")
    return max(found, key=lambda method: found[method]), found


def load_calibration_set(arguments: argparse.Namespace) -> CocoSet:
    """
    The annotation file that `--data` and `--split`, or `--annotations` and `--images-dir`, name.

    Raises:
        ConfigError: the flags do not go together.
        DataError: the data is missing or not COCO.
    """
    if arguments.data:
        if arguments.images_dir:
            raise ConfigError(
                f"--images-dir is {arguments.images_dir}; expected none with --data, whose images are in images/"
            )
        return load_coco(*split_paths(arguments.data, arguments.split or "train"), check_files=False)
    if not arguments.images_dir:
        raise ConfigError("--annotations is given without --images-dir; expected the folder of its images")
    if arguments.split:
        raise ConfigError(
            f"--split is {arguments.split}; expected none with --annotations, which names the file itself"
        )
    return load_coco(arguments.annotations, arguments.images_dir, check_files=False)


def load_evaluation_sets(arguments: argparse.Namespace, calibration: CocoSet) -> List[CocoSet]:
    """
    What the calibration images must not overlap with: `--evaluation-annotations`, or else val and test of `--data`.

    Raises:
        ConfigError: the flags do not go together.
        DataError: the data is missing or not COCO.
    """
    if arguments.evaluation_images_dir and not arguments.evaluation_annotations:
        raise ConfigError("--evaluation-images-dir is given without --evaluation-annotations; expected both or neither")
    paths = [Path(path) for path in arguments.evaluation_annotations]
    if arguments.data and not paths:
        folder = calibration.annotations_path.parent
        paths = [path for path in (folder / f"instances_{split}.json" for split in ("val", "test")) if path.is_file()]
    images_dir = arguments.evaluation_images_dir or calibration.images_dir
    return [load_coco(path, images_dir, check_files=False) for path in paths]


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.quantize", description="Quantise an ONNX detector to INT8, with Q/DQ nodes."
    )
    parser.add_argument("model", help="float ONNX file, with its sidecar")
    parser.add_argument("-o", "--output", required=True, help="INT8 ONNX file to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", metavar="DIR", help="folder with annotations/instances_{train,val,test}.json and images/"
    )
    source.add_argument("--annotations", metavar="FILE", help="COCO file of the calibration images; with --images-dir")
    source.add_argument(
        "--calibration-cache", metavar="FILE", help="ranges from a calibration cache of TensorRT instead of images"
    )
    source.add_argument(
        "--ranges", metavar="FILE",
        help="target, what is kept in float and ranges, of a student that was trained with INT8: its int8.json",
    )  # fmt: skip
    parser.add_argument("--images-dir", metavar="DIR", help="folder of the images of --annotations")
    parser.add_argument("--split", choices=SPLITS, help="split of --data to calibrate on (default: train)")
    parser.add_argument(
        "--target",
        choices=sorted(PLACEMENTS),
        help=f"runtime that will run it (default: {TARGET}, or that of --ranges)",
    )
    parser.add_argument(
        "--method", choices=(*RANGE_METHODS, "auto"), default="max",
        help="how a range is taken from what was seen; auto: the best of them by AP (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--percentile", type=float, metavar="P",
        help=f"how many values in a hundred the method of that name does not clip (default: {PERCENTILE})",
    )  # fmt: skip
    parser.add_argument(
        "--bias-correction", action="store_true",
        help="take off biases what rounding adds to the mean of each channel; its effect is measured",
    )  # fmt: skip
    parser.add_argument(
        "--keep-float", nargs="+", default=[], metavar="NAME",
        help="convolutions to keep in float: names of nodes, or what the names of a block's nodes begin with",
    )  # fmt: skip
    parser.add_argument(
        "--max-ap-drop", type=float, metavar="POINTS",
        help="keep in float what must be so that AP drops by no more than this, of 100, such as 0.3; with --data",
    )  # fmt: skip
    parser.add_argument(
        "--budget-split", choices=SPLITS, help="split of --data that --max-ap-drop is measured on (default: val)"
    )
    parser.add_argument(
        "--num-images", type=int, default=NUM_IMAGES, metavar="N", help="images to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")
    parser.add_argument(
        "--statistics", metavar="FILE",
        help="keep what was seen of the activations in FILE; if it is there, take it from there (.npz)",
    )  # fmt: skip
    parser.add_argument(
        "--write-calibration-cache", metavar="FILE", help="write the ranges as a calibration cache of TensorRT, too"
    )
    parser.add_argument(
        "--tensorrt-version", metavar="VERSION", help="for which that cache is, such as 8.5.3: others do not take it"
    )
    parser.add_argument(
        "--evaluation-annotations", nargs="+", default=[], metavar="FILE",
        help="COCO files with none of whose images to calibrate (default: val and test of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation-images-dir",
        metavar="DIR",
        help="folder of their images (default: that of the calibration images)",
    )
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if flags do not go together, PipelineError if a file could not be written."""
    output = Path(arguments.output)
    if output.suffix != ".onnx":
        raise ConfigError(f"--output is {output}; expected a file with the suffix .onnx")
    files = {
        flag: Path(path).resolve()
        for flag, path in (
            ("the model", arguments.model), ("--output", output), ("--statistics", arguments.statistics),
            ("--calibration-cache", arguments.calibration_cache), ("--ranges", arguments.ranges),
            ("--write-calibration-cache", arguments.write_calibration_cache),
        )
        if path
    }  # fmt: skip
    if len(set(files.values())) < len(files):
        named = ", ".join(f"{flag}: {path}" for flag, path in files.items())
        raise ConfigError(f"two of the files to read and write are one ({named}); expected a file for each")
    if arguments.percentile is not None:
        if arguments.method not in ("percentile", "auto"):
            raise ConfigError(
                f"--percentile is given; expected none with --method {arguments.method}, which has no use"
            )
        if not 50 < arguments.percentile <= 100:
            raise ConfigError(f"--percentile is {arguments.percentile}; expected above 50, at most 100, such as 99.99")
    if arguments.max_ap_drop is not None and not (math.isfinite(arguments.max_ap_drop) and arguments.max_ap_drop >= 0):
        raise ConfigError(f"--max-ap-drop is {arguments.max_ap_drop}; expected points of AP, 0 or more, such as 0.3")
    if arguments.max_ap_drop is not None and not arguments.data:
        raise ConfigError("--max-ap-drop is given without --data; expected the folder that --budget-split is a part of")
    if arguments.budget_split and arguments.max_ap_drop is None:
        raise ConfigError(f"--budget-split is {arguments.budget_split}; expected none without --max-ap-drop")
    if bool(arguments.write_calibration_cache) != bool(arguments.tensorrt_version):
        raise ConfigError("expected both --write-calibration-cache and --tensorrt-version, or neither; one is given")
    if arguments.tensorrt_version and not re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", arguments.tensorrt_version):
        raise ConfigError(f"--tensorrt-version is {arguments.tensorrt_version!r}; expected one such as 8.5.3")
    if arguments.calibration_cache or arguments.ranges:
        given = [
            flag
            for flag, value in (
                ("--images-dir", arguments.images_dir), ("--split", arguments.split),
                ("--statistics", arguments.statistics), ("--method", arguments.method != "max"),
                ("--bias-correction", arguments.bias_correction),
                ("--num-images", arguments.num_images != NUM_IMAGES), ("--seed", arguments.seed),
                ("--evaluation-annotations", arguments.evaluation_annotations),
                ("--evaluation-images-dir", arguments.evaluation_images_dir),
            )
            if value
        ]  # fmt: skip
        if given:
            source = "--ranges" if arguments.ranges else "--calibration-cache"
            raise ConfigError(f"{', '.join(given)}: expected none with {source}, which needs no images")
    given = [flag for flag, value in (("--target", arguments.target), ("--keep-float", arguments.keep_float)) if value]
    if arguments.ranges and given:
        raise ConfigError(f"{', '.join(given)}: expected none with --ranges, whose file says it as it was trained")
    for path in (arguments.output, arguments.statistics, arguments.write_calibration_cache):
        if path and not (path == arguments.statistics and Path(path).is_file()):
            check_writable(path)


def check_target(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if what is to be read or written is not for the target."""
    if arguments.target != "tensorrt" and (arguments.calibration_cache or arguments.write_calibration_cache):
        raise ConfigError(
            f"the target is {arguments.target}; expected tensorrt with a calibration cache, which has symmetric ranges"
        )


def int8_from_images(arguments: argparse.Namespace, graph: FloatGraph, contract: ModelContract) -> Quantized:
    """
    The model quantised with ranges over calibration images.

    Raises:
        ConfigError: flags do not go together.
        DataError: the data is missing or not COCO, or an image cannot be read.
        CalibrationError: an image is in an evaluation set, or activations or statistics will not do.
    """
    calibration = load_calibration_set(arguments)
    evaluations = load_evaluation_sets(arguments, calibration)
    budget = None
    if arguments.max_ap_drop is not None:
        budget = load_split(arguments.data, arguments.budget_split or "val")
        if budget.annotations_path not in [evaluation.annotations_path for evaluation in evaluations]:
            evaluations.append(budget)
    images = calibration_images(calibration, arguments.num_images, arguments.seed, evaluations)
    held_out: List[CocoImage] = []
    if arguments.method == "auto" or arguments.bias_correction:
        held_out = choose_held_out(calibration.images, images, arguments.seed)
    check_image_files(held_out)
    for evaluation in evaluations:
        check_no_overlap(held_out, evaluation)
    if not evaluations:
        warn("no evaluation set is known, so that no overlap was looked for; name it with --evaluation-annotations")

    percentile = PERCENTILE if arguments.percentile is None else arguments.percentile
    choose_tensors = tensors_of_placement if budget is None else tensors_of_any_choice
    file = Path(arguments.statistics) if arguments.statistics else None
    methods = RANGE_METHODS if arguments.method == "auto" else (arguments.method,)
    tensors = choose_tensors(graph, arguments.target)
    statistics = statistics_of_images(graph.model, tensors, images, contract, file, Path(arguments.model), methods)
    quantizers = {
        method: Quantizer(graph.model, arguments.target, method, percentile, tuple(arguments.keep_float), statistics)
        for method in methods
    }
    method: str = arguments.method
    details: Dict[str, Any] = {}
    if method == "auto":
        candidates = {name: quantizer.quantize(graph) for name, quantizer in quantizers.items()}
        method, ap = best_method(candidates, held_out, calibration, contract)
        details["auto_ap"] = ap
    if held_out:
        details["held_out_image_ids"] = [image.image_id for image in held_out]
    if method == "percentile":
        details["percentile"] = percentile
    quantizer = quantizers[method]
    if arguments.bias_correction:
        compared_on = choose_images(held_out, ERROR_IMAGES, arguments.seed)
        quantizer = quantizer.corrected(images, contract)
        details["bias_correction"] = effect_of_correction(quantizer, Path(arguments.model), compared_on, contract)
    inputs: Dict[str, AnyPath] = {"annotations": calibration.annotations_path}
    source = f"method {method}, {len(images)} images of {calibration.annotations_path}, seed {arguments.seed}"
    if budget is not None:
        settings = {
            "target": arguments.target,
            "method": method,
            "percentile": percentile,
            "bias correction": arguments.bias_correction,
        }
        key = key_of_measurements(arguments.model, contract, graph, settings, images, budget)
        journal = Journal(journal_path(arguments.output), key)
        kept, final, details["budget"] = kept_for_budget(
            quantizer, arguments.max_ap_drop, Path(arguments.model), budget, contract, journal
        )
        graph = quantizer.graph(kept)
        graph.kept.update(
            (node.output[0], FloatReason.AP_BUDGET) for node in graph.convolutions if node_name(node) in kept
        )
        inputs["budget_annotations"] = budget.annotations_path
        source += f"\n{text_of_result(final, arguments.max_ap_drop, budget)}"
    return Quantized(
        graph,
        quantizer.quantize(graph),
        inputs,
        {
            "method": method,
            **details,
            "seed": arguments.seed,
            "num_images": len(images),
            "image_ids": [image.image_id for image in images],
            "images_sha256": sha256_of_images(images),
            "evaluation_annotations": [str(evaluation.annotations_path) for evaluation in evaluations],
            "ranges": {name: (float(one.minimum), float(one.maximum)) for name, one in sorted(statistics.items())},
        },
        source,
    )


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
    errors, found = OutputError(model_path, images), {}
    for key, tried in (("error_without", dataclasses.replace(quantizer, corrections={})), ("error_with", quantizer)):
        with saved(tried.quantize(tried.graph()), contract) as path:
            found[key] = errors.of(path)
    before, after = (100 * total_error(error) for error in found.values())
    print(
        f"bias correction: the error of boxes and scores goes from {before:.2f} % to {after:.2f} % on {len(images)} "
        "held-out images",
        file=sys.stderr,
    )
    if after > before:
        warn("bias correction does not help here; do without it")
    return found


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


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Quantises one model; see the module's docstring."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    trained = read_trained_ranges(arguments.ranges) if arguments.ranges else None
    arguments.target = trained.target if trained else arguments.target or TARGET
    check_target(arguments)
    graph, contract = read_model(arguments.model, arguments.keep_float)
    if trained:
        check_weights(trained, arguments.model)
        graph, ranges = graph_as_trained(trained, graph)
        quantized = int8_from_ranges(graph, ranges, trained.target, "trained ranges", {"ranges": trained.path})
    elif arguments.calibration_cache:
        cache = arguments.calibration_cache
        ranges = ranges_from_cache(cache, PLACEMENTS[arguments.target](graph))
        quantized = int8_from_ranges(graph, ranges, arguments.target, "calibration cache", {"calibration_cache": cache})
    else:
        quantized = int8_from_images(arguments, graph, contract)
    graph = quantized.graph
    check_graph(quantized.model)
    save_onnx(quantized.model, arguments.output)
    if arguments.write_calibration_cache:
        write_cache(arguments.write_calibration_cache, amax_from_quantised(quantized.model), arguments.tensorrt_version)
    kept = {node_name(node): graph.kept[node.output[0]] for node in graph.convolutions if node.output[0] in graph.kept}
    write_sidecar(
        arguments.output,
        {"model": arguments.model, **quantized.inputs},
        contract,
        {
            "target": arguments.target,
            **quantized.details,
            "keep_float": list(trained.keep_float) if trained else arguments.keep_float,
            "quantized_convolutions": [node_name(node) for node in graph.quantized],
            "float_convolutions": {name: reason.text for name, reason in kept.items()},
            "float_convolution_codes": {name: reason.code for name, reason in kept.items()},
            "op_counts": dict(sorted(collections.Counter(node.op_type for node in quantized.model.graph.node).items())),
        },
    )
    if arguments.max_ap_drop is not None:
        journal_path(arguments.output).unlink(missing_ok=True)  # the sidecar has it now
    reasons = ", ".join(f"{number} {reason.text}" for reason, number in collections.Counter(kept.values()).items())
    print(
        f"{arguments.output}: {len(graph.quantized)} of {len(graph.convolutions)} convolutions in INT8 for "
        f"{arguments.target}, the others in float ({reasons}); {quantized.source}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
