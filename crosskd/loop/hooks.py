"""
What runs beside the steps of every training: seeds that a resumed run repeats, checkpoints that are whole or not there,
the log as JSON lines, and the moving average of the student's weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import FUNCTIONS, HOOKS, MODELS
from torch import nn

from deploy.errors import CheckpointError, ConfigError, PipelineError, TrainingError, fault_of_storage
from deploy.files import AnyPath, replacing


def detector_of(runner: Any) -> Any:
    """The detector that `runner` trains, without the wrapper that several processes put around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """
    Seeds Python, numpy and torch before each epoch by the run's seed, the iteration and the process.

    mmengine does not restore random states, so that a resumed run would draw other augmentations. With this hook, with
    the order of images that mmdet's sampler draws from seed and epoch, and with `seed_worker`, a run that was killed
    and resumed ends with the weights of one that was not, bit for bit on a CPU. Two exceptions:

    - Loops that count in iterations (IterBasedTrainLoop) are one long epoch. Resumed, they go on with the next images
      of the same order, but with augmentations drawn anew.
    - Transforms that keep a cache of earlier images (CachedMosaic, CachedMixUp) start with an empty one.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Any) -> None:
        seed = int(np.random.SeedSequence((runner.seed, runner.iter, get_rank())).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@FUNCTIONS.register_module()
def seed_worker(_worker: int) -> None:
    """
    Seeds a data loader's worker by torch's own seed for it, which is drawn from the loader's process at each epoch.

    mmengine's default seeds the workers of every epoch alike: the same augmentations in each.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


class AtomicBackend(LocalBackend):
    """Files that are whole or not there; what is to be removed stays until `remove_outdated`."""

    def __init__(self) -> None:
        self.outdated: list[str] = []

    def put(self, obj: bytes, filepath: AnyPath) -> None:
        with replacing(filepath) as temporary:
            temporary.write_bytes(obj)

    def remove(self, filepath: AnyPath) -> None:
        self.outdated.append(str(filepath))

    def remove_outdated(self) -> None:
        for path in self.outdated:
            Path(path).unlink(missing_ok=True)
        self.outdated.clear()


register_backend("atomic", AtomicBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """
    mmengine's CheckpointHook, with a checkpoint to go on from at any moment after the first.

    mmengine removes the old checkpoint, then writes the new one and `last_checkpoint` in place. Here a checkpoint is
    written under a temporary name and renamed, then `last_checkpoint` points to it, and only then the old one goes.

    A checkpoint also holds the gradients of an accumulation that is not complete, of each process its own.

    Raises:
        ConfigError: checkpoints are to go elsewhere than to the run directory, or by iterations in a loop of epochs;
            a run is resumed in another way than it was started.
        CheckpointError: a run is resumed from a checkpoint without the optimiser's state.
    """

    def __init__(self, **kwargs: Any) -> None:
        elsewhere = [key for key in ("out_dir", "backend_args", "file_client_args") if kwargs.get(key) is not None]
        if elsewhere:
            raise ConfigError(
                f"default_hooks.checkpoint.{elsewhere[0]} is {kwargs[elsewhere[0]]!r}; expected none: checkpoints lie "
                "in the run directory, where --resume looks for them. Remove it and choose the folder with -o."
            )
        super().__init__(**{**kwargs, "backend_args": {"backend": "atomic"}})
        self._gathered: list[dict[str, torch.Tensor]] = []
        """The gradients of each of several processes at the last checkpoint, in the first one."""

    def before_train(self, runner: Any) -> None:
        if not self.by_epoch and "max_epochs" in runner.cfg.train_cfg:
            raise ConfigError(
                "default_hooks.checkpoint.by_epoch is False, but the loop counts in epochs, and an epoch cannot be "
                "resumed in its middle; set it to True"
            )
        super().before_train(runner)
        if is_main_process() and self.max_keep_ckpts > 0 and self.keep_ckpt_ids:
            self._remove_forgotten(runner.work_dir)

    def _remove_forgotten(self, work_dir: str) -> None:
        """Removes what a run that was killed after writing its checkpoint had no time to remove."""
        pattern = re.escape(self.filename_tmpl).replace(r"\{\}", r"(\d+)")
        for path in Path(work_dir).iterdir():
            match = re.fullmatch(pattern, path.name)
            if match and int(match[1]) < self.keep_ckpt_ids[0]:
                path.unlink()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        meta = checkpoint["meta"]
        if "optimizer" not in checkpoint:
            raise CheckpointError(
                "the last checkpoint has no optimiser state, so the run cannot be resumed; it was saved with "
                "default_hooks.checkpoint.save_optimizer=False"
            )
        if meta["seed"] != runner.seed:
            raise ConfigError(f"the run has the seed {meta['seed']}, --seed is {runner.seed}; resume with the same")
        averaged, averages = "ema_state_dict" in checkpoint, any(isinstance(hook, EMAHook) for hook in runner.hooks)
        if averaged != averages:
            raise ConfigError(
                f"the run was started {'with' if averaged else 'without'} a moving average of the weights and is "
                f"resumed {'with' if averages else 'without'} one; resume with the same --ema"
            )
        _check_same_weights(detector_of(runner), checkpoint.get("state_dict", {}))
        expected = meta["epoch"] * len(runner.train_dataloader)
        if self.by_epoch and meta["iter"] != expected:
            raise ConfigError(
                f"the run had taken {meta['iter']} steps after {meta['epoch']} epochs; with these data, batch size and "
                f"number of processes there would be {expected}. Resume with those that it was started with."
            )
        if "gradients" in checkpoint:
            _restore_gradients(detector_of(runner), checkpoint["gradients"])

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        gradients = self._gathered or [_gradients_of(detector_of(runner))]
        if any(gradients):
            checkpoint["gradients"] = gradients

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if is_main_process() and len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self.file_backend.remove(Path(self.out_dir) / self.filename_tmpl.format(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)  # it has a greatest length, and drops its oldest entry
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self._gathered = _gathered_gradients(detector_of(runner))  # here, since the first process alone saves
        name = self.filename_tmpl.format(step)
        self.last_ckpt = str(Path(self.out_dir) / name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            with replacing(Path(runner.work_dir) / "last_checkpoint") as temporary:
                temporary.write_text(self.last_ckpt)
            self.file_backend.remove_outdated()

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.remove_outdated()


def _check_same_weights(detector: nn.Module, saved: dict[str, Any]) -> None:
    """mmengine would keep the random weights of a layer that has another shape in the checkpoint, and only log it."""
    current = detector.state_dict()
    differing = [key for key in current if key in saved and saved[key].shape != current[key].shape]
    if differing:
        raise ConfigError(
            f"the run was started with another model or other classes: {len(differing)} of its weights have another "
            f"shape, such as {differing[0]}; resume it with the config and the data that it was started with"
        )


def _gradients_of(detector: nn.Module) -> dict[str, torch.Tensor]:
    parameters = detector.named_parameters()
    return {name: parameter.grad.cpu() for name, parameter in parameters if parameter.grad is not None}


def _gathered_gradients(detector: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Name of a parameter -> its gradient, of each of several processes; in the first one. Else nothing."""
    if get_world_size() == 1:
        return []
    group = torch.distributed.new_group(backend="gloo")  # NCCL would take the memory of the first process's GPU
    gathered: list[Any] | None = [None] * get_world_size() if is_main_process() else None
    torch.distributed.gather_object(_gradients_of(detector), gathered, dst=0, group=group)
    torch.distributed.destroy_process_group(group)
    return gathered or []


def _restore_gradients(detector: nn.Module, gradients: Any) -> None:
    of_all = [gradients] if isinstance(gradients, dict) else gradients  # a dict: of the first one, up to version 0.1
    if len(of_all) != get_world_size():
        raise CheckpointError(
            f"the run stopped in the middle of an accumulation, whose gradients its checkpoint has of {len(of_all)} "
            f"processes; here are {get_world_size()}. Resume with as many, or start anew without --resume"
        )
    parameters = dict(detector.named_parameters())
    for name, gradient in of_all[get_rank()].items():
        parameters[name].grad = gradient.to(parameters[name].device)


@HOOKS.register_module()
class JsonLinesHook(Hook):
    """
    Writes RUN_DIR/log.jsonl: a JSON document per logging interval and at each epoch's end, and one per validation.

    `kind` is "train" or "val"; `epoch` and `iter` count from 1. Lines of training have `lr`, `eta_s`, `step_s`,
    `data_s` (waiting for data, a part of the step), `loss`, each loss, `grad_norm` where gradients are clipped, and
    `memory_mib` on a GPU; times and losses are means over the config's log window, losses those of the first process.
    Numbers that are not finite are null. A resumed run appends, after the lines up to its checkpoint.

    Args:
        interval: iterations between two lines.
    """

    priority = "LOW"  # after the hooks that measure

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def before_train(self, runner: Any) -> None:
        self.path = Path(runner.work_dir) / "log.jsonl"
        if not is_main_process():
            return
        resumed = runner.iter > 0 and self.path.is_file()
        lines = self.path.read_text(encoding="utf-8").splitlines() if resumed else []
        with replacing(self.path) as temporary:
            temporary.write_text(
                "".join(f"{line}\n" for line in lines if _is_line_until(line, runner.iter)), encoding="utf-8"
            )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self.every_n_inner_iters(batch_idx, self.interval) or self.end_of_epoch(runner.train_dataloader, batch_idx):
            values, _ = runner.log_processor.get_log_after_iter(runner, batch_idx, "train")
            names = {"time": "step_s", "data_time": "data_s", "memory": "memory_mib"}
            renamed = {names.get(key, key): value for key, value in values.items()}
            eta_s = runner.message_hub.get_info("eta")
            self._write({"kind": "train", "epoch": runner.epoch + 1, "iter": runner.iter + 1, "eta_s": eta_s}, renamed)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._write({"kind": "val", "epoch": runner.epoch, "iter": runner.iter}, metrics or {})

    def _write(self, head: dict[str, Any], values: dict[str, Any]) -> None:
        if is_main_process():
            document = {key: _json_value(value) for key, value in {**head, **values, **head}.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(document, allow_nan=False) + "\n")


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def _is_line_until(line: str, iteration: int) -> bool:
    """Whether a line is whole, a killed run may leave half of one, and not of steps that a resumed run repeats."""
    try:
        return json.loads(line)["iter"] <= iteration
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


@HOOKS.register_module()
class StudentEMAHook(EMAHook):
    """
    mmengine's EMAHook for what is kept of a run: the student, or a plain detector. A teacher is neither copied nor
    averaged.

    Validation and checkpoints' `state_dict` use the averaged weights, and the detector has them when training ends.
    """

    def before_run(self, runner: Any) -> None:
        detector = detector_of(runner)
        self.prefix = "student." if hasattr(detector, "student") else ""
        self.src_model = getattr(detector, "student", detector)
        self.ema_model = MODELS.build(self.ema_cfg, default_args=dict(model=self.src_model))

    def after_train_epoch(self, runner: Any) -> None:
        _same_everywhere(list(self.ema_model.buffers()))

    def after_train(self, runner: Any) -> None:
        self._swap_ema_parameters()

    def _swap_ema_state_dict(self, checkpoint: dict[str, Any]) -> None:
        state, averaged = checkpoint["state_dict"], checkpoint["ema_state_dict"]
        for key in averaged:
            if key.startswith("module."):
                name = self.prefix + key.removeprefix("module.")
                averaged[key], state[name] = state[name], averaged[key]


@HOOKS.register_module()
class FreezeHeadNormsHook(Hook):
    """
    Trains the last part of a run with the BatchNorms of the head as they will be run: on their running statistics.

    All levels of the pyramid share the head. In training each level is normalised by its own statistics, afterwards
    all of them by one running mean, and what was learned does not fit: that can cost half of the AP. With the
    statistics held still, the weights learn to live with them.

    Args:
        begin: share of the epochs (or iterations) after which it does so.
        whole_detector: hold those of backbone and neck, too: for fine-tuning on few images.
    """

    def __init__(self, begin: float, whole_detector: bool = False) -> None:
        if not 0 <= begin <= 1:
            raise ConfigError(f"FreezeHeadNormsHook.begin is {begin!r}; expected a share of the run, 0 to 1")
        self.begin, self.whole_detector = begin, whole_detector

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        # Before each one, since a runner sets the training mode anew after each epoch and each validation.
        if runner.iter >= self.begin * runner.max_iters:
            detector = detector_of(runner)
            detector = getattr(detector, "student", detector)
            part = detector if self.whole_detector else detector.bbox_head
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


class FirstStepHook(Hook):
    """
    Counts the steps that a training has taken: before the first an error is most likely one of the config or the data.

    Args:
        on_start: called with the runner once everything is built, before the first epoch; by the first process only.
    """

    priority = "LOWEST"

    def __init__(self, on_start: Callable[[Any], None]) -> None:
        self.on_start, self.taken = on_start, 0

    def before_train(self, runner: Any) -> None:
        if is_main_process():
            self.on_start(runner)

    def after_train_iter(self, *_args: Any, **_kwargs: Any) -> None:
        self.taken += 1


@contextlib.contextmanager
def errors_of_training(first_step: FirstStepHook, run_dir: Path, new_files: Sequence[Path] = ()) -> Iterator[None]:
    """
    Makes an error in the block, which builds and runs a training, one message; its traceback goes into the log file.

    Args:
        new_files: written for this training, and removed where it does not take its first step.

    Raises:
        ConfigError: in place of what mmengine and mmdet raise of settings that they do not take.
        TrainingError: in place of what is raised after the first step: by a metric, a hook, a device without memory.
    """
    logging.raiseExceptions = False  # of a log on a full disk: the first that else cannot be written is one message
    try:
        yield
    except BaseException as error:
        if not first_step.taken:
            for path in new_files:
                path.unlink(missing_ok=True)
        if isinstance(error, PipelineError) or not isinstance(error, Exception):
            raise
        fault = fault_of_storage(error)
        if fault is not None:
            raise TrainingError(
                f"cannot write into {run_dir}: {fault} --resume goes on from the last checkpoint"
            ) from error
        MMLogger.get_current_instance().info("the training ends by an error", exc_info=True)
        lines = [line for line in str(error.args[0] if error.args else error).splitlines() if line.strip()] or [""]
        words = lines[-1 if "Traceback" in lines[0] or "worker process" in lines[0] else 0]
        if first_step.taken:
            raise TrainingError(
                f"the training ended after {first_step.taken} steps: {type(error).__name__}: {words}. The traceback in "
                f"the log file in {run_dir} names the part that failed; --resume goes on from the last checkpoint"
            ) from error
        raise ConfigError(
            f"the training cannot take its first step: {type(error).__name__}: {words}. Look at the part of the config "
            f"that this names; the traceback is in the log file in {run_dir}"
        ) from error


@HOOKS.register_module()
class SameBuffersHook(Hook):
    """
    Gives every process the buffers of the first one at the end of each epoch, before they are validated and saved.

    Processes share gradients, and so have the same parameters, but each has BatchNorm's running statistics of its own
    images.
    """

    def after_train_epoch(self, runner: Any) -> None:
        _same_everywhere(list(runner.model.buffers()))


def _same_everywhere(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        broadcast(tensor)
