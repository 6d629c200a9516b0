"""The data of a training: flags, checked sets, and what mmdet's loaders and evaluators read of them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosskd.settings import EVALUATORS, datasets_of, metrics_of, transforms_of
from deploy.data_arguments import add_data_argument, add_strict_argument
from deploy.dataset import CocoSet, check_pictures, coco_document, load_coco, renumbered, with_classes
from deploy.errors import ConfigError, DataError
from deploy.files import write_json
from deploy.layouts import has_split, split_paths

if TYPE_CHECKING:
    from mmengine.config import Config


DETECTIONS_COUNTED = (1, 10, 100)
"""COCO's limits on the detections of a class in an image. mmdet's own go up to 1000, so that its AP50 and the like of
crowded images would be others than `benchmarks.accuracy` gives."""


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
    add_data_argument(group)
    for split in ("train", "val"):
        group.add_argument(f"--{split}-annotations", metavar="FILE", help=f"COCO JSON of the {split} split")
        group.add_argument(f"--{split}-images-dir", metavar="DIR", help=f"folder of the {split} split's images")
    add_training_data_arguments(parser)


def add_training_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --strict and --drop-empty-classes."""
    add_strict_argument(parser)
    parser.add_argument(
        "--drop-empty-classes", action="store_true",
        help="leave out the classes that have no box in any split, such as the group that Roboflow writes as a class",
    )  # fmt: skip


def data_from_arguments(arguments: argparse.Namespace) -> TrainingData:
    """
    The sets that the arguments of `add_data_arguments` name, read and checked; clipped boxes are counted on stdout.

    The classes of a test split of --data are compared, too: its detectors are to be measured there.

    Raises:
        ConfigError: paths are missing or given twice.
        DataError: annotations or images will not do, or the splits have different classes.
    """
    paths = {}
    for split in ("train", "val"):
        annotations, images_dir = (getattr(arguments, f"{split}_{what}") for what in ("annotations", "images_dir"))
        if arguments.data is not None and (annotations or images_dir):
            raise ConfigError(
                f"--data and --{split}-annotations / --{split}-images-dir were both given; give one or the other"
            )
        if arguments.data is not None:
            paths[split] = split_paths(arguments.data, split)
        elif annotations and images_dir:
            paths[split] = Path(annotations), Path(images_dir)
        else:
            raise ConfigError(
                f"no {split} data; give --data DIR, or --{split}-annotations FILE and --{split}-images-dir DIR"
            )
    if arguments.data is not None and has_split(arguments.data, "test"):
        paths["test"] = split_paths(arguments.data, "test")
    sets = load_splits(paths, arguments.strict, arguments.drop_empty_classes, only_classes=("test",))
    check_pictures(sets["val"].images)  # a damaged one would end the training at the first evaluation
    return TrainingData(sets["train"], sets["val"])


def load_splits(
    paths: Mapping[str, tuple[Path, Path]],
    strict: bool = False,
    drop_empty_classes: bool = False,
    only_classes: Collection[str] = (),
) -> dict[str, CocoSet]:
    """
    The sets of several splits, of which the first names the classes; clipped boxes are counted on stdout.

    Args:
        paths: split -> annotation file and image folder.
        strict: refuse boxes of no use.
        drop_empty_classes: leave out the classes that have no box in any split.
        only_classes: splits whose image files are not looked at.

    Raises:
        DataError: annotations or images will not do, the splits have different classes, or two of them are one file.
    """
    named = [path.resolve() for path, _ in paths.values()]
    if len(set(named)) < len(named):
        raise DataError(
            f"{named[0]} is the file of more than one of the splits {', '.join(paths)}; expected one for each, such as "
            "exports of CVAT in folders of these names"
        )
    sets = {}
    for split, files in paths.items():
        sets[split] = load_coco(*files, check_files=split not in only_classes, strict=strict, by_class=True)
        if sets[split].clipped:
            print(
                f"{sets[split].annotations_path}: {sets[split].clipped} boxes stick out of their image and were clipped"
            )
    reference = next(iter(sets.values()))
    names, category_ids = reference.class_names, reference.category_ids
    if drop_empty_classes:
        used = {coco.class_names[label] for coco in sets.values() for image in coco.images for label in image.labels}
        dropped = [name for name in names if name not in used]
        if dropped:
            print(f"{len(dropped)} classes have no box in any split and are left out: {', '.join(dropped)}")
        kept = {name: number for name, number in zip(names, category_ids, strict=True) if name in used}
        names, category_ids = tuple(kept), tuple(kept.values())
    for split, coco in sets.items():
        sets[split] = with_classes(coco, names, category_ids, str(reference.annotations_path), ordered=True)
    return sets


CLASS_LISTS = ("classes", "CLASSES", "class_names", "class_name", "CLASS_NAMES")
"""Names that configs give to a list of classes."""
METRICS_OF_BOXES = ("CocoMetric", "DumpDetResults", "DumpProposals")
"""mmdet's metrics that data in COCO format have all for."""


def set_data(config: Config, data: TrainingData, folder: Path) -> None:
    """
    Points the config's loaders and evaluators at `data`, as `write_annotations` writes them to `folder`.

    Raises:
        ConfigError: the config asks for more than `--data` gives (several sets, masks, metrics of another format), or
            names classes that the data do not have.
    """
    check_class_lists(config, data.class_names)
    files = annotation_files(folder)
    for key, split in (("train_dataloader", "train"), ("val_dataloader", "val"), ("test_dataloader", "val")):
        for dataset in plain_datasets(config, key):
            _point_dataset(dataset, getattr(data, split), files[split], data.class_names, key)
    loader = config.train_dataloader
    size = loader.get("batch_size")
    if loader.get("drop_last") and isinstance(size, int) and size > len(data.train.images):
        raise ConfigError(
            f"train_dataloader has batch_size={size} and drop_last=True, which leaves no batch of "
            f"{len(data.train.images)} images. Give a smaller batch_size"
        )
    for dataset in plain_datasets(config, "train_dataloader"):
        _say_what_is_filtered(dataset.setdefault("filter_cfg", dict(filter_empty_gt=False, min_size=0)), data.train)
    for key in EVALUATORS:
        for metric in metrics_of(config.get(key)):
            _point_metric(metric, files["val"], key)


def annotation_files(folder: Path) -> dict[str, Path]:
    return {split: folder / f"annotations_{split}.json" for split in ("train", "val")}


def write_annotations(data: TrainingData, folder: Path) -> list[Path]:
    """
    Writes annotation files for mmdet, which hold the clipped boxes, and the keys (`area`, `iscrowd`) that mmdet demands
    and many sets leave out. Returns those that were not there before.
    """
    files = annotation_files(folder)
    new = [path for path in files.values() if not path.exists()]
    for split, path in files.items():
        write_json(path, coco_document(renumbered(getattr(data, split))))
    return new


def plain_datasets(config: Config, key: str) -> list[Any]:
    """
    The data sets of a loader, without what wraps them (RepeatDataset, ClassBalancedDataset, MultiImageMixDataset).

    Raises:
        ConfigError: there are several different ones, or what is evaluated is wrapped.
    """
    loader = config.get(key)
    datasets = list(datasets_of(loader))
    if key != "train_dataloader" and len(datasets) > 1:
        raise ConfigError(
            f"{key}.dataset is a {datasets[0].type}; expected a plain data set: an image that is there twice, or "
            "not at all, would make AP wrong"
        )
    plain = [dataset for dataset in datasets if "dataset" not in dataset and "datasets" not in dataset]
    if len({str([dataset.get(name) for name in ("ann_file", "data_root", "data_prefix")]) for dataset in plain}) > 1:
        raise ConfigError(
            f"{key}.dataset joins {len(plain)} sets of different annotations, --data gives one; merge their COCO files "
            "into one, or train on them one after the other (load_from)"
        )
    for step in transforms_of(loader):
        if step.get("with_mask") or step.get("with_seg"):
            raise ConfigError(
                f"{key} loads masks ({step.type} with with_mask or with_seg); expected boxes alone: this project "
                "trains and deploys detectors of boxes"
            )
    return plain


def check_class_lists(config: Config, class_names: tuple[str, ...]) -> None:
    """
    Compares the classes that a config names, if any, with those of the data, which are the ones that count.

    Raises:
        ConfigError: they are others, or a string in place of a list.
    """
    named = {key: config[key] for key in CLASS_LISTS if key in config}
    holders = [("metainfo", config.get("metainfo"))]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in datasets_of(config.get(loader)):
            holders += [(f"{loader}.dataset", dataset), (f"{loader}.dataset.metainfo", dataset.get("metainfo"))]
    for place, holder in holders:
        if holder is not None and not isinstance(holder, dict):
            raise ConfigError(
                f"{place} of the config is {holder!r}; expected dict(classes=...), or nothing: the classes are "
                "those of the annotations"
            )
        if isinstance(holder, dict):
            named |= {f"{place}.{key}": holder[key] for key in CLASS_LISTS if holder.get(key) is not None}
    for place, classes in named.items():
        if isinstance(classes, str):
            raise ConfigError(
                f"{place} of the config is the string {classes!r}, of which each letter would be a class; expected "
                f"({classes!r},), or nothing: the classes are those of the annotations"
            )
        if not isinstance(classes, (list, tuple)) or sorted(map(str, classes)) != sorted(class_names):
            raise ConfigError(
                f"{place} of the config is {classes}, the data have the classes {list(class_names)}; take it out of "
                "the config (the classes are those of the annotations), or give the data of these classes"
            )
        if tuple(classes) != class_names:
            print(f"{place} of the config is in another order than the annotations; theirs counts: {list(class_names)}")


def _point_dataset(dataset: Any, coco: CocoSet, annotations: Path, class_names: tuple[str, ...], key: str) -> None:
    from mmdet.datasets import CocoDataset

    kind = dataset.get("type", "CocoDataset")
    if kind not in ("CocoDataset", "mmdet.CocoDataset"):
        known = {name for base in CocoDataset.__mro__[:-1] for name in inspect.signature(base).parameters} | {"type"}
        unknown = sorted(set(dataset) - known)
        without = f", without its {', '.join(unknown)}" if unknown else ""
        print(f"{key}: {kind} of the config is replaced by CocoDataset{without}; it reads the data that are given")
        for name in unknown:
            del dataset[name]
    if key != "train_dataloader":
        if dataset.get("indices") is not None:
            raise ConfigError(f"{key}.dataset.indices is {dataset.indices}; expected none: AP is that of all images")
        dataset["test_mode"] = True
    dataset.update(
        type="CocoDataset",
        data_root="",
        ann_file=str(annotations.resolve()),
        data_prefix=dict(img=f"{coco.images_dir.resolve()}/"),
        metainfo=dict(classes=class_names),
    )


def _say_what_is_filtered(filter_cfg: Any, coco: CocoSet) -> None:
    """mmdet's own configs leave out images without boxes and small ones; images without boxes are data too."""
    filter_cfg = filter_cfg or {}
    least_px = filter_cfg.get("min_size", 0)
    kept = [
        image
        for image in coco.images
        if min(image.width_px, image.height_px) >= least_px
        and (len(image.labels) or not filter_cfg.get("filter_empty_gt"))
    ]
    if not kept:
        raise ConfigError(
            f"train_dataloader.dataset.filter_cfg is {dict(filter_cfg)}, which leaves no image of {len(coco.images)}; "
            "set it to None"
        )
    if len(kept) < len(coco.images):
        print(
            f"filter_cfg of the config leaves out {len(coco.images) - len(kept):,} of {len(coco.images):,} training "
            "images: without boxes, or too small. To train on them: --set train_dataloader.dataset.filter_cfg=None"
        )


def _point_metric(metric: Any, annotations: Path, key: str) -> None:
    from mmdet.registry import METRICS

    kind = METRICS.get(metric.type)
    if kind is not None and kind.__module__.startswith("mmdet.") and kind.__name__ not in METRICS_OF_BOXES:
        raise ConfigError(
            f"{key} is a {metric.type}, which does not measure data in COCO format; expected "
            "dict(type='CocoMetric', metric='bbox')"
        )
    kinds = metric.get("metric", "bbox")
    wrong = sorted({"segm", "proposal_fast"} & set([kinds] if isinstance(kinds, str) else kinds))
    if wrong:
        why = (
            "the data have no masks"
            if wrong == ["segm"]
            else "mmdet's proposal_fast fails where images differ in boxes"
        )
        raise ConfigError(f"{key} measures {wrong}; expected 'bbox' or 'proposal': {why}")
    if kind is not None and "ann_file" in inspect.signature(kind).parameters:
        metric.ann_file = str(annotations.resolve())
    if metric.type == "CocoMetric" and "proposal_nums" not in metric and "metric_items" not in metric:
        metric.proposal_nums = DETECTIONS_COUNTED
