"""Batches whose loss is not finite leave no trace, and what is rare but right trains."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from crosskd.config import load_config, set_classes
from crosskd.data import TrainingData, set_data, write_annotations
from crosskd.loop.guard import accept_single_values, guard_training
from crosskd.loop.runner import TrainingRunner
from crosskd.models.detector import detector_from_config
from deploy.dataset import check_image_files, load_coco
from deploy.errors import TrainingError
from deploy.layouts import split_paths

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def message_hub() -> MessageHub:
    """An empty one, which runners that a test makes take as well."""
    hub = MessageHub.get_current_instance()
    hub.update_info("skipped_batches", 0)
    return hub


@pytest.fixture
def warnings_logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logged: list[str] = []

    def print_log(message: str, logger: str, level: int) -> None:
        assert (logger, level) == ("current", logging.WARNING)
        logged.append(message)

    monkeypatch.setattr("crosskd.loop.guard.print_log", print_log)
    return logged


def _batch(shapes: list[tuple[int, int]], boxes_per_image: list[int], seed: int = 0) -> dict[str, Any]:
    """What mmdet's loaders give: images of (height, width) as bytes, and samples with boxes."""
    generator = torch.Generator().manual_seed(seed)
    images, samples = [], []
    for number, ((height, width), count) in enumerate(zip(shapes, boxes_per_image, strict=True)):
        images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        sizes = torch.tensor([width * 0.1, height * 0.1]) * (1 + 3 * torch.rand(count, 2, generator=generator))
        meta = dict(img_path=f"images/{seed}-{number}.png", img_id=number, img_shape=(height, width))
        sample = DetDataSample(metainfo=dict(meta, ori_shape=(height, width), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corners, corners + sizes], 1),
            labels=torch.randint(0, 6, (count,), generator=generator),
        )
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def _poison(detector: nn.Module, numbers: Collection[int]) -> None:
    """Makes the student's input NaN in the steps of these numbers, from 0: as bad as it gets, BatchNorm sees it too."""
    step = -1

    def spoil(_module: nn.Module, inputs: tuple[torch.Tensor]) -> Any:
        nonlocal step
        step += 1
        return (inputs[0] * float("nan"),) if step in numbers else None

    getattr(detector, "student", detector).backbone.register_forward_pre_hook(spoil)


def _leave_out(model: nn.Module, numbers: Collection[int]) -> None:
    """Makes the model's steps of these numbers do nothing at all."""
    step, train_step = -1, model.train_step

    def shortened(data: Any, optim_wrapper: Any) -> Any:
        nonlocal step
        step += 1
        return {} if step in numbers else train_step(data, optim_wrapper=optim_wrapper)

    model.train_step = shortened


class _RecordLosses(Hook):
    def __init__(self) -> None:
        self.losses: list[Any] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs.get("loss"))


LOOPS = {
    "epochs": dict(type="EpochBasedTrainLoop", max_epochs=3, val_interval=9),
    "iterations": dict(type="IterBasedTrainLoop", max_iters=6, val_interval=9),
}


@pytest.mark.parametrize(
    ("name", "loop", "accumulate"), [("gfl_tiny.py", "epochs", 1), ("crosskd_tiny.py", "iterations", 2)]
)
def test_a_run_goes_on_as_if_the_batch_had_not_been_there(
    configs: Path, shapes_dir: Path, tmp_path: Path, message_hub: MessageHub, name: str, loop: str, accumulate: int
) -> None:
    data = TrainingData(*(load_coco(*split_paths(shapes_dir, split)) for split in ("train", "val")))

    def run(prepare: Callable[[Any], None], folder: Path) -> tuple[Any, list[Any]]:
        config = load_config(configs / name)
        set_classes(config, data.class_names)
        set_data(config, data, folder)
        write_annotations(data, folder)
        config.train_cfg = LOOPS[loop]
        config.train_dataloader.sampler.type = "InfiniteSampler" if loop == "iterations" else "DefaultSampler"
        config.optim_wrapper.update(type="OptimWrapper", accumulative_counts=accumulate)
        config.param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=6)]
        torch.manual_seed(1)
        detector = detector_from_config(config, load_weights=False)
        recorder = _RecordLosses()
        runner = Runner(
            detector,
            str(folder),
            **{key: config[key] for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler")},
            custom_hooks=[recorder, dict(type="EMAHook")],
            randomness=dict(seed=0),
            default_scope="mmdet",
            experiment_name=folder.name,
        )
        prepare(runner.model)
        runner.train()
        return runner, recorder.losses

    def skip(model: Any) -> None:
        guard_training(model, patience=2)
        _poison(model, {1, 2})

    skipped, losses = run(skip, tmp_path / f"{name}-skipped")
    expected, expected_losses = run(lambda model: _leave_out(model, {1, 2}), tmp_path / f"{name}-expected")
    assert losses == expected_losses
    assert [loss is None for loss in losses] == [False, True, True, False, False, False]
    state, expected_state = skipped.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected_state.items())
    assert skipped.optim_wrapper.get_lr() == expected.optim_wrapper.get_lr()
    assert skipped.iter == expected.iter == 6
    assert skipped.message_hub.get_info("skipped_batches") == 2


def _step(detector: nn.Module, optim_wrapper: OptimWrapper, seed: int = 0) -> dict[str, Any]:
    return detector.train_step(_batch([(64, 96), (64, 96)], [3, 2], seed), optim_wrapper)


def _spoil_losses(detector: nn.Module, spoilt: dict[str, Callable[[Any], Any]]) -> None:
    """Changes the losses of the detector by key."""
    original = detector.loss

    def loss(*args: Any) -> Any:
        losses = original(*args)
        return {key: spoilt[key](values) if key in spoilt else values for key, values in losses.items()}

    detector.loss = loss


@pytest.fixture
def optim_wrapper() -> Callable[[nn.Module], OptimWrapper]:
    return lambda detector: OptimWrapper(torch.optim.SGD(detector.parameters(), lr=0.01))


def test_it_names_the_losses_their_levels_and_the_images(
    build: Callable[..., Any], optim_wrapper: Callable[..., Any], warnings_logged: list[str], message_hub: MessageHub
) -> None:
    detector = build()
    guard_training(detector)
    wrapper = optim_wrapper(detector)
    nan, infinity = torch.tensor(float("nan")), torch.tensor(float("inf"))
    _spoil_losses(
        detector,
        {
            "loss_cls": lambda values: [*values[:1], values[1] * nan, *values[2:4], values[4] + infinity],
            "loss_reg_kd": lambda values: sum(values) * nan,
        },
    )
    assert _step(detector, wrapper, seed=7) == {}
    assert _step(detector, wrapper, seed=8) == {}
    assert warnings_logged == [
        f"a loss is not finite, batch skipped ({count} in a row, {count} in all): loss_cls (level 1: nan, level 4: inf)"
        f", loss_reg_kd (nan) of the images images/{seed}-0.png, images/{seed}-1.png"
        for count, seed in ((1, 7), (2, 8))
    ]
    assert message_hub.get_info("skipped_batches") == 2
    assert all(parameter.grad is None for parameter in detector.parameters())


def test_a_sum_that_overflows_and_a_value_that_is_only_logged(
    build: Callable[..., Any], optim_wrapper: Callable[..., Any], warnings_logged: list[str]
) -> None:
    detector = build("gfl_tiny.py")
    guard_training(detector)
    wrapper = optim_wrapper(detector)
    original = detector.loss
    only_logged = torch.tensor(float("nan"))
    detector.loss = lambda *args: {**original(*args), "accuracy": only_logged}
    assert _step(detector, wrapper)["loss"] > 0
    assert warnings_logged == []
    huge = torch.tensor(3e38)
    detector.loss = lambda *args: {**original(*args), "loss_a": huge, "loss_b": huge, "accuracy": only_logged}
    assert _step(detector, wrapper) == {}
    assert "in all): the sum of the losses (inf), though each of them is finite, of the images" in warnings_logged[0]


@pytest.mark.parametrize("patience", [0, 2])
def test_it_stops_after_as_many_in_a_row(
    build: Callable[..., Any], optim_wrapper: Callable[..., Any], message_hub: MessageHub, patience: int
) -> None:
    detector = build("gfl_tiny.py")
    guard_training(detector, patience)
    wrapper = optim_wrapper(detector)
    # Steps 1 to `patience` are bad, one is good, and from then on all are bad.
    _poison(detector, [*range(1, 1 + patience), *range(2 + patience, 99)])
    for _ in range(2 + 2 * patience):
        _step(detector, wrapper)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    message = rf"{patience + 1} batches in a row is not finite. The last one: .*loss_dfl \(level 0: nan, .*/5-0.png, "
    with pytest.raises(TrainingError, match=message + r".* The detector's weights are finite: look at"):
        _step(detector, wrapper, seed=5)
    assert message_hub.get_info("skipped_batches") == 2 * patience
    assert all(torch.equal(detector.state_dict()[key], value) for key, value in before.items())


def test_weights_that_are_not_finite_are_named(build: Callable[..., Any], optim_wrapper: Callable[..., Any]) -> None:
    detector = build("gfl_tiny.py")
    guard_training(detector)  # however patient: no other batch mends them
    nn.init.constant_(detector.bbox_head.gfl_reg.weight, float("inf"))
    with pytest.raises(TrainingError, match=r"1 of the detector's weights .* \(such as bbox_head.gfl_reg.weight\)"):
        _step(detector, optim_wrapper(detector))


PROCESS = """
import gc, sys, torch
from types import SimpleNamespace
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from crosskd.loop.guard import guard_training
from deploy.errors import TrainingError

BAD = {2: 1, 3: 0}  # step -> process whose loss is not finite; from step 6 on, of process 1


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def forward(self, inputs, data_samples, mode):
        return {"loss_toy": [self.layers(inputs).pow(2).mean()]}


def train(steps, spoil):
    torch.manual_seed(0)
    model = MMDistributedDataParallel(Toy(), broadcast_buffers=False)  # as mmengine's runner does
    guard_training(model, patience=2)
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2)
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs = torch.randn(8, 3, generator=generator)
        if spoil and rank == (1 if step >= 6 else BAD.get(step)):
            inputs = inputs * float("nan")
        samples = [SimpleNamespace(metainfo={"img_id": f"{step}-{rank}"})]
        found = model.train_step({"inputs": inputs, "data_samples": samples}, optim_wrapper)
        assert bool(found) != (spoil and step in BAD or step >= 6)
    return model.module.state_dict()


torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
expected = train([0, 1, 4, 5], False)
found = train([0, 1, 2, 3, 4, 5], True)
assert all(torch.equal(found[key], value) for key, value in expected.items()), (found, expected)
weights = [torch.empty_like(found["layers.0.weight"]) for _ in range(2)]
torch.distributed.all_gather(weights, found["layers.0.weight"])
assert torch.equal(*weights)
assert MessageHub.get_current_instance().get_info("skipped_batches") == 2
try:
    train(range(9), True)
except TrainingError as error:
    print(error)
gc.collect()  # a wrapped detector is a cycle; what it holds of the group must go before the group
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_processes_skip_together() -> None:
    """A toy in place of a detector: each process would import mmdet for ten seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env={**base, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert (
            "the loss of 3 batches in a row is not finite. The last one: loss_toy (level 0: nan) of the images 8-1. "
            "The detector's weights are finite"
        ) in output


@pytest.mark.parametrize(
    ("shapes", "boxes"),
    [
        ([(64, 64)], [2]),  # a level of 1 x 1 under stride 64, in a batch of one
        ([(64, 64)], [0]),
        ([(40, 50)], [1]),  # the last level is wider than the image
        ([(64, 96), (96, 64), (30, 70)], [2, 0, 1]),
        ([(64, 96), (96, 64)], [0, 0]),
        ([(96, 96)], [3]),
    ],
)
@pytest.mark.parametrize("name", ["gfl_tiny.py", "crosskd_tiny.py"])
def test_what_is_rare_trains(
    build: Callable[..., Any],
    optim_wrapper: Callable[..., Any],
    warnings_logged: list[str],
    name: str,
    shapes: list[tuple[int, int]],
    boxes: list[int],
) -> None:
    detector = build(name, {"model.distill.method": "crosskd+pkd"} if name == "crosskd_tiny.py" else None)
    accept_single_values(detector)
    guard_training(detector, patience=0)
    before = {key: value.clone() for key, value in detector.named_parameters() if value.requires_grad}
    wrapper = optim_wrapper(detector)
    for seed in range(2):  # the second step would show what the first did to the weights
        losses = detector.train_step(_batch(shapes, boxes, seed), wrapper)
        assert all(torch.isfinite(value) for value in losses.values())
    state = detector.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert any(not torch.equal(state[key], value) for key, value in before.items())
    assert warnings_logged == []


def test_batchnorm_of_a_single_value_uses_running_statistics() -> None:
    torch.manual_seed(0)
    norm, plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    accept_single_values(nn.Sequential(norm))
    for module in (norm, plain):
        module(torch.linspace(-2, 3, 2 * 4 * 9).reshape(2, 4, 3, 3))
    for key, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value)
    inputs = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain(inputs)
    assert norm.training
    assert torch.equal(norm(inputs), plain.eval()(inputs))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_and_its_batch_skipped(
    workers: int, configs: Path, shapes_dir: Path, tmp_path: Path, warnings_logged: list[str]
) -> None:
    """Its first and last bytes are sound, so that no check before the training sees it."""
    folder = tmp_path / "data"
    shutil.copytree(shapes_dir, folder)
    data = TrainingData(*(load_coco(*split_paths(folder, split)) for split in ("train", "val")))
    broken = data.train.images[3].path
    pixels = np.zeros((data.train.images[3].height_px, data.train.images[3].width_px, 3), np.uint8)
    content = cv2.imencode(".png", pixels)[1].tobytes()
    begin = content.index(b"IDAT") + 4
    broken.write_bytes(content[:begin] + bytes(len(content) - begin - 12) + content[-12:])
    check_image_files(data.train.images)

    def run(patience: int) -> Any:
        config = load_config(configs / "gfl_tiny.py")
        set_classes(config, data.class_names)
        set_data(config, data, tmp_path)
        write_annotations(data, tmp_path)
        config.train_dataloader.update(num_workers=workers, persistent_workers=False, batch_size=2)
        config.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2, val_interval=9)
        config.optim_wrapper.update(type="OptimWrapper")
        runner = TrainingRunner(
            detector_from_config(config, load_weights=False),
            str(tmp_path / f"run{patience}"),
            **{key: config[key] for key in ("train_dataloader", "train_cfg", "optim_wrapper")},
            default_scope="mmdet",
            experiment_name=f"unreadable-{workers}-{patience}",
        )
        guard_training(runner.model, patience)
        runner.train()
        return runner

    runner = run(patience=1)
    assert runner.iter == len(data.train.images)  # two to a batch, two epochs
    assert runner.message_hub.get_info("skipped_batches") == 2  # once an epoch
    assert len(warnings_logged) == 2
    assert all("an image cannot be read, batch skipped (1 in a row" in text for text in warnings_logged)
    assert all(f"{broken} cannot be read or decoded" in text for text in warnings_logged)
    with pytest.raises(TrainingError, match=rf"1 batches in a row cannot be used.*{broken.name} cannot be read"):
        run(patience=0)
