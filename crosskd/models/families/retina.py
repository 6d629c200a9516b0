"""RetinaNet (arXiv 1708.02002): several anchors a place, boxes as deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from crosskd.models.heads import (
    DenseHead,
    HeadFamily,
    LossCall,
    boxes_from_deltas,
    confidence_of_teacher,
    loss_of_classes,
    priors_of_maps,
    register_family,
    rows_of_maps,
)


@register_family("RetinaHead")
class RetinaFamily(HeadFamily):
    """Quality focal loss on classes, GIoU loss on boxes that are decoded from the anchors."""

    predictor = "retina_cls"
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 2.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        losses_cls, losses_reg = [], []
        levels = zip(priors_of_maps(head, cross[0]), cross[0], cross[1], teacher[0], teacher[1], calls, strict=True)
        for anchors, cross_cls, cross_reg, teacher_cls, teacher_reg, call in levels:
            losses_cls.append(loss_of_classes(head, cross_cls, teacher_cls, call))
            boxes, target = (
                head.bbox_coder.decode(anchors, rows_of_maps(maps, 4)) for maps in (cross_reg, teacher_reg)
            )
            distance = 1 - bbox_overlaps(boxes, target, mode="giou", is_aligned=True, eps=1e-7)  # (rows,)
            losses_reg.append((distance * confidence_of_teacher(head, teacher_cls, call)).sum() / call.avg_factor)
        return {"loss_cls_kd": losses_cls, "loss_reg_kd": losses_reg}

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        logits, deltas = rows
        return boxes_from_deltas(head.bbox_coder, priors, deltas), logits.sigmoid()
