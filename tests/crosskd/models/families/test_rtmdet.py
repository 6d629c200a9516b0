"""RTMDet: which rows its assignment is about, its averaging factor, and its losses by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from crosskd.config import load_config
from crosskd.models.heads import LossCall, family_of, positives_of_batch, priors_of_maps

CLASSES, STRIDES, SIZES = 6, (8, 16, 32), [(4, 6), (2, 3), (1, 2)]


@pytest.fixture(scope="module")
def head() -> Any:
    from mmdet.registry import MODELS

    small = dict(in_channels=16, feat_channels=16, num_classes=CLASSES)
    model = load_config("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", {"model.bbox_head": small}).model
    return MODELS.build(dict(model.bbox_head, train_cfg=model.train_cfg, test_cfg=model.test_cfg)).train()


def _giou(a: np.ndarray, b: np.ndarray) -> float:
    (ax, ay), (bx, by) = a[2:] - a[:2], b[2:] - b[:2]
    inside = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    around = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    union = ax * ay + bx * by - inside
    return inside / union - (around - union) / around


def test_the_losses_are_those_of_their_formulas(head: Any) -> None:
    """Point by point in float64 numpy; some points are ignored, some sides of boxes are negative."""
    images = 2
    cross, teacher = (
        tuple([scale * torch.randn(images, width, *size) for size in SIZES] for width, scale in ((CLASSES, 1), (4, 20)))
        for _ in range(2)
    )
    calls = []
    for height, width in SIZES:
        labels = torch.full((images, height * width), CLASSES)
        labels[0, ::5] = 1  # the second image has no positive point, and counts as one
        calls.append(LossCall(labels.view(-1), (torch.rand(labels.numel()) > 0.3).float(), 1.0))
    factor = sum(len(range(0, height * width, 5)) for height, width in SIZES) + 1
    expected_cls, expected_reg = np.zeros(3), np.zeros(3)
    for level, ((height, width), stride) in enumerate(zip(SIZES, STRIDES, strict=True)):
        for row, (n, y, x) in enumerate(np.ndindex(images, height, width)):
            if not calls[level].label_weights[row]:
                continue
            mine, theirs = ([maps[level][n, :, y, x].double().numpy() for maps in both] for both in (cross, teacher))
            probability, target = (1 / (1 + np.exp(-one[0])) for one in (mine, theirs))
            entropy = -target * np.log(probability) - (1 - target) * np.log(1 - probability)
            expected_cls[level] += (entropy * abs(probability - target)).sum() / factor
            signs, point = np.array([-1, -1, 1, 1]), stride * np.array([x, y, x, y])
            boxes = [point + signs * np.maximum(one[1], 0.01) for one in (mine, theirs)]
            expected_reg[level] += (1 - _giou(*boxes)) * target.max() / factor
    found = family_of(head).loss_by_outputs(cross, teacher, calls, head)
    assert found.keys() == {"loss_cls_kd", "loss_reg_kd"}
    np.testing.assert_allclose(found["loss_cls_kd"], expected_cls, rtol=1e-5)
    np.testing.assert_allclose(found["loss_reg_kd"], expected_reg, rtol=1e-4)


def test_boxes_turned_inside_out_do_not_make_the_loss_run_away(head: Any) -> None:
    classes = [torch.zeros(1, CLASSES, *size) for size in SIZES]
    cross = (classes, [torch.full((1, 4, *size), -50.0, requires_grad=True) for size in SIZES])
    teacher = (classes, [torch.full((1, 4, *size), -5.0) for size in SIZES])
    calls = [LossCall(torch.full((h * w,), CLASSES), torch.ones(h * w), 1.0) for h, w in SIZES]
    total = sum(family_of(head).loss_by_outputs(cross, teacher, calls, head)["loss_reg_kd"])
    assert 0 <= total.item() <= 2 * sum(h * w for h, w in SIZES)


def test_the_recorded_positives_are_points_inside_the_boxes_of_their_image(
    head: Any, make_batch: Callable[..., Any]
) -> None:
    family = family_of(head)
    sizes = [(8, 12), (4, 6), (2, 3)]
    _, samples = make_batch([3, 2])
    samples[0].gt_instances.labels = torch.tensor([0, 1, 2])
    samples[1].gt_instances.labels = torch.tensor([3, 4])
    with family.recorded_assignment(head) as calls:
        head.loss(tuple(torch.randn(2, 16, *size) for size in sizes), samples)
    points = priors_of_maps(head, [torch.zeros(2, 1, *size) for size in sizes])
    seen = 0
    for call, level in zip(calls, points, strict=True):
        assert len(call.labels) == len(call.label_weights) == len(level)
        for row in (call.labels < CLASSES).nonzero()[:, 0].tolist():
            instances = samples[row // (len(level) // 2)].gt_instances
            boxes = instances.bboxes  # in one of which each lies; where they overlap, maybe not in the one it is for
            assert ((boxes[:, :2] < level[row]) & (level[row] < boxes[:, 2:])).all(1).any()
            assert call.labels[row] in instances.labels
            seen += 1
    assert positives_of_batch([call.labels.view(2, -1) for call in calls], CLASSES) == seen > 2
