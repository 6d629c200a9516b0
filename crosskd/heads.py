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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from crosskd.losses import distribution_kl, kd_quality_focal_loss
from crosskd.ops import register_mmcv_ops
from deploy.errors import ConfigError

register_mmcv_ops()  # before mmdet is imported, which asks for them then
from mmdet.structures.bbox import bbox_overlaps  # noqa: E402
from mmdet.utils import reduce_mean  # noqa: E402

TOWERS = ("cls_convs", "reg_convs")
Taps = list[tuple[Tensor, Tensor]]
"""Per level, finest first: the classification and the regression tower's tap, each (N, C, H, W)."""


@dataclasses.dataclass
class LossCall:
    """What the student's own head gave to its classification loss in one call: its target assignment."""

    labels: Tensor
    """(rows,) int64: the class, or the number of classes for background. A row is an anchor or point of an image."""
    label_weights: Tensor
    """(rows,): 0 where the assignment ignores the row."""
    avg_factor: float | Tensor
    """The head's averaging factor: positive rows, at least one per image."""


class HeadFamily:
    """What CrossKD has to know of a family of dense heads."""

    default_weights: ClassVar[dict[str, float]]
    """Loss key -> weight, as published for the family; `loss_feat_kd` is PKD's."""

    @contextlib.contextmanager
    def recorded_assignment(self, head: nn.Module) -> Iterator[list[LossCall]]:
        """
        Yields a list that the head's loss inside the block fills, a call per level: nothing is assigned twice.
        """
        calls: list[LossCall] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            target = args[1]
            labels = target[0] if isinstance(target, tuple) else target  # GFL adds the quality of each box
            weights = kwargs.get("weight", args[2] if len(args) > 2 else None)
            weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.reshape(-1)
            calls.append(LossCall(labels.reshape(-1), weights, kwargs["avg_factor"]))

        handle = head.loss_cls.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        """
        The distillation losses, a scalar per level under each key, before their weights.

        Args:
            cross: the teacher head's outputs for the student's taps, in the order of the head's forward.
            teacher: the teacher's own outputs.
            calls: the student's target assignment, per level.
            head: the teacher's head.
        """
        raise NotImplementedError


class GFLFamily(HeadFamily):
    """Quality focal loss on classes, KL on the distributions of the four sides."""

    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 6.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        bins = head.reg_max + 1
        losses_cls, losses_reg, weights = [], [], []
        for cross_cls, cross_reg, teacher_cls, teacher_reg, call in zip(*cross, *teacher, calls, strict=True):
            losses_cls.append(_loss_cls(head, cross_cls, teacher_cls, call))
            weight = _confidence(head, teacher_cls, call)
            divergence = distribution_kl(_rows(cross_reg, bins), _rows(teacher_reg, bins)).view(-1, 4)
            losses_reg.append((divergence.sum(1) * weight).sum())
            weights.append(weight.sum())
        total = sum(weights).clamp(min=1e-6)
        return {"loss_cls_kd": losses_cls, "loss_reg_kd": [loss / total for loss in losses_reg]}


class RetinaFamily(HeadFamily):
    """Quality focal loss on classes, GIoU loss on boxes that are decoded from the anchors."""

    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 2.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        losses_cls, losses_reg = [], []
        levels = zip(_priors(head, cross[0]), cross[0], cross[1], teacher[0], teacher[1], calls, strict=True)
        for anchors, cross_cls, cross_reg, teacher_cls, teacher_reg, call in levels:
            losses_cls.append(_loss_cls(head, cross_cls, teacher_cls, call))
            boxes, target = (head.bbox_coder.decode(anchors, _rows(maps, 4)) for maps in (cross_reg, teacher_reg))
            distance = 1 - bbox_overlaps(boxes, target, mode="giou", is_aligned=True, eps=1e-7)  # (rows,)
            losses_reg.append((distance * _confidence(head, teacher_cls, call)).sum() / call.avg_factor)
        return {"loss_cls_kd": losses_cls, "loss_reg_kd": losses_reg}


class ATSSFamily(RetinaFamily):
    """As RetinaNet, and binary cross entropy on the centerness of positive anchors."""

    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_centerness_kd": 1.0, "loss_feat_kd": 1.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        losses = super().loss_by_outputs(cross, teacher, calls, head)
        losses["loss_centerness_kd"] = []
        for cross_map, teacher_map, call in zip(cross[2], teacher[2], calls, strict=True):
            positive = (call.labels >= 0) & (call.labels < head.num_classes)
            logits, target = _rows(cross_map, 1)[positive], _rows(teacher_map, 1)[positive].sigmoid()
            entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            losses["loss_centerness_kd"].append(entropy / call.avg_factor)
        return losses


class FCOSFamily(HeadFamily):
    """
    Quality focal loss on classes, -log IoU on boxes that are decoded from the points; all levels at once.

    Both are divided by the sum of the centerness targets of the positive points, mean over ranks. Where no rank has a
    positive point there is nothing to divide by, and both losses are zero.
    """

    default_weights: ClassVar = {"loss_cls_kd": 0.4, "loss_reg_kd": 0.75, "loss_feat_kd": 2.0}

    @contextlib.contextmanager
    def recorded_assignment(self, head: nn.Module) -> Iterator[list[LossCall]]:
        # The head reduces this sum itself, but gives it to a loss only where there are positives. Every rank gets
        # here, so reducing it once more is safe.
        original = head.centerness_target
        sums: list[Tensor] = []

        def centerness_target(targets: Tensor) -> Tensor:
            result = original(targets)
            sums.append(result.sum())
            return result

        head.centerness_target = centerness_target
        try:
            with super().recorded_assignment(head) as calls:
                yield calls
                for call, total in zip(calls, sums, strict=True):
                    call.avg_factor = reduce_mean(total.detach())
        finally:
            del head.centerness_target

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: nn.Module
    ) -> dict[str, list[Tensor]]:
        (call,) = calls
        points = torch.cat(_priors(head, cross[0]))
        cross_cls, teacher_cls = (
            torch.cat([_rows(m, head.cls_out_channels) for m in maps[0]]) for maps in (cross, teacher)
        )
        cross_reg, teacher_reg = (torch.cat([_rows(m, 4) for m in maps[1]]) for maps in (cross, teacher))
        boxes, target = (head.bbox_coder.decode(points, distances) for distances in (cross_reg, teacher_reg))
        overlap = bbox_overlaps(boxes, target, is_aligned=True).clamp(min=1e-6)
        distance = -overlap.log() * teacher_cls.amax(1).sigmoid()
        factor = call.avg_factor
        scale = torch.where(factor > 0, 1 / factor.clamp(min=1e-6), 0)
        return {
            "loss_cls_kd": [kd_quality_focal_loss(cross_cls, teacher_cls).sum() * scale],
            "loss_reg_kd": [distance.sum() * scale],
        }


FAMILIES: dict[str, HeadFamily] = {
    "GFLHead": GFLFamily(),
    "RetinaHead": RetinaFamily(),
    "ATSSHead": ATSSFamily(),
    "FCOSHead": FCOSFamily(),
}


def _loss_cls(head: nn.Module, cross: Tensor, teacher: Tensor, call: LossCall) -> Tensor:
    logits, target = _rows(cross, head.cls_out_channels), _rows(teacher, head.cls_out_channels)
    return (kd_quality_focal_loss(logits, target) * call.label_weights[:, None]).sum() / call.avg_factor


def _confidence(head: nn.Module, teacher: Tensor, call: LossCall) -> Tensor:
    """(rows,): the teacher's highest class probability, zero where the assignment ignores the row."""
    return _rows(teacher, head.cls_out_channels).amax(1).sigmoid() * (call.label_weights > 0)


def _priors(head: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Per level (N * H * W * A, 4) anchors or (N * H * W, 2) points, in the order of `_rows`."""
    sizes = [m.shape[-2:] for m in maps]
    priors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
    return [level.repeat(maps[0].shape[0], 1) for level in priors]


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
            "num_base_priors": head.num_base_priors,
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
