"""The one evaluator: COCO's box metrics by faster-coco-eval, for torch, ONNX Runtime and TensorRT alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from deploy.errors import MeasurementError, MissingDependencyError
from deploy.limits import FURTHEST_PX
from deploy.machine import no_garbage_collection

if TYPE_CHECKING:
    from deploy.dataset import CocoSet

METRICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve numbers, in its order (cocodataset.org, Detection evaluation)."""

CURVES = {"AP50": slice(0, 1), "AP": slice(None)}
"""Kind of precision-recall curve -> the IoU thresholds that it is the mean of: 0.5, or all ten."""
DETECTIONS_COUNTED = 100
"""Of a class in an image: more do not count in AP (cocodataset.org, Detection evaluation)."""
RECALLS = 101
"""Points of a curve: the best precision at recall 0, 0.01 ... 1, or a higher one."""


def check_evaluator() -> None:
    """Raises MissingDependencyError if faster-coco-eval is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("faster-coco-eval", "computing AP", "pip install faster-coco-eval") from error


def evaluate(
    annotations: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> Dict[str, Any]:
    """
    The numbers of METRICS and `per_class` (class name -> AP), as fractions; None where there is nothing to count.

    Boxes and areas are taken as the annotation file has them, so that the numbers are those of pycocotools.

    Args:
        annotations: a COCO detection document of a checked set, `deploy.dataset.coco_document`.
        detections: COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`.
        image_ids: the images that count.

    Raises:
        MeasurementError: a detection lacks a key, is not finite, has a negative size, or names an image or category
            that is not there.
        MissingDependencyError: faster-coco-eval is not installed.
    """
    return evaluate_with_curves(annotations, detections, image_ids)[0]


def evaluate_with_curves(
    annotations: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """
    (numbers, curves): as `evaluate`, and kind of CURVES -> `mean` and `per_class` (class name -> curve).

    A curve is a list of RECALLS precisions, rounded to four digits; None where there is nothing to count.
    """
    check_evaluator()
    from faster_coco_eval import COCO, COCOeval_faster

    wanted = {image["id"] for image in annotations["images"]} & set(image_ids)
    categories = annotations["categories"]
    check_detections(detections, wanted, {category["id"] for category in categories})

    # Ids are given anew, from 1 in their order: COCO's matching takes id 0 for "not matched", and libraries that keep
    # ids in arrays take those beyond 2^53 for each other.
    new_image_id = {image_id: number for number, image_id in enumerate(sorted(wanted), start=1)}
    new_category_id = {
        category_id: number for number, category_id in enumerate(sorted(entry["id"] for entry in categories), start=1)
    }

    new_categories = [{"id": new_category_id[entry["id"]], "name": entry["name"]} for entry in categories]

    def coco(boxes: Sequence[Mapping[str, Any]]) -> Any:
        numbered = [
            _annotation(number, box, new_image_id[box["image_id"]], new_category_id[box["category_id"]])
            for number, box in enumerate(boxes, start=1)
        ]
        images = [
            {**image, "id": new_image_id[image["id"]]} for image in annotations["images"] if image["id"] in wanted
        ]
        return COCO({"images": images, "annotations": numbered, "categories": new_categories})

    with no_garbage_collection():
        truth = coco([box for box in annotations["annotations"] if box["image_id"] in wanted])
        keys = ("image_id", "category_id", "bbox", "score")  # an area of theirs does not count: pycocotools' loadRes
        found = coco([{key: box[key] for key in keys} for box in detections])
        evaluation = COCOeval_faster(truth, found, iouType="bbox")
        evaluation.print_function = lambda *_: None
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = {category["id"]: category["name"] for category in new_categories}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class), -1: nothing to count
    numbers: Dict[str, Any] = {name: _known(value) for name, value in zip(METRICS, evaluation.stats)}
    numbers["per_class"] = {}
    curves: Dict[str, Any] = {kind: {"mean": None, "per_class": {}} for kind in CURVES}
    for index, category in enumerate(evaluation.params.catIds):
        numbers["per_class"][names[category]] = _mean(precision[:, :, index])
    for kind, thresholds in CURVES.items():
        for index, category in enumerate(evaluation.params.catIds):
            curves[kind]["per_class"][names[category]] = _curve(precision[thresholds, :, index, None])
        curves[kind]["mean"] = _curve(precision[thresholds])
    return numbers, curves


def words_of_cap(data: CocoSet) -> str:
    """What AP's limit on detections does to images with more boxes of a class; empty if there are none."""
    crowded, most, total, lost = 0, 0, 0, 0
    for image in data.images:
        counts = np.bincount(image.labels[~image.crowd], minlength=1)
        above = np.maximum(counts - DETECTIONS_COUNTED, 0)
        crowded, most = crowded + bool(above.any()), max(most, int(counts.max()))
        total, lost = total + int(counts.sum()), lost + int(above.sum())
    if not crowded:
        return ""
    return (
        f"{crowded} of {len(data.images)} images have more than {DETECTIONS_COUNTED} boxes of a class, {most} at most: "
        f"COCO's AP counts {DETECTIONS_COUNTED} detections of a class in an image, so that {lost} of {total} boxes "
        "cannot be found. Cut such images into tiles"
    )


def check_detections(detections: Sequence[Mapping[str, Any]], image_ids: Any, category_ids: Any) -> None:
    """Raises MeasurementError naming the first detection that is not one of these images and categories."""
    for index, box in enumerate(detections):
        fault = _fault(box, image_ids, category_ids)
        if fault:
            raise MeasurementError(
                f"detection {index} is {box!r:.200}: {fault}; expected image_id and category_id of the annotation "
                "file, bbox [x, y, width, height] in pixels and score. Check the model's outputs and its contract, or "
                "the file's origin."
            )


class Integers:
    """A set of ids that holds every integer: of detections whose annotations are not at hand."""

    def __contains__(self, value: Any) -> bool:
        return type(value) is int and abs(value) < 2**63


def _fault(box: Any, image_ids: Any, category_ids: Any) -> str:
    """What is wrong with a COCO result, or nothing."""
    try:
        image_id, category_id, score = box["image_id"], box["category_id"], box["score"]
        x, y, width, height = box["bbox"]
        if not all(map(math.isfinite, (x, y, width, height, score))):
            return "a number is not finite"
        if max(map(abs, (x, y, width, height))) > FURTHEST_PX:
            return "it lies nowhere near an image"
        if width < 0 or height < 0:
            return "its size is negative"
        if image_id not in image_ids:
            return f"no image that is measured has the id {image_id!r}"
        if category_id not in category_ids:
            return f"no category has the id {category_id!r}"
    except (KeyError, TypeError, ValueError, OverflowError):
        return "a key is missing or of a wrong type"
    return ""


def _annotation(number: int, box: Mapping[str, Any], image_id: int, category_id: int) -> Dict[str, Any]:
    width, height = box["bbox"][2:]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box["bbox"],
        "area": box.get("area", width * height),  # of the mask where there is one: COCO's small, medium and large
        "iscrowd": box.get("iscrowd", 0),
        "score": box.get("score", 0.0),
    }


def _mean(precision: np.ndarray) -> Optional[float]:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else None


def _curve(precision: np.ndarray) -> Optional[List[float]]:
    """
    The mean over thresholds and the classes that have boxes.

    Args:
        precision: (IoU, recall, class).
    """
    counted = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return np.round(counted.mean(axis=(0, 2)), 4).tolist() if counted.size else None


def _known(value: float) -> Optional[float]:
    return None if value < 0 else float(value)
