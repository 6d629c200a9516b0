"""
The whole job, killed at events of writing and at any time, and run again: is it as if nothing had happened?

A kill at an event is a SIGKILL just before a file is opened for writing, renamed or removed: `hook/sitecustomize.py`.
It ends the one process that writes, as a lack of memory does, or all, as a lack of power does. What is written in
between is hit by kills at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from tests.faults.fuzz import ROOT
from tests.faults.hook.sitecustomize import kill_all

CONFIG = f"""_base_ = {str(ROOT / "tests/crosskd/configs/crosskd_tiny.py")!r}
model = dict(teacher=dict(config={str(ROOT / "tests/crosskd/configs/gfl_tiny_teacher.py")!r}))
max_epochs = 2
"""
ROLES = ("teacher", "teacher-onnx-fp32", "baseline", "student", "onnx-fp32", "onnx-int8")
SAME = (
    "teacher/detector.pth", "baseline/detector.pth", "student/student.pth", "teacher.onnx", "student.onnx",
    "student.int8.onnx", *(f"results/{role}.accuracy.detections.json" for role in ROLES),
)  # fmt: skip
"""What each run of the same job makes, byte for byte."""
NUMBERS = tuple(name.replace(".detections.json", ".result.json") for name in SAME if name.endswith(".detections.json"))
"""Results whose numbers are the same."""
LONGEST_WAIT_S = 8.0
"""From an event to a kill at any time."""
PATIENCE_S = 1200.0


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill, and what was left."""

    chain: int
    how: str
    """'one at an event', 'all at an event', 'all at any time'."""
    event: int
    """Counted in this run."""
    stage: str
    """The last line of the job that begins with its number, as far as it went."""
    fault: str
    """What it left that it must not, or nothing."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """A job that was killed again and again, and in the end let through."""

    seed: int
    kills: List[Kill]
    fault: str
    """What in the end was not as in a run that nobody disturbed, or nothing."""


class Job:
    """The whole job on drawn images, in a folder of its own."""

    def __init__(self, work: Path, name: str) -> None:
        self.work, self.folder = work, work / name
        self.words = ["-m", "tests.faults.quick_job", "job.py", "--data", "data", "-o", name]

    def run(self, kill_at: int = 0, kills: str = "", after_s: Optional[float] = None) -> Tuple[int, int, str]:
        """
        (status, events of writing, what was printed).

        Args:
            kill_at: the event at which it is killed; 0: at none. kills: "one" or "all".
            after_s: seconds from that event to the kill of all; None: at the event itself.
        """
        counter = self.work / "events"
        counter.unlink(missing_ok=True)
        counter.touch()
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT / 'tests/faults/hook'}:{ROOT}", "OMP_NUM_THREADS": "1",
            "FAULTS_FOLDER": f"{self.folder}{os.sep}", "FAULTS_COUNTER": str(counter), "FAULTS_KILL": kills,
            "FAULTS_KILL_AT": str(kill_at if after_s is None else 0),
        }  # fmt: skip
        environment.pop("FAULTS_ROOT", None)
        with subprocess.Popen(
            [sys.executable, *self.words], cwd=self.work, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            done = threading.Event()
            if after_s is not None:
                threading.Thread(
                    target=_kill_later, args=(process.pid, counter, kill_at, after_s, done), daemon=True
                ).start()
            limit = threading.Timer(PATIENCE_S, kill_all, (process.pid,))
            limit.start()
            output, _ = process.communicate()
            done.set()
            limit.cancel()
        return process.returncode, counter.stat().st_size, output


def _kill_later(root: int, counter: Path, event: int, after_s: float, done: threading.Event) -> None:
    while counter.stat().st_size < event:
        if done.wait(0.02):
            return
    if not done.wait(after_s):
        kill_all(root)


def make_work(work: Path) -> None:
    """The data and the config of the job."""
    work.mkdir(parents=True)
    (work / "job.py").write_text(CONFIG)
    words = [sys.executable, "-m", "crosskd.shapes", "data", "--images", "12", "--size", "64"]
    subprocess.run(words, cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)


def outcome_of(folder: Path) -> Dict[str, str]:
    """Name -> hash of what is the same in each run; "" where there is none."""
    found = {name: _sha256(folder / name) for name in SAME}
    for name in NUMBERS:
        path = folder / name
        numbers = json.loads(path.read_bytes())["numbers"] if path.is_file() else ""
        found[name] = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest() if numbers else ""
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def fault_after_kill(folder: Path, expected: Dict[str, str]) -> str:
    """What lies in the folder of a killed job and is neither whole nor missing."""
    for name, found in outcome_of(folder).items():
        if found and found != expected[name]:
            return f"{name} is there and another than in a run without a kill"
    for path in folder.rglob("*.json"):
        if ".unfinished-" not in path.name and path.parent.name != "vis_data":  # mmengine's logs, of JSON lines
            try:
                json.loads(path.read_bytes())
            except ValueError:
                return f"{path.relative_to(folder)} is no JSON"
    return ""


def fault_at_end(folder: Path, expected: Dict[str, str], status: int, output: str) -> str:
    """What of a finished job is not as in a run without a kill."""
    if status not in (0, 1):
        return f"it ended with {status}: {output[-1500:]}"
    differing = [name for name, found in outcome_of(folder).items() if found != expected[name]]
    if differing:
        return f"another than in a run without a kill: {', '.join(differing)}"
    left = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if ".unfinished-" in path.name or path.name == ".lock"
    ]
    return f"left behind: {', '.join(left)}" if left else ""


def killed_jobs(work: Path, seed: int, kills: int, per_chain: int, tell: Any = print) -> Iterator[Chain]:
    """
    Chains of so many kills together, each of a job in a new folder.

    Args:
        per_chain: kills of a job before it is let through; fewer if it is done before.
    """
    make_work(work)
    reference = Job(work, "undisturbed")
    status, events, output = reference.run()
    expected = outcome_of(reference.folder)
    if status not in (0, 1) or "" in expected.values():
        raise RuntimeError(f"the job fails undisturbed, with {status}:\n{output[-4000:]}")
    tell(f"undisturbed: {events} events of writing")
    number = 0
    while kills > 0:
        chain = _chain(work, seed, number, min(kills, per_chain), events, expected, tell)
        yield chain
        number, kills = number + 1, kills - max(1, len(chain.kills))


def _chain(work: Path, seed: int, number: int, most: int, events: int, expected: Dict[str, str], tell: Any) -> Chain:
    rng = random.Random(f"{seed}/{number}")
    job = Job(work, f"killed{number}")
    kills: List[Kill] = []
    while len(kills) < most:
        how = rng.choice(("one at an event", "all at an event", "all at any time"))
        # So that about as many kills as are asked for come before the end.
        event = rng.randint(1, max(1, 2 * events // (most + 1)))
        after_s = rng.uniform(0, LONGEST_WAIT_S) if how == "all at any time" else None
        status, reached, output = job.run(event, "one" if how.startswith("one") else "all", after_s)
        if reached < event or status in (0, 1):
            break  # it was done before
        stages = [line for line in output.splitlines() if line.startswith("[")]
        kills.append(
            Kill(number, how, event, (stages or ["before the first"])[-1][:80], fault_after_kill(job.folder, expected))
        )
        tell(
            f"chain {number}, kill {len(kills)}: {how}, event {event}, {kills[-1].stage[:40]} {kills[-1].fault or 'ok'}"
        )
    status, _, output = job.run()
    fault = fault_at_end(job.folder, expected, status, output)
    tell(f"chain {number}: {len(kills)} kills, then {fault or 'the same as undisturbed'}")
    return Chain(number, kills, fault)
