"""Processes end with the one that started them, whatever ends that, and tidy up before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, List

import pytest

from deploy import processes as module_under_test
from deploy.processes import end, start, status_of

ROOT = Path(__file__).parents[2]
STARTS = """
import pathlib, sys, time
from deploy.commands import run_status
from deploy.errors import command
from deploy.files import replacing

@command
def main(argv=None):
    folder, depth = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    with replacing(folder / f"{depth}.onnx"):
        if depth:
            return run_status("starts", folder, depth - 1)
        (folder / "reached").touch()
        time.sleep(60)

sys.exit(main())
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def _until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _running_of(folder: Path) -> List[int]:
    """The processes that have the folder among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(folder) in words:
            found.append(int(path.parent.name))
    return [pid for pid in found if _is_running(pid)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "starts.py").write_text(STARTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def _started(folder: Path, hang_up: object = signal.SIG_DFL) -> subprocess.Popen[str]:
    """A command that has started another, which has started a third; each is in the middle of writing a file."""
    process = subprocess.Popen(
        [sys.executable, "-m", "starts", str(folder), "2"], stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: (  # noqa: PLW1509  a script's background job ignores Ctrl-C
            signal.signal(signal.SIGHUP, hang_up), signal.signal(signal.SIGINT, signal.default_int_handler)
        ),
    )  # fmt: skip
    _until((folder / "reached").exists)
    assert len(os.listdir(folder)) == 4
    assert len(_running_of(folder)) == 3
    return process


@pytest.mark.parametrize(
    ("number", "to_the_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
)
def test_a_signal_ends_all_of_them_and_leaves_no_file(folder: Path, number: int, to_the_group: bool) -> None:
    process = _started(folder)
    os.killpg(process.pid, number) if to_the_group else process.send_signal(number)
    messages = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert messages == "interrupted\n"
    assert _running_of(folder) == []
    assert os.listdir(folder) == ["reached"]


def test_a_terminal_that_is_closed_does_not_end_what_nohup_started(folder: Path) -> None:
    process = _started(folder, hang_up=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert len(_running_of(folder)) == 3
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells it")
def test_what_was_started_ends_and_tidies_up_where_its_starter_is_killed(folder: Path) -> None:
    process = _started(folder)
    process.kill()
    process.wait()
    _until(lambda: not _running_of(folder))
    left = [name for name in os.listdir(folder) if name != "reached"]
    assert len(left) == 1
    assert left[0].startswith(".2.unfinished-")  # of the one that was killed


def test_what_does_not_end_is_killed_with_all_that_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "GRACE_S", 0.3)
    with start([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        end([process])
        assert process.returncode == -signal.SIGKILL
    _until(lambda: not _is_running(child))


def test_the_status_of_what_was_killed_is_that_of_a_shell() -> None:
    code = "import os, sys; os.kill(os.getpid(), int(sys.argv[1])) if sys.argv[1] != '0' else sys.exit(3)"
    assert status_of([sys.executable, "-c", code, "0"]) == 3
    assert status_of([sys.executable, "-c", code, "9"]) == 137
