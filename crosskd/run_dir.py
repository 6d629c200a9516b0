"""The folder of a run: prepared before a training, written when it is done, read by every later stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from crosskd.config import load_config
from crosskd.data import TrainingData
from crosskd.loop.precision import precision_of_wrapper
from crosskd.settings import datasets_of
from deploy.contract import read_sidecar, weights_of_run, write_sidecar
from deploy.dataset import CocoSet
from deploy.errors import CheckpointError, ConfigError
from deploy.files import sha256_of, write_json
from deploy.schema import read_checked

RECORD = "training.json"
"""In the run directory: what the training was started with, for --resume."""
_SET_KINDS = {"images": int, "boxes": int, "sha256": str}
RECORD_KINDS = {
    "class_names": [str],
    "annotations": {"train": _SET_KINDS, "val": _SET_KINDS},
    "inputs": {str: str},
    "settings": dict,
}
"""Table of that file."""
RECORDED = ("model", "optim_wrapper", "param_scheduler", "train_cfg", "auto_scale_lr")
"""Keys of the config that a run is resumed with as it was started."""
NOT_RECORDED = ("model.teacher.config", "model.teacher.checkpoint", "train_cfg.val_", "train_cfg.dynamic_intervals")
"""Beginnings of keys that may change: places of files, and how often is validated."""


def training_record(config: Any, data: TrainingData, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a run is resumed with as it was started: classes, annotations, input files, and settings of the config."""
    settings = {
        f"{key}{rest}": value
        for key in RECORDED
        for rest, value in _flat(json.loads(json.dumps(_plain(config.get(key)), default=str)))
        if not f"{key}{rest}".startswith(NOT_RECORDED)
    }
    if "train_dataloader" in config:
        pipelines = [step for dataset in datasets_of(config.train_dataloader) for step in dataset.get("pipeline") or []]
        settings["train_dataloader.dataset.pipeline"] = json.dumps(_plain(pipelines), default=str)
    return {
        "class_names": list(data.class_names),
        "annotations": {split: _set_record(getattr(data, split)) for split in ("train", "val")},
        "inputs": {name: sha256_of(path) for name, path in inputs.items()},
        "settings": settings,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """(.key.of.a.leaf, leaf) of nested dicts and lists."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for name, inner in items for leaf in _flat(inner, f"{key}.{name}")]
    return [(key, value)]


def _set_record(coco: CocoSet) -> dict[str, Any]:
    digest = hashlib.sha256()
    for image in coco.images:
        name = image.path.relative_to(coco.images_dir).as_posix()
        digest.update(f"{image.image_id} {name} {image.width_px} {image.height_px}\n".encode())
        for values in (image.boxes_xyxy, image.labels, image.crowd, image.ignored):
            digest.update(values.tobytes())
    boxes = sum(len(image.labels) for image in coco.images)
    return {"images": len(coco.images), "boxes": boxes, "sha256": digest.hexdigest()}


def check_resumed(record: dict[str, Any], run_dir: Path) -> None:
    """
    Compares what a run is resumed with, by `training_record`, with what it was started with.

    Raises:
        ConfigError: they differ; names what does. A run of an earlier version has no record, and is compared by the
            shapes of its weights only (AtomicCheckpointHook).
    """
    path = run_dir / RECORD
    if not path.is_file():
        return
    started = read_checked(path, RECORD_KINDS, ConfigError, "the start of a run")
    advice = "Resume it with what it was started with, or start a new run; --from starts one from trained weights."
    if started["class_names"] != record["class_names"]:
        raise ConfigError(
            f"the run in {run_dir} was started with the classes {started['class_names']}, the data have "
            f"{record['class_names']}. {advice}"
        )
    for split in ("train", "val"):
        before, now = started["annotations"][split], record["annotations"][split]
        if now != before:
            raise ConfigError(
                f"the run in {run_dir} was started with other {split} data ({before['images']} images, "
                f"{before['boxes']} boxes; now {now['images']} and {now['boxes']}, or the same number of others). "
                f"{advice}"
            )
    for kind, what in (("inputs", "file"), ("settings", "setting")):
        before, now = started[kind], record[kind]
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            name = min(names, key=lambda key: "max_epochs" not in key)  # what was changed, not what follows from it
            more = f" (and {len(names) - 1} more differ)" if len(names) > 1 else ""
            raise ConfigError(
                f"the run in {run_dir} was started with another {what}: {name} was {_shown(before, name)}, now it is "
                f"{_shown(now, name)}{more}. {advice}"
            )


def precision_of_run(run_dir: Path) -> str | None:
    """The precision that a run was started in, as `precision_of_wrapper`; None: a run of an earlier version."""
    path = run_dir / RECORD
    if not path.is_file():
        return None
    started = read_checked(path, RECORD_KINDS, ConfigError, "the start of a run")
    kind = started["settings"].get("optim_wrapper.type")
    return None if kind is None else precision_of_wrapper(str(kind))


def _shown(values: dict[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "not there"
    return text if len(text) < 80 else f"{text[:76]}..."


def set_run_dir(config: Any, run_dir: Path, resume: bool) -> None:
    """
    Points the run to its folder and, with `resume`, to its last checkpoint.

    Raises:
        CheckpointError: `resume`, and there is nothing to go on from.
    """
    from crosskd.models.checkpoint import latest_checkpoint

    config.work_dir = str(run_dir)
    config.resume, config.load_from = resume, str(latest_checkpoint(run_dir)) if resume else None


def start_run(run_dir: Path, record: dict[str, Any]) -> None:
    """Notes with what a run starts. Until it has a checkpoint there is nothing to resume: not an earlier run's."""
    (run_dir / "last_checkpoint").unlink(missing_ok=True)
    write_json(run_dir / RECORD, record)


def save_run(
    config: Any, detector: Any, data: TrainingData, weights: Path, inputs: dict[str, Any], details: dict[str, Any]
) -> None:
    """
    Writes what every later stage reads of a run: the weights, `config.py` beside them, and the sidecar.

    Args:
        config: of the plain mmdet detector that the weights belong to.
        inputs: name -> file, recorded besides the config and the annotations. details: recorded besides the classes.
    """
    from crosskd.models.checkpoint import save_detector_weights

    save_detector_weights(detector, weights, meta={"dataset_meta": {"classes": data.class_names}})
    config_path = weights.with_name("config.py")
    config.resume, config.load_from = False, None  # how this training began is in the sidecar
    config.dump(config_path)
    write_sidecar(
        weights,
        inputs={
            "config": config_path,
            "train_annotations": data.train.annotations_path,
            "val_annotations": data.val.annotations_path,
            **inputs,
        },
        details={
            "class_names": list(data.class_names),
            "category_ids": list(data.train.category_ids),
            "parameters": sum(p.numel() for p in detector.parameters()),
            **details,
        },
    )
    print(f"wrote {weights} ({weights.stat().st_size / 2**20:.1f} MiB)")


def load_run(run_dir: str | Path) -> tuple[Any, Any, dict[str, Any]]:
    """
    (config, detector in eval mode with its weights, sidecar) of a finished run.

    Raises:
        ContractError, CheckpointError: as `weights_of_run` and `load_detector_weights`.
    """
    weights = weights_of_run(run_dir)
    sidecar = read_sidecar(weights, details=("class_names", "category_ids", "parameters"))
    config_path = Path(run_dir) / "config.py"
    if not config_path.is_file() or sha256_of(config_path) != sidecar["inputs"].get("config", {}).get("sha256"):
        raise CheckpointError(
            f"{config_path} is missing or was changed since {weights.name} was written; bring back the original"
        )
    from crosskd.models.checkpoint import load_detector_weights
    from crosskd.models.detector import detector_from_config

    config = load_config(config_path, substitute=False)
    detector = detector_from_config(config, load_weights=False)
    load_detector_weights(detector, weights)
    return config, detector.eval(), sidecar
