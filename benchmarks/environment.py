"""What a measurement ran on. Reading it never fails: what cannot be found is None."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence


def read_environment() -> Dict[str, Any]:
    """
    Fact -> value: machine, processor, cores, memory, system, load, and the commit of this project.

    Package versions are not here: every result file has them from `deploy.contract.provenance`.
    """
    return {
        "machine": _first_line("/proc/device-tree/model"),  # boards name themselves here, PCs do not have it
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "cpu_governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_mib": _memory_mib(),
        "os": platform.platform(),
        "load_average": _load_average(),
        "commit": _commit(),
    }


def _first_line(path: str) -> Optional[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.strip("\0\n ").split("\n")[0] or None


def _cpu_model() -> Optional[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return models[0] if models else platform.processor() or platform.machine() or None


def _usable_cores() -> Optional[int]:
    if not hasattr(os, "sched_getaffinity"):  # Linux only
        return os.cpu_count()
    return len(os.sched_getaffinity(0))


def _memory_mib() -> Optional[int]:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    except (AttributeError, OSError, ValueError):
        return None


def _load_average() -> Optional[List[float]]:
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _commit() -> Optional[str]:
    """The commit this file is of, with "+changes" if tracked files differ from it; None when installed elsewhere."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # an installed copy may lie inside somebody else's repository
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(*words: str) -> Optional[str]:
    command: Sequence[str] = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
