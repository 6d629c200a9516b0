"""FCOS (arXiv 1904.01355): points instead of anchors, boxes as distances to the four sides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor

from crosskd.models.heads import (
    DenseHead,
    HeadFamily,
    LossCall,
    boxes_from_sides,
    priors_of_maps,
    register_family,
    rows_of_maps,
)
from crosskd.models.losses import kd_quality_focal_loss


@register_family("FCOSHead")
class FCOSFamily(HeadFamily):
    """
    Quality focal loss on classes, -log IoU on boxes that are decoded from the points; all levels at once.

    Both are divided by the sum of the centerness targets of the positive points, mean over ranks. Where no rank has a
    positive point there is nothing to divide by, and both losses are zero.
    """

    predictor = "conv_cls"
    threshold_in_graph = True
    default_weights: ClassVar = {"loss_cls_kd": 0.4, "loss_reg_kd": 0.75, "loss_feat_kd": 2.0}

    @contextlib.contextmanager
    def recorded_assignment(self, head: DenseHead) -> Iterator[list[LossCall]]:
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

    def outputs_as_in_eval(self, outputs: Any, head: DenseHead) -> Any:
        if not (head.norm_on_bbox and head.training):
            return outputs
        classes, boxes, *others = outputs
        return classes, [maps * stride for maps, stride in zip(boxes, head.strides, strict=True)], *others

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        (call,) = calls
        points = torch.cat(priors_of_maps(head, cross[0]))
        cross_cls, teacher_cls = (
            torch.cat([rows_of_maps(m, head.cls_out_channels) for m in maps[0]]) for maps in (cross, teacher)
        )
        cross_reg, teacher_reg = (torch.cat([rows_of_maps(m, 4) for m in maps[1]]) for maps in (cross, teacher))
        boxes, target = (head.bbox_coder.decode(points, distances) for distances in (cross_reg, teacher_reg))
        overlap = bbox_overlaps(boxes, target, is_aligned=True).clamp(min=1e-6)
        distance = -overlap.log() * teacher_cls.amax(1).sigmoid()
        factor = torch.as_tensor(call.avg_factor)
        scale = torch.where(factor > 0, 1 / factor.clamp(min=1e-6), 0)
        return {
            "loss_cls_kd": [kd_quality_focal_loss(cross_cls, teacher_cls).sum() * scale],
            "loss_reg_kd": [distance.sum() * scale],
        }

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        logits, sides, centerness = rows  # sides in pixels
        return boxes_from_sides(priors, sides), logits.sigmoid(), centerness[..., 0].sigmoid()
