"""What a run is set up with, and what is read of a finished one."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd.config import load_config
from crosskd.training import add_training_arguments, load_run, overrides_of, run_dir_of, set_precision
from deploy.errors import CheckpointError, ConfigError, ContractError


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    return parser.parse_args(list(words))


def test_the_run_directory_is_named_after_the_config() -> None:
    assert run_dir_of(_arguments("configs/gfl_tiny.py")) == Path("runs/gfl_tiny")
    assert run_dir_of(_arguments("configs/gfl_tiny.py", "-o", "here")) == Path("here")


def test_set_wins_over_epochs() -> None:
    assert overrides_of(_arguments("c.py", "--epochs", "3", "--set", "a=1")) == {"max_epochs": 3, "a": 1}
    assert overrides_of(_arguments("c.py")) == {}


@pytest.mark.parametrize(
    ("precision", "wrapper"),
    [("fp32", "OptimWrapper"), ("bf16", "Bf16OptimWrapper"), ("fp16", "AmpOptimWrapper"), (None, "Bf16OptimWrapper")],
)
def test_the_precision_chooses_the_wrapper_and_keeps_the_losses_in_float32(
    configs: Path, build: Callable[..., Any], precision: str | None, wrapper: str
) -> None:
    config, detector = load_config(configs / "crosskd_tiny.py"), build()
    set_precision(config, detector, precision, has_gpu=True)
    assert config.optim_wrapper.type == wrapper
    assert ("loss_by_feat" in vars(detector.student.bbox_head)) == (precision != "fp32")


def test_fp16_without_a_gpu_is_refused(configs: Path, build: Callable[..., Any]) -> None:
    config = load_config(configs / "gfl_tiny.py")
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU .*; use bf16 on a CPU"):
        set_precision(config, build("gfl_tiny.py"), "fp16", has_gpu=False)


def test_a_finished_run_is_read_back(student_run: Path) -> None:
    config, detector, sidecar = load_run(student_run)
    assert not detector.training
    assert detector.bbox_head.num_classes == len(sidecar["details"]["class_names"]) == 6
    assert config.model.type == "GFL"
    state = torch.load(student_run / "student.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(detector.state_dict()[key], value) for key, value in state.items())


def test_a_changed_or_unfinished_run_is_refused(student_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(student_run, run_dir)
    (run_dir / "config.py").write_text((student_run / "config.py").read_text() + "\nmax_epochs = 2\n")
    with pytest.raises(CheckpointError, match=r"config.py is missing or was changed since student.pth was written"):
        load_run(run_dir)
    shutil.copy(student_run / "config.py", run_dir / "config.py")
    (run_dir / "student.pth").write_bytes((student_run / "student.pth").read_bytes()[:-9])
    with pytest.raises(ContractError, match="not the file that its sidecar describes"):
        load_run(run_dir)
    (run_dir / "student.pth").unlink()
    with pytest.raises(ContractError, match=r"student\.pth and detector\.pth; expected one"):
        load_run(run_dir)
