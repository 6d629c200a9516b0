"""crosskd.adopt: a detector that was trained elsewhere becomes a run directory like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosskd import adopt
from crosskd.run_dir import load_run
from deploy.contract import read_sidecar
from deploy.files import sha256_of


def _words(config: Path, checkpoint: Path, shapes_dir: Path, run_dir: Path) -> list[str]:
    return [str(config), "--checkpoint", str(checkpoint), "--data", str(shapes_dir), "-o", str(run_dir)]


def test_an_adopted_detector_is_a_run_with_the_same_weights(
    configs: Path, teacher_run: Path, shapes_dir: Path, tmp_path: Path
) -> None:
    checkpoint = teacher_run / "epoch_1.pth"  # mmengine's own, with an optimizer in it
    assert adopt.main(_words(configs / "gfl_tiny_teacher.py", checkpoint, shapes_dir, tmp_path)) == 0
    _, detector, sidecar = load_run(tmp_path)
    trained = torch.load(teacher_run / "detector.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(detector.state_dict()[key], value) for key, value in trained.items())
    assert sidecar["inputs"]["checkpoint"]["sha256"] == sha256_of(checkpoint)
    expected = read_sidecar(teacher_run / "detector.pth")["details"]
    assert {key: sidecar["details"][key] for key in ("class_names", "category_ids", "parameters")} == {
        key: expected[key] for key in ("class_names", "category_ids", "parameters")
    }


def test_another_detectors_weights_leave_nothing_behind(
    configs: Path, teacher_run: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(configs / "gfl_tiny.py", teacher_run / "detector.pth", shapes_dir, tmp_path / "run")
    assert adopt.main(words) == 2
    assert "is not a checkpoint of this GFL" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_of_a_detector_that_knows_more_classes_those_of_the_data_are_taken(
    configs: Path, teacher_run: Path, shapes_dir: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(teacher_run / "detector.pth", weights_only=True)
    known = checkpoint["meta"]["dataset_meta"]["classes"]
    state, more = checkpoint["state_dict"], ("house", *reversed(known))
    bias = torch.arange(7.0)
    rows = {"bbox_head.gfl_cls.bias": bias, "bbox_head.gfl_cls.weight": torch.randn(7, 16, 3, 3)}
    save = {"state_dict": {**state, **rows}, "meta": {"dataset_meta": {"classes": more}}}
    torch.save(save, tmp_path / "more.pth")
    config = configs / "gfl_tiny_teacher.py"
    assert adopt.main(_words(config, tmp_path / "more.pth", shapes_dir, tmp_path / "run")) == 0
    _, detector, _ = load_run(tmp_path / "run")
    assert detector.bbox_head.gfl_cls.bias.tolist() == [bias[more.index(name)] for name in known]
