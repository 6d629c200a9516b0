"""
CrossKD: the student's tower features go through the rest of the teacher's head, whose answers are compared.

Source: "CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection", arXiv 2306.11369, section 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crosskd.models.heads import DenseHead, HeadPass, LossCall, number_of_taps
from crosskd.models.losses import aligned_to_teacher
from crosskd.models.methods.method import DistillationMethod, TapPlaces, width_adapter
from deploy.errors import ConfigError


class CrossKD(DistillationMethod):
    """
    The losses of the head's family between the cross predictions and the teacher's own.

    Cross predictions are what the teacher's head makes of the student's features from tower layer `split` on, aligned
    to the mean and deviation that the teacher's have there.
    """

    def __init__(self, settings: dict[str, Any], student_head: DenseHead, teacher_head: DenseHead) -> None:
        super().__init__(settings, student_head, teacher_head)
        split = settings["split"]
        check_split(split, student_head, teacher_head)
        teacher_split = split_of_teacher(split, student_head, teacher_head)
        self.teacher_split: int = teacher_split
        self.taps = TapPlaces(split, teacher_split, settings.get("tap") == "before_activation")
        widths = (
            student_head.feat_channels if split else student_head.in_channels,
            teacher_head.feat_channels if teacher_split else teacher_head.in_channels,
        )
        self.tap_adapters = nn.ModuleList(width_adapter(*widths) for _ in range(number_of_taps(student_head, split)))
        self.adapters["tap_adapters"] = self.tap_adapters

    @classmethod
    def check_settings(cls, settings: dict[str, Any]) -> None:
        """Raises ConfigError if `model.distill.split` is missing."""
        if "split" not in settings:
            raise ConfigError("model.distill.split is missing; expected the number of a tower layer, such as 3")

    def losses(
        self, student_pass: HeadPass, teacher_pass: HeadPass, assignment: list[LossCall]
    ) -> dict[str, list[Tensor]]:
        aligned = [
            tuple(
                aligned_to_teacher(adapter(student_tap), teacher_tap)
                for adapter, student_tap, teacher_tap in zip(self.tap_adapters, *level, strict=True)
            )
            for level in zip(student_pass.taps, teacher_pass.taps, strict=True)
        ]
        cross_outputs = self.family.rest_of_head(self.teacher_head, self.teacher_split)(aligned)
        return self.family.loss_by_outputs(cross_outputs, teacher_pass.outputs, assignment, self.teacher_head)


def check_split(split: Any, student_head: DenseHead, teacher_head: DenseHead) -> None:
    """Raises ConfigError unless both heads can be split where `model.distill.split` says."""
    layers, teacher_layers = student_head.stacked_convs, teacher_head.stacked_convs
    if split not in range(layers + 1):
        raise ConfigError(f"model.distill.split is {split!r}; expected 0 to {layers}, the number of tower layers")
    teacher_split = split_of_teacher(split, student_head, teacher_head)
    if teacher_split < 0:
        raise ConfigError(
            f"model.distill.split is {split}, after which the student's towers have {layers - split} layers left, "
            f"and the teacher's have {teacher_layers} in all; expected a split of at least {layers - teacher_layers}"
        )
    if number_of_taps(student_head, split) != number_of_taps(teacher_head, teacher_split):
        raise ConfigError(
            f"bbox_head.stacked_convs is {layers} in the student and {teacher_layers} in the teacher; "
            f"expected the same value, since a {type(teacher_head).__name__} reads the output of every tower layer. "
            "Change one of the two configs."
        )


def split_of_teacher(split: int, student_head: DenseHead, teacher_head: DenseHead) -> int:
    """The teacher's tower layer with as many layers behind it as the student's `split`: counted from the end."""
    return split + teacher_head.stacked_convs - student_head.stacked_convs
