"""docs/commands.md is what the commands say to --help."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "commands.py")))


def test_the_page_is_up_to_date(generator: SimpleNamespace) -> None:
    written_by = re.search(r"with Python ([\d.]+)", PAGE)[1]
    if written_by != generator.python_version():
        pytest.skip(f"help is laid out otherwise in Python {written_by}, which wrote the page")
    assert generator.page() == PAGE, "docs/commands.md is out of date; do: make docs"


def test_each_entry_of_the_contents_leads_to_a_heading_and_says_what_it_is_for() -> None:
    names = re.findall(r"^### (\S+)$", PAGE, re.MULTILINE)
    entries = re.findall(r"^  - \[(\S+)\]\(#(\S+)\): [A-Z].+[^.]$", PAGE, re.MULTILINE)
    assert entries == [(name, name.replace(".", "")) for name in names]
    assert len(names) == len(set(names)) >= 20
    assert names[0] == "crosskd.pipeline"


def test_no_line_is_wider_than_a_screen() -> None:
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    words = {line for block in blocks for line in block.splitlines() if len(line) > 120}
    assert not words
