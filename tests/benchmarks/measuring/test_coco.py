from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time

import numpy as np
import pytest

from benchmarks.measuring.coco import METRICS, evaluate, evaluate_with_curves, words_of_cap
from deploy.dataset import coco_document, load_coco
from deploy.errors import MeasurementError

IMAGES = 12


def random_set(seed):
    """Annotations (crowds and masks' areas among them) and detections that partly fit them."""
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(1, IMAGES + 1):
        for _ in range(rng.integers(0, 9)):
            x, y, width, height = *rng.uniform(0, 300, 2), *rng.uniform(4, 160, 2)
            category = int(rng.choice([2, 5, 9]))
            box = [float(x), float(y), float(width), float(height)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": float(width * height * rng.uniform(0.3, 1)),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                moved = (np.array(box) + rng.normal(0, 0.08, 4) * [width, height, width, height]).tolist()
                detections.append(
                    {
                        "image_id": image,
                        "category_id": category if rng.random() < 0.8 else 2,
                        "bbox": [*moved[:2], *np.maximum(moved[2:], 1.0).tolist()],
                        "score": float(rng.random()),
                    }
                )
    images = [{"id": image, "width": 480, "height": 480} for image in range(1, IMAGES + 1)]
    categories = [{"id": number, "name": f"class {number}"} for number in (2, 5, 9)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize(("seed", "count"), [(0, IMAGES), (1, IMAGES), (2, 5)])
def test_the_numbers_are_those_of_pycocotools(seed, count):
    pytest.importorskip("pycocotools", reason="the independent evaluator is not installed")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, detections = random_set(seed)
    image_ids = list(range(1, count + 1))
    detections = [box for box in detections if box["image_id"] <= count]
    numbers = evaluate(annotations, detections, image_ids)

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(box) for box in detections]), "bbox")
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = {name: None if value == -1 else value for name, value in zip(METRICS, evaluation.stats, strict=True)}
    assert 0.05 < expected["AP"] < 0.95
    for name in METRICS:
        assert numbers[name] == pytest.approx(expected[name], abs=1e-9), name
    for index, category in enumerate((2, 5, 9)):
        precision = evaluation.eval["precision"][:, :, index, 0, 2]
        assert numbers["per_class"][f"class {category}"] == pytest.approx(precision[precision > -1].mean(), abs=1e-9)


def test_no_detections_are_an_ap_of_zero():
    annotations, _ = random_set(0)
    numbers = evaluate(annotations, [], range(1, IMAGES + 1))
    assert numbers["AP"] == numbers["AR100"] == 0
    assert set(numbers["per_class"].values()) == {0.0}


def test_nothing_to_count_is_none_and_prints_nothing(capsys):
    annotations, detections = random_set(0)
    annotations["annotations"] = [{**box, "area": 1e5} for box in annotations["annotations"] if box["category_id"] != 9]
    numbers = evaluate(annotations, detections, range(1, IMAGES + 1))
    assert numbers["AP_small"] is None
    assert numbers["AR_small"] is None
    assert numbers["per_class"]["class 9"] is None
    assert numbers["AP_large"] > 0
    assert capsys.readouterr().out == ""


def test_an_annotation_of_id_zero_and_without_area_counts():
    annotations, _ = random_set(0)
    boxes = [{**box, "id": index, "iscrowd": 0} for index, box in enumerate(annotations["annotations"])]
    annotations["annotations"] = [{key: value for key, value in box.items() if key != "area"} for box in boxes]
    perfect = [{**box, "score": 0.9} for box in annotations["annotations"]]
    assert evaluate(annotations, perfect, range(1, IMAGES + 1))["AP"] == pytest.approx(1.0)


def test_curves_are_those_whose_mean_is_ap():
    annotations, detections = random_set(0)
    numbers, curves = evaluate_with_curves(annotations, detections, range(1, IMAGES + 1))
    assert np.mean(curves["AP"]["mean"]) == pytest.approx(numbers["AP"], abs=1e-4)
    assert np.mean(curves["AP50"]["mean"]) == pytest.approx(numbers["AP50"], abs=1e-4)
    for name, ap in numbers["per_class"].items():
        curve = curves["AP"]["per_class"][name]
        assert len(curve) == 101
        assert curve == sorted(curve, reverse=True)
        assert np.mean(curve) == pytest.approx(ap, abs=1e-4)
    annotations["annotations"] = [box for box in annotations["annotations"] if box["category_id"] != 9]
    assert evaluate_with_curves(annotations, detections, range(1, IMAGES + 1))[1]["AP"]["per_class"]["class 9"] is None


def many_images(count=150, classes=80):
    """As many boxes and detections per image as COCO's own validation set has."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, count + 1):
        for category in rng.integers(1, classes + 1, 7).tolist():
            box = [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(8, 160, 2).tolist()]
            number = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box}
            annotations.append({**number, "area": box[2] * box[3], "iscrowd": 0})
            detections += [
                {**{key: number[key] for key in ("image_id", "category_id", "bbox")}, "score": score}
                for score in rng.random(3).tolist()
            ]
        detections += [
            {"image_id": image, "category_id": category, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.1}
            for category in rng.integers(1, classes + 1, 80).tolist()
        ]
    images = [{"id": image, "width": 480, "height": 480} for image in range(1, count + 1)]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, classes + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def test_it_is_several_times_as_fast_as_pycocotools():
    """At 5,000 images it is some ten times as fast; a small set on a busy machine tells less than that."""
    pytest.importorskip("pycocotools", reason="the independent evaluator is not installed")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, detections = many_images()
    began = time.process_time()
    ap = evaluate(annotations, detections, [image["id"] for image in annotations["images"]])["AP"]
    ours = time.process_time() - began
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(box) for box in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    theirs = time.process_time() - began
    assert ap == pytest.approx(evaluation.stats[0], abs=1e-9)
    assert theirs / ours > 3, (theirs, ours)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"image_id": 99}, "no image that is measured has the id 99"),
        ({"category_id": 1}, "no category has the id 1"),
        ({"score": float("nan")}, "not finite"),
        ({"bbox": [0, 0, float("inf"), 5]}, "not finite"),
        ({"bbox": [0, 0, -5, 5]}, "its size is negative"),
        ({"bbox": [0, 0, 5]}, "wrong type"),
        ({"bbox": None}, "wrong type"),
        ({"score": "high"}, "wrong type"),
        ({"image_id": [1]}, "wrong type"),
    ],
)
def test_a_wrong_detection_is_named(change, fault):
    annotations, detections = random_set(0)
    detections[3] = {**detections[3], **change}
    with pytest.raises(MeasurementError, match=f"detection 3 is .*{fault}"):
        evaluate(annotations, detections, range(1, IMAGES + 1))


@pytest.mark.parametrize("offset", [0, 2**53, 20260325155628000000, -(2**40)])
def test_ids_of_any_size_give_the_same_numbers(offset):
    """Beyond 2^53 neighbours are one number to an array of floats, beyond 2^63 they fit into none."""
    annotations, detections = random_set(0)
    expected = evaluate(annotations, detections, [image["id"] for image in annotations["images"]])
    for entry in annotations["images"]:
        entry["id"] += offset
    for entry in annotations["annotations"] + detections:
        entry["image_id"] += offset
        entry["category_id"] += offset
    for entry in annotations["categories"]:
        entry["id"] += offset
    found = evaluate(annotations, detections, [image["id"] for image in annotations["images"]])
    assert found == expected
    assert 0 < found["AP"] < 1


def test_more_boxes_of_a_class_than_ap_counts_are_told(tmp_path):
    images = [{"id": number, "file_name": f"{number}.png", "width": 500, "height": 500} for number in (1, 2)]
    boxes = [[5 * (number % 90), 20 * (number // 90), 4, 10] for number in range(150)]
    document = {
        "images": images,
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": box} for number, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "ant"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    data = load_coco(tmp_path / "a.json", tmp_path, check_files=False)
    told = words_of_cap(data)
    assert "1 of 2 images have more than 100 boxes of a class, 150 at most" in told
    assert "50 of 150 boxes cannot be found" in told
    everything = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    assert evaluate(coco_document(data), everything, [1, 2])["AR100"] == pytest.approx(100 / 150)
    fewer = dataclasses.replace(data, images=data.images[1:])
    assert words_of_cap(fewer) == ""
