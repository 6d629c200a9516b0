from __future__ import annotations

from typing import Any, Callable, Dict

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.errors import ContractError, EngineBuildError
from deploy.graphs.graph import check_graph
from deploy.graphs.precision import (
    BEHIND,
    GRAPHS,
    PLACES,
    UNSAFE,
    check_symmetric_int8,
    half_from_float,
    is_quantised,
    largest_values,
    typed_graph,
)
from deploy.runtime.golden import TOLERANCES, match_distances, noise_input

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
        if node.op_type in ("Conv", "ConvTranspose"):
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
        box, logit = match_distances(before, after, detector_contract, 1).T
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


def test_a_node_with_a_constant_beyond_half_stays_float(
    detector_model: Build, run_detector: Build, detector_contract: ModelContract
) -> None:
    model = detector_model()
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight[0, 0, 0, 0] = -1e5
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    graph = typed_graph(model, "fp16", {})
    assert graph.kept[f"FP16 ends at 65504, the constant {tensor.name} reaches 100000"] == [node.name]
    types = types_of(graph.model)
    assert {types[name] for name in node.input} == {FLOAT}
    others = [one for one in graph.model.graph.node if one.op_type == "Conv" and one.name != node.name]
    assert {types[name] for one in others for name in one.input} == {HALF}
    feed = {"images": noise_input(detector_contract, 0) / 1e4}  # so that only the weight is too large
    before, after = run_detector(model, feed), run_detector(graph.model, feed)
    assert np.median(np.abs(before["boxes"] - after["boxes"])) < 0.05


def around(model: Any, tensor: str) -> Dict[str, Any]:
    """Name -> node, of those that write or read the tensor."""
    return {node.name: node for node in model.graph.node if tensor in (*node.input, *node.output)}


def test_what_touches_an_activation_beyond_half_stays_float(detector_model: Build) -> None:
    model = detector_model()
    large = next(node for node in model.graph.node if node.op_type == "Relu").output[0]
    graph = typed_graph(model, "fp16", {"ranges": {large: [0.0, 50000.0], "images": [-3.0, 3.0]}})
    names = set(around(model, large))
    assert set(graph.kept[f"FP16 ends at 65504, the activation {large} reached 50000"]) == names
    assert len(names) >= 3
    types = types_of(graph.model)
    assert all(types[name] == FLOAT for node in around(graph.model, large).values() for name in node.output)
    assert HALF in {types[node.output[0]] for node in graph.model.graph.node if node.op_type == "Conv"}


def test_a_large_activation_stays_float_through_its_pairs(
    detector_model: Build, run_detector: Build, detector_contract: ModelContract
) -> None:
    model = detector_model(np.int8)
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    quantise = next(node for node in nodes if node.input[0].startswith("relu"))
    pair = [node for node in model.graph.node if node.input[:1] == [quantise.output[0]]] + [quantise]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(600), "large_scale"))
    for node in pair:
        node.input[1] = "large_scale"
    graph = typed_graph(model, "int8", {})
    reader = next(node for node in model.graph.node if pair[0].output[0] in node.input)
    assert reader.op_type == "Conv"
    kept = graph.kept[f"FP16 ends at 65504, the activation {quantise.input[0]} reached 76200"]
    assert {reader.name, *(node.name for node in pair)} <= set(kept)
    types = types_of(graph.model)
    for node in graph.model.graph.node:
        if node.name in (reader.name, pair[0].name):
            assert {types[name] for name in (node.input[1], node.output[0])} == {FLOAT}
    feed = {"images": noise_input(detector_contract, 0)}
    before, after = run_detector(model, feed), run_detector(graph.model, feed)
    assert np.median(np.abs(before["boxes"] - after["boxes"])) < 0.5


def test_what_calibration_saw(detector_model: Build) -> None:
    assert largest_values(detector_model(), {}) == {}
    assert largest_values(detector_model(), {"ranges": {"neck": [-7.0, 2.0]}}) == {"neck": 7.0}
    quantised = detector_model(np.int8)
    assert largest_values(quantised, {})["images"] == pytest.approx(6.0)  # 127 times the scale
    assert largest_values(quantised, {"ranges": {"images": [-7.0, 2.0]}})["images"] == 7.0
    assert largest_values(quantised, {"ranges": {"images": [-1.0, 2.0]}})["images"] == pytest.approx(6.0)
    for ranges in ([1, 2], {"neck": 3}, {"neck": ["a", "b"]}, {"neck": [1]}):
        with pytest.raises(ContractError, match="ranges that are not tensor"):
            largest_values(detector_model(), {"ranges": ranges})


def test_each_form_of_one_graph(detector_model: Build) -> None:
    model = detector_model(np.int8)
    forms = {name: typed_graph(model, name, {}) for name in GRAPHS}
    assert {name: is_quantised(form.model) for name, form in forms.items()} == {
        "fp32": False, "fp16": False, "int8": True, "int8_fp32_scales": True, "int8_tensorrt8": True,
    }  # fmt: skip
    assert {name: HALF in types_of(form.model).values() for name, form in forms.items()} == {
        "fp32": False, "fp16": True, "int8": True, "int8_fp32_scales": False, "int8_tensorrt8": False,
    }  # fmt: skip
    assert {name: form.model.opset_import[0].version for name, form in forms.items()} == {
        "fp32": 17, "fp16": 17, "int8": 19, "int8_fp32_scales": 17, "int8_tensorrt8": 17,
    }  # fmt: skip
    for form in forms.values():
        onnx.checker.check_model(form.model, full_check=True)
        assert form.float_tensors == forms["int8"].float_tensors


def test_what_a_tensorrt_that_chooses_is_told_to_keep(detector_model: Build) -> None:
    model = detector_model()
    graph = typed_graph(model, "fp32", {})
    told, types = set(graph.float_tensors), types_of(model)
    assert {types[name] for name in told} == {FLOAT}
    assert {"boxes", "scores"} <= told
    assert "labels" not in told
    by_operator = {node.op_type: node for node in model.graph.node}
    for operator in ("ReduceMean", "Sqrt", "Softmax", "Sigmoid"):
        assert by_operator[operator].output[0] in told
    assert not told & {name for node in model.graph.node if node.op_type in ("Conv", "Resize") for name in node.output}
    assert set(graph.kept) == {BEHIND, UNSAFE}
    (square,) = (node.name for node in model.graph.node if node.op_type == "Mul" and len(set(node.input)) == 1)
    assert set(graph.kept[UNSAFE]) == {square, by_operator["ReduceMean"].name, by_operator["Sqrt"].name}
    half = types_of(typed_graph(model, "fp16", {}).model)  # the graph that says it itself agrees
    assert all(half[name] == FLOAT for name in told)


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


NORMS = {
    "InstanceNormalization": "(features, ones, ones)",
    "LayerNormalization": "<axis=1> (features, ones3, ones3)",
    "GroupNormalization": "<num_groups=1> (features, ones, ones)",
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_stay_float_before_a_convolution(norm: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        norm (float[1,2,2,2] images) => (float[1,2,2,2] maps)
        <float[1,2,2,2] normed, float[2,2,1,1] weight = {{400.3, 0, 0, 400.3}}, float[2] ones = {{1, 1}},
         float[2,2,2] ones3 = {{1, 1, 1, 1, 1, 1, 1, 1}}> {{
            features = Conv (images, weight)
            normed = {norm} {NORMS[norm]}
            maps = Conv (normed, weight)
        }}"""
    )
    graph = typed_graph(model, "fp16", {})
    assert graph.kept == {UNSAFE: ["normed"]}
    assert "normed" in graph.float_tensors
    types, by_operator = types_of(graph.model), {node.op_type: node for node in graph.model.graph.node}
    assert {types[name] for name in by_operator[norm].input} == {FLOAT}
    assert {types[name] for node in graph.model.graph.node if node.op_type == "Conv" for name in node.input} == {HALF}


DEPTHWISE = """<ir_version: 8, opset_import: ["" : 17]>
depthwise (float[1,2,4,4] images) => (float[1,2,4,4] maps)
<float[2,1,1,1] weight = {{1, 2}}, float scale = {{0.1}}, int8 zero = {{0}},
 float low = {{{low}}}, float high = {{6}}> {{
    quantised = QuantizeLinear (images, scale, zero)
    rounded = DequantizeLinear (quantised, scale, zero)
    weight_quantised = QuantizeLinear (weight, scale, zero)
    weight_rounded = DequantizeLinear (weight_quantised, scale, zero)
    features = Conv <group={group}> (rounded, weight_rounded)
    {after}
}}"""


@pytest.mark.parametrize(
    ("after", "low", "stays"),
    [
        ("maps = Relu (features)", 0, True),
        ("maps = Clip (features, low, high)", 0, True),
        ("maps = Clip (features, low, high)", -1, False),
        ("maps = Identity (features)", 0, False),
        ("gate = Sigmoid (features) maps = Mul (features, gate)", 0, False),
        ("positive = Relu (features) maps = Add (features, positive)", 0, False),
    ],
)
def test_depthwise_convolutions_that_tensorrt_8_has_no_integer_kernel_for(after: str, low: int, stays: bool) -> None:
    model = onnx.parser.parse_model(DEPTHWISE.format(after=after, low=low, group=2))
    before = model.SerializeToString()
    graph = typed_graph(model, "int8_tensorrt8", {})
    assert is_quantised(graph.model) == stays
    assert graph.float_convolutions == (() if stays else ("features",))
    (node,) = (node for node in graph.model.graph.node if node.op_type == "Conv")
    assert list(node.input) == (["rounded", "weight_rounded"] if stays else ["images", "weight"])
    onnx.checker.check_model(graph.model, full_check=True)
    for form in ("int8", "int8_fp32_scales"):  # of TensorRT 10 and 11, which have kernels
        other = typed_graph(model, form, {})
        assert is_quantised(other.model)
        assert other.float_convolutions == ()
    assert model.SerializeToString() == before


def test_other_convolutions_keep_the_pair_that_a_depthwise_one_loses() -> None:
    after = "maps = Identity (features) other = Conv <group=1> (rounded, full)"
    text = DEPTHWISE.format(after=after, low=0, group=2).replace("=> (", "=> (float[1,1,4,4] other, ")
    text = text.replace("int8 zero", "float[1,2,1,1] full = {1, 1}, int8 zero")
    graph = typed_graph(onnx.parser.parse_model(text), "int8_tensorrt8", {})
    assert [node.op_type for node in graph.model.graph.node].count("QuantizeLinear") == 1
    inputs = [list(node.input) for node in graph.model.graph.node if node.op_type == "Conv"]
    assert inputs == [["images", "weight"], ["rounded", "full"]]


SAMPLING = """
<ir_version: 8, opset_import: ["" : 17]>
sampling (float[1,2,8,8] images) => (float[1,2,8,8] maps, float[1,8,8,2] boxes)
<float[2,2,1,1] weight = {0.9, 0, 0, 0.9}, float stride = {128}, int64[1] column = {1}> {
    features = Conv (images, weight)
    offset = Conv (features, weight)
    distances = Exp (offset)
    pixels = Mul (distances, stride)
    boxes = Transpose <perm=[0, 2, 3, 1]> (pixels)
    grid = Div (boxes, stride)
    read = GridSample (features, grid)
    row = ReduceMax <axes=[0, 1, 2, 3], keepdims=1> (grid)
    flat = Reshape (row, column)
    index = Cast <to=7> (flat)
    chosen = Gather <axis=2> (read, index)
    sum = Add (read, chosen)
    maps = Conv (sum, weight)
}"""


def test_places_to_read_stay_float_before_a_convolution() -> None:
    model = onnx.parser.parse_model(SAMPLING)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    graph = typed_graph(model, "fp16", {})
    kept = {reason: [name.split("_")[0] for name in names] for reason, names in graph.kept.items()}
    assert kept == {
        BEHIND: ["Exp", "Mul", "Transpose", "Div", "ReduceMax", "Reshape", "Cast"],
        PLACES: ["GridSample"],
    }
    types = types_of(graph.model)
    by_operator = {node.op_type: node for node in graph.model.graph.node}
    assert {types[name] for name in by_operator["GridSample"].input} == {FLOAT}
    assert {types[name] for node in graph.model.graph.node if node.op_type == "Conv" for name in node.input} == {HALF}
    assert types[by_operator["Add"].output[0]] == HALF


def test_only_floating_tensors_may_leave_half() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 2, 4, 4] image) => (float[1, 2, 4, 4] y)
        <float[2,2,1,1] weight = {0.9, 0, 0, 0.9}, int64[4] once = {1, 1, 1, 1}> {
            sizes = Shape(image)
            same = Mul(sizes, once)
            shaped = Reshape(image, same)
            y = Conv(shaped, weight)
        }
        """
    )
    typed = typed_graph(model, "fp16", {})
    assert (typed.growing, typed.unseen) == (1, ("y",))
