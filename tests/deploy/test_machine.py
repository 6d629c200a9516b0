from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict

import pytest

from deploy import machine

Write = Callable[[Dict[str, str]], None]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files under what then stands for `/`, of a machine with eight processors."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(texts: Dict[str, str]) -> None:
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


V1 = "12:memory:/docker/f00\n4:cpu,cpuacct:/docker/f00\n0::/system.slice\n"


@pytest.mark.parametrize(
    ("texts", "cores"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "proc/self/cgroup": "0::/\n"}, 8),
        ({"sys/fs/cgroup/cpu.max": "200000 100000\n", "proc/self/cgroup": "0::/\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
        # The quota of a slice above that of the process
        ({"proc/self/cgroup": "0::/a.slice/b.scope\n", "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n",
          "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n"}, 3),
        # Version 1, within a container, whose folder is the top one, and outside
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu,cpuacct/docker/f00/cpu.cfs_quota_us": "150000\n",
          "sys/fs/cgroup/cpu,cpuacct/docker/f00/cpu.cfs_period_us": "50000\n"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)  # fmt: skip
def test_a_quota_counts_as_the_number_of_processors(files: Write, texts: Dict[str, str], cores: int) -> None:
    files(texts)
    assert machine.usable_cores() == cores
    assert machine.thread_limit() == (cores if cores < 8 else None)


CONTAINER = """
import os, pathlib
read = pathlib.Path.read_text
quota = pathlib.Path("/sys/fs/cgroup/cpu.max")
pathlib.Path.read_text = lambda path, **options: "200000 100000" if path == quota else read(path, **options)
os.sched_getaffinity = lambda pid: set(range(8))
import deploy
print(os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize(("variables", "threads"), [({}, "2"), ({"OMP_NUM_THREADS": "5"}, "5")])
def test_torch_and_numpy_are_told_of_a_quota(variables: Dict[str, str], threads: str) -> None:
    others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    words, root = [sys.executable, "-c", CONTAINER], Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, env={**others, **variables}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{threads}\n"


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n", (36, 4, 3)),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref\n# KERNEL_VARIANT: oot\n", (35, 4, 1)),
        ("# R38 (release), REVISION: 2.0, GCID: 1", (38, 2, 0)),
        ("something else", None),
        ("", None),
    ],
)
def test_the_release_of_jetson_linux(files: Write, text: str, release: object) -> None:
    files({"etc/nv_tegra_release": text})
    assert machine.l4t_release() == release


def test_a_board_says_its_name(files: Write) -> None:
    assert machine.board_model() is None
    files({"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"})
    assert machine.board_model() == "NVIDIA Jetson Orin Nano Developer Kit"


def test_the_power_mode_is_asked_of_nvpmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.power_mode() is None
    program = tmp_path / "nvpmodel"
    program.write_text('#!/bin/sh\necho "NV Power Mode: 15W"\necho 1\n')
    program.chmod(0o755)
    assert machine.power_mode() == "15W"
