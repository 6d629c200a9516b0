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

from benchmarks.measuring.detections import CocoResults, detections_path, load_results, replacing_detections
from benchmarks.measuring.result import check_same_data, read_result, write_result
from benchmarks.measuring.subject import (
    SPLIT,
    Subject,
    add_arguments,
    begin_result,
    check_fits,
    check_role,
    checked_role,
    load_detections_subject,
    load_subject,
    load_test_set,
)
from benchmarks.reporting.accuracy_numbers import numbers_from_detections
from benchmarks.reporting.operating_point import comparison
from benchmarks.reporting.wording import between_points, points, signed_points
from deploy.commands import run_relayed
from deploy.data_arguments import SetOptions, set_options
from deploy.dataset import CocoImage, CocoSet, check_pictures, coco_document
from deploy.errors import ConfigError, DataError, command
from deploy.files import check_writable
from deploy.images import read_image
from deploy.progress import progress
from deploy.runtime.postprocess import Detections, postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Session, open_session


@dataclasses.dataclass(frozen=True)
class AccuracyOptions:
    """
    What is measured, and what it is compared with.

    Raises:
        ConfigError: an option does not go with the model, or is out of range.
    """

    model: str
    """An ONNX file, an engine, a run directory, or COCO results of any detector (.json)."""
    data: SetOptions
    """The images."""
    output: str
    """The result file."""
    role: str
    """What the model is in the report."""
    runtime: Optional[str] = None
    """What runs it, as `deploy.targets.target_from_path` takes it."""
    limit: Optional[int] = None
    """Only so many images; None: all."""
    against: Optional[str] = None
    """An accuracy result of another model, on the same images."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; expected at least 1")
        if not self.is_of_detections:
            return
        if self.limit is not None:
            raise ConfigError("--limit does not go with a file of results: all of its images are measured")
        if Path(self.model).resolve() == detections_path(self.output).resolve():
            raise ConfigError(f"{self.model} would be written over; choose another --output")
        if self.runtime is not None:
            raise ConfigError("--runtime does not go with a file of results: nothing is run")

    @property
    def is_of_detections(self) -> bool:
        """Whether the model is not here, only what it detected."""
        return Path(self.model).suffix == ".json"


def detections_from_session(session: Session, data: CocoSet) -> CocoResults:
    """COCO results of every image: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`."""
    results: CocoResults = []
    for image in progress(data.images, len(data.images), "images"):
        try:
            pixels = read_image(image.path)
        except DataError:
            check_pictures(data.images)  # names all that are damaged, not one a time
            raise
        prepared = preprocess(pixels, session.contract)
        batch = np.repeat(prepared.input, session.batch_limits[0], axis=0)
        outputs = session.infer({session.contract.input_name: batch})
        results += coco_from_detections(
            postprocess(outputs, session.contract, prepared, image=image.path), image, session.contract.category_ids
        )
    return results


def coco_from_detections(detections: Detections, image: CocoImage, category_ids: Sequence[int]) -> CocoResults:
    """The detections of one image as COCO results."""
    return [
        {"image_id": image.image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in detections.rows()
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


def options_from_arguments(arguments: argparse.Namespace) -> AccuracyOptions:
    """
    The options that the flags give.

    Raises:
        ConfigError: the flags do not go together. PipelineError: the result cannot be written.
    """
    return AccuracyOptions(
        model=arguments.model,
        data=set_options(arguments, SPLIT),
        output=arguments.output,
        role=checked_role(
            arguments.model, arguments.role, arguments.output, [arguments.annotations, arguments.against]
        ),
        runtime=arguments.runtime,
        limit=arguments.limit,
        against=arguments.against,
    )


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, writes the detections and the result file, and prints the numbers in points."""
    options = options_from_arguments(_parser().parse_args(argv))
    check_writable(detections_path(options.output))
    detected = options.is_of_detections
    subject = load_detections_subject(options.model) if detected else load_subject(options.model, options.runtime)
    check_role(options.role, subject)
    data = load_test_set(options.data, options.limit, check_files=not options.is_of_detections)
    result = begin_result("accuracy", subject, data, options.role, len(data.images))
    inputs = subject.inputs(data)
    other = None
    if options.against is not None:  # read before long work
        other = _result_to_compare(options.against, options.output, result)
        inputs["against"] = Path(options.against)
    detections = _detect(subject, data, options.limit)
    annotations = coco_document(data, as_annotated=True)
    numbers = numbers_from_detections(annotations, detections, [image.image_id for image in data.images])
    if other is not None:
        numbers["against"] = {"role": other["role"], **comparison(numbers, other["numbers"])}
    result["numbers"] = numbers
    with replacing_detections(options.output, detections) as result["detections"]:
        write_result(options.output, result, inputs)
    print(f"{options.role}, {len(data.images)} images: " + ", ".join(lines_from_numbers(numbers)))
    return 0


def _result_to_compare(path: str, output: str, result: Dict[str, Any]) -> Dict[str, Any]:
    """The accuracy result at `path`, of the same data as `result`, which is to be written to `output`."""
    other = read_result(path)
    if other["kind"] != "accuracy":
        raise ConfigError(f"--against {path} is a {other['kind']} result; expected an accuracy result")
    check_same_data([(path, other), (output, result)])
    return other


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
