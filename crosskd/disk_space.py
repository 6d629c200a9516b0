"""How much disk space a pipeline takes, rather too much than too little, against what there is before hours of work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.errors import ConfigError

BYTES_OF_A_DETECTION = 120
"""In a COCO results file: image, category, score and four numbers with their keys."""


def bytes_of_training(config: Any, parameters: int, annotation_bytes: int) -> int:
    """
    What a run directory takes at most.

    Args:
        config: of the training.
        parameters: of the detector that is trained.
        annotation_bytes: of the train and val sets, which are copied.
    """
    copies = 3  # weights, and for Adam two numbers a weight
    copies += "accumulative_counts" in config.get("optim_wrapper", {})  # gradients
    copies += any("EMA" in hook["type"] for hook in config.get("custom_hooks", []))
    hook = config.get("default_hooks", {}).get("checkpoint") or {}
    epochs = config.get("train_cfg", {}).get("max_epochs", 1)
    kept = hook.get("max_keep_ckpts", -1)
    if kept <= 0:  # all of them
        kept = epochs // max(1, hook.get("interval", 1))
    checkpoints = kept + 1 + bool(hook.get("save_best"))  # and one that is being written
    return 4 * parameters * (copies * checkpoints + 1) + annotation_bytes


def bytes_of_models(parameters: int, files: int, measured_models: int, test_images: int) -> int:
    """What files of models take (and the weights, and one that is being written), and the detections in the images."""
    return 4 * parameters * (files + 2) + measured_models * test_images * 100 * BYTES_OF_A_DETECTION


def check_disk_space(folder: Path, needed: Sequence[int]) -> None:
    """
    Raises ConfigError if the disk of `folder` has less than `needed` bytes, of which what is there already counts.
    """
    free, there = shutil.disk_usage(folder).free, _bytes_in(folder)
    if free + there < sum(needed):
        raise ConfigError(
            f"{folder} will take about {sum(needed) / 2**30:.2f} GiB, of which {there / 2**30:.2f} GiB are there; its "
            f"disk has {free / 2**30:.2f} GiB free. Free some space, give -o on another disk, or keep fewer "
            "checkpoints (default_hooks.checkpoint.max_keep_ckpts)"
        )


def _bytes_in(folder: Path) -> int:
    return sum(os.lstat(os.path.join(path, name)).st_size for path, _, names in os.walk(folder) for name in names)
