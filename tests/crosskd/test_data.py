"""Data give configs their paths and class names, and their loaders what was checked."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
