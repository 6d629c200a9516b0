"""
How sure a difference in AP is: paired bootstrap over the images of a test set.

Images are drawn with replacement, as many as there are, and AP is taken anew of those drawn; the same draws for both
detectors, so that images that are hard for both do not count as doubt (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13). COCO matches boxes image by image, so it is done once; a draw only weighs the images.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from benchmarks.coco import check_detections
from deploy.errors import MeasurementError

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100
"""Per image and class, as the two above: cocodataset.org, Detection evaluation."""
CHUNK = 100
"""Draws that are weighed at a time; bounds the memory."""

Detections = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference of two APs, as fractions."""

    difference: float
    """Of the test set as it is."""
    low: float
    high: float
    confidence: float
    """Share of the draws whose difference lies between `low` and `high`; as many are below as above."""
    resamples: int
    images: int


def paired_ap_difference(
    annotations: Mapping[str, Any],
    pairs: Sequence[Tuple[Detections, Detections]],
    image_ids: Sequence[int],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """
    AP of the first minus AP of the second of each pair, averaged over the pairs, with its bootstrap interval.

    Args:
        annotations: the content of a COCO detection file, already checked by `deploy.dataset.load_coco`.
        pairs: COCO results of two detectors; several where both were trained several times. All are weighed with the
            same draws.
        image_ids: the images that count.
        seed: of the draws.

    Raises:
        MeasurementError: no pair, or as `resampled_ap`.
    """
    if not pairs:
        raise MeasurementError("there is no pair of detections to compare; expected at least one")
    aps = [
        (
            resampled_ap(annotations, first, image_ids, resamples, seed),
            resampled_ap(annotations, second, image_ids, resamples, seed),
        )
        for first, second in pairs
    ]
    return interval_from_aps(aps, len(image_ids), confidence)


def interval_from_aps(aps: Sequence[Tuple[np.ndarray, np.ndarray]], images: int, confidence: float = 0.95) -> Interval:
    """`paired_ap_difference` from what `resampled_ap` returned, with the same seed, for both of each pair."""
    differences = np.mean([first - second for first, second in aps], axis=0)
    drawn = differences[1:][np.isfinite(differences[1:])]
    if not drawn.size:
        raise MeasurementError("no draw has an annotated box; expected a test set with more of them")
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(differences[0]), float(low), float(high), confidence, int(drawn.size), images)


def resampled_ap(
    annotations: Mapping[str, Any],
    detections: Detections,
    image_ids: Sequence[int],
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """
    (1 + resamples,), float64: the AP of the test set as it is, then of each draw; NaN where nothing is annotated.

    The same seed, number of draws and number of images give the same draws.

    Raises:
        MeasurementError: a detection is wrong, or there is no annotated box.
    """
    draws = np.random.default_rng(seed).multinomial(
        len(image_ids), np.full(len(image_ids), 1 / len(image_ids)), size=resamples
    )
    weights = np.concatenate([np.ones((1, len(image_ids)), draws.dtype), draws])
    return ap_by_threshold(matches_by_class(annotations, detections, image_ids), weights).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class ClassMatches:
    """The detections of one class on all images, the highest score first, matched by COCO's rules."""

    image_index: np.ndarray
    """(D,), int64: whose detection it is, as a position in `image_ids`."""
    true: np.ndarray
    """(T, D), bool: it has found a box, at each of IOU_THRESHOLDS."""
    ignored: np.ndarray
    """(T, D), bool: it lies on a crowd, and counts neither for nor against."""
    annotated: np.ndarray
    """(images,), int64: boxes to be found."""


def matches_by_class(
    annotations: Mapping[str, Any], detections: Detections, image_ids: Sequence[int]
) -> List[ClassMatches]:
    """
    The matches of each class, in the order of the category ids.

    Raises:
        MeasurementError: a detection is wrong, or there is no annotated box.
    """
    index_of = {image_id: index for index, image_id in enumerate(sorted(image_ids))}
    categories = sorted(category["id"] for category in annotations["categories"])
    check_detections(detections, index_of, set(categories))
    truth = _grouped([box for box in annotations["annotations"] if box["image_id"] in index_of])
    found = _grouped(detections)
    if not any(not box.get("iscrowd", 0) for boxes in truth.values() for box in boxes):
        raise MeasurementError("the images have no annotated box; expected some, to compute AP")
    return [_class_matches(category, truth, found, index_of) for category in categories]


def ap_by_threshold(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """
    (R, T), float64: AP of each weighing at each of IOU_THRESHOLDS, the mean of the classes that have boxes there.

    It is the AP that COCO gives for a test set in which each image lies as often as it weighs.

    Args:
        weights: (R, images), integers.
    """
    parts = [_ap_of_chunk(matches, weights[start : start + CHUNK]) for start in range(0, len(weights), CHUNK)]
    return np.concatenate(parts)


def _ap_of_chunk(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    total, classes = np.zeros((len(weights), len(IOU_THRESHOLDS))), np.zeros((len(weights), 1))
    for one in matches:
        annotated = weights @ one.annotated  # (R,)
        weight = weights[:, one.image_index]  # (R, D)
        seen = np.cumsum(weight, axis=1)
        there = annotated > 0
        classes[there] += 1
        for threshold in range(len(IOU_THRESHOLDS)):
            precision_recall = _precision_recall(one, threshold, weight, seen)
            total[there, threshold] += _average_precision(*precision_recall, annotated)[there]
    with np.errstate(invalid="ignore"):
        return total / classes


def _precision_recall(
    one: ClassMatches, threshold: int, weight: np.ndarray, seen: np.ndarray
) -> Tuple[np.ndarray, np.ndarray]:
    """(found, counted), (R, N) each: boxes and detections up to each true one. Precision has its peaks nowhere else."""
    true, ignored = np.flatnonzero(one.true[threshold]), np.flatnonzero(one.ignored[threshold])
    skipped = np.cumsum(np.pad(weight[:, ignored], ((0, 0), (1, 0))), axis=1)  # (R, 1 + ignored)
    counted = seen[:, true] - skipped[:, np.searchsorted(ignored, true)]
    return np.cumsum(weight[:, true], axis=1), counted


def _average_precision(found: np.ndarray, counted: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """(R,): the mean over RECALLS of the best precision at that recall or a higher one."""
    precision = found / np.maximum(counted, 1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.pad(best, ((0, 0), (0, 1)))  # a recall that is not reached: 0
    recall = found / np.maximum(annotated, 1)[:, None]
    first = np.stack([np.searchsorted(row, RECALLS) for row in recall])
    return np.take_along_axis(best, first, axis=1).mean(axis=1)


def _grouped(boxes: Detections) -> Dict[Tuple[int, int], List[Mapping[str, Any]]]:
    """(category id, image id) -> its boxes, in their order."""
    groups: Dict[Tuple[int, int], List[Mapping[str, Any]]] = {}
    for box in boxes:
        groups.setdefault((box["category_id"], box["image_id"]), []).append(box)
    return groups


def _class_matches(
    category: int,
    truth: Mapping[Tuple[int, int], List[Mapping[str, Any]]],
    found: Mapping[Tuple[int, int], List[Mapping[str, Any]]],
    index_of: Mapping[int, int],
) -> ClassMatches:
    annotated = np.zeros(len(index_of), np.int64)
    indices: List[np.ndarray] = []
    scores: List[np.ndarray] = []
    true: List[np.ndarray] = []
    ignored: List[np.ndarray] = []
    for image_id, index in index_of.items():
        boxes = truth.get((category, image_id), [])
        crowd = np.array([bool(box.get("iscrowd", 0)) for box in boxes], bool)
        annotated[index] = np.count_nonzero(~crowd)
        best = sorted(found.get((category, image_id), []), key=lambda box: -box["score"])[:MAX_DETECTIONS]
        matched = _matched(_ious([box["bbox"] for box in best], [box["bbox"] for box in boxes], crowd), crowd)
        true.append(matched[0])
        ignored.append(matched[1])
        indices.append(np.full(len(best), index, np.int64))
        scores.append(np.array([box["score"] for box in best], np.float64))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return ClassMatches(
        np.concatenate(indices)[order],
        np.concatenate(true, axis=1)[:, order],
        np.concatenate(ignored, axis=1)[:, order],
        annotated,
    )


def _matched(ious: np.ndarray, crowd: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """
    (true, ignored), (T, D), bool each: what COCO's greedy matching makes of the detections of one image and class.

    Each detection in turn takes the free box that it overlaps most (of equal ones the last), or else a crowd, which any
    number may take: evaluateImg of pycocotools' cocoeval.py.

    Args:
        ious: (D, G), the highest score first. crowd: (G,), bool.
    """
    thresholds = np.arange(len(IOU_THRESHOLDS))
    true = np.zeros((len(IOU_THRESHOLDS), len(ious)), bool)
    ignored = np.zeros_like(true)
    taken = np.zeros((len(IOU_THRESHOLDS), len(crowd)), bool)
    for detection in np.flatnonzero((ious >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = ious[detection] >= IOU_THRESHOLDS[:, None]  # (T, G)
        overlap = np.where(fits & ~taken & ~crowd, ious[detection], 0.0)
        best = len(crowd) - 1 - np.argmax(overlap[:, ::-1], axis=1)
        hit = overlap[thresholds, best] > 0
        taken[thresholds[hit], best[hit]] = True
        true[:, detection] = hit
        ignored[:, detection] = ~hit & (fits & crowd).any(axis=1)
    return true, ignored


def _ious(found_xywh: Sequence[Any], annotated_xywh: Sequence[Any], crowd: np.ndarray) -> np.ndarray:
    """(D, G), float64: overlap of each two boxes; with a crowd the share of the detection that lies on it."""
    first = np.array(found_xywh, np.float64).reshape(-1, 1, 4)
    second = np.array(annotated_xywh, np.float64).reshape(1, -1, 4)
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area, other = first[..., 2:].prod(axis=2), second[..., 2:].prod(axis=2)
    together = np.where(crowd, area, area + other - shared)
    return np.divide(shared, together, out=np.zeros_like(shared), where=together > 0)
