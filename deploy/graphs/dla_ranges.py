"""
Ranges for a DLA, which before TensorRT 11 knows no Q/DQ: a layer is INT8 there if all that it reads and writes has a
range, and FP16 else.

Q/DQ stand on the inputs of convolutions alone. What is between them gets its range as NVIDIA's own translator does it
(Deep-Learning-Accelerator-SW, tools/qdq-translator), but where that would cut values off: of a Sigmoid's input and of
what is averaged nothing is told by the output. Needs onnx and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Tuple

import numpy as np

from deploy.graphs.calibration_cache import amax_from_quantised, float_from_quantised
from deploy.graphs.graph import constants
from deploy.graphs.precision import float_nodes, float_tensors, is_quantised, largest_values

if TYPE_CHECKING:
    import onnx

SAME_RANGE = (
    "Flatten", "Identity", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators whose first input and output have one range. What a Relu cuts off may be cut off before it."""
AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")
"""Operators whose output reaches no further than their input."""


class DlaRanges(NamedTuple):
    """What a DLA is told."""

    amax: Dict[str, float]
    """Tensor -> largest absolute value."""
    half: Tuple[str, ...]
    """Names of the nodes up to the last convolutions that are FP16 there, since a tensor of theirs has no range."""


def ranges_for_dla(model: onnx.ModelProto, details: Mapping[str, Any]) -> DlaRanges:
    """
    The ranges that a Q/DQ graph, its calibration and its operators tell.

    Args:
        model: checked, its nodes in topological order. One without Q/DQ has no ranges.
        details: of the sidecar of the model's file; `ranges`, of further tensors, are taken.

    Raises:
        EngineBuildError, ContractError: as `float_from_quantised` and `largest_values`.
    """
    from onnx import numpy_helper

    if not is_quantised(model):
        return DlaRanges({}, ())
    amax = amax_from_quantised(model)
    seen = {name: value for name, value in largest_values(model, details).items() if value > 0}
    amax = {**seen, **amax}
    graph = float_from_quantised(model)
    known = constants(graph)
    fixed = {name: float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0)) for name, tensor in known.items()}
    while True:
        found = {
            name: value
            for node in graph.graph.node
            for name, value in _told_by(node, {**fixed, **amax}).items()
            if name not in amax and name not in known and np.isfinite(value) and value > 0
        }
        if not found:
            break
        amax.update(found)
    return DlaRanges(amax, tuple(_without_range(graph, amax)))


def _told_by(node: onnx.NodeProto, amax: Mapping[str, float]) -> Dict[str, float]:
    """Tensor -> largest absolute value, of what this node tells of the tensors around it."""
    source, target = node.input[0] if node.input else "", node.output[0]
    inputs = [amax[name] for name in node.input if name in amax]
    told: Dict[str, float] = {}
    if node.op_type in SAME_RANGE:
        told.update({target: amax[source]} if source in amax else {})
        told.update({source: amax[target]} if target in amax else {})
    elif node.op_type in AVERAGES and source in amax:
        told[target] = amax[source]
    elif node.op_type == "Sigmoid":
        told[target] = 1.0
    elif node.op_type == "Mul" and len(inputs) == 2:
        told[target] = inputs[0] * inputs[1]
    elif node.op_type == "Concat":
        told.update({target: max(inputs)} if len(inputs) == len(node.input) else {})
        told.update(dict.fromkeys(node.input, amax[target]) if target in amax else {})
    return told


def _without_range(graph: onnx.ModelProto, amax: Mapping[str, float]) -> List[str]:
    floating, known, behind = float_tensors(graph), constants(graph), float_nodes(graph, {})
    names = []
    for index, node in enumerate(graph.graph.node):
        tensors = [name for name in (*node.input, *node.output) if name in floating and name not in known]
        if index not in behind and node.op_type != "Constant" and any(name not in amax for name in tensors):
            names.append(node.name or node.output[0])
    return names
