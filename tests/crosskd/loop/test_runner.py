"""What a training shows, and what it only writes down."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosskd import distill


def test_the_console_has_progress_and_the_log_file_everything(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "run")]
    assert distill.main([*words, "--teacher-checkpoint", str(teacher_run / "detector.pth")]) == 0
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    (log,) = (tmp_path / "run").glob("*/*.log")
    logged = log.read_text()
    assert "teacher: AP" in shown
    for words_of_progress in ("Epoch(train) [1][2/2]", "loss_cls_kd: ", "eta: ", "Epoch(val)"):
        assert words_of_progress in shown
        assert words_of_progress in logged
    for noise in ("System environment", "Hooks will be executed", "requires_grad=False", "train_pipeline"):
        assert noise not in shown
        assert noise in logged
    assert len(shown.splitlines()) < 60
