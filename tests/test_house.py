"""Rules of the layout that import-linter's contracts cannot say."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator

from deploy.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("crosskd", "deploy", "calibration", "benchmarks")
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
