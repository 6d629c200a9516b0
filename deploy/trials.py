"""
Commands of ours as processes of their own, several at a time: on this machine, or on the GPUs and machines of Ray.

Packages that must not import each other (training, calibration, benchmarks) run each other in this way. Ray is used
where its address is given; what runs there sees the same folders under the same paths, as on a network drive.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type, TypeVar

from deploy.commands import command_line, last_message
from deploy.errors import MeasurementError, MissingDependencyError, PipelineError, one_line
from deploy.folder_lock import HOLDER_VARIABLE, this_holder
from deploy.processes import GRACE_S, end, process_words, start, started

Task = TypeVar("Task")
Result = TypeVar("Result")
LOG_LINES = 15
"""Of a failed command's log are shown."""
BAD_INPUT = 2
"""Status of a command that would end in the same way again."""
REACHED_WITHIN_S = 5.0
HEALTHY_WITHIN_S = 60.0
PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
"""Python that joins a Ray, in a process of its own: where none answers, `ray.init` tries for minutes."""
RAY_HERE, RAY_RUNNING = "local", "auto"
"""Addresses of Ray: one that is started here and ends with this process, and the one that runs on this machine."""


class TrialDied(MeasurementError):
    """A process ended by a signal or a fault, or its machine was lost: the next time it may do better."""


def failure_of(status: int) -> Type[MeasurementError]:
    """The error that a command which ended with such a status is told by."""
    return MeasurementError if status == BAD_INPUT else TrialDied


def add_ray_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"train on the GPUs and machines of Ray: {RAY_HERE} starts one on this machine, {RAY_RUNNING} takes the "
        "one that runs here, HOST:PORT another; all of them see the same folders (default: without Ray)",
    )


class Processes:
    """Runs our commands, each as a process of its own, and ends them all when told so."""

    def __init__(self, jobs: int) -> None:
        """
        Args:
            jobs: at a time.
        """
        self.jobs = jobs
        self._running: List[Any] = []
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, words: Sequence[str], log: Path, alone: bool = False) -> int:
        """
        The exit status of `python -m <words>`, whose output is appended to `log`.

        Args:
            alone: nothing else runs beside it, so that it may have all the cores.

        Raises:
            MeasurementError: `stop` was called, or it cannot be run.
        """
        environment: Dict[str, str] = {}
        if self.jobs > 1 and not alone:  # a thread each: two such trainings do more than one with two threads
            environment.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        with log.open("ab") as output, self._begun(
            lambda: start(
                process_words(*words), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment,
            )
        ) as process:  # fmt: skip
            try:
                status: int = process.wait()
            except BaseException:  # Ctrl-C while nothing else runs beside it
                end([process])
                raise
            return status

    @contextlib.contextmanager
    def _begun(self, begin: Callable[[], Any]) -> Iterator[Any]:
        """What `begin` starts; until the end of the block `stop` ends it."""
        with self._guard:
            if self._stopped:
                raise MeasurementError("stopped")
            running = begin()
            self._running.append(running)
        try:
            yield running
        finally:
            with self._guard:
                self._running.remove(running)

    def stop(self) -> None:
        """Ends what runs; nothing starts after it."""
        with self._guard:
            self._stopped = True
            running = list(self._running)
        self._end(running)

    def _end(self, running: List[Any]) -> None:
        end(running)


class RayProcesses(Processes):
    """`Processes` on the machines of a Ray that this process has joined: each with a GPU, where there are any."""

    def __init__(self, jobs: int) -> None:
        """
        Args:
            jobs: at a time, where there is no GPU; else as many as there are GPUs.
        """
        import ray

        resources = ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        super().__init__(self._gpus or jobs)
        needed = "GPU" if self._gpus else "CPU"
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(needed)]
        cores = min((int(machine.get("CPU", 1)) for machine in machines), default=1)
        self._threads = max(1, min(cores, int(resources.get("CPU", 1)) // self.jobs))
        self._machines = len(machines)

    def __str__(self) -> str:
        on = f"{self._gpus} GPUs" if self._gpus else f"{self._threads} threads each"
        return f"Ray: {self._machines} machine{'s' * (self._machines != 1)}, {self.jobs} trials at a time, {on}"

    def run(self, words: Sequence[str], log: Path, alone: bool = False) -> int:
        """As `Processes.run`; `alone` makes no difference."""
        import ray

        variables = {"OMP_NUM_THREADS": str(self._threads), HOLDER_VARIABLE: this_holder()}
        if "PYTHONPATH" in os.environ:
            variables["PYTHONPATH"] = os.environ["PYTHONPATH"]
        task = ray.remote(run_there).options(
            num_cpus=self._threads, num_gpus=1 if self._gpus else 0, max_retries=0, name=words[0]
        )
        with self._begun(
            lambda: task.remote(list(words), str(log.resolve()), os.getcwd(), variables)
        ) as reference:  # fmt: skip
            try:
                status, message = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise TrialDied(f"Ray has lost {words[0]}: {one_line(error)}") from error
        if message:
            raise MeasurementError(message)
        return int(status)

    def _end(self, running: List[Any]) -> None:
        import ray

        for reference in running:
            ray.cancel(reference)  # as Ctrl-C there, by which the process is ended
        if running:
            ray.wait(running, num_returns=len(running), timeout=GRACE_S)


def run_there(words: List[str], log: str, folder: str, variables: Dict[str, str]) -> Tuple[int, str]:
    """
    On a machine of Ray: the exit status of a command that runs in `folder`, or why it cannot run there.

    Args:
        log: file that its output is appended to. variables: of its environment.
    """
    if not Path(log).parent.is_dir() or not Path(folder).is_dir():
        return BAD_INPUT, (
            f"{socket.gethostname()}, a machine of Ray, has no folder {Path(log).parent}, or no {folder}; expected "
            "both on a drive that all machines have under the same path"
        )
    # A Ray that was started in the background of a shell ignores it, and would be deaf to `ray.cancel`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab") as output, started(
        process_words(*words), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
        env=variables,
    ) as process:  # fmt: skip
        while process.poll() is None:  # and not `wait`, which a cancelled task would not leave
            time.sleep(0.2)
        return process.returncode, ""


@contextlib.contextmanager
def trial_processes(ray_address: Optional[str], jobs: int) -> Iterator[Processes]:
    """
    What trials run by.

    Args:
        ray_address: RAY_HERE, RAY_RUNNING or HOST:PORT; None: processes of this machine.
        jobs: at a time, where Ray has no GPUs.

    Raises:
        MissingDependencyError: Ray is asked for, and is not installed.
        MeasurementError: it cannot be reached or started.
    """
    if ray_address is None:
        yield Processes(jobs)
        return
    check_ray(ray_address)
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else one that is started here reports to its makers
    on_signal = signal.getsignal(signal.SIGTERM)
    here = {"include_dashboard": False} if ray_address == RAY_HERE else {}
    try:
        ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR", **here)
        signal.signal(signal.SIGTERM, on_signal)  # which Ray has replaced by one that ends nothing as we do
    except Exception as error:  # ConnectionError, RuntimeError (another version), OSError and others
        raise MeasurementError(
            f"--ray {ray_address}: {one_line(error)}. Start Ray by `ray start --head`, give {RAY_HERE}, or leave --ray "
            "out: the trials then run here, one after the other"
        ) from error
    try:
        processes = RayProcesses(jobs)
        print(processes, flush=True)
        yield processes
    finally:
        ray.shutdown()


def check_ray(address: str) -> None:
    """
    Raises an error unless Ray can be joined: to be asked before long work.

    Raises:
        MissingDependencyError: Ray is not installed.
        MeasurementError: none answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("ray", "--ray", "pip install 'crosskd[ray]'")
    if address == RAY_HERE:
        return
    way_out = "Is it started there (`ray start --head --port ...`), and does a firewall let it through?"
    if address != RAY_RUNNING:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise MeasurementError(
                f"--ray is {address}; expected {RAY_HERE}, {RAY_RUNNING}, or HOST:PORT of a head, such as "
                "192.168.1.10:6379"
            )
        try:
            socket.create_connection((host, int(port)), REACHED_WITHIN_S).close()
        except (OSError, OverflowError) as error:
            raise MeasurementError(f"--ray {address}: no Ray can be reached there ({error}). {way_out}") from error
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, address], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=HEALTHY_WITHIN_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(
            f"--ray {address}: what is there does not answer as Ray does, within {HEALTHY_WITHIN_S:g} s. {way_out}"
        ) from error
    if probe.returncode:
        errors = probe.stderr.decode(errors="replace")
        root = re.search(
            r"^[\w.]+(Error|Exception): (?!.*most recent call last).*", errors, re.MULTILINE
        )  # others follow from it
        reason = root[0] if root else last_message(errors, probe.returncode)
        raise MeasurementError(f"--ray {address}: {one_line(reason)}. {way_out}")


def run_trial(words: Sequence[str], log: Path, processes: Processes) -> None:
    """
    Runs `python -m <words>`; its output alone is in `log` afterwards.

    Raises:
        MeasurementError: the command failed, with its own message or the last line of its log; TrialDied: by a fault.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    print(command_line(*words), flush=True)
    status = processes.run(words, log)
    if status:
        last = last_message(log.read_text(encoding="utf-8", errors="replace"), status) or "nothing"
        killed = " (killed: was the memory full?)" if status == -signal.SIGKILL else ""
        raise failure_of(status)(
            last if status == BAD_INPUT else f"{words[0]} ended with status {status}{killed}, and {log} with: {last}"
        )


def work_through(
    tasks: Sequence[Task],
    work: Callable[[Task], Result],
    done: Callable[[Task, Result], None],
    processes: Processes,
    jobs: int,
) -> List[Task]:
    """
    The tasks that failed, in the order in which they did; each was told of on stderr, and the others are done.

    One whose process died is repeated once.

    Args:
        work: does a task in a thread of its own, `jobs` at a time.
        done: called in this thread with each task and what `work` returned.
        processes: what `work` runs its commands by; anything but a PipelineError, Ctrl-C above all, ends them.
    """
    failed: List[Task] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        attempts = {pool.submit(work, task): (task, 1) for task in tasks}
        try:
            while attempts:
                finished, _ = concurrent.futures.wait(attempts, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    task, attempt = attempts.pop(future)
                    try:
                        result = future.result()
                    except PipelineError as error:
                        again = isinstance(error, TrialDied) and attempt == 1
                        what = f"{task} died, and is repeated once" if again else str(task)
                        print(f"error: {what}: {error}", file=sys.stderr, flush=True)
                        if again:
                            attempts[pool.submit(work, task)] = (task, 2)
                        else:
                            failed.append(task)
                        continue
                    done(task, result)
        except BaseException:
            for future in attempts:
                future.cancel()
            processes.stop()
            raise
    return failed


def tail_of(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
