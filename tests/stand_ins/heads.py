"""Each head that can be distilled and exported, as mmdet configures it, on a network small enough for tests."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from crosskd.config import load_config

TINY = Path(__file__).parents[1] / "crosskd" / "configs" / "gfl_tiny.py"
CLASSES = 6
CHANNELS = 16

RTMDET = "rtmdet/rtmdet_tiny_8xb32-300e"
WITHOUT_SEPARATE_NORMS = {"type": "RTMDetHead", "with_objectness": True, "share_conv": None, "exp_on_reg": None}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "GFLHead": ("gfl/gfl_r50_fpn_1x", {}),
    "RetinaHead": ("retinanet/retinanet_r18_fpn_1x", {}),
    "ATSSHead": ("atss/atss_r50_fpn_1x", {}),
    "FCOSHead": ("fcos/fcos_r50-caffe_fpn_gn-head_1x", {}),
    "FCOSHead, normed": ("fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x", {}),
    "PAAHead": ("paa/paa_r50_fpn_1x", {"score_voting": False}),
    "DDODHead": ("ddod/ddod_r50_fpn_1x", {}),
    "TOODHead": ("tood/tood_r50_fpn_1x", {}),
    "TOODHead, anchors": ("tood/tood_r50_fpn_anchor-based_1x", {}),
    "TOODHead, dcn": ("tood/tood_r50_fpn_1x", {"num_dcn": 1}),
    "VFNetHead": ("vfnet/vfnet_r50_fpn_1x", {}),
    "RTMDetSepBNHead": (RTMDET, {}),
    "RTMDetHead": (RTMDET, WITHOUT_SEPARATE_NORMS),
}
"""Type of head, and what is special about it -> mmdet's config, changes to its head; None takes a key away."""


def small_config(name: str, levels: int, layers: int, **head: Any) -> Any:
    """
    The tiny config with the head `name` of HEADS, 96 x 64 pixels.

    Args:
        levels: of the pyramid, the finest of stride 8.
        layers: of each of the head's towers.
        head: more changes to the head.
    """
    config, published = copy.deepcopy(_loaded(TINY)), _loaded(f"mmdet::{HEADS[name][0]}_coco.py").model
    changed = {**published.bbox_head, **HEADS[name][1]}
    norm = {"type": "BN"} if changed["type"] == "RTMDetSepBNHead" else {"type": "GN", "num_groups": 4}
    changed.update(
        in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=layers, num_classes=CLASSES, norm_cfg=norm
    )
    if changed["type"] == "VFNetHead":  # its default has five levels
        anchors = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1}
        changed["anchor_generator"] = {**anchors, "center_offset": 0.0, "strides": []}
    strides = [8 << level for level in range(levels)]
    for part in (changed, changed.get("anchor_generator", {})):
        if "strides" in part:
            part["strides"] = strides
    for part in ("bbox_head", "train_cfg", "test_cfg"):
        config.model.pop(part)
    config.model.update(train_cfg=published.get("train_cfg"), test_cfg=published.test_cfg)
    changed = {key: value for key, value in {**changed, **head}.items() if value is not None}
    config.merge_from_dict({"model.bbox_head": changed})
    config.model.neck.update(start_level=1, num_outs=levels)
    return config


def small_model(name: str, levels: int, layers: int, **head: Any) -> Any:
    """The model of `small_config`, without norms in its neck: BatchNorm cannot be trained on a level of one place."""
    model = small_config(name, levels, layers, **head).model
    model.neck.norm_cfg = None
    return model


def small_head(name: str, levels: int, layers: int, **head: Any) -> Any:
    """That head alone, in training mode, with random weights."""
    from mmdet.registry import MODELS

    model = small_config(name, levels, layers, **head).model
    return MODELS.build(dict(model.bbox_head, train_cfg=model.train_cfg, test_cfg=model.test_cfg)).train()


_loaded = functools.cache(load_config)
