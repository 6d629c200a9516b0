from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from deploy.errors import MeasurementError, PipelineError
from deploy.files import check_writable
from deploy.folder_lock import LOCK, held_locks, locked
from deploy.processes import status_of

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
from deploy.errors import command
from deploy.folder_lock import locked

@command
def main(argv=None):
    with locked(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()

sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path/run until its input ends."""
    words = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_message_names_who_writes_there(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(MeasurementError) as caught, locked(folder, MeasurementError):
        pytest.fail("both are in it")
    message = str(caught.value)
    assert message.startswith(f"python -c {folder} (process {holder.pid} on {socket.gethostname()}, since 20")
    assert message.endswith(f" is writing into {folder}. Wait for it, end it, or give another folder.")
    holder.communicate("")
    with locked(folder):
        assert os.listdir(folder) == [LOCK]


def test_the_lock_of_a_holder_that_was_killed_is_stale(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert os.listdir(tmp_path / "run") == [LOCK]
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_bytes())["pid"] == os.getpid()


def test_a_note_that_is_damaged_or_of_a_process_that_has_ended_does_not_mislead(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    note = tmp_path / "run" / LOCK
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    document = {"command": "x\x1b[2J" * 1000, "pid": ended.pid, "host": socket.gethostname(), "since": "then"}
    for content, expected in (
        (json.dumps(document), "a process that was started by x"),
        ("[1, 2]", "another process is writing into"),
        ('{"pid": "nonsense"}', "is writing into"),
        ("", "another process is writing into"),
    ):
        note.write_text(content)
        with pytest.raises(PipelineError) as caught, locked(tmp_path / "run"):
            pytest.fail("both are in it")
        assert expected in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_folder_that_stays_empty_is_left_as_it_was(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="x"), locked(tmp_path / "a" / "b"):
            raise ValueError("x")
        assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["kept"]
    with locked(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path / "a") == ["b"]


def test_what_the_holder_starts_may_write_there_and_holds_it_too(tmp_path: Path) -> None:
    with locked(tmp_path):
        with held_locks() as locks:
            assert len(locks) == 1
        assert status_of([sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.DEVNULL) == 0
        assert os.listdir(tmp_path) == [LOCK]  # it is still ours
        inherits = "import os, sys; sys.exit(not os.path.samestat(os.stat(sys.argv[1]), os.fstat(int(sys.argv[2]))))"
        assert status_of([sys.executable, "-c", inherits, str(tmp_path / LOCK), str(locks[0])]) == 0
        stranger = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"]
        assert status_of([*stranger, sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.DEVNULL) == 2
    with held_locks() as locks:
        assert locks == ()


def test_all_that_torchrun_started_together_are_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(PipelineError, match="is writing into"), locked(tmp_path):
            pytest.fail("both are in it")


def test_a_lock_that_is_a_link_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    for number, make in enumerate((lambda path: path.symlink_to("../precious"), lambda path: path.mkdir())):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number) / LOCK)
        with pytest.raises(PipelineError, match="cannot write"), locked(tmp_path / str(number)):
            pytest.fail("it is held")
    assert (tmp_path / "precious").read_text() == "text"


FORKS = """
import os, sys, time
from deploy.files import replacing
from deploy.folder_lock import locked
with locked(sys.argv[1]), replacing(sys.argv[1] + "/a.pth"):
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_fork_such_as_a_worker_that_loads_data_does_not_hold_on(tmp_path: Path) -> None:
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS, str(tmp_path)], **quiet) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.wait()
        try:
            with locked(tmp_path):
                check_writable(tmp_path / "a.pth")
                assert os.listdir(tmp_path) == [LOCK]
        finally:
            os.kill(worker, signal.SIGKILL)
