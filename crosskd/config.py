"""Configs: read, point to data, and take class names and counts from its annotations."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.dataset import CocoSet, load_coco, split_paths
from deploy.errors import ConfigError, DataError, MissingDependencyError
from deploy.files import write_json

if TYPE_CHECKING:
    from mmengine.config import Config


def load_config(path: str | Path, overrides: dict[str, Any] | None = None, substitute: bool = True) -> Config:
    """
    The config at `path`, ready to build: mmdet is registered, the schedule is stretched to the config's `max_epochs`
    (if it has one), images are brought to its `input_size`, the student's head and neck get BatchNorm if its
    `batchnorm_head` is true (and the hook that goes with it), a teacher's own config is read into
    `model.teacher.model`.

    Args:
        path: a file, or `mmdet::gfl/gfl_r50_fpn_1x_coco.py` for one that comes with mmdet.
        overrides: dotted key -> value, such as {"model.distill.split": 2}; they win over the file.
        substitute: whether mmengine replaces `{{$NAME:default}}` and the like in the text. False for a file that a run
            wrote, in which names come from data.

    Raises:
        ConfigError: no such file, or it is not a config, or it has no model, or its parts do not fit.
    """
    name = str(path)
    if not name.startswith("mmdet::") and not Path(name).is_file():
        raise ConfigError(
            f"no such config: {name}; expected a Python file, or mmdet::FAMILY/NAME.py for one of mmdet's own"
        )
    # What third parties warn of in their own code is nothing that a user can mend.
    warnings.filterwarnings("ignore", module=r"mm(det|cv|engine)|torch\.jit")
    try:
        from crosskd.models.ops import register_mmcv_ops

        register_mmcv_ops()
        with contextlib.redirect_stdout(io.StringIO()):  # mmdet tells of an optional data service each time
            from mmdet.utils import register_all_modules
            from mmengine.config import Config
            from mmengine.hub import get_config

            register_all_modules(init_default_scope=True)
            from crosskd import transforms  # noqa: F401  registers them
            from crosskd.loop import amp  # noqa: F401  registers them
            from crosskd.models import (
                backbones,
                detector,  # noqa: F401  registers them
            )
            from crosskd.written_config import WrittenConfig
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), "training", "pip install 'crosskd[train]'") from error

    try:
        config = WrittenConfig(
            get_config(name)
            if name.startswith("mmdet::")
            else Config.fromfile(name, use_predefined_variables=substitute, use_environment_variables=substitute)
        )
        check_overrides(config, overrides or {})
        config.merge_from_dict(overrides or {})
    except ConfigError:
        raise
    except Exception as error:  # a config is Python: anything can come out of it
        raise ConfigError(f"{name} is not a config that mmengine can read: {type(error).__name__}: {error}") from error
    if not isinstance(config.get("model"), dict):
        raise ConfigError(
            f"{name} has no `model` that is a dict; expected a config of an mmdet detector or of a CrossKDDetector"
        )
    if "max_epochs" in config and config.max_epochs != config.get("train_cfg", {}).get("max_epochs"):
        set_epochs(config, config.max_epochs)
    if "input_size" in config:
        set_input_size(config, config.input_size)
    student = config.model.get("student", config.model)
    batchnorm_head = config.get("batchnorm_head", False)
    if not isinstance(batchnorm_head, bool):
        raise ConfigError(f"batchnorm_head is {batchnorm_head!r}; expected True or False")
    if batchnorm_head:
        set_batchnorm_head(student)
        hooks = config.get("custom_hooks", [])
        if not any(hook["type"] == "FreezeHeadNormsHook" for hook in hooks):
            config.custom_hooks = [*hooks, dict(type="FreezeHeadNormsHook", begin=0.6)]
    backbones.fit_to_backbone(student)
    teacher = config.model.get("teacher")
    if teacher is not None and "model" not in teacher:
        if "config" not in teacher:
            raise ConfigError(
                f"{name}: model.teacher has neither `config` nor `model`; expected the teacher's config file"
            )
        teacher.model = load_config(path_beside(teacher.config, name)).model
    return config


def check_overrides(config: Config, overrides: dict[str, Any]) -> None:
    """Raises ConfigError if an override would have no effect: it has no place in the config, or another one wins."""
    for key in overrides:
        place: Any = config
        for part in key.split(".")[:-1]:
            place = place.get(part) if hasattr(place, "get") else place
            if place is None:
                raise ConfigError(f"cannot set {key}: the config has no {part!r} there; look for a typing error")
    if "train_cfg.max_epochs" in overrides and "max_epochs" in config:
        raise ConfigError("cannot set train_cfg.max_epochs: this config has max_epochs, which wins; use --epochs")


def set_epochs(config: Config, epochs: int) -> None:
    """
    Sets the number of epochs and stretches every schedule that counts in epochs.

    Raises:
        ConfigError: not a number, fewer than one, or the config does not count in epochs.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"max_epochs is {epochs!r}; expected a number, at least 1")
    if "max_epochs" not in config.get("train_cfg", {}):
        raise ConfigError(
            f"max_epochs is {epochs}, but train_cfg has no max_epochs to be set; expected a config of epochs"
        )
    factor = epochs / config.train_cfg.max_epochs
    config.train_cfg.max_epochs = epochs
    for scheduler in config.param_scheduler:
        if scheduler.get("by_epoch", True):
            for key in ("begin", "end", "T_max"):
                if key in scheduler:
                    scheduler[key] = round(scheduler[key] * factor)
            if "milestones" in scheduler:
                scheduler.milestones = [round(epoch * factor) for epoch in scheduler.milestones]


def set_input_size(config: Config, size: Any) -> None:
    """
    Makes every FitResize and FitPad of the config's pipelines use `size`: width and height in pixels.

    Raises:
        ConfigError: it is not two positive multiples of 32, or no pipeline would change by it.
    """
    if not (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(isinstance(side, int) and side > 0 and side % 32 == 0 for side in size)
    ):
        raise ConfigError(f"input_size is {size!r}; expected (width, height), positive multiples of 32")
    loaders = (config.get(f"{name}_dataloader") for name in ("train", "val", "test"))
    transforms = [one for loader in loaders if loader for one in loader.dataset.get("pipeline", [])]
    fitted = [one for one in transforms if one.type in ("FitResize", "FitPad")]
    if not fitted:
        raise ConfigError(f"input_size is {size!r}, but no pipeline of this config has FitResize or FitPad to use it")
    for one in fitted:
        one["scale" if one.type == "FitResize" else "size"] = tuple(size)


def set_batchnorm_head(detector: Any) -> None:
    """
    Gives BatchNorm to every layer of a detector's head and neck, in place of the norms that they have, if any.

    BatchNorm folds into the convolution before it; GroupNorm does not, and cannot run in INT8. All levels share the
    head and so its running mean: norms in the neck bring them to one scale, and FreezeHeadNormsHook trains the last
    part of a run on it (configs/_base_/gfl_320.py).

    Args:
        detector: the config of an mmdet detector; changed in place.

    Raises:
        ConfigError: the detector has no neck or no bbox_head, or one of them takes no norm.
    """
    from mmdet.registry import MODELS

    for name in ("neck", "bbox_head"):
        parts = detector.get(name)
        for part in parts if isinstance(parts, (list, tuple)) else [parts]:
            kind = None if part is None else MODELS.get(part.type)
            if kind is None or not any("norm_cfg" in inspect.signature(base).parameters for base in kind.__mro__[:-1]):
                raise ConfigError(
                    f"batchnorm_head is True, but the detector's {name} is {part and part.type}; expected one that "
                    "takes norm_cfg. Leave batchnorm_head out."
                )
            part.norm_cfg = dict(type="BN", requires_grad=True)


def path_beside(path: str, config_path: str | Path) -> str:
    """
    A config's path as it stands, if it is one of mmdet's or absolute; else relative to the folder of `config_path`.
    """
    return path if path.startswith("mmdet::") or Path(path).is_absolute() else str(Path(config_path).parent / path)


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


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change config values, such as model.distill.split=2",
    )


def overrides_from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Dotted key -> value of `--set`; a value that is no Python literal is a string.

    Raises:
        ConfigError: a word without '='.
    """
    overrides = {}
    for word in arguments.overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--set {word}: expected KEY=VALUE")
        try:
            overrides[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            overrides[key] = text
    return overrides


def set_classes(config: Config, class_names: tuple[str, ...]) -> None:
    """Puts the number of classes into every head of the config's model, student and teacher."""

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if "num_classes" in node:
                node["num_classes"] = len(class_names)
            for value in node.values():
                visit(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                visit(value)

    visit(config.model)


def set_data(config: Config, data: TrainingData, folder: Path, write: bool = True) -> None:
    """
    Points the config's loaders and evaluators at `data`, with its class names.

    mmdet reads annotation files of its own: those that this writes to `folder` hold the clipped boxes, and the keys
    (`area`, `iscrowd`) that mmdet demands and many sets leave out.
    """
    files = {split: folder / f"annotations_{split}.json" for split in ("train", "val")}
    for split, path in files.items() if write else ():
        write_json(path, coco_document_from_set(getattr(data, split)))
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


def coco_document_from_set(coco: CocoSet) -> dict[str, Any]:
    """A COCO detection document of a checked set; `area` is that of the box."""
    annotations: list[dict[str, Any]] = []
    for image in coco.images:
        for (x1, y1, x2, y2), label, crowd in zip(
            image.boxes_xyxy.tolist(), image.labels.tolist(), image.crowd.tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.image_id,
                    "category_id": coco.category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [
            {
                "id": image.image_id,
                "file_name": image.path.relative_to(coco.images_dir).as_posix(),
                "width": image.width_px,
                "height": image.height_px,
            }
            for image in coco.images
        ],
        "annotations": annotations,
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(coco.category_ids, coco.class_names, strict=True)
        ],
    }
