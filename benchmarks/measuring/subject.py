"""What is measured on what: the model and the images that `accuracy` and `latency` share."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from benchmarks.measuring.coco import words_of_cap
from benchmarks.measuring.environment import read_environment
from deploy.contract import ModelContract, read_sidecar, weights_of_run
from deploy.data_arguments import SetOptions, add_set_arguments
from deploy.dataset import CocoSet, with_classes
from deploy.errors import ConfigError, DataError, MeasurementError, MissingDependencyError
from deploy.files import check_writable, sha256_of
from deploy.targets import SUFFIXES, TARGETS, Target, add_runtime_argument, target_from_path

SPLIT = "test"
"""Of a data folder, what is measured on."""
TEACHER = "teacher"
TEACHER_FORMS = {
    f"{TEACHER}-{role.name}": f"Teacher, {role.title}" for target in TARGETS.values() for role in target.roles
}
"""Role -> title of the teacher on the runtimes that the student may run on."""
ROLES = {
    TEACHER: "Teacher",
    **TEACHER_FORMS,
    "baseline": "Student without distillation",
    "student": "Distilled student",
    **{role.name: role.title for target in TARGETS.values() for role in target.roles},
}
"""Role -> title, in the order of the report's table. Any other role is allowed and comes after these."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be measured."""

    path: Path
    """What the user named: an ONNX file, an engine or a run directory."""
    weights: Path
    """The file whose hash and size count."""
    format: str
    """'onnx', 'engine', 'torch', or 'detections': COCO results of a detector that is not here."""
    sidecar: Dict[str, Any]
    target: Optional[Target] = None
    """What runs an ONNX file or an engine."""

    @property
    def runtime(self) -> Optional[str]:
        """What runs it, as the result says: a name of TARGETS, 'torch', or None for a detector that is not here."""
        return self.target.name if self.target else "torch" if self.is_run_dir else None

    @property
    def is_run_dir(self) -> bool:
        return self.format == "torch"

    @property
    def takes_threads(self) -> bool:
        """Whether it is told how many threads of the CPU to use."""
        return self.target is None or "threads" in self.target.session_options

    def inputs(self, data: CocoSet) -> Dict[str, Path]:
        """Name -> file, for the provenance of a result."""
        return {"model": self.weights, "annotations": Path(data.annotations_path)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name the model, the images, the role and the output."""
    parser.add_argument(
        "model", metavar="MODEL", help="an .onnx or .engine file, or a run directory of the training side"
    )
    add_set_arguments(parser, SPLIT, "to measure on")
    add_runtime_argument(parser)
    named = [role for role in ROLES if role not in TEACHER_FORMS]
    parser.add_argument("--role", help=f"what the model is in the report: {', '.join(named)}; {TEACHER}-{named[-1]} "
                        "and the like for the teacher in that form; or a name of your own (default: the name of the "
                        "file or run directory)")  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="result file to write: X.result.json")


def load_subject(path: str, runtime: Optional[str] = None) -> Subject:
    """
    The model at `path`, its file compared with its sidecar.

    Args:
        runtime: as `deploy.targets.target_from_path`.

    Raises:
        ConfigError: that runtime does not run the model.
        MeasurementError: it is neither an ONNX file, an engine nor a run directory.
        ContractError: the run directory is not that of a finished run, or the file does not match its sidecar.
    """
    model = Path(path)
    if model.is_dir():
        if runtime is not None:
            raise ConfigError(f"--runtime is {runtime}, but {model} is a run directory, which torch runs: leave it out")
        weights = weights_of_run(model)
        return Subject(model, weights, "torch", read_sidecar(weights))
    if model.suffix not in SUFFIXES:
        raise MeasurementError(f"cannot measure {model}; expected an .onnx file, an .engine file or a run directory")
    target = target_from_path(model, runtime)
    return Subject(model, model, model.suffix[1:], read_sidecar(model), target)


def load_detections_subject(path: str) -> Subject:
    """
    A file of COCO results, anybody's, in place of a model. It needs no sidecar: that it fits is checked box by box.

    Raises:
        MeasurementError: there is no such file.
    """
    model = Path(path)
    if not model.is_file():
        raise MeasurementError(f"no such file: {model}; expected COCO results")
    return Subject(
        model,
        model,
        "detections",
        {"artefact": {"sha256": sha256_of(model)}, "inputs": {}, "command": [], "details": {}},
    )


def load_test_set(options: SetOptions, limit: Optional[int] = None, check_files: bool = True) -> CocoSet:
    """
    The images to measure AP on; says what of them counts otherwise than one may expect.

    Args:
        limit: only so many images; None: all.

    Raises:
        DataError: there are none, or as `SetOptions.load`.
    """
    data = options.load(check_files=check_files, by_class=True)
    data = dataclasses.replace(data, images=data.images[:limit])
    if not data.images:
        raise DataError(f"{data.annotations_path} names no images; expected at least one")
    if data.clipped:
        print(f"{data.clipped} boxes stick out of their image: counted as annotated, as pycocotools does")
    if words_of_cap(data):
        print(words_of_cap(data))
    return data


def check_fits(contract: ModelContract, data: CocoSet, subject: Subject) -> None:
    """Raises MeasurementError if the model has other classes than the annotations, or takes several images at once."""
    try:
        with_classes(data, contract.class_names, contract.category_ids, str(subject.path))
    except DataError as error:
        raise MeasurementError(
            f"{subject.path} and {data.annotations_path} differ in their classes: {error}. Measure on the set that "
            "the model was made for."
        ) from error
    if contract.input_shape[0] not in (1, -1):
        raise MeasurementError(
            f"{subject.path} takes {contract.input_shape[0]} images at once; expected 1, or any number: export it again"
        )


def check_role(role: str, subject: Subject) -> None:
    """Raises ConfigError if `role` is that of a file on another runtime than the one that is to run it."""
    for target in TARGETS.values():
        of_target = role in [prefix + known.name for known in target.roles for prefix in ("", f"{TEACHER}-")]
        if of_target and subject.target not in (None, target) and target.suffix == subject.path.suffix:
            raise ConfigError(
                f"--role is {role}, what runs on {target.title}; {subject.path} is to run on {subject.runtime}: add "
                f"--runtime {target.name}, or give another role"
            )


def data_of_result(data: CocoSet, images: int) -> Dict[str, Any]:
    """The `data` of a result file that is measured on so many images of a set."""
    return {
        "annotations": str(data.annotations_path),
        "annotations_sha256": sha256_of(data.annotations_path),
        "images_dir": str(data.images_dir),
        "images": images,
        "class_names": list(data.class_names),
    }


def begin_result(kind: str, subject: Subject, data: CocoSet, role: str, images: int) -> Dict[str, Any]:
    """
    What a result file says before anything is measured: model, data, environment with the load that others cause.

    Args:
        images: how many images are measured.
    """
    return {
        "kind": kind,
        "role": role,
        "model": {
            "file": str(subject.weights),
            "format": subject.format,
            "runtime": subject.runtime,
            "sha256": subject.sidecar["artefact"]["sha256"],  # compared with the file by `read_sidecar`
            "bytes": subject.weights.stat().st_size,
            "parameters": _parameters(subject),
            "inputs": subject.sidecar["inputs"],
            "command": subject.sidecar["command"],
        },
        "data": data_of_result(data, images),
        "environment": read_environment(),
    }


def checked_role(model: str, role: Optional[str], output: str, inputs: Sequence[Optional[str]]) -> str:
    """
    The role that a result is written for: `role`, or the name of the model's file or run directory.

    The suffix is part of it: `student.onnx` without --role must not pass for the role "student", which is torch's.

    Raises:
        ConfigError: an empty role, or the output is an input. PipelineError: the output cannot be written.
    """
    for given in (model, *inputs):
        if given is not None and Path(given).resolve() == Path(output).resolve():
            raise ConfigError(f"--output is {output}, which would be written over; choose another")
    check_writable(output)
    name = Path(model).resolve().name if role is None else role.strip()
    if not name:
        raise ConfigError("--role is empty; give a name")
    return name


def _parameters(subject: Subject) -> Any:
    if subject.format != "onnx":
        return subject.sidecar["details"].get("parameters")
    try:
        from deploy.graphs.graph import count_parameters, load_onnx
    except ImportError as error:
        raise MissingDependencyError(
            "onnx", f"counting the parameters of {subject.weights}", "pip install onnx"
        ) from error
    return count_parameters(load_onnx(subject.weights))
