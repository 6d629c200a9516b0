"""Files that are whole or not there: atomic writing, hashes, JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Type, Union

from deploy.errors import PipelineError

AnyPath = Union[str, Path]
NO_TEXT = {
    b"\x1f\x8b": "it is packed by gzip: unpack it",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"version https://git-lfs": "it is a pointer of Git LFS: run git lfs pull",
}
"""First bytes of files that stand in the place of others -> what to do."""
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise PipelineError(
            f"cannot write {path}: {error}. Give an output path in a folder that can be written."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would keep the file from everybody else
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise PipelineError(f"cannot write {path}: {error.strerror}. Is the disk full? Free some space.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def check_writable(path: AnyPath) -> None:
    """
    Raises PipelineError if `path` cannot be written: asked before long work, so that nothing is lost after it.
    """
    with contextlib.suppress(_Abandon), replacing(path):
        raise _Abandon


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
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: AnyPath, error_type: Type[PipelineError], what: str) -> Any:
    """
    The parsed content of the JSON file at `path`.

    Raises:
        error_type: the file is missing, unreadable or not JSON; `what` says what it should have been.
    """
    try:
        content = Path(path).read_bytes()
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
