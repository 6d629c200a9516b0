"""PKD: its loss beside others and alone, and the heads that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosskd.models.heads import FAMILIES
from crosskd.models.methods.mimic import Mimic
from crosskd.models.methods.pkd import PKD
from deploy.errors import ConfigError


def test_pkd_asks_for_the_same_strides_only(build: Callable[..., Any]) -> None:
    student, teacher = (build("gfl_tiny.py", {"model.bbox_head.reg_max": bins}).bbox_head for bins in (16, 8))
    PKD({}, student, teacher)
    with pytest.raises(ConfigError, match="reg_max"):
        Mimic({}, student, teacher)
    fewer = build("gfl_tiny.py", {"model.bbox_head.anchor_generator.strides": [4, 8, 16, 32]}).bbox_head
    with pytest.raises(ConfigError, match="strides"):
        PKD({}, student, fewer)


def test_pkd_alone_has_the_weight_that_it_has_beside_crosskd(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    both, alone = (build(overrides={"model.distill.method": method}) for method in ("crosskd+pkd", "pkd"))
    alone.student.load_state_dict(both.student.state_dict())
    alone.teacher.load_state_dict(both.teacher.state_dict())
    batch = make_batch([3, 2])
    first, second = (torch.stack(detector.loss(*batch)["loss_feat_kd"]) for detector in (both, alone))
    torch.testing.assert_close(first, second)


def test_pkd_works_with_heads_that_crosskd_cannot_split(
    build: Callable[..., Any], make_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, "GFLHead")
    detector = build(overrides={"model.distill.method": "pkd"})
    assert sum(detector.loss(*make_batch([3]))["loss_feat_kd"]) > 0
    with pytest.raises(ConfigError, match="the method 'pkd' works with any"):
        build()
