from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.measuring.detections import (
    Boxes,
    boxes_by_image,
    detections_path,
    ious_xyxy,
    load_results,
    pairs,
    read_detections,
    replacing_detections,
)
from deploy.errors import MeasurementError

RESULTS = [{"image_id": 1, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 0.1 + 0.2], "score": 0.123456789}]


@pytest.mark.parametrize(
    ("result", "detections"),
    [
        ("a/x.accuracy.result.json", "a/x.accuracy.detections.json"),
        ("x.result.json", "x.detections.json"),
        ("x.json", "x.detections.json"),
        ("x", "x.detections.json"),
        ("a.result.json/x.json", "a.result.json/x.detections.json"),
    ],
)
def test_detections_lie_beside_their_result(result, detections):
    assert detections_path(result).as_posix() == detections


def test_what_was_written_is_read_to_the_last_digit(tmp_path):
    path = tmp_path / "x.result.json"
    with replacing_detections(path, RESULTS) as entry:
        assert not (tmp_path / entry["file"]).exists()
    assert entry["count"] == 1
    assert read_detections({"detections": entry}, path) == RESULTS
    assert load_results(tmp_path / entry["file"]) == RESULTS


def test_missing_and_changed_detections_are_refused(tmp_path):
    path = tmp_path / "x.result.json"
    with replacing_detections(path, RESULTS) as entry:
        assert not (tmp_path / entry["file"]).exists()
    kept = tmp_path / entry["file"]
    kept.write_text(kept.read_text().replace("0.12345", "0.92345"))
    with pytest.raises(MeasurementError, match=r"x\.detections\.json was changed"):
        read_detections({"detections": entry}, path)
    kept.unlink()
    with pytest.raises(MeasurementError, match=r"x\.detections\.json is missing: the detections of .*x\.result\.json"):
        read_detections({"detections": entry}, path)


def test_detections_that_are_not_json_numbers_are_not_written(tmp_path):
    result = tmp_path / "x.result.json"
    with (
        pytest.raises(ValueError, match="not JSON compliant"),
        replacing_detections(result, [{**RESULTS[0], "score": float("nan")}]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_detections_are_not_replaced_where_their_result_is_not_written(tmp_path):
    kept = tmp_path / "x.detections.json"
    kept.write_text("[]")
    with pytest.raises(OSError, match="full"), replacing_detections(tmp_path / "x.result.json", RESULTS):
        raise OSError("full")
    assert kept.read_text() == "[]"
    assert list(tmp_path.iterdir()) == [kept]


def test_boxes_are_grouped_by_image_the_best_first():
    results = [
        {"image_id": 4, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.2},
        {"image_id": 4, "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.8},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 5, 5]},
    ]
    found = boxes_by_image(results)
    assert found[4].boxes_xyxy.tolist() == [[0, 0, 5, 5], [1, 2, 11, 22]]
    assert found[4].categories.tolist() == [7, 3]
    assert found[4].at_least(0.5).scores.tolist() == [0.8]
    assert len(found[4].at_least(0.9).boxes_xyxy) == 0
    assert found[9].scores.tolist() == [1.0]
    assert json.dumps(sorted(found)) == "[4, 9]"


def boxes(*rows):
    """(left, score, category) each: a box 10 wide and 10 high."""
    values = np.array(rows, np.float64).reshape(-1, 3)
    corners = np.stack([values[:, 0], 0 * values[:, 0], values[:, 0] + 10, 0 * values[:, 0] + 10], axis=1)
    return Boxes(corners, values[:, 1], values[:, 2].astype(np.int64))


def test_pairs_are_of_one_class_and_each_box_is_used_once():
    first = boxes((0, 0.9, 3), (1, 0.8, 3), (50, 0.7, 3), (80, 0.6, 7))
    second = boxes((1, 0.9, 3), (50, 0.5, 7), (81, 0.4, 7))
    assert pairs(first, second) == [(0, 0), (3, 2)]
    assert pairs(first, boxes()) == []
    assert pairs(boxes(), second) == []


def test_iou_of_known_boxes():
    first = np.array([[0.0, 0, 10, 10]])
    second = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]])
    assert ious_xyxy(first, second)[0] == pytest.approx([1.0, 1 / 3, 0.0, 0.0])
