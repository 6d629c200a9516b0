"""The model contract of mmdet's configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet")

from crosskd.config import load_config
from crosskd.models.contract import contract_from_config
from deploy.contract import ModelContract
from deploy.errors import ExportError

TINY = Path(__file__).parents[1] / "configs" / "gfl_tiny.py"


def _contract(config: Any, **size: Any) -> ModelContract:
    return contract_from_config(config, ["a"], [1], **size)


def _config_with(*transforms: dict[str, Any]) -> Any:
    config = load_config(TINY)
    config.test_dataloader.dataset.pipeline = [
        dict(type="LoadImageFromFile"), *transforms, dict(type="PackDetInputs"),
    ]  # fmt: skip
    return config


def test_the_contract_of_mmdets_pipelines() -> None:
    stretched = _contract(_config_with(dict(type="Resize", scale=(1333, 800), keep_ratio=False)))
    assert (stretched.resize, stretched.input_shape) == ("stretch", (1, 3, 800, 1344))
    assert stretched.resize_wh_px == (1333, 800)  # the rest of the input is padding
    padded = _contract(
        _config_with(
            dict(type="Resize", scale=(640, 640), keep_ratio=True),
            dict(type="Pad", size=(640, 640), pad_val=dict(img=(1, 2, 3))),
        )
    )
    assert padded.resize_wh_px is None
    assert (padded.resize, padded.pad_value) == ("keep_ratio", (3, 2, 1))  # the network takes red-green-blue
    for pad in (dict(size_divisor=64), dict(size_divisor=64, pad_val=114), dict(size_divisor=64, pad_val=dict(seg=9))):
        config = _config_with(dict(type="Resize", scale=(1333, 800), keep_ratio=True), dict(type="Pad", **pad))
        contract = _contract(config)
        assert contract.input_shape == (1, 3, 832, 1344)
        assert contract.pad_value == ((114,) * 3 if pad.get("pad_val") == 114 else (0,) * 3)
    config.model.data_preprocessor = dict(type="DetDataPreprocessor")
    bare = _contract(config)
    assert (bare.channel_order, bare.mean, bare.std) == ("bgr", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("transforms", "named"),
    [
        ([], "neither Resize nor FitResize"),
        ([dict(type="Resize", scale=(96, 64)), dict(type="RandomFlip", prob=0.5)], "RandomFlip.*cannot repeat"),
        ([dict(type="Resize", scale_factor=0.5)], "resizes to None; .* Give --size"),
        ([dict(type="Resize", scale=640)], "resizes to 640"),
    ],
)
def test_a_pipeline_that_deployment_cannot_repeat_is_refused(transforms: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ExportError, match=named):
        _contract(_config_with(*transforms))


def test_a_size_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ExportError, match=r"the network input is 96 x 72; expected multiples of 32. Give --size"):
        _contract(load_config(TINY), size_px=(96, 72))


def test_soft_nms_is_refused() -> None:
    config = load_config(TINY, {"model.test_cfg.nms.type": "soft_nms"})
    with pytest.raises(ExportError, match="'soft_nms'; deployment knows 'nms' only"):
        _contract(config)
