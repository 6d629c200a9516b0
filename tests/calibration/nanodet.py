"""
Writes NanoDet-m, a detector that is not ours, as ONNX, as torch writes it, with the sidecar of a contract by hand.

    python tests/calibration/nanodet.py ../shared/data --slim -o nanodet.onnx

SOURCE.md beside the weights, in `weights` of that folder, describes the layers. Depthwise convolutions, channel
shuffles, Split, Concat, bilinear Resize and LeakyReLU: what ResNet detectors have not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import onnx
import onnxslim
import torch
import torchvision
from torch import nn
from torch.nn import functional

from deploy import adopt_onnx

SIDE_PX, CLASSES, BINS, STRIDES, CANDIDATES = 320, 80, 8, (8, 16, 32), 300


class Block(nn.Module):
    """Depthwise and pointwise convolution, each with norm and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False)
        self.dwnorm = nn.BatchNorm2d(96)
        self.pointwise = nn.Conv2d(96, 96, 1, bias=False)
        self.pwnorm = nn.BatchNorm2d(96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.leaky_relu(self.dwnorm(self.depthwise(x)), 0.1)
        return functional.leaky_relu(self.pwnorm(self.pointwise(x)), 0.1)


class NanoDet(nn.Module):
    """
    Network input -> boxes (1, K, 4) in its pixels, scores (1, K), labels (1, K).

    Or, raw, what its own exporter writes: for each point the scores of the classes and the logits of the bins,
    (1, 2100, 112), the levels one after the other.
    """

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.backbone = torchvision.models.shufflenet_v2_x1_0()
        del self.backbone.conv5, self.backbone.fc
        for parent in list(self.backbone.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.ReLU):
                    setattr(parent, name, nn.LeakyReLU(0.1))
        self.fpn = nn.Module()
        self.fpn.lateral_convs = nn.ModuleList(nn.Conv2d(channels, 96, 1) for channels in (116, 232, 464))
        self.head = nn.Module()
        self.head.cls_convs = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in STRIDES)
        self.head.gfl_cls = nn.ModuleList(nn.Conv2d(96, CLASSES + 4 * BINS, 1) for _ in STRIDES)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        x, maps = self.backbone.maxpool(self.backbone.conv1(image)), []
        for stage in (self.backbone.stage2, self.backbone.stage3, self.backbone.stage4):
            x = stage(x)
            maps.append(x)
        maps = [convolution(level) for convolution, level in zip(self.fpn.lateral_convs, maps, strict=True)]
        for level in (1, 0):  # top-down
            maps[level] = maps[level] + self.resized(maps[level + 1], maps[level])
        for level in (1, 2):  # bottom-up
            maps[level] = maps[level] + self.resized(maps[level - 1], maps[level])
        boxes, scores, all_rows = [], [], []
        for level, stride in enumerate(STRIDES):
            rows = self.head.gfl_cls[level](self.head.cls_convs[level](maps[level])).flatten(2).transpose(1, 2)
            scores.append(rows[..., :CLASSES].sigmoid())
            all_rows.append(torch.cat([scores[-1], rows[..., CLASSES:]], -1))
            bins = rows[..., CLASSES:].reshape(1, -1, 4, BINS).softmax(-1)
            left, top, right, bottom = ((bins * torch.arange(BINS)).sum(-1) * stride).unbind(-1)
            y, x = torch.meshgrid(*[(torch.arange(SIDE_PX // stride) + 0.5) * stride] * 2, indexing="ij")
            x, y = x.flatten(), y.flatten()
            boxes.append(torch.stack([x - left, y - top, x + right, y + bottom], -1))
        if self.raw:
            return torch.cat(all_rows, 1)
        best, index = torch.cat(scores, 1).flatten(1).topk(CANDIDATES)
        points = (index // CLASSES).unsqueeze(-1).expand(-1, -1, 4)
        return torch.cat(boxes, 1).gather(1, points), best, index % CLASSES

    @staticmethod
    def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(x, size=tuple(like.shape[-2:]), mode="bilinear", align_corners=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write NanoDet-m as ONNX, with its sidecar.")
    parser.add_argument("data", type=Path, help="folder with weights/ and coco_open/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--slim", action="store_true", help="simplify it with onnxslim: onnx then knows all shapes")
    parser.add_argument(
        "--raw", action="store_true", help="as its own exporter writes it, to be decoded by adopting it"
    )
    arguments = parser.parse_args()
    model = NanoDet(arguments.raw).eval()
    weights = arguments.data / "weights" / "nanodet_m_coco_torch_rgb.pth"
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        torch.onnx.export(
            model, (torch.zeros(1, 3, SIDE_PX, SIDE_PX),), str(arguments.output), dynamo=False, opset_version=17,
            input_names=["image"], output_names=["output"] if arguments.raw else ["boxes", "scores", "labels"],
        )  # fmt: skip
    if arguments.slim:
        onnx.save(onnxslim.slim(onnx.load(arguments.output)), arguments.output)
    annotations = arguments.data / "coco_open" / "annotations" / "instances_val.json"
    categories = json.loads(annotations.read_text())["categories"]
    contract = {
        "input_name": "image", "input_shape": [1, 3, SIDE_PX, SIDE_PX], "channel_order": "rgb",
        "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "pad_value": [0, 0, 0],
        "resize": "keep_ratio",
        "class_names": [category["name"] for category in categories],
        "category_ids": [category["id"] for category in categories],
        "score_threshold": 0.05, "nms_iou_threshold": 0.6, "max_detections": 100,
    }  # fmt: skip
    if arguments.raw:
        contract.update(decode="bins", output_parts=[["scores", "boxes"]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contract.json"
        path.write_text(json.dumps(contract))
        return adopt_onnx.main([str(arguments.output), "--contract", str(path)])


if __name__ == "__main__":
    sys.exit(main())
