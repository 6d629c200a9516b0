"""
What CrossKD has to know of a dense head: how to split it at tower layer k, and how its outputs are compared.

A dense head is two towers of convolutions (classification, regression) over each pyramid level, then predictors. The
tap k is the output of tower layer k after its activation; tap 0 is the pyramid feature itself.

A family of heads is one small class, registered by the type of the head (crosskd/models/families): `loss_by_outputs`,
two constants and, to be deployed, `decode` are all that it has to write.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from crosskd.models.losses import kd_quality_focal_loss
from crosskd.models.ops import register_mmcv_ops
from deploy.errors import ConfigError, ExportError

register_mmcv_ops()  # before mmdet is imported, which asks for them then
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder  # noqa: E402
from mmdet.utils import reduce_mean  # noqa: E402

DenseHead = Any
"""One of mmdet's dense heads, an nn.Module. mmdet has no types, and by torch's any attribute might be a tensor."""
Taps = list[tuple[Tensor, ...]]
"""Per level, finest first: a tap of each tower (classification, regression), each (N, C, H, W)."""


@dataclasses.dataclass
class LossCall:
    """What the student's own head gave to its classification loss in one call: its target assignment."""

    labels: Tensor
    """(rows,) int64: the class, or the number of classes for background. A row is an anchor or point of an image."""
    label_weights: Tensor
    """(rows,): 0 where the assignment ignores the row."""
    avg_factor: float | Tensor
    """The head's averaging factor: positive rows, at least one per image."""

    @property
    def ignored(self) -> Tensor:
        """(rows,) bool."""
        return self.label_weights <= 0


@dataclasses.dataclass
class HeadPass:
    """What one forward pass of a head read and made."""

    features: list[Tensor] = dataclasses.field(default_factory=list)
    """The pyramid, per level (N, C, H, W)."""
    taps: Taps = dataclasses.field(default_factory=list)
    outputs: Any = None
    """As the head's forward returned them: a sequence of kinds of map, each per level."""


class HeadFamily:
    """What CrossKD has to know of a family of dense heads."""

    predictor: ClassVar[str]
    """The head's attribute that predicts classes, anchors * classes output channels, without its index if a list."""
    default_weights: ClassVar[dict[str, float]] = {"loss_feat_kd": 1.0}
    """Loss key -> weight, as published for the family; `loss_feat_kd` is PKD's, which works with any head."""
    towers: ClassVar[tuple[str, ...]] = ("cls_convs", "reg_convs")
    """The head's attributes that hold the layers of its towers: a list, or a list per level."""
    threshold_in_graph: ClassVar[bool] = False
    """Whether `decode` returns a factor: mmdet's score threshold then belongs before it, and so into the graph."""

    @contextlib.contextmanager
    def recorded_pass(
        self, head: DenseHead, split: int | None = None, before_activation: bool = False
    ) -> Iterator[HeadPass]:
        """
        Yields a HeadPass that the forward pass of `head` inside the block fills, with taps unless `split` is None.

        Hooks on the tower layers fire once per level, so the head's own code is left as it is.
        """
        recorded = HeadPass()
        columns: list[list[Tensor]] = []
        handles = []

        def finish(_module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            recorded.features.extend(args[0])
            recorded.outputs = outputs
            if split is not None:
                taps = columns if split else [recorded.features] * len(self.towers)
                recorded.taps.extend(zip(*taps, strict=True))

        handles.append(head.register_forward_hook(finish))
        for layers in self.tap_layers(head, split) if split else []:
            columns.append([])
            for layer in layers:
                handles.append(_recorded_layer(layer, columns[-1], before_activation))
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    def other_rows(self, head: DenseHead) -> int:
        """How many output channels of the predictor follow those of classes, and belong to none."""
        return 0

    def tap_layers(self, head: DenseHead, split: int) -> list[list[nn.Module]]:
        """Per tower, the layers whose outputs are tap `split`: one, or one for each level."""
        towers = (getattr(head, tower) for tower in self.towers)
        return [[level[split - 1] for level in tower] if _has_levels(tower) else [tower[split - 1]] for tower in towers]

    def rest_of_head(self, head: DenseHead, split: int) -> nn.Module:
        """
        The layers of `head` after tap `split`, as a module that takes `Taps` where `head` takes features.

        A shallow copy that shares every parameter: the head's own forward does predictors, scales and activations. Do
        not register it as a submodule, or the weights would appear twice.
        """
        rest = copy.copy(head)
        rest._modules = dict(head._modules)
        for index, tower in enumerate(self.towers):
            rest._modules[tower] = self._rest_of_tower(getattr(head, tower), index, split)
        return rest

    def _rest_of_tower(self, tower: Any, index: int, split: int) -> nn.ModuleList:
        if _has_levels(tower):
            return nn.ModuleList([self._rest_of_tower(level, index, split) for level in tower])
        relu = split > 0 and isinstance(_activation_of(tower[split - 1]), nn.ReLU)
        return nn.ModuleList([_TakeTap(index, relu), *tower[split:]])

    @contextlib.contextmanager
    def recorded_assignment(self, head: DenseHead) -> Iterator[list[LossCall]]:
        """
        Yields a list that the head's loss inside the block fills, a call per level: nothing is assigned twice.
        """
        calls: list[LossCall] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            target = args[1]
            labels = target[0] if isinstance(target, tuple) else target  # GFL adds the quality of each box
            weights = kwargs.get("weight", args[2] if len(args) > 2 else None)
            weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.reshape(-1)
            calls.append(LossCall(labels.reshape(-1), weights, kwargs["avg_factor"]))

        handle = head.loss_cls.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def outputs_as_in_eval(self, outputs: Any, head: DenseHead) -> Any:
        """The outputs of a training head in the units and the order of one that is in eval mode, as the teacher is."""
        return outputs

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        """
        The distillation losses, a scalar per level under each key, before their weights.

        Args:
            cross: the teacher head's outputs for the student's taps, in the order of the head's forward; for plain
                mimicking, the student's own outputs.
            teacher: the teacher's own outputs.
            calls: the student's target assignment, per level.
            head: the teacher's head.
        """
        raise NotImplementedError

    def loss_ld(
        self, student: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> list[Tensor]:
        """
        Localisation distillation, a scalar per level; written only for heads that predict a distribution of each side.
        """
        raise NotImplementedError

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """
        Boxes (N, P, 4), x1 y1 x2 y2 in pixels, and scores (N, P, classes), 0 to 1, of a level, for deploy.export.

        A third tensor, (N, P), is a factor by which mmdet multiplies the scores after it has chosen the best by the
        scores alone.

        Args:
            priors: anchors (P, 4) or points (P, 2), pixels.
            rows: of each kind of map, in the order in which the head's forward returns them in eval mode, (N, P,
                channels of one anchor or point).
        """
        raise NotImplementedError

    def traceable(self, head: DenseHead) -> nn.Module:
        """The head, or what computes the same and takes any number of images in a traced graph."""
        return head

    def note_of_export(self, head: DenseHead) -> str:
        """What a user has to know of how the exported model differs from mmdet's detector; empty for nothing."""
        return ""


FAMILIES: dict[str, HeadFamily] = {}
"""Type of head -> its family; crosskd/models/families fills it."""
Family = TypeVar("Family", bound=type[HeadFamily])


def register_family(*head_types: str) -> Callable[[Family], Family]:
    """Class decorator: `HeadFamily` of the heads whose class names are given."""

    def register(family: Family) -> Family:
        FAMILIES.update({head_type: family() for head_type in head_types})
        return family

    return register


def family_of(head: DenseHead) -> HeadFamily:
    """
    The family of a head.

    Raises:
        ConfigError: the head's type is not supported; those that are, are named.
    """
    name = type(head).__name__
    if name not in FAMILIES:
        raise ConfigError(
            f"CrossKD cannot split the head {name}; it can split {', '.join(sorted(FAMILIES))}. docs/add-a-head.md "
            "says how to add one; the method 'pkd' works with any."
        )
    return FAMILIES[name]


def heads_with_decoder() -> list[str]:
    """The types of heads that can be exported: those whose family decodes their boxes."""
    return sorted(name for name, family in FAMILIES.items() if type(family).decode is not HeadFamily.decode)


def rows_of_maps(maps: Tensor, width: int) -> Tensor:
    """
    (N, A * width, H, W) -> (N * H * W * A, width), float32: the order in which mmdet's heads flatten their levels.
    """
    return maps.permute(0, 2, 3, 1).reshape(-1, width).float()


def priors_of_maps(head: DenseHead, maps: Sequence[Tensor]) -> list[Tensor]:
    """Per level (N * H * W * A, 4) anchors or (N * H * W, 2) points, in the order of `rows_of_maps`."""
    sizes = [m.shape[-2:] for m in maps]
    priors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
    return [level.repeat(maps[0].shape[0], 1) for level in priors]


def stride_of_level(head: DenseHead, level: int) -> float:
    """Pixels between two neighbouring places of a level, the same along x and y."""
    return float(head.prior_generator.strides[level][0])


def boxes_from_sides(points: Tensor, sides: Tensor) -> Tensor:
    """(N, P, 4) x1 y1 x2 y2 from points (P, 2) and distances to left, top, right, bottom (N, P, 4)."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


def boxes_from_deltas(coder: Any, anchors: Tensor, deltas: Tensor) -> Tensor:
    """
    (N, P, 4) x1 y1 x2 y2 from anchors (P, 4) and deltas (N, P, 4), not clipped to the image.

    Deltas are those of Faster R-CNN (arXiv 1506.01497, equation 2), scaled by the coder's means and stds.

    Raises:
        ExportError: the coder is another one.
    """
    if type(coder) is not DeltaXYWHBBoxCoder or coder.add_ctr_clamp:
        raise ExportError(f"cannot export the box coder {coder}; can export DeltaXYWHBBoxCoder without add_ctr_clamp")
    deltas = deltas * torch.tensor(coder.stds) + torch.tensor(coder.means)
    centres, sizes = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    longest = abs(math.log(16 / 1000))  # mmdet's wh_ratio_clip, beyond which a box cannot grow
    halves = sizes * deltas[..., 2:].clamp(-longest, longest).exp() / 2
    centres = centres + sizes * deltas[..., :2]
    return torch.cat([centres - halves, centres + halves], dim=-1)


def positives_of_batch(labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """
    A scalar: positive rows, at least one per image, mean over ranks: the averaging factor of GFL and ATSS.

    For heads that give their loss the factor 1 and divide by a factor of their own later.

    Args:
        labels: per level (N, anchors or points of an image).
    """
    counts = [((level >= 0) & (level < num_classes)).sum(1) for level in labels]  # per level (N,)
    positive = torch.stack(counts).sum(0)  # (N,)
    return reduce_mean(positive.clamp(min=1).sum().float())


def loss_of_classes(head: DenseHead, cross: Tensor, teacher: Tensor, call: LossCall) -> Tensor:
    """A scalar: the quality focal loss on one level's class maps, averaged as the student's own."""
    logits, target = rows_of_maps(cross, head.cls_out_channels), rows_of_maps(teacher, head.cls_out_channels)
    return (kd_quality_focal_loss(logits, target) * call.label_weights[:, None]).sum() / call.avg_factor


def confidence_of_teacher(head: DenseHead, teacher: Tensor, call: LossCall) -> Tensor:
    """(rows,): the teacher's highest class probability, zero where the assignment ignores the row."""
    return rows_of_maps(teacher, head.cls_out_channels).amax(1).sigmoid() * ~call.ignored


def number_of_taps(head: DenseHead, split: int) -> int:
    """Of each level at `split`."""
    family = family_of(head)
    return len(family.tap_layers(head, split)) if split else len(family.towers)


def _has_levels(tower: nn.ModuleList) -> bool:
    return len(tower) > 0 and isinstance(tower[0], nn.ModuleList)


def _activation_of(layer: nn.Module) -> nn.Module | None:
    """Of mmcv's ConvModule, or of the second half of a depthwise separable one."""
    return getattr(getattr(layer, "pointwise_conv", layer), "activate", None)


def _recorded_layer(layer: nn.Module, outputs: list[Tensor], before_activation: bool) -> Any:
    """The handle of a hook that appends what `layer` gives, or what its activation takes, to `outputs`."""
    if not before_activation:
        return layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    activation = _activation_of(layer)
    if activation is None:
        raise ConfigError(
            f"model.distill.tap is 'before_activation', but a {type(layer).__name__} of the tower has no activation "
            "of its own; use 'after_activation'"
        )
    if not isinstance(activation, nn.ReLU):  # the rest of the head makes up for a ReLU only
        raise ConfigError(
            f"model.distill.tap is 'before_activation', but the activation of a {type(layer).__name__} of the tower is "
            f"{type(activation).__name__}; expected ReLU. Use 'after_activation'."
        )
    # A copy, since the activation may work in place.
    return activation.register_forward_pre_hook(lambda _module, args: outputs.append(args[0].clone()))


class _TakeTap(nn.Module):
    """First layer of a shortened tower: takes its tap, and ReLU unless it is the pyramid feature."""

    def __init__(self, index: int, relu: bool) -> None:
        super().__init__()
        self.index, self.relu = index, relu

    def forward(self, taps: tuple[Tensor, ...]) -> Tensor:
        tap = taps[self.index]
        return functional.relu(tap) if self.relu else tap
