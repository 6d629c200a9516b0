"""
A Q/DQ graph as integer kernels compute it, to be run on ONNX Runtime: what an INT8 engine may differ by.

ONNX Runtime computes a product between Q/DQ in float; TensorRT multiplies and sums integers, goes on in float for
bias, addition and ReLU, and writes the result once, in the format of the next reader. Needs onnx and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np

from deploy.graphs.graph import constants, consumers, producers, remove_unused
from deploy.graphs.precision import half_from_float
from deploy.graphs.products import PRODUCTS, weight_axis
from deploy.int8_format import LARGEST_INT8, per_channel

if TYPE_CHECKING:
    import onnx

FUSED = ("Add", "Relu", "Clip")
"""What becomes part of a product's kernel where nothing else reads what it reads of it."""
ZERO_POINT = 128
"""
Integers are moved from int8 to uint8, zero and all: for signed ones ONNX Runtime's sums saturate on CPUs without VNNI.
"""


def integer_kernels(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    A copy of a Q/DQ graph in the arithmetic of INT8 kernels with FP16 around them.

    Convolutions and matrix products between Q/DQ sum in INT32; what `FUSED` lists runs on in FP32, and only its end is
    rounded: to INT8 where every reader quantises, else to FP16. All else is as in `half_from_float`.

    Args:
        model: checked, its nodes in topological order, symmetric int8 (`check_symmetric_int8`).

    Raises:
        EngineBuildError: as `half_from_float`.
    """
    typed = half_from_float(model)
    _Integers(typed).rewrite()
    remove_unused(typed)
    return typed


class _Integers:
    """Rewrites the quantised products of a graph in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import TensorProto, numpy_helper

        self.graph = model.graph
        self.known = {name: numpy_helper.to_array(tensor) for name, tensor in constants(model).items()}
        self.made_by, self.readers = producers(model), consumers(model)
        self.float, self.half = TensorProto.FLOAT, TensorProto.FLOAT16
        self.exact: Dict[str, str] = {}
        """Tensor -> its FP32 twin, before it is rounded."""
        self.nodes: List[onnx.NodeProto] = []

    def rewrite(self) -> None:
        for node in self.graph.node:
            if node.op_type in PRODUCTS and self.integers(node) is not None:
                self.multiply(node)
            elif node.op_type in FUSED and self.exact.keys() & set(node.input):
                self.add(node.op_type, [self.in_float(name) for name in node.input], node.output[0])
            elif node.op_type == "QuantizeLinear" and node.input[0] in self.exact:
                node.input[0] = self.exact[node.input[0]]
                node.input[1] = self.constant(f"{node.input[1]}_float", self.known[node.input[1]].astype(np.float32))
                self.nodes.append(node)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def integers(self, node: onnx.NodeProto) -> Optional[Tuple[Any, Any, Any]]:
        """
        (DequantizeLinear of the data, int8 weight, its scale); None if the product has no such inputs.

        The weight of a matrix product is (input channels, output channels).
        """
        data, weight = (self.made_by.get(name) for name in node.input[:2])
        if data is None or weight is None or {data.op_type, weight.op_type} != {"DequantizeLinear"}:
            return None
        source = self.made_by.get(weight.input[0])
        floats = self.known.get(source.input[0]) if source is not None else None
        if floats is None or floats.dtype != np.float16 or data.input[0] not in self.made_by:
            return None  # computed, or beyond FP16
        scale = self.known[weight.input[1]].astype(np.float32).reshape(-1)
        scales = per_channel(scale, floats.ndim, weight_axis(node)) if scale.size > 1 else scale
        integers = np.clip(np.rint(floats.astype(np.float32) / scales), -LARGEST_INT8 - 1, LARGEST_INT8)
        return data, integers.T if node.op_type == "Gemm" and weight_axis(node) == 0 else integers, scale

    def multiply(self, node: onnx.NodeProto) -> None:
        from onnx import helper

        data, weight, scale = self.integers(node)  # type: ignore[misc]
        name, quantiser = node.output[0], self.made_by[data.input[0]]
        zero = self.constant("integer_zero", np.uint8(ZERO_POINT))
        shifted = f"{data.input[0]}_unsigned"
        if shifted not in self.made_by:
            self.made_by[shifted] = self.append("QuantizeLinear", [*quantiser.input[:2], zero], shifted)
        weights = self.constant(f"{name}_weight", (weight + ZERO_POINT).astype(np.uint8))
        inputs = [shifted, weights, zero, zero]
        if node.op_type == "Conv":
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            self.append("ConvInteger", inputs, f"{name}_sums", **attributes)
        else:
            self.append("MatMulInteger", inputs, f"{name}_sums")
        channels = (-1, *[1] * (weight.ndim - 2))
        self.append("Cast", [f"{name}_sums"], f"{name}_float_sums", to=self.float)
        factors = self.known[data.input[1]].astype(np.float32) * scale.reshape(channels)
        factor = self.constant(f"{name}_factor", factors.astype(np.float32))
        if len(node.input) > 2 and node.input[2] in self.known:
            bias = self.constant(f"{name}_bias", self.known[node.input[2]].astype(np.float32).reshape(channels))
            self.append("Mul", [f"{name}_float_sums", factor], f"{name}_product")
            self.add("Add", [f"{name}_product", bias], name)
        else:
            self.add("Mul", [f"{name}_float_sums", factor], name)

    def add(self, operator: str, inputs: List[str], name: str) -> None:
        """A node in FP32 with the result `name`, which is FP16 for those who do not read on in FP32."""
        self.append(operator, inputs, f"{name}_exact")
        following = [node.op_type for node, _ in self.readers.get(name, [])]
        if following in ([operator] for operator in FUSED) or set(following) == {"QuantizeLinear"}:
            self.exact[name] = f"{name}_exact"
        self.append("Cast", [f"{name}_exact"], name, to=self.half)  # removed where nobody reads it

    def in_float(self, name: str) -> str:
        if name in self.exact or not name:
            return self.exact.get(name, name)
        if name in self.known:
            return self.constant(f"{name}_float", self.known[name].astype(np.float32))
        twin = f"{name}_as_float"
        if twin not in self.made_by:
            self.made_by[twin] = self.append("Cast", [name], twin, to=self.float)
        return twin

    def append(self, operator: str, inputs: List[str], output: str, **attributes: Any) -> onnx.NodeProto:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return self.nodes[-1]

    def constant(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        if name not in self.known:
            self.known[name] = np.asarray(values)
            self.graph.initializer.append(numpy_helper.from_array(self.known[name], name))
        return name
