from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from calibration.placement import (
    FloatGraph,
    place_for_onnxruntime,
    place_for_tensorrt,
)
from calibration.qdq import quantize_graph
from deploy.errors import ConfigError
from deploy.graphs.graph import check_graph, consumers, initializers
from deploy.graphs.products import Products
from deploy.int8_format import FloatReason

PREDICTIONS = ["prediction_3", "prediction_4"]
QUANTIZED = [
    "stem", "plain1", "plain2", "down1", "down2", "down_skip",
    "lateral3", "lateral4", "fpn3", "fpn4", "tower_3", "tower_4",
]  # fmt: skip


def activation_pairs(model):
    """Tensor with a Q/DQ pair -> outputs of the nodes that read the pair."""
    constant, reading = initializers(model), consumers(model)
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constant:
            ((dequantize, _),) = reading[node.output[0]]
            assert list(dequantize.input[1:]) == list(node.input[1:])
            assert node.input[0] not in found, "a second pair"
            found[node.input[0]] = sorted(reader.output[0] for reader, _ in reading[dequantize.output[0]])
    return found


def optimized(model, folder):
    """The operators that ONNX Runtime makes of the model, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_final_products_are_found_behind_the_decode(detector):
    assert Products(detector).final == set(PREDICTIONS)


def test_paths_through_shape_carry_no_values():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2}>
        {
            a = Conv (x, w)
            shape = Shape (a)
            b = Conv (a, w)
            y = Reshape (b, shape)
        }
    """)
    assert Products(model).final == {"b"}


def test_tensorrt_pairs_are_on_inputs_and_on_skip_branches(for_tensorrt):
    assert activation_pairs(for_tensorrt) == {
        "image": ["stem"],
        "stem_relu": ["pooled"],  # one pair before MaxPool, for the convolution and the addition after it
        "plain1_relu": ["plain2"],
        "plain_sum_relu": ["down1", "down_skip", "lateral3"],
        "down1_relu": ["down2"],
        "down_skip": ["down_sum"],  # not down2, with which the addition fuses
        "down_sum_relu": ["lateral4"],
        "lateral4": ["fpn4", "upsampled"],  # one pair before Resize, for the addition after it
        "merged": ["fpn3"],
        "fpn3": ["tower_3"],
        "fpn4": ["tower_4"],
    }


def test_skip_branch_needs_a_convolution_to_fuse_with():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2}, float[1] c = {1}>
        {
            a = Conv (x, w)
            b = Relu (a)
            no_convolution = Add (x, b)
            d = Conv (no_convolution, w)
            constant = Add (d, c)
            e = Conv (constant, w)
            read_twice = Add (e, constant)
            f = Relu (e)
            both = Mul (read_twice, f)
            y = Conv (both, w)
        }
    """)
    assert place_for_tensorrt(FloatGraph(model)).edges == {("a", 0), ("d", 0), ("e", 0)}


def test_onnxruntime_uses_its_integer_kernels(for_onnxruntime, tmp_path):
    counts = optimized(for_onnxruntime, tmp_path)
    assert counts["QLinearConv"] == len(QUANTIZED)
    assert counts["QLinearAdd"] == 3
    assert counts["Conv"] + counts["FusedConv"] == len(PREDICTIONS)
    assert counts["QuantizeLinear"] == 1  # the image
    assert counts["Relu"] == 0


def test_onnxruntime_values_that_are_only_chosen_keep_their_scale(for_onnxruntime):
    scale_of = {n.input[0]: n.input[1] for n in for_onnxruntime.graph.node if n.op_type == "QuantizeLinear"}
    assert scale_of["pooled"] == scale_of["stem_relu"]
    assert scale_of["upsampled"] == scale_of["lateral4"]


SHUFFLE = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
    <float[4, 1, 3, 3] depthwise, float[2, 2, 1, 1] half, float[4, 4, 1, 1] full, int64[5] five = {1, 2, 2, 8, 8},
     int64[4] four = {1, 4, 8, 8}, int64[2] two = {2, 2}>
    {
        a = Conv <group = 4, pads = [1, 1, 1, 1]> (x, depthwise)
        b = LeakyRelu (a)
        left, right = Split <axis = 1> (b, two)
        c = Conv (right, half)
        d = LeakyRelu (c)
        joined = Concat <axis = 1> (left, d)
        e = Reshape (joined, five)
        f = Transpose <perm = [0, 2, 1, 3, 4]> (e)
        shuffled = Reshape (f, four)
        h = Conv (shuffled, full)
        y = Conv (h, full)
    }
"""
"""As in ShuffleNet V2: half of the channels pass by a convolution, then both halves are shuffled."""
GATE = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 4, 8, 8] x) => (float[1, 4, 7, 7] y)
    <float[4, 4, 1, 1] w>
    {
        a = Conv (x, w)
        swish_gate = Sigmoid (a)
        swish = Mul (a, swish_gate)
        pooled = GlobalAveragePool (swish)
        squeezed = Conv (pooled, w)
        excited = Sigmoid (squeezed)
        gated = Mul (swish, excited)
        smooth = AveragePool <kernel_shape = [2, 2]> (gated)
        b = Conv (smooth, w)
        hard = HardSwish (b)
        c = Conv (hard, w)
        p = Sigmoid (c)
        q = Mul (c, p)
        r = Conv (q, w)
        y = Sigmoid (r)
    }
"""
"""Swish, squeeze-and-excitation, an average pool, a HardSwish, and a score."""


def with_weights(text):
    """The model of the text, with random weights where it names a tensor without giving its values."""
    model, random = parser.parse_model(text), np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
        weight = random.normal(0, 1, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, value.name))
    del model.graph.value_info[:]
    return model


def quantize_alone(model, place, target, **ranges):
    """The model in INT8, ranges -4 to 4 where no others are given: more than enough for where the pairs go."""
    graph = FloatGraph(model)
    placement = place(graph)
    ranges = {**dict.fromkeys(placement.pairs.values(), (-4.0, 4.0)), **ranges}
    quantized = quantize_graph(graph, placement, ranges, target)
    check_graph(quantized)
    return quantized, placement


def test_tensorrt_gets_pairs_right_before_convolutions_of_a_channel_shuffle():
    quantized, _ = quantize_alone(with_weights(SHUFFLE), place_for_tensorrt, "tensorrt")
    assert activation_pairs(quantized) == {"x": ["a"], "right": ["c"], "shuffled": ["h"]}


@pytest.mark.parametrize(
    ("bounds", "is_relu_like"),
    [("zero, six", True), ("zero", True), ("minus, six", False), ("half, six", False), ('"", six', False)],
)
def test_onnxruntime_runs_convolutions_before_any_clip_in_integers(tmp_path, bounds, is_relu_like):
    """One that saturates elsewhere than at 0 is no part of the convolution: it runs between two pairs."""
    model = with_weights(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
        <float[4, 4, 1, 1] w, float zero = {{0}}, float six = {{6}}, float minus = {{-1}}, float half = {{0.5}}>
        {{
            a = Conv (x, w)
            b = Clip ({bounds})
            c = Conv (b, w)
            y = Conv (c, w)
        }}
    """.replace("Clip (", "Clip (a, ")
    )
    of_clip = (0.0, 4.0) if is_relu_like else (-1.0, 4.0)
    quantized, placement = quantize_alone(model, place_for_onnxruntime, "onnxruntime", b=of_clip)
    assert ("a" in placement.pairs) is not is_relu_like
    assert {"x", "b", "c"} <= set(placement.pairs)
    counts = optimized(quantized, tmp_path)
    assert counts["QLinearConv"] == 2
    assert counts["Conv"] + counts["FusedConv"] == 1


def test_onnxruntime_runs_a_channel_shuffle_in_integers(tmp_path):
    quantized, placement = quantize_alone(with_weights(SHUFFLE), place_for_onnxruntime, "onnxruntime")
    assert {name: source for name, source in placement.pairs.items() if name != source} == {
        "left": "b", "right": "b", "e": "joined", "f": "joined", "shuffled": "joined",
    }  # fmt: skip
    counts = optimized(quantized, tmp_path)
    assert counts["QLinearConv"] == 3
    assert counts["QLinearLeakyRelu"] == 2
    assert counts["QLinearConcat"] + counts["Concat"] == 1
    assert counts["LeakyRelu"] == 0
    assert counts["QuantizeLinear"] == 1  # x
    assert counts["DequantizeLinear"] == 1  # for the prediction


def test_tensorrt_leaves_gates_in_float():
    _, placement = quantize_alone(with_weights(GATE), place_for_tensorrt, "tensorrt")
    assert sorted(placement.pairs) == ["hard", "pooled", "smooth", "x"]


def test_onnxruntime_runs_gates_in_integers_and_no_score(tmp_path):
    quantized, placement = quantize_alone(with_weights(GATE), place_for_onnxruntime, "onnxruntime")
    assert not {"p", "q", "r", "y"} & set(placement.pairs)  # what only the prediction reads, and the prediction itself
    counts = optimized(quantized, tmp_path)
    assert counts["QLinearConv"] == 4
    assert counts["QLinearMul"] == 2
    assert counts["QLinearSigmoid"] == 2
    assert counts["QLinearGlobalAveragePool"] == 1
    assert counts["QLinearAveragePool"] == 1


def test_a_range_is_shared_only_where_values_are_only_moved():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 8, 8] x) => (float[1, 1, 16, 16] y)
        <float[1, 1, 1, 1] w = {2}, float[4] twice = {1, 1, 2, 2}>
        {
            a = Conv (x, w)
            bilinear = Resize <mode = "linear"> (a, , twice)
            b = Conv (bilinear, w)
            y = Conv (b, w)
        }
    """)
    assert place_for_tensorrt(FloatGraph(model)).pairs == {"x": "x", "bilinear": "bilinear"}
    assert place_for_onnxruntime(FloatGraph(model)).pairs == {name: name for name in ("x", "a", "bilinear", "b")}


def test_blocks_and_nodes_are_kept_in_float_by_name(detector, quantize, target):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    for node in model.graph.node:
        if node.output[0] in ("plain1", "plain2", "plain10"):
            node.name = f"/backbone/plain/{node.output[0]}"
    graph = FloatGraph(model, ["/backbone/plain", "node_tower_4"])
    kept = [name for name, reason in graph.kept.items() if reason is FloatReason.ASKED]
    assert kept == ["plain1", "plain2", "tower_4"]
    quantized = quantize(model, target, ["/backbone/plain", "node_tower_4"])
    check_graph(quantized)
    made = {node.output[0]: node for node in quantized.graph.node}
    assert [made[name].input[1].endswith("dequantized") for name in ("plain1", "tower_4", "tower_3")] == [
        False,
        False,
        True,
    ]


def test_name_to_keep_in_float_must_be_there(detector):
    with pytest.raises(ConfigError, match=r"--keep-float has '/neck'; expected .* The 14 of them are: node_stem, "):
        FloatGraph(detector, ["/neck"])
