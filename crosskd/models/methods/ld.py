"""
Localisation distillation: the student's distributions of box sides are compared with the teacher's.

Source: "Localization Distillation for Dense Object Detection", arXiv 2102.12252.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crosskd.models.heads import DenseHead, HeadFamily, HeadPass, LossCall
from crosskd.models.methods.method import DistillationMethod
from deploy.errors import ConfigError


class LocalisationDistillation(DistillationMethod):
    """The divergence of the distributions at positive places, as `loss_ld`; for families that write `loss_ld`."""

    def __init__(self, settings: dict[str, Any], student_head: DenseHead, teacher_head: DenseHead) -> None:
        super().__init__(settings, student_head, teacher_head)
        if type(self.family).loss_ld is HeadFamily.loss_ld:
            raise ConfigError(
                f"model.distill.method is 'ld', but {type(student_head).__name__} predicts numbers for the sides of a "
                "box, not distributions; expected a GFLHead. Choose another method."
            )

    def losses(
        self, student_pass: HeadPass, teacher_pass: HeadPass, assignment: list[LossCall]
    ) -> dict[str, list[Tensor]]:
        student_outputs = self.family.outputs_as_in_eval(student_pass.outputs, self.student_head)
        return {"loss_ld": self.family.loss_ld(student_outputs, teacher_pass.outputs, assignment, self.teacher_head)}
