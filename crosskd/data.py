"""The data of a training: flags, checked sets, and what mmdet's loaders and evaluators read of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.dataset import CocoSet, coco_document, load_coco, renumbered
from deploy.errors import ConfigError, DataError
from deploy.files import write_json
from deploy.layouts import split_paths

if TYPE_CHECKING:
    from mmengine.config import Config


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The two checked sets of a training."""

    train: CocoSet
    val: CocoSet

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data", "either --data, or the four explicit paths")
    group.add_argument("--data", metavar="DIR", help="annotations/instances_{train,val}.json and images/")
    for split in ("train", "val"):
        group.add_argument(f"--{split}-annotations", metavar="FILE", help=f"COCO JSON of the {split} split")
        group.add_argument(f"--{split}-images-dir", metavar="DIR", help=f"folder of the {split} split's images")


def data_from_arguments(arguments: argparse.Namespace) -> TrainingData:
    """
    The sets that the arguments of `add_data_arguments` name, read and checked; clipped boxes are counted on stdout.

    Raises:
        ConfigError: paths are missing or given twice.
        DataError: annotations or images will not do, or the two sets have different classes.
    """
    sets = {}
    for split in ("train", "val"):
        annotations, images_dir = (getattr(arguments, f"{split}_{what}") for what in ("annotations", "images_dir"))
        if arguments.data is not None and (annotations or images_dir):
            raise ConfigError(
                f"--data and --{split}-annotations / --{split}-images-dir were both given; give one or the other"
            )
        if arguments.data is not None:
            annotations, images_dir = split_paths(arguments.data, split)
        elif not (annotations and images_dir):
            raise ConfigError(
                f"no {split} data; give --data DIR, or --{split}-annotations FILE and --{split}-images-dir DIR"
            )
        sets[split] = load_coco(annotations, images_dir)
        if sets[split].clipped:
            print(f"{annotations}: {sets[split].clipped} boxes stick out of their image and were clipped")
    train, val = sets["train"], sets["val"]
    if train.class_names != val.class_names:
        raise DataError(
            f"{train.annotations_path} has the classes {list(train.class_names)}, {val.annotations_path} has "
            f"{list(val.class_names)}; expected the same categories in the same order"
        )
    return TrainingData(train, val)


def set_data(config: Config, data: TrainingData, folder: Path, write: bool = True) -> None:
    """
    Points the config's loaders and evaluators at `data`, with its class names.

    mmdet reads annotation files of its own: those that this writes to `folder` hold the clipped boxes, and the keys
    (`area`, `iscrowd`) that mmdet demands and many sets leave out.
    """
    files = {split: folder / f"annotations_{split}.json" for split in ("train", "val")}
    for split, path in files.items() if write else ():
        write_json(path, coco_document(renumbered(getattr(data, split))))
    for split, loader in (
        ("train", config.train_dataloader),
        ("val", config.val_dataloader),
        ("val", config.test_dataloader),
    ):
        dataset = loader.dataset
        while "dataset" in dataset:  # RepeatDataset, ClassBalancedDataset, ... wrap the real one
            dataset = dataset.dataset
        dataset.update(
            type="CocoDataset",
            data_root="",
            ann_file=str(files[split].resolve()),
            data_prefix=dict(img=f"{getattr(data, split).images_dir.resolve()}/"),
            metainfo=dict(classes=data.class_names),
        )
        if split == "train":
            dataset["filter_cfg"] = dict(filter_empty_gt=False, min_size=0)  # images without boxes are data too
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(files["val"].resolve())
