"""Prediction mimicking: what it asks of the two heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from crosskd.models.methods.crosskd import CrossKD
from crosskd.models.methods.mimic import Mimic
from deploy.errors import ConfigError

SETTINGS = {"method": "crosskd", "split": 1}


def test_mimicking_asks_for_the_same_anchors(build: Callable[..., Any]) -> None:
    key = "model.bbox_head.anchor_generator.octave_base_scale"
    student, teacher = (build("gfl_tiny.py", {key: scale}).bbox_head for scale in (8, 4))
    CrossKD(SETTINGS, student, teacher)
    with pytest.raises(ConfigError, match="priors is"):
        Mimic({}, student, teacher)
