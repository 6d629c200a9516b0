"""CrossKDDetector: owns a student and a frozen teacher, two ordinary mmdet detectors, and returns a dict of losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosskd.checkpoint import load_detector_weights
from crosskd.heads import HeadFamily, check_heads_match, family_of, recorded_features, rest_of_head
from crosskd.losses import aligned_to_teacher, feature_distance
from crosskd.ops import register_mmcv_ops
from deploy.errors import ConfigError, PipelineError

register_mmcv_ops()  # before mmdet is imported, which asks for them then
from mmdet.models.detectors.base import BaseDetector  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402

METHODS = ("crosskd", "crosskd+pkd")


@MODELS.register_module()
class CrossKDDetector(BaseDetector):
    """
    A student that is trained on annotations and, through the teacher's head, on the teacher's predictions.

    Args:
        student: an mmdet detector's config.
        teacher: `model` is an mmdet detector's config; `config` and `checkpoint` say where it came from.
        distill: `method` ('crosskd' or 'crosskd+pkd') and `split`, the tower layer k at which the student's features
            leave for the teacher's head, 0 to the number of tower layers; `weights`: loss key -> number, in place of
            those published for the family of the heads.

    Raises:
        ConfigError: an unknown method or key, or heads that do not fit together.
    """

    def __init__(
        self, student: dict[str, Any], teacher: dict[str, Any], distill: dict[str, Any], **kwargs: Any
    ) -> None:
        student = ConfigDict(student)
        super().__init__(data_preprocessor=student.data_preprocessor, **kwargs)
        self.student = MODELS.build(student)  # before the teacher: the same seed gives the baseline's initial weights
        self.teacher = MODELS.build(teacher["model"])
        self.family = family_of(self.teacher.bbox_head)
        check_distill(distill, self.family)
        self.split = distill["split"]
        check_heads_match(self.student.bbox_head, self.teacher.bbox_head, self.split)
        self.loss_weights = {**self.family.default_weights, **distill.get("weights", {})}
        self.with_pkd = distill["method"] == "crosskd+pkd"
        self.teacher.requires_grad_(False).eval()
        # A run's checkpoints hold what is trained. The teacher comes from its own file, also when a run is resumed.
        self._register_state_dict_hook(_drop_teacher)
        self.register_load_state_dict_post_hook(_forgive_missing_teacher)

    def train(self, mode: bool = True) -> CrossKDDetector:
        super().train(mode)
        self.teacher.eval()
        return self

    def init_weights(self) -> None:
        """Initialises the student only: the teacher's weights are its own."""
        self.student.init_weights()

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Any]:
        """
        The student's own losses and `loss_cls_kd`, `loss_reg_kd` (with PKD `loss_feat_kd`): key -> list of scalars,
        one per level.

        Args:
            batch_inputs: (N, 3, H, W), float32, normalised for the student.
            batch_data_samples: N mmdet `DetDataSample`s with `gt_instances`.
        """
        student_head, teacher_head = self.student.bbox_head, self.teacher.bbox_head
        with torch.no_grad(), recorded_features(teacher_head, self.split) as (teacher_features, teacher_taps):
            teacher_outputs = teacher_head(self.teacher.extract_feat(self.teacher_inputs_from_student(batch_inputs)))
        with (
            recorded_features(student_head, self.split) as (student_features, student_taps),
            self.family.recorded_assignment(student_head) as calls,
        ):
            losses = self.student.loss(batch_inputs, batch_data_samples)
        aligned = [
            tuple(aligned_to_teacher(*taps) for taps in zip(student, teacher, strict=True))
            for student, teacher in zip(student_taps, teacher_taps, strict=True)
        ]
        cross_outputs = rest_of_head(teacher_head, self.split)(aligned)
        distilled = self.family.loss_by_outputs(cross_outputs, teacher_outputs, calls, teacher_head)
        if self.with_pkd:
            distilled["loss_feat_kd"] = [
                feature_distance(*features) for features in zip(student_features, teacher_features, strict=True)
            ]
        for key, values in distilled.items():
            losses[key] = [self.loss_weights[key] * value for value in values]
        return losses

    def teacher_inputs_from_student(self, inputs: Tensor) -> Tensor:
        """
        The same pixels, normalised as the teacher wants them.

        A teacher of another mean, std or channel order that is fed with the student's input is silently a bad teacher.

        Args:
            inputs: (N, 3, H, W), normalised for the student. Padding that is zero for the student becomes the
                student's mean colour for the teacher.
        """
        mine, theirs = self.student.data_preprocessor, self.teacher.data_preprocessor
        turned = getattr(mine, "_channel_conversion", False) != getattr(theirs, "_channel_conversion", False)
        if not turned and torch.equal(mine.mean, theirs.mean) and torch.equal(mine.std, theirs.std):
            return inputs
        pixels = inputs * mine.std + mine.mean
        return ((pixels.flip(1) if turned else pixels) - theirs.mean) / theirs.std

    def predict(self, batch_inputs: Tensor, batch_data_samples: list[Any], rescale: bool = True) -> list[Any]:
        return self.student.predict(batch_inputs, batch_data_samples, rescale=rescale)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> Any:
        return self.student._forward(batch_inputs, batch_data_samples)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        return self.student.extract_feat(batch_inputs)


def check_distill(distill: dict[str, Any], family: HeadFamily) -> None:
    """Raises ConfigError if `model.distill` has missing, unknown or wrong entries."""
    known = {"method", "split", "weights"}
    if not {"method", "split"} <= set(distill) <= known:
        raise ConfigError(
            f"model.distill has the keys {sorted(distill)}; expected method, split and, as wanted, weights"
        )
    if distill["method"] not in METHODS:
        raise ConfigError(f"model.distill.method is {distill['method']!r}; expected one of {METHODS}")
    weights, losses = distill.get("weights", {}), sorted(family.default_weights)
    good = isinstance(weights, dict) and all(isinstance(value, (int, float)) for value in weights.values())
    if not good or not set(weights) <= set(losses):
        raise ConfigError(f"model.distill.weights is {weights!r}; expected numbers for some of {losses}")


def _drop_teacher(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}teacher.")]:
        del state[key]


def _forgive_missing_teacher(_module: nn.Module, incompatible: Any) -> None:
    kept = [key for key in incompatible.missing_keys if not key.startswith("teacher.")]
    incompatible.missing_keys[:] = kept


def detector_from_config(config: Any, load_weights: bool = True) -> nn.Module:
    """
    The detector of a config that `load_config` returned: a CrossKDDetector or a plain mmdet detector.

    Args:
        load_weights: load the teacher's checkpoint into a CrossKDDetector. Without it no file is read.

    Raises:
        ConfigError: the model cannot be built, the heads do not fit, or there is no teacher checkpoint.
        CheckpointError: the teacher's checkpoint is unreadable, unsafe or of another detector.
    """
    try:
        detector = MODELS.build(config.model)
    except PipelineError:
        raise
    except Exception as error:  # whatever mmdet's modules raise of a wrong argument
        raise ConfigError(f"the config's model cannot be built: {type(error).__name__}: {error}") from error
    if load_weights and isinstance(detector, CrossKDDetector):
        checkpoint = config.model.teacher.get("checkpoint")
        if not checkpoint:
            raise ConfigError(
                "there is no teacher checkpoint; give --teacher-checkpoint, or model.teacher.checkpoint in the config"
            )
        load_detector_weights(detector.teacher, checkpoint)
    return detector
