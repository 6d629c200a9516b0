"""
What comes back from a board's `run.py predict`, checked, and the accuracy result that is computed of it here.

Nothing of it is believed: every image must be there once, and every box be one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np

from benchmarks.boards.predict import PREDICTIONS_VERSION
from benchmarks.boards.sending import TestImages
from benchmarks.measuring.detections import CocoResults, replacing_detections
from benchmarks.measuring.result import read_result, write_result
from benchmarks.reporting.accuracy_numbers import numbers_from_detections
from deploy.arrays import arrays_from_npz
from deploy.contract import ModelContract
from deploy.dataset import coco_document
from deploy.errors import MeasurementError, PipelineError
from deploy.files import AnyPath, sha256_of
from deploy.images import read_image
from deploy.pixels import library
from deploy.runtime.preprocess import preprocess
from deploy.schema import Items, Number, Whole, check_content

FAR_PX = 1e9
_HEADER: Dict[Any, Any] = {
    "predictions_version": int, "role": str, "model": {"sha256": str}, "images_sha256": str, "description": str,
    "library": str, "versions": {str: str},
}  # fmt: skip
_IMAGE: Dict[Any, Any] = {"image_id": int, "input_crc32": Whole(0), "boxes": [Items(Number(-FAR_PX, FAR_PX), 6, 6)]}
_END: Dict[Any, Any] = {"images": Whole(0), "environment": dict}
COMPARED = 4
"""Images whose inputs are fetched where they differ."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a board detected."""

    header: Dict[str, Any]
    environment: Dict[str, Any]
    results: CocoResults
    crc32: Dict[int, int]
    """Image id -> of the network's input there."""


def header_from_line(line: bytes, path: AnyPath) -> Dict[str, Any]:
    """The first line of a file of `predict`. Raises MeasurementError if it is none."""
    header = _document(line, path)
    check_content(header, _HEADER, path, MeasurementError, "Run this command again.")
    if header["predictions_version"] != PREDICTIONS_VERSION:
        raise MeasurementError(
            f"{path}: predictions_version is {header['predictions_version']!r:.40}; expected {PREDICTIONS_VERSION}. "
            "Make the bundle again."
        )
    return header


def read_predictions(path: AnyPath, images: TestImages) -> Predictions:
    """
    The content of a file of `predict`, on exactly these images.

    Raises:
        MeasurementError: it is cut, holds something else, or lacks an image.
    """
    results: CocoResults = []
    crc32: Dict[int, int] = {}
    with Path(path).open("rb") as file:
        header = header_from_line(file.readline(), path)
        for line in file:
            document = _document(line, path)
            if "image_id" not in document:
                break
            check_content(document, _IMAGE, path, MeasurementError, "Run this command again.")
            image_id = document["image_id"]
            if image_id in crc32:
                raise MeasurementError(f"{path} has the image {image_id} twice")
            crc32[image_id] = document["input_crc32"]
            for category_id, score, *box in document["boxes"]:
                results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
        else:
            raise MeasurementError(f"{path} is cut: it has no end after {len(crc32)} images")
        check_content(document, _END, path, MeasurementError, "Run this command again.")
        if file.read(1):
            raise MeasurementError(f"{path} goes on behind its end")
    expected = {image.image_id for image in images.image_set.images}
    if set(crc32) != expected or document["images"] != len(expected):
        raise MeasurementError(f"{path} has {len(crc32)} images; expected the {len(expected)} that were sent")
    return Predictions(header, document["environment"], results, crc32)


def _document(line: bytes, path: AnyPath) -> Dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"{path} has a line that is not JSON: it is cut, or something else") from error
    if not isinstance(document, dict):
        raise MeasurementError(f"{path} has a line that is no JSON object")
    return document


def is_current(path: Path, header: Mapping[str, Any], images: TestImages) -> bool:
    """Whether the accuracy result at `path` was computed of the predictions with this header, on the same set."""
    try:
        result = read_result(path)
        kept = result["detections"]
        return (
            result["kind"] == "accuracy"
            and result["data"] == images.image_set.data
            and result["predictions"] == dict(header)
            and sha256_of(path.with_name(kept["file"])) == kept["sha256"]
        )
    except (PipelineError, OSError, KeyError):
        return False


def write_accuracy(path: Path, predictions: Predictions, images: TestImages, preparation: Mapping[str, Any]) -> None:
    """
    Writes the accuracy result of a board's detections, and the detections beside it.

    Raises:
        MeasurementError: a detection is wrong, or no box is annotated.
    """
    image_ids = [image.image_id for image in images.coco.images]
    numbers = numbers_from_detections(coco_document(images.coco, as_annotated=True), predictions.results, image_ids)
    result = {
        "kind": "accuracy",
        "role": predictions.header["role"],
        "model": predictions.header["model"],
        "data": images.image_set.data,
        "environment": predictions.environment,
        "versions": predictions.header["versions"],  # of the board, where it was detected
        "numbers": numbers,
        "predictions": predictions.header,
        "preparation": dict(preparation),
    }
    with replacing_detections(path, predictions.results) as detections:
        write_result(path, {**result, "detections": detections}, {"annotations": images.coco.annotations_path})


# Whether the board prepares images as they are prepared here


def preparation_of(
    predictions: Predictions, differing: Sequence[int], largest_and_mean: Tuple[float, float] = (0.0, 0.0)
) -> Dict[str, Any]:
    """
    The `preparation` of an accuracy result: of how many `images` the network's input is another there, and how far off.

    Args:
        differing: ids of these. largest_and_mean: of `input_differences`, of some of them.
    """
    largest, mean = largest_and_mean
    return {
        "images": len(predictions.crc32),
        "differing": len(differing),
        "largest_difference": largest,
        "mean_difference": mean,
        "library": predictions.header["library"],
        "library_here": library(),
    }


def input_differences(path: AnyPath, images: TestImages, contract: ModelContract) -> Tuple[float, float]:
    """
    (largest, mean) difference of the network's inputs of a file of `prepare` from those made here, in grey levels.

    Raises:
        MeasurementError: it is no such file.
    """
    std = 1.0 if contract.input_type == "uint8" else np.array(contract.std, np.float32)[:, None, None]
    largest, means = 0.0, []
    try:
        for name, there in arrays_from_npz(path).items():
            here = preprocess(read_image(images.paths[int(name)]), contract).input
            if there.shape != here.shape or there.dtype != here.dtype:
                raise ValueError(f"an input is {there.dtype}, {there.shape}; expected {here.dtype}, {here.shape}")
            differences = np.abs((there.astype(np.float32) - here.astype(np.float32)) * std)
            largest = max(largest, float(differences.max()))
            means.append(float(differences.mean()))
    except (OSError, ValueError, KeyError) as error:
        raise MeasurementError(f"what the board prepared cannot be read: {error}") from error
    return round(largest, 3), round(float(np.mean(means or [0.0])), 4)
