"""GFL, generalized focal loss (arXiv 2006.04388): each side of a box is a distribution over `reg_max + 1` bins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from crosskd.models.heads import (
    DenseHead,
    HeadFamily,
    LossCall,
    boxes_from_sides,
    confidence_of_teacher,
    loss_of_classes,
    register_family,
    rows_of_maps,
    stride_of_level,
)
from crosskd.models.losses import distribution_kl

LD_TEMPERATURE = 10.0
"""Of localisation distillation, as published (arXiv 2102.12252)."""


@register_family("GFLHead")
class GFLFamily(HeadFamily):
    """Quality focal loss on classes, KL on the distributions of the four sides."""

    predictor = "gfl_cls"
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 6.0, "loss_ld": 0.25}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        bins = head.reg_max + 1
        losses_cls, losses_reg, weights = [], [], []
        for cross_cls, cross_reg, teacher_cls, teacher_reg, call in zip(*cross, *teacher, calls, strict=True):
            losses_cls.append(loss_of_classes(head, cross_cls, teacher_cls, call))
            weight = confidence_of_teacher(head, teacher_cls, call)
            divergence = distribution_kl(rows_of_maps(cross_reg, bins), rows_of_maps(teacher_reg, bins)).view(-1, 4)
            losses_reg.append((divergence.sum(1) * weight).sum())
            weights.append(weight.sum())
        total: Any = sum(weights)
        total = total.clamp(min=1e-6)
        return {"loss_cls_kd": losses_cls, "loss_reg_kd": [loss / total for loss in losses_reg]}

    def loss_ld(
        self, student: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> list[Tensor]:
        """
        Localisation distillation: KL of the student's distributions of box sides from the teacher's, per level.

        With temperature T, times T^2, mean over the bins, on positive rows; weighted by the student's confidence there
        and divided by its sum, as GFL weights its own box losses.

        Source: "Localization Distillation for Dense Object Detection", arXiv 2102.12252, its main region.
        """
        bins = head.reg_max + 1
        losses, weights = [], []
        for student_cls, student_reg, teacher_reg, call in zip(student[0], student[1], teacher[1], calls, strict=True):
            positive = ((call.labels >= 0) & (call.labels < head.num_classes)).float()
            weight = rows_of_maps(student_cls, head.cls_out_channels).detach().amax(1).sigmoid() * positive
            sides = (rows_of_maps(maps, bins) / LD_TEMPERATURE for maps in (student_reg, teacher_reg))
            divergence = distribution_kl(*sides).view(-1, 4).mean(1) * LD_TEMPERATURE**2 / bins
            losses.append((divergence * weight).sum())
            weights.append(weight.sum())
        total = sum(weights).clamp(min=1.0)
        return [loss / total for loss in losses]

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """A side is the mean of its distribution over the bins 0 to reg_max, in strides (arXiv 2006.04388, eq. 4)."""
        logits, distances = rows
        bins = head.reg_max + 1
        distribution = distances.reshape(-1, len(priors), 4, bins).softmax(-1)
        sides = (distribution * (torch.arange(bins) * stride_of_level(head, level))).sum(-1)
        return boxes_from_sides((priors[:, :2] + priors[:, 2:]) / 2, sides), logits.sigmoid()
