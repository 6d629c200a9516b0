"""The float model that is to be quantised: read, and checked. Needs the package onnx."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Sequence, Tuple

from calibration.affine import fold_affine
from calibration.matrix_products import write_gemms
from calibration.messages import warn
from calibration.placement import FEWEST_OUTPUTS, INTEGER_PRODUCTS, FloatGraph, node_name
from deploy.contract import ModelContract, load_contract
from deploy.errors import CalibrationError
from deploy.files import AnyPath
from deploy.graphs.graph import check_graph, check_static, load_onnx

if TYPE_CHECKING:
    import onnx

SMALLEST_OPSET = 13
"""The first in which QuantizeLinear has an axis."""
QUANTIZING_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", *INTEGER_PRODUCTS)


def read_model(
    path: AnyPath, keep_float: Sequence[str], int8_predictors: bool = False
) -> Tuple[FloatGraph, ModelContract]:
    """
    The float model and its contract, checked; what is affine beside its convolutions is folded, matrix products are
    brought into one form, and both are said.

    Raises:
        ContractError: the file does not match its sidecar or cannot be read.
        ExportError: the graph is not valid, has control flow, or sizes that are not fixed.
        ConfigError: a name of `keep_float` is not in it.
        CalibrationError: it cannot be quantised.
    """
    contract = load_contract(path)
    model = load_onnx(path)
    check_graph(model)
    check_static(model, dynamic_batch=contract.input_shape[0] == -1, dynamic_outputs=contract.outputs == "nms")
    check_not_quantized(model)
    for change in (fold_affine(model), write_gemms(model)):
        if change:
            print(f"note: {change}", file=sys.stderr)
    graph = FloatGraph(model, keep_float, int8_predictors)
    if int8_predictors and not graph.predictors:
        warn(
            "no final prediction can be in INT8: they are decoding, of another form, or of under "
            f"{FEWEST_OUTPUTS} channels, which integers do no faster"
        )
    check_quantizable(graph)
    return graph, contract


def check_not_quantized(model: onnx.ModelProto) -> None:
    """Raises CalibrationError if the model is quantised already."""
    done = sorted({node.op_type for node in model.graph.node}.intersection(QUANTIZING_OPS))
    if done:
        raise CalibrationError(f"the model is quantised already: it has {done}; expected the float model")


def check_quantizable(graph: FloatGraph) -> None:
    """
    Raises CalibrationError if the model is quantised already, of too old an opset, has batch normalisations that could
    not be folded, or has no product to quantise.
    """
    check_not_quantized(graph.model)
    opset = next((entry.version for entry in graph.model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < SMALLEST_OPSET:
        raise CalibrationError(
            f"the model has ONNX opset {opset}; expected {SMALLEST_OPSET} or newer. Export it again."
        )
    for node in graph.products:
        if node.op_type == "Conv" and "BatchNormalization" in [
            reader.op_type for reader in graph.readers(node.output[0])
        ]:
            raise CalibrationError(
                f"a BatchNormalization follows the convolution {node_name(node)}; expected it folded into the weight, "
                "which is what is rounded. Export the model in evaluation mode."
            )
    if not graph.quantized:
        reasons = sorted({reason.text for reason in graph.kept.values()})
        raise CalibrationError(
            f"none of the {len(graph.products)} convolutions and matrix products can be quantised: {reasons}; "
            "expected a detector, with some before those of the final prediction"
        )
