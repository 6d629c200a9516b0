"""TOOD (arXiv 2108.07755): one tower for both tasks, each layer of which is read; it gives probabilities and boxes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from mmdet.models.utils import sigmoid_geometric_mean
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor, nn
from torch.nn import functional

from crosskd.models.families.deform import sampled_points
from crosskd.models.heads import (
    DenseHead,
    HeadFamily,
    LossCall,
    Taps,
    boxes_from_deltas,
    boxes_from_sides,
    confidence_of_teacher,
    loss_of_classes,
    positives_of_batch,
    register_family,
    rows_of_maps,
    stride_of_level,
)

PROBABILITY_MARGIN = 1e-6
"""Probabilities are kept this far from 0 and 1, where a logit would be infinite."""


@register_family("TOODHead")
class TOODFamily(HeadFamily):
    """
    Quality focal loss on classes, GIoU loss on the boxes that the head itself decodes.

    Tap k is the outputs of layers 1 to k, since the task decomposition behind the tower reads them all. Nothing is
    published for this head: losses and weights are our counterpart of ATSS's.
    """

    predictor = "tood_cls"
    default_weights: ClassVar = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_feat_kd": 1.0}
    towers = ("inter_convs",)

    def tap_layers(self, head: DenseHead, split: int) -> list[list[nn.Module]]:
        return [[layer] for layer in head.inter_convs[:split]]

    def rest_of_head(self, head: DenseHead, split: int) -> nn.Module:
        rest = copy.copy(head)
        rest._modules = dict(head._modules)
        layers = list(head.inter_convs)
        if split:
            # The head joins what its layers give along the channels: the first k taps may come joined already.
            layers[:split] = [nn.ReLU()]
            if split < len(head.inter_convs):
                layers[1] = nn.Sequential(_LastTap(head.feat_channels), layers[1])
        rest._modules["inter_convs"] = nn.ModuleList(layers)
        return nn.Sequential(_JoinedTaps(), rest)

    @contextlib.contextmanager
    def recorded_assignment(self, head: DenseHead) -> Iterator[list[LossCall]]:
        """
        Yields a list that the head's loss inside the block fills, a call per level.

        Taken from the head's targets: its losses differ between the first epochs and the others, and are divided
        later, by a sum of alignments. The factor here is the number of positive anchors, each image counted as at
        least one, mean over ranks.
        """
        original = head.get_targets
        calls: list[LossCall] = []

        def get_targets(*args: Any, **kwargs: Any) -> Any:
            targets = original(*args, **kwargs)
            labels, weights = targets[1], targets[2]  # per level (N, anchors)
            factor = positives_of_batch(labels, head.num_classes)
            calls.extend(
                LossCall(label.reshape(-1), weight.reshape(-1), factor)
                for label, weight in zip(labels, weights, strict=True)
            )
            return targets

        head.get_targets = get_targets
        try:
            yield calls
        finally:
            del head.get_targets

    def loss_by_outputs(
        self, cross: Sequence[Any], teacher: Sequence[Any], calls: list[LossCall], head: DenseHead
    ) -> dict[str, list[Tensor]]:
        losses_cls, losses_reg = [], []
        for cross_cls, cross_reg, teacher_cls, teacher_reg, call in zip(*cross, *teacher, calls, strict=True):
            logits, target = (maps.float().logit(PROBABILITY_MARGIN) for maps in (cross_cls, teacher_cls))
            losses_cls.append(loss_of_classes(head, logits, target, call))
            boxes, target_boxes = (rows_of_maps(maps, 4) for maps in (cross_reg, teacher_reg))  # in strides
            distance = 1 - bbox_overlaps(boxes, target_boxes, mode="giou", is_aligned=True, eps=1e-7)  # (rows,)
            losses_reg.append((distance * confidence_of_teacher(head, target, call)).sum() / call.avg_factor)
        return {"loss_cls_kd": losses_cls, "loss_reg_kd": losses_reg}

    def decode(self, head: DenseHead, level: int, priors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        probabilities, boxes = rows  # boxes in strides
        return boxes * stride_of_level(head, level), probabilities

    def traceable(self, head: DenseHead) -> nn.Module:
        return _TraceableHead(head)

    def note_of_export(self, head: DenseHead) -> str:
        return "mmdet leaves TOODHead's boxes as they are where they reach beyond the image; deployed, they are clipped"


def keep_boxes_in_float32(head: DenseHead) -> None:
    """
    Makes a TOODHead sample its boxes in float32, also inside autocast; leaves other heads as they are.

    It shifts boxes by predicted offsets, and mmcv's operator casts the boxes to the type of the offsets: in bf16 they
    would be off by whole pixels.
    """
    original = getattr(head, "deform_sampling", None)
    if original is not None:
        head.deform_sampling = lambda boxes, offsets: original(boxes, offsets.float())


class _TraceableHead(nn.Module):
    """
    What TOODHead.forward computes (arXiv 2108.07755, sections 3.1 and 3.2), for any number of images.

    mmdet's own repeats its anchors as often as there are images in the batch with which it is traced.
    """

    def __init__(self, head: DenseHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        levels = [self.level(level, maps) for level, maps in enumerate(features)]
        return [scores for scores, _ in levels], [boxes for _, boxes in levels]

    def level(self, level: int, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (N, classes, H, W) and boxes (N, 4, H, W), in strides."""
        head = self.head
        outputs = []
        for layer in head.inter_convs:
            maps = layer(maps)
            outputs.append(maps)
        joined = torch.cat(outputs, 1)
        mean = functional.adaptive_avg_pool2d(joined, (1, 1))
        scores = sigmoid_geometric_mean(head.tood_cls(head.cls_decomp(joined, mean)), head.cls_prob_module(joined))
        boxes = self.boxes_of_anchors(level, head.tood_reg(head.reg_decomp(joined, mean)))
        moved = sampled_points(boxes, head.reg_offset_module(joined))
        inverted = (moved[:, :1] > moved[:, 2:3]) | (moved[:, 1:2] > moved[:, 3:])  # (N, 1, H, W)
        return scores, torch.where(inverted, boxes, moved)

    def boxes_of_anchors(self, level: int, maps: Tensor) -> Tensor:
        """(N, 4, H, W), in strides, before each side is taken from a place that the head chooses."""
        head, stride = self.head, stride_of_level(self.head, level)
        height, width = (int(side) for side in maps.shape[-2:])
        anchors = head.prior_generator.single_level_grid_priors((height, width), level, device="cpu")  # (H * W, 4)
        scale = head.scales[level]
        maps = scale(maps.exp() if head.anchor_type == "anchor_free" else maps)
        rows = maps.permute(0, 2, 3, 1).reshape(-1, height * width, 4)
        if head.anchor_type == "anchor_free":
            boxes = boxes_from_sides((anchors[:, :2] + anchors[:, 2:]) / 2 / stride, rows)
        else:
            boxes = boxes_from_deltas(head.bbox_coder, anchors, rows) / stride
        return boxes.reshape(-1, height, width, 4).permute(0, 3, 1, 2)


class _JoinedTaps(nn.Module):
    """Per level, the taps of the tower's layers as one map: (N, k * C, H, W)."""

    def forward(self, taps: Taps) -> list[Tensor]:
        return [torch.cat(level, 1) for level in taps]


class _LastTap(nn.Module):
    """Of joined taps the last, which the next layer takes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, taps: Tensor) -> Tensor:
        return taps[:, -self.channels :].contiguous()  # mmcv's deformable convolutions need it so
