"""Each setting of a config is honoured, or refused with what to use in its place; none is dropped in silence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config, ConfigDict

from crosskd.config import add_override_argument, load_config, overrides_from_arguments
from crosskd.settings import check_settings, check_types, datasets_of, metrics_of, schedulers_of
from deploy.errors import ConfigError

VERSION_2 = """
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(type="GFL", backbone=dict(type="ResNet", depth=18))
train_pipeline = [dict(type="LoadImageFromFile"), dict(type="Normalize", **img_norm_cfg)]
data = dict(samples_per_gpu=2, train=dict(type="CocoDataset", ann_file="x.json", pipeline=train_pipeline))
optimizer = dict(type="SGD", lr=0.01)
lr_config = dict(policy="step", step=[8, 11])
runner = dict(type="EpochBasedRunner", max_epochs=12)
"""


@pytest.fixture
def checked(configs: Path) -> Callable[..., Config]:
    """Overrides by their dotted keys -> the tiny config with them, checked as a training does it."""

    def checked(**parts: Any) -> Config:
        config = load_config(configs / "gfl_tiny.py")
        for key, value in parts.items():
            config[key] = value
        check_settings(config, "c.py")
        return config

    return checked


def test_a_config_of_mmdet_2_is_refused_also_as_a_teachers(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "v2.py").write_text(VERSION_2)
    named = r"v2.py is written for mmdet 2 \(it has data, optimizer, lr_config, runner, Normalize in a pipeline\)"
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "v2.py")
    with pytest.raises(ConfigError, match=named):
        load_config(configs / "crosskd_tiny.py", {"model.teacher.config": str(tmp_path / "v2.py")})


def test_a_detector_without_normalisation_is_refused_and_mmengines_other_place_for_it_is_read(
    configs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.py"
    base = f"_base_ = {str(configs / 'gfl_tiny.py')!r}\n"
    without = "model = dict(data_preprocessor=None)\n"
    path.write_text(base + without)
    with pytest.raises(ConfigError, match=r"c.py has no model.data_preprocessor, so that nothing would normalise"):
        load_config(path)
    path.write_text(
        f"{base}{without}data_preprocessor = dict(type='DetDataPreprocessor', mean=[1, 2, 3], std=[1, 1, 1])"
    )
    assert load_config(path).model.data_preprocessor.mean == [1, 2, 3]


def test_a_config_whose_types_are_classes_is_read_like_one_of_names(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "from mmengine.hooks import EMAHook\n"
        "from mmdet.models import GFL\n"
        "from mmdet.models.data_preprocessors import DetDataPreprocessor\n"
        "model = dict(type=GFL, data_preprocessor=dict(type=DetDataPreprocessor))\n"
        "custom_hooks = [dict(type=EMAHook, momentum=0.1)]\n"
    )
    config = load_config(path)
    assert (config.model.type, config.model.data_preprocessor.type) == ("GFL", "DetDataPreprocessor")
    assert config.custom_hooks[0].type == "EMAHook"


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lr", r"cannot set lr: nothing reads it \(no such setting\); give the full key .* such as optim_wrapper"),
        ("optim_wraper.optimizer.lr", "the config has no 'optim_wraper' there"),
        ("max_epoch", "nothing reads it .* such as max_epochs"),
        ("base_lr", r"cannot set base_lr: nothing reads it \(it is a variable, used up when the file was read\)"),
        ("train_pipeline", "it is a variable"),
    ],
)
def test_a_key_that_nothing_reads_cannot_be_set(key: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", {key: 1})


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("work_dir", "cannot set work_dir: the run's folder is that of -o"),
        ("resume", "give --resume"),
        ("launcher", "torchrun"),
        ("randomness.seed", "give --seed"),
        ("model.bbox_head.num_classes", "taken from the annotations of the data"),
        ("train_dataloader.dataset.ann_file", "taken from the annotations of the data"),
        ("val_dataloader.dataset.metainfo", "taken from the annotations of the data"),
    ],
)
def test_what_the_command_line_or_the_data_give_cannot_be_set(key: str, named: str) -> None:
    parser = argparse.ArgumentParser()
    add_override_argument(parser)
    with pytest.raises(ConfigError, match=named):
        overrides_from_arguments(parser.parse_args(["--set", f"{key}=1"]))


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (dict(custom_hooks=[dict(type="EarlyStopingHook")]), "'EarlyStopingHook', .* closest that are: EarlyStopping"),
        (dict(custom_hooks=[dict(monitor="x")]), "a hook is .*without a type"),
        (dict(custom_hooks=["EMAHook"]), "a hook is 'EMAHook'; expected a dict"),
        (dict(optim_wrapper=dict(optimizer=dict(type="AdmaW", lr=1))), "optim_wrapper.optimizer .*'AdmaW'.*AdamW"),
        (dict(optim_wrapper=dict(type="OptimWraper")), "optim_wrapper has the type 'OptimWraper'.*OptimWrapper"),
        (dict(param_scheduler=dict(type="CosineAnealingLR")), "'CosineAnealingLR'.*CosineAnnealingLR"),
        (dict(val_evaluator=[dict(type="CocoMetrics")]), "an evaluator has the type 'CocoMetrics'.*CocoMetric"),
        (dict(visualizer=dict(type="DetVisualiser")), "visualizer has the type 'DetVisualiser'"),
        (dict(train_cfg=dict(type="EpochTrainLoop")), "train_cfg has the type 'EpochTrainLoop'.*EpochBasedTrainLoop"),
        (dict(optim_wraper=dict()), "c.py: nothing reads optim_wraper; did you mean"),
        (dict(custom_hook=[]), "c.py: nothing reads custom_hook; did you mean custom_hooks"),
        (dict(resume=True), "resume is True; expected False: give --resume"),
        (dict(env_cfg=dict(cudnn_benchmrk=True)), "nothing reads env_cfg.cudnn_benchmrk"),
        (dict(env_cfg=dict(dist_cfg=dict(backend="mpi"))), "env_cfg.dist_cfg is .*mpi"),
        (dict(auto_scale_lr=dict(enabled=True)), "nothing reads auto_scale_lr.enabled"),
        (dict(model_wrapper_cfg=dict(type="MMFullyShardedDataParallel")), "model_wrapper_cfg is"),
        (dict(val_cfg=None), "c.py has no val_cfg, but the rest of a validation"),
        (dict(test_dataloader=None), "c.py has no `test_dataloader` that is a dict"),
        (dict(optim_wrapper=None), "c.py has no `optim_wrapper` that is a dict"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_honoured_is_one_message(
    parts: dict[str, Any], named: str, checked: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=named):
        checked(**parts)


def test_names_of_data_sets_transforms_and_samplers_are_known(configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py")
    config.train_dataloader.dataset.pipeline[0].type = "LoadImageFromFiles"
    with pytest.raises(ConfigError, match=r"a pipeline has the type 'LoadImageFromFiles'.*LoadImageFromFile"):
        check_types(config)
    config = load_config(configs / "gfl_tiny.py")
    config.train_dataloader.sampler.type = "DefaultSamplr"
    with pytest.raises(ConfigError, match=r"train_dataloader.sampler has the type 'DefaultSamplr'.*DefaultSampler"):
        check_types(config)


def test_what_the_command_line_gives_in_place_of_the_config_is_said(
    checked: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    checked(work_dir="elsewhere", launcher="slurm")
    assert capsys.readouterr().out.splitlines() == [
        "work_dir of the config is not used: the run's folder is that of -o",
        "launcher of the config is not used: start several processes with torchrun",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "gfl/gfl_r50_fpn_1x_coco.py", "rtmdet/rtmdet_tiny_8xb32-300e_coco.py", "yolox/yolox_s_8xb8-300e_coco.py",
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "tood/tood_r50_fpn_1x_coco.py",
        "pascal_voc/retinanet_r50_fpn_1x_voc0712.py",
    ],
)  # fmt: skip
def test_mmdets_own_configs_pass(name: str) -> None:
    check_settings(load_config(f"mmdet::{name}"), name)


def test_one_or_many_evaluators_schedulers_and_data_sets() -> None:
    metric, scheduler = dict(type="CocoMetric"), dict(type="PolyLR")
    assert metrics_of(None) == []
    assert metrics_of(metric) == metrics_of([metric]) == metrics_of(dict(metrics=[metric])) == [metric]
    assert schedulers_of({}) == schedulers_of({"param_scheduler": None}) == []
    for given in (scheduler, [scheduler], {"head": scheduler}, {"head": [scheduler]}):
        assert schedulers_of({"param_scheduler": given}) == [scheduler]
    inner = dict(type="ConcatDataset", datasets=[dict(type="A"), dict(type="B")])
    loader = ConfigDict(dataset=dict(type="RepeatDataset", dataset=inner))
    assert [one.type for one in datasets_of(loader)] == ["RepeatDataset", "ConcatDataset", "A", "B"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("max_epoch = 3", "nothing reads max_epoch; did you mean max_epochs"),
        ("optimizer = dict(type='SGD', lr=0.1)", "nothing reads optimizer: the optimiser is optim_wrapper.optimizer"),
        ("resume_from = 'x.pth'", "nothing reads resume_from: give --resume"),
        ("seed = 3", "nothing reads seed: give --seed"),
        ("model = dict(test_cfg=dict(score_threshold=0.3))", r"nothing reads test_cfg.score_threshold .* score_thr"),
        ("model = dict(test_cfg=dict(nms=dict(iou_thresh=0.3)))", r"nothing reads nms.iou_thresh .* iou_thr"),
        ("model = dict(train_cfg=dict(asigner=dict(type='ATSSAssigner')))", "nothing reads train_cfg.asigner"),
        ("default_hooks = dict(checkpoint=dict(type='CheckpointHook', intervall=5))", "nothing reads intervall"),
        ("default_hooks = [dict(type='CheckpointHook')]", r"default_hooks is .*; expected a dict"),
        ("param_scheduler = 'cosine'", "param_scheduler has 'cosine'; expected a list of dicts"),
        ("param_scheduler = [dict(begin=0, end=3)]", "expected a list of dicts with types"),
        ("custom_hooks = dict(_delete_=True, type='EMAHook')", "custom_hooks has .*; expected a list"),
    ],
)
def test_a_setting_that_would_be_dropped_or_has_no_meaning_is_one_message(
    configs: Path, tmp_path: Path, words: str, named: str
) -> None:
    path = tmp_path / "c.py"
    path.write_text(f"_base_ = {str(configs / 'gfl_tiny.py')!r}\n{words}\n")
    with pytest.raises(ConfigError, match=named):
        check_settings(load_config(path, {"max_epochs": 2}), str(path))


def test_a_variable_that_no_setting_uses_is_said(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.py"
    base = f"_base_ = {str(configs / 'gfl_tiny.py')!r}\n"
    path.write_text(f"{base}lr = 0.0123\noptim_wrapper = dict(optimizer=dict(lr=lr))\n")
    check_settings(load_config(path), str(path))
    assert "no setting has the value" not in capsys.readouterr().out
    path.write_text(f"{base}lr = 0.0123\ntrain_pipeline = [dict(type='LoadImageFromFile')]\n")
    check_settings(load_config(path), str(path))
    assert "no setting has the value of lr, train_pipeline" in capsys.readouterr().out


def test_a_variable_of_mmdets_own_configs_is_not_taken_for_the_input_size() -> None:
    for name in ("ssd/ssd300_coco.py", "yolo/yolov3_d53_8xb8-320-273e_coco.py"):
        check_settings(load_config(f"mmdet::{name}"), f"mmdet::{name}")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"train_dataloader": "x"}, "train_dataloader is 'x'; expected a dict"),
        ({"env_cfg": {"dist_cfg": "gloo"}}, r"env_cfg\.dist_cfg is 'gloo'; expected a dict"),
        ({"train_dataloader.dataset": 3}, r"train_dataloader\.dataset is 3; expected a dict"),
        ({"val_dataloader.dataset": {"_delete_": True, "type": "R", "dataset": [{"type": "A"}, 7]}},
         r"val_dataloader\.dataset\.dataset is 7; expected a dict"),
        ({"train_dataloader.dataset.pipeline": "load"}, r"dataset\.pipeline is 'load'; expected a list of dicts"),
        ({"train_dataloader.dataset.pipeline": [{"no": "type"}]}, "expected a list of dicts with types"),
    ],
)  # fmt: skip
def test_a_part_of_a_loader_that_is_no_dict_is_one_message(
    overrides: dict[str, Any], named: str, configs: Path
) -> None:
    with pytest.raises(ConfigError, match=f"gfl_tiny.py: .*{named}"):
        load_config(configs / "gfl_tiny.py", overrides)
