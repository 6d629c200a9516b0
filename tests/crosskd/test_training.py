"""What a run is set up with."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from crosskd.config import load_config
from crosskd.training import (
    TrainingOptions,
    add_training_arguments,
    set_hooks,
    set_log_backends,
    set_optimisation,
    set_processes,
    set_reproducible,
    training_options_from_arguments,
)
from deploy.errors import ConfigError, MissingDependencyError


def _options(*words: str) -> TrainingOptions:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    return training_options_from_arguments(parser.parse_args(list(words)))


def test_the_run_directory_is_named_after_the_config() -> None:
    assert _options("configs/gfl_tiny.py").run_dir == Path("runs/gfl_tiny")
    assert _options("configs/gfl_tiny.py", "-o", "here").run_dir == Path("here")


def test_set_wins_over_epochs() -> None:
    assert _options("c.py", "--epochs", "3", "--set", "a=1").overrides == {"max_epochs": 3, "a": 1}
    assert _options("c.py").overrides == {}


def test_accumulation_and_clipping_take_the_place_of_the_configs_own(configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py", {"optim_wrapper.clip_grad.norm_type": 1})
    set_optimisation(config, _options("c.py"))
    assert config.optim_wrapper.clip_grad == dict(max_norm=10, norm_type=1)
    assert "accumulative_counts" not in config.optim_wrapper
    set_optimisation(config, _options("c.py", "--accumulate", "4", "--clip-grad", "2.5"))
    assert config.optim_wrapper.clip_grad == dict(max_norm=2.5)
    assert config.optim_wrapper.accumulative_counts == 4


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--accumulate", "0"], "--accumulate is 0; expected at least 1"),
        (["--clip-grad", "0"], "--clip-grad is 0.0; expected a number above 0"),
        (["--clip-grad", "nan"], "--clip-grad is nan; expected a number above 0"),
        (["--auto-scale-lr"], "the config has no auto_scale_lr.base_batch_size"),
    ],
)
def test_an_optimisation_that_cannot_be_is_refused(words: list[str], named: str, configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py")
    config.pop("auto_scale_lr", None)
    with pytest.raises(ConfigError, match=named):
        set_optimisation(config, _options("c.py", *words))


@pytest.mark.parametrize(("accumulate", "factor"), [(1, 0.25), (2, 0.5)])
def test_the_learning_rate_is_scaled_by_the_images_of_a_step(configs: Path, accumulate: int, factor: float) -> None:
    config = load_config(configs / "gfl_tiny.py", {"auto_scale_lr": dict(enable=False, base_batch_size=16)})
    set_optimisation(config, _options("c.py", "--auto-scale-lr", "--accumulate", str(accumulate)))
    assert config.auto_scale_lr.enable
    assert config.train_dataloader.batch_size / config.auto_scale_lr.base_batch_size == factor  # mmengine's formula


def test_a_log_back_end_is_added_and_a_missing_package_is_named(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(configs / "gfl_tiny.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package != "wandb" or None)
    set_log_backends(config, ["tensorboard", "mlflow"])
    types = [backend.type for backend in config.visualizer.vis_backends]
    assert types == ["LocalVisBackend", "TensorboardVisBackend", "MLflowVisBackend"]
    with pytest.raises(MissingDependencyError, match=r"--log-to wandb needs the package wandb.*pip install wandb"):
        set_log_backends(config, ["wandb"])


def test_our_hooks_take_the_place_of_mmengines_with_their_options(configs: Path) -> None:
    own = [dict(type="EMAHook", momentum=0.1), dict(type="NumClassCheckHook")]
    config = load_config(configs / "gfl_tiny.py", {"custom_hooks": own, "default_hooks.checkpoint.interval": 7})
    set_hooks(config, None)
    checkpoint = config.default_hooks.checkpoint
    assert (checkpoint.type, checkpoint.interval, checkpoint.max_keep_ckpts) == ("AtomicCheckpointHook", 7, 1)
    types = [hook.type for hook in config.custom_hooks]
    assert types == ["StudentEMAHook", "NumClassCheckHook", "EpochSeedHook", "SameBuffersHook", "JsonLinesHook"]
    assert config.custom_hooks[0].momentum == 0.1
    assert config.custom_hooks[-1].interval == config.default_hooks.logger.interval


def test_a_momentum_replaces_the_configs_average(configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py", {"custom_hooks": [dict(type="EMAHook", momentum=0.1)]})
    set_hooks(config, 0.01)
    averages = [hook for hook in config.custom_hooks if hook.type == "StudentEMAHook"]
    assert [hook.momentum for hook in averages] == [0.01]
    for momentum in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"--ema is .*; expected a number between 0 and 1"):
            set_hooks(config, momentum)


def test_checkpoints_that_the_config_does_not_want_are_not_written(configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py", {"default_hooks.checkpoint": None})
    set_hooks(config, None)
    assert config.default_hooks.checkpoint is None


def test_workers_do_not_outlive_an_epoch(configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py", {"train_dataloader.persistent_workers": True})
    set_reproducible(config, 5)
    assert not config.train_dataloader.persistent_workers
    assert config.train_dataloader.worker_init_fn == dict(type="seed_worker")
    assert config.randomness == dict(seed=5)


def test_several_processes_are_set_up_only_where_there_are_several(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_config(configs / "gfl_tiny.py")
    set_processes(config)
    assert "launcher" not in config
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_processes(config)
    assert (config.launcher, config.model_wrapper_cfg.device_ids) == ("pytorch", [1])
    assert config.val_evaluator.collect_device == "gpu"
