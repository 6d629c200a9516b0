"""
Damages inputs in a process of its own, with limits on time and memory, and judges what the readers make of them.

    python -m tests.faults.fuzz BENCH KIND SEED FIRST COUNT

is such a process: it takes inputs FIRST to FIRST + COUNT - 1 of a kind and prints a line of JSON for each. The same
seed, kind and number give the same input, whatever came before.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from deploy.commands import ERROR
from deploy.errors import MOST_LETTERS, MOST_LINES, command
from tests.faults import inputs
from tests.faults.inputs import OUT, Kind

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 10.0
LIMIT_MIB = 4096
IMPORTS_S = 120.0
"""For the first reading of a sound file."""
SHARE_OF_COMMANDS, SHARE_OF_PROCESSES = 0.08, 0.004
"""Of the inputs that also go through a command in this process, and through one in a process of its own."""
OWN_FAULT = 70
"""Exit status where these tests are at fault, and not what they test."""
OWN_ERRORS = os.dup(2)
"""Standard error as it was before it is taken from the libraries."""
VERDICTS = ("benchmarks.report", "benchmarks.fleet")
"""Commands that have a status 1."""
OUT_OF_MEMORY = re.compile(
    r"MemoryError|Unable to allocate|bad_alloc|[Ii]nsufficient memory|can't allocate memory|OutOfMemory"
)


class Judged(NamedTuple):
    """What came of one reading of an input."""

    reader: str
    status: Optional[int]
    """As of a command; None: it was ended."""
    fault: str
    """'traceback', 'hang', 'memory', 'message', 'status', 'writes', or nothing."""
    details: str
    seconds: float


class TooLong(BaseException):
    """The time is over; no handler of the program's own catches it."""


def judge(reader: str, status: Optional[int], output: str, errors: str, seconds: float, verdict: bool) -> Judged:
    """Whether a reading ended as it should: with a result, or with one message and status 2."""

    def judged(fault: str, details: str = "") -> Judged:
        return Judged(reader, status, fault, details, seconds)

    said = f"{output}\n{errors}"
    if OUT_OF_MEMORY.search(said):
        return judged("memory", errors[-600:])
    if "Traceback (most recent call last)" in said or status == 3:
        return judged("traceback", errors[-2000:])
    if seconds > LIMIT_S:
        return judged("hang", f"{seconds:.1f} s")
    if status not in ((0, 1, 2) if verdict else (0, 2)):
        return judged("status", f"{status}: {errors[-600:]}")
    control = next((letter for letter in said if not letter.isprintable() and letter not in "\n\t"), None)
    if control is not None:
        return judged("message", f"it has the control character {control!r}: {said[:600]!r}")
    if "Warning: " in errors:
        return judged("message", f"a warning of Python: {errors[:600]}")
    messages = [line for line in errors.splitlines() if line.startswith(ERROR)]
    if status == 2 and len(messages) != 1 and not errors.startswith("usage: "):
        return judged("message", f"{len(messages)} messages: {errors[-600:]!r}")
    if status == 0 and messages:
        return judged("message", f"status 0 with {messages[0]:.300}")
    last = errors[errors.rfind(f"\n{ERROR}") + 1 :] if status == 2 else ""
    if len(last.splitlines()) > MOST_LINES + 1 or any(len(line) > MOST_LETTERS + 20 for line in last.splitlines()):
        return judged("message", f"too long: {last[:600]!r}")
    return judged("", last[:300])


def read(name: str, reader: Callable[[], Any], verdict: bool, limit_s: float = LIMIT_S) -> Judged:
    """Calls a reader as the main of a command is called."""

    def over(_number: int, _frame: Optional[FrameType]) -> None:
        raise TooLong

    kept, streams = signal.signal(signal.SIGALRM, over), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = output, errors = io.StringIO(), io.StringIO()
    start, status = time.perf_counter(), None
    # Where it hangs in code that hears no signals.
    faulthandler.dump_traceback_later(4 * limit_s, exit=True, file=OWN_ERRORS)
    signal.setitimer(signal.ITIMER_REAL, 1.1 * limit_s)
    try:
        status = command(lambda _argv: reader() or 0)([])
    except SystemExit as end:  # argparse
        status = end.code if isinstance(end.code, int) else 3
    except TooLong:
        traceback.print_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, kept)
        sys.stdout, sys.stderr = streams
    seconds = time.perf_counter() - start
    if status is None:
        return Judged(name, None, "hang", errors.getvalue()[-1000:], seconds)
    return judge(name, status, output.getvalue(), errors.getvalue(), seconds, verdict)


def run_process(words: Sequence[str]) -> Judged:
    """Runs a command on its own, with the limit on memory that this process has."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "COLUMNS": "20"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment, capture_output=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return Judged(f"process {words[0]}", None, "hang", "120 s", 120.0)
    output, errors = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    # To start takes seconds on a machine at work: the time of the reading itself is that of the same command above.
    found = judge(f"process {words[0]}", done.returncode, output, errors, 0.0, words[0] in VERDICTS)
    return found._replace(seconds=time.perf_counter() - start)


def files_of(folder: Path) -> Dict[str, Tuple[int, int, int]]:
    """Name -> what changes when a file is written, of all in a folder but OUT."""
    found, todo = {}, [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in (OUT, "__pycache__"):
                        todo.append(entry.path)
                    continue
                state = entry.stat(follow_symlinks=False)
                found[os.path.relpath(entry.path, folder)] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return found


def peak_mib() -> float:
    """The highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Fuzzer:
    """Takes inputs of one kind, in the bench as the present folder."""

    def __init__(self, kind: Kind, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.before = files_of(Path.cwd())

    def readings(self, index: int) -> Iterator[Judged]:
        """What came of each reading of an input; the bench is afterwards as it was before."""
        kind = self.kind
        rng = random.Random(f"{self.seed}/{kind.name}/{index}")
        name = rng.choice(kind.files)
        damaged = kind.damage(rng, inputs.SOUND[name])
        Path(OUT).mkdir()
        Path(name).write_bytes(damaged)
        touched = {name}
        try:
            touched.update(kind.settle(name) if kind.settle is not None else ())
            ours = {path: files_of(Path(path).parent)[Path(path).name] for path in touched}
            for reader in kind.readers:
                label = reader.__qualname__.replace(".<locals>.read", "").rpartition(".")[2].lstrip("_")
                yield read(label, reader, verdict=False)
            if kind.commands:
                words = rng.choice(kind.commands)
                chance = rng.random()
                if chance < SHARE_OF_COMMANDS:
                    shutil.rmtree(OUT)
                    Path(OUT).mkdir()
                    main = importlib.import_module(words[0]).main
                    yield read(words[0], lambda: main(list(words[1:])), words[0] in VERDICTS)
                if chance < SHARE_OF_PROCESSES and not kind.stand_in:
                    shutil.rmtree(OUT)
                    Path(OUT).mkdir()
                    yield run_process(words)
            yield from self._writings({**self.before, **ours})
        finally:
            shutil.rmtree(OUT)
            for path in touched:
                Path(path).write_bytes(inputs.SOUND[path])
            self.before.update((path, files_of(Path(path).parent)[Path(path).name]) for path in touched)

    def _writings(self, expected: Dict[str, Tuple[int, int, int]]) -> Iterator[Judged]:
        now = files_of(Path.cwd())
        changed = sorted({*now.items()} ^ {*expected.items()})
        if changed:
            yield Judged("all", None, "writes", f"outside of the output: {changed[0][0]}", 0.0)
            for path in {path for path, _ in changed}:
                if path in inputs.SOUND:
                    Path(path).write_bytes(inputs.SOUND[path])
                else:
                    Path(path).unlink()
            self.before = files_of(Path.cwd())
        half = [path for path in Path(OUT).rglob("*") if ".unfinished-" in path.name]
        if half:
            yield Judged("all", None, "writes", f"half written: {half[0]}", 0.0)


def main(words: List[str]) -> None:
    """Takes the inputs that the words ask for."""
    bench, name, seed, first, count = Path(words[0]), words[1], *map(int, words[2:])
    results = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # what libraries write there by themselves
    if "FUZZ_SHOW" not in os.environ:
        os.dup2(quiet, 2)
    os.chdir(bench)
    sys.path.insert(0, str(ROOT))
    inputs.SOUND.update((path, Path(path).read_bytes()) for path in files_of(Path.cwd()))
    kind = next(kind for kind in inputs.kinds() if kind.name == name)
    if kind.stand_in:
        inputs.install_stand_in()
    for category in (RuntimeWarning, UserWarning):
        warnings.simplefilter("always", category)
    sound = []
    for reader in kind.readers:
        for limit_s in (IMPORTS_S, LIMIT_S):  # first it imports what it needs
            Path(OUT).mkdir()
            judged = read("sound", reader, verdict=False, limit_s=limit_s)
            shutil.rmtree(OUT)
        sound.append(judged)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (LIMIT_MIB << 20),) * 2)
    fuzzer = Fuzzer(kind, seed)
    print(json.dumps({"sound": [judged._asdict() for judged in sound]}), file=results, flush=True)
    for index in range(first, first + count):
        print(json.dumps({"begins": index}), file=results, flush=True)
        judged = [one._asdict() for one in fuzzer.readings(index)]
        print(json.dumps({"index": index, "judged": judged, "peak_mib": peak_mib()}), file=results, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        os.write(OWN_ERRORS, traceback.format_exc().encode(errors="replace"))
        os._exit(OWN_FAULT)
