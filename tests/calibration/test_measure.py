from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.measure import OutputError, _errors, accuracy_numbers, saved
from calibration.placement import FloatGraph, node_name
from deploy.contract import load_contract, write_sidecar
from deploy.errors import CalibrationError, ContractError
from deploy.graphs.graph import initializers
from deploy.runtime.postprocess import Detections

NAMES = [
    "node_stem", "node_plain1", "node_plain2", "node_down1", "node_down2", "node_down_skip",
    "node_lateral3", "node_lateral4", "node_fpn3", "node_fpn4", "node_tower_3", "node_tower_4",
]  # fmt: skip


def detections(*rows):
    """Of (x1, y1, x2, y2, score, label)."""
    values = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(values[:, :4], values[:, 4], values[:, 5].astype(np.int64))


def test_equal_detections_have_no_error():
    some = detections((0, 0, 10, 10, 0.9, 0), (20, 0, 30, 10, 0.4, 1))
    assert [row[1:] for row in _errors(some, some)] == [(0, 0), (0, 0)]


def test_error_of_a_moved_box_and_a_shrunk_score():
    before, after = detections((0, 0, 10, 10, 0.9, 0)), detections((5, 0, 15, 10, 0.5, 0), (0, 0, 10, 10, 0.9, 1))
    assert _errors(before, after) == [pytest.approx((0.9, 1 - 50 / 150, 0.4), abs=1e-6)]  # the other class is not it


def test_a_lost_box_counts_in_full():
    one = detections((0, 0, 10, 10, 0.7, 0))
    expected = [pytest.approx((0.7, 1.0, 0.7))]
    assert _errors(one, detections()) == expected
    assert _errors(one, detections((50, 50, 60, 60, 0.7, 0))) == expected
    assert _errors(detections(), one) == []


def test_the_more_in_int8_the_larger_the_error(model_path, detector, images, quantize, contract, target):
    assert [node_name(node) for node in FloatGraph(detector).quantized] == NAMES
    errors = OutputError(model_path, images)
    assert errors.of(model_path) == {"boxes": 0, "scores": 0}
    found = []
    for kept in (NAMES[1:], ()):
        with saved(quantize(detector, target, kept), contract) as path:
            assert load_contract(path) == contract
            found.append(errors.of(path))
        assert not path.exists()
    assert 0 < found[0]["boxes"] < found[1]["boxes"] < 0.5
    assert all(0 < one["scores"] < 0.1 for one in found)


def test_a_model_that_detects_nothing_is_an_error(model_path, images, contract):
    model = onnx.load(model_path)
    bias = initializers(model)["predictor.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(22, -1e3, np.float32), bias.name))
    onnx.save(model, model_path)
    write_sidecar(model_path, {}, contract)
    with pytest.raises(CalibrationError, match="detects nothing in 8 images above"):
        OutputError(model_path, images)


def test_an_image_for_which_the_model_gives_no_numbers_is_named(model_path, images, contract):
    model = onnx.load(model_path)
    bias = initializers(model)["predictor.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(22, np.nan, np.float32), bias.name))
    onnx.save(model, model_path)
    write_sidecar(model_path, {}, contract)
    with pytest.raises(ContractError, match=f"{images[0].path.name}: the model gave values that are not numbers"):
        OutputError(model_path, images)


def test_a_failed_measurement_is_an_error_that_says_why(model_path, data_dir):
    with pytest.raises(CalibrationError, match=r"ended with status 2: cannot read .*nothing.json"):
        accuracy_numbers(model_path, data_dir / "nothing.json", data_dir / "images")
