"""Configs load and build; overrides, epochs and sizes change them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd.config import add_override_argument, load_config, overrides_from_arguments, path_beside, set_classes
from crosskd.models.detector import CrossKDDetector, detector_from_config
from deploy.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODULES = ("nanodet_detector.py", "half_weights.py")
"""Beside the configs that import them."""
SHIPPED = sorted(
    path for path in (ROOT / "configs").rglob("*.py") if path.parent.name != "_base_" and path.name not in MODULES
)


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **_kwargs: Any) -> None:
        raise AssertionError(f"building downloads {args}")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(ROOT)) for path in SHIPPED])
def test_every_shipped_config_builds_and_downloads_nothing(path: Path, no_download: None) -> None:
    config = load_config(path)
    # Layers without memory make a ResNet-101 take no time; Swin computes with what it builds.
    with torch.device("cpu" if "swint" in path.name else "meta"):
        detector = detector_from_config(config, load_weights=False)
    distils = "crosskd" in path.name
    assert isinstance(detector, CrossKDDetector) == distils
    assert config.train_cfg.max_epochs == config.get("max_epochs", config.train_cfg.max_epochs)
    if distils and config.model.teacher.get("checkpoint"):
        assert config.model.teacher.checkpoint.startswith("https://")  # not a file of one machine


def test_there_are_configs_to_test() -> None:
    assert {"gfl_r18_half_320.py", "crosskd_gfl_r50_r101_1x_coco.py"} <= {path.name for path in SHIPPED}


def test_a_teachers_config_lies_beside_the_students(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = load_config(configs / "crosskd_tiny.py")
    assert config.model.teacher.model.backbone.base_channels == 16
    assert config.model.student.backbone.base_channels == 8
    assert path_beside("mmdet::gfl/x.py", "configs/a.py") == "mmdet::gfl/x.py"
    assert path_beside("/b.py", "configs/a.py") == "/b.py"


def test_overrides_win_over_the_file(configs: Path) -> None:
    config = load_config(configs / "crosskd_tiny.py", {"model.distill.split": 2, "model.teacher.config": "gfl_tiny.py"})
    assert config.model.distill.split == 2
    assert config.model.teacher.model.backbone.base_channels == 8


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model.bakbone.depth": 50}, "cannot set model.bakbone.depth: the config has no 'bakbone' there"),
        ({"train_cfg.max_epochs": 3}, "cannot set train_cfg.max_epochs: this config has max_epochs, which wins"),
    ],
)
def test_an_override_without_effect_is_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(ROOT / "configs" / "gfl_r34_320.py", overrides)


def test_max_epochs_stretches_the_schedule() -> None:
    config = load_config(ROOT / "configs" / "gfl_r18_half_320.py", {"max_epochs": 50})
    assert config.train_cfg.max_epochs == 50
    warmup, cosine = config.param_scheduler
    assert (warmup.begin, warmup.end) == (0, 50)  # counts iterations
    assert (cosine.begin, cosine.end, cosine.T_max) == (0, 50, 50)
    steps = load_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {"max_epochs": 24})
    assert steps.param_scheduler[1].milestones == [16, 22]


SYSTEMS = [
    "crosskd_gfl_r50_r101_1x_coco.py",
    "crosskd_atss_r50_r101_1x_coco.py",
    "crosskd_fcos_r50_r101_2x_coco.py",
    "crosskd_retinanet_r50_r101_2x_coco.py",
]


@pytest.mark.parametrize("name", SYSTEMS)
def test_batchnorm_head_gives_the_students_head_and_neck_batchnorm_and_leaves_the_teacher(name: str) -> None:
    plain = load_config(ROOT / "configs" / name)
    config = load_config(ROOT / "configs" / name, {"batchnorm_head": True})
    assert config.model.teacher == plain.model.teacher
    assert config.model.student.backbone == plain.model.student.backbone
    with torch.device("meta"):
        student = detector_from_config(config, load_weights=False).student
    towers = [*student.bbox_head.cls_convs, *student.bbox_head.reg_convs]
    for layer in [*towers, *student.neck.lateral_convs, *student.neck.fpn_convs]:
        assert isinstance(layer.norm, torch.nn.BatchNorm2d)
    assert len(towers) == 8


def test_a_head_that_had_no_norms_is_trained_with_batchnorm(make_batch: Callable[..., Any]) -> None:
    path = ROOT / "configs" / "crosskd_retinanet_r18_r50_1x_coco.py"
    detector = detector_from_config(load_config(path, {"batchnorm_head": True}), load_weights=False).train()
    losses = detector.loss(*make_batch([2, 1]))
    sum(sum(values) for values in losses.values()).backward()
    norm = detector.student.bbox_head.cls_convs[0].bn
    assert norm.weight.grad.abs().sum() > 0
    assert norm.num_batches_tracked == 5  # once for each level: they share the head


def test_batchnorm_head_holds_for_a_plain_detector_and_in_the_config_of_its_run(tmp_path: Path) -> None:
    config = load_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {"batchnorm_head": True})
    config.dump(tmp_path / "config.py")
    for read in (config, load_config(tmp_path / "config.py")):
        assert read.model.bbox_head.norm_cfg == read.model.neck.norm_cfg == dict(type="BN", requires_grad=True)
        assert [hook["type"] for hook in read.custom_hooks] == ["FreezeHeadNormsHook"]
    assert (
        load_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {"batchnorm_head": False}).model.neck.get("norm_cfg") is None
    )


def test_input_size_is_that_of_every_pipeline() -> None:
    config = load_config(ROOT / "configs" / "crosskd_gfl_r18_half_r34_320.py", {"input_size": [640, 512]})
    for name in ("train", "val", "test"):
        pipeline = config[f"{name}_dataloader"].dataset.pipeline
        assert [one.scale for one in pipeline if one.type == "FitResize"] == [(640, 512)]
        assert [one["size"] for one in pipeline if one.type == "FitPad"] == [(640, 512)]


@pytest.mark.parametrize(
    ("name", "size", "named"),
    [
        ("gfl_r18_half_320.py", 640, "input_size is 640; expected"),
        ("gfl_r18_half_320.py", [640, 500], r"multiples of 32.*such as \(640, 512\)"),
        ("crosskd_gfl_r50_r101_1x_coco.py", [640, 512], "no pipeline of this config has FitResize"),
    ],
)
def test_an_input_size_that_cannot_be_is_refused(name: str, size: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(ROOT / "configs" / name, {"input_size": size})


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("mmdet::gfl/gfl_r50_fpn_1x_coco.py", "yes", "batchnorm_head is 'yes'; expected True or False"),
        (
            "mmdet::detr/detr_r18_8xb2-500e_coco.py",
            True,
            "the detector's bbox_head is DETRHead; expected one that takes",
        ),
        ("mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py", True, "the detector's neck is CTResNetNeck"),
        ("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", True, "the detector's bbox_head is None"),
    ],
)
def test_batchnorm_head_without_such_a_head_is_refused(name: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(name, {"batchnorm_head": value})


def test_override_words() -> None:
    parser = argparse.ArgumentParser()
    add_override_argument(parser)

    def overrides(*words: str) -> dict[str, Any]:
        return overrides_from_arguments(parser.parse_args(["--set", *words]))

    assert overrides("a.b=3", "c=x=y", "d=[1, 2]", "e=") == {"a.b": 3, "c": "x=y", "d": [1, 2], "e": ""}
    assert overrides("a={[]: 1}") == {"a": "{[]: 1}"}
    with pytest.raises(ConfigError, match=r"--set a=\.\.\. has a value that is nested too deeply"):
        overrides(f"a={'-' * 100_000}1")
    with pytest.raises(ConfigError, match="--set a: expected KEY=VALUE"):
        overrides("a")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such config: .*c.py; expected a Python file, or mmdet::"),
        ("x = (\n", "not a config that mmengine can read: SyntaxError"),
        ("raise ValueError('on purpose')\n", "ValueError: on purpose"),
        ("_base_ = './nope.py'\n", "nope.py"),
        ("x = 1\n", "has no `model` that is a dict"),
        ("model = 3\n", "has no `model` that is a dict"),
        ("model = dict(teacher=dict())\n", "model.teacher has neither `config` nor `model`"),
        ("model = dict(teacher=dict(config='nope.py'))\n", "no such config: .*nope.py"),
        ("model = dict()\nmax_epochs = 'many'\n", "max_epochs is 'many'; expected a number"),
        ("model = dict()\nmax_epochs = 0\n", "max_epochs is 0; expected a number, at least 1"),
        ("model = dict()\nmax_epochs = 3\n", "train_cfg has no max_epochs"),
    ],
)
def test_a_bad_config_is_refused(content: str | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(path)
    assert "c.py" in str(caught.value) or "max_epochs" in str(caught.value) or "nope.py" in str(caught.value)


def test_an_unknown_config_of_mmdet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mmdet::gfl/nope.py is not a config"):
        load_config("mmdet::gfl/nope.py")


def test_the_number_of_classes_goes_into_student_and_teacher(configs: Path) -> None:
    config = load_config(configs / "crosskd_tiny.py")
    set_classes(config, ("a", "b", "c"))
    detector = detector_from_config(config, load_weights=False)
    assert detector.student.bbox_head.num_classes == detector.teacher.bbox_head.num_classes == 3


@pytest.mark.parametrize(
    ("name", "flips", "named"),
    [
        ("gfl_r18_half_320.py", "vertical", "flips is 'vertical'; expected one of horizontal, all"),
        (
            "../tests/crosskd/configs/gfl_tiny.py",
            "all",
            "flips is 'all', but the training's pipeline has no RandomFlip",
        ),
    ],
)
def test_flips_that_cannot_be_are_refused(name: str, flips: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(ROOT / "configs" / name, {"flips": flips})
