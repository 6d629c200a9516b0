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
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import traceback
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional, TextIO

from deploy.machine import VENV, is_externally_managed

PARENT_VARIABLE = "CROSSKD_PARENT"
"""In the environment of a command that a command of ours started: the starter's process id."""
MOST_LETTERS, MOST_LINES = 4000, 20
"""Of a message: letters of a line, lines."""
NOT_ASCII = re.compile(r"[^\n\x20-\x7e]")
"""What may have to be spelled out."""
OF_BARS = re.compile(r"(^\r|\t|\x1b\[K|\x1b\[(?:[0145]|3[0-7])?(?:;(?:[0145]|3[0-7]))*m)")
"""What progress bars and loggers tell a terminal: to begin the line anew, to end it here, colours."""
FAULTS_OF_STORAGE = {
    errno.ENOSPC: "Is the disk full? Free some space, or choose another.",
    errno.EDQUOT: "Your share of the disk is full: free some space, or choose another.",
    errno.EFBIG: "Is the disk full? Free some space, choose another, or raise the limit of a file (`ulimit -f`).",
    errno.EIO: "The disk or the network drive fails; see the system's log (dmesg).",
}
"""What a disk does to any file -> what to do."""
FAULTS_OF_PATHS = {
    errno.EACCES: "Give a path that you may use, or change its permissions.",
    errno.EPERM: "Give a path that you may use, or change its permissions.",
    errno.EROFS: "Give a path on a disk that can be written.",
    errno.ENOENT: "Give a path that exists; if it did, something else has removed it meanwhile.",
    errno.ENOTDIR: "A part of this path is no folder; give another.",
    errno.EISDIR: "Expected a file, and it is a folder; give another path.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ELOOP: "Its links lead in a circle; give another path.",
    errno.ENOTEMPTY: "It is there and not empty; another process may have made it meanwhile. Give a new folder.",
    errno.EEXIST: "It is there already; another process may have made it meanwhile. Give another path.",
    errno.ESTALE: "The network drive has lost it; mount it anew.",
    errno.EMFILE: "Too many files are open; raise the limit (`ulimit -n`).",
    errno.ENFILE: "Too many files are open on this machine; end other programs.",
}
"""What can be wrong with a path that somebody gave -> what to do."""


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


class Ended(KeyboardInterrupt):
    """A signal that ends this process as Ctrl-C does: what is half made is put away on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def printable(text: str) -> str:
    """`text` as a terminal may show it: what it would obey, such as the start of an escape sequence, is spelled out."""
    return NOT_ASCII.sub(lambda letter: letter[0] if letter[0].isprintable() else _spelled_out(letter[0]), text)


def _spelled_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def one_line(text: object, most: Optional[int] = 500) -> str:
    """
    What somebody else wrote, such as a board or a file, as one line: a space for each character that does not show.

    Args:
        most: letters; the rest is cut off. None: all.
    """
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:most])


class _Output:
    """
    A standard stream whose reader may go away, or whose disk may be full, while the work goes on.

    Names and texts of files that are printed cannot make a terminal do anything.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fault: Optional[OSError] = None

    def write(self, text: str) -> int:
        parts = OF_BARS.split(text)  # what it splits by is at odd places
        parts[::2] = map(printable, parts[::2])
        self._attempt(lambda: self._stream.write("".join(parts)))
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


def is_first_process() -> bool:
    """Whether this process is the first of those that torchrun started together, or the only one: it writes."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


def _was_started_by_a_command() -> bool:
    """Whether the process that started this one is a command of ours, which says itself how it ends."""
    return os.environ.get(PARENT_VARIABLE) == str(os.getppid())


def _end_with_parent() -> None:
    """Asks Linux to end this process when the command that started it is killed and cannot do so itself."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of linux/prctl.h
        if not _was_started_by_a_command():  # it had been killed before
            raise Ended(signal.SIGTERM)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """
    SIGTERM and SIGHUP raise `Ended` in the block. What is ignored (nohup) or handled already stays so.

    Not so in those that torchrun started besides the first: they write nothing, and wait for the others in code that
    hears no signals from Python.
    """

    def end(number: int, _frame: Optional[FrameType]) -> None:
        raise Ended(number)

    before = {}
    if threading.current_thread() is threading.main_thread() and is_first_process():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption:
    """
    Notes Ctrl-C, SIGTERM and SIGHUP in its block in place of raising them, so that work can end where it is whole.

    What is ignored (nohup) stays so. Outside of the main thread, which alone hears signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.number: Optional[int] = None
        """The last signal that came, or None."""
        self._before: Dict[int, Any] = {}

    def check(self) -> None:
        """Raises Ended if a signal came."""
        if self.number is not None:
            raise Ended(self.number)

    def __enter__(self) -> Interruption:
        def note(number: int, _frame: Optional[FrameType]) -> None:
            self.number = number

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


Main = Callable[[Optional[List[str]]], Optional[int]]


def command(main: Main) -> Callable[..., int]:
    """
    Wraps a command's `main(argv) -> status`: a PipelineError becomes one message on stderr and status 2.

    So does a disk that is full, and a path that is not there or not allowed. Anything else is a bug of ours: it keeps
    its traceback, and the status is 3. Status 1 is a verdict alone. Ctrl-C, SIGTERM and SIGHUP end it with 128 + the
    signal's number, after what is half made has been put away. Where nobody reads the output any longer (`| head`) the
    work goes on; output that a full disk loses is status 2.
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
        with _ended_by_signals():
            if _was_started_by_a_command():
                _end_with_parent()
            return main(argv) or 0
    except PipelineError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        if is_first_process() and not _was_started_by_a_command():  # said once
            print("interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except Exception as error:
        message = _message_of_system(error)
        if message is not None:
            _tell(message)
            return 2
        traceback.print_exc()
        print("error: this is a fault of the program, not of its input; please report it", file=sys.stderr)
        return 3


def _tell(message: str) -> None:
    """Prints an error's message; where it quotes more than a line of some file, only the beginning."""
    lines = [line if len(line) <= MOST_LETTERS else f"{line[:MOST_LETTERS]}..." for line in message.split("\n")]
    more = [f"... and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
    print(f"error: {printable(chr(10).join([*lines[:MOST_LINES], *more]))}", file=sys.stderr)


def fault_of_storage(error: Optional[BaseException]) -> Optional[str]:
    """What a disk refused and what to do, if `error` comes from that: torch makes a RuntimeError of it. Else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAULTS_OF_STORAGE:
            return f"{error.strerror}. {FAULTS_OF_STORAGE[error.errno]}"
        error = error.__cause__ or error.__context__
    return None


def _message_of_system(error: Exception) -> Optional[str]:
    """The message for what the system refused of a user's file or disk; None where the program is at fault."""
    fault = fault_of_storage(error)
    if fault is not None:
        return f"cannot write: {fault}"
    if isinstance(error, FileNotFoundError) and not error.filename and not _has_temporary_folder():
        return "no folder for temporary files can be written. Free some space, or set TMPDIR to a folder that can be"
    if not isinstance(error, OSError) or error.errno not in FAULTS_OF_PATHS or not error.filename:
        return None
    if os.path.realpath(error.filename).startswith(tuple(sysconfig.get_paths().values())):
        return None  # a file of Python or of a package
    path = os.fsdecode(error.filename2 or error.filename)  # of two, where something should have been moved to
    return f"{path}: {error.strerror}. {FAULTS_OF_PATHS[error.errno]}"


def _has_temporary_folder() -> bool:
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return False
    return True
