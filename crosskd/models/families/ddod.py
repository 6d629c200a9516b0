"""DDOD (arXiv 2107.02963): ATSS with an assignment of its own for each task, and the IoU of each box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from crosskd.models.families.atss import ATSSFamily
from crosskd.models.heads import DenseHead, LossCall, register_family


@register_family("DDODHead")
class DDODFamily(ATSSFamily):
    """
    As ATSS, with the predicted IoU in the place of the centerness.

    All terms use the assignment of the classification, whose anchors are those that are scored, by class times IoU.
    Nothing is published for this head: losses and weights are ours.
    """

    predictor = "atss_cls"
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_iou_kd": 1.0, "loss_feat_kd": 1.0}

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        losses = super().loss_by_outputs(cross, teacher, calls, head)
        losses["loss_iou_kd"] = losses.pop("loss_centerness_kd")
        return losses
