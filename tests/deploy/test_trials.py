from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from deploy.errors import ConfigError, MeasurementError, MissingDependencyError
from deploy.folder_lock import HOLDER_VARIABLE, locked, this_holder
from deploy.trials import Processes, TrialDied, check_ray, trial_processes, work_through


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


def wait_for(path):
    for _ in range(1000):
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} is not written")


def test_stop_ends_what_runs_and_nothing_starts_after_it(module, tmp_path):
    processes, statuses = Processes(jobs=2), []
    log = tmp_path / "log.txt"
    thread = threading.Thread(target=lambda: statuses.append(processes.run([module, "60", "0"], log)))
    thread.start()
    wait_for(log)
    processes.stop()
    thread.join(timeout=20)
    assert statuses == [-signal.SIGTERM]
    with pytest.raises(MeasurementError, match="stopped"):
        processes.run([module, "0", "0"], log)


class Stopped:
    """In place of Processes: knows whether it was told to stop."""

    def __init__(self):
        self.stopped = threading.Event()

    def stop(self):
        self.stopped.set()


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
        if where == "work" and task == 0:
            raise KeyboardInterrupt
        if task > 0:
            processes.stopped.wait(20)

    def done(task, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_through(list(range(9)), work, done, processes, jobs=1)
    assert processes.stopped.is_set()
    assert len(begun) <= 2


def test_what_died_is_repeated_once(capsys):
    attempts, done = [], []

    def work(task):
        attempts.append(task)
        if task == "never" or (task == "once" and attempts.count(task) == 1):
            raise TrialDied("killed")
        return task

    failed = work_through(["never", "once", "well"], work, lambda task, _: done.append(task), Stopped(), jobs=1)
    assert failed == ["never"]
    assert sorted(done) == ["once", "well"]
    assert {task: attempts.count(task) for task in attempts} == {"never": 2, "once": 2, "well": 1}
    told = capsys.readouterr().err.splitlines()
    assert told.count("error: never died, and is repeated once: killed") == 1
    assert told.count("error: never: killed") == 1


def test_without_an_address_trials_are_processes_of_this_machine():
    with trial_processes(None, 3) as processes:
        assert (type(processes), processes.jobs) == (Processes, 3)


def test_ray_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"crosskd\[ray\]"), trial_processes("local", 1):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:10001", "expected local, auto, or HOST:PORT"),
        ("10.0.0.1", "expected local, auto, or HOST:PORT"),
        ("here:x", "expected local, auto, or HOST:PORT"),
        ("127.0.0.1:99999999", "no Ray can be reached there"),
        ("no-such-host.invalid:6379", "no Ray can be reached there"),
        ("127.0.0.1:PORT", "no Ray can be reached there .*refused"),
    ],
)
def test_an_address_without_a_ray_is_told(address, message):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MeasurementError, match=message), trial_processes(address.replace("PORT", str(port)), 1):
        pass


def test_what_is_no_ray_is_not_waited_for(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("deploy.trials.HEALTHY_WITHIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MeasurementError, match="does not answer as Ray does"), trial_processes(address, 1):
            pass


def test_why_ray_cannot_be_joined_is_told_by_its_first_error(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(
        "deploy.trials.PROBE",
        "try:\n    raise RuntimeError('the versions differ')\nexcept RuntimeError as error:\n"
        "    raise ConnectionError('no connection') from error",
    )
    with pytest.raises(MeasurementError, match=r"^--ray auto: RuntimeError: the versions differ\. Is it started"):
        check_ray("auto")


@pytest.fixture(scope="module")
def ray_here():
    """Trials on a Ray of two processors and what it takes for two GPUs, which is started on this machine."""
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        start = ray.init
        patch.setattr(ray, "init", lambda **options: start(num_cpus=2, num_gpus=2, **options))  # in name
        with trial_processes("local", 5) as processes:
            yield processes
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_on_ray_trials_run_beside_one_another_in_this_folder(ray_here, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ray_here.jobs == 2
    (tmp_path / "where.py").write_text(
        "import os, time\n"
        "print(os.getcwd(), os.getppid(), os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "time.sleep(1)"
    )
    began = time.monotonic()
    logs = [tmp_path / f"{number}.txt" for number in range(2)]
    statuses = work_and_results(logs, lambda log: ray_here.run(["where"], log), ray_here)
    assert statuses == [0, 0]
    wheres = [log.read_text().split() for log in logs]
    assert [folder for folder, _, _ in wheres] == [str(tmp_path)] * 2
    assert {gpu for _, _, gpu in wheres} == {"0", "1"}  # each has one
    assert wheres[0][1] != wheres[1][1] != str(os.getpid())
    assert time.monotonic() - began < 60
    log = tmp_path / "log.txt"
    assert ray_here.run([module, "0", "3"], log) == 3
    assert log.read_text() == "['0', '3'] 1 None\n"


def work_and_results(tasks, work, processes):
    results = []
    assert work_through(tasks, work, lambda _, result: results.append(result), processes, len(tasks)) == []
    return results


def test_on_ray_a_trial_that_is_killed_is_repeated(ray_here, tmp_path, monkeypatch):
    (tmp_path / "falls.py").write_text(
        "import os, pathlib, signal, time\n"
        f"first = pathlib.Path({str(tmp_path / 'begun')!r})\n"
        "if not first.exists():\n    first.touch()\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(5)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log.txt"
    statuses = work_and_results(["falls"], lambda task: ray_here.run([task], log), ray_here)
    assert statuses == [0]


def test_on_ray_a_folder_that_a_machine_does_not_see_is_told(ray_here, tmp_path):
    with pytest.raises(MeasurementError, match=r"has no folder .*nowhere"):
        ray_here.run(["told"], tmp_path / "nowhere" / "log.txt")


def test_on_ray_a_trial_may_write_into_what_the_starter_holds(ray_here, tmp_path, monkeypatch):
    (tmp_path / "writes.py").write_text(
        "import sys\nfrom deploy.folder_lock import locked\nwith locked(sys.argv[1]):\n    print('held')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    log = tmp_path / "log.txt"
    with locked(tmp_path / "run"):
        assert ray_here.run(["writes", str(tmp_path / "run")], log) == 0, log.read_text()
        stranger = f"{sys.executable} -m writes {tmp_path / 'run'}; true"  # no child of this process
        for variables in ({}, {HOLDER_VARIABLE: f"{this_holder()}1"}):
            refused = subprocess.run(
                stranger, shell=True, check=False, capture_output=True, env={**os.environ, **variables}
            )
            assert b"is writing into" in refused.stderr


def test_on_ray_stop_ends_what_runs(ray_here, module, tmp_path):
    statuses = []
    log = tmp_path / "log.txt"

    def run():
        try:
            ray_here.run([module, "60", "0"], log)
        except MeasurementError as error:
            statuses.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(log)
    ray_here.stop()
    thread.join(timeout=120)
    assert isinstance(statuses[0], TrialDied)
    with pytest.raises(MeasurementError, match="stopped"):
        ray_here.run([module, "0", "0"], log)
