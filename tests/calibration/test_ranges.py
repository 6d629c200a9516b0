from __future__ import annotations

import numpy as np
import pytest

from calibration.ranges import SMALLEST_SCALE, int8_from_weight, signed_from_range, unsigned_from_range, weight_scales


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


def test_weights_beyond_their_scale_are_clamped_to_127():
    weight = np.float32([[-3.0, 3.0]])
    np.testing.assert_array_equal(int8_from_weight(weight, np.float32([0.01])), [[-127, 127]])
