"""Processes of ours: they end with the one that started them, by whatever it is ended, and tidy up before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any, Iterator, List, Sequence

from deploy.errors import PARENT_VARIABLE
from deploy.folder_lock import held_locks

GRACE_S = 10.0
"""That a process has to put things in order when it is to end; those that it has started itself have less."""


def process_words(module: str, *words: object) -> List[str]:
    """The words of a process that runs `python -m MODULE WORDS` with this very Python."""
    return [sys.executable, "-m", module, *map(str, words)]


def start(words: Sequence[str], **options: Any) -> subprocess.Popen:
    """
    Starts a process, in a session of its own: a signal to this one reaches it by `end` alone, and once.

    It inherits the folders that are held, so that nobody else writes into them while it lives. One of our commands ends
    by itself when this process is killed.

    Args:
        options: of subprocess.Popen; `env` is added to this process's environment.
    """
    environment = {**os.environ, **options.pop("env", {}), PARENT_VARIABLE: str(os.getpid())}
    with held_locks() as locks:
        return subprocess.Popen(words, env=environment, pass_fds=locks, start_new_session=True, **options)


@contextlib.contextmanager
def started(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """The process that `start` starts; at the end of the block it is waited for, and after an error it is ended."""
    with start(words, **options) as process:
        try:
            yield process
            process.wait()
        except BaseException:
            end([process])
            raise


def status_of(words: Sequence[str], **options: Any) -> int:
    """The exit status of a process that `start` starts; 128 + n where signal n ended it."""
    with started(words, **options) as process:
        process.wait()
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def end(processes: Sequence[subprocess.Popen]) -> None:
    """
    Ends processes that `start` has started, and all that they have started.

    They are told by SIGTERM, so that they remove what they have half written; what is left of them after GRACE_S is
    killed.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
