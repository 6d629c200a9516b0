"""What a training shows, and what it only writes down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from crosskd import distill
from crosskd.loop.runner import keep_narrow_strides_contiguous


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


def test_a_narrow_strided_convolution_has_its_input_in_the_default_layout() -> None:
    """Its backward pass in channels_last ends the process with a segmentation fault, one time in two."""
    narrow, wide = nn.Conv2d(8, 16, 1, 2), nn.Conv2d(16, 16, 1, 2)
    model = nn.Sequential(narrow, wide).to(memory_format=torch.channels_last)
    keep_narrow_strides_contiguous(model)
    seen = {}
    for name, module in (("narrow", narrow), ("wide", wide)):
        module.register_forward_hook(lambda _module, inputs, _outputs, name=name: seen.update({name: inputs[0]}))
    images = torch.randn(4, 8, 24, 24).to(memory_format=torch.channels_last)
    outputs = model(images)
    assert seen["narrow"].is_contiguous()
    assert wide._forward_pre_hooks == {}
    torch.testing.assert_close(outputs, wide(nn.functional.conv2d(images, narrow.weight, narrow.bias, 2)))
