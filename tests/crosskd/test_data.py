"""Data give configs their paths and class names, and their loaders what was checked."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from crosskd.config import load_config
from crosskd.data import TrainingData, add_data_arguments, data_from_arguments, set_data, write_annotations
from deploy.dataset import load_coco
from deploy.errors import ConfigError, DataError


def _data(*words: str) -> TrainingData:
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    return data_from_arguments(parser.parse_args(list(words)))


def _explicit(annotations: Path, images: Path, split: str) -> list[str]:
    return [f"--{split}-annotations", str(annotations), f"--{split}-images-dir", str(images)]


@pytest.fixture
def edited(shapes_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """(split, change) -> a copy of the data folder whose annotations of that split were changed."""

    def edit(split: str, change: Callable[[Any], Any]) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(shapes_dir, folder)
        path = folder / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
        return folder

    return edit


def test_a_folder_and_explicit_paths_name_the_same_data(shapes_dir: Path) -> None:
    by_folder = _data("--data", str(shapes_dir))
    words = []
    for split in ("train", "val"):
        words += _explicit(shapes_dir / "annotations" / f"instances_{split}.json", shapes_dir / "images", split)
    by_path = _data(*words)
    assert [image.path for image in by_path.val.images] == [image.path for image in by_folder.val.images]
    assert by_folder.class_names == ("circle", "triangle", "square", "star", "ring", "cross")
    assert len(by_folder.train.images) == 8


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no train data; give --data DIR, or --train-annotations"),
        (["--data", "d", "--train-annotations", "a"], "--data and --train-annotations .* both given"),
        (["--train-annotations", "a"], "no train data"),
    ],
)
def test_data_named_twice_or_not_at_all(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _data(*words)


def test_splits_of_other_classes_are_refused(edited: Callable[..., Path]) -> None:
    folder = edited("val", lambda document: document["categories"].reverse())
    with pytest.raises(DataError, match=r"instances_train.json has the classes \['circle'.*instances_val.json has"):
        _data("--data", str(folder))


def test_clipped_boxes_are_counted(edited: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    def stick_out(document: Any) -> None:
        for entry in document["annotations"][:2]:
            entry["bbox"] = [-5, -5, 30, 30]

    data = _data("--data", str(edited("train", stick_out)))
    assert "instances_train.json: 2 boxes stick out of their image and were clipped" in capsys.readouterr().out
    assert data.train.clipped == 2


def test_the_loaders_read_what_was_checked(
    configs: Path, edited: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(document: Any) -> None:
        first = document["annotations"][0]
        first["bbox"] = [-5, -5, 30, 30]
        for entry in document["annotations"]:
            del entry["area"], entry["iscrowd"]  # which mmdet demands
        image_id = document["images"][-1]["id"]
        document["annotations"] = [one for one in document["annotations"] if one["image_id"] != image_id]

    monkeypatch.chdir(edited("train", change).parent)
    data = _data("--data", "edited")
    config = load_config(configs / "gfl_tiny.py")
    config.train_dataloader.dataset = dict(
        type="RepeatDataset", times=2, dataset=config.train_dataloader.dataset
    )  # whose real data set lies one deeper
    set_data(config, data, Path("run"))
    write_annotations(data, Path("run"))
    monkeypatch.chdir("/")  # paths of the config hold from anywhere

    from mmdet.registry import DATASETS

    train, val = (DATASETS.build(loader.dataset) for loader in (config.train_dataloader, config.val_dataloader))
    assert len(train) == 2 * 8  # the image without boxes is one of them
    assert train.metainfo["classes"] == val.metainfo["classes"] == data.class_names
    real = train.dataset
    boxes = [instance["bbox"] for index in range(8) for instance in real.get_data_info(index)["instances"]]
    assert boxes[0] == [0, 0, 25, 25]  # clipped
    expected = [box for image in data.train.images for box in image.boxes_xyxy.tolist()]
    assert boxes == [pytest.approx(box) for box in expected]
    labels = [one["bbox_label"] for index in range(8) for one in real.get_data_info(index)["instances"]]
    assert labels == [label for image in data.train.images for label in image.labels.tolist()]
    assert config.val_evaluator.ann_file == config.test_evaluator.ann_file == config.val_dataloader.dataset.ann_file
    written = load_coco(tmp_path / "run" / "annotations_train.json", tmp_path / "edited" / "images")
    assert written.clipped == 0
    assert written.category_ids == data.train.category_ids


@pytest.fixture
def data(shapes_dir: Path) -> TrainingData:
    return _data("--data", str(shapes_dir))


@pytest.fixture
def config(configs: Path) -> Any:
    return load_config(configs / "gfl_tiny.py")


def _built_train_set(config: Any, data: TrainingData, folder: Path) -> Any:
    from mmdet.registry import DATASETS

    set_data(config, data, folder)
    write_annotations(data, folder)
    return DATASETS.build(config.train_dataloader.dataset)


@pytest.mark.parametrize(
    ("wrapper", "length"),
    [
        (lambda part: dict(type="ConcatDataset", datasets=[part, dict(part)]), 16),
        (lambda part: dict(type="RepeatDataset", times=3, dataset=part), 24),
        (lambda part: dict(type="MultiImageMixDataset", pipeline=[dict(type="PackDetInputs")], dataset=part), 8),
        (lambda part: dict(type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[part] * 2)), 32),
    ],
)  # fmt: skip
def test_data_sets_that_wrap_and_join_others_read_the_data(
    wrapper: Callable[[Any], Any], length: int, config: Any, data: TrainingData, tmp_path: Path
) -> None:
    config.train_dataloader.dataset = wrapper(config.train_dataloader.dataset)
    built = _built_train_set(config, data, tmp_path)
    assert len(built) == length
    assert built.metainfo["classes"] == data.class_names


def test_rare_classes_are_repeated(config: Any, data: TrainingData, tmp_path: Path) -> None:
    part = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(type="ClassBalancedDataset", oversample_thr=0.9, dataset=part)
    assert len(_built_train_set(config, data, tmp_path)) > 8


def test_sets_of_different_files_cannot_be_joined(config: Any, data: TrainingData, tmp_path: Path) -> None:
    part = config.train_dataloader.dataset
    parts = [{**part, "ann_file": f"{name}.json"} for name in "ab"]
    config.train_dataloader.dataset = dict(type="ConcatDataset", datasets=parts)
    with pytest.raises(ConfigError, match="joins 2 sets of different annotations, --data gives one; merge"):
        set_data(config, data, tmp_path)


def test_what_is_evaluated_is_every_image_once(config: Any, data: TrainingData, tmp_path: Path) -> None:
    plain = config.val_dataloader.dataset
    config.val_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=plain)
    with pytest.raises(ConfigError, match=r"val_dataloader.dataset is a RepeatDataset; expected a plain data set"):
        set_data(config, data, tmp_path)
    config.val_dataloader.dataset = {**plain, "indices": 3}
    with pytest.raises(ConfigError, match=r"val_dataloader.dataset.indices is 3; expected none"):
        set_data(config, data, tmp_path)


def test_a_voc_data_set_is_replaced_and_its_metric_refused(
    config: Any, data: TrainingData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.train_dataloader.dataset.update(type="VOCDataset", ann_subdir="Annotations", img_subdir="JPEGImages")
    assert len(_built_train_set(config, data, tmp_path)) == 8
    said = "VOCDataset of the config is replaced by CocoDataset, without its ann_subdir, img_subdir"
    assert said in capsys.readouterr().out
    config.val_evaluator = dict(type="VOCMetric", metric="mAP")
    with pytest.raises(ConfigError, match=r"val_evaluator is a VOCMetric.*expected dict\(type='CocoMetric'"):
        set_data(config, data, tmp_path)


@pytest.mark.parametrize(
    ("metric", "named"),
    [("segm", "the data have no masks"), (["bbox", "proposal_fast"], "fails where images differ in boxes")],
)
def test_a_measure_that_cannot_be_had_is_refused(
    metric: Any, named: str, config: Any, data: TrainingData, tmp_path: Path
) -> None:
    config.val_evaluator.metric = metric
    with pytest.raises(ConfigError, match=f"val_evaluator measures .*{named}"):
        set_data(config, data, tmp_path)


def test_every_evaluator_of_a_list_gets_the_annotations(config: Any, data: TrainingData, tmp_path: Path) -> None:
    config.val_evaluator = [dict(type="CocoMetric", metric="bbox"), dict(type="CocoMetric", metric="proposal")]
    config.test_evaluator = dict(type="Evaluator", metrics=[dict(type="CocoMetric")])
    set_data(config, data, tmp_path)
    expected = config.val_dataloader.dataset.ann_file
    assert [one.ann_file for one in [*config.val_evaluator, *config.test_evaluator.metrics]] == [expected] * 3


def test_a_config_without_validation_has_none(config: Any, data: TrainingData, tmp_path: Path) -> None:
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    set_data(config, data, tmp_path)
    assert config.test_dataloader.dataset.ann_file


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(CLASSES="shape"), r"CLASSES of the config is the string 'shape', .* expected \('shape',\)"),
        (dict(metainfo=dict(classes="shape")), "metainfo.classes of the config is the string 'shape'"),
        (dict(classes=("car", "bus")), r"classes of the config is \('car', 'bus'\), the data have the classes"),
    ],
)
def test_a_class_list_that_contradicts_the_data_is_refused(
    change: dict[str, Any], named: str, config: Any, data: TrainingData, tmp_path: Path
) -> None:
    for key, value in change.items():
        config[key] = value
    with pytest.raises(ConfigError, match=named):
        set_data(config, data, tmp_path)


def test_so_is_one_of_a_data_set_and_another_order_is_said(
    config: Any, data: TrainingData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.train_dataloader.dataset.metainfo = dict(classes="shape")
    with pytest.raises(ConfigError, match=r"train_dataloader.dataset.metainfo.classes of the config is the string"):
        set_data(config, data, tmp_path)
    config.train_dataloader.dataset.metainfo = dict(classes=data.class_names[::-1])
    set_data(config, data, tmp_path)
    assert "is in another order than the annotations; theirs counts: ['circle'" in capsys.readouterr().out
    assert config.train_dataloader.dataset.metainfo.classes == data.class_names
    set_data(config, data, tmp_path)  # the same classes are nothing to speak of
    assert capsys.readouterr().out == ""


def test_a_filter_of_the_config_holds_and_says_what_it_leaves_out(
    config: Any, edited: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def empty_one(document: Any) -> None:
        image_id = document["images"][-1]["id"]
        document["annotations"] = [one for one in document["annotations"] if one["image_id"] != image_id]

    data = _data("--data", str(edited("train", empty_one)))
    config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=32)
    capsys.readouterr()
    assert len(_built_train_set(config, data, tmp_path)) == 7
    assert "filter_cfg of the config leaves out 1 of 8 training images" in capsys.readouterr().out
    config.train_dataloader.dataset.filter_cfg = dict(min_size=1000)
    with pytest.raises(ConfigError, match="which leaves no image of 8"):
        set_data(config, data, tmp_path)


def test_masks_are_refused(config: Any, data: TrainingData, tmp_path: Path) -> None:
    config.train_dataloader.dataset.pipeline[1].with_mask = True
    with pytest.raises(ConfigError, match=r"train_dataloader loads masks .*expected boxes alone"):
        set_data(config, data, tmp_path)


def test_the_classes_of_the_test_split_are_compared_before_the_training(edited: Callable[..., Path]) -> None:
    def drop(document: Any) -> None:
        last = document["categories"].pop()["id"]
        document["annotations"] = [entry for entry in document["annotations"] if entry["category_id"] != last]

    folder = edited("test", drop)
    with pytest.raises(DataError, match=r"instances_train.json has the classes .*'cross' \(id 6\) is missing"):
        _data("--data", str(folder))


def test_classes_that_no_split_has_boxes_of_are_left_out_on_request(
    shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Roboflow writes it: the name of the project as a class of its own, the first."""
    folder = tmp_path / "roboflow"
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        document = json.loads((shapes_dir / "annotations" / f"instances_{split}.json").read_text())
        group = {"id": 0, "name": "shapes", "supercategory": "none"}
        document["categories"] = [group, *(dict(one, supercategory="shapes") for one in document["categories"])]
        shutil.copytree(shapes_dir / "images", folder / name)
        (folder / name / "_annotations.coco.json").write_text(json.dumps(document))
    plain = _data("--data", str(folder))
    assert plain.class_names[0] == "shapes"
    assert "'shapes' looks like a name of the group" in capsys.readouterr().err
    dropped = _data("--data", str(folder), "--drop-empty-classes")
    assert dropped.class_names == plain.class_names[1:]
    assert "1 classes have no box in any split and are left out: shapes" in capsys.readouterr().out
    for one, other in zip(plain.val.images, dropped.val.images, strict=True):
        assert (one.labels - 1).tolist() == other.labels.tolist()


def test_an_export_of_one_split_is_no_training_set(shapes_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cvat"
    shutil.copytree(shapes_dir / "images", folder / "images")
    (folder / "annotations").mkdir()
    shutil.copy(shapes_dir / "annotations/instances_train.json", folder / "annotations/instances_default.json")
    with pytest.raises(DataError, match=r"instances_default.json is the file of more than one of the splits"):
        _data("--data", str(folder))


def test_mmdets_own_ap_goes_by_the_limits_of_coco(shapes_dir: Path, configs: Path, tmp_path: Path) -> None:
    config = load_config(configs / "gfl_tiny.py")
    set_data(config, _data("--data", str(shapes_dir)), tmp_path)
    assert tuple(config.val_evaluator.proposal_nums) == (1, 10, 100)


def test_a_picture_that_no_evaluation_could_read_ends_the_training_before_it_begins(
    shapes_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(shapes_dir, folder)
    image = json.loads((folder / "annotations/instances_val.json").read_text())["images"][0]
    pixels = np.random.default_rng(0).integers(0, 255, (image["height"], image["width"], 3), np.uint8)
    content = cv2.imencode(".png", pixels)[1].tobytes()
    start = content.index(b"IDAT") + 4
    (folder / "images" / image["file_name"]).write_bytes(content[:start] + bytes(500) + content[start + 500 :])
    with pytest.raises(DataError, match=f"1 of .* pictures cannot be decoded: .*{image['file_name']}"):
        _data("--data", str(folder))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("metainfo", ["disc"], r"metainfo of the config is \['disc'\]; expected dict\(classes"),
        ("train_dataloader.drop_last", True, "leaves no batch of"),
    ],
)
def test_what_leaves_no_classes_or_no_batch_is_refused(
    configs: Path, data: TrainingData, tmp_path: Path, key: str, value: Any, named: str
) -> None:
    config = load_config(configs / "gfl_tiny.py")
    config.train_dataloader.batch_size = 1000
    config.merge_from_dict({key: value})
    with pytest.raises(ConfigError, match=named):
        set_data(config, data, tmp_path)
