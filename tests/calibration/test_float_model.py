from __future__ import annotations

import onnx
import pytest
from onnx import parser

from calibration.float_model import check_quantizable
from calibration.placement import FloatGraph
from deploy.errors import CalibrationError


def test_batch_normalisation_must_be_folded():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2}, float[1] one = {1}>
        {
            a = Conv (x, w)
            b = BatchNormalization (a, one, one, one, one)
            y = Conv (b, w)
        }
    """)
    with pytest.raises(CalibrationError, match="BatchNormalization follows the convolution a"):
        check_quantizable(FloatGraph(model))


def test_old_opset_is_refused(detector):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    model.opset_import[0].version = 12
    with pytest.raises(CalibrationError, match="opset 12; expected 13 or newer"):
        check_quantizable(FloatGraph(model))


@pytest.mark.parametrize("operator", ["DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "MatMulInteger"])
def test_model_that_is_quantised_already_is_refused(detector, operator):
    """Whatever format it is in."""
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    model.graph.node[3].op_type = operator
    with pytest.raises(CalibrationError, match=f"quantised already: it has \\['{operator}'\\]"):
        check_quantizable(FloatGraph(model))


def test_nothing_to_quantize_is_an_error():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}> { y = Conv (x, w) }
    """)
    with pytest.raises(
        CalibrationError,
        match=r"none of the 1 convolutions and matrix products can be quantised: \['final prediction'\]",
    ):
        check_quantizable(FloatGraph(model))
