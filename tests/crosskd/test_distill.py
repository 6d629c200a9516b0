"""crosskd.distill: what it writes is mmdet's, it starts as the baseline does, and it goes on after an interruption."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.runner import EpochBasedTrainLoop, Runner

from crosskd import distill, download, train
from crosskd.config import load_config, set_classes
from crosskd.data import TrainingData, set_data, write_annotations
from crosskd.models.detector import detector_from_config
from crosskd.training import seed_everything
from deploy.contract import read_sidecar
from deploy.dataset import load_split
from deploy.files import sha256_of

LOADS_WITHOUT_CROSSKD = """
import sys, torch
from crosskd.models.ops import register_mmcv_ops
register_mmcv_ops()  # mmdet does not import without; nothing else of this project is used
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
register_all_modules()
detector = MODELS.build(Config.fromfile(sys.argv[1] + "/config.py").model)
state = torch.load(sys.argv[1] + "/student.pth", weights_only=True)["state_dict"]
detector.load_state_dict(state, strict=True)
print(type(detector).__module__, sorted(name for name in sys.modules if name.startswith("crosskd")))
"""


def _words(configs: Path, shapes_dir: Path, teacher_run: Path, run_dir: Path) -> list[str]:
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(run_dir)]
    return [*words, "--teacher-checkpoint", str(teacher_run / "detector.pth")]


def test_the_student_loads_into_mmdets_own_detector_in_a_fresh_process(student_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS_WITHOUT_CROSSKD, str(student_run)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1] == "mmdet.models.detectors.gfl ['crosskd', 'crosskd.models', 'crosskd.models.ops']"
    )


def test_the_sidecar_names_the_teacher(student_run: Path, teacher_run: Path) -> None:
    teacher = read_sidecar(student_run / "student.pth")["inputs"]["teacher_checkpoint"]
    assert teacher["sha256"] == sha256_of(teacher_run / "detector.pth")
    assert not (student_run / "detector.pth").exists()


def test_student_and_baseline_start_from_the_same_weights(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path
) -> None:
    words = _words(configs, shapes_dir, teacher_run, tmp_path / "student")
    # A learning rate of zero, and no schedule that lifts it, leave the first weights as they are.
    still = ["--seed", "7", "--set", "optim_wrapper.optimizer.lr=0.0", "param_scheduler=[]"]
    assert distill.main([*words, *still]) == 0
    assert train.main([*words[:3], "-o", str(tmp_path / "baseline"), *still]) == 0
    student = torch.load(tmp_path / "student" / "student.pth", weights_only=True)["state_dict"]
    baseline = torch.load(tmp_path / "baseline" / "detector.pth", weights_only=True)["state_dict"]
    assert student.keys() == baseline.keys()
    # The running statistics are of the same images in the same order.
    assert all(torch.equal(student[key], baseline[key]) for key in student)


def test_an_interrupted_run_is_resumed_where_it_was(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*_words(configs, shapes_dir, teacher_run, tmp_path / "run"), "--epochs", "2"]
    epochs: list[int] = []
    teachers: list[dict[str, torch.Tensor]] = []
    run_epoch = EpochBasedTrainLoop.run_epoch

    def interrupted(loop: Any) -> None:
        if loop.epoch == 1:
            raise KeyboardInterrupt
        teachers.append(loop.runner.model.teacher.state_dict())
        run_epoch(loop)

    def counted(loop: Any) -> None:
        epochs.append(loop.epoch)
        teacher = loop.runner.model.teacher.state_dict()
        assert all(torch.equal(teacher[key], value) for key, value in teachers[0].items())
        run_epoch(loop)

    monkeypatch.setattr(EpochBasedTrainLoop, "run_epoch", interrupted)
    assert distill.main(words) == 130
    assert (tmp_path / "run" / "epoch_1.pth").is_file()
    assert not (tmp_path / "run" / "student.pth").exists()
    monkeypatch.setattr(EpochBasedTrainLoop, "run_epoch", counted)
    assert distill.main([*words, "--resume"]) == 0
    assert epochs == [1]
    details = read_sidecar(tmp_path / "run" / "student.pth")["details"]
    assert (details["epochs"], details["iterations"]) == (2, 4)


@pytest.mark.parametrize(
    ("config", "checkpoint", "named"),
    [
        ("crosskd_tiny.py", None, "mmdet publishes no weights for gfl_tiny_teacher.py; give --teacher-checkpoint"),
        ("crosskd_tiny.py", "nope.pth", "no such checkpoint: nope.pth"),
        ("crosskd_tiny.py", "student.pth", "not a checkpoint of this GFL"),
        ("gfl_tiny.py", "student.pth", "model.type is GFL; expected CrossKDDetector"),
    ],
)
def test_a_bad_teacher_leaves_nothing_behind(
    config: str, checkpoint: str | None, named: str, configs: Path, shapes_dir: Path, student_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [str(configs / config), "--data", str(shapes_dir), "-o", str(tmp_path / "run")]
    if checkpoint is not None:
        words += ["--teacher-checkpoint", str(student_run / checkpoint) if checkpoint == "student.pth" else checkpoint]
    assert distill.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # the lines before tell of the data
    assert error.startswith("error: ")
    assert named in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_distillation_is_plain_mmdet_training_weight_for_weight(
    configs: Path, shapes_dir: Path, tmp_path: Path
) -> None:
    """By mmengine's own runner and nothing of ours but the data: four steps of SGD in float32, without a teacher."""
    sgd = {"_delete_": True, "type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}}
    plain = load_config(configs / "gfl_tiny.py", {"max_epochs": 2, "optim_wrapper": dict(sgd)})
    data = TrainingData(*(load_split(shapes_dir, split) for split in ("train", "val")))
    set_classes(plain, data.class_names)
    set_data(plain, data, tmp_path)
    write_annotations(data, tmp_path)
    plain.work_dir, plain.randomness = str(tmp_path / "plain"), dict(seed=3)
    seed_everything(3)  # as the command does before it builds the detector
    detector = MODELS.build(plain.model)
    names = set(inspect.signature(Runner.__init__).parameters) - {"self", "model", "cfg"}
    runner = Runner(model=detector, cfg=plain, **{name: plain[name] for name in names if name in plain})
    runner.train()

    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "none"), "--epochs", "2"]
    overrides = ["model.distill.method=none", f"optim_wrapper={sgd}"]
    assert distill.main([*words, "--seed", "3", "--precision", "fp32", "--set", *overrides]) == 0
    found = torch.load(tmp_path / "none" / "student.pth", weights_only=True)["state_dict"]
    expected = runner.model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    ("start", "more", "named"),
    [
        ("nope.pth", [], "no such checkpoint: nope.pth"),
        ("published", [], "mmdet publishes no weights for "),
        ("mmdet::gfl/gfl_r50_fpn_1x_coco.py", [], "cannot download https://example.invalid/w-01234567.pth "),
        ("detector.pth", [], "detector.pth is of another network: 0% of the backbone's parameters fit this GFL"),
        ("teacher", ["model.distill.method=none"], "--from teacher is given with model.distill.method=none"),
    ],
)
def test_bad_weights_to_start_from_leave_nothing_behind(
    start: str, more: list[str], named: str, configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    known = {"mmdet::gfl/gfl_r50_fpn_1x_coco.py": "https://example.invalid/w-01234567.pth"}
    published_url = download.published_url
    monkeypatch.setattr(download, "published_url", lambda name: known.get(name) or published_url(name))
    monkeypatch.setenv("CROSSKD_CACHE", str(tmp_path / "cache"))
    start = str(teacher_run / start) if start == "detector.pth" else start
    words = [*_words(configs, shapes_dir, teacher_run, tmp_path / "run"), "--from", start]
    assert distill.main([*words, *(["--set", *more] if more else [])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_student_starts_from_its_teachers_head(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*_words(configs, shapes_dir, teacher_run, tmp_path / "run"), "--from", "teacher"]
    still = ["--set", "optim_wrapper.optimizer.lr=0.0", "param_scheduler=[]"]
    student = detector_from_config(load_config(configs / "gfl_tiny.py"), load_weights=False)
    torch.save(student.state_dict(), tmp_path / "backbone.pth")
    pretrained = {
        "_delete_": True,
        "type": "Pretrained",
        "checkpoint": str(tmp_path / "backbone.pth"),
        "prefix": "backbone.",
    }
    still.append(f"model.student.backbone.init_cfg={pretrained}")
    assert distill.main([*words, "--teacher-images", "0", *still]) == 0
    recorded = read_sidecar(tmp_path / "run" / "student.pth")["inputs"]["pretrained_backbone"]
    assert recorded["sha256"] == sha256_of(tmp_path / "backbone.pth")
    assert "starting from the teacher:\n  backbone: 0 of 100 tensors" in capsys.readouterr().out
    student, teacher = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "run" / "student.pth", teacher_run / "detector.pth")
    )
    for key in ("bbox_head.gfl_cls.weight", "neck.fpn_convs.0.conv.weight"):
        assert torch.equal(student[key], teacher[key])
