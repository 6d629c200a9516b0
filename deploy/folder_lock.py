"""One writer at a time in an output folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

from deploy.contract import this_command
from deploy.errors import PipelineError, is_first_process, one_line
from deploy.files import AnyPath, lock, unlock

LOCK = ".lock"
HOLDER_VARIABLE = "CROSSKD_HOLDER"
"""In the environment of a command that the holder of a folder has somebody else start, as Ray: `this_holder`."""
_held: List[int] = []
_guard = threading.Lock()


@contextlib.contextmanager
def held_locks() -> Iterator[Tuple[int, ...]]:
    """
    The file descriptors of the folders that this process holds; none is given back within the block.

    A process that inherits them holds them, too.
    """
    with _guard:
        yield tuple(_held)


@contextlib.contextmanager
def locked(folder: AnyPath, error_type: Type[PipelineError] = PipelineError) -> Iterator[None]:
    """
    Holds `folder`, which is made if need be, for the block: nobody else writes into it meanwhile.

    The lock is the system's own on the file `.lock` and ends with the processes that have it, however they end; the
    file only says who that is. A process that the holder has started, or has had started (HOLDER_VARIABLE), may write
    into the folder as well, and so may all that torchrun started together, of which the first one holds it.

    Raises:
        error_type: another process holds it; the message names that.
        PipelineError: the folder cannot be made or written.
    """
    if not is_first_process():
        yield
        return
    folder = Path(folder)
    made = _make_folder(folder)
    try:
        handle = _acquire(folder, error_type)
        if handle is None:  # by the process that started this one, which removes the file
            yield
            return
        with _guard:
            _held.append(handle)
        try:
            yield
        finally:
            with _guard, contextlib.suppress(OSError):
                _held.remove(handle)
                (folder / LOCK).unlink()
                unlock(handle)
    finally:
        for empty in made:
            with contextlib.suppress(OSError):  # not empty
                empty.rmdir()


def _make_folder(folder: Path) -> List[Path]:
    """Makes the folder; returns those that were not there before, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return missing


def _not_writable(folder: Path, error: OSError) -> PipelineError:
    return PipelineError(f"cannot write {folder}: {error.strerror}. Give a folder that can be written.")


def _acquire(folder: Path, error_type: Type[PipelineError]) -> Optional[int]:
    """The locked file, open; None if the process that started this one has it."""
    path = folder / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise _not_writable(folder, error) from error
        try:
            lock(handle)
        except BlockingIOError:
            unlock(handle)
            holder = _read_holder(path)
            name = _name_of(holder.get("host"), holder.get("pid"))
            if name in (_name_of(socket.gethostname(), os.getppid()), os.environ.get(HOLDER_VARIABLE)):
                return None
            raise error_type(_message(folder, holder)) from None
        except OSError as error:
            print(f"note: {folder} cannot be locked ({error.strerror}): see that nothing else writes into it",
                  file=sys.stderr)  # fmt: skip
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        unlock(handle)  # its holder has just ended, and removed it
    note = {
        "command": " ".join(this_command()),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(note).encode(), 0)
    return handle


def this_holder() -> str:
    """The name of this process, for HOLDER_VARIABLE: a command that is given it may write into what this one holds."""
    return _name_of(socket.gethostname(), os.getpid())


def _name_of(host: Any, pid: Any) -> str:
    return f"{host}:{pid}"


def _read_holder(path: Path) -> Dict[str, Any]:
    """What the holder of a locked file noted; empty if that cannot be read."""
    for _ in range(20):  # it may be about to write
        with contextlib.suppress(OSError, ValueError):
            holder = json.loads(path.read_bytes())
            if isinstance(holder, dict):
                return holder
        time.sleep(0.01)
    return {}


def _message(folder: Path, holder: Dict[str, Any]) -> str:
    who = "another process"
    if holder:
        pid, host = holder.get("pid"), holder.get("host")
        where = f"process {one_line(pid, 20)} on {one_line(host, 80)}, since {one_line(holder.get('since'), 40)}"
        who = f"{one_line(holder.get('command'), 200)} ({where})"
        if host == socket.gethostname() and not _is_running(pid):
            who = f"a process that was started by {who}, which has ended,"
    return f"{who} is writing into {folder}. Wait for it, end it, or give another folder."


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
