from __future__ import annotations

from typing import Any, Callable, Dict

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.errors import EngineBuildError
from deploy.golden import TOLERANCES, match_distances, noise_input
from deploy.graph import check_graph
from deploy.precision import CONVOLUTIONS, check_symmetric_int8, half_from_float, is_quantised

onnx = pytest.importorskip("onnx")
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
Build = Callable[..., Any]


def types_of(model: Any) -> Dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


@pytest.mark.parametrize("quantised", [None, np.int8])
def test_convolutions_are_half_and_all_behind_them_float(detector_model: Build, quantised: Any) -> None:
    model = half_from_float(detector_model(quantised))
    types, seen_convolution = types_of(model), set()
    for node in model.graph.node:
        if node.op_type in CONVOLUTIONS:
            assert {types[name] for name in (*node.input, *node.output)} == {HALF}, node.name
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    needed = {name for node in convolutions for name in node.input}
    for node in reversed(model.graph.node):  # what leads to a convolution
        if needed.intersection(node.output):
            needed.update(node.input)
    for node in model.graph.node:
        behind = any(name in seen_convolution for name in node.input) and not needed.intersection(node.output)
        if node.op_type == "Conv" or behind:
            seen_convolution.update(node.output)
        if behind and node.op_type not in ("Conv", "Cast"):
            assert HALF not in {types[name] for name in (*node.input, *node.output)}, node.name
        if node.op_type in ("ReduceMean", "Sqrt", "Softmax"):
            assert HALF not in {types[name] for name in (*node.input, *node.output)}, node.name


def test_inputs_and_outputs_keep_name_and_type(detector_model: Build) -> None:
    before = detector_model()
    after = half_from_float(before)
    for field in ("input", "output"):
        assert list(getattr(after.graph, field)) == list(getattr(before.graph, field))
    assert before.SerializeToString() == detector_model().SerializeToString()  # the argument is left as it was


def test_an_output_straight_from_a_convolution_keeps_its_type(detector_model: Build) -> None:
    model = detector_model()
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Conv")
    model.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], FLOAT, [1, 20, 8, 8]))
    after = half_from_float(model)
    assert types_of(after)[last.output[0]] == FLOAT


@pytest.mark.parametrize(("quantised", "precision"), [(None, "fp16"), (np.int8, "int8")])
def test_detections_stay(
    detector_model: Build, run_detector: Build, detector_contract: ModelContract, quantised: Any, precision: str
) -> None:
    model = detector_model(quantised)
    half = half_from_float(model)
    tolerance = TOLERANCES[precision]
    for seed in range(3):
        feed = {"images": noise_input(detector_contract, seed)}
        before, after = run_detector(model, feed), run_detector(half, feed)
        box, logit = match_distances(before, after, detector_contract).T
        assert np.mean((box < tolerance.box) & (logit < tolerance.logit)) >= tolerance.matched
        assert np.median(box) * 32 < 0.5  # pixels
        assert np.any(before["scores"] != after["scores"])  # otherwise nothing was in FP16


def test_half_quantisers_have_positive_half_scales_and_opset_19(detector_model: Build) -> None:
    model = detector_model(np.int8)
    scale = next(node for node in model.graph.node if node.op_type == "QuantizeLinear").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == scale)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e-9), scale))  # 0 in FP16
    half = half_from_float(model)
    assert half.opset_import[0].version == 19
    scales = {node.input[1] for node in half.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in half.graph.initializer:
        if tensor.name in scales:
            assert tensor.data_type == HALF
            assert onnx.numpy_helper.to_array(tensor).min() > 0
    check_graph(half)


def test_a_shared_weight_is_stored_once(detector_model: Build) -> None:
    half = half_from_float(detector_model())
    shared = [tensor.name for tensor in half.graph.initializer if tensor.name.startswith("shared")]
    assert shared == ["shared_float16"]


def test_a_constant_beyond_half_is_named(detector_model: Build) -> None:
    model = detector_model()
    weight = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1e6), weight))
    with pytest.raises(EngineBuildError, match=rf"'{weight}' reaches .*65504"):
        half_from_float(model)


def test_quantisation_for_another_target_is_refused(detector_model: Build) -> None:
    assert not is_quantised(detector_model())
    check_symmetric_int8(detector_model(np.int8))
    with pytest.raises(
        EngineBuildError, match=r"QuantizeLinear_0' has the zero point uint8 \[128\].*--target tensorrt"
    ):
        check_symmetric_int8(detector_model(np.uint8))


def test_an_asymmetric_zero_point_is_refused(detector_model: Build) -> None:
    model = detector_model(np.int8)
    zero = next(node for node in model.graph.node if node.op_type == "QuantizeLinear").input[2]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == zero)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.int8(3), zero))
    with pytest.raises(EngineBuildError, match=r"zero point int8 \[3\]"):
        check_symmetric_int8(model)


def test_a_missing_zero_point_is_refused(detector_model: Build) -> None:
    model = detector_model(np.int8)
    del next(node for node in model.graph.node if node.op_type == "QuantizeLinear").input[2]
    with pytest.raises(EngineBuildError, match="zero point none"):
        check_symmetric_int8(model)


def test_a_weight_that_is_also_read_in_float(
    detector_model: Build, run_detector: Build, detector_contract: ModelContract
) -> None:
    model = detector_model()
    shared = next(node for node in model.graph.node if node.op_type == "Identity").output[0]
    model.graph.node.append(onnx.helper.make_node("ReduceSum", [shared], ["sum"], name="sum", keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("sum", FLOAT, []))
    half = half_from_float(model)
    total = run_detector(half, {"images": noise_input(detector_contract, 0)})["sum"]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "shared")
    assert total == pytest.approx(onnx.numpy_helper.to_array(weight).sum(), abs=0.02)
