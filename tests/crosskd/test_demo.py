"""The weights of the demo's teacher, which are in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.demo import half_weights
from crosskd.config import load_config, set_classes
from crosskd.models.checkpoint import load_detector_weights
from crosskd.models.detector import detector_from_config
from crosskd.shapes import CLASS_NAMES

DEMO = Path(__file__).parents[2] / "configs" / "demo"


def test_they_fit_their_config_and_the_drawn_classes() -> None:
    config = load_config(DEMO / "teacher.py")
    set_classes(config, CLASS_NAMES)
    load_detector_weights(detector_from_config(config), DEMO / "teacher.pth", CLASS_NAMES)
    assert torch.load(DEMO / "teacher.pth", weights_only=True)["meta"] == {"dataset_meta": {"classes": CLASS_NAMES}}
    assert (DEMO / "teacher.pth").stat().st_size < 10e6


def test_halved_weights_are_those_of_the_run_but_for_rounding(teacher_run: Path, tmp_path: Path) -> None:
    weights, half = teacher_run / "detector.pth", tmp_path / "half.pth"
    assert half_weights.main([str(weights), "-o", str(half)]) == 0
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (weights, half))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name].to(value.dtype), value, rtol=1e-3, atol=1e-6)
    assert half.stat().st_size < 0.6 * weights.stat().st_size


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "large.pth"
    torch.save({"state_dict": {"a": torch.full((2, 2), 1e6)}, "meta": {}}, path)
    assert half_weights.main([str(path), "-o", str(tmp_path / "half.pth")]) == 2
    assert "a has 4 of 4 values that are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "half.pth").exists()
