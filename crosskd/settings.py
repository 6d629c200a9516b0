"""
The settings of an mmdet config: each is honoured, or refused with what to use in its place; none is dropped in silence.

`check_version` and `check_overrides` hold for every config that is read, `check_settings` for one that is trained.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.errors import ConfigError
from deploy.schema import short

READ_KEYS = frozenset({
    # by mmengine's runner
    "model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg",
    "auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks",
    "custom_hooks", "data_preprocessor", "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level",
    "visualizer", "default_scope", "randomness", "experiment_name", "model_wrapper_cfg", "find_unused_parameters",
    "sync_bn", "activation_checkpointing", "efficient_conv_bn_eval", "custom_imports",
    # by us
    "max_epochs", "input_size", "flips", "batchnorm_head", "report_limits", "max_int8_drop",
})  # fmt: skip
"""Keys of a config's first level that something reads. Others are variables of the file, used up when it is read."""
VERSION_2_KEYS = ("data", "optimizer", "optimizer_config", "lr_config", "runner", "evaluation", "checkpoint_config")
VERSION_2_TRANSFORMS = ("Normalize", "DefaultFormatBundle", "Collect", "ImageToTensor", "MultiScaleFlipAug")
SET_BY_US = {
    "work_dir": "the run's folder is that of -o",
    "resume": "give --resume to go on with a run",
    "launcher": "start several processes with torchrun",
    "randomness.seed": "give --seed",
}
"""Key -> why --set cannot change it."""
REFUSED = {
    "optimizer": "the optimiser is optim_wrapper.optimizer",
    "optimizer_config": "use --clip-grad, or optim_wrapper.clip_grad",
    "lr_config": "the schedule is param_scheduler",
    "runner": "the length of the training is train_cfg.max_epochs, or --epochs",
    "total_epochs": "use --epochs, or max_epochs",
    "evaluation": "how often is evaluated is train_cfg.val_interval, how is val_evaluator",
    "checkpoint_config": "use default_hooks.checkpoint",
    "log_config": "use default_hooks.logger",
    "resume_from": "give --resume to go on with a run",
    "auto_resume": "give --resume to go on with a run",
    "fp16": "give --precision fp16",
    "seed": "give --seed",
    "gpu_ids": "choose GPUs by CUDA_VISIBLE_DEVICES, processes by torchrun",
    "gpus": "choose GPUs by CUDA_VISIBLE_DEVICES, processes by torchrun",
}
"""Keys of a config's first level that mmdet 2, or another command of mmdet, reads -> what to use here."""
READ_BY_HEADS = {
    "test_cfg": {
        "nms_pre", "nms_post", "min_bbox_size", "score_thr", "conf_thr", "iou_thr", "nms", "nms_cfg",
        "nms_across_levels", "max_per_img", "max_per_image", "multi_label", "yolox_style", "rpn", "rcnn", "top_k",
        "topk", "filter_thr", "mask_thr", "mask_thr_binary",
    },
    "train_cfg": {
        "assigner", "reg_assigner", "cls_assigner", "initial_assigner", "initial_epoch", "sampler", "allowed_border",
        "pos_weight", "alpha", "beta", "gamma", "debug", "rpn", "rcnn", "rpn_proposal",
    },
    "nms": {
        "type", "iou_threshold", "iou_thr", "class_agnostic", "split_thr", "sigma", "min_score", "method", "offset",
        "max_num", "score_threshold",
    },
}  # fmt: skip
"""What mmdet's heads ask these dicts of a model for: a typing error there does nothing, or fails in an evaluation."""
FROM_DATA = ("ann_file", "data_root", "data_prefix", "metainfo", "num_classes", "classes")
"""Names of entries, anywhere in a config, that the annotations of --data give."""


def check_version(config: Any, name: str) -> None:
    """
    Raises ConfigError for a config of mmdet 2: mmdet 3 reads none of its settings, and would build its model without
    the normalisation of images, which stands in the pipelines there.
    """
    keys = [key for key in VERSION_2_KEYS if key in config and "optim_wrapper" not in config]
    pipelines = [value for key, value in config.items() if key.endswith("pipeline") and isinstance(value, list)]
    types = {step.get("type") for pipeline in pipelines for step in pipeline if isinstance(step, dict)}
    keys += [f"{kind} in a pipeline" for kind in VERSION_2_TRANSFORMS if kind in types]
    if keys:
        raise ConfigError(
            f"{name} is written for mmdet 2 (it has {', '.join(keys)}); expected a config of mmdet 3: images are "
            "normalised by model.data_preprocessor, data are in train_dataloader and val_dataloader, the optimiser is "
            "in optim_wrapper, its schedule in param_scheduler. mmdet 3 has a config of the same name for most "
            "detectors: mmdet::FAMILY/NAME.py; its own weights of mmdet 2 fit them."
        )


def name_types(node: Any) -> None:
    """Puts the registered name in place of each class that is a `type`, as mmdet's Python configs have them."""
    if isinstance(node, dict):
        kind = node.get("type")
        if isinstance(kind, type) and kind.__module__.split(".")[0] in (
            "mmdet",
            "mmengine",
            "mmcv",
            "torch",
            "crosskd",
        ):
            node["type"] = kind.__name__
        for value in node.values():
            name_types(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            name_types(value)


def set_data_preprocessor(config: Any, name: str) -> None:
    """
    Puts a `data_preprocessor` of the config's first level into the model, as mmengine's runner does.

    Raises:
        ConfigError: the detector has none, so that nothing would normalise its images.
    """
    detector = config.model.get("student", config.model)
    if "type" in detector and "detector" not in detector and detector.get("data_preprocessor") is None:
        if config.get("data_preprocessor") is None:
            raise ConfigError(
                f"{name} has no model.data_preprocessor, so that nothing would normalise images; expected such as "
                "dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], "
                "bgr_to_rgb=True, pad_size_divisor=32), with the values that the weights were trained with"
            )
        detector.data_preprocessor = config.data_preprocessor


def check_shapes(config: Any, name: str) -> None:
    """Raises ConfigError if a part of a config that is gone through is no dict, or no list of dicts."""
    for key in ("train_cfg", "default_hooks", "optim_wrapper", "env_cfg", "randomness"):
        if not isinstance(config.get(key) or {}, dict):
            raise ConfigError(f"{name}: {key} is {config[key]!r}; expected a dict")
    for key, part in (config.get("env_cfg") or {}).items():
        if key in ("dist_cfg", "mp_cfg") and not isinstance(part or {}, dict):
            raise ConfigError(f"{name}: env_cfg.{key} is {short(part)}; expected a dict")
    for key in ("param_scheduler", "custom_hooks"):
        entries = schedulers_of(config) if key == "param_scheduler" else config.get(key) or []
        wrong = [one for one in entries if not (isinstance(one, dict) and "type" in one)] if entries else []
        if wrong or isinstance(entries, dict):
            raise ConfigError(
                f"{name}: {key} has {wrong[0] if wrong else dict(entries)!r}; expected a list of dicts with types"
            )
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        _check_parts(config.get(key), key, name)


def _check_parts(part: Any, place: str, name: str) -> None:
    """Raises ConfigError if a loader, its data set, or one that this wraps, is no dict, or a pipeline none of dicts."""
    if part is None:
        return
    if not isinstance(part, dict):
        raise ConfigError(f"{name}: {place} is {short(part)}; expected a dict")
    steps = part.get("pipeline") or []
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, dict) and "type" in step for step in steps):
        raise ConfigError(f"{name}: {place}.pipeline is {short(steps)}; expected a list of dicts with types")
    for key in ("dataset", "datasets"):
        inner = part.get(key) or None
        for one in inner if isinstance(inner, (list, tuple)) else [inner]:
            _check_parts(one, f"{place}.{key}", name)


def check_overrides(config: Any, overrides: dict[str, Any]) -> None:
    """Raises ConfigError if an override would have no effect: nothing reads it, or something else sets the value."""
    for key in overrides:
        parts = key.split(".")
        place: Any = config
        for part in parts[:-1]:
            place = place.get(part) if hasattr(place, "get") else place
            if place is None:
                raise ConfigError(f"cannot set {key}: the config has no {part!r} there; look for a typing error")
        if parts[0] not in READ_KEYS:
            close = difflib.get_close_matches(parts[0], sorted(READ_KEYS), n=1, cutoff=0.75)
            variable = "it is a variable, used up when the file was read" if parts[0] in config else "no such setting"
            raise ConfigError(
                f"cannot set {key}: nothing reads it ({variable}); give the full key of the setting, such as "
                f"{close[0] if close else 'optim_wrapper.optimizer.lr'}"
            )
    if "train_cfg.max_epochs" in overrides and "max_epochs" in config:
        raise ConfigError("cannot set train_cfg.max_epochs: this config has max_epochs, which wins; use --epochs")


def check_given_key(key: str) -> None:
    """Raises ConfigError for a key of --set whose value the command line or the data give."""
    if key in SET_BY_US:
        raise ConfigError(f"cannot set {key}: {SET_BY_US[key]}")
    if key.split(".")[-1] in FROM_DATA:
        raise ConfigError(f"cannot set {key}: it is taken from the annotations of the data")


def check_settings(config: Any, name: str) -> None:
    """
    Checks a config before a training, and says which of its settings the command line gives in their place.

    Raises:
        ConfigError: a setting cannot be honoured, a type is not known, or the config lacks a part of a training.
    """
    for key in ("train_dataloader", "test_dataloader", "train_cfg", "optim_wrapper"):
        if not isinstance(config.get(key), dict):
            raise ConfigError(
                f"{name} has no `{key}` that is a dict; expected a config for training and testing: data come from "
                "--data, but loaders, pipelines, optimiser and schedule from the config. See configs/_base_"
            )
    validation = [key for key in ("val_dataloader", "val_cfg", "val_evaluator") if config.get(key) is None]
    if 0 < len(validation) < 3:
        raise ConfigError(f"{name} has no {' and no '.join(validation)}, but the rest of a validation")
    for key in config:
        close = difflib.get_close_matches(key, READ_KEYS, n=1, cutoff=0.88)
        if key not in READ_KEYS and close:
            raise ConfigError(f"{name}: nothing reads {key}; did you mean {close[0]}?")
        if key in REFUSED and config[key] not in (None, False):
            raise ConfigError(f"{name}: nothing reads {key}: {REFUSED[key]}")
    _check_heads(config.model, name)
    _say_unread(config, name)
    _check_launch(config, name)
    for part, known in (
        ("env_cfg", {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"}),
        ("auto_scale_lr", {"enable", "base_batch_size"}),
    ):
        unknown = sorted(set(config.get(part) or {}) - known)
        if unknown:
            raise ConfigError(f"{name}: nothing reads {part}.{unknown[0]}; expected some of {', '.join(sorted(known))}")
    if "teacher" in config.model:
        unknown = sorted(set(config.model.teacher) - {"config", "checkpoint", "model"})
        if unknown:
            raise ConfigError(f"{name}: nothing reads model.teacher.{unknown[0]}; expected config and checkpoint")
    check_types(config)


def _check_heads(node: Any, name: str) -> None:
    """Refuses typing errors in every `train_cfg`, `test_cfg` and `nms` of a model."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        known = READ_BY_HEADS.get(str(key), set())
        for entry in value if known and isinstance(value, dict) else ():
            close = difflib.get_close_matches(entry, known, n=1, cutoff=0.75)
            if entry not in known and close:
                raise ConfigError(f"{name}: nothing reads {key}.{entry} of the model; did you mean {close[0]}?")
        _check_heads(value, name)


def _say_unread(config: Any, name: str) -> None:
    """
    Says which variables of a file no setting has the value of. Often they are in a base config too, whose settings
    have the base's own values of them.
    """
    if not name.endswith(".py") or not Path(name).is_file():  # one of mmdet's own, or no Python
        return
    tree = ast.parse(Path(name).read_text(encoding="utf-8"))
    assigned = [target.id for node in tree.body if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Name)]  # fmt: skip
    texts = _texts_in({key: value for key, value in config.items() if key in READ_KEYS})
    variables = [key for key in assigned if key in config and key not in (*READ_KEYS, *FROM_DATA, "dataset_type")]
    unread = [key for key in variables if not _is_in(config[key], texts)]
    if unread:
        print(
            f"{name}: no setting has the value of {', '.join(unread)}: a variable does nothing by itself, and a base "
            "config has used its own already. To change a setting, give it in full"
        )


def _is_in(value: Any, texts: set[str]) -> bool:
    if isinstance(value, str):  # it may be a part of a path
        return any(_text_of(value)[1:-1] in text for text in texts)
    return value is None or callable(value) or _text_of(value) in texts


def _text_of(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


def _texts_in(node: Any) -> set[str]:
    """Every value in a config as text, whole dicts and lists too."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return {_text_of(node)}.union(*(_texts_in(one) for one in inner))


def _check_launch(config: Any, name: str) -> None:
    """Of the settings by which mmdet's own script starts a training, the command line gives most."""
    if config.get("resume"):
        raise ConfigError(f"{name}: resume is {config.resume!r}; expected False: {SET_BY_US['resume']}")
    dist = dict((config.get("env_cfg") or {}).get("dist_cfg") or {})
    if set(dist) - {"backend"} or dist.get("backend", "nccl") not in ("nccl", "gloo"):
        raise ConfigError(f"{name}: env_cfg.dist_cfg is {dist}; expected none: NCCL is used on GPUs, gloo on CPUs")
    wrapper = dict(config.get("model_wrapper_cfg") or {})
    unknown = set(wrapper) - {"type", "device_ids", "broadcast_buffers", "find_unused_parameters"}
    if wrapper.get("type", "MMDistributedDataParallel") != "MMDistributedDataParallel" or unknown:
        raise ConfigError(
            f"{name}: model_wrapper_cfg is {wrapper}; expected none, or MMDistributedDataParallel with "
            "find_unused_parameters"
        )
    if config.get("work_dir") is not None:
        print(f"work_dir of the config is not used: {SET_BY_US['work_dir']}")
    if config.get("launcher", "none") != "none":
        print(f"launcher of the config is not used: {SET_BY_US['launcher']}")


def check_types(config: Any) -> None:
    """Raises ConfigError, with the names that are most like it, if a `type` of a training config is not registered."""
    from mmdet import registry

    loaders = [(key, config.get(key)) for key in ("train_dataloader", "val_dataloader", "test_dataloader")]
    hooks = [*(config.get("default_hooks") or {}).values(), *(config.get("custom_hooks") or [])]
    parts: list[tuple[str, Any, Any]] = [
        ("optim_wrapper", config.optim_wrapper, registry.OPTIM_WRAPPERS),
        ("optim_wrapper.optimizer", config.optim_wrapper.get("optimizer"), registry.OPTIMIZERS),
        *(("a hook", hook, registry.HOOKS) for hook in hooks),
        *(("param_scheduler", one, registry.PARAM_SCHEDULERS) for one in schedulers_of(config)),
        *((key, config.get(key), registry.LOOPS) for key in ("train_cfg", "val_cfg", "test_cfg")),
        *(("an evaluator", one, registry.METRICS) for key in EVALUATORS for one in metrics_of(config.get(key))),
        *((f"{key}.dataset", one, registry.DATASETS) for key, loader in loaders for one in datasets_of(loader)),
        *(("a pipeline", step, registry.TRANSFORMS) for _, loader in loaders for step in transforms_of(loader)),
        *((f"{key}.sampler", loader.get("sampler"), registry.DATA_SAMPLERS) for key, loader in loaders if loader),
        *((f"{key}.batch_sampler", loader.get("batch_sampler"), registry.DATA_SAMPLERS)
          for key, loader in loaders if loader),
        ("visualizer", config.get("visualizer"), registry.VISUALIZERS),
        ("log_processor", config.get("log_processor"), registry.LOG_PROCESSORS),
    ]  # fmt: skip
    for hook in hooks:
        if isinstance(hook, dict) and hook.get("type") == "CheckpointHook":
            _check_checkpoint_hook(hook)
    _check_optimizer(config.optim_wrapper.get("optimizer"), registry.OPTIMIZERS)
    constructor = config.optim_wrapper.get("constructor")
    if constructor:
        parts.append(("optim_wrapper.constructor", {"type": constructor}, registry.OPTIM_WRAPPER_CONSTRUCTORS))
    for place, part, kind in parts:
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ConfigError(f"{place} is {part!r}; expected a dict with its type")
        name = part.get("type")
        if name is None and kind not in (registry.LOOPS, registry.LOG_PROCESSORS, registry.OPTIM_WRAPPERS):
            raise ConfigError(f"{place} is {dict(part)}, without a type")
        if isinstance(name, str) and kind.get(name) is None:
            close = ", ".join(difflib.get_close_matches(name, sorted(_names_in(kind)), n=3, cutoff=0))
            raise ConfigError(
                f"{place} has the type {name!r}, which is not known; the closest that are: {close}. A module of your "
                "own that registers it goes into custom_imports"
            )


def _check_checkpoint_hook(hook: Any) -> None:
    """Refuses settings that mmengine's hook takes, and fails by when it saves for the first time: after an epoch."""
    from mmengine.hooks import CheckpointHook
    from mmengine.runner import Runner

    readers = (CheckpointHook.__init__, Runner.save_checkpoint)
    known = {name for reader in readers for name in inspect.signature(reader).parameters}
    unknown = sorted(set(hook) - known - {"type", "priority", "_scope_"})
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)
        raise ConfigError(f"nothing reads {unknown[0]} of the CheckpointHook; did you mean {close[0]}?")


def _check_optimizer(optimizer: Any, registry: Any) -> None:
    """Refuses what an optimiser does not take, such as SGD's momentum that a config with Adam has inherited."""
    given = optimizer.get("type") if isinstance(optimizer, dict) else None
    kind = registry.get(given) if isinstance(given, str) else None
    if kind is None:
        return  # told as other types are
    takes = inspect.signature(kind).parameters
    unknown = [name for name in optimizer if name != "type" and name not in takes]
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        kept = "".join(f", {name}={value!r}" for name, value in optimizer.items() if name in ("lr", "weight_decay"))
        raise ConfigError(
            f"optim_wrapper.optimizer is {optimizer['type']}, which has no {', '.join(unknown)}; it takes "
            f"{', '.join(name for name in takes if name != 'params')}. Where a base config brings that, give "
            f"optimizer=dict(_delete_=True, type={optimizer['type']!r}{kept})"
        )


def _names_in(registry: Any) -> set[str]:
    """All names that a registry finds: its own and those of the registries above it."""
    names: set[str] = set()
    while registry is not None:
        names |= set(registry.module_dict)
        registry = registry.parent
    return names


EVALUATORS = ("val_evaluator", "test_evaluator")


def schedulers_of(config: Any) -> list[Any]:
    """The dicts of `param_scheduler`: one, a list, or a list for each of several optimisers."""
    given = config.get("param_scheduler") or []
    if isinstance(given, dict) and "type" not in given:
        return [one for part in given.values() for one in (part if isinstance(part, (list, tuple)) else [part])]
    return list(given) if isinstance(given, (list, tuple)) else [given]


def metrics_of(evaluator: Any) -> list[Any]:
    """The dicts of an evaluator: one metric, a list of them, or an Evaluator with its `metrics`."""
    if isinstance(evaluator, dict) and "metrics" in evaluator:
        evaluator = evaluator["metrics"]
    return [] if evaluator is None else list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def datasets_of(loader: Any) -> Iterator[Any]:
    """The dicts of a loader's data set: the wrappers (RepeatDataset, ConcatDataset, ...) and what they wrap."""

    def visit(dataset: Any) -> Iterator[Any]:
        yield dataset
        inner = dataset.get("datasets") or dataset.get("dataset")
        for one in inner if isinstance(inner, (list, tuple)) else [inner] if inner else []:
            yield from visit(one)

    if loader and loader.get("dataset"):
        yield from visit(loader.dataset)


def transforms_of(loader: Any) -> Iterator[Any]:
    """The dicts of the transforms in a loader's pipelines, of wrappers too."""
    for dataset in datasets_of(loader):
        yield from dataset.get("pipeline") or []
