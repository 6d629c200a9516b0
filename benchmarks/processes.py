"""
Commands as processes of their own: run unless they are done, several at a time, and ended together.

Layers above and beside the benchmarks (training, calibration) are reached in this way alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Sequence, TypeVar

from deploy.contract import sidecar_path
from deploy.errors import MeasurementError, PipelineError
from deploy.files import read_json, sha256_of

Task = TypeVar("Task")
Result = TypeVar("Result")
LOG_LINES = 15
"""Of a failed command's log are shown."""


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
                    [sys.executable, "-m", *words], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env=environment, pass_fds=keep_open,
                )  # fmt: skip
                self._running.append(process)
            try:
                return process.wait()
            except BaseException:  # Ctrl-C while nothing else runs beside it
                process.terminate()
                process.wait()
                raise
            finally:
                with self._guard:
                    self._running.remove(process)

    def stop(self) -> None:
        """Ends what runs; nothing starts after it."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.terminate()


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
    """Whether `python -m <words>` has made the artefact, as it is now, from files that are still the same."""
    record = artefact if artefact.suffix == ".json" else sidecar_path(artefact)  # a result is its own sidecar
    if not (artefact.is_file() and record.is_file()):
        return False
    document = read_json(record, MeasurementError, "what an earlier run left; delete it")
    if document["command"] != ["python", "-m", *words] or not are_same(document["inputs"]):
        return False
    return record == artefact or bool(document["artefact"]["sha256"] == sha256_of(artefact))


def are_same(inputs: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the files of a sidecar's `inputs` are what they were."""
    return all(Path(one["file"]).is_file() and sha256_of(one["file"]) == one["sha256"] for one in inputs.values())


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
    print(f"python -m {' '.join(words)}", flush=True)
    status = processes.run(words, log)
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        messages = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
        if status == 2 and messages:
            raise MeasurementError(messages[-1])
        last = next((line for line in reversed(lines) if line), "nothing")
        raise MeasurementError(f"{words[0]} ended with status {status}, and {log} with: {last}")
