"""Splitting a head: the part after the tap is the head itself, bit for bit, and nothing is left behind in it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crosskd.config import load_config
from crosskd.models.detector import CrossKDDetector
from crosskd.models.heads import FAMILIES, LossCall, family_of
from deploy.errors import ConfigError

LAYERS = 2  # of the towers of the tiny head
GFL = FAMILIES["GFLHead"]


def _pyramid() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 16, 32 >> level, 48 >> level) for level in range(5))


def _hooks(head: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in head.modules())


@pytest.mark.parametrize("norm", ["BN", "GN"])
@pytest.mark.parametrize("split", range(LAYERS + 1))
def test_the_rest_of_a_head_equals_the_whole_head_bit_for_bit(build: Callable[..., Any], split: int, norm: str) -> None:
    norm_cfg = dict(type="BN") if norm == "BN" else dict(_delete_=True, type="GN", num_groups=4)
    head = build("gfl_tiny.py", {"model.bbox_head.norm_cfg": norm_cfg}).bbox_head.eval()
    pyramid = _pyramid()
    with torch.no_grad(), GFL.recorded_pass(head, split) as recorded:
        whole = head(pyramid)
    with torch.no_grad():
        rest = GFL.rest_of_head(head, split)(recorded.taps)
    assert all(a is b for a, b in zip(recorded.features, pyramid, strict=True))
    assert all(a is b for a, b in zip(recorded.outputs, whole, strict=True))
    for expected, found in zip(whole, rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("split", range(LAYERS + 1))
def test_aligned_taps_pass_a_relu_but_the_pyramid_does_not(build: Callable[..., Any], split: int) -> None:
    head = build("gfl_tiny.py").bbox_head.eval()
    taps = [(torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)) for _ in range(5)]
    with torch.no_grad():
        signed, positive = (
            GFL.rest_of_head(head, split)(pairs)
            for pairs in (taps, [tuple(tap.relu() for tap in pair) for pair in taps])
        )
    same = [
        torch.equal(a, b)
        for found, other in zip(signed, positive, strict=True)
        for a, b in zip(found, other, strict=True)
    ]
    assert all(same) if split else not any(same)


def test_taps_are_taken_after_the_activation_unless_told_otherwise(build: Callable[..., Any]) -> None:
    head = build("gfl_tiny.py").bbox_head
    pyramid = _pyramid()
    with GFL.recorded_pass(head, 1) as after:
        head(pyramid)
    with GFL.recorded_pass(head, 1, before_activation=True) as before:
        head(pyramid)
    assert len(after.taps) == len(before.taps) == 5
    for pair, other in zip(after.taps, before.taps, strict=True):
        for tap, signed in zip(pair, other, strict=True):
            assert signed.min() < 0  # a copy: the activation works in place
            torch.testing.assert_close(signed.relu(), tap)


def test_the_rest_shares_its_parameters_and_leaves_the_head_as_it_was(build: Callable[..., Any]) -> None:
    head = build("gfl_tiny.py").bbox_head
    towers = {tower: list(getattr(head, tower)) for tower in GFL.towers}
    keys = list(head.state_dict())
    rest = GFL.rest_of_head(head, 1)
    assert {id(p) for p in rest.parameters()} < {id(p) for p in head.parameters()}
    assert list(head.state_dict()) == keys
    for tower, layers in towers.items():
        assert all(a is b for a, b in zip(getattr(head, tower), layers, strict=True))
        assert getattr(rest, tower)[1] is layers[1]


@pytest.mark.parametrize("split", [0, 1])
def test_no_hook_is_left_behind_also_after_an_exception(build: Callable[..., Any], split: int) -> None:
    head = build("gfl_tiny.py").bbox_head
    before = _hooks(head)
    with GFL.recorded_pass(head, split), family_of(head).recorded_assignment(head):
        assert _hooks(head) > before
    assert _hooks(head) == before
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        GFL.recorded_pass(head, split),
        family_of(head).recorded_assignment(head),
    ):
        raise RuntimeError("on purpose")
    assert _hooks(head) == before


def test_recorded_assignment_has_the_weights_and_the_factor_of_each_level(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    detector = build("gfl_tiny.py")
    inputs, samples = make_batch([3, 2])
    with family_of(detector.bbox_head).recorded_assignment(detector.bbox_head) as calls:
        detector.loss(inputs, samples)
    sizes = [(16 >> level) * (24 >> level) for level in range(4)] + [1 * 2]
    assert [len(call.label_weights) for call in calls] == [2 * size for size in sizes]
    assert len({float(call.avg_factor) for call in calls}) == 1
    assert calls[0].avg_factor >= 2  # at least one anchor for each image


def test_the_losses_of_gfl_are_those_of_its_formulas() -> None:
    """Anchor by anchor in float64 numpy; some anchors are ignored by the assignment."""
    classes, bins, factor, sizes = 3, 17, 5.0, [(4, 6), (2, 3)]
    head = types.SimpleNamespace(cls_out_channels=classes, reg_max=bins - 1)
    cross, teacher = (
        tuple([torch.randn(2, width, *size) for size in sizes] for width in (classes, 4 * bins)) for _ in range(2)
    )
    calls = [
        LossCall(torch.zeros(rows), (torch.rand(rows) > 0.3).float(), factor)
        for rows in (2 * height * width for height, width in sizes)
    ]
    losses_cls, losses_reg, total = np.zeros(2), np.zeros(2), 0.0
    for level, (height, width) in enumerate(sizes):
        for row, (n, y, x) in enumerate(np.ndindex(2, height, width)):
            if not calls[level].label_weights[row]:
                continue
            mine, theirs = (
                [maps[level][n, :, y, x].double().numpy() for maps in outputs] for outputs in (cross, teacher)
            )
            probability, target = (1 / (1 + np.exp(-logits)) for logits in (mine[0], theirs[0]))
            entropy = -target * np.log(probability) - (1 - target) * np.log(1 - probability)
            losses_cls[level] += (entropy * abs(probability - target)).sum() / factor
            for side in range(4):
                p, q = (
                    np.exp(maps) / np.exp(maps).sum()
                    for maps in (one[1].reshape(4, bins)[side] for one in (theirs, mine))
                )
                losses_reg[level] += target.max() * (p * np.log(p / q)).sum()
            total += target.max()
    found = FAMILIES["GFLHead"].loss_by_outputs(cross, teacher, calls, head)
    np.testing.assert_allclose(found["loss_cls_kd"], losses_cls, rtol=1e-5)
    np.testing.assert_allclose(found["loss_reg_kd"], losses_reg / total, rtol=1e-5)


def test_an_unsupported_head_is_named_with_those_that_are_supported() -> None:
    with pytest.raises(ConfigError, match=r"cannot split the head Linear; it can split .*GFLHead"):
        family_of(nn.Linear(1, 1))


def test_localisation_distillation_against_numpy() -> None:
    """Row by row in float64: KL at temperature 10, times 100, mean over the bins, on positives only."""
    classes, bins = 3, 17
    head = types.SimpleNamespace(cls_out_channels=classes, num_classes=classes, reg_max=bins - 1)
    student, teacher = ([[torch.randn(2, width, 3, 4)] for width in (classes, 4 * bins)] for _ in range(2))
    labels = torch.randint(0, classes + 1, (24,))
    found = GFL.loss_ld(student, teacher, [LossCall(labels, torch.ones(24), 1.0)], head)
    loss, total = 0.0, 0.0
    for row, (n, y, x) in enumerate(np.ndindex(2, 3, 4)):
        if labels[row] == classes:
            continue
        confidence = 1 / (1 + np.exp(-student[0][0][n, :, y, x].double().numpy().max()))
        for side in range(4):
            p, q = (
                np.exp(maps / 10) / np.exp(maps / 10).sum()
                for maps in (
                    one[1][0][n, :, y, x].double().numpy().reshape(4, bins)[side] for one in (teacher, student)
                )
            )
            loss += confidence * (p * np.log(p / q)).mean() * 100 / 4
        total += confidence
    np.testing.assert_allclose(float(found[0]), loss / max(total, 1), rtol=1e-4)


@pytest.mark.parametrize("boxes", [[2, 0], [0, 0]])
@pytest.mark.parametrize("name", ["retinanet_r50_fpn_1x", "atss_r50_fpn_1x", "fcos_r50-caffe_fpn_gn-head_1x"])
def test_every_family_distils_with_and_without_boxes(
    make_batch: Callable[..., Any], name: str, boxes: list[int]
) -> None:
    """Parity is tested elsewhere, on batches with boxes; nothing published says what happens without."""
    model = load_config(
        f"mmdet::{name.split('_')[0]}/{name}_coco.py",
        {"model.backbone.depth": 18, "model.backbone.init_cfg": None, "model.neck.in_channels": [64, 128, 256, 512]},
    ).model
    detector = CrossKDDetector(model, {"model": model}, {"method": "crosskd", "split": 2}).train()
    losses = detector.loss(*make_batch(boxes))
    values = [value for part in losses.values() for value in (part if isinstance(part, list) else [part])]
    assert all(torch.isfinite(value) for value in values)
    sum(values).backward()
    gradients = [parameter.grad for parameter in detector.student.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if name.startswith("fcos") and not any(boxes):
        assert float(losses["loss_cls_kd"][0]) == 0.0
    else:
        assert sum(float(value) for value in losses["loss_cls_kd"]) > 0
