"""The detection of whatever a subject is: a file in a session of this process, or torch in another."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import numpy as np

from benchmarks.measuring.detection import Detection, SessionDetection, Times
from benchmarks.measuring.environment import process_memory_mib, reset_peak_memory
from benchmarks.measuring.subject import Subject, check_fits
from deploy.commands import relay
from deploy.dataset import CocoSet
from deploy.errors import ConfigError, MeasurementError
from deploy.processes import GRACE_S, end, process_words, start
from deploy.runtime.session import open_session


class TorchDetection(Detection):
    """
    A run directory, in a process of `crosskd.workers.time_detector`, which may import torch: it detects when told to.

    Raises:
        MeasurementError: that process failed; the message is its own.
    """

    def __init__(self, run_dir: Path, images: Sequence[Path], threads: Optional[int]) -> None:
        words = [str(run_dir), *map(str, images)] + (["--threads", str(threads)] if threads is not None else [])
        self._message = ""
        self.images = len(images)
        self._process: Any = start(
            process_words("crosskd.workers.time_detector", *words),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        self._relay = threading.Thread(target=self._follow, daemon=True)
        self._relay.start()
        try:
            self._answer("starting")
            memory = process_memory_mib(self._process.pid)
            self._before_mib = memory[0] if memory else None
            ready = self._answer("description", "on_gpu")
        except BaseException:
            self.close()
            raise
        self.description, self.on_gpu = str(ready["description"]), bool(ready["on_gpu"])

    def _follow(self) -> None:
        self._message = relay(self._process.stderr)

    def _answer(self, *keys: str) -> Dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._relay.join()
            raise MeasurementError(
                self._message or f"crosskd.workers.time_detector ended with status {status}: its output is above"
            )
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or any(key not in answer for key in keys):
            raise MeasurementError(
                f"crosskd.workers.time_detector wrote {line.strip()[:80]!r}; expected JSON with {list(keys)}"
            )
        return answer

    def run(self, number: int) -> Times:
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and `_answer` says why
        return self._answer("preprocess", "inference", "postprocess", "total")

    def memory_mib(self) -> Optional[float]:
        now = process_memory_mib(self._process.pid)
        return None if now is None or self._before_mib is None else now[1] - self._before_mib

    def close(self) -> None:
        """Ends the process: it stops by itself when its input does."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        finally:
            end([self._process])


@contextlib.contextmanager
def open_detection(
    subject: Subject,
    data: CocoSet,
    images: Sequence[Path],
    pixels: Sequence[np.ndarray],
    threads: Optional[int],
    batches: Sequence[int] = (),
) -> Iterator[Detection]:
    """
    The detection of whatever `subject` is, in these images.

    Args:
        pixels: the same images, decoded.
        threads: on the CPU; None: as many as the runtime chooses.
        batches: of a sweep to come, for the message if the model does not take them.

    Raises:
        ConfigError: it does not. MeasurementError: the model is of other classes than `data`, or does not start.
    """
    if subject.is_run_dir:
        with contextlib.closing(TorchDetection(subject.path, images, threads)) as detection:
            yield detection
        return
    memory = process_memory_mib(os.getpid()) if reset_peak_memory() else None
    with open_session(subject.path, threads=threads, runtime=subject.runtime) as session:
        check_fits(session.contract, data, subject)
        fewest, most = session.batch_limits
        if not all(fewest <= batch <= most for batch in batches):
            takes = str(most) if fewest == most else f"{fewest} to {most}"
            raise ConfigError(
                f"--sweep-batches is {list(batches)}, but {subject.path} takes {takes} images at once; leave "
                "the others out, or export and build it for them"
            )
        on_gpu = subject.target is not None and subject.target.on_gpu
        yield SessionDetection(session, images, pixels, on_gpu, memory[0] if memory else None)
