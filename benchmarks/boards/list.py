"""
The boards of `benchmarks.fleet`, from a TOML file: one [[board]] each. `docs/boards.example.toml` shows every key.

No password can be given: a file that a team shares is no place for it. Keys come from the agent or from key files.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional, Tuple, Union

from benchmarks.toml_file import read_toml
from deploy.board.archive import NAME
from deploy.board.commands import SOURCE_OF
from deploy.errors import ConfigError
from deploy.files import AnyPath
from deploy.schema import LINE, Choice, Items, Matching, Maybe, Number, Whole, check_content, short
from deploy.tensorrt.options import BuildOptions, add_build_arguments, options_from_arguments

HOST = r"[A-Za-z0-9_.:%@][A-Za-z0-9_.:%@-]*"
"""A host name, an address, an alias of ~/.ssh/config or a user; nothing that a ProxyCommand could misread."""
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
PRECISIONS = tuple(SOURCE_OF["tensorrt"])
"""Of all runtimes: those of TensorRT are some of the others', too."""
SECRETS = ("password", "passphrase")
KINDS: Dict[str, Any] = {
    "name": Matching(NAME.pattern, "letters, digits, '.', '_' and '-': it becomes a folder"),
    "host": Matching(HOST, "a host name, an address or an alias of ~/.ssh/config"),
    "port": Maybe(Whole(1, 65535)),
    "user": Maybe(Matching(HOST, "a user on the board")),
    "key": Maybe(LINE),
    "known_hosts": Maybe(LINE),
    "folder": Maybe(Matching(f"~?/{LINE.pattern}", "a path on the board that starts with / or ~/")),
    "python": Maybe(LINE),
    "runtime": Maybe(Choice(tuple(SOURCE_OF))),
    "precisions": Maybe(Items(Choice(PRECISIONS), 1, len(PRECISIONS))),
    "build": Maybe(([LINE], {str: [LINE]})),
    "timeout_s": Maybe(Number(0.001, 1e7)),
    "environment": Maybe({str: (LINE, Matching("", "an empty string"))}),
}
"""Table of a [[board]], but for what its values say of each other."""


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
    build: Mapping[str, Tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Precision -> further words for `run.py build`, such as --workspace-mib 1024."""
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
        if key not in KINDS:
            raise ConfigError(f"{where}: unknown key {key!r:.60}; expected some of {', '.join(KINDS)}")
    check_content(entry, KINDS, where, ConfigError)
    for name in entry.get("environment", {}):
        if not re.fullmatch(VARIABLE, name):
            raise ConfigError(f"{where}: environment has {name!r:.60}; expected the name of a variable")
    fields = dict(entry)
    for key in ("key", "known_hosts"):
        if key in entry:
            fields[key] = Path(path).parent / os.path.expanduser(entry[key])
            if not fields[key].is_file():
                raise ConfigError(f"{where}: {key} is {short(entry[key])}, and {short(str(fields[key]))} is no file")
    if "precisions" in entry:
        if len(set(entry["precisions"])) < len(entry["precisions"]):
            raise ConfigError(f"{where}: precisions is {entry['precisions']}; expected each once")
        fields["precisions"] = tuple(entry["precisions"])
    if "build" in entry:
        fields["build"] = _build_words(entry["build"], where)
    board = Board(**fields)
    if board.build and board.runtime != "tensorrt":
        raise ConfigError(f"{where} has build, but nothing is built for the runtime {board.runtime}: leave it out")
    unknown = set(board.precisions) - set(SOURCE_OF[board.runtime])
    if unknown:
        raise ConfigError(
            f"{where}: precisions has {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(SOURCE_OF[board.runtime])} for the runtime {board.runtime}"
        )
    return board


def _build_words(given: Union[List[str], Dict[str, List[str]]], where: str) -> Dict[str, Tuple[str, ...]]:
    """Precision -> words, of a list for all precisions or a table by precision."""
    words = given if isinstance(given, dict) else dict.fromkeys(PRECISIONS, given)
    unknown = set(words) - set(PRECISIONS)
    if unknown:
        raise ConfigError(
            f"{where}: build has {', '.join(map(short, sorted(unknown)))}; expected some of {', '.join(PRECISIONS)}"
        )
    return {precision: tuple(of_precision) for precision, of_precision in words.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_options(board: Board, precision: str) -> BuildOptions:
    """
    What a board's `build` asks for.

    Raises:
        ConfigError: it is no option of `run.py build`, or one that the fleet gives itself, or they do not go together.
    """
    parser = _Parser(prog="run.py build", add_help=False, allow_abbrev=False)
    add_build_arguments(parser, precision)
    try:
        options = options_from_arguments(parser.parse_args(list(board.build.get(precision, ()))))
    except ConfigError as error:
        by_precision = ""
        if "--scales is given with" in str(error):
            by_precision = '. For some precisions alone: build = { int8 = ["--scales", ...] }'
        raise ConfigError(f"build, for {precision}: {error}{by_precision}") from error
    if options.precision != precision:
        raise ConfigError(f"build has --{options.precision}; expected that in precisions")
    return options


def _check_distinct(path: AnyPath, boards: List[Board], what: str, value: Callable[[Board], Any]) -> None:
    seen: Dict[Any, Board] = {}
    for board in boards:
        other = seen.setdefault(value(board), board)
        if other is not board:
            raise ConfigError(
                f"{path}: {other.name} and {board.name} have the same {what}; expected each board once, since results "
                "lie by name and one board measures one engine at a time"
            )
