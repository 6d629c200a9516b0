"""Rules of the layout that import-linter's contracts cannot say; the texts that describe it are true."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from benchmarks.toml_file import read_toml
from deploy.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("crosskd", "deploy", "calibration", "benchmarks")
every_package = pytest.mark.parametrize("package", PACKAGES)
MODULES: Dict[str, Path] = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(text: str) -> Iterator[str]:
    """The modules that a text imports, at its top or anywhere in it; `from a import b` may be the module a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_nobody_imports_a_command() -> None:
    """What two commands share stands in a room, or on the ground of the package."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    commands = {name for name, text in texts.items() if 'if __name__ == "__main__"' in text}
    assert commands == set(COMMANDS)
    found = {name: sorted(commands.intersection(imported(text))) for name, text in texts.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_an_import_is_seen_wherever_it_stands() -> None:
    text = (
        "def f():\n    from deploy import detect\n    import benchmarks.report as r\nfrom deploy.bundle import main\n"
    )
    assert {"deploy.detect", "benchmarks.report", "deploy.bundle"} <= set(imported(text))


def _docstring(folder: Path) -> str:
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""


def _described(package: str) -> List[List[str]]:
    """The names of each line of the docstring that starts with a dash, up to its colon."""
    lines = re.findall(r"^- ([\w, ]+):", _docstring(ROOT / package), re.MULTILINE)
    return [names.split(", ") for names in lines]


def _modules(package: str) -> Set[str]:
    return {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}


def _rooms(package: str) -> Set[str]:
    return {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}


def _commands(package: str) -> Set[str]:
    return {command.rpartition(".")[2] for command in COMMANDS if command.rpartition(".")[0] == package}


@every_package
def test_the_docstring_describes_each_room(package: str) -> None:
    """Or each file that is no command, of a package without rooms."""
    names = [name for line in _described(package) for name in line]
    assert len(names) == len(set(names)) > 3
    assert set(names) == (_rooms(package) or _modules(package) - _commands(package))


@every_package
def test_the_docstring_names_each_module_beside_the_rooms(package: str) -> None:
    words = set(re.findall(r"\w+", _docstring(ROOT / package)))
    assert not _modules(package) - words


@every_package
def test_the_docstring_names_the_commands(package: str) -> None:
    (names,) = re.findall(r"Commands: ([\w\s,]+)\.", _docstring(ROOT / package))
    assert sorted(re.split(r",\s+", names)) == sorted(_commands(package))


@every_package
def test_rooms_are_described_in_the_order_in_which_they_import(package: str) -> None:
    contracts = read_toml(ROOT / "pyproject.toml", "the project's")["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == [package]]
    floor = {name: index for index, layer in enumerate(layers) for name in re.findall(r"\w+", layer)}
    assert set(floor) == _rooms(package) | _modules(package)
    floors = [sorted({floor[name] for name in line}) for line in _described(package)]
    assert floors == sorted(floors)
    assert all(len(line) == 1 for line in floors)


@every_package
def test_each_room_says_what_it_is_for(package: str) -> None:
    for room in _rooms(package):
        assert _docstring(ROOT / package / room), room


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_each_file_that_a_page_for_developers_names_is_there(page: str) -> None:
    """Of a file that is to be made, such as `calibration/NAME.py`, the folder; it has one like it."""
    named = re.findall(r"`([\w./-]+)`", (ROOT / page).read_text(encoding="utf-8"))
    paths = [name for name in named if "/" in name and not name.startswith("..")]
    assert len(paths) > 30
    for path in paths:
        known = path.partition("PACKAGE" if "PACKAGE" in path else "NAME")[0]
        assert (ROOT / known).exists() or list(ROOT.glob(f"{known}*")), path


def test_the_files_that_a_function_is_said_to_stand_in_have_it() -> None:
    """Of docs/architecture.md: `FILE`, `NAME` and `NAME` (`FILE`)."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pairs = [(file, name) for name, file in re.findall(r"`([\w.]+)`\s+(?:\(|of\s+|in\s+)`([\w/]+\.py)`", text)]
    for file, names in re.findall(r"`([\w/]+\.py)`, ((?:`[\w.]+`(?:,? and |, )?)+)", text):
        pairs += [(file, name) for name in re.findall(r"`([\w.]+)`", names)]
    assert len(pairs) > 20
    for file, name in pairs:
        words = re.findall(r"\w+", (ROOT / file).read_text(encoding="utf-8"))
        assert set(name.split(".")) <= set(words), (file, name)
