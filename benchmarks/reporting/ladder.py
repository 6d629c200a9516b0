"""
Rung by rung from the trained student to the engine: what each step costs in AP, and how far its detections move.

The detections compared are those of the rung before at its best F1 score, each with the box of the same class that
overlaps it most, whatever that one's score. They are taken after NMS, which can turn a last-digit difference into
another box: hence the limits on shares, beside the worst difference.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from benchmarks.measuring.detections import NO_BOXES, Boxes, pairs
from deploy.targets import TARGETS


@dataclasses.dataclass(frozen=True)
class RungLimit:
    """What a step may cost before it is called bad: a choice of this project, for a hint where to look first."""

    ap_points: float
    """The most AP that may be lost."""
    box_px: float
    """How far a side of a box may move for the box to count as the same."""
    score: float
    """How far its score may."""
    share: float
    """The least part of the boxes that must be the same."""


LIMITS = {
    ("fp32", "fp32"): RungLimit(0.1, 1.0, 0.01, 0.99),
    ("fp32", "int8"): RungLimit(1.0, 8.0, 0.15, 0.8),
    ("fp32", "fp16"): RungLimit(0.3, 2.0, 0.03, 0.95),
    ("int8", "int8"): RungLimit(0.3, 4.0, 0.08, 0.9),
}
"""(precision before, after) -> what the step may cost. INT8 to INT8 is the same graph on another runtime."""
ROLES_OF_TARGETS = {role.name: role for target in TARGETS.values() for role in target.roles}
PRECISIONS = {"student": "fp32", **{name: role.precision for name, role in ROLES_OF_TARGETS.items()}}
RUNGS: Tuple[Tuple[str, str, RungLimit], ...] = tuple(
    (name, role.made_from, LIMITS[PRECISIONS[role.made_from], role.precision])
    for name, role in ROLES_OF_TARGETS.items()
)
"""(role, role of the rung that it is made from, limit)."""


def movement(before: Mapping[int, Boxes], after: Mapping[int, Boxes], limit: RungLimit) -> Dict[str, Any]:
    """
    How far detections move from one rung to the next: `boxes` compared, `worst_px` and `worst_score` of those that
    have a partner (None: none has), `gone` without one, and `same`, the part within the limit (None: no boxes).

    Args:
        before: image id -> boxes at the best F1 score.
        after: image id -> all boxes.
    """
    moved: List[Tuple[float, float]] = []
    count = 0
    for image_id, boxes in before.items():
        other = after.get(image_id, NO_BOXES)
        count += len(boxes.scores)
        for index, partner in pairs(boxes, other):
            moved.append(
                (
                    float(np.abs(boxes.boxes_xyxy[index] - other.boxes_xyxy[partner]).max()),
                    float(abs(boxes.scores[index] - other.scores[partner])),
                )
            )
    same = sum(px <= limit.box_px and score <= limit.score for px, score in moved)
    return {
        "boxes": count,
        "worst_px": max((px for px, _ in moved), default=None),
        "worst_score": max((score for _, score in moved), default=None),
        "gone": count - len(moved),
        "same": same / count if count else None,
    }


def faults(change: Optional[float], moved: Mapping[str, Any], limit: RungLimit) -> List[str]:
    """Why a rung is bad, in words; nothing if it is not."""
    found = []
    if change is not None and -100 * change > limit.ap_points:
        found.append(f"AP falls by {-100 * change:.2f} points, more than {limit.ap_points}")
    if moved["same"] is not None and moved["same"] < limit.share:
        found.append(
            f"{100 * moved['same']:.0f} % of the boxes stay within {limit.box_px:g} px and {limit.score} of score, "
            f"fewer than {100 * limit.share:.0f} %"
        )
    return found
