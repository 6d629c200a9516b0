"""PAA (arXiv 2007.08103): ATSS's head, whose anchors are assigned by how well they do, and which predicts IoUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mmdet.models.dense_heads.paa_head import skm  # None where scikit-learn is not installed
from torch import Tensor

from crosskd.models.families.atss import ATSSFamily
from crosskd.models.heads import DenseHead, LossCall, register_family
from deploy.errors import MissingDependencyError


@register_family("PAAHead")
class PAAFamily(ATSSFamily):
    """
    As ATSS, with the predicted IoU in place of its centerness. CrossKD has published nothing for PAA: losses and
    weights are ours, by analogy.
    """

    threshold_in_graph = False
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_iou_kd": 1.0, "loss_feat_kd": 1.0}

    @contextlib.contextmanager
    def recorded_assignment(self, head: DenseHead) -> Iterator[list[LossCall]]:
        """
        Yields a list that the head's loss fills with one call: all levels at once, image by image.

        Raises:
            MissingDependencyError: scikit-learn, whose Gaussian mixtures mmdet uses, is not installed.
        """
        if skm is None:
            raise MissingDependencyError("scikit-learn", "the target assignment of PAAHead", "pip install scikit-learn")
        with super().recorded_assignment(head) as calls:
            yield calls
            del calls[:-1]  # those before the last one price the candidates of each image

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        (call,) = calls
        losses = super().loss_by_outputs(cross, teacher, call_by_level(call, cross[2]), head)
        losses["loss_iou_kd"] = losses.pop("loss_centerness_kd")
        return losses

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The score is the root of class times IoU, by which mmdet's head also chooses, unlike ATSS's."""
        boxes, scores, overlap = super().decode(head, level, priors, *rows)
        return boxes, (scores * overlap[..., None]).sqrt()

    def note_of_export(self, head: DenseHead) -> str:
        if not head.with_score_voting:
            return ""
        return (
            "mmdet's PAAHead averages each box after NMS with those around it (score_voting); the exported model "
            "leaves that out: the same detections and scores, but boxes before the averaging. Compare its AP, not its "
            "boxes, with mmdet's"
        )


def call_by_level(call: LossCall, maps: Sequence[Tensor]) -> list[LossCall]:
    """
    A call per level, in the order of `rows_of_maps`, of one whose rows are ordered by image, level and place.

    Args:
        maps: per level (N, A, H, W), a number for each row.
    """
    images, sizes = len(maps[0]), [level[0].numel() for level in maps]
    labels, weights = (
        rows.view(images, -1).split(sizes, dim=1) for rows in (call.labels, call.label_weights)
    )  # per level (N, H * W * A)
    return [
        LossCall(level_labels.reshape(-1), level_weights.reshape(-1), call.avg_factor)
        for level_labels, level_weights in zip(labels, weights, strict=True)
    ]
