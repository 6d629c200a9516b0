"""
PKD: pyramid features are compared by their correlation, so heads of any two kinds will do.

Source: "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", arXiv
2207.02039.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from crosskd.models.heads import DenseHead, HeadPass, LossCall
from crosskd.models.losses import feature_distance
from crosskd.models.methods.method import DistillationMethod, width_adapter


class PKD(DistillationMethod):
    """The distance of standardised pyramid features, level by level, as `loss_feat_kd`."""

    compares_predictions: ClassVar[bool] = False

    def __init__(self, settings: dict[str, Any], student_head: DenseHead, teacher_head: DenseHead) -> None:
        super().__init__(settings, student_head, teacher_head)
        self.feature_adapter = width_adapter(student_head.in_channels, teacher_head.in_channels)
        self.adapters["feature_adapter"] = self.feature_adapter

    def losses(
        self, student_pass: HeadPass, teacher_pass: HeadPass, assignment: list[LossCall]
    ) -> dict[str, list[Tensor]]:
        levels = zip(student_pass.features, teacher_pass.features, strict=True)
        return {
            "loss_feat_kd": [feature_distance(self.feature_adapter(student), teacher) for student, teacher in levels]
        }
