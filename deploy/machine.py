"""
What kind of machine this is, as Linux says it: how many processors a process may use, what its driver is for, and of a
board its name, its release of Jetson Linux and its power mode. Needs nothing but Python, and never fails: what cannot
be found is None. And one thing that a process may spare its machine: `no_garbage_collection`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Tuple

ROOT = Path("/")
"""Of the files that are read here."""
BOARD_MODEL = "proc/device-tree/model"
L4T_RELEASE = "etc/nv_tegra_release"
CGROUPS_V1 = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")
CGROUPS_V2 = "sys/fs/cgroup"

VENV = "python3 -m venv --system-site-packages env && . env/bin/activate"
"""An environment that sees JetPack's TensorRT."""


class L4tRelease(NamedTuple):
    """A release of Jetson Linux ("Linux for Tegra")."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def board_model() -> Optional[str]:
    """A board's name: "NVIDIA Jetson Orin Nano Developer Kit"; None on a PC."""
    return text_of(BOARD_MODEL)


def l4t_release() -> Optional[L4tRelease]:
    """A Jetson's, of the first line of its file: "# R36 (release), REVISION: 4.3, GCID: ..."."""
    match = re.match(r"# R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", text_of(L4T_RELEASE) or "")
    return L4tRelease(*(int(number or 0) for number in match.groups())) if match else None


def power_mode() -> Optional[str]:
    """The power mode of a Jetson: `nvpmodel -q` prints "NV Power Mode: MAXN", then the number of the mode."""
    lines = (output_of("nvpmodel", "-q") or "").splitlines()
    modes = [line.split(":", 1)[1].strip() for line in lines if line.startswith("NV Power Mode:")]
    return modes[0] if modes else None


def driver_cuda_version() -> Optional[Tuple[int, int]]:
    """The CUDA that the driver here is for, (12, 6), as the driver itself says; None where there is none."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 else None


def is_externally_managed() -> bool:
    """Whether pip refuses to install here but in an environment (PEP 668): Ubuntu 24.04, so JetPack 7."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marker.is_file()


def usable_cores() -> Optional[int]:
    """
    How many processors this process may use: of those it is bound to, and as a container's quota allows.

    A quota (`docker run --cpus 1.5`) is processor time, of which threads beyond it find none left; a part of a
    processor does not count, as one that is stopped halfway.
    """
    return thread_limit() or _bound_cores()


def thread_limit() -> Optional[int]:
    """The number of threads for a runtime that would start one a processor, where a quota allows fewer; else None."""
    bound, quota = _bound_cores(), min(_quotas(), default=None)
    return max(1, int(quota)) if quota is not None and bound is not None and quota < bound else None


def _bound_cores() -> Optional[int]:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux only


def _quotas() -> Iterator[float]:
    """
    Processors that a control group of this process, or one above it, grants.

    Kernel: Documentation/admin-guide/cgroup-v2.rst (cpu.max), Documentation/scheduler/sched-bwc.rst (cfs_quota_us).
    """
    entries = [line.split(":", 2) for line in (text_of("proc/self/cgroup") or "").splitlines() if line.count(":") > 1]
    v2 = [path for number, _, path in entries if number == "0"]
    v1 = [path for _, names, path in entries if "cpu" in names.split(",")]
    for folder in _groups(CGROUPS_V2, v2):
        quota, _, period = (text_of(f"{folder}/cpu.max") or "").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)
    for hierarchy in CGROUPS_V1:
        for folder in _groups(hierarchy, v1):
            quota, period = (text_of(f"{folder}/cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
            if quota.isdigit() and period.isdigit() and int(period):  # -1: no quota
                yield int(quota) / int(period)


def _groups(hierarchy: str, paths: List[str]) -> Iterator[str]:
    """The folders of the control groups, up to the top. In a container that is its own, whatever the host's path."""
    for path in paths or ["/"]:
        parts = [part for part in path.split("/") if part]
        for count in range(len(parts), -1, -1):
            yield "/".join([hierarchy, *parts[:count]])


def text_of(path: str) -> Optional[str]:
    """What the file under `ROOT` says, without what ends it; None if it cannot be read or is empty."""
    try:
        return (ROOT / path).read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def output_of(*words: str) -> Optional[str]:
    """What the program prints; None if it is not here or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For making some hundred thousand objects that all stay: the collector would search them in vain, many times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
