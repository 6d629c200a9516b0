"""DDOD: its head counts the positives that it ever assigned, so that nothing may be assigned twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from crosskd.models.families.ddod import DDODFamily
from crosskd.models.heads import rows_of_maps


def _head() -> Any:
    config = ConfigDict(
        type="DDODHead",
        num_classes=6,
        in_channels=16,
        feat_channels=16,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=4),
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32, 64, 128]
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True),
        loss_bbox=dict(type="GIoULoss"),
        train_cfg=dict(
            assigner=dict(type="ATSSAssigner", topk=9, alpha=0.8),
            reg_assigner=dict(type="ATSSAssigner", topk=9, alpha=0.5),
            allowed_border=-1,
            pos_weight=-1,
        ),
    )
    return MODELS.build(config).train()


def test_the_recorded_assignment_is_that_of_the_classification(make_batch: Callable[..., Any]) -> None:
    head = _head()
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
