"""VFNet (arXiv 2008.13367): points, boxes that are refined once, and classes scored by the IoU of their box."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crosskd.models.families.retina import RetinaFamily
from crosskd.models.heads import DenseHead, LossCall, boxes_from_sides, register_family


@register_family("VFNetHead")
class VFNetFamily(RetinaFamily):
    """
    As RetinaNet, on the refined boxes, which are decoded from the points.

    The boxes before their refinement, which a head in eval mode does not return, are not compared. Nothing is
    published for this head: losses and weights are ours.
    """

    predictor = "vfnet_cls"
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 1.0}

    @contextlib.contextmanager
    def recorded_assignment(self, head: DenseHead) -> Iterator[list[LossCall]]:
        """Yields a list that the head's loss inside the block fills: one call for all levels."""
        with _recorded_varifocal_loss(head) if head.use_vfl else super().recorded_assignment(head) as calls:
            yield calls

    def outputs_as_in_eval(self, outputs: Any, head: DenseHead) -> Any:
        return (outputs[0], outputs[2]) if head.training else outputs

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        (call,) = calls
        sizes = [maps[:, 0].numel() for maps in cross[0]]
        levels = zip(call.labels.split(sizes), call.label_weights.split(sizes), strict=True)
        calls = [LossCall(labels, weights, call.avg_factor) for labels, weights in levels]
        return super().loss_by_outputs(cross, teacher, calls, head)

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        logits, sides = rows  # sides in pixels, refined
        return boxes_from_sides(priors, sides), logits.sigmoid()

    def traceable(self, head: DenseHead) -> nn.Module:
        traced = copy.copy(head)  # shares every layer
        traced.star_dcn_offset = functools.partial(_star_offset, head.dcn_base_offset)
        return traced


def _star_offset(base: Tensor, sides: Tensor, gradient_mul: float, stride: float) -> Tensor:
    """
    (N, 18, H, W): how far the nine points of a 3 x 3 kernel move, y before x, to lie on the box (arXiv 2008.13367).

    As VFNetHead.star_dcn_offset, which writes channel by channel into an array, a chain of ScatterND in a graph.

    Args:
        base: (1, 18, 1, 1), the kernel's own points. sides: (N, 4, H, W), pixels.
    """
    left, top, right, bottom = (sides / stride).split(1, dim=1)
    middle = left * 0  # zeros_like would be a constant, made for the batch that is traced
    points = [side for y in (-top, middle, bottom) for x in (-left, middle, right) for side in (y, x)]
    return torch.cat(points, dim=1) - base.to(sides.dtype)  # mmdet's is float64


@contextlib.contextmanager
def _recorded_varifocal_loss(head: DenseHead) -> Iterator[list[LossCall]]:
    """The targets of the varifocal loss are the IoU at a positive row's class and zero elsewhere; it has no weights."""
    calls: list[LossCall] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        quality, labels = args[1].max(1)  # (rows, classes) -> (rows,) each
        labels = torch.where(quality > 0, labels, head.num_classes)
        calls.append(LossCall(labels, torch.ones_like(quality), kwargs["avg_factor"]))

    handle = head.loss_cls.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
