"""Two heads fit a method if all is the same that it compares; and what a method asks of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from crosskd.models.heads import FAMILIES, HeadFamily
from crosskd.models.methods import DISTILLATION_METHODS
from crosskd.models.methods.crosskd import CrossKD
from crosskd.models.methods.mimic import Mimic
from deploy.errors import ConfigError

SETTINGS = {"method": "crosskd", "split": 1}


def test_heads_of_two_families_do_not_match(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "Linear", HeadFamily())
    with pytest.raises(ConfigError, match="student's head is GFLHead, the teacher's Linear"):
        CrossKD(SETTINGS, build("gfl_tiny.py").bbox_head, nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"model.bbox_head.num_classes": 7}, "num_classes is 6 in the student and 7"),
        (
            {"model.bbox_head.anchor_generator.strides": [8, 16, 32, 64, 128]},
            r"strides is .*4, 4.* in the student",
        ),
        ({"model.bbox_head.anchor_generator.strides": [4, 8, 16, 32]}, r"strides is .*64, 64.* in the student"),
        ({"model.bbox_head.reg_max": 8}, "reg_max is 16 in the student and 8"),
    ],
)
def test_heads_that_differ_are_refused_with_both_values(
    build: Callable[..., Any], override: dict[str, Any], named: str
) -> None:
    student, teacher = (
        build("gfl_tiny.py", {"model.bbox_head.num_classes": 6, **more}).bbox_head for more in ({}, override)
    )
    with pytest.raises(ConfigError, match=named):
        CrossKD(SETTINGS, student, teacher)


def test_a_config_chooses_a_method_that_was_added(
    build: Callable[..., Any], make_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method is its class and a line in the table: nothing else knows of it."""

    class HalfOfMimic(Mimic):
        def losses(self, *passes: Any) -> dict[str, Any]:
            return {key: [value / 2 for value in values] for key, values in super().losses(*passes).items()}

    monkeypatch.setitem(DISTILLATION_METHODS, "half", (HalfOfMimic,))
    whole, half = (build(overrides={"model.distill.method": method}).eval() for method in ("mimic", "half"))
    half.load_state_dict(whole.state_dict())
    half.teacher.load_state_dict(whole.teacher.state_dict())
    batch = make_batch([3, 2])
    expected, found = whole.loss(*batch), half.loss(*batch)
    for key in ("loss_cls_kd", "loss_reg_kd"):
        assert [float(value) / 2 for value in expected[key]] == [float(value) for value in found[key]]
