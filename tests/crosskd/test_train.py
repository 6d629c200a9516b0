"""crosskd.train: a teacher or a baseline, from a config to plain mmdet weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from crosskd import train
from crosskd.loop.runner import TrainingRunner
from crosskd.models.detector import CrossKDDetector
from deploy.contract import read_sidecar
from deploy.files import sha256_of


def test_the_sidecar_says_what_made_the_weights(teacher_run: Path, shapes_dir: Path) -> None:
    sidecar = read_sidecar(teacher_run / "detector.pth")
    annotations = shapes_dir / "annotations"
    assert {name: entry["sha256"] for name, entry in sidecar["inputs"].items()} == {
        "config": sha256_of(teacher_run / "config.py"),
        "train_annotations": sha256_of(annotations / "instances_train.json"),
        "val_annotations": sha256_of(annotations / "instances_val.json"),
    }
    details = sidecar["details"]
    assert details["class_names"] == ["circle", "triangle", "square", "star", "ring", "cross"]
    assert details["category_ids"] == [1, 2, 3, 4, 5, 6]
    assert (details["epochs"], details["iterations"], details["seed"]) == (1, 2, 0)
    assert details["precision"] == "Bf16OptimWrapper"
    state = torch.load(teacher_run / "detector.pth", weights_only=True)["state_dict"]
    assert 0 < details["parameters"] < sum(value.numel() for value in state.values())  # buffers are none


def test_of_a_distillation_it_trains_the_student_alone(
    configs: Path, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a baseline has no teacher")

    monkeypatch.setattr(CrossKDDetector, "__init__", refuse)
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path)]
    assert train.main([*words, "--precision", "fp32", "--seed", "5"]) == 0
    details = read_sidecar(tmp_path / "detector.pth")["details"]
    assert (details["precision"], details["seed"]) == ("OptimWrapper", 5)
    state = torch.load(tmp_path / "detector.pth", weights_only=True)["state_dict"]
    assert state["backbone.conv1.weight"].shape[0] == 8


def test_settings_that_only_a_distillation_reads_are_refused(
    configs: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "run")]
    assert train.main([*words, "--set", "model.distill.split=1", "model.student.backbone.depth=18"]) == 2
    assert re.search(r"error: cannot set model\.distill\.split: crosskd.train trains .* alone", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--resume"], "nothing to resume"),
        (["--epochs", "0"], "max_epochs is 0"),
        (["--set", "model.backbone.depth=17"], "cannot be built"),
        (["--set", "junk"], "expected KEY=VALUE"),
    ],
)
def test_bad_flags_leave_nothing_behind(
    words: list[str], named: str, configs: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(configs / "gfl_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "run")]
    assert train.main([*command, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # the lines before tell of the data
    assert error.startswith("error: ")
    assert named in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_directory_that_cannot_be_made_is_refused(
    configs: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = [str(configs / "gfl_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "file" / "run")]
    assert train.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path}/file/run: ")


def test_load_from_is_what_a_training_starts_with_and_the_sidecar_names_it(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = teacher_run / "detector.pth"
    words = [str(configs / "gfl_tiny_teacher.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "run")]
    still = ["--set", f"load_from={weights}", "optim_wrapper.optimizer.lr=0.0", "param_scheduler=[]"]
    assert train.main([*words, *still]) == 0
    assert f"starting from {weights}:\n  backbone: 100 of 100 tensors" in capsys.readouterr().out
    assert read_sidecar(tmp_path / "run" / "detector.pth")["inputs"]["load_from"]["sha256"] == sha256_of(weights)
    before, after = (
        torch.load(path, weights_only=True)["state_dict"] for path in (weights, tmp_path / "run/detector.pth")
    )
    parameters = [key for key in before if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(before[key], after[key]) for key in parameters)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim_wrapper.optimizer.lrr=0.1"], "optim_wrapper.optimizer is AdamW, which has no lrr; it takes lr, "),
        (["optim_wrapper.optimizer.type=Adam", "optim_wrapper.optimizer.momentum=0.9"],
         r"is Adam, which has no momentum; it takes lr, betas, .*_delete_=True, type='Adam', lr=0.0"),
        (["model.neck.in_channels=[8, 16, 32, 72]"], "cannot take its first step: RuntimeError: .*72"),
        (["model.backbone.init_cfg={'_delete_': True, 'type': 'Pretrained', 'checkpoint': '/nowhere/r18.pth'}"],
         "the initial weights cannot be read: FileNotFoundError: /nowhere/r18.pth.*init_cfg=None draws"),
        (["custom_hooks=[{'type': 'EMAHook', 'momentun': 0.1}]"], "take its first step: TypeError: .*'momentun'"),
    ],
)  # fmt: skip
def test_what_mmengine_does_not_take_is_one_message_and_keeps_an_earlier_run(
    words: list[str], named: str, configs: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "last_checkpoint").write_text("epoch_3.pth")  # of an earlier run, which could go on
    command = [str(configs / "gfl_tiny.py"), "--data", str(shapes_dir), "-o", str(run_dir), "--set", *words]
    assert train.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*{named}", error)
    # A forward pass is the first that shows widths that do not fit together: the run has begun then.
    assert (run_dir / "last_checkpoint").exists() == ("in_channels" not in words[0])
    assert not list(run_dir.glob("annotations_*"))


def test_weights_that_diverged_in_the_last_step_are_not_written(
    configs: Path, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_well = TrainingRunner.train

    def train_badly(runner: TrainingRunner) -> None:
        train_well(runner)
        with torch.no_grad():
            runner.model.bbox_head.gfl_cls.weight.fill_(float("nan"))

    monkeypatch.setattr(TrainingRunner, "train", train_badly)
    assert train.main([str(configs / "gfl_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "run")]) == 2
    assert "are not finite (such as bbox_head.gfl_cls.weight)" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "detector.pth").exists()


def test_an_error_after_the_first_step_is_one_message_and_its_traceback_is_in_the_log(
    configs: Path, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise IndexError("no such threshold")

    monkeypatch.setattr("mmdet.evaluation.CocoMetric.compute_metrics", fail)
    assert train.main([str(configs / "gfl_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the training ended after 2 steps: IndexError: no such threshold. The traceback")
    assert any("in fail" in log.read_text() for log in tmp_path.rglob("*.log"))
