"""
The products of a graph: its convolutions and matrix products, and which of them predict, decode or say where to read.

They are what INT8 and FP16 are about: all else of a network moves values or works on each alone. Needs onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from deploy.graphs.graph import TRANSPARENT_OPS, constant_behind, constants, producers
from deploy.int8_format import FloatReason

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("Conv", "Gemm", "MatMul")
COORDINATES = {"GridSample": 1}
"""Operator -> input that says where it reads, for which INT8 and FP16 are too coarse."""
INDICES = {"Gather": 1, "GatherElements": 1, "GatherND": 1}
"""The same of those that read by numbers: what a decoder chooses its queries by, say."""
FEWEST_DECODING_WEIGHTS = 4
"""Of a product that decodes: as many as there are sides of a box."""


def weight_axis(node: onnx.NodeProto) -> int:
    """The axis of a product's weight that its output channels are on."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB") else 1
    return 0 if node.op_type == "Conv" else 1


def channel_axis(op_type: str) -> int:
    """The axis of what an operator reads and makes that channels are on: the last of a matrix product."""
    return -1 if op_type in ("Gemm", "MatMul") else 1


def attribute(node: onnx.NodeProto, name: str, default: Any = 0) -> Any:
    """An attribute of a node, or its default."""
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def only_decodes(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> bool:
    """
    Whether a product has weights that nobody has learnt: it is part of what makes boxes of predictions.

    Such as the sum over the bins 0, 1, 2, ... of a distribution (DFL), or corners from centres and sizes: pointwise,
    and all of its weights multiples of a half, which learnt ones never are.
    """
    from onnx import numpy_helper

    tensor = known.get(node.input[1])
    if tensor is None or (node.op_type == "Conv" and any(size != 1 for size in tensor.dims[2:])):
        return False
    weights = numpy_helper.to_array(tensor)
    doubled = 2 * weights.astype(np.float64)
    return bool(weights.size >= FEWEST_DECODING_WEIGHTS and np.unique(weights).size > 1 and (doubled % 1 == 0).all())


class Products:
    """
    The products of a model, in the order of the graph, and what is special of them.

    A matrix product whose weights nobody has learnt is none: it decodes. One of two activations is, but on the way back
    from an output it is passed: what it multiplies is rounded nowhere.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._known, self._made_by = constants(model), producers(model)
        self.nodes: List[onnx.NodeProto] = [
            node
            for node in model.graph.node
            if node.op_type == "Conv"
            or (node.op_type in PRODUCTS and not only_decodes(node, self._known) and not self._sums_shares(node))
        ]
        places = {**COORDINATES, **INDICES}
        saying_where, _ = self._last_before(
            [node.input[places[node.op_type]] for node in model.graph.node if node.op_type in places]
        )
        final, self.behind = self._last_before([value.name for value in model.graph.output])
        self.last: Dict[str, FloatReason] = {
            **dict.fromkeys(saying_where, FloatReason.PLACES),
            **dict.fromkeys(final, FloatReason.FINAL_PREDICTION),
        }
        """Output name of each product from which an output of the graph, or what says where to read, is reached without
        passing another product -> which of both. Paths through Shape do not count: they carry no values."""

    @property
    def final(self) -> Set[str]:
        """Output names of the products that make the final predictions, and of the convolutions that decode them."""
        return {name for name, reason in self.last.items() if reason is FloatReason.FINAL_PREDICTION}

    def weight(self, node: onnx.NodeProto) -> Optional[onnx.TensorProto]:
        """The constant that a product multiplies by, through Q/DQ; None where that is computed."""
        return constant_behind(node.input[1], self._known, self._made_by)

    def _sums_shares(self, node: onnx.NodeProto) -> bool:
        """Whether it is the mean of a distribution, also where somebody has quantised its bins."""
        weight, source = self.weight(node), self._made_by.get(node.input[0])
        while source is not None and source.op_type in (*TRANSPARENT_OPS, "Reshape", "Transpose"):
            source = self._made_by.get(source.input[0])
        is_column = weight is not None and list(weight.dims[1:]) in ([], [1])
        return is_column and source is not None and source.op_type == "Softmax"

    def _last_before(self, tensors: Sequence[str]) -> Tuple[Set[str], Set[str]]:
        """(outputs of the last products before some tensors, outputs of the nodes that are behind these)."""
        pending, seen = list(tensors), set()
        last, behind = set(), set()
        of_products = {node.output[0] for node in self.nodes}
        while pending:
            name = pending.pop()
            node = self._made_by.get(name)
            if node is None or name in seen or node.op_type == "Shape":
                continue
            seen.add(name)
            if name in of_products and (node.op_type == "Conv" or self.weight(node) is not None):
                last.add(name)
                if only_decodes(node, self._known):
                    pending.append(node.input[0])
            else:
                behind.add(name)
                pending.extend(node.input)
        return last, behind
