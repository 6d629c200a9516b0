"""The products of the final predictions in INT8: what they compute, what runs them, and who may have them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from calibration import audit as audit_command
from calibration import placement, search
from calibration.audit import INT8, audit, operators_of_onnxruntime
from calibration.matrix_products import write_gemms
from calibration.placement import PLACEMENTS, FloatGraph
from calibration.qdq import quantize_graph
from calibration.quantize import main
from deploy.contract import read_sidecar
from deploy.graphs.graph import check_graph, load_onnx
from deploy.int8_format import FloatReason, quantization_from_range, rounded_weight, weight_scales
from tests.calibration.transformer import PREDICTORS, build_transformer

NAMES = ["node_prediction_3", "node_prediction_4"]


@pytest.fixture
def eligible(monkeypatch):
    """The mini detector's predictors have 22 channels: too few for it to pay."""
    monkeypatch.setattr(placement, "FEWEST_OUTPUTS", 16)


def run(model, optimise=True, **feed):
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def convolution(bias=True, outputs=40, kernel=(3, 3), **attributes):
    """A graph of one convolution, which is a prediction, on 6 channels of 9 x 11."""
    random = np.random.default_rng(0)
    tensors = {"w": random.normal(0, 0.2, (outputs, 6, *kernel)), "b": random.normal(0, 1, outputs)}
    node = helper.make_node("Conv", ["x", "w", "b"][: 2 + bias], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6, 9, 11])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", outputs, None, None])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("target", sorted(PLACEMENTS))
@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1]},
        {"kernel": (1, 1)},
        {"kernel": (1, 1), "strides": [2, 2]},
        {"bias": False, "pads": [0, 1, 2, 3]},
        {"pads": [2, 2, 2, 2], "dilations": [2, 2]},
        {"kernel": (5, 3), "strides": [2, 3], "pads": [2, 1, 2, 1]},
    ],
)
def test_a_convolution_of_integers_gives_float(attributes, target):
    model = convolution(**attributes)
    graph = FloatGraph(model, int8_predictors=True)
    assert graph.predictors == {"y"}
    bounds = (-3.0, 5.0)
    quantized = quantize_graph(graph, PLACEMENTS[target](graph), {"x": bounds}, target)
    check_graph(quantized)
    assert "QuantizeLinear" in [node.op_type for node in quantized.graph.node]
    x = np.random.default_rng(1).uniform(*bounds, (2, 6, 9, 11)).astype(np.float32)

    pair = quantization_from_range(*bounds, target == "tensorrt")
    low, high = pair.limits
    integers = np.clip(np.rint(x / np.float32(pair.scale)) + int(pair.zero_point), low, high)
    rounded_x = ((integers - int(pair.zero_point)) * pair.scale).astype(np.float32)
    expected_model = onnx.ModelProto()
    expected_model.CopyFrom(model)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    expected_model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(rounded_weight(weight, weight_scales(weight)), "w")
    )
    expected = run(expected_model, x=rounded_x)
    for optimise in (True, False):
        np.testing.assert_allclose(run(quantized, optimise, x=x), expected, atol=2e-4)
    if target == "onnxruntime":
        counts = Counter(operators_of_onnxruntime(quantized).values())
        assert (counts["MatMulIntegerToFloat"], counts["Conv"] + counts["FusedConv"]) == (1, 0)


@pytest.mark.parametrize("attributes", [{"outputs": 8}, {"auto_pad": "SAME_UPPER"}])
def test_what_would_win_nothing_or_is_of_another_form_stays_in_float(attributes):
    graph = FloatGraph(convolution(**attributes), int8_predictors=True)
    assert graph.reasons == {"y": FloatReason.FINAL_PREDICTION}


def test_of_a_decoder_all_predictors_can_be_int8_and_what_decodes_none(target, quantize):
    model = build_transformer()
    write_gemms(model)
    graph = FloatGraph(model, int8_predictors=True)
    assert FloatReason.FINAL_PREDICTION not in graph.reasons.values()
    assert len(graph.predictors) == PREDICTORS
    quantized = quantize(model, target)
    check_graph(quantized)


def test_the_command_quantises_them_and_the_audit_has_no_fault(words, model_path, target, eligible, capsys):
    output = model_path.with_name("student.int8.onnx")
    assert main([*words, "--target", target, "--int8-predictors", "--bias-correction"]) == 0
    assert "14 of 14 convolutions and matrix products in INT8" in capsys.readouterr().out
    details = read_sidecar(output)["details"]
    assert details["int8_predictors"] is True
    assert set(NAMES) < set(details["quantized_convolutions"])
    assert audit_command.main([str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in document["products"] if entry["state"] == INT8} > set(NAMES)
    assert [fault for fault in audit(load_onnx(output)).faults if "a final prediction in INT8" in fault]


def test_where_none_can_be_that_is_said(words, model_path, capsys):
    assert main([*words, "--int8-predictors"]) == 0
    assert "warning: no final prediction can be in INT8" in capsys.readouterr().err
    assert read_sidecar(model_path.with_name("student.int8.onnx"))["details"]["int8_predictors"] is False


class FakeAccuracy:
    """In place of benchmarks.accuracy: predictors in INT8 cost so much AP, and move scores so far."""

    def __init__(self, drop, shift):
        self.drop, self.shift, self.measured = drop, shift, []

    def __call__(self, model, annotations, images_dir, limit=None, against=None, output=None):
        if against is None:
            output.write_text("the result of the float model")
            return {"AP": 0.4}
        has_them = set(NAMES) < {entry.name for entry in audit(load_onnx(model)).products if entry.state == INT8}
        self.measured.append(has_them)
        drop, shift = (self.drop, self.shift) if has_them else (0.001, -0.3)
        against = {"AP_difference": -drop, "low": -drop, "high": -drop, "score_shift": shift}
        return {"AP": 0.4 - drop, "against": against}


@pytest.mark.parametrize(
    ("drop", "shift", "taken"), [(0.002, 0.05, True), (0.004, 0.05, False), (0.002, -0.2, False)]
)  # the budget is 0.3 points
def test_the_search_takes_them_where_budget_and_scores_hold(
    words, model_path, target, eligible, monkeypatch, capsys, drop, shift, taken
):
    fake = FakeAccuracy(drop, shift)
    monkeypatch.setattr(search, "accuracy_numbers", fake)
    assert main([*words, "--max-ap-drop", "0.3", "--target", target]) == 0
    assert fake.measured == [False, True]
    printed = capsys.readouterr()
    details = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]
    assert details["int8_predictors"] is taken
    assert [step["int8_predictors"] for step in details["budget"]["steps"]] == [False, True]
    assert details["budget"]["score_shift"] == (shift if taken else None)
    assert ("they stay there" if taken else "they go back to float") in printed.err
    assert ("14 of 14" if taken else "12 of 14") in printed.out
    assert ("with the products of the final predictions in INT8" in printed.out) is taken


def test_ranges_of_a_training_have_none(model_path, capsys):
    words = [str(model_path), "-o", str(model_path.with_name("x.onnx")), "--ranges", "int8.json", "--int8-predictors"]
    assert main(words) == 2
    assert "--int8-predictors: expected none with --ranges" in capsys.readouterr().err
