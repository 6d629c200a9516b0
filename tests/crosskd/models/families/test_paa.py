"""PAA: which of the calls of its loss is recorded, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.utils import levels_to_images
from mmdet.structures.bbox import bbox_overlaps

from crosskd.models.families import paa
from crosskd.models.heads import LossCall, family_of, priors_of_maps, rows_of_maps
from deploy.errors import MissingDependencyError
from tests.stand_ins.heads import CLASSES, small_head

SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


@pytest.fixture(scope="module")
def head() -> Any:
    return small_head("PAAHead", 5, 1)


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
