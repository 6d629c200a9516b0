"""crosskd.workers.time_training: a timed step is a whole training step, and a variant is what its name says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from benchmarks.studies import training_step
from crosskd.config import load_config
from crosskd.workers import time_training
from crosskd.workers.time_training import VARIANTS, prepared_run, step_of, synthetic_batch, times_of_training
from deploy.errors import MeasurementError

SIZE = (96, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KD_LOSSES = {"loss_cls_kd", "loss_reg_kd"}


@pytest.fixture
def config(configs: Path) -> Any:
    return load_config(configs / "crosskd_tiny.py")


@pytest.fixture(autouse=True)
def quiet_and_restored() -> Iterator[None]:
    """The command sets the number of threads and the level of mmengine's logger for its whole process."""
    threads, logger = torch.get_num_threads(), MMLogger.get_current_instance()
    level = logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


@pytest.fixture
def time_variant(configs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """variant, flags -> what the command wrote."""

    def run(variant: str, *flags: str) -> dict[str, Any]:
        output = tmp_path / f"{variant}.json"
        words = [str(configs / "crosskd_tiny.py"), "--variant", variant, "--size", *map(str, SIZE), "--batch", "2"]
        assert time_training.main([*words, "--steps", "2", "--warmup", "1", "-o", str(output), *flags]) == 0
        return json.loads(output.read_text())

    return run


def test_the_benchmark_knows_the_same_variants() -> None:
    assert list(training_step.VARIANTS) == list(VARIANTS)


def test_every_variant_is_timed_step_by_step(time_variant: Callable[..., dict[str, Any]]) -> None:
    all_times = {variant: time_variant(variant, "--threads", "1") for variant in VARIANTS}
    for times in all_times.values():
        assert len(times["samples_s"]) == 2
        assert min(times["samples_s"]) > 0
        assert 0 < times["ready_mib"] <= times["peak_mib"]
        assert times["threads"] == 1
    assert {variant: times["precision"] for variant, times in all_times.items()} == {
        "student": "fp32",
        "student-fast": "bf16",
        "student-fast-fp32": "fp32",
        "distill": "fp32",
        "distill-fast": "bf16",
        "distill-fast-fp32": "fp32",
        "teacher-forward": "bf16",
        "teacher-forward-fp32": "fp32",
    }
    losses = {variant: times["losses"] for variant, times in all_times.items()}
    assert losses["teacher-forward"] == {}
    assert losses["student"].keys() == losses["student-fast"].keys() == losses["distill"].keys() - KD_LOSSES
    assert losses["distill"].keys() == losses["distill-fast"].keys() > KD_LOSSES
    for key in losses["student"].keys() - {"loss"}:  # the same student and the same batch in all
        assert losses["distill"][key] == pytest.approx(losses["student"][key], rel=1e-5)
        assert losses["distill-fast"][key] == pytest.approx(losses["student-fast"][key], rel=1e-5)
        assert losses["student-fast"][key] == pytest.approx(losses["student"][key], rel=0.05)
    for key in losses["distill"]:
        assert losses["distill-fast-fp32"][key] == pytest.approx(losses["distill"][key], rel=1e-3)


@pytest.mark.parametrize("variant", ["student", "distill-fast"])
def test_each_step_runs_the_optimiser_and_repeats_the_same_work(config: Any, variant: str) -> None:
    detector, wrapper = prepared_run(config, variant, DEVICE)
    before = {name: value.clone() for name, value in detector.named_parameters()}
    gradients: list[set[str]] = []

    def record(*_: Any) -> None:
        gradients.append({name for name, value in detector.named_parameters() if value.grad is not None})

    wrapper.optimizer.register_step_pre_hook(record)
    step = step_of(detector, wrapper, synthetic_batch(2, SIZE, 80), variant)
    first, second = step(), step()
    trained = {name for name, value in before.items() if value.requires_grad}
    assert gradients == [trained, trained]
    assert not any("teacher" in name for name in trained)
    assert all(torch.equal(value, before[name]) for name, value in detector.named_parameters())
    assert {key: value.item() for key, value in first.items()} == {key: value.item() for key, value in second.items()}


def test_the_fast_form_is_that_of_a_training(config: Any) -> None:
    detector, wrapper = prepared_run(config, "distill-fast", DEVICE)
    assert type(wrapper).__name__ == "Bf16OptimWrapper"
    teacher = [module for module in detector.teacher.modules() if isinstance(module, nn.Conv2d)]
    assert {module.weight.dtype for module in teacher} == {torch.bfloat16}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.teacher.modules())
    weight = detector.student.neck.fpn_convs[0].conv.weight
    assert weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_plain_form_is_left_alone(config: Any) -> None:
    detector, wrapper = prepared_run(config, "distill", DEVICE)
    assert type(wrapper).__name__ == "OptimWrapper"
    assert any(isinstance(module, nn.BatchNorm2d) for module in detector.teacher.modules())
    weight = detector.student.neck.fpn_convs[0].conv.weight
    assert not weight.is_contiguous(memory_format=torch.channels_last)


def test_the_batch_is_the_same_at_each_call_and_lies_in_its_images() -> None:
    batches = [synthetic_batch(6, SIZE, 80) for _ in range(2)]
    counts = set()
    for image, sample, other_image, other in zip(*batches[0].values(), *batches[1].values(), strict=True):
        assert torch.equal(image, other_image)
        assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 96))
        boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
        assert torch.equal(boxes, other.gt_instances.bboxes)
        assert torch.equal(labels, other.gt_instances.labels)
        assert boxes.min() >= 0
        assert (boxes <= torch.tensor([96, 64, 96, 64])).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert 0 <= labels.min() <= labels.max() < 80
        counts.add(len(boxes))
    assert counts <= set(range(4, 9))
    assert len(counts) > 1


def test_a_profile_names_operators(
    time_variant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_training, "PROFILED_STEPS", 1)  # the profiler takes seconds for each
    times = time_variant("student", "--profile")
    assert "Self CPU" in times["profile"]
    assert "aten::convolution_backward" in times["profile"]
    printed = capsys.readouterr().out
    assert times["profile"] in printed
    bound = times["bound"]
    assert bound["least_s"] == pytest.approx(bound["gmac"] / bound["gmac_per_s"])
    assert f"{bound['gmac']:.1f} * 10**9 multiplications a step" in printed


def test_multiplications_are_those_of_forward_and_backward_pass() -> None:
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    images = torch.randn(2, 3, 7, 6)
    bound = time_training.bound_of(lambda: convolution(images).sum().backward(), "cpu")
    assert bound["gmac"] * 1e9 == pytest.approx(2 * (2 * 7 * 6) * 5 * 3 * 9)  # forward, and the weights' gradient


def test_losses_that_are_not_finite_are_no_measurement(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_training, "step_of", lambda *_: lambda: {"loss_cls": torch.tensor(torch.nan)})
    with pytest.raises(MeasurementError, match=r"the losses of student are .*nan.*; expected finite"):
        times_of_training(config, "student", SIZE, batch=1, steps=1, warmup=0, profile=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--warmup", "-1"], "--warmup is -1; expected at least 0"),
        (["--threads", "0"], "--threads is 0; expected at least 1"),
        (["--size", "320", "16"], "--size is [320, 16]; expected at least 32"),
    ],
)
def test_bad_numbers_are_refused(
    flags: list[str], message: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(configs / "crosskd_tiny.py"), "--variant", "student", "-o", str(tmp_path / "times.json")]
    assert time_training.main([*words, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_configs_without_a_teacher_are_refused(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = f"teacher=dict(config={str(configs / 'gfl_tiny_teacher.py')!r})"
    none = tmp_path / "none.py"
    none.write_text(
        f"_base_ = {str(configs / 'crosskd_tiny.py')!r}\nmodel = dict({teacher}, distill=dict(method='none'))\n"
    )
    for path, message in (
        (configs / "gfl_tiny.py", "model.type is GFL; expected CrossKDDetector"),
        (none, "model.distill.method is none; expected a method that has a teacher"),
    ):
        assert time_training.main([str(path), "--variant", "distill", "-o", str(tmp_path / "times.json")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "times.json").exists()
