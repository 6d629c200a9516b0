"""Localisation distillation: the heads that it takes. Its formula is tested with GFL, in families/test_gfl.py."""

from __future__ import annotations

import pytest

from crosskd.models.detector import CrossKDDetector
from deploy.errors import ConfigError
from tests.stand_ins.heads import small_model


def test_localisation_distillation_needs_distributions() -> None:
    model = small_model("RetinaHead", 5, 2)
    with pytest.raises(ConfigError, match=r"RetinaHead predicts numbers .* expected a GFLHead"):
        CrossKDDetector(model, {"model": model}, {"method": "ld"})
