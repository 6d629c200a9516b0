"""Files that are whole or not there: atomic writing, hashes, JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Set, Tuple, Type, Union

from deploy.errors import PipelineError, fault_of_storage

AnyPath = Union[str, Path]
NO_TEXT = {
    b"\x1f\x8b": "it is packed by gzip: unpack it",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"version https://git-lfs": "it is a pointer of Git LFS: run git lfs pull",
}
"""First bytes of files that stand in the place of others -> what to do."""
_locked: Set[int] = set()
"""The open files that this process has locked."""
UNFINISHED = ".unfinished-"
"""In the name of a file that is not yet whole."""


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """
    Yields a temporary path beside `path`; on success it is flushed and renamed to `path`, on failure removed.

    Where `path` is a link, it stays one: what it leads to is replaced, in its own folder.
    The suffix is that of `path`, since some writers choose the format by it.

    Raises:
        PipelineError: the folder cannot be made or written, `path` is there and no regular file, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if target.exists() and not target.is_file():  # as root, the rename would put a file in the place of a device
            raise OSError(f"{path} is a device, a pipe or a socket, not a file")
        handle, temporary = _temporary_beside(target)
    except OSError as error:
        raise PipelineError(
            f"cannot write {path}: {error}. Give an output path in a folder that can be written."
        ) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would keep the file from everybody else
        os.replace(temporary, target)
    except Exception as error:
        fault = fault_of_storage(error)
        if fault is None:
            raise
        raise PipelineError(f"cannot write {path}: {fault}") from error
    finally:
        unlock(handle)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def new_folder(path: AnyPath) -> Iterator[Path]:
    """
    Yields a temporary folder beside `path`; on success it is renamed to `path`, on failure removed with all in it.

    Raises:
        PipelineError: `path` is there already and no empty folder, its folder cannot be made or written, or the disk is
            full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{target} is there already")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise PipelineError(f"cannot write {path}: {error}. Give a new folder in one that can be written.") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep the folder from everybody else
        temporary.rename(target)
    except OSError as error:
        raise PipelineError(f"cannot write {path}: {error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is not there any more where all went well


def _temporary_beside(target: Path) -> Tuple[int, Path]:
    """A new file in the folder of `target`, locked as long as its handle is open: see `remove_leftovers`."""
    prefix = f".{target.stem[:40]}{UNFINISHED}"
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=target.suffix, dir=target.parent)
        with contextlib.suppress(OSError):  # a file system without locks, where leftovers stay
            lock(handle)
        if os.path.exists(name):  # else another process took it for a leftover before it was locked
            return handle, Path(name)
        unlock(handle)


def lock(handle: int) -> None:
    """
    Locks an open file until it is closed or its process ends, however that happens.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: this file system knows no locks.
    """
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _locked.add(handle)


def unlock(handle: int) -> None:
    """Closes a file that `lock` was asked to lock."""
    _locked.discard(handle)
    os.close(handle)


def _leave_locks_to_parent() -> None:
    """A fork, such as a worker that loads data, would else keep them when the process that writes is killed."""
    for handle in tuple(_locked):
        with contextlib.suppress(OSError):
            unlock(handle)


os.register_at_fork(after_in_child=_leave_locks_to_parent)


def remove_leftovers(folder: AnyPath) -> None:
    """Removes the temporary files in `folder` whose writer was killed: nobody has them locked."""
    for path in Path(folder).glob(f".*{UNFINISHED}*"):
        if re.search(rf"{re.escape(UNFINISHED)}[a-z0-9_]{{8}}(\.[^.]*)?$", path.name):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    lock(handle)
                    path.unlink()
                finally:
                    unlock(handle)


def check_writable(path: AnyPath) -> None:
    """
    Raises PipelineError if `path` cannot be written: asked before long work, so that nothing is lost after it.

    What an earlier run that was killed left half written beside it is removed.
    """
    with contextlib.suppress(_Abandon), replacing(path):
        raise _Abandon
    remove_leftovers(Path(os.path.realpath(path)).parent)


def user_cache(instead: str) -> Path:
    """
    Our folder among the user's caches, ~/.cache/crosskd.

    Raises:
        PipelineError: this user has no home folder; the message says to do `instead`.
    """
    try:
        return Path.home() / ".cache" / "crosskd"
    except RuntimeError as error:
        raise PipelineError(f"there is no home folder for a cache: HOME is not set. Set it, or {instead}") from error


class _Abandon(Exception):
    pass


def sha256_of(path: AnyPath) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: AnyPath, document: Dict[str, Any]) -> None:
    """Writes `document` atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        # A path with bytes that are no text has halves of surrogate pairs, which JSON can spell out.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def check_regular(path: AnyPath) -> None:
    """Raises OSError if something is at `path` that is no regular file: a device or a pipe may have no end."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "it is a folder, a device or a pipe, not a file")


def read_regular(path: AnyPath) -> bytes:
    """
    The bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is none.
    """
    check_regular(path)
    return Path(path).read_bytes()


def read_json(path: AnyPath, error_type: Type[PipelineError], what: str) -> Any:
    """
    The parsed content of the JSON file at `path`.

    Raises:
        error_type: the file is missing, unreadable or not JSON; `what` says what it should have been.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise error_type(f"cannot read {path} ({error.strerror}); expected {what}") from error
    try:
        return json.loads(content)  # UTF-8, with a byte order mark or without, or UTF-16
    except RecursionError as error:
        raise error_type(f"{path} is nested too deeply to be read; expected {what}") from error
    except ValueError as error:
        reason = stands_in_for(content) or ("" if content else "it is empty") or str(error)
        raise error_type(f"{path} is not JSON ({reason}); expected {what}") from error


def stands_in_for(content: bytes) -> str:
    """What a file is that stands in the place of another, by its first bytes, and what to do; or nothing."""
    return next((words for magic, words in NO_TEXT.items() if content.startswith(magic)), "")
