"""All that counts in epochs is stretched with a training, and nothing of it becomes 0 or ends before it begins."""

from __future__ import annotations

from typing import Any

import pytest
from mmengine.config import ConfigDict

from crosskd.config import load_config
from crosskd.schedule import say_long_warm_ups, set_epochs


def _config(epochs: int = 12, **parts: Any) -> ConfigDict:
    return ConfigDict(train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=epochs), **parts)


def _built_learning_rates(schedulers: list[Any], epochs: int, epoch_length: int) -> list[float]:
    """The learning rate of each step, by mmengine's own schedulers from a rate of 1."""
    import torch
    from mmengine.hooks import ParamSchedulerHook
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    built = []
    for one in schedulers:
        one = dict(one)
        kind = PARAM_SCHEDULERS.get(one["type"])
        if one.pop("convert_to_iter_based", False):
            del one["type"]
            built.append(kind.build_iter_from_epoch(optimizer, epoch_length=epoch_length, **one))
        else:
            built.append(PARAM_SCHEDULERS.build(one, default_args=dict(optimizer=optimizer)))
    runner = type("Runner", (), {"param_schedulers": built, "train_dataloader": None})()
    hook, rates = ParamSchedulerHook(), []
    for _ in range(epochs):
        for _ in range(epoch_length):
            rates.append(optimizer.param_groups[0]["lr"])
            hook.after_train_iter(runner, 0)
        hook.after_train_epoch(runner)
    return rates


def test_rtmdets_switch_of_pipelines_validations_and_cosine_go_with_the_epochs() -> None:
    config = load_config("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", {"max_epochs": 30})
    assert config.train_cfg.max_epochs == 30
    assert config.train_cfg.dynamic_intervals == [(28, 1)]
    assert [hook.switch_epoch for hook in config.custom_hooks if hook.type == "PipelineSwitchHook"] == [28]
    cosine = config.param_scheduler[1]
    assert (cosine.begin, cosine.end, cosine.T_max) == (15, 30, 15)
    assert (config.param_scheduler[0].begin, config.param_scheduler[0].end) == (0, 1000)  # counts iterations


def test_yoloxs_phases_stay_apart_in_a_training_of_thirty_epochs() -> None:
    config = load_config("mmdet::yolox/yolox_s_8xb8-300e_coco.py", {"max_epochs": 30})
    phases = [(one.begin, one.end) for one in config.param_scheduler]
    assert phases == [(0, 1), (1, 28), (28, 30)]
    assert config.param_scheduler[1].T_max == 28  # counted from the beginning, as in the original: 285 of 300
    assert config.custom_hooks[0].num_last_epochs == 2
    rates = _built_learning_rates(config.param_scheduler, 30, epoch_length=4)
    assert rates[4] == pytest.approx(1.0)  # the warm-up is over after an epoch, as high as it was to go
    assert max(rates) <= 1.0 + 1e-6
    assert rates[-1] == pytest.approx(rates[28 * 4 - 1], abs=0.05)


@pytest.mark.parametrize("name", ["rtmdet/rtmdet_tiny_8xb32-300e_coco.py", "yolox/yolox_s_8xb8-300e_coco.py"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
def test_a_very_short_training_has_a_schedule_that_can_be_built(
    name: str, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(f"mmdet::{name}", {"max_epochs": epochs})
    for one in config.param_scheduler:
        assert one.begin < one.end
        assert one.get("T_max", 1) >= 1
    assert all(epoch >= 1 for epoch, _ in config.train_cfg.get("dynamic_intervals", []))
    for hook in config.custom_hooks:
        assert hook.get("switch_epoch", 1) >= 1
        assert hook.get("num_last_epochs", 1) >= 1
    assert _built_learning_rates(config.param_scheduler, epochs, epoch_length=3)
    left_out = capsys.readouterr().out
    assert ("is left out" in left_out) == ("yolox" in name and epochs < 3)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (dict(type="StepLR", step_size=4), dict(step_size=2)),
        (dict(type="MultiStepLR", milestones=[8, 11], end=12), dict(milestones=[4, 6], end=6)),
        (dict(type="MultiStepLR", milestones=[1, 11]), dict(milestones=[1, 6])),
        (dict(type="CosineAnnealingLR", T_max=12), dict(T_max=6)),
        (dict(type="CosineAnnealingLR", begin=0, end=12, T_max=12), dict(begin=0, end=6, T_max=6)),
        (dict(type="CosineRestartLR", periods=[4, 8], restart_weights=[1, 0.5]), dict(periods=[2, 4])),
        (dict(type="OneCycleLR", eta_max=1, total_steps=12), dict(total_steps=6)),
        (dict(type="ExponentialLR", gamma=0.5), dict(gamma=0.25)),
        (dict(type="LinearLR", start_factor=0.1, begin=0, end=2), dict(end=1, convert_to_iter_based=True)),
        (dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=500), dict(begin=0, end=500)),
        (dict(type="PolyLR", begin=6, end=12), dict(begin=3, end=6)),
    ],
)
def test_each_kind_of_scheduler_is_stretched(scheduler: dict[str, Any], expected: dict[str, Any]) -> None:
    config = _config(param_scheduler=[scheduler])
    set_epochs(config, 6)
    assert {key: config.param_scheduler[0][key] for key in expected} == expected


def test_a_linear_warm_up_of_one_epoch_reaches_the_rate() -> None:
    config = _config(param_scheduler=[dict(type="LinearLR", start_factor=0.1, begin=0, end=3)])
    set_epochs(config, 4)
    rates = _built_learning_rates(config.param_scheduler, 4, epoch_length=5)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(1.0)


def test_one_scheduler_and_those_of_several_optimisers_are_stretched() -> None:
    config = _config(param_scheduler=dict(type="StepLR", step_size=4))
    set_epochs(config, 24)
    assert config.param_scheduler.step_size == 8
    config = _config(param_scheduler=dict(backbone=[dict(type="StepLR", step_size=4)], head=[dict(type="PolyLR")]))
    set_epochs(config, 24)
    assert config.param_scheduler.backbone[0].step_size == 8
    config = _config()
    set_epochs(config, 24)  # without any
    assert config.train_cfg.max_epochs == 24


def test_hooks_the_loop_and_the_first_epochs_of_a_head_are_stretched(capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(
        model=dict(bbox_head=dict(type="TOODHead", initial_epoch=4)),
        custom_hooks=[
            dict(type="EMAHook", begin_epoch=6), dict(type="YOLOXModeSwitchHook"), dict(type="MineHook", at_epoch=3),
        ],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", save_begin=4, interval=2, by_epoch=True), timer=None),
    )  # fmt: skip
    config.train_cfg.update(val_begin=8, val_interval=4)
    set_epochs(config, 24)
    assert config.model.bbox_head.initial_epoch == 8
    assert config.custom_hooks[0].begin_epoch == 12
    assert config.custom_hooks[1].num_last_epochs == 30  # twice mmdet's 15
    assert (config.train_cfg.val_begin, config.train_cfg.val_interval) == (16, 4)
    assert (config.default_hooks.checkpoint.save_begin, config.default_hooks.checkpoint.interval) == (8, 2)
    assert "MineHook.at_epoch stays 3" in capsys.readouterr().out


def test_a_warm_up_longer_than_the_training_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(param_scheduler=[dict(type="LinearLR", by_epoch=False, begin=0, end=500)])
    say_long_warm_ups(config, 500)
    assert capsys.readouterr().out == ""
    say_long_warm_ups(config, 60)
    said = capsys.readouterr().out
    assert "param_scheduler.0 (LinearLR) takes 500 steps, the whole training has 60" in said
    assert "--set param_scheduler.0.end=6" in said
