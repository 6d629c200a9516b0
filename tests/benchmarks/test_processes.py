from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks.processes import Processes, is_made, make, work_through
from deploy.contract import read_sidecar, sidecar_path, write_sidecar
from deploy.errors import ConfigError, MeasurementError
from deploy.files import write_json


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that can be run: it prints its arguments and threads, and ends with the status that it is told."""
    (tmp_path / "told.py").write_text(
        "import os, sys, time\n"
        "print(sys.argv[1:], os.environ.get('OMP_NUM_THREADS'), os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    return "told"


def test_processes_beside_one_another_have_a_thread_each(module, tmp_path):
    log = tmp_path / "log.txt"
    assert Processes(jobs=2).run([module, "0", "3"], log) == 3
    assert Processes(jobs=2).run([module, "0", "0"], log, alone=True) == 0
    assert Processes(jobs=1).run([module, "0", "0"], log) == 0
    assert log.read_text().splitlines() == [
        "['0', '3'] 1 PASSIVE", "['0', '0'] None None", "['0', '0'] None None",
    ]  # fmt: skip


def test_stop_ends_what_runs_and_nothing_starts_after_it(module, tmp_path):
    processes, statuses = Processes(jobs=2), []
    log = tmp_path / "log.txt"
    thread = threading.Thread(target=lambda: statuses.append(processes.run([module, "60", "0"], log)))
    thread.start()
    while not log.is_file() or not log.read_text():
        time.sleep(0.02)
    processes.stop()
    thread.join(timeout=20)
    assert statuses == [-signal.SIGTERM]
    with pytest.raises(MeasurementError, match="stopped"):
        processes.run([module, "0", "0"], log)


class Stopped:
    """In place of Processes: knows whether it was told to stop."""

    stopped = False

    def stop(self):
        self.stopped = True


def test_what_fails_is_told_of_and_the_others_are_done(capsys):
    done = []

    def work(task):
        if task == 2:
            raise ConfigError("two is wrong")
        return task * 10

    failed = work_through([1, 2, 3], work, lambda task, result: done.append((task, result)), Stopped(), jobs=1)
    assert failed == [2]
    assert done == [(1, 10), (3, 30)]
    assert "error: 2: two is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["work", "done"])
def test_an_interruption_ends_the_processes_and_starts_no_other_task(where):
    processes, begun = Stopped(), []

    def work(task):
        begun.append(task)
        if where == "work":
            raise KeyboardInterrupt
        time.sleep(0.2)

    def done(task, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_through(list(range(9)), work, done, processes, jobs=1)
    assert processes.stopped
    assert len(begun) < 4


class Maker:
    """In place of Processes: writes the artefact with its sidecar, as `python -m copy FROM TO` would."""

    def __init__(self, output="", status=0):
        self.output, self.status, self.runs = output, status, 0

    def run(self, words, log):
        self.runs += 1
        log.write_text(self.output)
        if not self.status:
            source, artefact = words[1:]
            Path(artefact).write_text(Path(source).read_text())
            write_sidecar(artefact, {"source": source})
            write_json(sidecar_path(artefact), {**read_sidecar(artefact), "command": ["python", "-m", *words]})
        return self.status


@pytest.fixture
def files(tmp_path):
    """(words, source, artefact) of a command that copies."""
    source, artefact = tmp_path / "source.txt", tmp_path / "made" / "copy.txt"
    source.write_text("one")
    return ["copy", str(source), str(artefact)], source, artefact


def test_what_is_made_from_the_same_files_is_not_made_again(files, tmp_path):
    words, source, artefact = files
    maker = Maker()
    make(artefact, words, maker)
    make(artefact, words, maker)
    assert maker.runs == 1
    source.write_text("two")
    assert not is_made(artefact, words)
    make(artefact, words, maker)
    assert (maker.runs, artefact.read_text()) == (2, "two")
    artefact.write_text("edited")
    assert not is_made(artefact, words)
    make(artefact, words, maker)
    assert (maker.runs, artefact.read_text()) == (3, "two")
    assert not is_made(artefact, ["copy", "-p", *words[1:]])
    sidecar_path(artefact).unlink()
    assert not is_made(artefact, words)


def test_a_result_file_is_its_own_sidecar(files, tmp_path):
    source, result = files[1], tmp_path / "x.result.json"
    sidecar = {"inputs": {"a": {"file": str(source), "sha256": "0"}}, "command": ["python", "-m", "m", "x"]}
    result.write_text(json.dumps(sidecar))
    assert not is_made(result, ["m", "x"])
    result.write_text(json.dumps({**sidecar, "inputs": {}}))
    assert is_made(result, ["m", "x"])


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        ("warning: x\nerror: the file is bad\nsecond line\n", 2, "^the file is bad$"),
        (
            "Traceback\n  File\nKeyError: 'x'\n",
            1,
            r"^copy ended with status 1, and .*copy.txt.log with: KeyError: 'x'$",
        ),
        ("", -9, r"^copy ended with status -9, and .*copy.txt.log with: nothing$"),
    ],
)
def test_a_command_that_fails_is_quoted(output, status, message, files):
    words, _, artefact = files
    with pytest.raises(MeasurementError, match=message):
        make(artefact, words, Maker(output, status))
