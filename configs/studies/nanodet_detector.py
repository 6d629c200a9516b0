"""
NanoDet-m as an mmdet detector, for the configs beside: ShuffleNetV2, PAN, and a light GFL head with a tower for each
level, which both tasks share (https://github.com/RangiLyu/nanodet, v0.1.0, Apache-2.0).

    python -m configs.studies.nanodet_detector nanodet_m_coco_torch_rgb.pth -o nanodet.pth  # its weights, by our names
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from crosskd.models.checkpoint import state_of_checkpoint
from crosskd.models.families.gfl import GFLFamily
from crosskd.models.heads import register_family
from deploy.errors import command
from deploy.files import replacing

from mmcv.cnn import DepthwiseSeparableConvModule  # isort: skip  after crosskd, which serves what it asks for
from mmdet.datasets import CocoDataset  # isort: skip
from mmdet.models.dense_heads import GFLHead  # isort: skip
from mmdet.registry import MODELS  # isort: skip
from mmengine.model import BaseModule  # isort: skip

SLOPE = 0.1
KEYS = {
    "fpn.": "neck.", "head.": "bbox_head.", ".depthwise.": ".depthwise_conv.conv.", ".dwnorm.": ".depthwise_conv.bn.",
    ".pointwise.": ".pointwise_conv.conv.", ".pwnorm.": ".pointwise_conv.bn.",
}  # fmt: skip
"""What the weights' names have -> what ours have there."""


@MODELS.register_module()
class NanoDetBackbone(BaseModule):
    """torchvision's ShuffleNetV2 with LeakyReLU, strides 8, 16 and 32; `width` is x1_0 as in NanoDet-m, or x0_5."""

    def __init__(self, width: str = "x1_0", init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        source = getattr(torchvision.models, f"shufflenet_v2_{width}")()
        for parent in list(source.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.ReLU):
                    setattr(parent, name, nn.LeakyReLU(SLOPE))
        self.conv1, self.maxpool = source.conv1, source.maxpool
        self.stage2, self.stage3, self.stage4 = source.stage2, source.stage3, source.stage4

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        level, levels = self.maxpool(self.conv1(images)), []
        for stage in (self.stage2, self.stage3, self.stage4):
            level = stage(level)
            levels.append(level)
        return tuple(levels)


@MODELS.register_module()
class NanoDetPAN(BaseModule):
    """1x1 convolutions, then top-down and bottom-up additions of bilinearly resized levels."""

    def __init__(self, in_channels: list[int], out_channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        maps = [convolution(level) for convolution, level in zip(self.lateral_convs, levels, strict=True)]
        last = len(maps) - 1
        pairs = [(level, level + 1) for level in reversed(range(last))] + [
            (level, level - 1) for level in range(1, last + 1)
        ]
        for to, source in pairs:
            size = tuple(maps[to].shape[-2:])
            maps[to] = maps[to] + functional.interpolate(maps[source], size=size, mode="bilinear", align_corners=False)
        return tuple(maps)


@MODELS.register_module()
class NanoDetHead(GFLHead):
    """GFL's head with a tower for each level, of depthwise separable convolutions, and one predictor for both tasks."""

    def _init_layers(self) -> None:
        levels = range(len(self.prior_generator.strides))
        self.cls_convs = nn.ModuleList(
            nn.ModuleList(
                DepthwiseSeparableConvModule(
                    self.in_channels if layer == 0 else self.feat_channels, self.feat_channels, 3, padding=1,
                    norm_cfg=self.norm_cfg, act_cfg=dict(type="LeakyReLU", negative_slope=SLOPE, inplace=False),
                )
                for layer in range(self.stacked_convs)
            )
            for _ in levels
        )  # fmt: skip
        self.channels = [self.cls_out_channels, 4 * (self.reg_max + 1)]
        self.gfl_cls = nn.ModuleList(nn.Conv2d(self.feat_channels, sum(self.channels), 1) for _ in levels)

    def forward(self, levels: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
        classes, sides = [], []
        for maps, tower, predictor in zip(levels, self.cls_convs, self.gfl_cls, strict=True):
            for layer in tower:
                maps = layer(maps)
            logits, distances = predictor(maps).split(self.channels, dim=1)
            classes.append(logits)
            sides.append(distances)
        return classes, sides


@register_family("NanoDetHead")
class NanoDetFamily(GFLFamily):
    """As GFL, with one tower, whose predictor gives classes and then the distributions of the sides."""

    towers = ("cls_convs",)

    def other_rows(self, head: Any) -> int:
        return int(head.channels[1])


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the weights of NanoDet-m under mmdet's names.")
    parser.add_argument("weights", help="nanodet_m_coco_torch_rgb.pth")
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args(argv)
    state = state_of_checkpoint(arguments.weights)
    for old, new in KEYS.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    with replacing(arguments.output) as temporary:
        torch.save(
            {"state_dict": state, "meta": {"dataset_meta": {"classes": CocoDataset.METAINFO["classes"]}}}, temporary
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
