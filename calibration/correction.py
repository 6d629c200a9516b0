"""
Bias correction: what rounding adds to the mean of each channel of a product's output, taken off its bias.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, in
its empirical variant. Each product that can have a bias (Conv, Gemm) is run on its float input, rounded, and compared
with itself in float, so that all of them are seen in one pass and no correction counts what those before it have
corrected already.

Needs onnx and onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple

import numpy as np

from calibration.collect import runtime_session
from calibration.placement import FloatGraph, Placement, has_signed_activations
from deploy.contract import ModelContract
from deploy.dataset import CocoImage
from deploy.graphs.graph import remove_unused
from deploy.graphs.products import weight_axis
from deploy.images import read_image
from deploy.int8_format import quantization_from_range, rounded_weight, weight_scales
from deploy.progress import progress
from deploy.runtime.preprocess import preprocess

if TYPE_CHECKING:
    import onnx

Corrections = Dict[str, np.ndarray]
"""Output name of a product -> (output channels,) float32, to be added to its bias."""


def bias_corrections(
    graph: FloatGraph,
    placement: Placement,
    ranges: Dict[str, Tuple[float, float]],
    target: str,
    images: Sequence[CocoImage],
    contract: ModelContract,
) -> Corrections:
    """
    What to add to the bias of each quantised product: the mean over images and places of float less rounded output.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CalibrationError: ONNX Runtime cannot run the graph.
        DataError: an image cannot be read.
    """
    session = runtime_session(_with_errors(graph, placement, ranges, target), "bias correction")
    corrected = _with_bias(graph)
    sums = [np.zeros(0)] * len(corrected)
    for image in progress(images, len(images), "bias correction"):
        network_input = preprocess(read_image(image.path), contract).input
        batch = np.repeat(network_input, max(1, contract.input_shape[0]), axis=0)
        errors = session.run(None, {contract.input_name: batch})
        sums = [total + error[0].ravel() if total.size else error[0].ravel().astype(np.float64)
                for total, error in zip(sums, errors)]  # fmt: skip
    return {node.output[0]: (-total / len(images)).astype(np.float32) for node, total in zip(corrected, sums)}


def _with_bias(graph: FloatGraph) -> List[onnx.NodeProto]:
    """The products to quantise that have a bias or can get one."""
    return [node for node in graph.quantized if node.op_type in ("Conv", "Gemm")]


def _with_errors(
    graph: FloatGraph, placement: Placement, ranges: Dict[str, Tuple[float, float]], target: str
) -> onnx.ModelProto:
    """The float model whose outputs are the mean errors, (N, channels, ...), of its products."""
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(graph.model)
    added: List[onnx.NodeProto] = []
    tensors: List[onnx.TensorProto] = []
    for index, node in enumerate(_with_bias(graph)):
        name = f"bias_correction_{index}"
        source = node.input[0]
        while source not in placement.pairs:  # a pair before a MaxPool rounds as one behind it
            source = graph.producers[source].input[0]
        quantization = quantization_from_range(*ranges[placement.pairs[source]], has_signed_activations(target))
        weight, axis = numpy_helper.to_array(graph.constants[node.input[1]]), weight_axis(node)
        tensors += [
            numpy_helper.from_array(np.array(quantization.scale, np.float32), f"{name}_scale"),
            numpy_helper.from_array(np.array(quantization.zero_point), f"{name}_zero_point"),
            numpy_helper.from_array(rounded_weight(weight, weight_scales(weight, axis), axis), f"{name}_weight"),
        ]
        pair = [f"{name}_scale", f"{name}_zero_point"]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name, copy.output[0] = name, f"{name}_output"
        copy.input[0], copy.input[1] = f"{name}_dequantized", f"{name}_weight"
        added += [
            helper.make_node("QuantizeLinear", [node.input[0], *pair], [f"{name}_quantized"]),
            helper.make_node("DequantizeLinear", [f"{name}_quantized", *pair], [f"{name}_dequantized"]),
            copy,
            helper.make_node("Sub", [f"{name}_output", node.output[0]], [f"{name}_error"]),
        ]
        error = f"{name}_error"
        if node.op_type == "Gemm":  # its rows are places
            tensors.append(numpy_helper.from_array(np.array([0], np.int64), f"{name}_axis"))
            added += [
                helper.make_node("Transpose", [error], [f"{name}_columns"]),
                helper.make_node("Unsqueeze", [f"{name}_columns", f"{name}_axis"], [f"{name}_image"]),
            ]
            error = f"{name}_image"
        added.append(helper.make_node("GlobalAveragePool", [error], [f"{name}_mean"]))
    result.graph.node.extend(added)
    result.graph.initializer.extend(tensors)
    del result.graph.output[:]
    result.graph.output.extend(
        onnx.ValueInfoProto(name=f"bias_correction_{index}_mean") for index in range(len(_with_bias(graph)))
    )
    remove_unused(result)
    return result


def with_corrected_biases(graph: FloatGraph, corrections: Corrections) -> FloatGraph:
    """A graph whose products to quantise have corrected biases of their own; what is kept in float is as it was."""
    import onnx
    from onnx import numpy_helper

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    to_quantize = {node.output[0] for node in _with_bias(graph)}
    for node in model.graph.node:
        if node.output[0] in to_quantize:
            bias = corrections[node.output[0]]
            if len(node.input) > 2:
                bias = bias + numpy_helper.to_array(graph.constants[node.input[2]])
                node.input.pop()
            node.input.append(f"{node.output[0]}_corrected_bias")
            model.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), node.input[2]))
    remove_unused(model)
    corrected = FloatGraph(model)
    corrected.kept = graph.kept
    corrected.quantized = [node for node in corrected.products if node.output[0] not in corrected.kept]
    return corrected
