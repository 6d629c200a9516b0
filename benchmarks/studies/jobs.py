"""
Commands of other packages by `deploy.trials`: run unless what they make is made.

Layers above and beside the benchmarks (training, calibration) are reached in this way alone.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

from benchmarks.measuring.environment import read_environment
from deploy import freshness
from deploy.commands import command_line, last_message, run_captured
from deploy.trials import BAD_INPUT, Processes, failure_of

Make = Callable[[Path, Sequence[str]], None]
"""`make` with all but its first two arguments given."""


def is_made(artefact: Path, words: Sequence[str]) -> bool:
    """Whether `python -m <words>` has made the artefact, and it is current."""
    return freshness.is_made(artefact, words, _this_cpu())


def is_current(artefact: Path) -> bool:
    """Whether the artefact is as it was made, from files that are still the same and, a result, on this processor."""
    return freshness.is_current(artefact, _this_cpu())


@functools.lru_cache(maxsize=None)
def _this_cpu() -> Optional[str]:
    cpu: Optional[str] = read_environment()["cpu"]
    return cpu


def make(artefact: Path, words: Sequence[str], processes: Processes) -> None:
    """
    Runs `python -m <words>`, which makes the artefact, unless it is made.

    Raises:
        MeasurementError: the command failed, with its own message or the last line of its log; TrialDied: by a fault.
    """
    if is_made(artefact, words):
        return
    artefact.parent.mkdir(parents=True, exist_ok=True)
    log = artefact.with_name(f"{artefact.name}.log")
    log.unlink(missing_ok=True)
    print(command_line(*words), flush=True)
    status = processes.run(words, log)
    if status:
        last = last_message(log.read_text(encoding="utf-8", errors="replace"), status) or "nothing"
        raise failure_of(status)(
            last if status == BAD_INPUT else f"{words[0]} ended with status {status}, and {log} with: {last}"
        )


def printed_json(words: Sequence[str]) -> Dict[str, Any]:
    """
    The JSON that `python -m <words>` prints, be its exit status 0 or 1: a verdict.

    Raises:
        MeasurementError: it failed.
    """
    return dict(json.loads(run_captured(*words, verdict=True)))
