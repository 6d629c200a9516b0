"""The one evaluator: COCO's box metrics by faster-coco-eval, for torch, ONNX Runtime and TensorRT alike."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from deploy.errors import MeasurementError, MissingDependencyError

METRICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve numbers, in its order (cocodataset.org, Detection evaluation)."""

Metrics = Dict[str, Optional[float]]


def evaluate(
    annotations: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> Dict[str, Any]:
    """
    The numbers of METRICS and `per_class` (class name -> AP), as fractions; None where there is nothing to count.

    Boxes and areas are taken as the annotation file has them, so that the numbers are those of pycocotools.

    Args:
        annotations: the content of a COCO detection file, already checked by `deploy.dataset.load_coco`.
        detections: COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`.
        image_ids: the images that count.

    Raises:
        MeasurementError: a detection lacks a key, is not finite, or names an image or category that is not there.
        MissingDependencyError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise MissingDependencyError("faster-coco-eval", "computing AP", "pip install faster-coco-eval") from error
    wanted = set(image_ids)
    categories = annotations["categories"]
    check_detections(detections, wanted, {category["id"] for category in categories})

    def coco(boxes: Sequence[Mapping[str, Any]]) -> Any:
        # Ids are given anew from 1: COCO's matching takes id 0 for "not matched".
        numbered = [_annotation(number, box) for number, box in enumerate(boxes, start=1)]
        images = [image for image in annotations["images"] if image["id"] in wanted]
        return COCO({"images": images, "annotations": numbered, "categories": categories})

    truth = coco([box for box in annotations["annotations"] if box["image_id"] in wanted])
    evaluation = COCOeval_faster(truth, coco(detections), iouType="bbox")
    evaluation.print_function = lambda *_: None
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area range, most detections), -1: nothing to count
    names = {category["id"]: category["name"] for category in categories}
    per_class = {
        names[category]: _mean(precision[:, :, index, 0, -1]) for index, category in enumerate(evaluation.params.catIds)
    }
    numbers: Dict[str, Any] = {name: _known(value) for name, value in zip(METRICS, evaluation.stats)}
    numbers["per_class"] = per_class
    return numbers


def check_detections(detections: Sequence[Mapping[str, Any]], image_ids: Any, category_ids: Any) -> None:
    """Raises MeasurementError naming the first detection that is not one of these images and categories."""
    for index, box in enumerate(detections):
        try:
            numbers: List[float] = [*box["bbox"], box["score"]]
            good = len(numbers) == 5 and all(map(math.isfinite, numbers))
            good = good and box["image_id"] in image_ids and box["category_id"] in category_ids
        except (KeyError, TypeError):
            good = False
        if not good:
            raise MeasurementError(
                f"detection {index} is {box!r:.200}; expected image_id and category_id of the annotation file, "
                "bbox [x, y, width, height] and score, all finite. Check the model's outputs and its contract."
            )


def _annotation(number: int, box: Mapping[str, Any]) -> Dict[str, Any]:
    width, height = box["bbox"][2:]
    return {
        "id": number,
        "image_id": box["image_id"],
        "category_id": box["category_id"],
        "bbox": box["bbox"],
        "area": box.get("area", width * height),  # of the mask where there is one: COCO's small, medium and large
        "iscrowd": box.get("iscrowd", 0),
        "score": box.get("score", 0.0),
    }


def _mean(precision: np.ndarray) -> Optional[float]:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else None


def _known(value: float) -> Optional[float]:
    return None if value < 0 else float(value)
