"""
What keeps a training alive: batches whose loss is not finite, or whose images cannot be read, are skipped; norms take a
level of one position.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.logging import MessageHub, print_log
from mmengine.model import is_model_wrapper
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from deploy.errors import DataError, TrainingError


class _BadBatchError(Exception):
    """This batch is to be skipped, because of this process or another; says why, empty if not because of this one."""


class _NonFiniteLossError(_BadBatchError):
    """A loss is not finite; says which parts."""


class UnreadableBatch:
    """Stands for a batch of which an image cannot be read."""

    def __init__(self, error: DataError) -> None:
        # From a worker process the text is a whole traceback, whose last line is the message.
        self.reason = str(error).strip().splitlines()[-1].split(f"{DataError.__name__}: ")[-1]


class _SkippingDataLoader(DataLoader):
    """Goes on after a batch that its dataset cannot make, and gives an `UnreadableBatch` in its place."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError as error:
                batch = UnreadableBatch(error)
            yield batch


def skip_unreadable(loader: DataLoader) -> None:
    """Makes a loader go on where an image cannot be read: what it gives then is skipped by `guard_training`."""
    loader.__class__ = _SkippingDataLoader  # in place: loops and hooks hold the loader


def guard_training(model: Any, patience: int = 10) -> None:
    """
    Makes `model.train_step` skip every batch of which a loss is not finite, or an image cannot be read, and say which
    losses and images they were.

    A skipped batch leaves no trace: no backward pass, no optimiser step, gradients that are being accumulated stay as
    they are (the next batch takes its place), and running statistics are put back, since one NaN in them would spoil
    every later evaluation. `train_step` returns no losses then, so that hooks and schedules go on as after any batch.
    All processes skip together. The message hub, and so every checkpoint, counts the batches as `skipped_batches`.

    Costs one device-to-host synchronisation per step. Gradients are not looked at: fp16's loss scaling does that, and
    weights that others have spoilt are found by the next loss, or by `check_weights` at the end.

    Args:
        model: `runner.model` of a runner that is about to train: a detector, or one wrapped for several processes.
        patience: how many batches in a row are skipped; one more stops the training. 0 stops at once.

    The wrapped `train_step` raises:
        TrainingError: more than `patience` batches in a row had a loss that is not finite, or unreadable images; or a
            loss is not finite because weights are not, which no other batch mends.
    """
    detector = model.module if is_model_wrapper(model) else model
    parse_losses, train_step = detector.parse_losses, model.train_step
    in_a_row = 0

    @functools.wraps(parse_losses)
    def checked_parse_losses(losses: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        total, log_vars = parse_losses(losses)
        bad = (~torch.isfinite(total.detach())).float()
        all_reduce(bad, op="max")  # a process that skipped alone would leave the others waiting for its gradients
        if bad.item():
            raise _NonFiniteLossError(_words_from_losses(losses, total))
        return total, log_vars

    @functools.wraps(train_step)
    def guarded_train_step(data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        nonlocal in_a_row
        statistics = _running_statistics(detector)
        before = [value.clone() for value in statistics]
        try:
            _check_readable(data)
            log_vars = train_step(data, optim_wrapper=optim_wrapper)
        except _BadBatchError as error:
            is_loss = isinstance(error, _NonFiniteLossError)
            cause_here = str(error)
            if is_loss and cause_here:
                cause_here += f" of the images {_names_from_batch(data)}"
        else:
            in_a_row = 0
            return log_vars
        with torch.no_grad():
            for value, old in zip(statistics, before, strict=True):
                value.copy_(old)
        causes = "; ".join(words for words in all_gather_object(cause_here) if words)
        in_a_row += 1
        if in_a_row > patience and not is_loss:
            raise TrainingError(
                f"{in_a_row} batches in a row cannot be used. The last one: {causes}. Bring the files again, or drop "
                "the images from the annotations"
            )
        if is_loss:
            check_weights(detector)
        if in_a_row > patience:
            raise TrainingError(
                f"the loss of {in_a_row} batches in a row is not finite. The last one: {causes}. The detector's "
                "weights are finite: look at the boxes of these images, the teacher's weights, and the learning rate."
            )
        hub = MessageHub.get_current_instance()
        skipped = hub.get_info("skipped_batches", 0) + 1
        hub.update_info("skipped_batches", skipped)
        what = "a loss is not finite" if is_loss else "an image cannot be read"
        message = f"{what}, batch skipped ({in_a_row} in a row, {skipped} in all): {causes}"
        print_log(message, logger="current", level=logging.WARNING)
        return {}

    detector.parse_losses = checked_parse_losses
    model.train_step = guarded_train_step


def _check_readable(data: Any) -> None:
    """Raises _BadBatchError in all processes if the batch of one cannot be read: they must skip together."""
    reason = data.reason if isinstance(data, UnreadableBatch) else ""
    bad = torch.tensor(float(bool(reason)))
    all_reduce(bad, op="max")
    if bad.item():
        raise _BadBatchError(reason)


class _BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that, in training, takes a single value per channel: by its running statistics, and leaves them."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and inputs.numel() == inputs.shape[1]:
            mean, variance = self.running_mean, self.running_var
            return functional.batch_norm(inputs, mean, variance, self.weight, self.bias, eps=self.eps)
        return super().forward(inputs)


def accept_single_values(detector: nn.Module) -> None:
    """
    Lets every BatchNorm of a detector train on a level of one position in a batch of one image.

    torch refuses it (a single value has no variance), which would end a training at the first small image. Everything
    else is computed as before, and the state dict has the same keys.
    """
    for module in detector.modules():
        if type(module) is nn.BatchNorm2d and module.track_running_stats:
            module.__class__ = _BatchNorm2d  # in place: a deep copy, EMA's for one, copies it along


def _running_statistics(detector: nn.Module) -> list[Tensor]:
    """The buffers that a training step may change: those of modules in training mode, so none of a frozen teacher."""
    return [buffer for module in detector.modules() if module.training for buffer in module.buffers(recurse=False)]


def _words_from_losses(losses: dict[str, Any], total: Tensor) -> str:
    """
    Each loss that is not finite, with its values: 'loss_cls (level 0: nan, level 2: inf), loss_bbox (nan)'.

    Empty if all are finite, and so is their sum.
    """
    words = []
    for key, values in losses.items():
        levels = [value.mean().item() for value in ([values] if isinstance(values, Tensor) else values)]
        bad = [(level, value) for level, value in enumerate(levels) if not math.isfinite(value)]
        if bad and "loss" in key:  # mmengine adds up these keys; others are only logged
            named = (f"{value}" if isinstance(values, Tensor) else f"level {level}: {value}" for level, value in bad)
            words.append(f"{key} ({', '.join(named)})")
    if not words and not math.isfinite(total.item()):
        words.append(f"the sum of the losses ({total.item()}), though each of them is finite,")
    return ", ".join(words)


def _names_from_batch(data: dict[str, Any]) -> str:
    """The images of a batch that mmdet's loaders made, by path or id."""
    names = (sample.metainfo.get("img_path", sample.metainfo.get("img_id")) for sample in data["data_samples"])
    return ", ".join(str(name) for name in names)


def check_weights(detector: nn.Module) -> None:
    """Raises TrainingError if a weight is not finite: a detector that has diverged detects nothing."""
    bad = [name for name, value in detector.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise TrainingError(
            f"{len(bad)} of the detector's weights are not finite (such as {bad[0]}): an earlier step was too large. "
            "Lower the learning rate, or clip gradients (optim_wrapper.clip_grad), and begin anew."
        )
