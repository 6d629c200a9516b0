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

import contextlib
import errno
import functools
import os
import sys
import traceback
from typing import Any, Callable, Iterator, List, Optional, TextIO

from deploy.machine import VENV, is_externally_managed


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
        first = f"{VENV} (this Python belongs to the system, PEP 668), then: " if is_externally_managed() else ""
        super().__init__(f"{needed_for} needs the package {package}, which is not installed here. Do: {first}{install}")


class MeasurementError(PipelineError):
    """A measurement cannot be made, or a result file cannot be used."""


def printable(text: str) -> str:
    """`text` as a terminal may show it: what it would obey, such as the start of an escape sequence, is spelled out."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


class _Output:
    """A standard stream whose reader may go away, or whose disk may be full, while the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fault: Optional[OSError] = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except OSError as error:
            self.fault = self.fault or error
            with contextlib.suppress(OSError, ValueError):  # what is still in its buffer goes there
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lasting_output() -> Iterator[_Output]:
    """Standard output and error as `_Output`, which also spell out what their encoding lacks; yields the former."""
    before = sys.stdout, sys.stderr
    # A stream that was closed before the start is None, and the next file that is opened would get its number.
    output, errors = (_Output(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before)  # noqa: SIM115
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


Main = Callable[[Optional[List[str]]], Optional[int]]


def command(main: Main) -> Callable[..., int]:
    """
    Wraps a command's `main(argv) -> status`: a PipelineError becomes one message on stderr and status 2.

    Anything else is a bug of ours: it keeps its traceback, and the status is 3. Status 1 is a verdict alone. Where
    nobody reads the output any longer (`| head`) the work goes on; output that a full disk loses is status 2.
    """

    @functools.wraps(main)
    def run(argv: Optional[List[str]] = None) -> int:
        with _lasting_output() as output:
            status = _status(main, argv)
            output.flush()
            if status == 0 and output.fault is not None and output.fault.errno != errno.EPIPE:
                print(f"error: the work is done, but its output is lost: {output.fault.strerror}", file=sys.stderr)
                return 2
            return status

    return run


def _status(main: Main, argv: Optional[List[str]]) -> int:
    try:
        return main(argv) or 0
    except PipelineError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print("error: this is a fault of the program, not of its input; please report it", file=sys.stderr)
        return 3
