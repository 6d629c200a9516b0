"""
Commands as processes of their own: run unless they are done, several at a time, and ended together.

Layers above and beside the benchmarks (training, calibration) are reached in this way alone.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, TypeVar

from benchmarks.measuring.environment import read_environment
from deploy import freshness
from deploy.commands import command_line, last_message, run_captured
from deploy.errors import MeasurementError, PipelineError
from deploy.processes import end, process_words, start

Task = TypeVar("Task")
Result = TypeVar("Result")
LOG_LINES = 15
"""Of a failed command's log are shown."""
Make = Callable[[Path, Sequence[str]], None]
"""`make` with all but its first two arguments given."""


class Processes:
    """Runs our commands, each as a process of its own, and ends them all when told so."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._running: List[subprocess.Popen] = []
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, words: Sequence[str], log: Path, alone: bool = False) -> int:
        """
        The exit status of `python -m <words>`, whose output is appended to `log`.

        Args:
            alone: nothing else runs beside it, so that it may have all the cores.
        """
        environment: Dict[str, str] = {}
        if self._jobs > 1 and not alone:  # a thread each: two such trainings do more than one with two threads
            environment.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        with log.open("ab") as output:
            with self._guard:
                if self._stopped:
                    raise MeasurementError("stopped")
                process = start(
                    process_words(*words), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env=environment,
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


def make(artefact: Path, words: Sequence[str], processes: Processes) -> None:
    """
    Runs `python -m <words>`, which makes the artefact, unless it is made.

    Raises:
        MeasurementError: the command failed; the message is its own, or else the last line of its log.
    """
    if is_made(artefact, words):
        return
    artefact.parent.mkdir(parents=True, exist_ok=True)
    log = artefact.with_name(f"{artefact.name}.log")
    log.unlink(missing_ok=True)
    print(command_line(*words), flush=True)
    status = processes.run(words, log)
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
