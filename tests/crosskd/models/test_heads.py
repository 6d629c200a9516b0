"""Which heads can be split; that each of them is split well is tested in families/test_every_family.py."""

from __future__ import annotations

import pytest
from torch import nn

from crosskd.models.heads import family_of
from deploy.errors import ConfigError


def test_an_unsupported_head_is_named_with_those_that_are_supported() -> None:
    with pytest.raises(ConfigError, match=r"cannot split the head Linear; it can split .*GFLHead"):
        family_of(nn.Linear(1, 1))
