"""VFNet: other outputs in training than in eval mode, and a loss that takes no labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosskd.models.families.vfnet import VFNetFamily
from tests.stand_ins.heads import small_head


def _head(**settings: Any) -> Any:
    torch.manual_seed(0)
    return small_head("VFNetHead", 5, 2, dcn_on_last_conv=False, **settings)


def _pyramid() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 16, max(8 >> level, 1), max(12 >> level, 1)) for level in range(5))


def test_outputs_of_a_training_head_become_those_in_eval_mode() -> None:
    head, pyramid = _head(), _pyramid()
    with torch.no_grad():
        found = VFNetFamily().outputs_as_in_eval(head(pyramid), head)
        expected = head.eval()(pyramid)
    assert len(found) == len(expected) == 2
    for maps, others in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))
    assert VFNetFamily().outputs_as_in_eval(expected, head) is expected


@pytest.mark.parametrize("boxes", [[3, 2], [0, 0]])
def test_both_kinds_of_loss_record_the_same_assignment(make_batch: Callable[..., Any], boxes: list[int]) -> None:
    _, samples = make_batch(boxes)
    pyramid = _pyramid()
    recorded = []
    for head in (_head(), _head(use_vfl=False)):
        with VFNetFamily().recorded_assignment(head) as calls:
            head.loss(pyramid, samples)
        recorded.extend(calls)
    varifocal, focal = recorded
    assert torch.equal(varifocal.labels, focal.labels)
    assert torch.equal(varifocal.label_weights, focal.label_weights)
    assert varifocal.avg_factor == focal.avg_factor == max(1, (varifocal.labels < 6).sum())
    assert bool((varifocal.labels < 6).any()) == any(boxes)
