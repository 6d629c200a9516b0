"""
All that decides how a float model is quantised, but for what is kept in float: so that many sets can be tried.

Needs onnx, and onnxruntime to collect statistics.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from calibration.collect import (
    check_no_overlap,
    choose_images,
    empty_statistics,
    extend_statistics,
    sha256_of_images,
)
from calibration.correction import Corrections, bias_corrections, with_corrected_biases
from calibration.placement import PLACEMENTS, Graph, Placement, node_name
from calibration.qdq import quantize_graph
from calibration.ranges import PERCENTILE, range_from_statistics
from calibration.statistics import Statistics, load_statistics, save_statistics
from deploy.contract import ModelContract, package_versions
from deploy.dataset import CocoImage, CocoSet, check_image_files
from deploy.errors import CalibrationError
from deploy.files import AnyPath, sha256_of

if TYPE_CHECKING:
    import onnx

Ranges = Dict[str, Tuple[float, float]]
"""Tensor -> (smallest, largest) value that INT8 is to hold."""

FEWEST_IMAGES = 300
"""Below it ranges vary from sample to sample; a warning, not an error."""
GROWING_OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul",
    "InstanceNormalization", "GroupNormalization", "LayerNormalization",
)  # fmt: skip
"""Their outputs can be larger than their inputs: where FP16 may overflow, which the sidecar's `ranges` tell."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A float model and how it is quantised."""

    model: onnx.ModelProto
    target: str
    method: str
    percentile: float
    keep_float: Tuple[str, ...]
    """What stays in float in any case, as `Graph` takes it."""
    statistics: Dict[str, Statistics]
    """Of `tensors_of_any_choice`, or of `tensors_of_placement` where no other choice is tried."""
    corrections: Corrections = dataclasses.field(default_factory=dict)
    """To the biases of all convolutions that may be quantised, or of none."""

    def graph(self, kept: Sequence[str] = ()) -> Graph:
        """The float graph with these convolutions, by name, kept in float too."""
        return Graph(self.model, [*self.keep_float, *kept])

    def graph_of(self, convolutions: Sequence[str]) -> Graph:
        """The float graph with all but these convolutions, by name, kept in float."""
        return self.graph([name for name in map(node_name, self.graph().quantized) if name not in convolutions])

    def quantize(self, graph: Graph) -> onnx.ModelProto:
        """
        The graph, of `graph` or `graph_of`, in INT8.

        Raises:
            CalibrationError: a tensor that gets a pair has one value only.
        """
        placement, ranges = self._placed(graph)
        if self.corrections:
            graph = with_corrected_biases(graph, self.corrections)
        return quantize_graph(graph, placement, ranges, self.target)

    def corrected(self, images: Sequence[CocoImage], contract: ModelContract) -> Recipe:
        """
        This recipe with the bias corrections of the calibration images.

        Raises:
            As `bias_corrections` and `quantize`.
        """
        graph = self.graph()
        placement, ranges = self._placed(graph)
        corrections = bias_corrections(graph, placement, ranges, self.target, images, contract)
        return dataclasses.replace(self, corrections=corrections)

    def _placed(self, graph: Graph) -> Tuple[Placement, Ranges]:
        placement = PLACEMENTS[self.target](graph)
        return placement, ranges_from_statistics(self.statistics, placement, self.method, self.target, self.percentile)


def tensors_of_placement(graph: Graph, target: str) -> List[str]:
    """The tensors whose ranges the graph's INT8 model needs."""
    return sorted(set(PLACEMENTS[target](graph).pairs.values()))


def tensors_of_any_choice(graph: Graph, target: str) -> List[str]:
    """
    The tensors whose ranges are needed, whichever of the graph's convolutions are kept in float.

    A pair moves with what is kept: behind a float convolution it no longer comes from before a MaxPool, and of two
    branches of an addition the other one is the skip branch. Where such a pair can be, it is for one convolution alone.
    """
    names = [node_name(node) for node in graph.quantized]
    always = [node_name(node) for node in graph.convolutions if node.output[0] in graph.kept]
    found: Set[str] = set()
    for alone in (None, *names):
        kept = [name for name in names if alone is not None and name != alone]
        pairs = PLACEMENTS[target](Graph(graph.model, [*always, *kept])).pairs
        found.update(pairs, pairs.values())
    return sorted(found)


def tensors_that_may_grow(model: onnx.ModelProto) -> List[str]:
    """
    The float32 outputs of GROWING_OPS, as far as the last convolutions: the decoding after them may use infinity.
    """
    from onnx import TensorProto, shape_inference

    values = shape_inference.infer_shapes(model).graph.value_info
    floating = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    needed = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in GROWING_OPS and node.output[0] in floating & needed
    ]


def calibration_images(calibration: CocoSet, number: int, seed: int, evaluations: Sequence[CocoSet]) -> List[CocoImage]:
    """
    `number` images of the set by seed, whole and in none of the evaluation sets; a warning if they are few.

    Raises:
        ConfigError: `number` is below 1.
        DataError: an image is missing or truncated.
        CalibrationError: an image is in an evaluation set.
    """
    images = choose_images(calibration.images, number, seed)
    check_image_files(images)
    for evaluation in evaluations:
        check_no_overlap(images, evaluation)
    if len(images) < FEWEST_IMAGES:
        warn(f"{len(images)} calibration images; {FEWEST_IMAGES} or more give ranges that do not hang on the choice")
    return images


def collect(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Sequence[CocoImage],
    contract: ModelContract,
    file: Optional[Path],
    model_path: Path,
    methods: Sequence[str],
) -> Dict[str, Statistics]:
    """
    Tensor -> statistics over the images: of `tensors`, and extremes of those of `tensors_that_may_grow`.

    Args:
        file: where they are kept, for any method; statistics that it has already are not collected again.
        methods: that they are for. `max` alone needs no histograms, which cost time.
        model_path: of the model.

    Raises:
        CalibrationError: the file is of another model, of other images or for another target, or an activation is not
            finite.
    """
    growing = tensors_that_may_grow(model)
    if file is None and set(methods) == {"max"}:
        tensors, growing = [], [*tensors, *growing]
    minmax_only = sorted(set(growing) - set(tensors))
    if file is not None and file.is_file():
        collected = load_statistics(file, model_path, contract)
        collected.check_tensors(tensors, minmax_only, file)
        others = set(collected.image_ids) - {sha256_of(image.path) for image in images}
        if others:
            raise CalibrationError(
                f"{file} holds statistics of {len(collected.image_ids)} images, {len(others)} of which are not among "
                f"the {len(images)} chosen now; expected no others. Choose the same data, --num-images and --seed, "
                "or name another file with --statistics."
            )
    else:
        collected = empty_statistics(tensors, minmax_only)
    known = len(collected.image_ids)
    extend_statistics(collected, model, images, contract)
    if file is not None and len(collected.image_ids) > known:
        save_statistics(file, collected, model_path, contract)
    return collected.statistics


def key_of_measurements(
    model_path: AnyPath,
    contract: ModelContract,
    graph: Graph,
    settings: Mapping[str, Any],
    images: Sequence[CocoImage],
    measured: CocoSet,
) -> Dict[str, Any]:
    """
    What measurements of INT8 models depend on, as JSON gives it back: those of an equal key can be gone on with.

    Args:
        model_path: of the float model.
        graph: with what is kept in float in any case.
        settings: name -> value, of what else they depend on; the name is for people.
        images: that are calibrated on.
        measured: the images to measure on.
    """
    return {
        "model": sha256_of(model_path),
        "contract": json.loads(json.dumps(contract.to_json())),  # tuples become lists
        **settings,
        "package versions": package_versions(),
        "convolutions kept in float": [node_name(n) for n in graph.convolutions if n.output[0] in graph.kept],
        "calibration images": sha256_of_images(images),
        "annotations": sha256_of(measured.annotations_path),
        "measured images": sha256_of_images(measured.images),
    }


def ranges_from_statistics(
    statistics: Dict[str, Statistics],
    placement: Placement,
    method: str,
    target: str,
    percentile: float = PERCENTILE,
) -> Ranges:
    """
    The range of each tensor that gets a pair.

    Raises:
        CalibrationError: a tensor has one value only.
    """
    found = {}
    for name in sorted(set(placement.pairs.values())):
        seen = statistics[name]
        if seen.minimum == seen.maximum:
            raise CalibrationError(
                f"the tensor {name} is {seen.minimum:g} everywhere in all calibration images; expected an activation "
                "that varies. Are they images that the model is for? If this part of it is dead for good, keep the "
                "convolutions beside it in float with --keep-float."
            )
        found[name] = range_from_statistics(seen, method, target == "tensorrt", percentile)
    return found


def warn(text: str) -> None:
    """Prints a warning for people."""
    print(f"warning: {text}", file=sys.stderr)
