from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from calibration.audit import FLOAT, INT8, WEIGHT_ONLY, audit, main, operators_of_onnxruntime, table_from_audit
from deploy.contract import sidecar_path, write_sidecar
from deploy.errors import CalibrationError
from deploy.graphs.graph import initializers

HEADER = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 2, 8, 8] x) => (float[1, 2, 8, 8] y)
    <float[2, 2, 1, 1] w, float[2] one = {1, 1}, float s = {0.5}, int8 z = {0}, float t = {0.25}>
"""
PAIR = """
    {name}_q = QuantizeLinear ({source}, {scale}, z)
    {name} = DequantizeLinear ({name}_q, {scale}, z)
"""


def pair(name, source, scale="s"):
    return PAIR.format(name=name, source=source, scale=scale)


def model_of(*lines):
    model = parser.parse_model(HEADER + "{" + "".join(lines) + "}")
    weight = np.random.default_rng(0).normal(0, 1, (2, 2, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def states(result):
    return {entry.name: entry.state for entry in result.products}


def test_our_own_models_have_no_fault(quantized):
    result = audit(quantized)
    assert result.faults == []
    found = states(result)
    assert [name for name, state in found.items() if state != INT8] == ["node_prediction_3", "node_prediction_4"]
    assert {(entry.why, entry.code) for entry in result.products if entry.state == FLOAT} == {
        ("final prediction", "final_prediction")
    }
    assert {entry.code for entry in result.products if entry.state == INT8} == {""}
    assert len(found) == 14


def test_what_onnxruntime_runs_in_float_in_spite_of_pairs_is_a_fault(for_onnxruntime, tmp_path, capsys):
    """Of our own models nothing; where a node that has no integer kernel stands before a pair, the convolution."""
    path = tmp_path / "x.int8.onnx"
    write_details = lambda: write_sidecar(path, {}, None, {"target": "onnxruntime"})  # noqa: E731
    onnx.save(for_onnxruntime, path)
    write_details()
    assert main([str(path)]) == 0
    assert "compared with what ONNX Runtime " in capsys.readouterr().out
    assert set(operators_of_onnxruntime(for_onnxruntime).values()) >= {"QLinearConv", "QLinearAdd"}

    model = onnx.ModelProto()
    model.CopyFrom(for_onnxruntime)
    node = next(node for node in model.graph.node if node.op_type == "Relu" and node.output[0] == "plain1_relu")
    node.op_type = "HardSwish"
    onnx.save(model, path)
    write_details()
    assert main([str(path), "--json"]) == 1
    printed = capsys.readouterr()
    entry = next(one for one in json.loads(printed.out)["products"] if one["name"] == "node_plain1")
    assert (entry["state"], entry["code"]) == (FLOAT, "runtime")
    assert "node_plain1: ONNX Runtime" in printed.err
    assert "runs it in float, as Conv, in spite of its pairs" in printed.err


def test_share_of_multiplications(detector, quantized):
    """Counted here by hand: output pixels x kernel x input channels x output channels."""
    pixels = {"3": 8 * 12, "4": 4 * 6}
    integer = 16 * 24 * 27 * 8 + pixels["3"] * (2 * 576 + 64 + 576) + pixels["4"] * (1152 + 2304 + 128 + 128 + 576)
    integer += (pixels["3"] + pixels["4"]) * 576
    floating = (pixels["3"] + pixels["4"]) * 72 * 22 + (pixels["3"] + pixels["4"]) * 4 * 5  # predictions, integral
    assert audit(quantized).int8_share == pytest.approx(integer / (integer + floating))


def test_scales_of_a_shared_head_level_by_level(quantized):
    (levels,) = audit(quantized).shared_weights.values()
    assert [name for name, _ in levels] == ["node_tower_3", "node_tower_4"]
    constant = initializers(quantized)
    scales = [float(numpy_helper.to_array(constant[f"fpn{level}_scale"])) for level in (3, 4)]
    assert [scale for _, scale in levels] == pytest.approx(scales)
    assert scales[0] != scales[1]


def test_weight_only_convolution_is_a_fault():
    model = model_of(
        pair("wq", "w"), "a = Conv (x, wq)", "r = Relu (a)", pair("rq", "r"), "b = Conv (rq, wq)", "y = Conv (b, w)"
    )
    result = audit(model)
    assert states(result) == {"a": WEIGHT_ONLY, "b": INT8, "y": FLOAT}
    (fault,) = result.faults
    assert fault.startswith("a: weight-only, its input comes from an input of the graph without a pair")


def test_prediction_in_int8_is_a_fault():
    model = model_of(pair("xq", "x"), pair("wq", "w"), "a = Conv (xq, wq)", pair("aq", "a"), "y = Conv (aq, wq)")
    assert audit(model).faults == [
        "y: a final prediction in INT8: scores shrink and boxes move; keep it in float"
    ]  # fmt: skip


def test_rounding_after_the_prediction_is_a_fault():
    model = model_of(
        pair("xq", "x"), pair("wq", "w"), "a = Conv (xq, wq)", "p = Conv (a, w)", "r = Sigmoid (p)", pair("y", "r")
    )
    (fault,) = audit(model).faults
    assert fault.startswith("p: the final prediction is rounded by y_q")


def test_norms_between_integers_are_told():
    model = model_of(
        pair("xq", "x"), pair("wq", "w"), pair("vq", "w", "t"),
        "a = Conv (xq, wq)", "n = InstanceNormalization (a, one, one)", "r = Relu (n)", pair("rq", "r"),
        "b = Conv (rq, vq)", "m = InstanceNormalization (b, one, one)", "y = Conv (m, w)",
    )  # fmt: skip
    result = audit(model)
    assert result.norm_sandwiches == [{"norm": "n", "before": "a", "after": "b"}]  # not m: a float one follows
    assert "n runs in float between a and b in INT8" in table_from_audit(result)


def test_why_a_convolution_is_float_is_in_the_sidecar(quantize, detector):
    model = quantize(detector, "tensorrt", ["node_down1"])

    def reason(details):
        return next((e.why, e.code) for e in audit(model, details).products if e.name == "node_down1")

    asked = {"float_convolutions": {"node_down1": "kept in float as asked"}}
    coded = {"float_convolutions": {"node_down1": "reworded"}, "float_convolution_codes": {"node_down1": "asked"}}
    assert reason(asked) == ("kept in float as asked", "asked")
    assert reason(coded) == ("reworded", "asked")
    assert reason({"float_convolutions": {"node_down1": "I said so"}}) == ("I said so", "")
    assert reason(None) == ("its weight has no pair", "no_pair")


@pytest.mark.parametrize(
    ("operator", "message"),
    [("Relu", "expected a quantised model"), ("ConvInteger", "integer operators of one runtime")],
)
def test_graph_without_pairs_is_refused(operator, message):
    model = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node(operator, ["x", "x"], ["y"])], "g", [], [])
    )
    with pytest.raises(CalibrationError, match=message):
        audit(model)


def test_command_prints_a_table_or_json(tmp_path, quantized, capsys):
    path = tmp_path / "student.int8.onnx"
    onnx.save(quantized, path)
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "12 INT8, 0 weight-only, 2 float" in printed
    assert "% of the multiplications in INT8" in printed
    assert "at 2 levels, input scales " in printed
    write_sidecar(path, {}, details={"float_convolutions": {"node_prediction_3": "I said so"}})
    assert main([str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["products"]) == 14
    assert document["faults"] == []
    assert "I said so" in [entry["why"] for entry in document["products"]]


def test_command_fails_for_a_fault(tmp_path, capsys):
    path = tmp_path / "other.onnx"
    onnx.save(model_of(pair("wq", "w"), "a = Conv (x, wq)", "y = Conv (a, w)"), path)
    assert main([str(path)]) == 1
    assert "fault: a: weight-only" in capsys.readouterr().err


def test_control_flow_is_refused(tmp_path, quantized, capsys):
    """Its subgraph could hold convolutions and read predictions: neither would be seen."""
    branch = parser.parse_graph("g () => (float y) { y = Constant <value_float = 1.0> () }")
    quantized.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    quantized.graph.node.append(
        onnx.helper.make_node("If", ["condition"], ["chosen"], name="choice", then_branch=branch, else_branch=branch)
    )
    onnx.save(quantized, tmp_path / "other.onnx")
    assert main([str(tmp_path / "other.onnx")]) == 2
    assert "the node choice (If) holds a subgraph" in capsys.readouterr().err


def test_sidecar_without_details_says_nothing_of_why(tmp_path, quantized):
    path = tmp_path / "other.onnx"
    onnx.save(quantized, path)
    write_sidecar(path, {})
    sidecar = json.loads(sidecar_path(path).read_text())
    del sidecar["details"]
    sidecar_path(path).write_text(json.dumps(sidecar))
    assert main([str(path)]) == 0


def test_unknown_shapes_are_said_so():
    text = HEADER.replace("float[1, 2, 8, 8] x", "float[1, 2, h, v] x").replace(
        "float[1, 2, 8, 8] y", "float[1, 2, h, v] y"
    )
    model = parser.parse_model(text + "{" + pair("xq", "x") + pair("wq", "w") + "a = Conv (xq, wq) y = Conv (a, w) }")
    result = audit(model)
    assert result.int8_share is None
    assert "is not known" in table_from_audit(result)
