"""
A detector that is not ours, trained on COCO: NanoDet-m, from torch to ONNX to INT8, with a contract written by hand.

Its SOURCE.md beside the weights describes the layers. Depthwise convolutions, channel shuffles, Split, Concat, bilinear
Resize and LeakyReLU: what ResNet detectors have not.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks import accuracy  # noqa: E402
from calibration import audit, quantize  # noqa: E402
from deploy import adopt_onnx  # noqa: E402
from deploy.contract import read_sidecar  # noqa: E402

pytestmark = [
    pytest.mark.shared,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's exporter
]

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
    """Network input -> boxes (1, K, 4) in its pixels, scores (1, K), labels (1, K)."""

    def __init__(self) -> None:
        super().__init__()
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

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, maps = self.backbone.maxpool(self.backbone.conv1(image)), []
        for stage in (self.backbone.stage2, self.backbone.stage3, self.backbone.stage4):
            x = stage(x)
            maps.append(x)
        maps = [convolution(level) for convolution, level in zip(self.fpn.lateral_convs, maps, strict=True)]
        for level in (1, 0):  # top-down
            maps[level] = maps[level] + self.resized(maps[level + 1], maps[level])
        for level in (1, 2):  # bottom-up
            maps[level] = maps[level] + self.resized(maps[level - 1], maps[level])
        boxes, scores = [], []
        for level, stride in enumerate(STRIDES):
            rows = self.head.gfl_cls[level](self.head.cls_convs[level](maps[level])).flatten(2).transpose(1, 2)
            scores.append(rows[..., :CLASSES].sigmoid())
            bins = rows[..., CLASSES:].reshape(1, -1, 4, BINS).softmax(-1)
            left, top, right, bottom = ((bins * torch.arange(BINS)).sum(-1) * stride).unbind(-1)
            y, x = torch.meshgrid(*[(torch.arange(SIDE_PX // stride) + 0.5) * stride] * 2, indexing="ij")
            x, y = x.flatten(), y.flatten()
            boxes.append(torch.stack([x - left, y - top, x + right, y + bottom], -1))
        best, index = torch.cat(scores, 1).flatten(1).topk(CANDIDATES)
        points = (index // CLASSES).unsqueeze(-1).expand(-1, -1, 4)
        return torch.cat(boxes, 1).gather(1, points), best, index % CLASSES

    @staticmethod
    def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(x, size=tuple(like.shape[-2:]), mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def nanodet(shared_dir, tmp_path_factory):
    """The detector as ONNX, as torch writes it, with the sidecar that a hand-written contract gives it."""
    data, folder = shared_dir / "data", tmp_path_factory.mktemp("nanodet")
    model = NanoDet().eval()
    weights = data / "weights" / "nanodet_m_coco_torch_rgb.pth"
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    path = folder / "nanodet.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model, (torch.zeros(1, 3, SIDE_PX, SIDE_PX),), str(path), dynamo=False, opset_version=17,
            input_names=["image"], output_names=["boxes", "scores", "labels"],
        )  # fmt: skip
    categories = json.loads((data / "coco_open" / "annotations" / "instances_val.json").read_text())["categories"]
    contract = {
        "input_name": "image", "input_shape": [1, 3, SIDE_PX, SIDE_PX], "channel_order": "rgb",
        "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "pad_value": [0, 0, 0],
        "resize": "keep_ratio", "output_names": ["boxes", "scores", "labels"],
        "class_names": [category["name"] for category in categories],
        "category_ids": [category["id"] for category in categories],
        "score_threshold": 0.05, "nms_iou_threshold": 0.6, "max_detections": 100,
    }  # fmt: skip
    (folder / "contract.json").write_text(json.dumps(contract))
    assert adopt_onnx.main([str(path), "--contract", str(folder / "contract.json")]) == 0
    return path


def ap_of(path, data):
    """AP on the first images of the test split."""
    output = path.with_suffix(".result.json")
    assert accuracy.main([str(path), "--data", str(data), "--limit", "16", "-o", str(output)]) == 0
    return json.loads(output.read_text())["numbers"]["AP"]


@pytest.fixture(scope="module")
def float_ap(nanodet, shared_dir):
    pytest.importorskip("faster_coco_eval")
    return ap_of(nanodet, shared_dir / "data" / "coco_open")


def test_int8_of_a_foreign_detector_detects(nanodet, float_ap, shared_dir, tmp_path, target, capsys):
    data, output = shared_dir / "data" / "coco_open", tmp_path / "nanodet.int8.onnx"
    words = [str(nanodet), "--data", str(data), "--num-images", "16", "--target", target, "-o", str(output)]
    assert quantize.main(words) == 0
    details = read_sidecar(output)["details"]
    assert details["float_convolutions"] == {f"/gfl_cls.{level}/Conv": "final prediction" for level in range(3)}
    assert len(details["quantized_convolutions"]) == 70
    assert audit.main([str(output)]) == 0
    assert "70 INT8, 0 weight-only, 3 float" in capsys.readouterr().out
    found = ap_of(output, data)
    assert float_ap > 0.2
    assert found == pytest.approx(float_ap, abs=0.05)  # 16 images: AP is coarse
    assert found != float_ap


def test_integer_kernels_run_all_but_the_predictions(nanodet, shared_dir, tmp_path):
    data, output = shared_dir / "data" / "coco_open", tmp_path / "nanodet.int8.onnx"
    words = [str(nanodet), "--data", str(data), "--num-images", "1", "--target", "onnxruntime", "-o", str(output)]
    assert quantize.main(words) == 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(output), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["QLinearConv"] == 70
    assert counts["QLinearLeakyRelu"] == 45  # the other 3 are read by the predictions, which are float
    assert counts["QLinearConcat"] == 16
    assert counts["Conv"] + counts["FusedConv"] == counts["LeakyRelu"] == 3
