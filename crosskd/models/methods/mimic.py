"""Prediction mimicking: the losses of CrossKD on the student's own predictions; what CrossKD is compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crosskd.models.heads import DenseHead, HeadPass, LossCall
from crosskd.models.methods.method import DistillationMethod


class Mimic(DistillationMethod):
    """The losses of the head's family between the student's predictions and the teacher's."""

    def facts_to_match(self, head: DenseHead) -> dict[str, Any]:
        """As of every method, and the anchors, from which the boxes of both are decoded."""
        sizes = [(1, 1)] * head.prior_generator.num_levels
        priors = head.prior_generator.grid_priors(sizes, device="cpu")
        return {**super().facts_to_match(head), "priors": [level.tolist() for level in priors]}

    def losses(
        self, student_pass: HeadPass, teacher_pass: HeadPass, assignment: list[LossCall]
    ) -> dict[str, list[Tensor]]:
        student_outputs = self.family.outputs_as_in_eval(student_pass.outputs, self.student_head)
        return self.family.loss_by_outputs(student_outputs, teacher_pass.outputs, assignment, self.teacher_head)
