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

from benchmarks.measuring.coco import DETECTIONS_COUNTED, check_detections
from deploy.errors import MeasurementError

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
"""As the thresholds: cocodataset.org, Detection evaluation."""
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


def interval_from_aps(aps: Sequence[Tuple[np.ndarray, np.ndarray]], images: int, confidence: float = 0.95) -> Interval:
    """
    AP of the first minus AP of the second of each pair, averaged over the pairs, with its bootstrap interval.

    Args:
        aps: pairs of what `resampled_ap` returns, all with one seed; several where both were trained several times.
        images: how many images they are of.

    Raises:
        MeasurementError: no pair.
    """
    if not aps:
        raise MeasurementError("there is no pair of detections to compare; expected at least one")
    differences = np.mean([first - second for first, second in aps], axis=0)
    drawn = int(np.isfinite(differences[1:]).sum())
    return Interval(*bounds_of_draws(differences, confidence), confidence, drawn, images)


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
    return ap_of_draws(matches_by_class(annotations, detections, image_ids), len(image_ids), resamples, seed)


def ap_of_draws(matches: Sequence[ClassMatches], images: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """`resampled_ap` from matches that are already made."""
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    weights = np.concatenate([np.ones((1, images), draws.dtype), draws])
    return ap_by_threshold(matches, weights).mean(axis=1)


def bounds_of_draws(values: np.ndarray, confidence: float = 0.95) -> Tuple[float, float, float]:
    """
    (value, low, high) of a statistic: what it is, and where `confidence` of its draws lie.

    Args:
        values: (1 + resamples,): of the sample as it is, then of each draw; NaN where it does not exist.

    Raises:
        MeasurementError: it exists for no draw.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    if not drawn.size:
        raise MeasurementError("no draw has an annotated box; expected a test set with more of them")
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(values[0]), float(low), float(high)


def resampled_percentile(
    groups: Sequence[np.ndarray], percentile: float, seed: int, resamples: int = 1000
) -> np.ndarray:
    """
    (1 + resamples,), float64: a percentile of all samples as they are, then of each draw of as many with replacement.

    Runs are drawn as if each stood alone; where the load drifts, the truth is less sure than these draws say.

    Args:
        groups: samples of each image; a draw has as many of each, since the images are those that were chosen.
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        draw = np.concatenate([generator.choice(own, (count, len(own))) for own in groups], axis=1)
        drawn.append(np.percentile(draw, percentile, axis=1))
    return np.concatenate([[np.percentile(np.concatenate(groups), percentile)], *drawn])


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
    scores: np.ndarray
    """(D,), float64."""
    found_scores: np.ndarray
    """(boxes to be found,), float64: the score of the detection that has found each at IoU 0.5; NaN: none has.

    In the order of the image ids, then of the annotation file.
    """


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
    found_scores: List[np.ndarray] = []
    for image_id, index in index_of.items():
        boxes, seen = truth.get((category, image_id), []), found.get((category, image_id), [])
        if not boxes and not seen:
            continue
        crowd = np.array([bool(box.get("iscrowd", 0)) for box in boxes], bool)
        annotated[index] = np.count_nonzero(~crowd)
        best = sorted(seen, key=lambda box: -box["score"])[:DETECTIONS_COUNTED]
        if boxes:
            ious = _ious([box["bbox"] for box in best], [box["bbox"] for box in boxes], crowd)
            true_here, ignored_here, finder = _matched(ious, crowd)
        else:  # most of the images and classes of a large set: worth the shortcut
            true_here = ignored_here = np.zeros((len(IOU_THRESHOLDS), len(best)), bool)
            finder = np.zeros(0, np.int64)
        scores_here = np.array([box["score"] for box in best], np.float64)
        true.append(true_here)
        ignored.append(ignored_here)
        indices.append(np.full(len(best), index, np.int64))
        scores.append(scores_here)
        found_scores.append(np.append(scores_here, np.nan)[finder[~crowd]])  # -1, not found, is the NaN at the end
    all_scores = np.concatenate([np.zeros(0), *scores])
    order = np.argsort(-all_scores, kind="stable")
    nothing = np.zeros((len(IOU_THRESHOLDS), 0), bool)
    return ClassMatches(
        np.concatenate([np.zeros(0, np.int64), *indices])[order],
        np.concatenate([nothing, *true], axis=1)[:, order],
        np.concatenate([nothing, *ignored], axis=1)[:, order],
        annotated,
        all_scores[order],
        np.concatenate([np.zeros(0), *found_scores]),
    )


def _matched(ious: np.ndarray, crowd: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    (true, ignored, finder): what COCO's greedy matching makes of the detections of one image and class.

    `true` and `ignored` are (T, D), bool; `finder` is (G,), int64: which detection has found each box at the first
    threshold, -1 for none.

    Each detection in turn takes the free box that it overlaps most (of equal ones the last), or else a crowd, which any
    number may take: evaluateImg of pycocotools' cocoeval.py.

    Args:
        ious: (D, G), the highest score first. crowd: (G,), bool.
    """
    thresholds = np.arange(len(IOU_THRESHOLDS))
    true = np.zeros((len(IOU_THRESHOLDS), len(ious)), bool)
    ignored = np.zeros_like(true)
    taken = np.zeros((len(IOU_THRESHOLDS), len(crowd)), bool)
    finder = np.full(len(crowd), -1)
    for detection in np.flatnonzero((ious >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = ious[detection] >= IOU_THRESHOLDS[:, None]  # (T, G)
        overlap = np.where(fits & ~taken & ~crowd, ious[detection], 0.0)
        best = len(crowd) - 1 - np.argmax(overlap[:, ::-1], axis=1)
        hit = overlap[thresholds, best] > 0
        taken[thresholds[hit], best[hit]] = True
        true[:, detection] = hit
        ignored[:, detection] = ~hit & (fits & crowd).any(axis=1)
        if hit[0]:
            finder[best[0]] = detection
    return true, ignored, finder


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
