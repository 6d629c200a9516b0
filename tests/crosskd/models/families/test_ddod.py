"""DDOD: its head counts the positives that it ever assigned, so that nothing may be assigned twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from crosskd.models.families.ddod import DDODFamily
from crosskd.models.heads import rows_of_maps
from tests.stand_ins.heads import small_head


def test_the_recorded_assignment_is_that_of_the_classification(make_batch: Callable[..., Any]) -> None:
    head = small_head("DDODHead", 5, 2)
    plain = copy.deepcopy(head)
    _, samples = make_batch([3, 0])
    pyramid = tuple(torch.randn(2, 16, max(8 >> level, 1), max(12 >> level, 1)) for level in range(5))
    family = DDODFamily()
    with family.recorded_pass(head) as recorded, family.recorded_assignment(head) as calls:
        losses = head.loss(pyramid, samples)
    outputs = head.eval()(pyramid)
    family.loss_by_outputs(recorded.outputs, outputs, calls, head)
    expected = plain.loss(pyramid, samples)
    assert head.cls_num_pos_samples_per_level == plain.cls_num_pos_samples_per_level
    assert all(torch.equal(a, b) for key in expected for a, b in zip(losses[key], expected[key], strict=True))
    # The head's own loss of each level, up to its factor of 1 to 2 for the level, from what was recorded.
    for maps, call, loss in zip(recorded.outputs[0], calls, losses["loss_cls"], strict=True):
        own = head.loss_cls(rows_of_maps(maps, 6), call.labels, call.label_weights, avg_factor=call.avg_factor)
        assert 0.999 < (loss / own).item() < 2.001
