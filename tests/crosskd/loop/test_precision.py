"""The precision is measured, the measurement leaves no trace in the training, and a run goes on in the same one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd import train
from crosskd.config import load_config
from crosskd.data import TrainingData
from crosskd.loop import precision as measured
from crosskd.loop.precision import StepTimes, batch_of_training, fastest_precision, precision_asked_for, set_precision
from deploy.contract import read_sidecar
from deploy.dataset import load_coco
from deploy.errors import ConfigError
from deploy.layouts import split_paths

AUTO = "optim_wrapper.type=OptimWrapper"
"""The tiny config names another."""


@pytest.fixture
def data(shapes_dir: Path) -> TrainingData:
    return TrainingData(*(load_coco(*split_paths(shapes_dir, split)) for split in ("train", "val")))


@pytest.fixture
def words(configs: Path, shapes_dir: Path, tmp_path: Path) -> list[str]:
    """Of crosskd.train: one epoch whose precision nobody names."""
    config = str(configs / "gfl_tiny.py")
    return [config, "--data", str(shapes_dir), "-o", str(tmp_path / "run"), "--set", AUTO, "train_cfg.val_interval=9"]


def _state(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "detector.pth", weights_only=True)["state_dict"]


def _precision(run_dir: Path) -> str:
    return read_sidecar(run_dir / "detector.pth")["details"]["precision"]


@pytest.mark.usefixtures("unformatted_configs")
def test_a_measured_run_is_the_run_in_the_precision_that_it_chose(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "candidates_of", lambda _device: ["fp32", "bf16"])
    assert train.main(words) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("precision: "))
    details = read_sidecar(tmp_path / "run" / "detector.pth")["details"]
    assert details["step_times_s"].keys() == {"fp32", "bf16"}
    chosen = {"OptimWrapper": "fp32", "Bf16OptimWrapper": "bf16"}[details["precision"]]
    assert line.startswith(f"precision: {chosen} takes ")
    assert train.main([*words[:4], str(tmp_path / "named"), *words[5:], "--precision", chosen]) == 0
    first, second = _state(tmp_path / "run"), _state(tmp_path / "named")
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.usefixtures("unformatted_configs")
@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_a_run_goes_on_in_the_precision_that_it_was_started_in(
    chosen: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosskd.training.fastest_precision", lambda *_: (chosen, {}))
    assert train.main(words) == 0
    monkeypatch.setattr("crosskd.training.fastest_precision", lambda *_: pytest.fail("it was measured again"))
    before = _precision(tmp_path / "run")
    assert train.main([*words, "--resume"]) == 0
    assert _precision(tmp_path / "run") == before == {"fp32": "OptimWrapper", "bf16": "Bf16OptimWrapper"}[chosen]


@pytest.mark.parametrize(
    ("median_s", "fastest"),
    [
        ({"fp32": 2.2, "bf16": 3.8}, "fp32"),
        ({"fp32": 1.06, "bf16": 0.61}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.99}, "fp32"),  # about as fast: the more exact
        ({"fp32": 1.0, "bf16": 0.4, "fp16": 0.395}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.4, "fp16": 0.3}, "fp16"),
        ({"fp32": 1.0, "bf16": math.inf}, "fp32"),
        ({"fp32": math.inf, "bf16": 1.0}, "bf16"),
        ({"fp32": math.inf, "bf16": math.inf}, "fp32"),
    ],
)
def test_the_fastest_is_taken_and_of_equals_the_most_exact(median_s: dict[str, float], fastest: str) -> None:
    assert StepTimes(median_s, {}).fastest == fastest


def test_a_precision_that_does_not_run_is_said_and_not_taken(
    configs: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(configs / "crosskd_tiny.py")
    original = measured.step_of_twin

    def step_of_twin(*words: Any) -> Callable[[], Any]:
        if "bf16" in words:
            raise RuntimeError("not implemented for 'BFloat16'\nand more")
        return original(*words)

    monkeypatch.setattr(measured, "step_of_twin", step_of_twin)
    monkeypatch.setattr(measured, "candidates_of", lambda _device: ["fp32", "bf16"])
    chosen, times = fastest_precision(config, data, "cpu")
    assert (chosen, times.keys()) == ("fp32", {"fp32"})
    assert "bf16 does not run (RuntimeError: not implemented for 'BFloat16')" in capsys.readouterr().out


def test_without_instructions_for_bf16_nothing_is_measured(
    configs: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crosskd.loop.amp.computes_in_bf16", lambda _device: False)
    monkeypatch.setattr(measured, "measured_times", lambda *_: pytest.fail("it was measured"))
    assert fastest_precision(load_config(configs / "gfl_tiny.py"), data, "cpu") == ("fp32", {})
    assert capsys.readouterr().out == "precision: fp32, the only one that this cpu has instructions for\n"


def test_an_unreadable_image_does_not_spoil_the_measurement(configs: Path, shapes_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes_dir, tmp_path / "set")
    train, val = (load_coco(*split_paths(tmp_path / "set", split)) for split in ("train", "val"))
    for image in train.images[:-1]:
        image.path.write_bytes(b"\xff\xd8 no image")
    config = load_config(configs / "gfl_tiny.py")
    batch = batch_of_training(config, TrainingData(train, val))
    assert len(batch["inputs"]) == config.train_dataloader.batch_size


@pytest.mark.parametrize(
    ("precision", "wrapper"),
    [("fp32", "OptimWrapper"), ("bf16", "Bf16OptimWrapper"), ("fp16", "AmpOptimWrapper")],
)
def test_the_precision_sets_the_wrapper_and_keeps_the_losses_in_float32(
    configs: Path, build: Callable[..., Any], precision: str, wrapper: str
) -> None:
    config, detector = load_config(configs / "crosskd_tiny.py"), build()
    set_precision(config, detector, precision)
    assert config.optim_wrapper.type == wrapper
    assert ("loss_by_feat" in vars(detector.student.bbox_head)) == (precision != "fp32")


@pytest.mark.parametrize(
    ("named", "given", "asked"),
    [
        ("OptimWrapper", None, None),
        ("OptimWrapper", "fp32", "fp32"),
        ("Bf16OptimWrapper", None, "bf16"),
        ("Bf16OptimWrapper", "fp32", "fp32"),
        ("ApexOptimWrapper", None, "ApexOptimWrapper"),
    ],
)
def test_an_explicit_choice_is_honoured(
    named: str, given: str | None, asked: str | None, configs: Path, build: Callable[..., Any]
) -> None:
    config = load_config(configs / "gfl_tiny.py", {"optim_wrapper.type": named})
    assert precision_asked_for(config, build("gfl_tiny.py"), given, "cpu") == asked


def test_fp16_without_a_gpu_is_refused(configs: Path, build: Callable[..., Any]) -> None:
    config = load_config(configs / "gfl_tiny.py")
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU .*; use bf16 on a CPU"):
        precision_asked_for(config, build("gfl_tiny.py"), "fp16", device="cpu")
