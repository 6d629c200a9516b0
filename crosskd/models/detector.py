"""CrossKDDetector: owns a student and a frozen teacher, two ordinary mmdet detectors, and returns a dict of losses."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import crosskd.models.families  # noqa: F401  registers them
from crosskd.models.backbones import TimmBackbone
from crosskd.models.checkpoint import load_detector_weights
from crosskd.models.families.tood import keep_boxes_in_float32
from crosskd.models.heads import HeadFamily, HeadPass, LossCall, family_of
from crosskd.models.methods import TapPlaces, loss_weights, methods_of_settings
from crosskd.models.ops import register_mmcv_ops
from deploy.errors import ConfigError, PipelineError

register_mmcv_ops()  # before mmdet is imported, which asks for them then
from mmcv.cnn.utils import fuse_conv_bn  # noqa: E402
from mmdet.models.dense_heads.tood_head import TaskDecomposition  # noqa: E402
from mmdet.models.detectors.base import BaseDetector  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402


class Rounding(Protocol):
    """The rounding of INT8 in a detector's forward passes: `crosskd.int8.fake_quantization.FakeQuantization`."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Makes the detector's forward pass inside the block round as INT8 does."""

    def as_read(self, tensor: Tensor) -> Tensor:
        """The rounded values that the last forward pass read of a tensor."""

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """The ranges that it started with, and zero points, by which two runs are compared."""


@MODELS.register_module()
class CrossKDDetector(BaseDetector):
    """
    A student that is trained on annotations and on what a teacher knows.

    Args:
        student: an mmdet detector's config.
        teacher: `model` is an mmdet detector's config; `config` and `checkpoint` say where it came from.
        distill:
            `method`: 'crosskd', through the teacher's head; 'pkd', on pyramid features (any heads); 'crosskd+pkd';
            'mimic', the losses of CrossKD on the student's own predictions; 'ld', on the distributions of box sides;
            'none', plain training, without a teacher.
            `split`: for CrossKD, the student's tower layer k at which its features leave for the teacher's head, 0 to
            the number of tower layers; as many layers are left in the teacher's head.
            `tap`: 'after_activation' of that layer, as in the published results, or 'before_activation', as in the
            paper's text.
            `weights`: loss key -> number, in place of those published for the family of the heads.
            `allow_missing_classes`: distil also from a teacher that lacks some of the student's classes.

    Raises:
        ConfigError: an unknown method or key, or heads that do not fit together.
    """

    def __init__(
        self, student: dict[str, Any], teacher: dict[str, Any], distill: dict[str, Any], **kwargs: Any
    ) -> None:
        student_config = ConfigDict(student)
        super().__init__(data_preprocessor=student_config.data_preprocessor, **kwargs)
        self.has_weights = False
        self.quantization: Rounding | None = None
        """The rounding of INT8 that the student learns to live with, if any; of the weights that it starts from."""
        self._register_load_state_dict_pre_hook(_check_same_quantization, with_module=True)
        # Before the teacher: the same seed gives the baseline's initial weights.
        self.student: Any = MODELS.build(student_config)
        methods = methods_of_settings(distill)
        self.teacher: Any = MODELS.build(teacher["model"]) if methods else None
        if self.teacher is None:
            return
        self.teacher.requires_grad_(False).eval()
        for role, detector in (("student", self.student), ("teacher", self.teacher)):
            if not hasattr(detector, "bbox_head"):
                raise ConfigError(
                    f"the {role} is a {type(detector).__name__}, which has no bbox_head on its pyramid; expected a "
                    "detector of one stage, such as GFL, ATSS, FCOS, RetinaNet, TOOD, PAA, VFNet or RTMDet"
                )
        student_head, teacher_head = self.student.bbox_head, self.teacher.bbox_head
        self.methods = [method(distill, student_head, teacher_head) for method in methods]
        self.loss_weights = loss_weights(distill, student_head)
        for method in self.methods:  # beside the student, by the names that earlier runs' checkpoints have
            for name, adapters in method.adapters.items():
                self.add_module(name, adapters)
        self.compares_predictions = any(method.compares_predictions for method in self.methods)
        self.family = family_of(student_head) if self.compares_predictions else HeadFamily()
        self.taps = next((method.taps for method in self.methods if method.taps != TapPlaces()), TapPlaces())
        # A run's checkpoints hold what is trained. The teacher comes from its own file, also when a run is resumed.
        self._register_state_dict_hook(_drop_teacher)
        self.register_load_state_dict_post_hook(_forgive_missing_teacher)

    def train(self, mode: bool = True) -> CrossKDDetector:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def init_weights(self) -> None:
        """Initialises the student only, unless it starts from weights: the teacher's weights come from its file."""
        if not self.has_weights:
            self.student.init_weights()

    def prepare_teacher(self, dtype: torch.dtype | None = None) -> None:
        """
        Makes the frozen teacher quick, once its weights are there: BatchNorms become part of their convolutions.

        Args:
            dtype: that of the autocast in which it will run, so that its convolutions are not cast at each call.
        """
        if self.teacher is None:
            return
        _fuse_norms(self.teacher)
        self.teacher.requires_grad_(False)  # the new convolutions are new parameters
        if dtype is not None:
            keep_boxes_in_float32(self.teacher.bbox_head)
            for module in self.teacher.modules():
                if type(module) is nn.Conv2d:
                    module.to(dtype)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Any]:
        """
        The student's own losses and, by method, `loss_cls_kd`, `loss_reg_kd`, `loss_feat_kd`, `loss_ld`: key -> list of
        scalars, one per level.

        Args:
            batch_inputs: (N, 3, H, W), float32, normalised for the student.
            batch_data_samples: N mmdet `DetDataSample`s with `gt_instances`.
        """
        if self.teacher is None:
            with self._as_quantized():
                return self.student.loss(batch_inputs, batch_data_samples)
        teacher_pass = self._pass_of_teacher(batch_inputs)
        head, taps = self.student.bbox_head, self.taps
        recording = self.family.recorded_pass(head, taps.student_split, taps.before_activation)
        with recording as student_pass, self._as_quantized(), self._recorded_assignment() as assignment:
            losses = self.student.loss(batch_inputs, batch_data_samples)
        if self.quantization is not None:
            student_pass.taps = [tuple(map(self.quantization.as_read, level)) for level in student_pass.taps]
        distilled: dict[str, list[Tensor]] = {}
        for method in self.methods:
            distilled |= method.losses(student_pass, teacher_pass, assignment)
        for key, values in distilled.items():
            losses[key] = [self.loss_weights[key] * value for value in values]
        return losses

    def _as_quantized(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.quantization is None else self.quantization.applied()

    def _recorded_assignment(self) -> contextlib.AbstractContextManager[list[LossCall]]:
        if not self.compares_predictions:
            return contextlib.nullcontext([])
        return self.family.recorded_assignment(self.student.bbox_head)

    @torch.no_grad()
    def _pass_of_teacher(self, batch_inputs: Tensor) -> HeadPass:
        """What the teacher makes of the images: its pyramid, and its predictions only if they are compared."""
        features = self.teacher.extract_feat(self.teacher_inputs_from_student(batch_inputs))
        if not self.compares_predictions:
            return HeadPass(list(features))
        head, taps = self.teacher.bbox_head, self.taps
        with self.family.recorded_pass(head, taps.teacher_split, taps.before_activation) as teacher_pass:
            head(features)
        return teacher_pass

    @functools.cached_property
    def _same_normalisation(self) -> bool:
        """Whether both want the same values of a pixel. Compared once: each comparison on a GPU would wait for it."""
        student, teacher = self.student.data_preprocessor, self.teacher.data_preprocessor
        same = torch.equal(student.mean, teacher.mean) and torch.equal(student.std, teacher.std)
        return same and not _turned(student, teacher)

    def teacher_inputs_from_student(self, inputs: Tensor) -> Tensor:
        """
        The same pixels, normalised as the teacher wants them.

        A teacher of another mean, std or channel order that is fed with the student's input is silently a bad teacher.

        Args:
            inputs: (N, 3, H, W), normalised for the student. Padding that is zero for the student becomes the
                student's mean colour for the teacher.
        """
        if self._same_normalisation:
            return inputs
        student, teacher = self.student.data_preprocessor, self.teacher.data_preprocessor
        pixels = inputs * student.std + student.mean
        return ((pixels.flip(1) if _turned(student, teacher) else pixels) - teacher.mean) / teacher.std

    def predict(self, batch_inputs: Tensor, batch_data_samples: list[Any], rescale: bool = True) -> list[Any]:
        with self._as_quantized():
            return self.student.predict(batch_inputs, batch_data_samples, rescale=rescale)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> Any:
        return self.student._forward(batch_inputs, batch_data_samples)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        return self.student.extract_feat(batch_inputs)


def _turned(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether one of two pre-processors wants RGB and the other BGR."""
    return getattr(student, "_channel_conversion", False) != getattr(teacher, "_channel_conversion", False)


def _fuse_norms(detector: nn.Module) -> None:
    """
    Folds each BatchNorm into the convolution before it, but for those that mmcv would get wrong: timm's hold their
    activation, which would be dropped; TOOD's task decompositions take a convolution's weight without its new bias.
    """
    places = [(parent, name, child) for parent in detector.modules() for name, child in parent.named_children()]
    kept = [place for place in places if isinstance(place[2], (TimmBackbone, TaskDecomposition))]
    shared = set()
    for parent, name, child in places:
        if isinstance(child, nn.Conv2d):  # RTMDet's levels share convolutions, each with a norm of its own
            parent._modules[name] = copy.deepcopy(child) if child in shared else child
            shared.add(child)
    for parent, name, _ in kept:
        parent._modules[name] = nn.Identity()
    fuse_conv_bn(detector)
    for parent, name, child in kept:
        parent._modules[name] = child


def _drop_teacher(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}teacher.")]:
        del state[key]


def _check_same_quantization(detector: CrossKDDetector, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """mmengine would only log that a run is resumed with other ranges than it was started with, or without any."""
    prefix = f"{prefix}quantization."
    current = {} if detector.quantization is None else dict(detector.quantization.named_buffers(prefix[:-1]))
    saved = {key: state[key] for key in state if key.startswith(prefix) and not key.endswith(".offsets")}
    same = current.keys() == saved.keys() and all(torch.equal(current[key].cpu(), saved[key].cpu()) for key in saved)
    if not same:
        raise ConfigError(
            "the run to resume was started with other ranges of INT8, or one of the two is without INT8; resume with "
            "the same --quantize, --from and --calibrated"
        )


def _forgive_missing_teacher(_module: nn.Module, incompatible: Any) -> None:
    kept = [key for key in incompatible.missing_keys if not key.startswith("teacher.")]
    incompatible.missing_keys[:] = kept


def detector_from_config(config: Any, load_weights: bool = True, class_names: Sequence[str] | None = None) -> Any:
    """
    The detector of a config that `load_config` returned: a CrossKDDetector or a plain mmdet detector.

    Args:
        load_weights: load the teacher's checkpoint into a CrossKDDetector. Without it no file is read.
        class_names: the student's; a teacher whose checkpoint names its classes is matched with them by name.

    Raises:
        ConfigError: the model cannot be built, the heads do not fit, or there is no teacher checkpoint.
        CheckpointError: the teacher's checkpoint is unreadable, unsafe, of another detector, or lacks classes.
    """
    try:
        detector = MODELS.build(config.model)
    except PipelineError:
        raise
    except Exception as error:  # whatever mmdet's modules raise of a wrong argument
        raise ConfigError(f"the config's model cannot be built: {type(error).__name__}: {error}") from error
    if load_weights and getattr(detector, "teacher", None) is not None:
        checkpoint = config.model.teacher.get("checkpoint")
        if not checkpoint:
            raise ConfigError(
                "there is no teacher checkpoint; give --teacher-checkpoint, or model.teacher.checkpoint in the config"
            )
        allow_missing = config.model.distill.get("allow_missing_classes", False)
        load_detector_weights(detector.teacher, checkpoint, class_names, allow_missing)
    return detector
