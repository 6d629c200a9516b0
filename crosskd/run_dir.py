"""The folder of a run: prepared before a training, written when it is done, read by every later stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosskd.config import load_config
from crosskd.data import TrainingData
from crosskd.loop.distributed import is_first_process
from deploy.contract import read_sidecar, weights_of_run, write_sidecar
from deploy.errors import CheckpointError
from deploy.files import sha256_of


def set_run_dir(config: Any, run_dir: Path, resume: bool) -> None:
    """
    Points the run to its folder and, with `resume`, to its last checkpoint; clears away what a killed run left.

    Raises:
        CheckpointError: `resume`, and there is nothing to go on from.
    """
    from crosskd.loop.hooks import remove_leftovers
    from crosskd.models.checkpoint import latest_checkpoint

    config.work_dir = str(run_dir)
    config.resume, config.load_from = resume, str(latest_checkpoint(run_dir)) if resume else None
    if is_first_process():
        remove_leftovers(run_dir)
        if not resume:  # until this run has a checkpoint there is nothing to resume, least of all an earlier run's
            (run_dir / "last_checkpoint").unlink(missing_ok=True)


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
    sidecar = read_sidecar(weights)
    config_path = Path(run_dir) / "config.py"
    if not config_path.is_file() or sha256_of(config_path) != sidecar["inputs"]["config"]["sha256"]:
        raise CheckpointError(
            f"{config_path} is missing or was changed since {weights.name} was written; bring back the original"
        )
    from crosskd.models.checkpoint import load_detector_weights
    from crosskd.models.detector import detector_from_config

    config = load_config(config_path, substitute=False)
    detector = detector_from_config(config, load_weights=False)
    load_detector_weights(detector, weights)
    return config, detector.eval(), sidecar
