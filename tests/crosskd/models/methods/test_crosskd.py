"""Where CrossKD splits two heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from crosskd.models.methods.crosskd import CrossKD, split_of_teacher
from deploy.errors import ConfigError


def test_the_split_is_counted_from_the_end_of_towers_of_different_length(build: Callable[..., Any]) -> None:
    short, long = (build("gfl_tiny.py", {"model.bbox_head.stacked_convs": layers}).bbox_head for layers in (2, 4))
    assert [split_of_teacher(split, short, long) for split in range(3)] == [2, 3, 4]
    assert [split_of_teacher(split, long, short) for split in range(2, 5)] == [0, 1, 2]
    assert CrossKD({"split": 2}, long, short).taps.teacher_split == 0
    with pytest.raises(
        ConfigError, match=r"have 3 layers left, and the teacher's have 2 in all; expected .* at least 2"
    ):
        CrossKD({"split": 1}, long, short)


@pytest.mark.parametrize("split", [-1, 3, "1", None, 0.5])
def test_a_split_that_is_no_layer_is_refused(build: Callable[..., Any], split: Any) -> None:
    head = build("gfl_tiny.py").bbox_head
    with pytest.raises(ConfigError, match="expected 0 to 2"):
        CrossKD({"split": split}, head, head)
