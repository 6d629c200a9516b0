"""Writes the Q/DQ pairs (QuantizeLinear, DequantizeLinear) of a placement into a float graph. Needs onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Tuple

import numpy as np

from calibration.placement import FloatGraph, Placement, has_signed_activations
from deploy.graphs.graph import remove_unused, write_kernel_shapes
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

    def float_weight(self, node: onnx.NodeProto, name: str, scales: np.ndarray) -> None:
        """
        FP32 constant `name` -> Q -> DQ -> convolution.

        Convolutions that share a weight share the constants and have a pair each, to be folded into each of them.
        """
        prefix = f"{node.output[0]}_weight"
        scale = self.constant(f"{name}_scale", scales)
        zero_point = self.constant(f"{name}_zero_point", np.zeros(len(scales), np.int8))
        integers = self.node("QuantizeLinear", [name, scale, zero_point], f"{prefix}_quantized", axis=0)
        node.input[1] = self.node("DequantizeLinear", [integers, scale, zero_point], f"{prefix}_dequantized", axis=0)

    def integer_operand(
        self, node: onnx.NodeProto, index: int, name: str, integers: np.ndarray, scales: np.ndarray
    ) -> None:
        """Integer constant `name` -> DQ -> input `index` of the convolution."""
        inputs = [
            self.constant(name, integers),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero_point", np.zeros(len(scales), integers.dtype)),
        ]
        node.input[index] = self.node("DequantizeLinear", inputs, f"{node.output[0]}_{index}_dequantized", axis=0)


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
    weights = {node.output[0]: graph.constants[node.input[1]] for node in graph.quantized}
    signed, integer_constants = has_signed_activations(target), TARGETS[target].integer_constants
    quantizations = {name: quantization_from_range(*ranges[name], signed) for name in placement.pairs.values()}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(graph.constants[name])

    def input_scale(node: onnx.NodeProto) -> np.float32:
        return np.float32(quantizations[placement.pairs[node.input[0]]].scale)

    def add_pair(tensor: str) -> None:
        if tensor in placement.pairs:
            source = placement.pairs[tensor]
            writer.activation_pair(tensor, source, quantizations[source])

    scales: Dict[str, np.ndarray] = {}  # by the name of the weight: the levels of a head share one
    for node in graph.quantized:
        name = weights[node.output[0]].name
        needed = weight_scales(array(node.input[1]))
        if integer_constants and len(node.input) > 2:  # so that the bias fits into int32
            needed = np.maximum(needed, np.abs(array(node.input[2])) / (input_scale(node) * LARGEST_BIAS))
        scales[name] = np.maximum(needed, scales.get(name, needed))

    for value in result.graph.input:
        add_pair(value.name)
    for node in result.graph.node:
        if node.output[0] in weights:
            name = weights[node.output[0]].name
            if not integer_constants:
                writer.float_weight(node, name, scales[name])
            else:
                integers = int8_from_weight(array(node.input[1]), scales[name])
                writer.integer_operand(node, 1, f"{name}_int8", integers, scales[name])
                if len(node.input) > 2:
                    bias_scales = scales[name] * input_scale(node)
                    integers = np.rint(array(node.input[2]) / bias_scales).astype(np.int32)
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
