"""
How to split a dense head at tower layer k, and how the outputs of each head family are compared.

A dense head is two towers of convolutions (classification, regression) over each pyramid level, then predictors. The
tap k is the output of tower layer k after its activation; tap 0 is the pyramid feature itself.

A family is one small class, registered by the type of the head: `loss_by_outputs` is all that it has to write.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from crosskd.losses import distribution_kl, kd_quality_focal_loss
from deploy.errors import ConfigError

TOWERS = ("cls_convs", "reg_convs")
Taps = list[tuple[Tensor, Tensor]]
"""Per level, finest first: the classification and the regression tower's tap, each (N, C, H, W)."""


@dataclasses.dataclass
class LossCall:
    """What the student's own head gave to its classification loss at one level: its target assignment."""

    label_weights: Tensor
    """(N * H * W,): 0 where the assignment ignores an anchor."""
    avg_factor: float
    """The head's averaging factor: positive anchors, averaged over ranks."""


class HeadFamily:
    """What CrossKD has to know of a family of dense heads."""

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        """
        The distillation losses, a scalar per level under each key.

        Args:
            cross: the teacher head's outputs for the student's taps, in the order of the head's forward.
            teacher: the teacher's own outputs.
            calls: the student's target assignment, per level.
            head: the teacher's head.
        """
        raise NotImplementedError


class GFLFamily(HeadFamily):
    """Quality focal loss on classes, KL on the distributions of the four sides (facts: CrossKD, table of losses)."""

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        bins = head.reg_max + 1
        losses_cls, losses_reg, weights = [], [], []
        for cross_cls, cross_reg, teacher_cls, teacher_reg, call in zip(*cross, *teacher, calls, strict=True):
            logits, target = _rows(cross_cls, head.cls_out_channels), _rows(teacher_cls, head.cls_out_channels)
            loss_cls = kd_quality_focal_loss(logits, target) * call.label_weights[:, None]
            losses_cls.append(loss_cls.sum() / call.avg_factor)
            weight = target.amax(1).sigmoid() * (call.label_weights > 0)  # (N * H * W,)
            divergence = distribution_kl(_rows(cross_reg, bins), _rows(teacher_reg, bins)).view(-1, 4)
            losses_reg.append((divergence.sum(1) * weight).sum())
            weights.append(weight.sum())
        total = sum(weights).clamp(min=1e-6)
        return {"loss_cls_kd": losses_cls, "loss_reg_kd": [loss / total for loss in losses_reg]}


FAMILIES: dict[str, HeadFamily] = {"GFLHead": GFLFamily()}


def family_of(head: nn.Module) -> HeadFamily:
    """
    The family of a head.

    Raises:
        ConfigError: the head's type is not supported; those that are, are named.
    """
    name = type(head).__name__
    if name not in FAMILIES:
        raise ConfigError(f"CrossKD cannot split the head {name}; it can split {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def check_heads_match(student: nn.Module, teacher: nn.Module, split: int) -> None:
    """
    Raises ConfigError unless the student's taps fit into the teacher's head at `split`.

    Both heads must be of one family and have the same width, classes, strides and number of tower layers.
    """
    if family_of(student) is not family_of(teacher):
        raise ConfigError(
            f"the student's head is {type(student).__name__}, the teacher's {type(teacher).__name__}; "
            "expected two heads of one family"
        )

    def facts(head: nn.Module) -> dict[str, Any]:
        return {
            "num_classes": head.num_classes,
            "feat_channels": head.feat_channels if split else head.in_channels,
            "stacked_convs": head.stacked_convs,
            "strides": [tuple(stride) for stride in head.prior_generator.strides],
            "reg_max": getattr(head, "reg_max", None),
        }

    mine, theirs = facts(student), facts(teacher)
    for key, value in mine.items():
        if value != theirs[key]:
            raise ConfigError(
                f"bbox_head.{key} is {value} in the student and {theirs[key]} in the teacher; expected the same "
                "value, since the student's features go through the teacher's head. Change one of the two configs."
            )
    if split not in range(student.stacked_convs + 1):
        raise ConfigError(
            f"model.distill.split is {split!r}; expected 0 to {student.stacked_convs}, the number of tower layers"
        )


def _rows(maps: Tensor, width: int) -> Tensor:
    """
    (N, A * width, H, W) -> (N * H * W * A, width), float32: the order in which mmdet's heads flatten their levels.
    """
    return maps.permute(0, 2, 3, 1).reshape(-1, width).float()


@contextlib.contextmanager
def recorded_features(head: nn.Module, split: int) -> Iterator[tuple[list[Tensor], Taps]]:
    """
    Yields two lists that the forward pass of `head` inside the block fills, per level: pyramid features, and taps.

    Hooks on the tower layers fire once per level, so the head's own code is left as it is.
    """
    features: list[Tensor] = []
    taps: Taps = []
    columns: list[list[Tensor]] = [[], []]

    def finish(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        features.extend(args[0])
        taps.extend(zip(*(columns if split else (features, features)), strict=True))

    handles = [head.register_forward_hook(finish)]
    if split:
        for column, tower in zip(columns, TOWERS, strict=True):
            layer = getattr(head, tower)[split - 1]
            handles.append(layer.register_forward_hook(lambda _m, _a, output, column=column: column.append(output)))
    try:
        yield features, taps
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def recorded_assignment(head: nn.Module) -> Iterator[list[LossCall]]:
    """Yields a list that the head's loss inside the block fills, per level: nothing has to be assigned twice."""
    calls: list[LossCall] = []

    def record(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(LossCall(kwargs["weight"].reshape(-1), kwargs["avg_factor"]))

    handle = head.loss_cls.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class _TakeTap(nn.Module):
    """First layer of a shortened tower: takes its tap out of the pair, ReLU unless it is the pyramid feature."""

    def __init__(self, index: int, relu: bool) -> None:
        super().__init__()
        self.index, self.relu = index, relu

    def forward(self, taps: tuple[Tensor, Tensor]) -> Tensor:
        tap = taps[self.index]
        return functional.relu(tap) if self.relu else tap


def rest_of_head(head: nn.Module, split: int) -> nn.Module:
    """
    The layers of `head` after tap `split`, as a module that takes `Taps` where `head` takes features.

    A shallow copy that shares every parameter: the head's own forward does predictors, scales and activations. Do
    not register it as a submodule, or the weights would appear twice.
    """
    rest = copy.copy(head)
    rest._modules = dict(head._modules)
    for index, tower in enumerate(TOWERS):
        rest._modules[tower] = nn.ModuleList([_TakeTap(index, relu=split > 0), *getattr(head, tower)[split:]])
    return rest
