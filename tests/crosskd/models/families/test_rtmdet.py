"""RTMDet: which rows its assignment is about, its averaging factor, and boxes turned inside out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosskd.models.heads import LossCall, family_of, positives_of_batch, priors_of_maps
from tests.stand_ins.heads import CLASSES, small_head

SIZES = [(4, 6), (2, 3), (1, 2)]


@pytest.fixture(scope="module")
def head() -> Any:
    return small_head("RTMDetSepBNHead", 3, 2)


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
