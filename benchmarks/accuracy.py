"""
Command: COCO accuracy of the very file that ships.

    python -m benchmarks.accuracy student.int8.onnx --data DIR --role onnx-int8 -o int8.accuracy.result.json

The detections are kept beside the result, as `int8.accuracy.detections.json`. A file of COCO results of anybody's
detector is measured in the same way. An ONNX file needs onnx and onnxruntime, an engine TensorRT, a run directory the
training side (in a process of its own); all need faster-coco-eval.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from benchmarks.measuring.bootstrap import ap_of_draws, matches_by_class
from benchmarks.measuring.coco import evaluate_with_curves, words_of_cap
from benchmarks.measuring.detections import CocoResults, detections_path, load_results, write_detections
from benchmarks.measuring.result import check_same_data, read_result, write_result
from benchmarks.measuring.subject import (
    Subject,
    add_arguments,
    begin_result,
    check_fits,
    check_role,
    checked_role,
    load_data,
    load_detections_subject,
    load_subject,
)
from benchmarks.reporting.operating_point import best_f1, comparison, found_scores
from benchmarks.reporting.wording import between_points, points, signed_points
from deploy.commands import run_relayed
from deploy.dataset import CocoImage, CocoSet, coco_document
from deploy.detector import open_session
from deploy.errors import ConfigError, DataError, command
from deploy.files import check_writable
from deploy.images import read_image
from deploy.progress import progress
from deploy.runtime.postprocess import Detections, postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Session

BOOTSTRAP_SEED = 0
BOOTSTRAP_DRAWS = 1000


def detections_from_session(session: Session, data: CocoSet) -> CocoResults:
    """COCO results of every image: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`."""
    results: CocoResults = []
    for image in progress(data.images, len(data.images), "images"):
        prepared = preprocess(read_image(image.path), session.contract)
        batch = np.repeat(prepared.input, session.batch_limits[0], axis=0)
        outputs = session.infer({session.contract.input_name: batch})
        results += coco_from_detections(
            postprocess(outputs, session.contract, prepared, image=image.path), image, session.contract.category_ids
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
        run_relayed("crosskd.predict", *words, *(["--limit", str(limit)] if limit is not None else []))
        return load_results(output)


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
    by_name = {category["name"]: one for category, one in zip(categories, matches)}
    aps = ap_of_draws(matches, len(image_ids), BOOTSTRAP_DRAWS, BOOTSTRAP_SEED)
    return {
        **numbers,
        "best_f1": best_f1(matches),
        "best_f1_per_class": {name: best_f1([one]) for name, one in by_name.items()},
        "found_scores": {name: found_scores(one) for name, one in by_name.items()},
        "pr_curves": curves,
        "bootstrap": {
            "seed": BOOTSTRAP_SEED,
            "ap": [None if np.isnan(ap) else round(float(ap), 6) for ap in aps],
        },
        "against": None,
    }


def _detect(subject: Subject, data: CocoSet, limit: Optional[int]) -> CocoResults:
    if subject.format == "detections":
        return load_results(subject.path)
    if subject.is_run_dir:
        return detections_from_run_dir(subject.path, data, limit)
    with open_session(subject.path, runtime=subject.runtime) as session:
        check_fits(session.contract, data, subject)
        return detections_from_session(session, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Measure the COCO accuracy of a model file, or of a JSON file of COCO results.",
    )
    add_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images (default: all)")
    parser.add_argument(
        "--against",
        metavar="RESULT",
        help="an accuracy result of another model, such as the teacher's, to compare with",
    )
    return parser


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, writes the detections and the result file, and prints the numbers in points."""
    arguments = _parser().parse_args(argv)
    inputs_given = [arguments.annotations, arguments.against]
    role = checked_role(arguments.model, arguments.role, arguments.output, inputs_given)
    check_writable(detections_path(arguments.output))
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; expected at least 1")
    is_json = Path(arguments.model).suffix == ".json"
    if is_json and arguments.limit is not None:
        raise ConfigError("--limit does not go with a file of results: all of its images are measured")
    if is_json and Path(arguments.model).resolve() == detections_path(arguments.output).resolve():
        raise ConfigError(f"{arguments.model} would be written over; choose another --output")
    if is_json and arguments.runtime is not None:
        raise ConfigError("--runtime does not go with a file of results: nothing is run")
    subject = load_detections_subject(arguments.model) if is_json else load_subject(arguments.model, arguments.runtime)
    check_role(role, subject)
    data = load_data(arguments, check_files=not is_json, by_class=True)
    data = dataclasses.replace(data, images=data.images[: arguments.limit])
    if not data.images:
        raise DataError(f"{data.annotations_path} names no images; expected at least one")
    if data.clipped:
        print(f"{data.clipped} boxes stick out of their image: counted as annotated, as pycocotools does")
    if words_of_cap(data):
        print(words_of_cap(data))
    result = begin_result("accuracy", subject, data, role, len(data.images))
    inputs = subject.inputs(data)
    other = None
    if arguments.against is not None:  # read before long work
        other = read_result(arguments.against)
        if other["kind"] != "accuracy":
            raise ConfigError(f"--against {arguments.against} is a {other['kind']} result; expected an accuracy result")
        check_same_data([(arguments.against, other), (arguments.output, result)])
        inputs["against"] = Path(arguments.against)
    detections = _detect(subject, data, arguments.limit)
    annotations = coco_document(data, as_annotated=True)
    numbers = numbers_from_detections(annotations, detections, [image.image_id for image in data.images])
    if other is not None:
        numbers["against"] = {"role": other["role"], **comparison(numbers, other["numbers"])}
    result["numbers"] = numbers
    result["detections"] = write_detections(arguments.output, detections)
    write_result(arguments.output, result, inputs)
    print(f"{role}, {len(data.images)} images: " + ", ".join(lines_from_numbers(numbers)))
    return 0


def lines_from_numbers(numbers: Dict[str, Any]) -> List[str]:
    """What the command prints, in points."""
    shown = ((name, value) for name, value in numbers.items() if name.startswith("AP") and value is not None)
    lines = [f"{name} {points(value)}" for name, value in shown]
    best, against = numbers["best_f1"], numbers["against"]
    if best is not None:
        lines.append(
            f"best F1 {best['f1']:.3f} at score {best['score']:.3f} "
            f"(precision {best['precision']:.3f}, recall {best['recall']:.3f})"
        )
    if against is not None:
        between = between_points(against["low"], against["high"])
        lines.append(f"AP {signed_points(against['AP_difference'])} ({between}) against {against['role']}")
        if against["lost"] is not None:
            lines.append(f"{against['lost']} boxes lost and {against['gained']} gained against it")
    return lines


if __name__ == "__main__":
    sys.exit(main())
