from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.int8_format import (
    SMALLEST_SCALE,
    FloatReason,
    Quantization,
    float_codes,
    int8_from_weight,
    rounded_weight,
    signed_from_range,
    unsigned_from_range,
    weight_scales,
)


@pytest.mark.parametrize(("minimum", "maximum", "scale"), [(-1.0, 2.54, 0.02), (-2.54, 1.0, 0.02), (1.0, 2.54, 0.02)])
def test_signed_is_symmetric_about_zero(minimum, maximum, scale):
    quantization = signed_from_range(minimum, maximum)
    assert quantization.scale == pytest.approx(scale)
    assert quantization.zero_point == 0
    assert quantization.zero_point.dtype == np.int8


@pytest.mark.parametrize(
    ("minimum", "maximum", "scale", "zero_point"),
    [(0.0, 2.55, 0.01, 0), (1.0, 2.55, 0.01, 0), (-2.55, -1.0, 0.01, 255), (-0.55, 2.0, 0.01, 55)],
)
def test_unsigned_uses_all_of_the_range_and_includes_zero(minimum, maximum, scale, zero_point):
    quantization = unsigned_from_range(minimum, maximum)
    assert quantization.scale == pytest.approx(scale)
    assert quantization.zero_point == zero_point
    assert quantization.zero_point.dtype == np.uint8


@pytest.mark.parametrize("quantization_from_range", [signed_from_range, unsigned_from_range])
@pytest.mark.parametrize(("minimum", "maximum"), [(0.0, 0.0), (1e-30, 1e-30), (-1e-40, 0.0)])
def test_dead_activations_keep_a_scale_that_fp16_can_hold(quantization_from_range, minimum, maximum):
    quantization = quantization_from_range(minimum, maximum)
    assert np.float16(quantization.scale) > 0
    assert quantization.zero_point == 0


def test_a_constant_activation_is_represented():
    for quantization in (signed_from_range(5.0, 5.0), unsigned_from_range(5.0, 5.0)):
        integer = round(5.0 / quantization.scale) + int(quantization.zero_point)
        assert (integer - int(quantization.zero_point)) * quantization.scale == pytest.approx(5.0)


def test_weights_are_rounded_per_output_channel():
    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 3, 3, 3)).astype(np.float32) * np.float32([1, 10, 1e-3, 0])[:, None, None, None]
    scales = weight_scales(weight)
    integers = int8_from_weight(weight, scales)
    assert scales.shape == (4,)
    assert scales.dtype == np.float32
    assert scales[3] == SMALLEST_SCALE  # a dead channel
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(np.abs(integers.astype(int)).reshape(4, -1).max(axis=1), [127, 127, 127, 0])
    error = np.abs(integers * scales[:, None, None, None] - weight).reshape(4, -1).max(axis=1)
    assert (error <= scales * 0.501).all()
    np.testing.assert_array_equal(rounded_weight(weight, scales), integers * scales[:, None, None, None])
    assert rounded_weight(weight, scales).dtype == np.float32


def test_weights_beyond_their_scale_are_clamped_to_127():
    weight = np.float32([[-3.0, 3.0]])
    np.testing.assert_array_equal(int8_from_weight(weight, np.float32([0.01])), [[-127, 127]])


def onnx_runtime_rounds(values, quantization):
    """What a QuantizeLinear and a DequantizeLinear of this format make of values."""
    constants = [
        numpy_helper.from_array(np.array(quantization.scale, np.float32), "scale"),
        numpy_helper.from_array(np.array(quantization.zero_point), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.float32(values)})[0]


@pytest.mark.parametrize(
    ("quantization", "limits"),
    [
        (signed_from_range(-2.0, 1.0), (-128, 127)),
        (unsigned_from_range(-2.0, 1.0), (0, 255)),
        (unsigned_from_range(0.0, 3.0), (0, 255)),
        (unsigned_from_range(-4.0, -1.0), (0, 255)),
    ],
)
def test_limits_and_range_are_where_onnx_runtime_clips(quantization, limits):
    assert quantization.limits == limits
    smallest, largest = ((limit - int(quantization.zero_point)) * quantization.scale for limit in limits)
    rounded = onnx_runtime_rounds([-1e6, 1e6, *quantization.range], quantization)
    np.testing.assert_allclose(rounded, [smallest, largest, *quantization.range], rtol=1e-6, atol=1e-7)
    assert quantization.range[1] == pytest.approx(largest)
    assert quantization.range[0] == pytest.approx(max(smallest, -largest) if limits[0] else smallest)


@pytest.mark.parametrize("zero_point", [np.int8(0), np.uint8(0), np.uint8(77), np.uint8(255)])
def test_the_range_of_a_format_gives_it_again(zero_point):
    quantization = Quantization(0.013, zero_point)
    again = signed_from_range if isinstance(zero_point, np.int8) else unsigned_from_range
    found = again(*quantization.range)
    assert found.scale == pytest.approx(quantization.scale, rel=1e-12)
    assert (found.zero_point, type(found.zero_point)) == (zero_point, type(zero_point))


def test_codes_and_texts_of_reasons_are_each_of_one():
    assert len({reason.code for reason in FloatReason}) == len({reason.text for reason in FloatReason}) == 11
    assert [reason.code for reason in FloatReason if reason.is_chosen] == ["asked", "ap_budget"]


def test_codes_are_read_from_files_with_and_without_them():
    """A file from before there were codes has texts, of which some may be of somebody else."""
    texts = {"a": "final prediction", "b": "kept in float for the AP budget", "c": "because", "d": "reworded since"}
    found = float_codes({"float_convolutions": texts, "float_convolution_codes": {"d": "asked"}})
    assert found == {"a": "final_prediction", "b": "ap_budget", "c": "", "d": "asked"}
    assert float_codes({}) == {}
