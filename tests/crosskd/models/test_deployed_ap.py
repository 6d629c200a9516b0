"""AP of exported detectors of each head of the paper, trained for two epochs on real images, against mmdet's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ANCHORS = "anchor_generator=dict(type='AnchorGenerator', {}, strides=[4, 8, 16, 32, 64])"
SQUARES = ANCHORS.format("ratios=[1.0], octave_base_scale=8, scales_per_octave=1")
NINE = ANCHORS.format("ratios=[0.5, 1.0, 2.0], octave_base_scale=4, scales_per_octave=3")
CODER = "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds={})"
FOCAL = "loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)"
CENTERNESS = "loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)"
GIOU = "loss_bbox=dict(type='GIoULoss', loss_weight=2.0)"
HEADS = {
    "GFLHead": "",
    "RetinaHead": f"{NINE}, {CODER.format([1.0] * 4)}, {FOCAL}, loss_bbox=dict(type='L1Loss', loss_weight=1.0)",
    "ATSSHead": f"{SQUARES}, {CODER.format([0.1, 0.1, 0.2, 0.2])}, {FOCAL}, {GIOU}, {CENTERNESS}",
    "FCOSHead": f"strides=[4, 8, 16, 32, 64], center_sampling=True, norm_on_bbox=True, {FOCAL}, {GIOU}, {CENTERNESS}",
}
"""Type of head -> what its config says besides widths; none for the one that the base config has."""
CONFIG = """
_base_ = "{base}"
model = dict(
    type={detector!r},
    bbox_head=dict(
        _delete_=True, type={head!r}, num_classes=3, in_channels=96, feat_channels=96, stacked_convs=2,
        norm_cfg=dict(type="BN", requires_grad=True), {rest}),
    train_cfg=dict(_delete_=True, assigner={assigner}, allowed_border=-1, pos_weight=-1, debug=False),
)
"""
IOU = "dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1)"


def config_of(head: str, folder: Path) -> Path:
    base = ROOT / "configs" / "studies" / "bccd_student.py"
    if not HEADS[head]:
        return base
    path = folder / "head.py"
    assigner = IOU if head == "RetinaHead" else "dict(type='ATSSAssigner', topk=9)"
    detector = {"RetinaHead": "RetinaNet", "ATSSHead": "ATSS", "FCOSHead": "FCOS"}[head]
    path.write_text(CONFIG.format(base=base, detector=detector, head=head, rest=HEADS[head], assigner=assigner))
    return path


def run(*words: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("head", sorted(HEADS))
def test_ap_of_the_exported_detector_is_that_of_mmdet(head: str, tmp_path: Path, shared_dir: Path) -> None:
    data, run_dir, onnx = shared_dir / "data" / "bccd", tmp_path / "run", tmp_path / "model.onnx"
    run("crosskd.train", config_of(head, tmp_path), "--data", data, "-o", run_dir, "--epochs", "2")
    run("deploy.export", run_dir, "-o", onnx)
    aps = []
    for model in (run_dir, onnx):
        result = tmp_path / f"{model.name}.result.json"
        run("benchmarks.accuracy", model, "--data", data, "-o", result)
        aps.append(json.loads(result.read_text())["numbers"]["AP"])
    print(f"{head}: AP of mmdet {100 * aps[0]:.3f}, of ONNX Runtime {100 * aps[1]:.3f}")
    assert aps[0] > 0.01  # else there is nothing to compare
    assert aps[1] == pytest.approx(aps[0], abs=0.0005)
