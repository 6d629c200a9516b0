"""Hooks one by one; together, and under a kill, they are tested in test_resume.py and test_distributed.py."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from crosskd.loop.hooks import (
    AtomicBackend,
    AtomicCheckpointHook,
    EpochSeedHook,
    FirstStepHook,
    FreezeHeadNormsHook,
    JsonLinesHook,
    StudentEMAHook,
    errors_of_training,
)
from deploy.errors import CheckpointError, ConfigError, TrainingError


class _RandomNumbers(torch.utils.data.Dataset):
    """Eight items, each drawn anew by the three generators that augmentations use."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, _index: int) -> dict[str, Any]:
        return {"numbers": [random.random(), float(np.random.rand()), float(torch.rand(()))]}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_draws_what_it_drew_before_and_others_draw_otherwise(workers: int) -> None:
    def epoch(iteration: int) -> list[list[float]]:
        loader = dict(dataset=_RandomNumbers(), sampler=dict(type="DefaultSampler", shuffle=False), batch_size=2)
        loader |= dict(num_workers=workers, worker_init_fn=dict(type="seed_worker"))
        built = Runner.build_dataloader(loader, seed=3)
        EpochSeedHook().before_train_epoch(SimpleNamespace(seed=3, iter=iteration))
        return [[float(number) for number in numbers] for batch in built for numbers in batch["numbers"]]

    first, second = epoch(0), epoch(4)
    assert epoch(4) == second
    assert first != second
    numbers = np.array(first)  # (batches * 3, 2)
    assert len(np.unique(numbers)) == numbers.size  # no worker repeats another's


def test_a_file_is_removed_only_when_asked_for(tmp_path: Path) -> None:
    backend = AtomicBackend()
    backend.put(b"old", str(tmp_path / "old.pth"))
    backend.remove(str(tmp_path / "old.pth"))
    backend.put(b"new", str(tmp_path / "new.pth"))
    assert (tmp_path / "old.pth").read_bytes() == b"old"
    backend.remove_outdated()
    assert [path.name for path in tmp_path.iterdir()] == ["new.pth"]


@pytest.mark.parametrize("key", ["out_dir", "backend_args", "file_client_args"])
def test_checkpoints_elsewhere_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"default_hooks\.checkpoint\.{key} is .*expected none"):
        AtomicCheckpointHook(interval=1, **{key: "elsewhere"})


def test_checkpoints_in_the_middle_of_an_epoch_are_refused(tmp_path: Path) -> None:
    runner = SimpleNamespace(cfg=SimpleNamespace(train_cfg={"max_epochs": 2}), work_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="an epoch cannot be resumed in its middle"):
        AtomicCheckpointHook(interval=10, by_epoch=False).before_train(runner)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"optimizer": None}, CheckpointError, "has no optimiser state"),
        ({"seed": 4}, ConfigError, "the run has the seed 4, --seed is 3"),
        ({"ema_state_dict": {}}, ConfigError, "started with a moving average of the weights and is resumed without"),
        (
            {"gradients": [{}, {}]},
            CheckpointError,
            "its checkpoint has of 2 processes; here are 1. Resume with as many",
        ),
        ({"iter": 7}, ConfigError, "had taken 7 steps after 2 epochs; .* there would be 8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], error: type[Exception], named: str) -> None:
    detector = torch.nn.Linear(2, 1)
    runner = SimpleNamespace(seed=3, hooks=[], train_dataloader=[0] * 4, model=detector)
    checkpoint: dict[str, Any] = {"optimizer": {}, "meta": {"seed": 3, "epoch": 2, "iter": 8}}
    hook = AtomicCheckpointHook(interval=1)
    hook.after_load_checkpoint(runner, checkpoint)
    for key, value in change.items():
        (checkpoint["meta"] if key in checkpoint["meta"] else checkpoint)[key] = value
        if value is None:
            del checkpoint[key]
    with pytest.raises(error, match=named):
        hook.after_load_checkpoint(runner, checkpoint)


def test_gradients_that_are_being_accumulated_go_through_a_checkpoint() -> None:
    detector = torch.nn.Linear(2, 1)
    detector(torch.ones(1, 2)).sum().backward()
    checkpoint: dict[str, Any] = {"optimizer": {}, "meta": {"seed": 3, "epoch": 2, "iter": 8}}
    hook = AtomicCheckpointHook(interval=1)
    hook.before_save_checkpoint(SimpleNamespace(model=detector), checkpoint)
    other = torch.nn.Linear(2, 1)
    hook.after_load_checkpoint(
        SimpleNamespace(seed=3, hooks=[], train_dataloader=[0] * 4, model=other), copy.deepcopy(checkpoint)
    )
    assert torch.equal(other.weight.grad, torch.ones(1, 2))
    assert torch.equal(other.bias.grad, torch.ones(1))
    detector.zero_grad()
    finished: dict[str, Any] = {}
    hook.before_save_checkpoint(SimpleNamespace(model=detector), finished)
    assert finished == {}  # after a step of the optimiser there are none


def test_the_log_has_a_line_per_interval_and_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    values = {"lr": 0.1, "loss": 2.5, "loss_cls": float("nan"), "time": 0.5, "data_time": 0.1, "epoch": 1, "iter": 0}
    runner = SimpleNamespace(
        work_dir=str(tmp_path), iter=0, epoch=0, train_dataloader=[None] * 5,
        log_processor=SimpleNamespace(get_log_after_iter=lambda *_: (values, "")),
        message_hub=SimpleNamespace(get_info=lambda _key: 60),
    )  # fmt: skip

    def steps(first: int, last: int) -> None:
        for runner.iter in range(first, last):
            hook.after_train_iter(runner, runner.iter % 5)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    (tmp_path / "log.jsonl").write_text('{"iter": 1, "of": "an earlier run"}\n')
    hook = JsonLinesHook(interval=2)
    hook.before_train(runner)
    steps(0, 5)
    runner.iter, runner.epoch = 5, 1
    hook.after_val_epoch(runner, {"coco/bbox_mAP": 0.25})
    assert [(line["kind"], line["epoch"], line["iter"]) for line in lines()] == [
        ("train", 1, 2), ("train", 1, 4), ("train", 1, 5), ("val", 1, 5),
    ]  # fmt: skip
    assert lines()[0] == {
        "kind": "train", "epoch": 1, "iter": 2, "eta_s": 60, "lr": 0.1, "loss": 2.5, "loss_cls": None,
        "step_s": 0.5, "data_s": 0.1,
    }  # fmt: skip
    assert lines()[-1]["coco/bbox_mAP"] == 0.25
    before = lines()
    steps(5, 8)
    assert len(lines()) == 5
    runner.iter = 5
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("[" * 100_000 + '\n[1]\n{"iter": "5"}\n{"iter": 5, "ki')  # damaged, or of a run that was killed
    hook.before_train(runner)  # resumed from the checkpoint of the first epoch
    assert lines() == before


def _ema_of(detector: torch.nn.Module, momentum: float) -> tuple[StudentEMAHook, Any]:
    hook = StudentEMAHook(ema_type="ExponentialMovingAverage", momentum=momentum, update_buffers=True)
    runner = SimpleNamespace(model=detector, iter=0)
    hook.before_run(runner)
    return hook, runner


def test_the_average_is_of_the_student_and_the_teacher_stays_out_of_it(build: Callable[..., Any]) -> None:
    detector = build("crosskd_tiny.py")
    teacher = copy.deepcopy(detector.teacher.state_dict())
    hook, runner = _ema_of(detector, 0.25)
    own = {id(parameter) for parameter in detector.teacher.parameters()}
    assert {key.split(".")[0] for key in hook.ema_model.module.state_dict()} == {"backbone", "neck", "bbox_head"}
    assert own.isdisjoint(id(parameter) for parameter in hook.ema_model.parameters())
    weight, mean = detector.student.bbox_head.gfl_cls.weight, detector.student.backbone.bn1.running_mean
    for number in (1.0, 3.0):
        with torch.no_grad():
            weight.fill_(number)
            mean.fill_(2 * number)
        hook.after_train_iter(runner, 0)
    checkpoint = {"state_dict": detector.state_dict()}
    hook.before_save_checkpoint(runner, checkpoint)
    saved = checkpoint["state_dict"]["student.bbox_head.gfl_cls.weight"]
    assert torch.equal(saved, torch.full_like(saved, 1.5))  # 0.75 * 1 + 0.25 * 3
    live = checkpoint["ema_state_dict"]["module.bbox_head.gfl_cls.weight"]
    assert torch.equal(live, torch.full_like(live, 3.0))
    hook.after_train(runner)
    assert torch.equal(weight, torch.full_like(weight, 1.5))
    assert torch.equal(mean, torch.full_like(mean, 3.0))
    assert all(torch.equal(value, teacher[key]) for key, value in detector.teacher.state_dict().items())


def test_a_plain_detector_is_averaged_as_well(build: Callable[..., Any]) -> None:
    detector = build("gfl_tiny.py")
    hook, runner = _ema_of(detector, 0.5)
    for number in (1.0, 2.0):
        with torch.no_grad():
            detector.bbox_head.gfl_cls.bias.fill_(number)
        hook.after_train_iter(runner, 0)
    checkpoint = {"state_dict": detector.state_dict()}
    hook.before_save_checkpoint(runner, checkpoint)
    assert set(checkpoint["state_dict"]["bbox_head.gfl_cls.bias"].tolist()) == {1.5}


def test_the_norms_of_the_head_are_held_still_after_their_share_of_the_run(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    detector = build()
    hook = FreezeHeadNormsHook(begin=0.5)
    norm = detector.student.bbox_head.cls_convs[0].bn
    seen = []
    for iteration in range(4):
        detector.train()  # as a runner does after each validation
        hook.before_train_iter(SimpleNamespace(model=detector, iter=iteration, max_iters=4), 0)
        before = norm.running_mean.clone()
        detector.loss(*make_batch([2, 1]))
        seen.append(torch.equal(before, norm.running_mean))
        assert detector.student.backbone.bn1.training
        assert norm.weight.requires_grad
    assert seen == [False, False, True, True]
    whole = FreezeHeadNormsHook(begin=0.0, whole_detector=True)
    whole.before_train_iter(SimpleNamespace(model=detector.train(), iter=0, max_iters=4), 0)
    assert not detector.student.backbone.bn1.training
    with pytest.raises(ConfigError, match=r"FreezeHeadNormsHook.begin is 60; expected a share of the run, 0 to 1"):
        FreezeHeadNormsHook(begin=60)


@pytest.mark.parametrize("steps", [0, 7])
def test_a_full_disk_is_said_whatever_the_training_has_done(steps: int, tmp_path: Path) -> None:
    hook = FirstStepHook(lambda _runner: None)
    hook.taken = steps
    written = tmp_path / "annotations_train.json"
    written.write_text("{}")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = r"cannot write into .*: No space left on device\. Is the disk full\?.*--resume"
    with (
        pytest.raises(TrainingError, match=message),
        errors_of_training(hook, tmp_path, [written]),
    ):
        raise RuntimeError("torch cannot write the archive") from full
    assert written.exists() == (steps > 0)
