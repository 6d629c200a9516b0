"""crosskd.workers.export_untrained: a recipe with random weights, as large as is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosskd.recipes import FOLDER
from crosskd.workers import export_untrained
from deploy.contract import load_contract, read_sidecar

RECIPE = str(FOLDER / "gfl_nano.py")


def test_a_recipe_is_exported_at_a_size_and_for_so_many_classes(tmp_path: Path) -> None:
    path = tmp_path / "nano.onnx"
    assert export_untrained.main([RECIPE, "--side", "96", "--classes", "3", "-o", str(path)]) == 0
    contract = load_contract(path)
    assert contract.input_shape == (1, 3, 96, 96)
    assert len(contract.class_names) == 3
    assert read_sidecar(path)["inputs"]["config"]["file"] == RECIPE


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--side", "100"], "--side is 100; expected a multiple of 32"),
        (["--side", "96", "--classes", "0"], "--classes is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_is_one_message(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_untrained.main([RECIPE, *words, "-o", str(tmp_path / "nano.onnx")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}")
    assert not list(tmp_path.iterdir())
