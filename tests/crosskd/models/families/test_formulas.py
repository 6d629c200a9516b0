"""The losses of families that compare boxes by GIoU are those of their formulas, place by place in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from crosskd.models.heads import LossCall, family_of
from tests.stand_ins.heads import CLASSES, small_head

IMAGES, FACTOR = 2, 7.0
SIZES = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))
"""Height and width of the levels."""
QUALITIES = {"ATSSHead": "loss_centerness_kd", "DDODHead": "loss_iou_kd", "PAAHead": "loss_iou_kd"}
"""Heads with a third output -> the key of its loss."""
HEADS = (*QUALITIES, "TOODHead", "VFNetHead", "RTMDetSepBNHead")


def _outputs(name: str, sizes: tuple[tuple[int, int], ...]) -> list[list[Tensor]]:
    """Random ones, in the order and the units of the head in eval mode."""
    classes, boxes, qualities = ([torch.randn(IMAGES, width, *size) for size in sizes] for width in (CLASSES, 4, 1))
    if name == "TOODHead":  # probabilities; corners in strides
        corners = [torch.cat([maps[:, :2], maps[:, :2] + maps[:, 2:].exp()], 1) for maps in boxes]
        return [[maps.sigmoid() for maps in classes], corners]
    if name == "VFNetHead":  # distances in pixels
        return [classes, [10 * maps.exp() for maps in boxes]]
    if name == "RTMDetSepBNHead":  # the same, some of which are negative
        return [classes, [20 * maps for maps in boxes]]
    return [classes, boxes, qualities]


def _box_xyxy(name: str, values: np.ndarray, x: int, y: int, stride: int) -> np.ndarray:
    if name == "TOODHead":
        return values * stride
    point = stride * np.array([x, y])
    if name in ("VFNetHead", "RTMDetSepBNHead"):
        return np.tile(point, 2) + np.maximum(values, 0.01) * [-1, -1, 1, 1]
    center, size = point + 8 * stride * 0.1 * values[:2], 8 * stride * np.exp(0.2 * values[2:])  # of the square anchor
    return np.concatenate([center - size / 2, center + size / 2])


def _giou(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    outer = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    return inner / union - (outer - union) / outer


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def _entropy(probability: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -target * np.log(probability) - (1 - target) * np.log(1 - probability)


def _calls(name: str, labels: list[Tensor], weights: list[Tensor]) -> list[LossCall]:
    """As the head calls its loss: with what is given for each level as (images, places)."""
    if name == "PAAHead":  # once, image after image
        return [LossCall(torch.cat(labels, 1).view(-1), torch.cat(weights, 1).view(-1), FACTOR)]
    rows = [(label.reshape(-1), weight.reshape(-1)) for label, weight in zip(labels, weights, strict=True)]
    if name == "VFNetHead":  # once, level after level
        return [LossCall(*map(torch.cat, zip(*rows, strict=True)), FACTOR)]
    return [LossCall(*parts, 1.0 if name == "RTMDetSepBNHead" else FACTOR) for parts in rows]


@pytest.mark.parametrize("name", HEADS)
def test_the_losses_are_those_of_their_formulas(name: str) -> None:
    """Some places are ignored by the assignment, some are positive, and the second image has no positive one."""
    sizes = SIZES[:3] if name == "RTMDetSepBNHead" else SIZES
    cross, teacher = _outputs(name, sizes), _outputs(name, sizes)
    labels = [torch.full((IMAGES, height * width), CLASSES) for height, width in sizes]
    for level in labels:
        level[0, ::5] = torch.randint(0, CLASSES, level[0, ::5].shape)
    weights = [(torch.rand(level.shape) > 0.3).float() for level in labels]
    factor = FACTOR
    if name == "RTMDetSepBNHead":  # its own: positive places, at least one for each image
        factor = sum(int((level < CLASSES).sum()) for level in labels) + 1
    quality = QUALITIES.get(name)
    expected = {key: np.zeros(len(sizes)) for key in ("loss_cls_kd", "loss_reg_kd", *filter(None, [quality]))}
    for level, (height, width) in enumerate(sizes):
        for n, y, x in np.ndindex(IMAGES, height, width):
            place = y * width + x
            student, target = (
                [maps[level][n, :, y, x].double().numpy() for maps in outputs] for outputs in (cross, teacher)
            )
            if quality and labels[level][n, place] < CLASSES:
                expected[quality][level] += _entropy(_sigmoid(student[2]), _sigmoid(target[2])).sum() / factor
            if not weights[level][n, place]:
                continue
            classes, known = (maps[0] if name == "TOODHead" else _sigmoid(maps[0]) for maps in (student, target))
            expected["loss_cls_kd"][level] += (_entropy(classes, known) * abs(classes - known)).sum() / factor
            boxes = [_box_xyxy(name, maps[1], x, y, 8 << level) for maps in (student, target)]
            expected["loss_reg_kd"][level] += (1 - _giou(*boxes)) * known.max() / factor
    head = small_head(name, len(sizes), 1)
    found = family_of(head).loss_by_outputs(cross, teacher, _calls(name, labels, weights), head)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5 if key == "loss_cls_kd" else 1e-4, atol=1e-6)
