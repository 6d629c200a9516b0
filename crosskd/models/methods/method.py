"""What every method of distillation is: a check of the two heads, layers that are trained along, and losses."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from crosskd.models.heads import DenseHead, HeadFamily, HeadPass, LossCall, family_of
from deploy.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TapPlaces:
    """Where a method takes features out of the towers of the two heads."""

    student_split: int | None = None
    """The student's tower layer, 0 for the pyramid feature; None: nothing is taken out of the towers."""
    teacher_split: int | None = None
    """The teacher's tower layer with as many layers behind it."""
    before_activation: bool = False
    """What the layer's activation takes, in place of what it gives."""


class DistillationMethod:
    """
    One way in which a student learns from a teacher, besides its annotations.

    Args:
        settings: `model.distill` of the config.
        student_head: mmdet's dense head that is trained.
        teacher_head: mmdet's dense head that teaches it.

    Raises:
        ConfigError: the two heads, or the settings, do not fit the method.
    """

    compares_predictions: ClassVar[bool] = True
    """Whether it needs the teacher's head to run, and heads of one family. If not, it compares pyramid features."""

    taps = TapPlaces()

    def __init__(self, settings: dict[str, Any], student_head: DenseHead, teacher_head: DenseHead) -> None:
        self.student_head, self.teacher_head = student_head, teacher_head
        self.family = family_of(student_head) if self.compares_predictions else HeadFamily()
        if self.compares_predictions and family_of(teacher_head) is not self.family:
            raise ConfigError(
                f"the student's head is {type(student_head).__name__}, the teacher's {type(teacher_head).__name__}; "
                "expected two heads of one family"
            )
        teacher_facts = self.facts_to_match(teacher_head)
        for key, value in self.facts_to_match(student_head).items():
            if value != teacher_facts[key]:
                raise ConfigError(
                    f"bbox_head.{key} is {value} in the student and {teacher_facts[key]} in the teacher; expected the "
                    "same value, since their features are compared place by place. Change one of the two configs."
                )
        self.adapters: dict[str, nn.Module] = {}
        """Name in a run's checkpoints -> layers that are trained with the student and dropped after the training."""

    @classmethod
    def check_settings(cls, settings: dict[str, Any]) -> None:
        """Raises ConfigError if `model.distill` lacks an entry that this method needs."""

    def facts_to_match(self, head: DenseHead) -> dict[str, Any]:
        """Attribute of a head -> value, for all that must be the same in student and teacher."""
        facts: dict[str, Any] = {"strides": [tuple(stride) for stride in head.prior_generator.strides]}
        if self.compares_predictions:
            facts["num_classes"] = head.num_classes
            facts["num_base_priors"] = head.num_base_priors
            facts["reg_max"] = getattr(head, "reg_max", None)
        return facts

    def losses(
        self, student_pass: HeadPass, teacher_pass: HeadPass, assignment: list[LossCall]
    ) -> dict[str, list[Tensor]]:
        """
        Loss key -> a scalar per level, before their weights.

        Args:
            student_pass: features, taps and outputs of the student's head, with gradients.
            teacher_pass: those of the teacher's head for the same images; without taps and outputs if no method
                compares predictions.
            assignment: the targets that the student's own loss assigned, per level; empty as `teacher_pass` is.
        """
        raise NotImplementedError


def width_adapter(student_width: int, teacher_width: int) -> nn.Module:
    """A 1x1 convolution from the student's number of channels to the teacher's; nothing where they are the same."""
    if student_width == teacher_width:
        return nn.Identity()
    return nn.Conv2d(student_width, teacher_width, 1, bias=False)
