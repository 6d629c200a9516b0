"""The losses and gradients of the published implementation, for seeded weights, images and boxes (../shared/parity)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor

CONFIGS = {
    "crosskd_r18_gflv1_r50_fpn_1x_coco": "configs/crosskd_gfl_r18_r50_1x_coco.py",
    "crosskd_r50_gflv1_r101-2x-ms_fpn_1x_coco": "configs/crosskd_gfl_r50_r101_1x_coco.py",
    "crosskd_r18_retinanet_r50_fpn_1x_coco": "configs/crosskd_retinanet_r18_r50_1x_coco.py",
    "crosskd_r50_retinanet_r101_fpn_2x_coco": "configs/crosskd_retinanet_r50_r101_2x_coco.py",
    "crosskd_r50_retinanet_swint_fpn_1x_coco": "configs/crosskd_retinanet_r50_swint_1x_coco.py",
    "crosskd_r50_atss_r101_fpn_1x_coco": "configs/crosskd_atss_r50_r101_1x_coco.py",
    "crosskd_r50_fcos_r101-2x-ms_caffe_fpn_gn-head_2x_ms_coco": "configs/crosskd_fcos_r50_r101_2x_coco.py",
    "crosskd+pkd_r50_fcos_r101-2x-ms_caffe_fpn_gn-head_2x_ms_coco": "configs/crosskd_pkd_fcos_r50_r101_2x_coco.py",
    "crosskd+pkd_r50_gflv1_r101-2x-ms_fpn_1x_coco": "configs/crosskd_pkd_gfl_r50_r101_1x_coco.py",
}
ROOT = Path(__file__).parents[3]
LOSSES = Path(__file__).parents[4] / "shared" / "parity" / "losses.json"
ENTRIES = json.loads(LOSSES.read_text()) if LOSSES.is_file() else []


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The stored values were made with two threads; with one, the seeded weights are made with other roundings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def distillation_losses(entry: dict[str, Any], seeded: Any) -> tuple[torch.nn.Module, dict[str, list[Tensor]]]:
    from mmdet.structures import DetDataSample

    from crosskd.config import load_config
    from crosskd.models.detector import detector_from_config

    overrides = {"model.distill.split": entry["split"]} if entry.get("split") is not None else None
    config = load_config(ROOT / CONFIGS[entry["config"]], overrides)
    detector = detector_from_config(config, load_weights=False).train()
    seeded.fill(detector.student, entry["salt"] + "/student")
    seeded.fill(detector.teacher, entry["salt"] + "/teacher")
    images, boxes, labels = seeded.batch(entry["salt"], tuple(entry["size"]), entry["images"], 80, entry["most_boxes"])
    samples = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        shape = tuple(entry["size"])
        sample = DetDataSample(metainfo=dict(img_shape=shape, pad_shape=shape, batch_input_shape=shape))
        sample.gt_instances = InstanceData(bboxes=image_boxes, labels=image_labels)
        samples.append(sample)
    return detector, detector.loss(images, samples)


def expected_losses(entry: dict[str, Any]) -> dict[str, Tensor]:
    """The published losses under our keys: one spells a key otherwise, one has a key per level."""
    losses: dict[str, list[float]] = {}
    for key, values in entry["losses"].items():
        name = (
            "loss_feat_kd" if key.startswith("loss_feat_kd") else key.replace("losses_center_kd", "loss_centerness_kd")
        )
        losses.setdefault(name, []).extend(values)
    return {name: torch.tensor(values) for name, values in losses.items()}


@pytest.mark.shared
@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{e['config']}-{e['salt']}" for e in ENTRIES])
def test_losses_and_gradients_are_those_of_the_published_implementation(
    entry: dict[str, Any], shared_dir: Path
) -> None:
    spec = importlib.util.spec_from_file_location("seeded", shared_dir / "parity" / "seeded.py")
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)

    detector, losses = distillation_losses(entry, seeded)

    found = {key: torch.stack(value) if isinstance(value, list) else value[None] for key, value in losses.items()}
    expected = expected_losses(entry)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    sum(values.sum() for values in found.values()).backward()
    gradients = {name: p.grad for name, p in detector.student.named_parameters() if p.grad is not None}
    assert gradients.keys() == entry["gradients"].keys()
    assert all(parameter.grad is None for parameter in detector.teacher.parameters())
    for name, (norm, product) in entry["gradients"].items():
        gradient = gradients[name].double()
        probe = torch.randn(gradient.shape, generator=seeded.generator(name, "probe"))
        assert abs(float(gradient.norm()) - norm) <= 1e-3 * norm + 1e-9, name
        # The terms of an inner product cancel: its tolerance is that of the sum of their sizes.
        terms = gradient * probe
        assert abs(float(terms.sum()) - product) <= 1e-3 * float(terms.abs().sum()) + 1e-9, name


@pytest.mark.shared
def test_there_are_entries_to_compare_with(shared_dir: Path) -> None:
    assert {entry["config"] for entry in ENTRIES} == CONFIGS.keys()
