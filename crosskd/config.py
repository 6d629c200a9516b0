"""Configs: read, changed by --set, stretched to a number of epochs, brought to an image size."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosskd.schedule import set_epochs
from crosskd.settings import (
    check_given_key,
    check_overrides,
    check_shapes,
    check_version,
    name_types,
    set_data_preprocessor,
    transforms_of,
)
from deploy.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from mmengine.config import Config


FLIPS = {
    "horizontal": dict(prob=[0.5], direction=["horizontal"]),
    "all": dict(prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
}
"""`flips` of a config -> what RandomFlip does: of photos, and of images without an up and a down."""


def load_config(path: str | Path, overrides: dict[str, Any] | None = None, substitute: bool = True) -> Config:
    """
    The config at `path`, ready to build: mmdet is registered, the schedule is stretched to the config's `max_epochs`
    (if it has one), images are brought to its `input_size` and flipped as its `flips` says, the student's head and neck
    get BatchNorm if its `batchnorm_head` is true (and the hook that goes with it), a teacher's own config is read into
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
            from crosskd.loop import hooks as training_hooks  # noqa: F401  registers them
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
    except Exception as error:  # a config is Python: anything can come out of it
        reason = (str(error).splitlines() or [""])[0]  # the rest of a failed import is the search path
        raise ConfigError(f"{name} is not a config that mmengine can read: {type(error).__name__}: {reason}") from error
    name_types(config._cfg_dict)
    check_overrides(config, overrides or {})
    try:
        config.merge_from_dict(overrides or {})
    except Exception as error:  # of a list's index, or of a dict in place of what was none
        raise ConfigError(f"{overrides} cannot be set in {name}: {type(error).__name__}: {error}") from error
    check_version(config, name)
    if not isinstance(config.get("model"), dict):
        raise ConfigError(
            f"{name} has no `model` that is a dict; expected a config of an mmdet detector or of a CrossKDDetector"
        )
    check_shapes(config, name)
    if "max_epochs" in config and config.max_epochs != config.get("train_cfg", {}).get("max_epochs"):
        set_epochs(config, config.max_epochs)
    if "input_size" in config:
        set_input_size(config, config.input_size)
    if "flips" in config:
        set_flips(config, config.flips)
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
    set_data_preprocessor(config, name)
    teacher = config.model.get("teacher")
    if teacher is not None and "model" not in teacher:
        if "config" not in teacher:
            raise ConfigError(
                f"{name}: model.teacher has neither `config` nor `model`; expected the teacher's config file"
            )
        teacher.model = load_config(path_beside(teacher.config, name)).model
    return config


def published_name(config: Config, name: str) -> str:
    """
    The config whose published weights are those of `config`: one of mmdet's that its load_from names, else itself.
    """
    given = config.get("load_from") or ""
    return given if given.startswith("mmdet::") else name


def set_input_size(config: Config, size: Any) -> None:
    """
    Makes every FitResize, FitJitter and FitPad of the config's pipelines use `size`: width and height in pixels.

    mmdet's own configs of SSD and YOLO have a variable of this name, which their other transforms have used: it stays.

    Raises:
        ConfigError: it is not two positive multiples of 32, or no pipeline would change by it.
    """
    loaders = (config.get(f"{name}_dataloader") for name in ("train", "val", "test"))
    transforms = [one for loader in loaders if loader for one in transforms_of(loader)]
    fitted = [one for one in transforms if one.get("type") in ("FitResize", "FitJitter", "FitPad")]
    if not fitted and any(one.get("scale") in (size, (size, size)) for one in transforms):
        return
    if not (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(isinstance(side, int) and side > 0 and side % 32 == 0 for side in size)
    ):
        raise ConfigError(
            f"input_size is {size!r}; expected (width, height), positive multiples of 32, the strides of the backbone"
            f"{_closest_sizes(size)}"
        )
    if not fitted:
        raise ConfigError(f"input_size is {size!r}, but no pipeline of this config has FitResize or FitPad to use it")
    for one in fitted:
        one["size" if one.type == "FitPad" else "scale"] = tuple(size)


def _closest_sizes(size: Any) -> str:
    sides = size if isinstance(size, (tuple, list)) and len(size) == 2 else ()
    if not sides or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        return ""
    return f", such as {tuple(max(32, round(side / 32) * 32) for side in sides)}"


def set_flips(config: Config, flips: Any) -> None:
    """
    Makes every RandomFlip of the training's pipeline flip as FLIPS says.

    Raises:
        ConfigError: it says nothing of `flips`, or no pipeline would change by it.
    """
    flipped = [one for one in transforms_of(config.get("train_dataloader")) if one.get("type") == "RandomFlip"]
    if flips not in FLIPS:
        raise ConfigError(f"flips is {flips!r}; expected one of {', '.join(FLIPS)}")
    if not flipped:
        raise ConfigError(f"flips is {flips!r}, but the training's pipeline has no RandomFlip to use it")
    for one in flipped:
        one.update(FLIPS[flips])


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
        ConfigError: a word without '=', a key whose value the command line or the data give, or a value that is nested
            too deeply.
    """
    overrides = {}
    for word in arguments.overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--set {word}: expected KEY=VALUE")
        check_given_key(key)
        try:
            overrides[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            overrides[key] = text
        except (MemoryError, RecursionError) as error:
            raise ConfigError(f"--set {key}=... has a value that is nested too deeply; expected a literal") from error
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
