"""Whatever torch.onnx writes of a small detector, adopted, gives the detections of torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest

from deploy import Detector
from deploy.adopt_onnx import main
from deploy.contract import load_contract
from deploy.runtime.output_values import generated_pictures
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import preprocess
from tests.stand_ins.detector import CONTRACT, SIZE_PX

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

CLASSES = 3
FIELDS = {
    "input_name": "images", "input_shape": [1, 3, SIZE_PX, SIZE_PX], "channel_order": "rgb", "mean": [120, 120, 120],
    "std": [60, 60, 60], "pad_value": [120, 120, 120], "resize": "keep_ratio", "class_names": ["a", "b", "c"],
    "category_ids": [1, 2, 3], "score_threshold": 0.05, "nms_iou_threshold": 0.6, "max_detections": 100,
    "box_format": "cxcywh",
}  # fmt: skip


class Net(torch.nn.Module):  # type: ignore
    """Centre boxes and scores, (N, 4 + C, K), with what exporters write in more than one way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4, 1), torch.nn.BatchNorm2d(8), torch.nn.SiLU())
        self.down = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU6())
        self.gate, self.norm = torch.nn.Linear(8, 8), torch.nn.GroupNorm(2, 8)
        self.boxes, self.scores = torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(8, CLASSES, 1)
        for norm in (self.stem[1], self.down[1]):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, images: Any) -> Any:
        fine = self.stem(images)
        fine = fine + torch.nn.functional.interpolate(self.down(fine), scale_factor=2.0, mode="nearest")
        fine = self.norm(fine * self.gate(fine.mean((2, 3))).sigmoid()[..., None, None])
        rows, columns = torch.meshgrid(torch.arange(fine.shape[2]), torch.arange(fine.shape[3]), indexing="ij")
        offset, size = self.boxes(fine).split(2, 1)
        middle = (torch.stack([columns, rows]) + 0.5) * 4 + offset
        return torch.cat([middle, size.exp() * 12, (3 * self.scores(fine)).sigmoid()], 1).flatten(2)


def _exported(path: Path, options: Dict[str, Any]) -> Path:
    example = (torch.zeros(1, 3, SIZE_PX, SIZE_PX),)
    torch.onnx.export(Net().eval(), example, str(path), input_names=["images"], output_names=["output0"], **options)
    return path


def _torch_detections(picture: np.ndarray) -> Any:
    prepared = preprocess(picture, CONTRACT)
    with torch.no_grad():
        rows = Net().eval()(torch.from_numpy(prepared.input))[0].T.numpy()
    middle, half = rows[:, :2], rows[:, 2:4] / 2
    outputs = {
        "boxes": np.repeat(np.concatenate([middle - half, middle + half], 1), CLASSES, 0)[None],
        "scores": rows[:, 4:].reshape(1, -1),
        "labels": np.tile(np.arange(CLASSES), len(rows))[None],
    }
    contract = dataclasses.replace(CONTRACT, class_names=("a", "b", "c"), category_ids=(1, 2, 3))
    return postprocess(outputs, contract, prepared)


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param({"dynamo": False, "opset_version": opset}, id=f"script{opset}") for opset in (17, 23)),
        pytest.param(
            {"dynamo": True, "verbose": False}, id="dynamo, unasked, with external data", marks=pytest.mark.slow
        ),
        *(
            pytest.param(
                {"dynamo": True, "opset_version": opset, "external_data": opset % 2 == 1, "verbose": False},
                id=f"dynamo{opset}",
                marks=pytest.mark.slow,
            )
            for opset in range(17, 24)
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_every_export_gives_the_detections_of_torch(tmp_path: Path, options: Dict[str, Any]) -> None:
    if options["dynamo"]:
        pytest.importorskip("onnxscript")
    (tmp_path / "contract.json").write_text(json.dumps(FIELDS))
    model = _exported(tmp_path / "net.onnx", options)
    assert main([str(model), "--contract", str(tmp_path / "contract.json")]) == 0
    adopted = tmp_path / "net.adopted.onnx"
    assert load_contract(adopted).class_names == ("a", "b", "c")
    assert not list(tmp_path.glob("net.adopted.onnx.data"))
    _name, picture = generated_pictures(100, 80)[0]
    expected = _torch_detections(picture)
    with Detector(adopted) as detector:
        found = detector(picture)
    assert len(expected.scores) > 20
    assert found.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=0.05)
