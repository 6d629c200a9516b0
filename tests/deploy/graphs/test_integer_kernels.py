from __future__ import annotations

from typing import Any, Callable, Dict

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.graphs.integer_kernels import integer_kernels
from deploy.runtime.golden import match_distances, noise_input

onnx = pytest.importorskip("onnx")
Build = Callable[..., Any]

FUSED = """<ir_version: 8, opset_import: ["" : 17]>
fused (float[1,2,3,3] images) => (float[1,2,3,3] maps)
<float[2,2,3,3] weight, float[2] bias = {0.5, -0.25}, float scale = {0.05}, float weight_scale = {0.01},
 int8 zero = {0}> {
    images_q = QuantizeLinear (images, scale, zero)
    images_dq = DequantizeLinear (images_q, scale, zero)
    weight_q = QuantizeLinear (weight, weight_scale, zero)
    weight_dq = DequantizeLinear (weight_q, weight_scale, zero)
    first = Conv <pads=[1,1,1,1]> (images_dq, weight_dq, bias)
    sum = Add (first, images_dq)
    positive = Relu (sum)
    positive_q = QuantizeLinear (positive, scale, zero)
    positive_dq = DequantizeLinear (positive_q, scale, zero)
    maps = Conv <pads=[1,1,1,1]> (positive_dq, weight_dq)
}"""


def test_integers_are_summed_and_rounded_where_kernels_end(run_detector: Build) -> None:
    random = np.random.default_rng(4)
    weight = random.uniform(-1.27, 1.27, (2, 2, 3, 3)).astype(np.float32)
    images = random.uniform(-6, 6, (1, 2, 3, 3)).astype(np.float32)
    model = onnx.parser.parse_model(FUSED.replace("float[2,2,3,3] weight, ", ""))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    found = run_detector(integer_kernels(model), {"images": images})["maps"]

    half = np.float16
    scale, weight_scale = np.float32(half(0.05)), np.float32(half(0.01))

    def quantised(values: np.ndarray, by: np.float32) -> np.ndarray:
        return np.clip(np.rint(values / by), -128, 127).astype(np.int64)

    def convolved(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        return np.einsum("ncyxij,ocij->noyx", windows, quantised(weight.astype(half).astype(np.float32), weight_scale))

    integers = quantised(images.astype(half).astype(np.float32), scale)
    bias = np.array([0.5, -0.25], np.float32).reshape(1, 2, 1, 1)
    first = convolved(integers).astype(np.float32) * (scale * weight_scale) + bias
    residual = (integers * scale).astype(half).astype(np.float32)
    positive = quantised(np.maximum(first + residual, 0), scale)
    expected = (convolved(positive).astype(np.float32) * (scale * weight_scale)).astype(half)
    assert np.array_equal(found, expected.astype(np.float32))


LINEAR = """<ir_version: 8, opset_import: ["" : 17]>
linear (float[4,16] images) => (float[4,8] maps)
<float[12] bias, float scale = {0.05}, int8 zero = {0}, int8[12] zeros, float[12] scales, int8[8] zeros8,
 float[8] scales8> {
    images_q = QuantizeLinear (images, scale, zero)
    images_dq = DequantizeLinear (images_q, scale, zero)
    first_q = QuantizeLinear <axis = 0> (first_weight, scales, zeros)
    first_dq = DequantizeLinear <axis = 0> (first_q, scales, zeros)
    first = Gemm <transB = 1> (images_dq, first_dq, bias)
    hidden = Relu (first)
    hidden_q = QuantizeLinear (hidden, scale, zero)
    hidden_dq = DequantizeLinear (hidden_q, scale, zero)
    second_q = QuantizeLinear <axis = 1> (second_weight, scales8, zeros8)
    second_dq = DequantizeLinear <axis = 1> (second_q, scales8, zeros8)
    maps = MatMul (hidden_dq, second_dq)
}"""


def test_matrix_products_are_summed_in_integers_and_scaled_by_column(run_detector: Build) -> None:
    random, half = np.random.default_rng(5), np.float16
    values = {
        "first_weight": random.uniform(-1, 1, (12, 16)).astype(np.float32),
        "second_weight": random.uniform(-1, 1, (12, 8)).astype(np.float32),
        "bias": random.uniform(-1, 1, 12).astype(np.float32),
        "scales": random.uniform(0.008, 0.02, 12).astype(np.float32),
        "scales8": random.uniform(0.008, 0.02, 8).astype(np.float32),
        "zeros": np.zeros(12, np.int8),
        "zeros8": np.zeros(8, np.int8),
    }
    text = LINEAR.replace("<float[12] bias, ", "<").replace("int8[12] zeros, float[12] scales, int8[8] zeros8,\n", "")
    text = text.replace(" float[8] scales8>", ">").replace("int8 zero = {0}, >", "int8 zero = {0}>")
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in values.items())
    images = random.uniform(-6, 6, (4, 16)).astype(np.float32)
    changed = integer_kernels(model)
    assert [node.op_type for node in changed.graph.node].count("MatMulInteger") == 2
    found = run_detector(changed, {"images": images})["maps"]

    def rounded(array: np.ndarray, by: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(array / by), -128, 127).astype(np.int64)

    def of_half(array: np.ndarray) -> np.ndarray:
        return array.astype(half).astype(np.float32)

    scale = np.float32(half(0.05))
    scales, scales8, bias = (of_half(values[name]) for name in ("scales", "scales8", "bias"))
    first = rounded(of_half(values["first_weight"]), scales[:, None])
    second = rounded(of_half(values["second_weight"]), scales8)
    hidden = (rounded(of_half(images), scale) @ first.T).astype(np.float32) * (scale * scales) + bias
    expected = (rounded(np.maximum(hidden, 0), scale) @ second).astype(np.float32) * (scale * scales8)
    np.testing.assert_allclose(found, of_half(expected), rtol=1e-3)


def test_a_detector_in_integers(detector_model: Build, run_detector: Build, detector_contract: ModelContract) -> None:
    model = detector_model(np.int8)
    before = model.SerializeToString()
    changed = integer_kernels(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(changed, full_check=True)
    kinds: Dict[str, int] = {}
    for node in changed.graph.node:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    assert (kinds["ConvInteger"], kinds["Conv"]) == (6, 4)  # the predictions are in float
    feed = {"images": noise_input(detector_contract, 0)}
    expected, found = run_detector(model, feed), run_detector(changed, feed)
    box, logit = match_distances(expected, found, detector_contract, 1).T
    assert np.quantile(box, 0.9) < 0.005  # of a box's size
    assert np.quantile(logit, 0.9) < 0.1
    assert np.any(expected["boxes"] != found["boxes"])
