"""
SSH to a board, as `benchmarks.fleet` needs it: files there and back, and one command at a time, each with a deadline.

Keys alone are tried, of the agent, of key files and as ~/.ssh/config says (which may also name a ProxyJump); the host
key is always compared with known hosts. The package is asyncssh (EPL-2.0, used as it is): it knows ProxyJump, its
calls can be ended at a deadline, and it needs `cryptography` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import shlex
from pathlib import Path
from typing import Any, AsyncIterator, Awaitable, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar

from benchmarks.board_list import Board
from deploy.errors import MeasurementError, MissingDependencyError

CONNECT_S = 30.0
KEEPALIVE_S = 15.0
"""A board that answers none of three such questions has gone."""
GRACE_S = 30.0
"""What the board gets, after its own deadline for a command, to end it and to say so."""
KILL_AFTER_S = 10
ENDED_LATE = (124, 137)
"""Status of coreutils' `timeout`: ended by TERM, or by the KILL that follows; busybox's gives the signal's, 143."""
KNOWN_HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
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
        BoardError: it does not answer, its host key is not the known one, or it takes none of our keys; or what is
            done inside fails.
    """
    import asyncssh

    known = _KnownHosts(board)
    given = {"port": board.port, "username": board.user, "client_keys": board.key and [str(board.key)]}
    try:
        with _explained(f"no connection to {board.host}", CONNECT_S):
            connection = await asyncio.wait_for(
                asyncssh.connect(
                    board.host,
                    **{name: value for name, value in given.items() if value is not None},
                    known_hosts=known.match,
                    preferred_auth=["publickey"],
                    password_auth=False,
                    kbdint_auth=False,
                    gss_auth=False,
                    gss_kex=False,
                    host_based_auth=False,
                    keepalive_interval=KEEPALIVE_S,
                ),
                CONNECT_S,
            )
    except asyncssh.HostKeyNotVerifiable as error:
        raise BoardError(known.words()) from error
    except asyncssh.PermissionDenied as error:
        raise BoardError(
            f"{board.host} takes none of our keys ({_printable(error)}); put the public key into its authorized_keys "
            "(ssh-copy-id), and see that boards.toml names its user and key, or that ssh-add -l lists the key"
        ) from error
    except asyncssh.KeyEncryptionError as error:
        raise BoardError(_OF_KEY.format(board.key or "a key", error)) from error
    except asyncssh.KeyImportError as error:
        raise BoardError(_OF_KEY.format(board.key or "a key", error)) from error
    except ValueError as error:  # of ~/.ssh/config
        raise BoardError(f"no connection to {board.host}: {_printable(error)}; see ~/.ssh/config") from error
    try:
        with _explained("no files can be sent (SFTP)", CONNECT_S):
            sftp = await asyncio.wait_for(connection.start_sftp_client(), CONNECT_S)
            home = await asyncio.wait_for(sftp.realpath("."), CONNECT_S)
        yield Remote(board, connection, sftp, str(home))
    finally:
        connection.close()
        with contextlib.suppress(asyncio.TimeoutError, OSError, asyncssh.Error):
            await asyncio.wait_for(connection.wait_closed(), GRACE_S / 10)
        connection.abort()


_OF_KEY = "{} cannot be used: {}; load a key that has a passphrase into the agent (ssh-add), and leave out `key`"


class _KnownHosts:
    """Looks the board up among the known hosts, and remembers what it found."""

    def __init__(self, board: Board) -> None:
        files = [board.known_hosts] if board.known_hosts else [Path(name).expanduser() for name in KNOWN_HOSTS]
        self._files = [str(path) for path in files if path.is_file()]
        self._host, self._is_known = board.host, False

    def match(self, host: str, address: str, port: Optional[int]) -> Any:
        """What asyncssh asks of `known_hosts`: the host, and its port if that is not 22."""
        import asyncssh

        self._host = f"[{host}]:{port}" if port else host
        found = asyncssh.match_known_hosts(self._files, host, address, port)
        self._is_known = bool(found[0])
        return found

    def words(self) -> str:
        """What to do about a host key that is not the known one."""
        files = ", ".join(self._files) or "known hosts (there is no such file)"
        if self._is_known:
            return (
                f"the host key of {self._host} is not the one in {files}: the board was set up anew, or another machine "
                f"answers in its place. Find out which; in the first case ssh-keygen -R '{self._host}', then connect "
                "once with ssh and compare the fingerprint"
            )
        return (
            f"the host key of {self._host} is not in {files}; connect once with ssh, and compare the fingerprint with "
            "that on the board (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub)"
        )


class Remote:
    """An open connection to a board."""

    def __init__(self, board: Board, connection: Any, sftp: Any, home: str) -> None:
        self.board = board
        self._connection, self._sftp, self._home = connection, sftp, home

    def path(self, path: str) -> str:
        """`path` with the home folder on the board in place of ~."""
        return posixpath.join(self._home, path[2:]) if path.startswith("~/") else path

    async def upload(self, local: Path, remote: str) -> bool:
        """
        Copies the folder `local`; False if `remote` is there already.

        Each file is renamed when it is whole, and so is the folder: what a cut leaves behind, the next call goes on
        from. Whether the contents are right, run.py says by the manifest's hashes.

        Raises:
            BoardError: the connection is lost, it takes longer than the board's timeout_s, or its disk is full.
        """
        with _explained("upload", self.board.timeout_s):
            return await asyncio.wait_for(self._upload(local, remote), self.board.timeout_s)
        raise AssertionError("_explained raises")

    async def _upload(self, local: Path, remote: str) -> bool:
        if await self._sftp.exists(remote):
            return False
        part = f"{remote}.part"
        for path in sorted(path for path in local.rglob("*") if path.is_file()):
            target = f"{part}/{path.relative_to(local).as_posix()}"
            if not await self._sftp.exists(target):
                await self._sftp.makedirs(posixpath.dirname(target), exist_ok=True)
                await self._sftp.put(str(path), f"{target}.part")
                await self._sftp.posix_rename(f"{target}.part", target)
        await self._sftp.rename(part, remote)
        return True

    async def read(self, path: str, most: int) -> Optional[bytes]:
        """
        The content of a file; None if there is none.

        Raises:
            BoardError: it has over `most` bytes, or the connection is lost.
        """
        with _explained(path, CONNECT_S):
            content = await asyncio.wait_for(self._read(path, most + 1), CONNECT_S)
        if content is not None and len(content) > most:
            raise BoardError(f"{path} has over {most >> 10} KiB; expected a small file of run.py")
        return content

    async def _read(self, path: str, size: int) -> Optional[bytes]:
        if not await self._sftp.exists(path):
            return None
        async with self._sftp.open(path, "rb") as file:
            return await file.read(size)

    async def run(self, folder: str, words: List[str], output: bytearray) -> None:
        """
        Runs `run.py WORDS` in `folder`. The board itself ends it at timeout_s, even if the connection is lost.

        Args:
            output: stdout and stderr are appended, whatever happens; the last MOST_OUTPUT bytes of them.

        Raises:
            CommandError: its status is not 0, or it took longer than the board's timeout_s.
            BoardError: the connection is lost, or the board does not answer any more.
        """
        board = self.board
        late = f"not done after {board.timeout_s:g} s (timeout_s), and ended"
        with _explained(f"run.py {words[0]}", board.timeout_s + GRACE_S):
            status = await asyncio.wait_for(self._run(folder, words, output), board.timeout_s + GRACE_S)
        if status in ENDED_LATE:
            raise CommandError(late)
        if status is None:
            raise BoardError("the connection was lost")
        if status != 0:
            raise CommandError(_reason(output, status, folder))

    async def _run(self, folder: str, words: List[str], output: bytearray) -> Optional[int]:
        import asyncssh

        command = command_line(
            folder, self.path(self.board.python), words, self.board.environment, self.board.timeout_s
        )
        process = await self._connection.create_process(
            command, stdin=asyncssh.DEVNULL, stderr=asyncssh.STDOUT, encoding=None
        )
        try:
            while True:
                block = await process.stdout.read(1 << 16)
                if not block:
                    break
                output += block
                del output[:-MOST_OUTPUT]
            await process.wait_closed()
        finally:
            if process.exit_status is None:
                process.terminate()
        return process.exit_status


def command_line(folder: str, python: str, words: List[str], environment: Mapping[str, str], timeout_s: float) -> str:
    """
    The one command that is ever run on a board, for its shell: our run.py, with an end.

    -u, so that what was printed is not lost when it is ended.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    limit = ["timeout", "-k", str(KILL_AFTER_S), f"{timeout_s:g}"]
    run = ["env", *variables, *limit, python, "-u", "run.py", *words]
    return f"cd {shlex.quote(folder)} && exec {' '.join(map(shlex.quote, run))}"


def _reason(output: bytearray, status: int, folder: str) -> str:
    """Why a command failed: its own last error, or its last line."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
    reason = printable((errors or lines or [f"ended with status {status}, without a word"])[-1])
    if "Unpack the bundle again" in reason:
        reason += f" (remove {folder} on the board, and run this command again)"
    return reason


def printable(text: str) -> str:
    """What a board sent, in one line that no terminal obeys."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:500].strip()


@contextlib.contextmanager
def _explained(what: str, seconds: float) -> Iterator[None]:
    """Turns what SSH and sockets raise into a BoardError, but for what `connected` has its own words for."""
    import asyncssh

    try:
        yield
    except asyncio.TimeoutError as error:  # an OSError from Python 3.11 on
        raise BoardError(f"{what}: no answer within {seconds:g} s") from error
    except (asyncssh.HostKeyNotVerifiable, asyncssh.PermissionDenied):
        raise
    except (asyncssh.Error, OSError) as error:
        raise BoardError(f"{what}: {printable(str(error)) or type(error).__name__}") from error
