"""
Commands under conditions that nobody wishes for: a full disk, signals, an output that nobody reads, two at once.

Each command has run undisturbed before, so that it has something to lose: what was there must still be there, or be
replaced by a whole one, and nothing else may be left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from deploy.commands import ERROR
from tests.faults.fuzz import ROOT
from tests.faults.inputs import in_folder

OUT = "made"
COMMANDS: Dict[str, Tuple[str, ...]] = {
    "calibration.quantize": ("m.onnx", "--data", "data", "--num-images", "2", "-o", f"{OUT}/q.onnx"),
    "benchmarks.report": ("results/teacher.accuracy.result.json", "-o", f"{OUT}/r.html"),
    "deploy.bundle": ("m.onnx", "-o", f"{OUT}/b.tar.gz"),
    "deploy.adopt_onnx": ("yolov8.onnx", "--contract", "yolov8.contract.json", "-o", f"{OUT}/a.onnx"),
    "benchmarks.accuracy": ("m.onnx", "--data", "data", "--split", "val", "-o", f"{OUT}/a.result.json"),
    "benchmarks.latency": (
        "m.onnx", "--data", "data", "--split", "val", "--runs", "10", "--max-warmup-s", "0.1",
        "-o", f"{OUT}/l.result.json",
    ),
    "deploy.detect": ("m.onnx", "pictures/colour.png", "pictures/grey.png", "-o", f"{OUT}/seen"),
    "crosskd.check_data": ("data", "--write", f"{OUT}/clean"),
    "crosskd.shapes": (f"{OUT}/shapes", "--images", "12", "--size", "64"),
    "calibration.statistics": ("s.npz",),
    "calibration.audit": ("m.int8.onnx",),
    "deploy.doctor": (),
}  # fmt: skip
"""Command -> its arguments, in the bench of `tests.faults.inputs`."""
TRAINING: Dict[str, Tuple[str, ...]] = {
    "crosskd.train": ("job.py", "--data", "data", "-o", f"{OUT}/run"),
    "deploy.export": ("undisturbed/student", "-o", f"{OUT}/s.onnx"),
}
"""The same, in the folder of `tests.faults.kills`."""
NEW_OUTPUT = ("crosskd.check_data", "crosskd.shapes", "crosskd.train", "deploy.adopt_onnx")
"""Commands whose output is not to be there before."""
LOCKED = ("crosskd.train",)
"""Of two of these one is refused."""
FILE_LIMITS = (200, 40_000)
"""Bytes that a file may have."""
PATIENCE_S = 300.0


def writes(words: Sequence[str]) -> bool:
    """Whether a command with these arguments writes a file."""
    return any(word.startswith(f"{OUT}/") for word in words)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A command under a condition, and what was wrong with its end."""

    condition: str
    command: str
    status: Optional[int]
    fault: str


def _start(module: str, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULTS_TOKEN": token()}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **options}
    return subprocess.Popen([sys.executable, "-m", module, *words], **given)


def token() -> str:
    """In the environment of all that these trials start."""
    return f"faults-{os.getpid()}"


def still_running() -> List[int]:
    """The processes that a trial has left behind."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if f"FAULTS_TOKEN={token()}".encode() in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
    return found


def contents(folder: Path) -> Dict[str, bytes]:
    """Name -> bytes of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fault_of_end(before: Dict[str, bytes], status: int, output: bytes, errors: bytes, statuses: Sequence[int]) -> str:
    """What is wrong with how a command ended, and with what it left in OUT."""
    said = errors.decode("utf-8", "replace")
    if "Traceback" in said or status == 3:
        return f"a traceback: {said[-600:]}"
    if status not in statuses:
        return f"status {status}, expected one of {list(statuses)}: {said[-300:]}"
    if status == 2 and sum(line.startswith(ERROR) for line in said.splitlines()) != 1:
        return f"not one message: {said[-600:]!r}"
    now = contents(Path(OUT))
    lost = [name for name in before if name not in now or not now[name]]
    if lost:
        return f"{lost[0]} is lost"
    left = [name for name in now if ".unfinished-" in name or Path(name).name == ".lock"]
    if left:
        return f"{left[0]} is left behind"
    if status != 0 and b"the work is done, but its output is lost" not in errors:
        changed = [name for name in now if name not in before]
        if changed and not all(name.startswith(("run/", "seen/")) for name in changed):  # logs; pictures one by one
            return f"{changed[0]} is there after a failure"
    time.sleep(0.05)
    running = still_running()
    return f"a process is left running: {running}" if running else ""


_made: Dict[str, Dict[str, bytes]] = {}


@contextlib.contextmanager
def sound_output(module: str, words: Sequence[str]) -> Iterator[Dict[str, bytes]]:
    """OUT with what an undisturbed run writes, or empty where it is not to be there before; yields its content."""
    shutil.rmtree(OUT, ignore_errors=True)
    Path(OUT).mkdir()
    if module not in NEW_OUTPUT:
        if module not in _made:
            process = _start(module, words)
            _, errors = process.communicate(timeout=PATIENCE_S)
            if process.returncode not in (0, 1):
                raise RuntimeError(f"{module} fails undisturbed: {errors.decode(errors='replace')[-2000:]}")
            _made[module] = contents(Path(OUT))
        for name, content in _made[module].items():
            path = Path(OUT) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    yield contents(Path(OUT))


def _limit_files(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def full_disks(commands: Dict[str, Tuple[str, ...]]) -> Iterator[Trial]:
    """Files that cannot grow beyond a limit: what a full disk does to a write."""
    for module, words in commands.items():
        if not writes(words):
            continue
        for size in FILE_LIMITS:
            with sound_output(module, words) as before:
                process = _start(module, words, preexec_fn=_limit_files(size))
                output, errors = process.communicate(timeout=PATIENCE_S)
                yield Trial(
                    f"files of at most {size} bytes", module, process.returncode,
                    fault_of_end(before, process.returncode, output, errors, (0, 1, 2)),
                )  # fmt: skip


def full_tmpfs(commands: Dict[str, Tuple[str, ...]]) -> Iterator[Trial]:
    """A file system of 64 KiB, where this user may mount one."""
    shutil.rmtree(OUT, ignore_errors=True)
    Path(OUT).mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", OUT], capture_output=True, check=False)
    if mounted.returncode != 0:
        return
    try:
        for module, words in commands.items():
            if writes(words):
                for path in Path(OUT).iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                Path(f"{OUT}/filling").write_bytes(bytes(40_000))
                process = _start(module, words)
                output, errors = process.communicate(timeout=PATIENCE_S)
                yield Trial(
                    "a tmpfs of 64 KiB", module, process.returncode,
                    fault_of_end({"filling": b"x"}, process.returncode, output, errors, (0, 1, 2)),
                )  # fmt: skip
    finally:
        subprocess.run(["umount", OUT], check=False)


def signals(commands: Dict[str, Tuple[str, ...]], rng: random.Random, each: int) -> Iterator[Trial]:
    """SIGTERM, SIGHUP and SIGINT at any time."""
    for module, words in commands.items():
        for _ in range(each):
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                with sound_output(module, words) as before:
                    process = _start(module, words)
                    time.sleep(rng.uniform(0.4, 4))
                    process.send_signal(number)
                    output, errors = process.communicate(timeout=PATIENCE_S)
                    status = process.returncode
                    # Before its main has begun, Python's own handling holds: ended by the signal.
                    expected = (0, 1, 128 + number, -number)
                    early = number == signal.SIGINT and status in (1, 130, -2) and b"KeyboardInterrupt" in errors
                    fault = "" if early else fault_of_end(before, status, output, errors, expected)
                    yield Trial(number.name, module, status, fault)


def outputs(commands: Dict[str, Tuple[str, ...]]) -> Iterator[Trial]:
    """Standard output that nobody reads, that is closed, or that is on a full disk."""
    for module, words in commands.items():
        for condition in ("a reader that has gone", "closed", "/dev/full"):
            with sound_output(module, words) as before, contextlib.ExitStack() as stack:
                options: Dict[str, Any] = {}
                if condition == "/dev/full":
                    options["stdout"] = stack.enter_context(open("/dev/full", "wb"))
                elif condition == "closed":
                    options = {"stdout": None, "preexec_fn": lambda: os.close(1)}
                process = _start(module, words, **options)
                if condition == "a reader that has gone":
                    assert process.stdout is not None
                    process.stdout.close()
                assert process.stderr is not None
                errors = process.stderr.read()
                status = process.wait(PATIENCE_S)
                expected = (0, 1, 2) if condition == "/dev/full" else (0, 1)
                yield Trial(f"stdout: {condition}", module, status, fault_of_end(before, status, b"", errors, expected))


def devices(commands: Dict[str, Tuple[str, ...]]) -> Iterator[Trial]:
    """Outputs that are /dev/null, a pipe or a folder: refused, and still there."""
    for module, words in commands.items():
        if not writes(words):
            continue
        place = next(index for index, word in enumerate(words) if word.startswith(f"{OUT}/"))
        for what in ("device", "pipe"):
            shutil.rmtree(OUT, ignore_errors=True)
            Path(OUT).mkdir()
            target = Path(words[place])
            if what == "device":
                target.symlink_to("/dev/null")
            else:
                os.mkfifo(target)
            process = _start(module, [*words[:place], str(target), *words[place + 1 :]])
            output, errors = process.communicate(timeout=PATIENCE_S)
            fault = fault_of_end({}, process.returncode, output, errors, (2,))
            if not fault and not (target.is_char_device() if what == "device" else target.is_fifo()):
                fault = f"the {what} is replaced"
            yield Trial(f"-o is a {what}", module, process.returncode, fault)


def two_at_once(commands: Dict[str, Tuple[str, ...]]) -> Iterator[Trial]:
    """The same command twice at the same time, with the same output."""
    for module, words in commands.items():
        with sound_output(module, words) as before:
            both = [_start(module, words) for _ in range(2)]
            ends = [(*process.communicate(timeout=PATIENCE_S), process.returncode) for process in both]
            statuses = sorted(status for _, _, status in ends)
            fault = ""
            for output, errors, status in ends:
                fault = fault or fault_of_end(
                    before if status == 0 else contents(Path(OUT)), status, output, errors, (0, 1, 2)
                )
            if not fault and statuses not in (([0, 2],) if module in LOCKED else ([0, 0], [0, 2], [1, 1])):
                fault = f"they ended with {statuses}"
            yield Trial("two at once", module, statuses[0], fault)


def trials(folder: Path, commands: Dict[str, Tuple[str, ...]], seed: int, signals_each: int) -> List[Trial]:
    """All of them, in a folder in which the commands find what they read."""
    with in_folder(folder):
        found = [
            *full_disks(commands), *full_tmpfs(commands), *outputs(commands), *devices(commands),
            *two_at_once(commands), *signals(commands, random.Random(seed), signals_each),
        ]  # fmt: skip
        shutil.rmtree(OUT, ignore_errors=True)
    return found
