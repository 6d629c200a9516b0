"""
Writes docs/commands.md, the reference of all commands, from what each of them says to --help: `make docs`.

argparse lays its help out otherwise in other versions of Python, so the page names the version that wrote it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from deploy.board import run
from deploy.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
WIDTH = 100
FOLDERS = {
    "crosskd": "Training",
    "deploy": "From a checkpoint to an engine",
    "calibration": "INT8",
    "benchmarks": "Measuring and judging",
}
"""Folder -> title of its commands."""
SUBCOMMANDS = {"benchmarks.studies.calibration": ("methods", "int8-aware", "distilled")}
"""Command -> words whose own help is shown, too."""
HEAD = """\
<!-- Written by `make docs` with Python {version}: do not edit. -->
# Commands

What each command says to `--help`. Exit status: 0, all is well; 1, a verdict other than "roll out"; 2, something is
wrong with the input or a board, and the message on stderr says what, and what to do; 3, a fault of the program, with a
traceback.
"""
ON_A_BOARD = "On a board: run.py"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of docs/commands.md."""
    contents, sections = [], []
    for folder, title in FOLDERS.items():
        contents.append(f"- {title}")
        sections.append(f"## {title}\n")
        for name in (name for name in COMMANDS if name.startswith(f"{folder}.")):
            command = importlib.import_module(name).main
            text = help_of(command)
            contents.append(f"  - [{name}](#{name.replace('.', '')}): {purpose(text)}")
            for word in SUBCOMMANDS.get(name, ()):
                text += "\n" + help_of(command, word)
            sections.append(f"### {name}\n\n```text\n{text}```\n")
    contents.append(f"- [{ON_A_BOARD}](#on-a-board-runpy)")
    board = help_of(lambda words: run.main(words, ROOT))
    sections.append(f"## {ON_A_BOARD}\n\nIn each archive of `deploy.bundle`:\n\n```text\n{board}```\n")
    return "\n".join([HEAD.format(version=python_version()), *contents, "", *sections])


def python_version() -> str:
    return "{}.{}".format(*sys.version_info[:2])


def help_of(command: Callable[[list[str]], int], *words: str) -> str:
    """What a command prints for --help behind `words`, WIDTH columns wide."""
    printed = io.StringIO()
    size = mock.patch.dict(os.environ, COLUMNS=str(WIDTH))
    with size, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command([*words, "--help"])
    return printed.getvalue()


def purpose(text: str) -> str:
    """The first sentence of the description: what stands between the usage and the arguments."""
    description = " ".join(text.split("\n\n")[1].split())
    return description.partition(". ")[0].rstrip(".")


if __name__ == "__main__":
    main()
