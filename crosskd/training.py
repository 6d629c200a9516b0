"""One training run, from a config to a weights file: what `crosskd.train` and `crosskd.distill` share."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from crosskd.config import (
    TrainingData,
    add_data_arguments,
    add_override_argument,
    load_config,
    overrides_from_arguments,
    set_data,
)
from deploy.contract import read_sidecar, weights_of_run, write_sidecar
from deploy.errors import CheckpointError, ConfigError
from deploy.files import sha256_of

WRAPPERS = {"fp32": "OptimWrapper", "bf16": "Bf16OptimWrapper", "fp16": "AmpOptimWrapper"}
"""--precision -> mmengine's optimiser wrapper."""


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a config file, or mmdet::FAMILY/NAME.py for one of mmdet's own"
    )
    parser.add_argument(
        "-o", "--output", metavar="RUN_DIR", help="folder of the run (default: runs/<name of the config>)"
    )
    add_data_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in RUN_DIR")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and data order (default: 0)")
    parser.add_argument(
        "--precision",
        choices=tuple(WRAPPERS),
        help="of the forward pass (default: the config's, or bf16 where the machine computes in it; fp16 needs a GPU)",
    )
    parser.add_argument(
        "--epochs", type=int, help="length of the training; the schedule is stretched to it (default: the config's)"
    )
    add_override_argument(parser)


def run_dir_of(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or f"runs/{Path(arguments.config).stem}")


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value, for `load_config`: of --epochs and --set."""
    epochs = {} if arguments.epochs is None else {"max_epochs": arguments.epochs}
    return {**epochs, **overrides_from_arguments(arguments)}


def run_training(
    config: Any,
    detector: Any,
    data: TrainingData,
    run_dir: Path,
    arguments: argparse.Namespace,
    weights_name: str,
    inputs: dict[str, Any],
) -> Path:
    """
    Trains `detector` with mmengine's runner, saves the run, and returns the path of its weights,
    `RUN_DIR/<weights_name>`.

    Args:
        config: the resolved config of `detector`; its data are set here.
        detector: a plain mmdet detector, or one that owns the one to be kept as `.student`.
        inputs: name -> file, for the sidecar: what went into the run besides its data.

    Raises:
        ConfigError: the precision cannot be had on this device.
        CheckpointError: --resume, and there is nothing to go on from.
    """
    import torch
    from mmengine.runner import Runner

    from crosskd.checkpoint import latest_checkpoint

    weights = run_dir / weights_name
    config.work_dir = str(run_dir)
    config.resume, config.load_from = arguments.resume, None
    if arguments.resume:
        config.load_from = str(latest_checkpoint(run_dir))
    config.randomness = dict(seed=arguments.seed)
    set_precision(config, detector, arguments.precision, "cuda" if torch.cuda.is_available() else "cpu")
    set_data(config, data, run_dir)

    # The layout in which convolutions run fastest, in bf16 most of all; a sixth to a quarter of a step on a CPU.
    detector.to(memory_format=torch.channels_last)
    names = set(inspect.signature(Runner.__init__).parameters) - {"self", "model", "cfg"}
    runner = Runner(model=detector, cfg=config, **{name: config[name] for name in names if name in config})
    runner.train()
    student = getattr(detector, "student", detector)
    config.model = config.model.get("student", config.model)
    details = {
        "seed": arguments.seed,
        "epochs": runner.max_epochs,
        "iterations": runner.iter,
        "precision": config.optim_wrapper.type,
        "device": next(student.parameters()).device.type,
    }
    save_run(config, student, data, weights, inputs, details)
    return weights


def save_run(
    config: Any, detector: Any, data: TrainingData, weights: Path, inputs: dict[str, Any], details: dict[str, Any]
) -> None:
    """
    Writes what every later stage reads of a run: the weights, `config.py` beside them, and the sidecar.

    Args:
        config: of the plain mmdet detector that the weights belong to.
        inputs: name -> file, recorded besides the config and the annotations. details: recorded besides the classes.
    """
    from crosskd.checkpoint import save_detector_weights

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


def set_precision(config: Any, detector: Any, precision: str | None, device: str) -> None:
    """
    Sets the type of the config's optimiser wrapper, keeps the losses in float32 and prepares the teacher.

    Args:
        precision: a key of WRAPPERS, or None: what the config asks for; where it asks for nothing, bf16 if the device
            computes in it.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: fp16 without a GPU.
    """
    import torch

    from crosskd.amp import computes_in_bf16, keep_losses_in_float32

    if precision == "fp16" and device != "cuda":
        raise ConfigError("--precision fp16 needs a GPU (its loss scaling does); use bf16 on a CPU")
    if precision is None and config.optim_wrapper.get("type", "OptimWrapper") == "OptimWrapper":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
        print(f"precision: {precision}, the fastest on this {device}; --precision fp32 or bf16 to choose")
    if precision is not None:
        config.optim_wrapper.type = WRAPPERS[precision]
    dtype = {WRAPPERS["bf16"]: torch.bfloat16, WRAPPERS["fp16"]: torch.float16}.get(config.optim_wrapper.type)
    if dtype is not None:
        keep_losses_in_float32(getattr(detector, "student", detector).bbox_head)
    if hasattr(detector, "prepare_teacher"):
        detector.prepare_teacher(dtype)


def seed_everything(seed: int) -> None:
    """
    Seeds Python, numpy and torch: to be called before a detector is built, whose layers draw their first weights then.
    """
    from mmengine.runner import set_random_seed

    set_random_seed(seed)


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
    from crosskd.checkpoint import load_detector_weights
    from crosskd.detector import detector_from_config

    config = load_config(config_path)
    detector = detector_from_config(config, load_weights=False)
    load_detector_weights(detector, weights)
    return config, detector.eval(), sidecar
