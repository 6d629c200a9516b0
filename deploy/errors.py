"""
The exception family of the project, and the one place that turns it into an exit status.

PipelineError
├── ConfigError              a config file or a flag
├── DataError                annotations or images
├── ContractError            a sidecar, or a file that does not match its sidecar
├── CheckpointError          a weights file
├── TrainingError            a training that cannot go on
├── ExportError              checkpoint -> ONNX
├── CalibrationError         float ONNX -> INT8 ONNX
├── EngineBuildError         ONNX -> TensorRT engine
├── MissingDependencyError   a package that is not installed
└── MeasurementError         accuracy, latency, result files

A message says what was found (file, key, value), what was expected and what to do.
"""

from __future__ import annotations

import functools
import sys
from typing import Callable, List, Optional


class PipelineError(Exception):
    """Something that a user can put right."""


class ConfigError(PipelineError):
    """A config file or a flag is missing, unreadable or contradictory."""


class DataError(PipelineError):
    """Annotations are not COCO, or an image cannot be read."""


class ContractError(PipelineError):
    """A sidecar is missing or unreadable, or its file is not the one it describes."""


class CheckpointError(PipelineError):
    """A weights file is unreadable, unsafe or of another model."""


class TrainingError(PipelineError):
    """A training cannot go on."""


class ExportError(PipelineError):
    """A detector cannot be written as ONNX."""


class CalibrationError(PipelineError):
    """A graph cannot be quantised, or its calibration data will not do."""


class EngineBuildError(PipelineError):
    """TensorRT did not build an engine, or the engine is not right."""


class MissingDependencyError(PipelineError):
    """A package is needed that is not installed."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        super().__init__(f"{needed_for} needs the package {package}, which is not installed here. Do: {install}")


class MeasurementError(PipelineError):
    """A measurement cannot be made, or a result file cannot be used."""


def printable(text: str) -> str:
    """`text` as a terminal may show it: what it would obey, such as the start of an escape sequence, is spelled out."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


Main = Callable[[Optional[List[str]]], Optional[int]]


def command(main: Main) -> Callable[..., int]:
    """
    Wraps a command's `main(argv) -> status`: a PipelineError becomes one message on stderr and status 2.

    Anything else is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Optional[List[str]] = None) -> int:
        try:
            return main(argv) or 0
        except PipelineError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
