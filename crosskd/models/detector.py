"""CrossKDDetector: owns a student and a frozen teacher, two ordinary mmdet detectors, and returns a dict of losses."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import crosskd.models.families  # noqa: F401  registers them
from crosskd.loop.amp import keep_boxes_in_float32
from crosskd.models.backbones import TimmBackbone
from crosskd.models.checkpoint import load_detector_weights
from crosskd.models.heads import (
    FAMILIES,
    HeadFamily,
    HeadPass,
    check_heads_match,
    family_of,
    number_of_taps,
    split_of_teacher,
)
from crosskd.models.losses import aligned_to_teacher, feature_distance
from crosskd.models.ops import register_mmcv_ops
from deploy.errors import ConfigError, PipelineError
from deploy.files import AnyPath

if TYPE_CHECKING:
    from crosskd.int8.fake_quantization import FakeQuantization

register_mmcv_ops()  # before mmdet is imported, which asks for them then
from mmcv.cnn.utils import fuse_conv_bn  # noqa: E402
from mmdet.models.dense_heads.tood_head import TaskDecomposition  # noqa: E402
from mmdet.models.detectors.base import BaseDetector  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402

METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "crosskd": ("crosskd",),
    "pkd": ("pkd",),
    "crosskd+pkd": ("crosskd", "pkd"),
    "mimic": ("mimic",),
    "ld": ("ld",),
}
"""`model.distill.method` -> its parts."""
TAPS = ("after_activation", "before_activation")


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
        student = ConfigDict(student)
        super().__init__(data_preprocessor=student.data_preprocessor, **kwargs)
        self.has_weights = False
        self.quantization: FakeQuantization | None = None
        """The rounding of INT8 that the student learns to live with, if any; of the weights that it starts from."""
        self._register_load_state_dict_pre_hook(_check_same_quantization, with_module=True)
        self.student = MODELS.build(student)  # before the teacher: the same seed gives the baseline's initial weights
        check_distill(distill)
        self.parts = METHODS[distill["method"]]
        self.teacher = MODELS.build(teacher["model"]) if self.parts else None
        if self.teacher is None:
            return
        self.teacher.requires_grad_(False).eval()
        mine, theirs = self.student.bbox_head, self.teacher.bbox_head
        self.family = family_of(mine) if set(self.parts) - {"pkd"} else HeadFamily()
        self.split = distill["split"] if "crosskd" in self.parts else None
        check_heads_match(mine, theirs, self.parts, self.split)
        if "ld" in self.parts and type(self.family).loss_ld is HeadFamily.loss_ld:
            self.family.loss_ld((), (), [], mine)  # raises
        self.before_activation = distill.get("tap") == "before_activation"
        self.loss_weights = loss_weights_of(distill, default_weights_of(mine))
        self._build_adapters()
        # A run's checkpoints hold what is trained. The teacher comes from its own file, also when a run is resumed.
        self._register_state_dict_hook(_drop_teacher)
        self.register_load_state_dict_post_hook(_forgive_missing_teacher)

    def _build_adapters(self) -> None:
        """1x1 convolutions for features that are wider or narrower in the student; trained, and dropped afterwards."""
        mine, theirs = self.student.bbox_head, self.teacher.bbox_head
        self.tap_adapters = nn.ModuleList()
        if "crosskd" in self.parts:
            teacher_split = split_of_teacher(mine, theirs, self.split)
            widths = (
                mine.feat_channels if self.split else mine.in_channels,
                theirs.feat_channels if teacher_split else theirs.in_channels,
            )
            self.tap_adapters.extend(_adapter(*widths) for _ in range(number_of_taps(mine, self.split)))
        self.feature_adapter = _adapter(mine.in_channels, theirs.in_channels) if "pkd" in self.parts else None

    def train(self, mode: bool = True) -> CrossKDDetector:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def init_weights(self) -> None:
        """Initialises the student only, unless it starts from weights: the teacher's weights are its own."""
        if not self.has_weights:
            self.student.init_weights()

    def start_from(self, weights: AnyPath, class_names: Sequence[str]) -> None:
        """
        Gives the student trained weights to start from.

        Raises:
            CheckpointError: as `load_detector_weights`.
        """
        load_detector_weights(self.student, weights, class_names)
        self.has_weights = True

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
        teacher = self._pass_of_teacher(batch_inputs)
        head = self.student.bbox_head
        with self.family.recorded_pass(head, self.split, self.before_activation) as student, self._as_quantized():
            if set(self.parts) - {"pkd"}:
                with self.family.recorded_assignment(head) as calls:
                    losses = self.student.loss(batch_inputs, batch_data_samples)
            else:
                losses, calls = self.student.loss(batch_inputs, batch_data_samples), []
        if self.quantization is not None:
            student.taps = [tuple(map(self.quantization.as_read, taps)) for taps in student.taps]
        for key, values in self._losses_by_method(student, teacher, calls).items():
            losses[key] = [self.loss_weights[key] * value for value in values]
        return losses

    def _as_quantized(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.quantization is None else self.quantization.applied()

    @torch.no_grad()
    def _pass_of_teacher(self, batch_inputs: Tensor) -> HeadPass:
        """Only as far as the method needs it: PKD alone compares pyramid features, and runs no head."""
        features = self.teacher.extract_feat(self.teacher_inputs_from_student(batch_inputs))
        if self.parts == ("pkd",):
            return HeadPass(list(features))
        head = self.teacher.bbox_head
        split = None if self.split is None else split_of_teacher(self.student.bbox_head, head, self.split)
        with self.family.recorded_pass(head, split, self.before_activation) as teacher:
            head(features)
        return teacher

    def _losses_by_method(self, student: HeadPass, teacher: HeadPass, calls: list[Any]) -> dict[str, list[Tensor]]:
        head = self.teacher.bbox_head
        losses: dict[str, list[Tensor]] = {}
        if "crosskd" in self.parts:
            aligned = [
                tuple(
                    aligned_to_teacher(adapter(mine), theirs)
                    for adapter, mine, theirs in zip(self.tap_adapters, *taps, strict=True)
                )
                for taps in zip(student.taps, teacher.taps, strict=True)
            ]
            split = split_of_teacher(self.student.bbox_head, head, self.split)
            cross_outputs = self.family.rest_of_head(head, split)(aligned)
            losses |= self.family.loss_by_outputs(cross_outputs, teacher.outputs, calls, head)
        if {"mimic", "ld"} & set(self.parts):
            own_outputs = self.family.outputs_as_in_eval(student.outputs, self.student.bbox_head)
            if "mimic" in self.parts:
                losses |= self.family.loss_by_outputs(own_outputs, teacher.outputs, calls, head)
            else:
                losses["loss_ld"] = self.family.loss_ld(own_outputs, teacher.outputs, calls, head)
        if "pkd" in self.parts:
            losses["loss_feat_kd"] = [
                feature_distance(self.feature_adapter(mine), theirs)
                for mine, theirs in zip(student.features, teacher.features, strict=True)
            ]
        return losses

    @functools.cached_property
    def _same_normalisation(self) -> bool:
        """Compared once: each comparison on a GPU would wait for it."""
        mine, theirs = self.student.data_preprocessor, self.teacher.data_preprocessor
        same = torch.equal(mine.mean, theirs.mean) and torch.equal(mine.std, theirs.std)
        return same and not _turned(mine, theirs)

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
        mine, theirs = self.student.data_preprocessor, self.teacher.data_preprocessor
        pixels = inputs * mine.std + mine.mean
        return ((pixels.flip(1) if _turned(mine, theirs) else pixels) - theirs.mean) / theirs.std

    def predict(self, batch_inputs: Tensor, batch_data_samples: list[Any], rescale: bool = True) -> list[Any]:
        with self._as_quantized():
            return self.student.predict(batch_inputs, batch_data_samples, rescale=rescale)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> Any:
        return self.student._forward(batch_inputs, batch_data_samples)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        return self.student.extract_feat(batch_inputs)


def check_distill(distill: dict[str, Any]) -> None:
    """Raises ConfigError if `model.distill` has missing, unknown or wrong entries."""
    known = {"method", "split", "tap", "weights", "allow_missing_classes"}
    if "method" not in distill or not set(distill) <= known:
        raise ConfigError(
            f"model.distill has the keys {sorted(distill)}; expected method and, as wanted, some of "
            f"{sorted(known - {'method'})}"
        )
    if distill["method"] not in METHODS:
        raise ConfigError(f"model.distill.method is {distill['method']!r}; expected one of {', '.join(METHODS)}")
    if "crosskd" in METHODS[distill["method"]] and "split" not in distill:
        raise ConfigError("model.distill.split is missing; expected the number of a tower layer, such as 3")
    if distill.get("tap", TAPS[0]) not in TAPS:
        raise ConfigError(f"model.distill.tap is {distill['tap']!r}; expected one of {', '.join(TAPS)}")


def default_weights_of(head: nn.Module) -> dict[str, float]:
    """Loss key -> weight: those of the head's family; PKD, which works with any head, has 1 where there is none."""
    return getattr(FAMILIES.get(type(head).__name__), "default_weights", {"loss_feat_kd": 1.0})


def loss_weights_of(distill: dict[str, Any], defaults: dict[str, float]) -> dict[str, float]:
    """Loss key -> weight; raises ConfigError if `model.distill.weights` names others, or has no numbers."""
    weights = distill.get("weights", {})
    good = isinstance(weights, dict) and all(isinstance(value, (int, float)) for value in weights.values())
    if not good or not set(weights) <= set(defaults):
        raise ConfigError(f"model.distill.weights is {weights!r}; expected numbers for some of {sorted(defaults)}")
    return {**defaults, **weights}


def _adapter(width: int, teacher_width: int) -> nn.Module:
    return nn.Identity() if width == teacher_width else nn.Conv2d(width, teacher_width, 1, bias=False)


def _turned(mine: nn.Module, theirs: nn.Module) -> bool:
    return getattr(mine, "_channel_conversion", False) != getattr(theirs, "_channel_conversion", False)


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
    own = {} if detector.quantization is None else dict(detector.quantization.named_buffers(prefix[:-1]))
    saved = {key: state[key] for key in state if key.startswith(prefix) and not key.endswith(".offsets")}
    if own.keys() != saved.keys() or not all(torch.equal(own[key].cpu(), saved[key].cpu()) for key in own):
        raise ConfigError(
            "the run to resume was started with other ranges of INT8, or one of the two is without INT8; resume with "
            "the same --quantize, --from and --calibrated"
        )


def _forgive_missing_teacher(_module: nn.Module, incompatible: Any) -> None:
    kept = [key for key in incompatible.missing_keys if not key.startswith("teacher.")]
    incompatible.missing_keys[:] = kept


def detector_from_config(config: Any, load_weights: bool = True, class_names: Sequence[str] | None = None) -> nn.Module:
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
