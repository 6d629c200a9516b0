"""
SSH to a board, as `benchmarks.fleet` needs it: files there and back, and one command at a time, each with a deadline.

Keys alone are tried: of the agent, of key files, as ~/.ssh/config says. It may also name a ProxyJump, whose host key is
looked up as it says; that of the board is always compared with known hosts, whatever it says.

The package is asyncssh (EPL-2.0, used as it is): it reads ~/.ssh/config, its calls can be ended at a deadline, and it
needs little more than `cryptography`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import posixpath
import shlex
import socket
import time
from pathlib import Path
from typing import Any, AsyncIterator, Awaitable, Dict, List, Mapping, Optional, Set, TypeVar

from benchmarks.boards.list import Board
from deploy.errors import MeasurementError, MissingDependencyError, one_line

CONNECT_S = 30.0
KEEPALIVE_S = 15.0
"""A board that answers none of three such questions has gone."""
CLOSE_S = 3.0
GRACE_S = 30.0
"""What the board gets, after its own deadline for a command, to end it and to say so."""
KILL_AFTER_S = 10
ENDED_LATE = (124, 137, 143)
"""Status of `timeout` after its limit: coreutils' after TERM, both after KILL, busybox's after TERM."""
KNOWN_HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
LOCK = """
import fcntl, os, sys, time
if sys.version_info < (3, 8):
    sys.exit("this is Python %d.%d; expected 3.8 or newer: name it as `python` in boards.toml" % sys.version_info[:2])
os.makedirs(sys.argv[1], exist_ok=True)
file = open(os.path.join(sys.argv[1], ".lock"), "a+")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    file.seek(0)
    sys.exit("busy: " + file.read(300))
file.truncate(0)
file.write(sys.argv[2])
file.flush()
sys.stdout.write("held %.1f\\n" % time.time())
sys.stdout.flush()
sys.stdin.read()
"""
"""Run by a board's Python, of whatever version: says the time, and holds its folder until the connection ends."""
MOST_AT_ONCE = 16
"""Images that are sent at the same time."""
LEAST_FREE_BYTES = 1 << 20
"""On a board's disk; with less it counts as full."""
LOST = ". Did it restart? Run this command again when it is back: it goes on from there"
MOST_OUTPUT = 1 << 20
"""Bytes of a command's output that are kept, the last ones."""

T = TypeVar("T")


class BoardError(MeasurementError):
    """A board cannot be reached, or does not do what it was asked."""


class CommandError(BoardError):
    """A command on a board failed or took too long; the board itself still answers."""


def check_asyncssh() -> None:
    """Raises MissingDependencyError if the package is not installed."""
    try:
        import asyncssh  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("asyncssh", "benchmarks.fleet", "pip install 'crosskd[fleet]'") from error


@contextlib.asynccontextmanager
async def connected(board: Board) -> AsyncIterator[Remote]:
    """
    Yields the open connection to `board`.

    Raises:
        BoardError: it does not answer, its host key is not the known one, or it takes none of our keys.
    """
    connection = await _connect(board)
    try:
        sftp = await _within(CONNECT_S, "no files can be sent (SFTP)", connection.start_sftp_client())
        home = await _within(CONNECT_S, "no home folder", sftp.realpath("."))
        yield Remote(board, connection, sftp, home)
    finally:
        connection.close()
        with contextlib.suppress(BoardError):
            await _within(CLOSE_S, "not closed", connection.wait_closed())
        connection.abort()


async def _connect(board: Board) -> Any:
    import asyncssh

    known = _KnownHosts(board)
    given = {"port": board.port, "username": board.user, "client_keys": [str(board.key)] if board.key else None}
    connecting = asyncssh.connect(
        board.host,
        **{name: value for name, value in given.items() if value is not None},
        known_hosts=known.match,
        preferred_auth=["publickey"],
        password_auth=False,
        kbdint_auth=False,
        gss_auth=False,
        gss_kex=False,
        host_based_auth=False,
        agent_forwarding=False,
        x11_forwarding=False,
        keepalive_interval=KEEPALIVE_S,
    )
    try:
        return await _within(CONNECT_S, f"no connection to {board.host}", connecting)
    except ValueError as error:  # a key that cannot be read, or ~/.ssh/config
        raise BoardError(
            f"no connection to {board.host}: {one_line(error)}. See {board.key or '~/.ssh/config'}; a key that "
            "has a passphrase goes into the agent (ssh-add), and `key` is left out"
        ) from error
    except BoardError as error:
        if isinstance(error.__cause__, asyncssh.HostKeyNotVerifiable):
            raise BoardError(known.words(error)) from error
        if isinstance(error.__cause__, asyncssh.PermissionDenied):
            raise BoardError(
                f"{error}, none of our keys will do; put the public key into its authorized_keys (ssh-copy-id), and "
                "see that boards.toml names its user and key, or that ssh-add -l lists the key"
            ) from error
        raise


class _KnownHosts:
    """Looks the board up among the known hosts, and remembers what it found."""

    def __init__(self, board: Board) -> None:
        files = [board.known_hosts] if board.known_hosts else [Path(os.path.expanduser(name)) for name in KNOWN_HOSTS]
        self._files = [str(path) for path in files if path.is_file()]
        self._host, self._is_known = "", False

    def match(self, host: str, address: str, port: Optional[int]) -> Any:
        """What asyncssh asks of `known_hosts`: the host, and its port if that is not 22."""
        import asyncssh

        self._host = f"[{host}]:{port}" if port else host
        keys = asyncssh.match_known_hosts(self._files, host, address, port)
        self._is_known = bool(keys[0])
        return keys

    def words(self, error: BoardError) -> str:
        """What to do about a host key that is not the known one."""
        if not self._host:  # the board was not reached
            return f"{error}, which is a ProxyJump; connect once with ssh, and compare the fingerprint"
        files = ", ".join(self._files) or "known hosts (there is no such file)"
        if self._is_known:
            return (
                f"the host key of {self._host} is not the one in {files}: the board was set up anew, or another "
                f"machine answers in its place. Find out which; in the first case ssh-keygen -R '{self._host}', then "
                "connect once with ssh and compare the fingerprint"
            )
        return (
            f"the host key of {self._host} is not in {files}; connect once with ssh, and compare the fingerprint with "
            "that on the board (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub)"
        )


class Remote:
    """An open connection to a board."""

    def __init__(self, board: Board, connection: Any, sftp: Any, home: str) -> None:
        self.board = board
        self.clock_off_s = 0.0
        """By how much the board's clock of the day was ahead of ours when it was locked."""
        self._connection, self._sftp, self._home = connection, sftp, home

    def path(self, path: str) -> str:
        """`path` with the home folder on the board in place of ~."""
        return posixpath.join(self._home, path[2:]) if path.startswith("~/") else path

    @contextlib.asynccontextmanager
    async def held(self, limit_s: float) -> AsyncIterator[None]:
        """
        Holds the board's folder for the block, so that no other fleet builds or measures there meanwhile.

        Args:
            limit_s: after so long the board gives it free, if it was not told that the connection is lost.

        Raises:
            BoardError: another fleet holds it, or it cannot be held.
        """
        import asyncssh

        user = os.environ.get("USER") or os.getuid()
        who = f"{user}@{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T %z')}"
        words = [self.path(self.board.python), "-c", LOCK, self.path(self.board.folder), who]
        command = shlex.join(["timeout", "-k", str(KILL_AFTER_S), str(math.ceil(limit_s)), *words])
        process = await _within(
            CONNECT_S,
            "it cannot be locked",
            self._connection.create_process(command, stderr=asyncssh.STDOUT, encoding=None, request_pty=False),
        )
        try:
            answer = await _within(CONNECT_S, "it cannot be locked", process.stdout.readline())
            if answer.startswith(b"busy: "):
                raise BoardError(
                    f"another fleet is at it ({one_line(answer[6:].decode(errors='replace'))}); wait for it, and run "
                    "this command again"
                )
            if not answer.startswith(b"held "):
                answer += await _within(CONNECT_S, "it cannot be locked", process.stdout.read())
                last = (answer.decode(errors="replace").strip() or "no answer").splitlines()[-1]
                raise BoardError(f"it cannot be locked: {one_line(last)}")
            self.clock_off_s = float(answer[5:]) - time.time()
            yield
        finally:
            process.close()

    async def upload(self, local: Path, remote: str) -> bool:
        """
        Copies the folder `local`; False if `remote` is there already.

        Each file is renamed when it is whole, and so is the folder: what a cut leaves behind, the next call goes on
        from. Whether the contents are right, run.py says by the manifest's hashes.

        Raises:
            BoardError: the connection is lost, it takes longer than the board's timeout_s, or its disk is full.
        """
        if await _within(CONNECT_S, "upload", self._sftp.exists(remote)):
            return False
        files = {path.relative_to(local).as_posix(): path for path in local.rglob("*") if path.is_file()}
        await self.send_files(dict(sorted(files.items())), f"{remote}.part", "upload", at_once=1)
        await _within(CONNECT_S, "upload", self._sftp.rename(f"{remote}.part", remote))
        return True

    async def send_files(self, files: Mapping[str, Path], folder: str, what: str, at_once: int = MOST_AT_ONCE) -> int:
        """
        Copies files (path inside `folder` -> file here), unless they are there in the same size; how many it copied.

        Each is renamed when it is whole, so that a next call goes on where this one was cut.

        Args:
            what: is done, for messages.
            at_once: so many at a time; many small ones would else wait for each other's answers.

        Raises:
            BoardError: the connection is lost, it takes longer than the board's timeout_s, or its disk is full.
        """
        try:
            return await _within(self.board.timeout_s, what, self._send_files(files, folder, what, at_once))
        except BoardError as error:
            free = await self._free_bytes(folder)
            if free is not None and free < LEAST_FREE_BYTES:
                raise BoardError(f"{what}: the board's disk is full. {_make_room(folder)}") from error
            raise

    async def _send_files(self, files: Mapping[str, Path], folder: str, what: str, at_once: int) -> int:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        for parent in sorted({posixpath.dirname(f"{folder}/{name}") for name in files}):
            await self._sftp.makedirs(parent, exist_ok=True)
        there = await self._sizes(folder, {posixpath.dirname(name) for name in files})
        missing = [name for name, size in sizes.items() if there.get(name) != size]
        needed, free = sum(sizes[name] for name in missing), await self._free_bytes(folder)
        if free is not None and needed + LEAST_FREE_BYTES > free:
            raise BoardError(
                f"{what}: the board has {free >> 20} MiB free, and {-(-needed >> 20)} MiB are to be sent. "
                f"{_make_room(folder)}"
            )
        slots = asyncio.Semaphore(at_once)

        async def send(name: str) -> None:
            async with slots:
                await self._sftp.put(str(files[name]), f"{folder}/{name}.part")
                await self._sftp.posix_rename(f"{folder}/{name}.part", f"{folder}/{name}")

        sending = [asyncio.ensure_future(send(name)) for name in missing]
        try:
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()
        return len(missing)

    async def _sizes(self, folder: str, parents: Set[str]) -> Dict[str, int]:
        """Path inside `folder` -> bytes, of the files in these folders inside it."""
        sizes = {}
        for parent in parents:
            async for entry in self._sftp.scandir(posixpath.join(folder, parent)):
                sizes[posixpath.join(parent, entry.filename)] = entry.attrs.size
        return sizes

    async def _free_bytes(self, folder: str) -> Optional[int]:
        """What this user may still write there; None where the server does not tell."""
        import asyncssh

        try:
            found = await asyncio.wait_for(self._sftp.statvfs(folder), CONNECT_S)
        except (asyncssh.Error, OSError, asyncio.TimeoutError):
            return None
        return int(found.bavail * found.frsize)

    async def write(self, path: str, content: bytes) -> None:
        """Writes a small file whole. Raises BoardError if it cannot be written, or the connection is lost."""
        await _within(CONNECT_S, path, self._write(path, content))

    async def _write(self, path: str, content: bytes) -> None:
        await self._sftp.makedirs(posixpath.dirname(path), exist_ok=True)
        async with self._sftp.open(f"{path}.part", "wb") as file:
            await file.write(content)
        await self._sftp.posix_rename(f"{path}.part", path)

    async def fetch(self, path: str, local: Path, most: int) -> None:
        """
        Copies a file of at most `most` bytes from the board.

        Raises:
            CommandError: it is larger.
            BoardError: it cannot be read, the connection is lost, or it takes longer than the board's timeout_s.
        """
        size = await _within(CONNECT_S, path, self._sftp.getsize(path))
        if size > most:
            raise CommandError(f"{path} has {size >> 20} MiB; expected at most {most >> 20}")
        await _within(self.board.timeout_s, path, self._sftp.get(path, str(local)))

    async def read(self, path: str, most: int) -> Optional[bytes]:
        """
        The content of a file, at most the first `most` bytes; None if there is none.

        Raises:
            BoardError: it cannot be read, or the connection is lost.
        """
        return await _within(CONNECT_S, path, self._read(path, most))

    async def _read(self, path: str, size: int) -> Optional[bytes]:
        if not await self._sftp.exists(path):
            return None
        async with self._sftp.open(path, "rb") as file:
            return await file.read(size)

    async def run(self, folder: str, words: List[str], output: bytearray) -> None:
        """
        Runs `run.py WORDS` in `folder`. The board itself ends it after timeout_s, even if the connection is lost.

        Args:
            output: stdout and stderr are appended, whatever happens; the last MOST_OUTPUT bytes of them are kept.

        Raises:
            CommandError: it failed, or took longer than timeout_s.
            BoardError: the connection is lost, or the board does not answer any more.
        """
        limit_s = self.board.timeout_s
        command = command_line(folder, self.path(self.board.python), words, self.board.environment, limit_s)
        start = time.monotonic()
        process = await _within(CONNECT_S, "no command can be run", self._start(command))
        try:
            await _within(limit_s + GRACE_S, "nothing more from the board", _drain(process, output))
        except BoardError as error:
            raise BoardError(f"{error}{LOST}") from error
        finally:
            if process.exit_status is None:
                process.terminate()  # OpenSSH before 7.9, or as root, refuses; there its own deadline ends it
        if process.exit_status is None:
            raise BoardError(f"the connection was lost{LOST}")
        if process.exit_status in ENDED_LATE and time.monotonic() - start >= limit_s:
            raise CommandError(f"not done after {limit_s:g} s (timeout_s), so it was ended")
        if process.exit_signal:
            signal = one_line(process.exit_signal[0])
            raise CommandError(f"ended by the signal {signal}" + (": out of memory?" if signal == "KILL" else ""))
        if process.exit_status != 0:
            raise CommandError(_reason(output, process.exit_status, folder))

    async def _start(self, command: str) -> Any:
        import asyncssh

        return await self._connection.create_process(
            command, stdin=asyncssh.DEVNULL, stderr=asyncssh.STDOUT, encoding=None, request_pty=False
        )


def _make_room(folder: str) -> str:
    return (
        f"Make room there, for example by removing folders of bundles that have served from "
        f"{posixpath.dirname(folder)}, and run this command again, which goes on from here"
    )


async def _drain(process: Any, output: bytearray) -> None:
    """Reads until the command ends, so that it never waits for us."""
    while True:
        block = await process.stdout.read(1 << 16)
        if not block:
            break
        output += block
        del output[:-MOST_OUTPUT]
    await process.wait_closed()


def command_line(folder: str, python: str, words: List[str], environment: Mapping[str, str], limit_s: float) -> str:
    """
    The one command that is run on a board, besides LOCK, for its shell: our run.py, with an end.

    -u, so that what was printed is not lost when it is ended; whole seconds, since busybox knows no others.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    limit = ["timeout", "-k", str(KILL_AFTER_S), str(math.ceil(limit_s))]
    run = ["env", *variables, *limit, python, "-u", "run.py", *words]
    return f"cd {shlex.quote(folder)} && exec {' '.join(map(shlex.quote, run))}"


def _reason(output: bytearray, status: int, folder: str) -> str:
    """Why a command failed: its own last error, or its last line."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
    reason = one_line((errors or lines or [f"ended with status {status}, without a word"])[-1])
    if "Unpack the bundle again" in reason:
        reason += f" (remove {folder} on the board, and run this command again)"
    return reason


async def _within(seconds: float, what: str, work: Awaitable[T]) -> T:
    """The result of `work`. Raises BoardError, which starts with `what`, if it fails or takes longer."""
    import asyncssh

    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as error:  # an OSError from Python 3.11 on
        raise BoardError(f"{what}: no answer within {seconds:g} s") from error
    except (asyncssh.Error, OSError) as error:
        raise BoardError(f"{what}: {one_line(error) or type(error).__name__}") from error
