"""
All that decides how a float model is quantised, but for what is kept in float: so that many sets can be tried.

Needs onnx, and onnxruntime for bias correction.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence, Set, Tuple

from calibration.activation_statistics import Statistics
from calibration.correction import Corrections, bias_corrections, with_corrected_biases
from calibration.images import sha256_of_images
from calibration.placement import PLACEMENTS, FloatGraph, Placement, has_signed_activations, node_name
from calibration.qdq import quantize_graph
from calibration.ranges import PERCENTILE, Ranges, range_from_statistics
from deploy.contract import ModelContract, package_versions
from deploy.dataset import CocoImage, CocoSet
from deploy.errors import CalibrationError
from deploy.files import AnyPath, sha256_of

if TYPE_CHECKING:
    import onnx


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A float model and how it is quantised, whatever of it is kept in float."""

    model: onnx.ModelProto
    target: str
    method: str
    percentile: float
    keep_float: Tuple[str, ...]
    """Products or blocks that stay in float in any case, as `FloatGraph` takes them."""
    statistics: Dict[str, Statistics]
    """Tensor -> statistics: `tensors_of_any_choice`, or `tensors_of_placement` where no other choice is tried."""
    corrections: Corrections = dataclasses.field(default_factory=dict)
    """Corrections to the biases of all products that may be quantised and have biases, or of none."""
    int8_predictors: bool = False
    """Whether the products of the final predictions are quantised."""

    def graph(self, kept: Sequence[str] = ()) -> FloatGraph:
        """The float graph with these products, by name, kept in float too."""
        return FloatGraph(self.model, [*self.keep_float, *kept], self.int8_predictors)

    def graph_of(self, products: Sequence[str]) -> FloatGraph:
        """The float graph with all but these products, by name, kept in float."""
        return self.graph([name for name in map(node_name, self.graph().quantized) if name not in products])

    def quantize(self, graph: FloatGraph) -> onnx.ModelProto:
        """
        The graph, of `graph` or `graph_of`, in INT8.

        Raises:
            CalibrationError: a tensor that gets a pair has one value only.
        """
        placement, ranges = self._placed(graph)
        if self.corrections:
            graph = with_corrected_biases(graph, self.corrections)
        return quantize_graph(graph, placement, ranges, self.target)

    def corrected(self, images: Sequence[CocoImage], contract: ModelContract) -> Quantizer:
        """
        This quantizer with the bias corrections of the calibration images.

        Raises:
            As `bias_corrections` and `quantize`.
        """
        graph = self.graph()
        with_predictors = dataclasses.replace(self, int8_predictors=True).graph()
        if self.statistics.keys() >= set(PLACEMENTS[self.target](with_predictors).pairs.values()):
            graph = with_predictors  # whose products may be quantised, too
        placement, ranges = self._placed(graph)
        corrections = bias_corrections(graph, placement, ranges, self.target, images, contract)
        return dataclasses.replace(self, corrections=corrections)

    def _placed(self, graph: FloatGraph) -> Tuple[Placement, Ranges]:
        placement = PLACEMENTS[self.target](graph)
        return placement, ranges_from_statistics(self.statistics, placement, self.method, self.target, self.percentile)


def tensors_of_placement(graph: FloatGraph, target: str) -> List[str]:
    """The tensors whose ranges the graph's INT8 model needs."""
    return sorted(set(PLACEMENTS[target](graph).pairs.values()))


def tensors_of_any_choice(graph: FloatGraph, target: str) -> List[str]:
    """
    The tensors whose ranges are needed, whichever of the graph's products are kept in float, predictors too.

    A pair moves with what is kept: behind a float convolution it no longer comes from before a MaxPool, and of two
    branches of an addition the other one is the skip branch. Where such a pair can be, it is for one product alone.
    """
    of_predictors = {node_name(node) for node in graph.products if node.output[0] in graph.predictors}
    always = [name for name in graph.reasons if name not in of_predictors]
    most = FloatGraph(graph.model, always, int8_predictors=True)
    tensors: Set[str] = set()
    for choice in (most, *(most.with_one(node) for node in most.quantized)):
        tensors.update(PLACEMENTS[target](choice).pairs.values())
    return sorted(tensors)


def key_of_measurements(
    model_path: AnyPath,
    contract: ModelContract,
    graph: FloatGraph,
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
        "products kept in float": list(graph.reasons),
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
    ranges = {}
    for name in sorted(set(placement.pairs.values())):
        seen = statistics[name]
        if seen.minimum == seen.maximum:
            raise CalibrationError(
                f"the tensor {name} is {seen.minimum:g} everywhere in all calibration images; expected an activation "
                "that varies. Are they images that the model is for? If this part of it is dead for good, keep the "
                "products beside it in float with --keep-float."
            )
        ranges[name] = range_from_statistics(seen, method, has_signed_activations(target), percentile)
    return ranges


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised model, and what its sidecar and people are told of it."""

    model: onnx.ModelProto
    graph: FloatGraph
    """The float graph that it was made of, with what is kept in float."""
    target: str
    keep_float: Tuple[str, ...]
    """Products or blocks that were asked to stay in float, as `FloatGraph` takes them."""
    inputs: Dict[str, AnyPath]
    """Files that it was made of besides the model, by their role."""
    details: Dict[str, Any]
    """How its ranges came about, for the sidecar."""
    summary: str
    """How its ranges came about, for people."""
