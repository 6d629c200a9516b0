"""
The boards of `benchmarks.fleet`, from a TOML file: one [[board]] each. `docs/boards.example.toml` shows every key.

No password can be given: a file that a team shares is no place for it. Keys come from the agent or from key files.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from benchmarks.toml_file import read_toml
from deploy.board.archive import NAME
from deploy.board.commands import SOURCE_OF
from deploy.errors import ConfigError
from deploy.files import AnyPath
from deploy.schema import Number, fault_of

HOST = re.compile(r"[A-Za-z0-9_.:%@][A-Za-z0-9_.:%@-]*")
"""A host name, an address, an alias of ~/.ssh/config or a user; nothing that a ProxyCommand could misread."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PRECISIONS = tuple(SOURCE_OF["tensorrt"])
"""Of all runtimes: those of TensorRT are some of the others', too."""
SECRETS = ("password", "passphrase")


@dataclasses.dataclass(frozen=True)
class Board:
    """One [[board]]. What is None is as ~/.ssh/config says, or as ssh does by default."""

    name: str
    host: str
    port: Optional[int] = None
    user: Optional[str] = None
    key: Optional[Path] = None
    known_hosts: Optional[Path] = None
    folder: str = "~/crosskd"
    """On the board; it gets a folder for each bundle."""
    python: str = "python3"
    runtime: str = "tensorrt"
    """What runs the model: 'tensorrt', or 'onnxruntime', for which nothing is built."""
    precisions: Tuple[str, ...] = ()
    """What to build, or to run; empty for the best that the bundle has."""
    timeout_s: float = 1800.0
    """For each step: upload, build, check, bench."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables for run.py, such as PYTHONPATH."""


def boards_from_file(path: AnyPath) -> List[Board]:
    """
    The boards of the TOML file `path`, in its order. A path of a key or known hosts counts from the folder of `path`.

    Raises:
        ConfigError: it is not TOML, or a key is missing, unknown, or has a value that it cannot have.
        MissingDependencyError: Python before 3.11 needs tomli.
    """
    document = read_toml(path, "a list of boards: lines [[board]], name = ... and host = ... for each")
    entries = document.get("board")
    others = sorted(set(document) - {"board"})
    if others or not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            f"{path} has {', '.join(others) or 'no [[board]]'}; expected one [[board]] for each board, and nothing else"
        )
    boards = [_board(path, number, entry) for number, entry in enumerate(entries, start=1)]
    _check_distinct(path, boards, "name", lambda board: board.name.lower())
    _check_distinct(path, boards, "host and port", lambda board: (board.host.lower(), board.port))
    return boards


def _board(path: AnyPath, number: int, entry: Mapping[str, Any]) -> Board:
    where = f"{path}: [[board]] {entry.get('name', number)!r:.60}"
    for secret in SECRETS:
        if secret in entry:
            raise ConfigError(
                f"{where} has a {secret}; expected none, since files are copied and committed. Put your public key on "
                "the board (ssh-copy-id), and load a key that has a passphrase into the agent (ssh-add)"
            )
    for key in entry:
        if key not in CHECKS:
            raise ConfigError(f"{where}: unknown key {key!r:.60}; expected some of {', '.join(CHECKS)}")
    for key in ("name", "host"):
        if key not in entry:
            raise ConfigError(f"{where} has no {key}; every board needs a name and a host")
    for key, value in entry.items():
        check, expected = CHECKS[key]
        if not check(value):
            raise ConfigError(f"{where}: {key} is {value!r:.80}; expected {expected}")
    fields = dict(entry)
    for key in ("key", "known_hosts"):
        if key in entry:
            fields[key] = Path(path).parent / os.path.expanduser(entry[key])
            if not fields[key].is_file():
                raise ConfigError(f"{where}: {key} is {entry[key]}, and {fields[key]} is no file")
    if "precisions" in entry:
        fields["precisions"] = tuple(entry["precisions"])
    board = Board(**fields)
    unknown = set(board.precisions) - set(SOURCE_OF[board.runtime])
    if unknown:
        raise ConfigError(
            f"{where}: precisions has {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(SOURCE_OF[board.runtime])} for the runtime {board.runtime}"
        )
    return board


def _check_distinct(path: AnyPath, boards: List[Board], what: str, value: Callable[[Board], Any]) -> None:
    seen: Dict[Any, Board] = {}
    for board in boards:
        other = seen.setdefault(value(board), board)
        if other is not board:
            raise ConfigError(
                f"{path}: {other.name} and {board.name} have the same {what}; expected each board once, since results "
                "lie by name and one board measures one engine at a time"
            )


def _is_number(value: Any) -> bool:
    return fault_of(value, Number(0)) is None and value > 0


def _is_word(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def _is_list_of_precisions(value: Any) -> bool:
    known = isinstance(value, list) and all(
        isinstance(precision, str) and precision in PRECISIONS for precision in value
    )
    return known and 0 < len(value) == len(set(value))


def _is_environment(value: Any) -> bool:
    return isinstance(value, dict) and all(
        VARIABLE.fullmatch(name) and (text == "" or _is_line(text)) for name, text in value.items()
    )


CHECKS: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "name": (_is_word(NAME), "letters, digits, '.', '_' and '-': it becomes a folder"),
    "host": (_is_word(HOST), "a host name, an address or an alias of ~/.ssh/config"),
    "port": (lambda value: type(value) is int and 0 < value < 1 << 16, "a number from 1 to 65535"),
    "user": (_is_word(HOST), "a user on the board"),
    "key": (_is_line, "a file with a private key"),
    "known_hosts": (_is_line, "a file with host keys, as ssh keeps in ~/.ssh/known_hosts"),
    "folder": (lambda value: _is_line(value) and value.startswith(("/", "~/")), "a path that starts with / or ~/"),
    "python": (_is_line, "a command or a path on the board"),
    "runtime": (lambda value: isinstance(value, str) and value in SOURCE_OF, f"one of {', '.join(SOURCE_OF)}"),
    "precisions": (_is_list_of_precisions, f"a list of some of {', '.join(PRECISIONS)}"),
    "timeout_s": (_is_number, "a positive number of seconds"),
    "environment": (_is_environment, "a table of names and strings"),
}
"""Key of a [[board]] -> whether a value will do, and what is expected."""
