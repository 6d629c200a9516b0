"""
Command: COCO accuracy of the very file that ships.

    python -m benchmarks.accuracy student.int8.onnx --data DIR --role onnx-int8 -o int8.accuracy.result.json

An ONNX file needs onnx and onnxruntime, an engine TensorRT, a run directory the training side (in a process of its
own); all need faster-coco-eval.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from benchmarks.coco import evaluate
from benchmarks.result import write_result
from benchmarks.subject import (
    Subject,
    add_arguments,
    begin_result,
    check_arguments,
    check_fits,
    load_data,
    load_subject,
    run_crosskd,
    spread,
)
from deploy.dataset import CocoImage, CocoSet, read_image
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import read_json
from deploy.postprocess import Detections, postprocess
from deploy.preprocess import preprocess
from deploy.progress import progress
from deploy.session import Session, open_session

CocoResults = List[Dict[str, Any]]
SAMPLE_IMAGES = 12
SAMPLE_SCORE = 0.05
SAMPLE_BOXES = 50


def detections_from_session(session: Session, data: CocoSet) -> CocoResults:
    """COCO results of every image: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`."""
    results: CocoResults = []
    for image in progress(data.images, len(data.images), "images"):
        prepared = preprocess(read_image(image.path), session.contract)
        outputs = session.infer({session.contract.input_name: prepared.input})
        results += coco_from_detections(
            postprocess(outputs, session.contract, prepared), image, session.contract.category_ids
        )
    return results


def coco_from_detections(detections: Detections, image: CocoImage, category_ids: Sequence[int]) -> CocoResults:
    """The detections of one image as COCO results."""
    boxes_xywh = detections.boxes_xyxy.astype(float)
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    rows = zip(boxes_xywh.tolist(), detections.scores.tolist(), detections.labels.tolist())
    return [
        {"image_id": image.image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in rows
    ]


def detections_from_run_dir(run_dir: Path, data: CocoSet, limit: Optional[int]) -> CocoResults:
    """
    COCO results of a run directory, by the training side's own command.

    Raises:
        MeasurementError: the command failed, or wrote something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "detections.json"
        words = [str(run_dir), "--annotations", str(data.annotations_path), "--images-dir", str(data.images_dir)]
        words += ["-o", str(output)]
        run_crosskd("crosskd.predict", words + (["--limit", str(limit)] if limit is not None else []))
        results = read_json(output, MeasurementError, "the COCO results of crosskd.predict")
    if not isinstance(results, list):
        raise MeasurementError(f"crosskd.predict wrote a {type(results).__name__}; expected a list of COCO results")
    return results


def samples_from_results(results: CocoResults, data: CocoSet) -> List[Dict[str, Any]]:
    """A few images with their annotated and their detected boxes (x1 y1 x2 y2 in pixels), for the report."""
    label_of = {category: label for label, category in enumerate(data.category_ids)}
    return [
        _sample(image, image.path.relative_to(data.images_dir).as_posix(), results, label_of)
        for image in spread(data.images, SAMPLE_IMAGES)
    ]


def _sample(image: CocoImage, file_name: str, results: CocoResults, label_of: Dict[int, int]) -> Dict[str, Any]:
    found = [box for box in results if box["image_id"] == image.image_id and box["score"] >= SAMPLE_SCORE]
    best = sorted(found, key=lambda box: -box["score"])[:SAMPLE_BOXES]
    return {
        "file_name": file_name,
        "width_px": image.width_px,
        "height_px": image.height_px,
        "annotated": [
            {"box_xyxy": [round(value, 1) for value in box], "label": label}
            for box, label in zip(image.boxes_xyxy.tolist(), image.labels.tolist())
        ],
        "detected": [
            {
                "box_xyxy": [round(value, 1) for value in (x, y, x + width, y + height)],
                "label": label_of[box["category_id"]],
                "score": round(box["score"], 4),
            }
            for box in best
            for x, y, width, height in [box["bbox"]]
        ],
    }


def _detect(subject: Subject, data: CocoSet, limit: Optional[int]) -> CocoResults:
    if subject.is_run_dir:
        return detections_from_run_dir(subject.path, data, limit)
    with open_session(subject.path) as session:
        check_fits(session.contract, data, subject)
        return detections_from_session(session, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description="Measure the COCO accuracy of a model file."
    )
    add_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images (default: all)")
    return parser


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, writes the result file and prints the numbers in points."""
    arguments = _parser().parse_args(argv)
    role = check_arguments(arguments)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; expected at least 1")
    subject = load_subject(arguments.model)
    data = load_data(arguments, check_files=True)
    data = dataclasses.replace(data, images=data.images[: arguments.limit])
    if data.clipped:
        print(f"{data.clipped} boxes stick out of their image: counted as annotated, as pycocotools does")
    result = begin_result("accuracy", subject, data, role, len(data.images))
    detections = _detect(subject, data, arguments.limit)
    annotations = read_json(data.annotations_path, MeasurementError, "COCO annotations")
    result["numbers"] = evaluate(annotations, detections, [image.image_id for image in data.images])
    result["samples"] = samples_from_results(detections, data)
    write_result(arguments.output, result, subject.inputs(data))
    shown = ((name, value) for name, value in result["numbers"].items() if name.startswith("AP") and value is not None)
    print(f"{role}, {len(data.images)} images: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
