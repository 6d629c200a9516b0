"""
Commands as processes of their own: run unless they are done, several at a time, and ended together.

Layers above and beside the benchmarks (training, calibration) are reached in this way alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, TypeVar

from benchmarks.measuring.environment import read_environment
from deploy import freshness
from deploy.commands import command_line, last_message, process_words, run_captured
from deploy.errors import MeasurementError, PipelineError

Task = TypeVar("Task")
Result = TypeVar("Result")
LOG_LINES = 15
"""Of a failed command's log are shown."""
GRACE_S = 10.0
"""That a process has to put things in order when it is interrupted."""
Make = Callable[[Path, Sequence[str]], None]
"""`make` with all but its first two arguments given."""


class Processes:
    """Runs our commands, each as a process of its own, and ends them all when told so."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._running: List[subprocess.Popen] = []
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, words: Sequence[str], log: Path, alone: bool = False, keep_open: Sequence[int] = ()) -> int:
        """
        The exit status of `python -m <words>`, whose output is appended to `log`.

        Args:
            alone: nothing else runs beside it, so that it may have all the cores.
            keep_open: file descriptors that it inherits.
        """
        environment = dict(os.environ)
        if self._jobs > 1 and not alone:  # a thread each: two such trainings do more than one with two threads
            environment.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        with log.open("ab") as output:
            with self._guard:
                if self._stopped:
                    raise MeasurementError("stopped")
                process = subprocess.Popen(
                    process_words(*words), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env=environment, pass_fds=keep_open, start_new_session=True,
                )  # fmt: skip
                self._running.append(process)
            try:
                return process.wait()
            except BaseException:  # Ctrl-C while nothing else runs beside it
                end([process])
                raise
            finally:
                with self._guard:
                    self._running.remove(process)

    def stop(self) -> None:
        """Ends what runs; nothing starts after it."""
        with self._guard:
            self._stopped = True
            running = list(self._running)
        end(running)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """
    Ends processes that were started with `start_new_session`, and all that they have started.

    They are interrupted, as by Ctrl-C, so that they remove what they have half written; what is left of them after
    GRACE_S is killed.
    """
    _signal(processes, signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _signal(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, number)


def end_as_by_ctrl_c() -> None:
    """Makes SIGTERM and a closed terminal what Ctrl-C is to this process, so that it ends what it has started."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job, which Ctrl-C must not end;
        signal.signal(signal.SIGINT, lambda *_: None)  # but what is ignored, and not only caught, children ignore, too
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)


def work_through(
    tasks: Sequence[Task],
    work: Callable[[Task], Result],
    done: Callable[[Task, Result], None],
    processes: Processes,
    jobs: int,
) -> List[Task]:
    """
    The tasks that failed, in the order in which they did; each was told of on stderr, and the others are done.

    Args:
        work: does a task in a thread of its own, `jobs` at a time.
        done: called in this thread with each task and what `work` returned.
        processes: what `work` runs its commands by; anything but a PipelineError, Ctrl-C above all, ends them.
    """
    failed: List[Task] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                task = futures[future]
                try:
                    result = future.result()
                except PipelineError as error:
                    failed.append(task)
                    print(f"error: {task}: {error}", file=sys.stderr, flush=True)
                    continue
                done(task, result)
        except BaseException:
            for future in futures:
                future.cancel()
            processes.stop()
            raise
    return failed


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """
    A file descriptor that holds the folder; a training that inherits it holds it too, even where we were killed.

    Raises:
        MeasurementError: another process has it.
    """
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MeasurementError(
                f"another process is training or measuring in {folder}; wait for it, or end it"
            ) from error
        yield file.fileno()


def tail_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


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


def make(artefact: Path, words: Sequence[str], processes: Processes, keep_open: Sequence[int] = ()) -> None:
    """
    Runs `python -m <words>`, which makes the artefact, unless it is made.

    Args:
        keep_open: file descriptors that the command inherits.

    Raises:
        MeasurementError: the command failed; the message is its own, or else the last line of its log.
    """
    if is_made(artefact, words):
        return
    artefact.parent.mkdir(parents=True, exist_ok=True)
    log = artefact.with_name(f"{artefact.name}.log")
    log.unlink(missing_ok=True)
    print(command_line(*words), flush=True)
    status = processes.run(words, log, keep_open=keep_open)
    if status:
        last = last_message(log.read_text(encoding="utf-8", errors="replace"), status) or "nothing"
        raise MeasurementError(
            last if status == 2 else f"{words[0]} ended with status {status}, and {log} with: {last}"
        )


def printed_json(words: Sequence[str]) -> Dict[str, Any]:
    """
    The JSON that `python -m <words>` prints, be its exit status 0 or 1: a verdict.

    Raises:
        MeasurementError: it failed.
    """
    return dict(json.loads(run_captured(*words, verdict=True)))
