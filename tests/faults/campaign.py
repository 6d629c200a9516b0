"""Many inputs of all kinds: divided among kinds, taken by processes of `tests.faults.fuzz`, and summed up."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

from tests.faults import inputs
from tests.faults.fuzz import LIMIT_S, OWN_FAULT, ROOT
from tests.faults.inputs import Kind, in_folder


@dataclasses.dataclass
class Summary:
    """What came of the inputs of one kind."""

    kind: str
    inputs: int = 0
    readings: int = 0
    """Of readers, commands and processes together."""
    processes: int = 0
    refused: int = 0
    """Readings that ended with one message and status 2; all others took the input as sound."""
    longest_s: float = 0.0
    """Of a reading in a process that had been started before."""
    peak_mib: float = 0.0
    faults: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    """kind, seed, index, reader, fault and details of each."""


def make_bench(folder: Path) -> None:
    """Makes the sound files in a new folder, by a process of its own."""
    script = (
        "import sys; from pathlib import Path; from tests.faults import inputs; folder = Path(sys.argv[1]); "
        "inputs.make_bench(folder)"
    )
    _python(["-c", script, str(folder)], ROOT)
    with in_folder(folder):
        Path("overrides.json").write_text("{}")
        has_torch = any(inputs.has_packages(kind) and kind.needs for kind in inputs.kinds())
    if has_torch:
        _python(["-c", "from tests.faults.inputs import make_checkpoints; make_checkpoints()"], folder)


def _python(words: List[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the sound files cannot be made:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def fuzzed(bench: Path, kind: Kind, seed: int, count: int, first: int = 0) -> Summary:
    """The summary of `count` inputs of a kind; a process that dies is replaced, and its input counted as a fault."""
    summary, end = Summary(kind.name), first + count
    while first < end:
        first = _taken(bench, kind, seed, first, end, summary)
    return summary


def _taken(bench: Path, kind: Kind, seed: int, first: int, end: int, summary: Summary) -> int:
    """Adds what one process makes of the inputs from `first` on; the first that it has not come to."""
    words = [sys.executable, "-m", "tests.faults.fuzz", str(bench), kind.name, str(seed), str(first), str(end - first)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    index, start = first, time.monotonic()
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            found = json.loads(line)
            if "sound" in found:
                wrong = [judged for judged in found["sound"] if judged["fault"] or judged["status"] != 0]
                if wrong and kind.name != "holders of locks":
                    raise RuntimeError(f"sound files of the kind {kind.name!r} are not taken: {wrong}")
            elif "begins" in found:
                index, start = found["begins"], time.monotonic()
            else:
                _add(summary, found, seed)
                index = found["index"] + 1
        said = process.stderr.read()
    if process.returncode == 0:
        return end
    if process.returncode == OWN_FAULT:
        raise RuntimeError(f"input {index} of the kind {kind.name!r} cannot be made:\n{said[-3000:]}")
    seconds = time.monotonic() - start
    fault = "hang" if seconds > LIMIT_S else "crash"
    details = f"the process ended with {process.returncode} after {seconds:.0f} s: {said[-1500:]}"
    summary.inputs += 1
    summary.faults.append(_fault(kind.name, seed, index, "all", fault, details))
    _restore(bench)
    return index + 1


def _restore(bench: Path) -> None:
    """The bench as it was made, after a process died in the middle of an input."""
    import shutil

    shutil.rmtree(bench)
    shutil.copytree(bench.with_name(f"{bench.name}.kept"), bench)


def _fault(kind: str, seed: int, index: int, reader: str, fault: str, details: str) -> Dict[str, Any]:
    return {"kind": kind, "seed": seed, "index": index, "reader": reader, "fault": fault, "details": details}


def _add(summary: Summary, found: Dict[str, Any], seed: int) -> None:
    summary.inputs += 1
    summary.peak_mib = max(summary.peak_mib, round(found["peak_mib"], 1))
    for judged in found["judged"]:
        summary.readings += 1
        is_process = judged["reader"].startswith("process ")
        summary.processes += is_process
        summary.refused += judged["status"] == 2
        if not is_process:
            summary.longest_s = max(summary.longest_s, round(judged["seconds"], 3))
        if judged["fault"]:
            summary.faults.append(
                _fault(summary.kind, seed, found["index"], judged["reader"], judged["fault"], judged["details"])
            )


def counts_of_faults(summaries: List[Summary]) -> Dict[str, int]:
    """Fault -> how many readings ended in it."""
    return dict(collections.Counter(fault["fault"] for summary in summaries for fault in summary.faults))
