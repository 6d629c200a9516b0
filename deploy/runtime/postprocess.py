"""Network outputs -> detections in the image, as the model contract says. numpy and OpenCV only."""

from __future__ import annotations

import dataclasses
from typing import Mapping

import cv2
import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ContractError
from deploy.files import AnyPath
from deploy.runtime.preprocess import Prepared


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a detector found in one image, the best first."""

    boxes_xyxy: np.ndarray
    """(n, 4), float32, pixels of the original image, within it."""
    scores: np.ndarray
    """(n,), float32, 0 to 1."""
    labels: np.ndarray
    """(n,), int64, index into the contract's class_names."""


def postprocess(
    outputs: Mapping[str, np.ndarray],
    contract: ModelContract,
    prepared: Prepared,
    index: int = 0,
    image: AnyPath = "the image",
) -> Detections:
    """
    Thresholds, clips, scales back and suppresses the candidates of one image.

    The order is mmdet's: clip to the resized image, divide by the scale, drop what has no size, suppress per class,
    keep the best. Where the graph has suppressed already ('nms'), that is not done again; the graph did it before the
    boxes were clipped to the resized image.

    Args:
        outputs: as `Session.infer` returns them.
        prepared: of the image at `index` of the batch.
        image: what it is called in a message.

    Raises:
        ContractError: scores or boxes are no numbers, or a label is that of no class.
    """
    if contract.outputs == "nms":
        *rows, images = (outputs[name] for name in contract.output_names)
        boxes, scores, labels = (values[images == index] for values in rows)
    else:
        boxes, scores, labels = (outputs[name][index] for name in contract.output_names)
    kept = scores > contract.score_threshold
    _check_values(boxes[kept], scores, labels[kept], contract, image)
    boxes, scores, labels = (
        boxes[kept].astype(np.float32),
        scores[kept].astype(np.float32),
        labels[kept].astype(np.int64),
    )
    width, height = prepared.resized_wh_px
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    boxes /= np.array([*prepared.scale_xy, *prepared.scale_xy], np.float32)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # what lay outside the image was clipped to nothing
    boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
    if contract.outputs == "nms":
        chosen = np.argsort(-scores, kind="stable")
    else:
        chosen = suppress(boxes, scores, labels, contract.nms_iou_threshold)
    chosen = chosen[: contract.max_detections]
    return Detections(boxes[chosen], scores[chosen], labels[chosen])


def _check_values(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, contract: ModelContract, image: AnyPath
) -> None:
    """Of all scores, and of the boxes and labels that count; rows below the threshold may be padding."""
    if np.isnan(scores).any() or not np.isfinite(boxes).all():
        raise ContractError(
            f"{image}: the model gave values that are not numbers; expected boxes and scores. A lower precision may "
            "have overflowed: build it anew with FP32, and compare; or the model is damaged"
        )
    classes = len(contract.class_names)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ContractError(
            f"{image}: the model gave labels from {labels.min()} to {labels.max()}; expected indices into the "
            f"{classes} classes of its contract. Export it again, or adopt it with all its class_names"
        )


def suppress(boxes_xyxy: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
    """
    Indices of the boxes that non-maximum suppression per class keeps, the best score first.

    Boxes of different classes are moved apart, so that one call of OpenCV serves all classes.

    Args:
        boxes_xyxy: (n, 4). scores: (n,). labels: (n,) integer.
        iou_threshold: a box goes when its IoU with a better one of its class is above this.
    """
    if len(boxes_xyxy) == 0:
        return np.zeros(0, np.int64)
    moved = boxes_xyxy.astype(np.float64)
    moved += (labels * (moved.max() + 1.0))[:, None]
    moved[:, 2:] -= moved[:, :2]  # x y w h
    # OpenCV drops scores <= 0 here and nothing else: the contract's threshold was applied before.
    kept = cv2.dnn.NMSBoxes(moved, scores, 0.0, iou_threshold)  # type: ignore  # arrays are not in OpenCV's stubs
    return np.asarray(kept, np.int64).reshape(-1)
