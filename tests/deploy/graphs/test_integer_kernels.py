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
