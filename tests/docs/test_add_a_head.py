"""The page "add a head": each of its blocks of Python runs as it stands."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("mmengine")

import crosskd.models.families  # noqa: F401  registers them
from crosskd.models.heads import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-a-head.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FILES = {block.split("\n")[0].removeprefix("# "): block for block in BLOCKS if block.startswith("# ")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the page's files; the families are afterwards what they were."""
    for name, block in FILES.items():
        (tmp_path / name).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(FAMILIES)
    yield tmp_path
    sys.modules.pop("fovea_family", None)
    FAMILIES.clear()
    FAMILIES.update(before)


def test_the_page_has_the_files_that_it_speaks_of() -> None:
    assert len(BLOCKS) == 5
    names = ["fovea_family.py", "crosskd_fovea_r50_r101_1x_coco.py", "check_fovea.py", "check_fovea_export.py"]
    assert list(FILES) == names


def test_the_head_of_the_page_is_a_new_one_and_passes_the_pages_check(folder: Path) -> None:
    assert "FoveaHead" not in FAMILIES
    exec(compile((folder / "check_fovea.py").read_text(), "check_fovea.py", "exec"), {"__name__": "check_fovea"})
    assert type(FAMILIES["FoveaHead"]).__name__ == "FoveaFamily"


def test_the_head_of_the_page_can_be_exported(folder: Path) -> None:
    importlib.import_module("fovea_family")
    code = compile((folder / "check_fovea_export.py").read_text(), "check_fovea_export.py", "exec")
    exec(code, {"__name__": "check_fovea_export"})
    assert (folder / "fovea.onnx").is_file()


def test_a_subclass_joins_the_family_of_its_parent(folder: Path) -> None:
    exec(BLOCKS[0], {})
    assert FAMILIES["MyGFLHead"] is FAMILIES["GFLHead"]


def test_the_files_and_names_that_the_page_mentions_are_there() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for name in re.findall(r"`(\w+\.py)`", PAGE.partition("less regular")[2]):
        assert (ROOT / "crosskd" / "models" / "families" / name).is_file(), name
    family = type(FAMILIES["GFLHead"])
    for name in (
        "towers", "tap_layers", "rest_of_head", "recorded_assignment", "outputs_as_in_eval", "loss_ld",
        "decode", "threshold_in_graph", "traceable", "note_of_export",
    ):  # fmt: skip
        assert f"`{name}`" in PAGE
        assert hasattr(family, name)
