from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.measuring.bootstrap import matches_by_class
from benchmarks.reporting.operating_point import best_f1, comparison, found_scores


def data_set(boxes):
    """(annotations, detections): per image a list of (category, annotated?, scores of detections on it)."""
    annotations, detections = [], []
    for image_id, objects in enumerate(boxes, start=1):
        for index, (category, annotated, scores) in enumerate(objects):
            box = {"image_id": image_id, "category_id": category, "bbox": [100.0 * index, 0.0, 50.0, 50.0]}
            if annotated:
                annotations.append({**box, "id": len(annotations) + 1, "iscrowd": int(annotated == "crowd")})
            detections += [{**box, "score": score} for score in scores]
    images = [{"id": number} for number in range(1, len(boxes) + 1)]
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "star"}]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def matches_of(boxes):
    annotations, detections = data_set(boxes)
    return matches_by_class(annotations, detections, [image["id"] for image in annotations["images"]])


def test_the_best_score_is_that_of_the_best_f1_by_trying_all():
    rng = np.random.default_rng(0)
    boxes = [
        [
            (int(rng.integers(1, 3)), bool(rng.random() < 0.6), rng.random(rng.integers(0, 3)).round(2).tolist())
            for _ in range(8)
        ]
        for _ in range(20)
    ]
    annotations, detections = data_set(boxes)
    found = best_f1(matches_of(boxes))
    annotated = len(annotations["annotations"])
    f1s = {}
    for score in {box["score"] for box in detections}:
        hits = sum(bool(there) and any(one >= score for one in scores) for _, there, scores in itertools.chain(*boxes))
        seen = sum(box["score"] >= score for box in detections)
        f1s[score] = 2 * hits / (seen + annotated)
    assert found["f1"] == pytest.approx(max(f1s.values()))
    assert f1s[found["score"]] == pytest.approx(found["f1"])
    assert found["true"] + found["missed"] == annotated
    assert found["precision"] == pytest.approx(found["true"] / (found["true"] + found["false"]))
    assert found["recall"] == pytest.approx(found["true"] / annotated)
    harmonic = 2 * found["precision"] * found["recall"] / (found["precision"] + found["recall"])
    assert found["f1"] == pytest.approx(harmonic)


def test_equal_scores_pass_together_and_crowds_do_not_count():
    boxes = [[(1, True, [0.5]), (1, False, [0.5]), (1, "crowd", [0.9, 0.8])]]
    found = best_f1(matches_of(boxes))
    assert (found["score"], found["true"], found["false"], found["missed"]) == (0.5, 1, 1, 0)


def test_of_equal_f1_the_highest_score():
    found = best_f1(matches_of([[(1, True, [0.9]), (1, True, []), (1, False, [0.7]), (1, True, [0.6])]]))
    assert found["score"] == 0.6  # f1 0.5, 0.4, 0.67
    found = best_f1(matches_of([[(1, True, [0.9]), (1, False, [0.8]), (1, False, [0.7]), (1, True, [0.6])]]))
    assert found["score"] == 0.9  # f1 0.67, 0.5, 0.4, 0.67


def test_nothing_annotated_or_nothing_found_has_no_best_score():
    matches = matches_of([[(1, True, []), (2, False, [0.9])]])
    assert best_f1(matches) is None
    assert [best_f1([one]) for one in matches] == [None, None]


def test_found_scores_are_per_annotated_box_in_the_order_of_the_images():
    matches = matches_of([[(1, True, [0.3, 0.7]), (1, True, []), (1, "crowd", [0.9])], [(1, True, [0.4])], []])
    assert found_scores(matches[0]) == [0.7, None, 0.4]
    assert found_scores(matches[1]) == []


def numbers(ap, score, found):
    return {
        "bootstrap": {"seed": 0, "ap": ap},
        "best_f1": None if score is None else {"score": score},
        "found_scores": found,
    }


def test_lost_and_gained_are_counted_at_each_ones_own_score():
    teacher = numbers([0.5] * 5, 0.5, {"disc": [0.9, 0.6, 0.4, None], "star": [0.5]})
    other = numbers([0.4] * 5, 0.3, {"disc": [0.2, 0.3, 0.35, 0.9], "star": [0.3]})
    found = comparison(other, teacher)
    assert found["per_class"] == {"disc": {"lost": 1, "gained": 2}, "star": {"lost": 0, "gained": 0}}
    assert (found["lost"], found["gained"]) == (1, 2)
    assert found["score_shift"] == pytest.approx(-0.2)
    back = comparison(teacher, other)
    assert (back["lost"], back["gained"], back["score_shift"]) == (2, 1, pytest.approx(0.2))


def test_the_interval_is_paired_draw_by_draw():
    draws = np.random.default_rng(0).normal(0.5, 0.1, 1000)
    first = numbers([0.48, *(draws - 0.02).tolist()], 0.5, {})
    second = numbers([0.5, *draws.tolist()], 0.5, {})
    found = comparison(first, second)
    assert [found[key] for key in ("AP_difference", "low", "high")] == pytest.approx([-0.02] * 3)


def test_draws_without_a_box_are_left_out_and_without_a_best_score_there_are_no_boxes():
    found = comparison(numbers([0.4, None, 0.3], None, {}), numbers([0.5, None, 0.5], 0.5, {}))
    assert (found["low"], found["high"]) == pytest.approx((-0.2, -0.2))
    assert (found["lost"], found["gained"], found["score_shift"], found["per_class"]) == (None, None, None, None)
