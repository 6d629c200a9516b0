"""
Counts the events of writing in FAULTS_FOLDER, by Python's audit hooks, and kills at one of them.

Every Python that has this folder on its path loads it, and so do all that these start. FAULTS_COUNTER is a file that
gets a byte for each event; at event FAULTS_KILL_AT, before it happens, SIGKILL ends the process that is about to write
(FAULTS_KILL=one), or all that FAULTS_ROOT, the first of them, has started, and itself (FAULTS_KILL=all).
"""

import contextlib
import os
import signal
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def descendants(root: int) -> "list[int]":
    """The processes that `root` has started, and theirs; itself first."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                pass
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def kill_all(root: int) -> None:
    """SIGKILL to `root` and all below it, and last to this process if it is one of them."""
    processes = descendants(root)
    for process in sorted(processes, key=lambda number: number == os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def install() -> None:
    folder = os.environ["FAULTS_FOLDER"]
    counter = os.open(os.environ["FAULTS_COUNTER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    kill_at, kills_all = int(os.environ.get("FAULTS_KILL_AT", "0")), os.environ.get("FAULTS_KILL") == "all"
    root = int(os.environ.setdefault("FAULTS_ROOT", str(os.getpid())))
    busy = []

    def hear(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _mode, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in NAMED:
            path = arguments[0]
        else:
            return
        if busy or isinstance(path, int) or path is None:
            return
        busy.append(event)
        try:
            if os.path.abspath(os.fsdecode(path)).startswith(folder):
                os.write(counter, b".")
                if os.fstat(counter).st_size == kill_at:
                    if kills_all:
                        kill_all(root)
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            busy.pop()

    sys.addaudithook(hear)


if "FAULTS_FOLDER" in os.environ:
    install()
