"""At which score a detector is best used, which boxes it finds there, and how that compares with another detector."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from benchmarks.measuring.bootstrap import ClassMatches, bounds_of_draws
from deploy.errors import MeasurementError
from deploy.schema import short

SCORE_DIGITS = 6
"""Scores are kept rounded to these, thresholds and found boxes alike."""


def best_f1(matches: Sequence[ClassMatches]) -> Optional[Dict[str, Any]]:
    """
    The score at which F1 = 2 true / (true + false + annotated) at IoU 0.5 is best, all these classes taken together.

    `score` (detections at or above it count), `f1`, `precision`, `recall`, fractions, and the numbers of boxes `true`,
    `false` and `missed`. Of equal F1 the highest score. None where nothing is annotated or nothing is found.
    """
    annotated = int(sum(one.annotated.sum() for one in matches))
    scores = np.round(np.concatenate([one.scores for one in matches]), SCORE_DIGITS)
    true = np.concatenate([one.true[0] for one in matches])
    counts = ~np.concatenate([one.ignored[0] for one in matches])
    order = np.argsort(-scores, kind="stable")
    scores, found, counted = scores[order], np.cumsum(true[order]), np.cumsum(counts[order])
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], True)[: len(scores)])  # equal scores pass together
    if annotated == 0 or not len(last) or found[-1] == 0:
        return None
    f1 = 2 * found[last] / (counted[last] + annotated)
    best = last[int(np.argmax(f1))]
    hits, seen = int(found[best]), int(counted[best])
    return {
        "score": float(scores[best]),
        "f1": float(f1.max()),
        "precision": hits / seen,
        "recall": hits / annotated,
        "true": hits,
        "false": seen - hits,
        "missed": annotated - hits,
    }


def found_scores(one: ClassMatches) -> List[Optional[float]]:
    """Per annotated box, the score of the detection that has found it at IoU 0.5; None: none has."""
    return [None if np.isnan(score) else round(float(score), SCORE_DIGITS) for score in one.found_scores]


def comparison(numbers: Mapping[str, Any], reference: Mapping[str, Any]) -> Dict[str, Any]:
    """
    How one detector differs from another on the same images.

    `AP_difference` with `low` and `high` (paired bootstrap, 95 %, fractions); at each one's own best F1: `score_shift`,
    the boxes that only the reference finds (`lost`), those that only this one finds (`gained`), both also per class.
    What needs a best F1 is None where either has none.

    Args:
        numbers, reference: the `numbers` of two accuracy results, of the same annotations and images.

    Raises:
        MeasurementError: they have different numbers of draws or of annotated boxes, so they were not.
    """
    counts = [
        {"bootstrap draws": len(one["bootstrap"]["ap"]), **{name: len(of) for name, of in one["found_scores"].items()}}
        for one in (numbers, reference)
    ]
    if counts[0] != counts[1]:
        name = next(key for key in {**counts[0], **counts[1]} if counts[0].get(key) != counts[1].get(key))
        raise MeasurementError(
            f"two accuracy results do not belong together: {short(name)} is {counts[0].get(name)} in one and "
            f"{counts[1].get(name)} in the other; expected as many boxes of each class, and draws. Measure both again."
        )
    draws = [np.array(one["bootstrap"]["ap"], np.float64) for one in (numbers, reference)]
    difference, low, high = bounds_of_draws(draws[0] - draws[1])
    found = {"AP_difference": difference, "low": low, "high": high}
    point, reference_point = numbers["best_f1"], reference["best_f1"]
    if point is None or reference_point is None:
        return {**found, "score_shift": None, "lost": None, "gained": None, "per_class": None}
    per_class = {}
    for name, scores in numbers["found_scores"].items():
        here, there = (
            np.array([score is not None and score >= threshold for score in of], bool)
            for of, threshold in (
                (scores, point["score"]),
                (reference["found_scores"][name], reference_point["score"]),
            )
        )
        per_class[name] = {"lost": int((there & ~here).sum()), "gained": int((here & ~there).sum())}
    return {
        **found,
        "score_shift": point["score"] - reference_point["score"],
        "lost": sum(one["lost"] for one in per_class.values()),
        "gained": sum(one["gained"] for one in per_class.values()),
        "per_class": per_class,
    }
