"""The `numbers` of an accuracy result, from a model's detections: COCO's, the best F1, curves, how sure AP is."""

from __future__ import annotations

from typing import Any, Dict, Sequence

import numpy as np

from benchmarks.measuring.bootstrap import ap_of_draws, matches_by_class
from benchmarks.measuring.coco import evaluate_with_curves
from benchmarks.measuring.detections import CocoResults
from benchmarks.reporting.operating_point import best_f1, found_scores

BOOTSTRAP_SEED = 0
BOOTSTRAP_DRAWS = 1000


def numbers_from_detections(
    annotations: Dict[str, Any], detections: CocoResults, image_ids: Sequence[int]
) -> Dict[str, Any]:
    """
    The `numbers` of a result file, but for `against`.

    COCO's twelve and `per_class`, as fractions; `best_f1` and `best_f1_per_class` as `operating_point.best_f1`;
    `found_scores`, class name -> the score at which each annotated box was found; `pr_curves`; and `bootstrap`, the AP
    of the images as they are and of as many drawn with replacement. Results with the same seed and the same images
    have the same draws: they are compared draw by draw.

    Raises:
        MeasurementError: a detection is wrong, or no box is annotated.
    """
    numbers, curves = evaluate_with_curves(annotations, detections, image_ids)
    matches = matches_by_class(annotations, detections, image_ids)
    categories = sorted(annotations["categories"], key=lambda category: category["id"])
    by_name = {category["name"]: of_class for category, of_class in zip(categories, matches)}
    aps = ap_of_draws(matches, len(image_ids), BOOTSTRAP_DRAWS, BOOTSTRAP_SEED)
    return {
        **numbers,
        "best_f1": best_f1(matches),
        "best_f1_per_class": {name: best_f1([of_class]) for name, of_class in by_name.items()},
        "found_scores": {name: found_scores(of_class) for name, of_class in by_name.items()},
        "pr_curves": curves,
        "bootstrap": {
            "seed": BOOTSTRAP_SEED,
            "ap": [None if np.isnan(ap) else round(float(ap), 6) for ap in aps],
        },
        "against": None,
    }
