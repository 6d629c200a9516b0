"""
Ranges that are given, so that no images are needed: a calibration cache of TensorRT, or what a training with INT8 in
the loop (`crosskd.distill --quantize int8`) leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Sequence, Tuple

from calibration.collect import tensors_that_may_grow
from calibration.float_model import check_quantizable
from calibration.placement import PLACEMENTS, FloatGraph, Placement, node_name
from calibration.qdq import quantize_graph
from calibration.quantizer import Quantized
from calibration.ranges import Ranges
from deploy.contract import read_sidecar
from deploy.errors import CalibrationError
from deploy.files import AnyPath
from deploy.graphs.calibration_cache import read_cache
from deploy.schema import Choice, Items, Number, read_checked

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
"""The largest float32: a larger scale could not be written."""
TRAINED_RANGES = {
    "target": Choice(tuple(PLACEMENTS)),
    "keep_float": [str],
    "weights_sha256": str,
    "ranges": {str: Items(Number(-LARGEST_FLOAT32, LARGEST_FLOAT32), 2, 2)},
}
"""Table of the file of `--ranges`."""
NORMALISING_OPS = ("Cast", "Transpose", "Sub", "Add", "Mul", "Div")
"""Operators that, with constants, make of a graph's uint8 pixels the input that the training had."""


@dataclasses.dataclass(frozen=True)
class TrainedRanges:
    """The ranges that a training with INT8 in the loop has learnt: a file of `crosskd.distill --quantize int8`."""

    path: str
    target: str
    keep_float: Tuple[str, ...]
    """Names of the products that were in float."""
    weights_sha256: str
    """SHA-256 of the weights that were trained."""
    ranges: Ranges
    """Range of each tensor that gets a pair, as `deploy.int8_format.Quantization.range` has it."""


def int8_from_cache(path: str, target: str, keep_float: Sequence[str], graph: FloatGraph) -> Quantized:
    """
    The model quantised with the ranges of a calibration cache of TensorRT.

    Args:
        keep_float: what of the graph is kept in float as asked.

    Raises:
        CalibrationError: the file is no cache, or lacks a tensor.
    """
    ranges = ranges_from_cache(path, PLACEMENTS[target](graph))
    growing = read_cache(path, set(tensors_that_may_grow(graph.model)))
    others = {name: (-amax, amax) for name, amax in growing.items()}
    return _quantized(graph, ranges, target, keep_float, "calibration cache", {"calibration_cache": path}, others)


def int8_from_training(trained: TrainedRanges, model_path: AnyPath, graph: FloatGraph) -> Quantized:
    """
    The model quantised with the ranges that a training with INT8 in the loop has learnt.

    Args:
        model_path: of the float model.
        graph: of the float model, with nothing kept in float that need not be.

    Raises:
        CalibrationError: the ranges are of other weights, or of another graph.
    """
    check_weights(trained, model_path)
    graph, ranges = graph_as_trained(trained, graph)
    return _quantized(graph, ranges, trained.target, trained.keep_float, "trained ranges", {"ranges": trained.path}, {})


def _quantized(
    graph: FloatGraph,
    ranges: Ranges,
    target: str,
    keep_float: Sequence[str],
    method: str,
    inputs: Dict[str, AnyPath],
    others: Ranges,
) -> Quantized:
    """The model; `others` are ranges of tensors that get no pair, of which FP16 wants to know."""
    model = quantize_graph(graph, PLACEMENTS[target](graph), ranges, target)
    details = {"method": method, "ranges": {**others, **ranges}}
    summary = f"ranges of {', '.join(map(str, inputs.values()))}"
    return Quantized(model, graph, target, tuple(keep_float), inputs, details, summary)


def ranges_from_cache(path: str, placement: Placement) -> Ranges:
    """
    The range of each tensor that gets a pair, from a calibration cache of TensorRT.

    Raises:
        CalibrationError: it is no cache, or a tensor is not in it, or has no scale there.
    """
    tensors = sorted(set(placement.pairs.values()))
    amax = read_cache(path, set(tensors))
    missing = [name for name in tensors if name not in amax]
    if missing:
        raise CalibrationError(
            f"{path} has no range for {len(missing)} of {len(tensors)} tensors: {', '.join(missing[:5])}; expected a "
            "cache that was made with this very ONNX file. Calibrate on images instead, with --data."
        )
    return {name: (-amax[name], amax[name]) for name in tensors}


def read_trained_ranges(path: str) -> TrainedRanges:
    """
    The content of a file of `--ranges`.

    Raises:
        CalibrationError: it is missing or no such file, or a range is none.
    """
    what = "the int8.json of a run of crosskd.distill --quantize int8"
    document = read_checked(path, TRAINED_RANGES, CalibrationError, what)
    ranges = {name: (float(low), float(high)) for name, (low, high) in document["ranges"].items()}
    for name, (low, high) in ranges.items():
        if low >= high:
            raise CalibrationError(
                f"{path}: the range of the tensor {name} is {[low, high]}; expected [smallest, largest], the first "
                "below the second. The training may have diverged: look at its losses."
            )
    return TrainedRanges(path, document["target"], tuple(document["keep_float"]), document["weights_sha256"], ranges)


def check_weights(trained: TrainedRanges, model_path: AnyPath) -> None:
    """Raises CalibrationError if the model was exported from other weights than those that were trained."""
    weights = read_sidecar(model_path)["inputs"].get("weights")
    if weights is not None and weights["sha256"] != trained.weights_sha256:
        raise CalibrationError(
            f"{trained.path} has the ranges of other weights than {weights['file']}, which {model_path} was exported "
            "from; expected an export of the run that the file lies in"
        )


def graph_as_trained(trained: TrainedRanges, graph: FloatGraph) -> Tuple[FloatGraph, Ranges]:
    """
    The graph with that in float which was in float in the training, and the range of each tensor that gets a pair.

    Args:
        graph: with nothing kept in float that need not be.

    Raises:
        CalibrationError: the file was made for another graph.
    """
    made_for = f"{trained.path} was made for another graph: it"
    way_out = "expected the int8.json of the run that this model was exported from"
    names = {node_name(node) for node in graph.products}
    unknown = [name for name in trained.keep_float if name not in names]
    if unknown:
        raise CalibrationError(
            f"{made_for} keeps {len(unknown)} products in float that the model has not: {', '.join(unknown[:5])}; "
            f"{way_out}."
        )
    graph = FloatGraph(graph.model, trained.keep_float)
    check_quantizable(graph)
    tensors = set(PLACEMENTS[trained.target](graph).pairs.values())
    image = graph.model.graph.input[0].name
    ranges = {_normalised_image(graph) if name == image else name: limits for name, limits in trained.ranges.items()}
    missing, needless = sorted(tensors - set(ranges)), sorted(set(ranges) - tensors)
    if missing:
        raise CalibrationError(
            f"{made_for} has no range for {len(missing)} of {len(tensors)} tensors: {', '.join(missing[:5])}; "
            f"{way_out}."
        )
    if needless:
        raise CalibrationError(
            f"{made_for} has ranges of tensors that need none, {len(needless)}: {', '.join(needless[:5])}; {way_out}."
        )
    return graph, ranges


def _normalised_image(graph: FloatGraph) -> str:
    """The graph's input, or what the graph itself makes of it before anything learnt."""
    name = str(graph.model.graph.input[0].name)
    while True:
        readers = graph.readers(name)
        if len(readers) != 1 or readers[0].op_type not in NORMALISING_OPS:
            return name
        name = readers[0].output[0]
