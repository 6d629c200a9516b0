"""ATSS (arXiv 1912.02424): one anchor a place, and a centerness of each box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from crosskd.models.families.retina import RetinaFamily
from crosskd.models.heads import DenseHead, LossCall, register_family, rows_of_maps


@register_family("ATSSHead")
class ATSSFamily(RetinaFamily):
    """As RetinaNet, and binary cross entropy on the centerness of positive anchors."""

    predictor = "atss_cls"
    threshold_in_graph = True
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_centerness_kd": 1.0, "loss_feat_kd": 1.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        losses = super().loss_by_outputs(cross, teacher, calls, head)
        losses["loss_centerness_kd"] = []
        for cross_map, teacher_map, call in zip(cross[2], teacher[2], calls, strict=True):
            positive = (call.labels >= 0) & (call.labels < head.num_classes)
            logits, target = rows_of_maps(cross_map, 1)[:, 0], rows_of_maps(teacher_map, 1)[:, 0].sigmoid()
            entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
            losses["loss_centerness_kd"].append((entropy * positive).sum() / call.avg_factor)
        return losses

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        *others, centerness = rows
        return *super().decode(head, level, priors, *others), centerness[..., 0].sigmoid()
