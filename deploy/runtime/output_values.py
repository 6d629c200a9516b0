"""What the values of a detector's outputs say about their form, and whether they are as its contract promises."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

from deploy.contract import OUTPUTS, ModelContract
from deploy.errors import ContractError

ROWS_JUDGED = 100
"""The best rows of a picture, by which the form of the boxes is judged where fewer count."""
TOLERANCE = 1e-3
"""Scores may exceed 0 and 1 by so much, of rounding."""
MOST_FRACTION = 2.0
"""Boxes in fractions reach out of the picture, too; in pixels of any input they reach further than this."""
CLEAR_FIT = 0.9
CLEAR_GAP = 0.2


class Candidates(NamedTuple):
    """The rows of one picture that are judged."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def generated_pictures(width_px: int, height_px: int) -> List[Tuple[str, np.ndarray]]:
    """
    (name, picture) of two pictures with structure, from black to white: one is the negative of the other.

    Drawn, always the same: shapes of many sizes and colours on a gradient, with noise.
    """
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height_px, :width_px]
    picture = np.stack([x * 255 / width_px, y * 255 / height_px, (x + y) * 255 / (width_px + height_px)], -1)
    picture = np.ascontiguousarray(picture.astype(np.uint8))
    for _ in range(12):
        center = int(random.integers(width_px)), int(random.integers(height_px))
        radius = int(random.integers(2, max(3, min(width_px, height_px) // 4)))
        color = [int(value) for value in random.choice([0, 64, 160, 255], 3)]
        if random.random() < 0.5:
            cv2.circle(picture, center, radius, color, -1)
        else:
            cv2.rectangle(picture, center, (center[0] + radius, center[1] + 2 * radius), color, -1)
    picture = np.clip(picture + random.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    return [("a generated picture", picture), ("the negative of a generated picture", 255 - picture)]


def judged_rows(outputs: Dict[str, np.ndarray], contract: ModelContract) -> Candidates:
    """The rows whose score is above the contract's threshold, or the best ROWS_JUDGED where these are fewer."""
    boxes, scores, labels = (outputs[name] for name in contract.output_names[:3])
    boxes, scores, labels = boxes.reshape(-1, 4), scores.reshape(-1), labels.reshape(-1)
    order = np.argsort(-scores, kind="stable")
    count = max(int(np.sum(scores > contract.score_threshold)), min(ROWS_JUDGED, len(order)))
    order = order[:count]
    is_padding = (labels[order] < 0) | ~boxes[order].any(axis=1)
    counts = (scores[order] > contract.score_threshold) | ~is_padding
    order = order[counts]
    return Candidates(boxes[order], scores[order], labels[order])


def are_logits(scores: np.ndarray) -> bool:
    """Whether scores are below 0 (-1 marks padding) and so no probabilities."""
    return bool((scores[np.isfinite(scores) & (scores != -1)] < -TOLERANCE).any())


def are_fractions(rows: Sequence[Candidates], contract: ModelContract) -> bool:
    """Whether boxes are from about 0 to 1 rather than in pixels."""
    boxes = np.concatenate([one.boxes for one in rows])
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    smallest_side = min(contract.input_width_px, contract.input_height_px)
    return bool(len(boxes) and smallest_side > 8 * MOST_FRACTION and np.quantile(np.abs(boxes), 0.95) <= MOST_FRACTION)


def fits_of_formats(rows: Sequence[Candidates], width: float, height: float) -> Dict[str, float]:
    """
    Format of boxes -> share of the boxes that it makes sense of: ordered corners, the middle within the picture.

    Args:
        width, height: of the picture, in the units of the boxes.
    """
    boxes = np.concatenate([one.boxes for one in rows]).astype(np.float64)
    first, second = boxes[:, :2], boxes[:, 2:]
    corners = {
        "xyxy": (first, second), "cxcywh": (first - second / 2, first + second / 2), "xywh": (first, first + second)
    }  # fmt: skip
    size = np.array([width, height])
    fits = {}
    for name, (low, high) in corners.items():
        middle = (low + high) / 2
        inside = ((middle >= -0.1 * size) & (middle <= 1.1 * size)).all(axis=1)
        reach = ((low >= -0.25 * size) & (high <= 1.25 * size)).all(axis=1)
        ordered = (high >= low).all(axis=1)
        good = ordered & inside if name == "xyxy" else ordered & inside & reach
        fits[name] = float(good.mean()) if len(good) else 1.0
    return fits


def ordered_share(rows: Sequence[Candidates]) -> float:
    """The share of boxes whose second corner is not left of or above the first."""
    boxes = np.concatenate([one.boxes for one in rows])
    return float((boxes[:, 2:] >= boxes[:, :2]).all(axis=1).mean()) if len(boxes) else 1.0


def check_shapes(outputs: Dict[str, np.ndarray], contract: ModelContract) -> None:
    """Raises ContractError if the outputs are not of the types and shapes that the contract stands for."""
    rows = "N, K" if contract.outputs == "topk" else "D"
    for kind, name in zip(OUTPUTS[contract.outputs], contract.output_names):
        values = outputs[name]
        shape = f"({rows}, 4)" if kind == "boxes" else f"({rows})"
        type_ = "float32" if kind in ("boxes", "scores") else "integer"
        fits = values.ndim == shape.count(",") + 1 and (kind != "boxes" or values.shape[-1] == 4)
        of_type = values.dtype == np.float32 if type_ == "float32" else np.issubdtype(values.dtype, np.integer)
        if not (fits and of_type):
            raise ContractError(
                f"the output {name!r} is {values.shape}, {values.dtype}; expected {kind}: {shape}, {type_}. Correct "
                "output_names, or say with output_parts what each output holds: see docs/adopt-a-detector.md"
            )


def check_values(outputs: Dict[str, np.ndarray], contract: ModelContract, picture: str) -> None:
    """
    Raises ContractError if the values of one picture cannot be detections, as they are.

    Args:
        outputs: of one inference, as `check_shapes` wants them.
        picture: what it is called in the message.
    """
    box_name, score_name, label_name = contract.output_names[:3]
    scores = outputs[score_name]
    if np.isnan(scores).any():
        raise ContractError(
            f"the output {score_name!r} has {np.isnan(scores).sum()} values that are not numbers, of {picture}; "
            "expected scores. Correct mean and std if they are not those of the training; else look at the export"
        )
    rows = judged_rows(outputs, contract)
    if scores.max(initial=0) > 1 + TOLERANCE or are_logits(scores):
        raise ContractError(
            f"the output {score_name!r} has scores from {scores.min():.4g} to {scores.max():.4g}, of {picture}; "
            'expected 0 to 1. If they are logits, say "score_format": "logits" or "softmax_logits"'
        )
    counted = rows.scores > contract.score_threshold
    boxes, labels = rows.boxes[counted], rows.labels[counted]
    if not np.isfinite(boxes).all():
        raise ContractError(
            f"the output {box_name!r} has values that are no numbers in rows that count, of {picture}; expected boxes"
        )
    classes = len(contract.class_names)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        cure = ' If class 0 is the background, say "background": "first"' if labels.max() == classes else ""
        raise ContractError(
            f"the output {label_name!r} has labels from {labels.min()} to {labels.max()} in rows that count, of "
            f"{picture}; expected indices into the {classes} class_names.{cure}"
        )
    width, height = contract.input_width_px, contract.input_height_px
    share = ordered_share([rows])
    if share < CLEAR_FIT:
        fits = fits_of_formats([rows], width, height)
        told = ", ".join(f"{name}: {100 * fit:.0f} %" for name, fit in fits.items())
        raise ContractError(
            f"of the boxes in {box_name!r} only {100 * share:.0f} % have x1 < x2 and y1 < y2, of {picture}; expected "
            f"two corners. Boxes that each format makes sense of: {told}. Say which it is with box_format"
        )
    if are_fractions([rows], contract):
        raise ContractError(
            f"the boxes in {box_name!r} reach from {boxes.min(initial=0):.3g} to {boxes.max(initial=0):.3g}, of "
            f'{picture}; expected pixels of the {width} x {height} input. Say "box_units": "fractions" if they are '
            "from 0 to 1"
        )
    middle = (rows.boxes[:, :2] + rows.boxes[:, 2:]) / 2 / np.array([width, height])
    if len(middle) and ((middle < -0.5) | (middle > 1.5)).any(axis=1).mean() > 0.5:
        raise ContractError(
            f"most boxes in {box_name!r} lie outside of the {width} x {height} input, of {picture}; expected its "
            "pixels. Correct input_shape, strides or constant_inputs, or export the model without scaling boxes to "
            "the photo"
        )
