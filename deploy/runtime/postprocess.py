"""Network outputs -> detections in the image, as the model contract says. numpy only."""

from __future__ import annotations

import dataclasses
import sys
from typing import List, Mapping, Tuple

import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ContractError
from deploy.files import AnyPath
from deploy.runtime.preprocess import Prepared
from deploy.runtime.session import candidates

BLOCK = 128
"""Candidates that are compared with each other at a time."""
PAIRS = 16_000
"""Pairs of boxes at a time, but for a block's: so few that the arrays stay in the caches, and in memory kept."""
AHEAD = 6
"""Candidates that are looked at for each box that is missing: in a crowd many are of objects that are kept already."""
MARGIN = 1e-5
"""Part by which float32 may be wrong about a shared area: IoUs so near to the threshold are taken in float64."""
UPPER = np.float32((1 + MARGIN) / (1 - MARGIN))


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a detector found in one image, the best first."""

    boxes_xyxy: np.ndarray
    """(n, 4), float32, pixels of the original image, within it."""
    scores: np.ndarray
    """(n,), float32, 0 to 1."""
    labels: np.ndarray
    """(n,), int64, index into the contract's class_names."""

    def rows(self) -> List[Tuple[List[float], float, int]]:
        """(x, y, width, height in pixels), score and label of each, as plain numbers."""
        boxes_xywh = self.boxes_xyxy.astype(float)
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        return list(zip(boxes_xywh.tolist(), self.scores.tolist(), self.labels.tolist()))


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
    boxes, scores, labels = candidates(outputs, contract, index)
    kept = np.flatnonzero(scores > contract.score_threshold)
    unknown = np.isnan(scores).any()  # of the rows below the threshold, too, which may be padding but for that
    boxes = boxes[kept].astype(np.float32, copy=False)
    scores = scores[kept].astype(np.float32, copy=False)
    labels = labels[kept].astype(np.int64, copy=False)
    _check_values(boxes, labels, contract, image, unknown)
    np.maximum(boxes, 0, out=boxes)
    np.minimum(boxes, np.array(2 * prepared.resized_wh_px, np.float32), out=boxes)
    boxes /= np.array(2 * prepared.scale_xy, np.float32)
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not solid.all():  # what lay outside the image was clipped to nothing
        boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
    if contract.outputs == "nms":
        chosen = np.argsort(-scores, kind="stable")[: contract.max_detections]
    else:
        chosen = suppress(boxes, scores, labels, contract.nms_iou_threshold, contract.max_detections)
    return Detections(boxes[chosen], scores[chosen], labels[chosen])


def _check_values(
    boxes: np.ndarray, labels: np.ndarray, contract: ModelContract, image: AnyPath, unknown_score: bool
) -> None:
    """Of the boxes and labels that count."""
    if unknown_score or not np.isfinite(boxes).all():
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


def suppress(
    boxes_xyxy: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float, most: int = sys.maxsize
) -> np.ndarray:
    """
    Indices of the boxes that non-maximum suppression per class keeps, the best score first, `most` of them at most.

    The best BLOCK boxes are compared with each other. Then as many of the next as are likely to give those that are
    missing are compared with what is kept, and what stays with each other, until there are enough. What is kept is what
    OpenCV's `dnn.NMSBoxes` keeps of each class.

    Args:
        boxes_xyxy: (n, 4), float32. scores: (n,). labels: (n,) integer.
        iou_threshold: a box goes when its IoU with a better one of its class is above this.
    """
    if not len(scores):
        return np.zeros(0, np.int64)
    order = np.argsort(-scores, kind="stable")
    x1, y1, x2, y2 = boxes_xyxy[order].T
    # The IoU is above t where the shared area is above t / (1 + t) of the sum of both; or nearly, see MARGIN.
    shares = (x2 - x1) * (y2 - y1) * np.float32((1 - MARGIN) * iou_threshold / (1 + iou_threshold))
    table = np.stack([x1, y1, x2, y2, shares, labels[order].astype(np.float32)])  # (6, n), float32
    kept: np.ndarray = np.zeros(0, np.int64)
    start = 0
    while start < len(order) and len(kept) < most:
        window = max(BLOCK, PAIRS // len(kept)) if len(kept) else BLOCK
        end = min(start + min(window, AHEAD * (most - len(kept))), len(order))
        new: np.ndarray = np.arange(start, end)
        if len(kept):
            gone = _overlaps(table.take(kept, axis=1), table[:, start:end], iou_threshold).any(axis=0)
            new = new[~gone]
            if len(new) > BLOCK:
                new, end = new[:BLOCK], int(new[BLOCK])
        part = table.take(new, axis=1)
        kept = np.concatenate([kept, new[_greedy(_overlaps(part, part, iou_threshold))]])
        start = end
    return order[kept[:most]]


def _greedy(overlaps: np.ndarray) -> np.ndarray:
    """Which of the boxes stay, the best first: those that overlap no better one that stays. (n, n), bool."""
    width = -(-len(overlaps) // 8)
    rows = np.packbits(overlaps, axis=1, bitorder="little").tobytes()
    gone, chosen = 0, []
    for index in range(len(overlaps)):
        if not gone >> index & 1:
            chosen.append(index)
            gone |= int.from_bytes(rows[index * width : (index + 1) * width], "little")
    return np.array(chosen, np.int64)


def _overlaps(first: np.ndarray, second: np.ndarray, iou_threshold: float) -> np.ndarray:
    """
    (n, m), bool: whether two boxes are of one class and their IoU is above the threshold.

    Args:
        first, second: (6, n) and (6, m), float32: as `suppress` makes them.
    """
    x1, y1, x2, y2, shares, labels = first[:, :, None]
    other_x1, other_y1, other_x2, other_y2, other_shares, other_labels = second
    width = np.minimum(x2, other_x2)
    width -= np.maximum(x1, other_x1)
    shared = np.minimum(y2, other_y2)
    shared -= np.maximum(y1, other_y1)
    shared *= width
    bound = shares + other_shares
    overlap = shared > bound
    overlap &= width > 0  # for where both sides are negative
    overlap &= labels == other_labels
    bound *= UPPER
    unsure = shared <= bound
    unsure &= overlap
    if unsure.any():
        rows, columns = np.nonzero(unsure)
        overlap[rows, columns] = _iou(first[:4, rows], second[:4, columns]) > np.float32(iou_threshold)
    return overlap


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,), float32: of pairs of boxes, (4, n) each; in float64, and rounded as OpenCV's NMSBoxes does."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = np.maximum(sides, 0).prod(axis=0)
    areas = [(boxes[2:] - boxes[:2]).prod(axis=0) for boxes in (one, other)]
    return np.float32(1) - (1 - shared / (areas[0] + areas[1] - shared)).astype(np.float32)
