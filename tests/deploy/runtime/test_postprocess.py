from __future__ import annotations

import dataclasses
from typing import Dict

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.runtime.postprocess import postprocess, suppress
from deploy.runtime.preprocess import Prepared

CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, 100, 200),
    channel_order="rgb",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    pad_value=(0.0, 0.0, 0.0),
    resize="keep_ratio",
    output_names=("dets", "confidence", "classes"),
    class_names=("nut", "bolt"),
    category_ids=(1, 2),
    score_threshold=0.3,
    nms_iou_threshold=0.5,
    max_detections=3,
)
PREPARED = Prepared(np.zeros((1, 3, 100, 200), np.float32), (0.5, 0.25), (160, 100), (320, 400))


def _outputs(boxes: list, scores: list, labels: list) -> Dict[str, np.ndarray]:
    return {
        "dets": np.array([boxes], np.float32).reshape(1, -1, 4),
        "confidence": np.array([scores], np.float32),
        "classes": np.array([labels], np.int32),
    }


def _crowded_boxes(objects: int, boxes_each: int, side: float) -> np.ndarray:
    """(objects * boxes_each, 4), float32: many boxes around each object, as a detector gives them before NMS."""
    corner = np.random.uniform(0, side, (objects, 2))
    boxes = np.concatenate([corner, corner + np.random.uniform(side / 10, side / 2, (objects, 2))], axis=1)
    boxes = np.repeat(boxes, boxes_each, axis=0)
    return np.float32(np.maximum(boxes + np.random.normal(0, side / 200, boxes.shape), 0))


@pytest.mark.parametrize("iou_threshold", [0.1, 0.5, 0.65, 0.9])
@pytest.mark.parametrize("classes", [1, 3, 80])
@pytest.mark.parametrize("side", [40.0, 2000.0])
def test_suppress_keeps_what_torchvision_keeps(iou_threshold: float, classes: int, side: float) -> None:
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    boxes = _crowded_boxes(60, 10, side)
    scores = np.random.permutation(np.linspace(0.01, 0.99, 600)).astype(np.float32)
    labels = np.repeat(np.random.randint(0, classes, 60), 10)
    labels[::5] = np.random.randint(0, classes, 120)  # and some of them of another class
    kept = suppress(boxes, scores, labels, iou_threshold)
    # In float64, since batched_nms moves the classes apart, which costs float32 its last digits.
    expected = torchvision.ops.batched_nms(
        torch.from_numpy(boxes).double(), torch.from_numpy(scores).double(), torch.from_numpy(labels), iou_threshold
    )
    assert kept.dtype == np.int64
    assert 0 < len(kept) < 600
    np.testing.assert_array_equal(kept, expected.numpy())


def _kept_by_opencv(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
    cv2 = pytest.importorskip("cv2")
    moved = boxes.astype(np.float64) + (labels * (boxes.max() + 1.0))[:, None]  # classes lie apart
    moved[:, 2:] -= moved[:, :2]
    return np.asarray(cv2.dnn.NMSBoxes(moved, scores, 0.0, iou_threshold), np.int64).reshape(-1)


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.6, 0.65, 1.0])
@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("grid_px", [0.0, 8.0])  # on a grid, many IoUs lie at the threshold itself
def test_the_best_are_those_that_opencv_keeps(iou_threshold: float, classes: int, grid_px: float) -> None:
    for objects in (1, 20, 300):
        boxes = _crowded_boxes(objects, 900 // objects, 400.0)
        if grid_px:
            boxes = np.float32(np.round(boxes / grid_px) * grid_px)
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + grid_px)
        scores = np.random.randint(1, 200, len(boxes)).astype(np.float32) / 200  # and many are equal
        labels = np.random.randint(0, classes, len(boxes))
        expected = _kept_by_opencv(boxes, scores, labels, iou_threshold)
        np.testing.assert_array_equal(suppress(boxes, scores, labels, iou_threshold), expected)
        for most in (1, 30, 100):
            np.testing.assert_array_equal(suppress(boxes, scores, labels, iou_threshold, most), expected[:most])


def test_suppress_of_nothing_is_nothing() -> None:
    kept = suppress(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == np.int64


def test_suppress_keeps_a_box_at_the_threshold_and_other_classes() -> None:
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6], [0, 0, 10, 10]])
    scores = np.float32([0.9, 0.8, 0.7, 0.6])
    assert suppress(boxes, scores, np.array([0, 0, 0, 1]), 0.5).tolist() == [0, 1, 3]  # the third has an IoU of 0.6


def test_boxes_are_clipped_to_the_resized_image_and_scaled_to_the_original() -> None:
    found = postprocess(_outputs([[-5, 10, 170, 120]], [0.9], [1]), CONTRACT, PREPARED)
    np.testing.assert_array_equal(found.boxes_xyxy, [[0, 40, 320, 400]])
    np.testing.assert_array_equal(found.scores, np.float32([0.9]))
    assert found.labels.tolist() == [1]
    assert (found.boxes_xyxy.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)


def test_detections_are_above_the_threshold_the_best_first_and_few() -> None:
    boxes = [[20 * index, 0, 20 * index + 10, 10] for index in range(6)]
    found = postprocess(_outputs(boxes, [0.3, 0.5, 0.2, 0.9, 0.4, 0.31], [0] * 6), CONTRACT, PREPARED)
    np.testing.assert_array_equal(found.scores, np.float32([0.9, 0.5, 0.4]))
    np.testing.assert_array_equal(found.boxes_xyxy[:, 0], [120, 40, 160])
    unlimited = dataclasses.replace(CONTRACT, max_detections=100)
    assert len(postprocess(_outputs(boxes, [0.3, 0.5, 0.2, 0.9, 0.4, 0.31], [0] * 6), unlimited, PREPARED).scores) == 4


def test_overlaps_are_judged_in_the_original_image() -> None:
    # After clipping at x = 160 the two are the same box; before it they are not.
    found = postprocess(_outputs([[150, 0, 200, 50], [150, 0, 500, 50]], [0.9, 0.8], [0, 0]), CONTRACT, PREPARED)
    np.testing.assert_array_equal(found.boxes_xyxy, [[300, 0, 320, 200]])


def test_an_image_without_detections_gives_empty_arrays() -> None:
    found = postprocess(_outputs([[0, 0, 10, 10]], [0.1], [0]), CONTRACT, PREPARED)
    assert (found.boxes_xyxy.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))


def test_the_image_at_an_index_of_the_batch() -> None:
    outputs = _outputs([[0, 0, 10, 10]], [0.9], [0])
    others = _outputs([[20, 0, 30, 10]], [0.8], [1])
    batch = {name: np.concatenate([values, others[name]]) for name, values in outputs.items()}
    for index, (label, left) in enumerate([(0, 0), (1, 40)]):
        found = postprocess(batch, CONTRACT, PREPARED, index)
        assert found.labels.tolist() == [label]
        assert found.boxes_xyxy[0, 0] == left


def test_detections_of_nms_in_the_graph_are_only_mapped_back_sorted_and_cut() -> None:
    contract = dataclasses.replace(
        CONTRACT, outputs="nms", output_names=("dets", "confidence", "classes", "images"), input_shape=(-1, 3, 100, 200)
    )
    outputs = {
        # The first two overlap and stay: they were judged. The third lies in the padding, the fourth is of image 0.
        "dets": np.float32([[0, 0, 50, 50], [0, 0, 50, 52], [165, 0, 190, 50], [5, 5, 9, 9], [10, 0, 170, 50]]),
        "confidence": np.float32([0.5, 0.6, 0.9, 0.95, 0.7]),
        "classes": np.array([0, 0, 1, 1, 1], np.int32),
        "images": np.array([1, 1, 1, 0, 1], np.int32),
    }
    found = postprocess(outputs, contract, PREPARED, 1)
    np.testing.assert_array_equal(found.scores, np.float32([0.7, 0.6, 0.5]))
    np.testing.assert_array_equal(found.boxes_xyxy, [[20, 0, 320, 200], [0, 0, 100, 208], [0, 0, 100, 200]])
    assert found.labels.tolist() == [1, 0, 0]
    few = postprocess(outputs, dataclasses.replace(contract, max_detections=1), PREPARED, 1)
    assert few.scores.tolist() == found.scores[:1].tolist()
    assert len(postprocess(outputs, contract, PREPARED, 2).scores) == 0
