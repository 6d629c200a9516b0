from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from benchmarks.measuring.bootstrap import (
    ap_by_threshold,
    bounds_of_draws,
    interval_from_aps,
    matches_by_class,
    resampled_ap,
    resampled_percentile,
)
from benchmarks.measuring.coco import evaluate
from deploy.errors import MeasurementError

CATEGORIES = (2, 5, 9)


def random_set(seed, images=12, objects=6, copies=3, crowds=0.1, noise=0.1):
    """Annotations, crowds among them, and detections that partly fit them, `copies` a box at most."""
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in rng.permutation(np.arange(1, images + 1)).tolist():
        for _ in range(rng.integers(0, 2 * objects)):
            box = [*rng.uniform(0, 200, 2).tolist(), *rng.uniform(6, 120, 2).tolist()]
            category = int(rng.choice(CATEGORIES))
            number = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box}
            annotations.append({**number, "area": box[2] * box[3], "iscrowd": int(rng.random() < crowds)})
            for _ in range(rng.integers(0, copies + 1)):
                moved = np.array(box) + rng.normal(0, noise, 4) * np.tile(box[2:], 2)
                moved[2:] = np.maximum(moved[2:], 1)
                found = {"image_id": image, "bbox": moved.tolist(), "score": float(rng.random())}
                detections.append({**found, "category_id": category if rng.random() < 0.8 else 2})
    return document(annotations, range(1, images + 1)), detections


def document(annotations, image_ids):
    images = [{"id": image, "width": 400, "height": 400} for image in image_ids]
    categories = [{"id": number, "name": f"class {number}"} for number in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}


def ids_of(annotations):
    return [image["id"] for image in annotations["images"]]


def repeated(annotations, detections, weights):
    """The data set in which each image lies as often as it weighs."""
    boxes, found, image_ids = [], [], []
    for image, weight in zip(sorted(ids_of(annotations)), weights, strict=True):
        for copy in range(weight):
            image_ids.append(1000 * image + copy)
            for box in annotations["annotations"]:
                if box["image_id"] == image:
                    boxes.append({**box, "id": len(boxes) + 1, "image_id": image_ids[-1]})
            found += [{**box, "image_id": image_ids[-1]} for box in detections if box["image_id"] == image]
    return document(boxes, image_ids), found


@pytest.mark.parametrize("seed", range(4))
def test_the_ap_of_a_weighing_is_that_of_the_set_with_images_repeated(seed):
    annotations, detections = random_set(seed)
    weights = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), size=4)
    weights[0] = 1  # the set as it is
    aps = ap_by_threshold(matches_by_class(annotations, detections, ids_of(annotations)), weights)
    for row, ap in zip(weights, aps, strict=True):
        drawn, found = repeated(annotations, detections, row)
        expected = evaluate(drawn, found, ids_of(drawn))
        assert 0.1 < expected["AP"] < 0.9
        assert ap.mean() == pytest.approx(expected["AP"], abs=1e-9)
        assert ap[0] == pytest.approx(expected["AP50"], abs=1e-9)
        assert ap[5] == pytest.approx(expected["AP75"], abs=1e-9)


def test_more_than_a_hundred_detections_of_a_class_and_classes_that_are_not_drawn():
    annotations, detections = random_set(5, images=3, objects=8, copies=80)
    annotations["annotations"] = [
        box for box in annotations["annotations"] if box["category_id"] != 9 or box["image_id"] == 1
    ]
    assert (
        max(np.unique([(box["image_id"], box["category_id"]) for box in detections], axis=0, return_counts=True)[1])
        > 100
    )
    weights = np.array([[1, 1, 1], [0, 2, 1], [3, 0, 0]])
    aps = ap_by_threshold(matches_by_class(annotations, detections, ids_of(annotations)), weights).mean(axis=1)
    for row, ap in zip(weights, aps, strict=True):
        drawn, found = repeated(annotations, detections, row)
        assert ap == pytest.approx(evaluate(drawn, found, ids_of(drawn))["AP"], abs=1e-9)


def test_only_the_named_images_count_in_whatever_order():
    annotations, detections = random_set(0)
    chosen = [9, 2, 7, 4]
    found = [box for box in detections if box["image_id"] in chosen]
    aps = resampled_ap(annotations, found, chosen, resamples=20)
    assert aps[0] == pytest.approx(evaluate(annotations, found, chosen)["AP"], abs=1e-9)
    assert np.array_equal(aps, resampled_ap(annotations, found, sorted(chosen), resamples=20), equal_nan=True)


def paired_difference(annotations, pairs, image_ids, resamples=1000, confidence=0.95):
    """`interval_from_aps` of pairs of COCO results."""
    aps = [tuple(resampled_ap(annotations, one, image_ids, resamples) for one in pair) for pair in pairs]
    return interval_from_aps(aps, len(image_ids), confidence)


def test_a_detector_compared_with_itself_has_no_difference_and_no_doubt():
    annotations, detections = random_set(0)
    interval = paired_difference(annotations, [(detections, detections)], ids_of(annotations), resamples=50)
    assert (interval.difference, interval.low, interval.high) == (0, 0, 0)
    assert (interval.images, interval.resamples, interval.confidence) == (12, 50, 0.95)


def test_the_interval_holds_the_difference_and_turns_with_the_pair():
    annotations, worse = random_set(0, images=40, noise=0.15)
    _, better = random_set(0, images=40, noise=0.05)  # the same boxes, better placed
    ids = ids_of(annotations)
    interval = paired_difference(annotations, [(better, worse)], ids, resamples=300)
    first, second = evaluate(annotations, better, ids)["AP"], evaluate(annotations, worse, ids)["AP"]
    assert interval.difference == pytest.approx(first - second, abs=1e-9)
    assert 0 < interval.low < interval.difference < interval.high
    turned = paired_difference(annotations, [(worse, better)], ids, resamples=300)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-12)
    assert paired_difference(annotations, [(better, worse)], ids, resamples=300) == interval
    narrower = paired_difference(annotations, [(better, worse)], ids, resamples=300, confidence=0.5)
    assert interval.low < narrower.low < narrower.high < interval.high


def test_several_pairs_are_averaged_over_the_same_draws():
    annotations, worse = random_set(0, noise=0.15)
    _, better = random_set(0, noise=0.05)
    ids = ids_of(annotations)
    once = paired_difference(annotations, [(better, worse)], ids, resamples=100)
    thrice = paired_difference(annotations, [(better, worse)] * 3, ids, resamples=100)
    assert dataclasses.astuple(thrice) == pytest.approx(dataclasses.astuple(once))
    both = paired_difference(annotations, [(better, worse), (worse, better)], ids, resamples=100)
    assert (both.difference, both.low, both.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_interval_is_as_wide_as_ap_really_varies_from_set_to_set():
    """90 % of the intervals should hold the truth: the mean difference of many sets. Some 40 sets tell that roughly."""
    differences, intervals = [], []
    for seed in range(40):
        annotations, worse = random_set(seed, images=25, crowds=0, noise=0.12)
        _, better = random_set(seed, images=25, crowds=0, noise=0.1)
        interval = paired_difference(annotations, [(better, worse)], ids_of(annotations), resamples=100, confidence=0.9)
        differences.append(interval.difference)
        intervals.append(interval)
    truth = np.mean(differences)
    assert 0.7 <= np.mean([interval.low <= truth <= interval.high for interval in intervals]) <= 1.0
    width = np.mean([interval.high - interval.low for interval in intervals])
    assert 0.6 < width / (2 * 1.645 * np.std(differences)) < 1.6


def test_a_thousand_draws_of_a_small_test_set_take_seconds():
    annotations, detections = random_set(0, images=72, objects=12, copies=8)
    began = time.process_time()
    resampled_ap(annotations, detections, ids_of(annotations))
    assert time.process_time() - began < 8


def test_what_cannot_be_compared_is_refused():
    annotations, detections = random_set(0)
    ids = ids_of(annotations)
    with pytest.raises(MeasurementError, match="no pair"):
        paired_difference(annotations, [], ids)
    with pytest.raises(MeasurementError, match="detection 0 is"):
        paired_difference(annotations, [([{**detections[0], "image_id": 99}], detections)], ids)
    with pytest.raises(MeasurementError, match="no annotated box"):
        paired_difference({**annotations, "annotations": []}, [(detections, detections)], ids)


def test_the_bounds_of_a_median_hold_the_truth_as_often_as_they_say():
    """95 % of the intervals of a median should hold the true one, 10; 200 of them tell that roughly."""
    generator = np.random.default_rng(0)
    held = []
    for seed in range(200):
        samples = generator.lognormal(np.log(10), 0.1, 100)
        value, low, high = bounds_of_draws(resampled_percentile([samples], 50, seed, resamples=200))
        assert value == pytest.approx(np.median(samples))
        held.append(low <= 10 <= high)
    assert 0.88 <= np.mean(held) <= 1.0


def test_draws_of_percentiles_are_as_many_as_asked_and_never_beyond_the_samples():
    draws = resampled_percentile([np.array([1.0, 2.0, 9.0])], 99, seed=1, resamples=250)
    assert len(draws) == 251
    assert draws[1:].min() >= 1.0
    assert draws.max() <= 9.0
    assert np.array_equal(draws, resampled_percentile([np.array([1.0, 2.0, 9.0])], 99, seed=1, resamples=250))
    assert not np.array_equal(draws, resampled_percentile([np.array([1.0, 2.0, 9.0])], 99, seed=2, resamples=250))


def test_a_draw_has_as_many_runs_of_each_image():
    """Two images of one duration each: their median is known, though a run may take 5 or 9 ms."""
    draws = resampled_percentile([np.full(20, 5.0), np.full(20, 9.0)], 50, seed=1, resamples=100)
    assert set(draws) == {7.0}
    together = resampled_percentile([np.repeat([5.0, 9.0], 20)], 50, seed=1, resamples=100)
    assert set(together) >= {5.0, 9.0}


def test_bounds_leave_out_draws_without_a_number():
    assert bounds_of_draws(np.array([2.0, np.nan, 1.0, 3.0]), confidence=1.0) == (2.0, 1.0, 3.0)
    with pytest.raises(MeasurementError, match="no draw"):
        bounds_of_draws(np.array([2.0, np.nan]))
