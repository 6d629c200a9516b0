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
from deploy.commands import run_captured
from deploy.trials import Processes, run_trial

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
        MeasurementError: as `run_trial`.
    """
    if is_made(artefact, words):
        return
    run_trial(words, artefact.with_name(f"{artefact.name}.log"), processes)


def printed_json(words: Sequence[str]) -> Dict[str, Any]:
    """
    The JSON that `python -m <words>` prints, be its exit status 0 or 1: a verdict.

    Raises:
        MeasurementError: it failed.
    """
    return dict(json.loads(run_captured(*words, verdict=True)))
