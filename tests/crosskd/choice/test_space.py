"""The students that are looked at: enough of them, their configs read back, and multiplications counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crosskd.choice import space
from crosskd.choice.search import Candidate
from crosskd.choice.space import BACKBONES, HEADS, SIDES_PX, config_of, config_text
from crosskd.config import load_config
from crosskd.models.detector import detector_from_config


def test_there_are_at_least_sixty() -> None:
    assert len(BACKBONES) * len(HEADS) * len(SIDES_PX) >= 60


def test_multiplications_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "SIDES_PX", (64,))
    (macs,) = space._macs("mobilenetv4_conv_small_050", 32, 1)
    detector = detector_from_config(config_of(Candidate("mobilenetv4_conv_small_050", 32, 1, 64, 0))).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.bbox_head(detector.extract_feat(torch.zeros(1, 3, 64, 64)))
    assert 2 * macs == counter.get_total_flops()


def test_a_candidates_file_is_its_config(tmp_path: Path) -> None:
    candidate = Candidate("mobilenetv4_conv_small_050", 64, 2, 416, 0)
    (tmp_path / "student.py").write_text(config_text(candidate, "A comment."))
    found, expected = load_config(tmp_path / "student.py"), config_of(candidate)
    assert found.model.to_dict() == expected.model.to_dict()
    assert found.train_dataloader.to_dict() == expected.train_dataloader.to_dict()
