"""RTMDet (arXiv 2212.07784): one point a place, boxes as distances in pixels to the four sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from crosskd.models.families.retina import RetinaFamily
from crosskd.models.heads import DenseHead, LossCall, boxes_from_sides, positives_of_batch, register_family

MIN_DISTANCE_PX = 0.01
"""A side on the wrong side of its point makes a box of negative width or height, for which GIoU has no bounds."""


@register_family("RTMDetHead", "RTMDetSepBNHead")
class RTMDetFamily(RetinaFamily):
    """
    As RetinaNet. CrossKD has published nothing for RTMDet: losses and weights are ours, by analogy.

    The small RTMDets predict distances without an activation, so they can be negative; both sides of the comparison
    count them as at least MIN_DISTANCE_PX: a point is nearly always inside the box that it is for.

    Where the head has an objectness branch, its classes come as the logit of the mean of both, and are compared so.
    """

    predictor = "rtm_cls"
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 1.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        images = len(cross[0][0])
        factor = positives_of_batch([call.labels.view(images, -1) for call in calls], head.num_classes)
        calls = [dataclasses.replace(call, avg_factor=factor) for call in calls]
        cross, teacher = (
            (classes, [level.clamp(min=MIN_DISTANCE_PX) for level in distances])
            for classes, distances in (cross, teacher)
        )
        return super().loss_by_outputs(cross, teacher, calls, head)

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        logits, sides = rows  # sides in pixels
        return boxes_from_sides(priors, sides), logits.sigmoid()
