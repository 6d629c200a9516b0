"""Writes the Q/DQ pairs (QuantizeLinear, DequantizeLinear) of a placement into a float graph. Needs onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from calibration.placement import FloatGraph, Placement, has_signed_activations
from deploy.graphs.graph import remove_unused, write_kernel_shapes
from deploy.graphs.products import attribute, weight_axis
from deploy.int8_format import (
    SCALE_SUFFIX,
    Quantization,
    int8_from_weight,
    quantization_from_range,
    weight_scales,
)
from deploy.targets import TARGETS

if TYPE_CHECKING:
    import onnx

LARGEST_BIAS = 2.0**30
"""The largest int32 of a bias: half of what it can hold, since accumulated products are added to it."""


class _Writer:
    """The nodes of the quantised graph, in order, and the initialisers that they bring."""

    def __init__(self) -> None:
        self.nodes: List[onnx.NodeProto] = []
        self.tensors: Dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(values, name)
        return name

    def node(self, op_type: str, inputs: List[str], output: str, **axis: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **axis))
        return output

    def activation_pair(self, tensor: str, source: str, quantization: Quantization) -> None:
        """tensor -> Q -> DQ -> `<tensor>_dequantized`."""
        scale = self.constant(f"{source}{SCALE_SUFFIX}", np.array(quantization.scale, np.float32))
        zero_point = self.constant(f"{source}_zero_point", np.array(quantization.zero_point))
        integers = self.node("QuantizeLinear", [tensor, scale, zero_point], f"{tensor}_quantized")
        self.node("DequantizeLinear", [integers, scale, zero_point], f"{tensor}_dequantized")

    def float_weight(self, node: onnx.NodeProto, constant: str, name: str, scales: np.ndarray) -> None:
        """
        FP32 constant -> Q -> DQ -> product.

        Products that share a weight share the constants and have a pair each, to be folded into each of them.
        """
        prefix, axis = f"{node.output[0]}_weight", weight_axis(node)
        scale = self.constant(f"{name}_scale", scales)
        zero_point = self.constant(f"{name}_zero_point", np.zeros(len(scales), np.int8))
        integers = self.node("QuantizeLinear", [constant, scale, zero_point], f"{prefix}_quantized", axis=axis)
        node.input[1] = self.node("DequantizeLinear", [integers, scale, zero_point], f"{prefix}_dequantized", axis=axis)

    def integer_operand(
        self, node: onnx.NodeProto, index: int, name: str, integers: np.ndarray, scales: np.ndarray, axis: int = 0
    ) -> None:
        """Integer constant `name` -> DQ -> input `index` of the product."""
        inputs = [
            self.constant(name, integers),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero_point", np.zeros(len(scales), integers.dtype)),
        ]
        node.input[index] = self.node("DequantizeLinear", inputs, f"{node.output[0]}_{index}_dequantized", axis=axis)

    def float_convolution(
        self, node: onnx.NodeProto, source: str, integers: np.ndarray, scales: np.ndarray, bias: Optional[np.ndarray]
    ) -> None:
        """
        Writes a convolution of the integers of the pair on its input with results in float.

        ONNX Runtime's integer convolutions give integers, but for ConvInteger, which takes three times as long as one
        in float. Its integer matrix products give float and are fast: so what the kernel sees is laid side by side.

        Args:
            source: the tensor whose range the pair has.
            integers: (output channels, input channels, height, width): the weight.
        """
        from onnx import helper

        output, pair = node.output[0], [f"{source}{SCALE_SUFFIX}", f"{source}_zero_point"]
        seen = self.node("Transpose", [f"{node.input[0]}_quantized"], f"{output}_pixels", perm=[0, 2, 3, 1])
        pads = attribute(node, "pads", [0] * 4)
        if any(pads):
            sides = self.constant(f"{output}_pads", np.array([0, *pads[:2], 0, 0, *pads[2:], 0], np.int64))
            seen = self.node("Pad", [seen, sides, pair[1]], f"{output}_padded")
        strides = np.array(attribute(node, "strides", [1, 1]), np.int64)
        offsets = np.argwhere(np.ones(integers.shape[2:])) * attribute(node, "dilations", [1, 1])
        if len(offsets) > 1 or strides.max() > 1:
            axes = self.constant(f"{output}_axes", np.array([1, 2], np.int64))
            steps = self.constant(f"{output}_steps", strides)
            parts = []
            for number, offset in enumerate(offsets):
                part = f"{output}_part_{number}"
                ends = np.where(offset == offsets[-1], np.iinfo(np.int64).max, offset - offsets[-1])
                limits = [self.constant(f"{part}_{end}", at) for end, at in (("starts", offset), ("ends", ends))]
                parts.append(self.node("Slice", [seen, *limits, axes, steps], part))
            seen = self.node("Concat", parts, f"{output}_windows", axis=3)
        matrix = integers.transpose(2, 3, 1, 0).reshape(-1, len(integers))
        product = helper.make_node("MatMul", ["", ""], [f"{output}_product"], name=node.name or output)
        product.input[0] = self.node("DequantizeLinear", [seen, *pair], f"{output}_0_dequantized")
        self.integer_operand(product, 1, f"{output}_matrix_int8", matrix, scales, axis=1)
        self.nodes.append(product)
        if bias is not None:  # of four dimensions: with one ONNX Runtime would make a float Gemm of product and sum
            bias = bias.reshape(1, 1, 1, -1)
            last = self.node("Add", [f"{output}_product", self.constant(f"{output}_bias", bias)], f"{output}_biased")
        else:
            last = f"{output}_product"
        self.nodes.append(
            helper.make_node("Transpose", [last], [output], name=f"{output}_as_map", perm=[0, 3, 1, 2])
        )  # the name of the convolution is that of the product


def quantize_graph(
    graph: FloatGraph, placement: Placement, ranges: Mapping[str, Tuple[float, float]], target: str
) -> onnx.ModelProto:
    """
    A copy of the graph's model with Q/DQ pairs.

    Args:
        placement: of the target. target: one of `deploy.targets.QUANTISED_FOR`.
        ranges: (smallest, largest) of each tensor among the values of `placement.pairs`.
    """
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(graph.model)
    writer = _Writer()
    quantized = {node.output[0] for node in graph.quantized}
    signed, integer_constants = has_signed_activations(target), TARGETS[target].integer_constants
    quantizations = {name: quantization_from_range(*ranges[name], signed) for name in placement.pairs.values()}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(graph.constants[name])

    def weight_name(node: onnx.NodeProto) -> str:
        """One for all that read a weight by the same axis: the levels of a head share one."""
        name, axis = str(graph.constants[node.input[1]].name), weight_axis(node)
        return f"{name}_by_columns" if axis else name

    def input_scale(node: onnx.NodeProto) -> np.float32:
        return np.float32(quantizations[placement.pairs[node.input[0]]].scale)

    def add_pair(tensor: str) -> None:
        if tensor in placement.pairs:
            source = placement.pairs[tensor]
            writer.activation_pair(tensor, source, quantizations[source])

    scales: Dict[str, np.ndarray] = {}  # by `weight_name`
    for node in graph.quantized:
        name = weight_name(node)
        needed = weight_scales(array(node.input[1]), weight_axis(node))
        if integer_constants and len(node.input) > 2:  # so that the bias fits into int32
            needed = np.maximum(needed, np.abs(array(node.input[2])) / (input_scale(node) * LARGEST_BIAS))
        scales[name] = np.maximum(needed, scales.get(name, needed))

    for value in result.graph.input:
        add_pair(value.name)
    for node in result.graph.node:
        if node.output[0] in quantized:
            name, axis, operands = weight_name(node), weight_axis(node), [array(name) for name in node.input[1:]]
            if not integer_constants:
                writer.float_weight(node, graph.constants[node.input[1]].name, name, scales[name])
            else:
                integers = int8_from_weight(operands[0], scales[name], axis)
                if node.op_type == "Conv" and node.output[0] in graph.predictors:
                    source, bias = placement.pairs[node.input[0]], operands[1] if len(operands) > 1 else None
                    writer.float_convolution(node, source, integers, scales[name], bias)
                    for name in node.output:
                        add_pair(name)
                    continue
                writer.integer_operand(node, 1, f"{name}_int8", integers, scales[name], axis)
                if len(operands) > 1:
                    bias_scales = scales[name] * input_scale(node)
                    integers = np.rint(operands[1] / bias_scales).astype(np.int32)
                    writer.integer_operand(node, 2, f"{node.output[0]}_bias_int32", integers, bias_scales)
        for index, name in enumerate(node.input):
            if (node.output[0], index) in placement.edges and name in placement.pairs:
                node.input[index] = f"{name}_dequantized"
        writer.nodes.append(node)
        for name in node.output:
            add_pair(name)
    del result.graph.node[:]
    result.graph.node.extend(writer.nodes)
    result.graph.initializer.extend(writer.tensors.values())
    remove_unused(result)
    write_kernel_shapes(result)
    return result
