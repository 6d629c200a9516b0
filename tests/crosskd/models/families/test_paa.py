"""PAA: which of the calls of its loss is recorded, in which order, and its losses by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.models.utils import levels_to_images
from mmdet.structures.bbox import bbox_overlaps

from crosskd.config import load_config
from crosskd.models.families import paa
from crosskd.models.heads import LossCall, family_of, priors_of_maps, rows_of_maps
from deploy.errors import MissingDependencyError

CLASSES, STRIDES, SIZES = 6, (8, 16, 32, 64, 128), [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


@pytest.fixture(scope="module")
def head() -> Any:
    from mmdet.registry import MODELS

    small = dict(
        in_channels=16, feat_channels=16, num_classes=CLASSES, stacked_convs=1, norm_cfg=dict(type="GN", num_groups=4)
    )
    model = load_config("mmdet::paa/paa_r50_fpn_1x_coco.py", {"model.bbox_head": small}).model
    return MODELS.build(dict(model.bbox_head, train_cfg=model.train_cfg, test_cfg=model.test_cfg)).train()


def _maps(images: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(images, width, *size) for size in SIZES]


def _giou(a: np.ndarray, b: np.ndarray) -> float:
    (ax, ay), (bx, by) = a[2:] - a[:2], b[2:] - b[:2]
    inside = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    around = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    union = ax * ay + bx * by - inside
    return inside / union - (around - union) / around


def _box(deltas: np.ndarray, centre: np.ndarray, side: float) -> np.ndarray:
    """x1 y1 x2 y2 of a square anchor of `side` that is moved and stretched."""
    middle, size = centre + 0.1 * deltas[:2] * side, np.exp(0.2 * deltas[2:]) * side
    return np.concatenate([middle - size / 2, middle + size / 2])


def test_the_losses_are_those_of_their_formulas(head: Any) -> None:
    """Anchor by anchor in float64 numpy, in the order in which PAA flattens: image, level, place."""
    images, factor = 2, 7.0
    cross, teacher = (tuple(_maps(images, width) for width in (CLASSES, 4, 1)) for _ in range(2))
    rows = images * sum(height * width for height, width in SIZES)
    call = LossCall(torch.randint(0, CLASSES + 1, (rows,)), (torch.rand(rows) > 0.3).float(), factor)
    expected = {key: np.zeros(len(SIZES)) for key in ("loss_cls_kd", "loss_reg_kd", "loss_iou_kd")}
    places = [(n, level, y, x) for n in range(images) for level, size in enumerate(SIZES) for y, x in np.ndindex(*size)]
    for row, (n, level, y, x) in enumerate(places):
        mine, theirs = ([maps[level][n, :, y, x].double().numpy() for maps in both] for both in (cross, teacher))
        (probability, target), (iou, target_iou) = (
            [1 / (1 + np.exp(-one[kind])) for one in (mine, theirs)] for kind in (0, 2)
        )
        if call.labels[row] < CLASSES:
            entropy = -target_iou * np.log(iou) - (1 - target_iou) * np.log(1 - iou)
            expected["loss_iou_kd"][level] += entropy.item() / factor
        if call.label_weights[row]:
            entropy = -target * np.log(probability) - (1 - target) * np.log(1 - probability)
            expected["loss_cls_kd"][level] += (entropy * abs(probability - target)).sum() / factor
            stride = STRIDES[level]
            boxes = [_box(one[1], stride * np.array([x, y]), 8 * stride) for one in (mine, theirs)]
            expected["loss_reg_kd"][level] += (1 - _giou(*boxes)) * target.max() / factor
    found = family_of(head).loss_by_outputs(cross, teacher, [call], head)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-4)


def test_rows_by_image_become_rows_by_level() -> None:
    """Several anchors a place: the order of mmdet's own flattening, a row's value its label."""
    maps = [torch.randperm(2 * 3 * h * w).view(2, 3, h, w) for h, w in SIZES]
    rows = torch.cat(levels_to_images(maps)).view(-1)
    for call, level in zip(paa.call_by_level(LossCall(rows, -rows, 5.0), maps), maps, strict=True):
        assert torch.equal(call.labels.float(), rows_of_maps(level, 1)[:, 0])
        assert torch.equal(call.label_weights, -call.labels)
        assert call.avg_factor == 5.0


@pytest.mark.skipif(paa.skm is None, reason="PAA's target assignment needs scikit-learn")
def test_only_the_assignment_that_the_head_ends_with_is_recorded(head: Any, make_batch: Callable[..., Any]) -> None:
    family = family_of(head)
    _, samples = make_batch([3, 2])
    with family.recorded_assignment(head) as calls:
        head.loss(tuple(torch.randn(2, 16, *size) for size in SIZES), samples)
    (call,) = calls
    maps = [torch.zeros(2, 1, *size) for size in SIZES]
    seen = 0
    for one, anchors in zip(paa.call_by_level(call, maps), priors_of_maps(head, maps), strict=True):
        assert len(one.labels) == len(anchors)
        for row in (one.labels < CLASSES).nonzero()[:, 0].tolist():
            instances = samples[row // (len(anchors) // 2)].gt_instances
            boxes = instances.bboxes[instances.labels == one.labels[row]]
            assert bbox_overlaps(boxes, anchors[row : row + 1]).max() > 0.01  # also the best anchor of a small box
            seen += 1
    assert call.avg_factor == seen > 2


def test_without_scikit_learn_the_message_says_what_to_install(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paa, "skm", None)
    with pytest.raises(MissingDependencyError, match="PAAHead needs the package scikit-learn"):
        family_of(head).recorded_assignment(head).__enter__()
