"""Detections as files: what `accuracy` keeps beside its result, anybody's COCO results, and how two of them agree."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np

from benchmarks.measuring.coco import Integers, check_detections
from deploy.errors import MeasurementError
from deploy.files import AnyPath, read_json, replacing, sha256_of

CocoResults = List[Dict[str, Any]]
SAME_IOU = 0.5
"""Two boxes of a class that overlap as much are taken for the same find."""


def detections_path(result_path: AnyPath) -> Path:
    """`X.detections.json` beside `X.result.json`."""
    path = Path(result_path)
    stem = path.name
    for suffix in (".json", ".result"):
        if stem.endswith(suffix):
            stem = stem[: -len(suffix)]
    return path.with_name(f"{stem}.detections.json")


@contextlib.contextmanager
def replacing_detections(result_path: AnyPath, results: CocoResults) -> Iterator[Dict[str, Any]]:
    """
    Yields what a result says of its detections, for the block that writes the result; then they are in place.

    Both are written before the first is renamed: a disk that is full leaves those of an earlier run.
    """
    path = detections_path(result_path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
        yield {"file": path.name, "sha256": sha256_of(temporary), "count": len(results)}


def read_detections(result: Mapping[str, Any], result_path: AnyPath) -> CocoResults:
    """
    The detections that an accuracy result was computed from.

    Raises:
        MeasurementError: their file is missing, is another than when it was measured, or holds something else.
    """
    entry = result["detections"]
    path = Path(result_path).with_name(entry["file"])
    if not path.is_file():
        raise MeasurementError(f"{path} is missing: the detections of {result_path}. Keep the two together.")
    found = sha256_of(path)
    if found != entry["sha256"]:
        raise MeasurementError(
            f"{path} was changed: its SHA-256 is {found[:12]}..., {result_path} says {entry['sha256'][:12]}... "
            "Bring back the original, or measure again."
        )
    results = load_results(path)
    check_detections(results, Integers(), Integers())
    return results


def load_results(path: AnyPath) -> CocoResults:
    """
    COCO results, a list; its entries are checked when they are evaluated.

    Raises:
        MeasurementError: it is not such a list.
    """
    document = read_json(path, MeasurementError, "COCO results: a list of image_id, category_id, bbox and score")
    if not isinstance(document, list):
        raise MeasurementError(
            f"{path} holds a {type(document).__name__}; expected COCO results: a list of image_id, category_id, bbox "
            "[x, y, width, height] and score"
        )
    return document


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The boxes of one image, the highest score first."""

    boxes_xyxy: np.ndarray
    """(n, 4), float64, pixels."""
    scores: np.ndarray
    """(n,), float64."""
    categories: np.ndarray
    """(n,), COCO category ids."""

    def at_least(self, score: float) -> Boxes:
        count = int((self.scores >= score).sum())
        return Boxes(self.boxes_xyxy[:count], self.scores[:count], self.categories[:count])


NO_BOXES = Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def boxes_by_image(results: Sequence[Mapping[str, Any]]) -> Dict[int, Boxes]:
    """Image id -> its boxes, of images that have some. An entry without a score (an annotation) counts as sure."""
    groups: Dict[int, List[Mapping[str, Any]]] = {}
    for box in results:
        groups.setdefault(box["image_id"], []).append(box)
    found = {}
    for image_id, group in groups.items():
        group.sort(key=lambda box: -box.get("score", 1.0))
        boxes = np.array([box["bbox"] for box in group], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([box.get("score", 1.0) for box in group], np.float64)
        found[image_id] = Boxes(boxes, scores, np.array([box["category_id"] for box in group], np.int64))
    return found


def pairs(first: Boxes, second: Boxes, least_iou: float = SAME_IOU) -> List[Tuple[int, int]]:
    """Indices of boxes of the same class that overlap; each is used once, those of the highest scores first choose."""
    ious = ious_xyxy(first.boxes_xyxy, second.boxes_xyxy)
    ious[first.categories[:, None] != second.categories[None]] = 0
    chosen = []
    for index in np.flatnonzero((ious >= least_iou).any(axis=1)):
        best = int(np.argmax(ious[index]))
        if ious[index, best] >= least_iou:
            chosen.append((int(index), best))
            ious[:, best] = 0
    return chosen


def ious_xyxy(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, m): intersection over union of each two boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    together = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, together, out=np.zeros_like(shared), where=together > 0)
