"""What holds for each of these heads: how it is split, whom its losses reach, and what they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mmengine import MessageHub

from crosskd.config import load_config
from crosskd.loop.amp import keep_losses_in_float32
from crosskd.models.checkpoint import state_for_classes
from crosskd.models.detector import CrossKDDetector
from crosskd.models.families.ddod import DDODFamily
from crosskd.models.families.tood import TOODFamily
from crosskd.models.families.vfnet import VFNetFamily
from crosskd.models.heads import LossCall, priors_of_maps

FAMILIES = {"tood": TOODFamily, "vfnet": VFNetFamily, "ddod": DDODFamily}
LAYERS, CLASSES = 3, 6
STRIDES = (8, 16, 32, 64, 128)
SIZES = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))
"""Height and width of the levels of random maps."""

pytestmark = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def first_epoch() -> Iterator[None]:
    """TOODHead asks mmengine's hub which epoch it is."""
    hub = MessageHub.get_current_instance()
    before = hub.runtime_info.get("epoch")
    hub.update_info("epoch", 0)
    yield
    hub.update_info("epoch", before)


@functools.cache
def _model(name: str, classes: int = CLASSES) -> Any:
    """mmdet's own config, made small. TOOD with a deformable convolution in its tower, as its larger configs have."""
    overrides = {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": 8,
        "model.backbone.init_cfg": None,
        "model.neck.in_channels": [8, 16, 32, 64],
        "model.neck.out_channels": 16,
        "model.bbox_head.in_channels": 16,
        "model.bbox_head.feat_channels": 16,
        "model.bbox_head.stacked_convs": LAYERS,
        "model.bbox_head.num_classes": classes,
        "model.bbox_head.norm_cfg": dict(type="GN", num_groups=4, requires_grad=True),
        **({"model.bbox_head.num_dcn": 1} if name == "tood" else {}),
    }
    return load_config(f"mmdet::{name}/{name}_r50_fpn_1x_coco.py", overrides).model


def _detector(name: str, method: str = "crosskd", split: int = 2) -> CrossKDDetector:
    detector = CrossKDDetector(_model(name), {"model": _model(name)}, {"method": method, "split": split}).train()
    assert type(detector.family) is FAMILIES[name]
    return detector


def _values(losses: dict[str, Any]) -> list[torch.Tensor]:
    return [value for part in losses.values() for value in (part if isinstance(part, list) else [part])]


def _distillation(losses: dict[str, Any]) -> dict[str, Any]:
    return {key: values for key, values in losses.items() if key.endswith("_kd")}


@pytest.mark.parametrize("split", range(LAYERS + 1))
def test_the_rest_of_a_head_equals_the_whole_head_bit_for_bit(name: str, split: int) -> None:
    detector = _detector(name)
    head = detector.teacher.bbox_head
    pyramid = tuple(torch.randn(2, 16, 32 >> level, 48 >> level) for level in range(5))
    with torch.no_grad(), detector.family.recorded_pass(head, split) as recorded:
        whole = head(pyramid)
    with torch.no_grad():
        rest = detector.family.rest_of_head(head, split)(recorded.taps)
    assert len(whole) == len(rest)
    for expected, found in zip(whole, rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("split", range(LAYERS + 1))
def test_cross_losses_train_the_layers_before_the_split_only(
    make_batch: Callable[..., Any], name: str, split: int
) -> None:
    detector = _detector(name, split=split)
    sum(_values(_distillation(detector.loss(*make_batch([2, 1]))))).backward()
    head = detector.student.bbox_head
    layers = [getattr(head, tower)[index] for tower in detector.family.towers for index in range(split)]
    for layer in layers:
        assert layer.conv.weight.grad.abs().sum() > 0
    before = {id(parameter) for layer in layers for parameter in layer.parameters()}
    assert all(parameter.grad is None for parameter in head.parameters() if id(parameter) not in before)
    assert all(conv.conv.weight.grad.abs().sum() > 0 for conv in detector.student.neck.fpn_convs[:3])
    assert all(parameter.grad is None for parameter in detector.teacher.parameters())


@pytest.mark.parametrize("boxes", [[2, 0], [0, 0], [1]])
def test_losses_and_gradients_are_finite(make_batch: Callable[..., Any], name: str, boxes: list[int]) -> None:
    """Images of 64 x 96 have levels of one position."""
    detector = _detector(name)
    losses = detector.loss(*make_batch(boxes))
    assert set(_distillation(losses)) == set(detector.family.default_weights) - {"loss_feat_kd"}
    assert all(torch.isfinite(value) for value in _values(losses))
    assert sum(losses["loss_cls_kd"]) > 0
    sum(_values(losses)).backward()
    gradients = [parameter.grad for parameter in detector.student.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("method", ["crosskd", "mimic"])
def test_a_copy_of_the_student_has_nothing_to_teach_it(make_batch: Callable[..., Any], name: str, method: str) -> None:
    detector = _detector(name, method)
    detector.student.eval().bbox_head.train()  # only a training head returns what its loss takes
    batch = make_batch([2, 1])

    def totals() -> dict[str, float]:
        losses = _distillation(detector.loss(*batch))
        # A cross entropy against itself is the entropy of its target.
        return {key: sum(values).item() for key, values in losses.items() if key != "loss_iou_kd"}

    assert all(total > 0.1 for total in totals().values())
    detector.teacher.load_state_dict(detector.student.state_dict())
    assert all(abs(total) < 1e-3 for total in totals().values())


def test_positive_rows_are_the_priors_inside_the_box(make_batch: Callable[..., Any], name: str) -> None:
    """Labels and maps are in the same order."""
    detector = _detector(name)
    inputs, samples = make_batch([0, 1])
    samples[1].gt_instances.bboxes[:] = torch.tensor([17.0, 9.0, 55.0, 47.0])
    samples[1].gt_instances.labels[:] = 3
    family, head = detector.family, detector.student.bbox_head
    with family.recorded_pass(head) as recorded, family.recorded_assignment(head) as calls:
        detector.student.loss(inputs, samples)
    labels, weights = (torch.cat([getattr(call, part) for call in calls]) for part in ("labels", "label_weights"))
    maps = recorded.outputs[0]
    priors = torch.cat(priors_of_maps(head, maps))
    image = torch.cat([torch.arange(2).repeat_interleave(level[0, 0].numel()) for level in maps])
    positive = labels < CLASSES
    assert positive.sum() >= 5
    assert (labels[positive] == 3).all()
    assert (image[positive] == 1).all()
    centers = (priors[:, :2] + priors[:, -2:])[positive] / 2
    assert ((centers > torch.tensor([17.0, 9.0])) & (centers < torch.tensor([55.0, 47.0]))).all()
    assert (weights == 1).all()
    assert float(calls[0].avg_factor) >= positive.sum()


def test_nothing_is_left_behind_in_the_head_also_after_an_exception(name: str) -> None:
    detector = _detector(name)
    head = detector.student.bbox_head
    attributes = dict(head.__dict__)
    with pytest.raises(RuntimeError, match="on purpose"), detector.family.recorded_assignment(head):
        raise RuntimeError("on purpose")
    assert head.__dict__ == attributes
    assert not any(module._forward_pre_hooks for module in head.modules())


def test_classes_are_chosen_by_name(name: str) -> None:
    known, wanted = tuple("abcdef"), ("e", "b")
    head = _detector(name).teacher.bbox_head
    prefix = f"{FAMILIES[name].predictor}."
    state = state_for_classes(head.state_dict(), prefix, known, wanted)
    model = _model(name, classes=2)
    smaller = CrossKDDetector(model, {"model": model}, {"method": "none"}).student.bbox_head.eval()
    smaller.load_state_dict(state)
    pyramid = tuple(torch.randn(1, 16, 16 >> level, 16 >> level) for level in range(5))
    with torch.no_grad():
        (classes, *others), (fewer, *same) = head(pyramid), smaller(pyramid)
    for maps, chosen in zip(classes, fewer, strict=True):
        torch.testing.assert_close(chosen, maps[:, [4, 1]])
    assert all(torch.equal(a, b) for one, two in zip(others, same, strict=True) for a, b in zip(one, two, strict=True))


def test_it_trains_in_bf16(make_batch: Callable[..., Any], name: str) -> None:
    detector = _detector(name)
    detector.prepare_teacher(torch.bfloat16)
    keep_losses_in_float32(detector.student.bbox_head)
    optimizer = torch.optim.SGD(detector.student.parameters(), 1e-4)
    layers = [getattr(detector.student.bbox_head, tower)[0].conv.weight for tower in detector.family.towers]
    before = [weight.detach().clone() for weight in layers]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector.loss(*make_batch([2, 1]))
        optimizer.zero_grad()
        sum(_values(losses)).backward()
        optimizer.step()
    assert all(torch.isfinite(value) for value in _values(losses))
    assert all(torch.isfinite(weight).all() for weight in layers)
    assert not any(torch.equal(weight, old) for weight, old in zip(layers, before, strict=True))


def _random_outputs(name: str) -> list[list[torch.Tensor]]:
    """In the order and the units of the head in eval mode."""
    classes, boxes, qualities = ([torch.randn(2, width, *size) for size in SIZES] for width in (CLASSES, 4, 1))
    if name == "tood":  # probabilities; corners in strides
        corners = [torch.cat([maps[:, :2], maps[:, :2] + maps[:, 2:].exp()], 1) for maps in boxes]
        return [[maps.sigmoid() for maps in classes], corners]
    if name == "vfnet":  # distances in pixels
        return [classes, [10 * maps.exp() for maps in boxes]]
    return [classes, boxes, qualities]


def _box_xyxy(name: str, values: np.ndarray, x: int, y: int, stride: int) -> np.ndarray:
    if name == "tood":
        return values * stride
    if name == "vfnet":
        return np.array([x, y, x, y]) * stride + values * [-1, -1, 1, 1]
    center = np.array([x, y]) * stride + 8 * stride * 0.1 * values[:2]  # the anchor is 8 strides wide
    size = 8 * stride * np.exp(0.2 * values[2:])
    return np.concatenate([center - size / 2, center + size / 2])


def _giou(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    outer = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    return inner / union - (outer - union) / outer


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def _entropy(probability: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -target * np.log(probability) - (1 - target) * np.log(1 - probability)


def test_the_losses_are_those_of_their_formulas(name: str) -> None:
    """Row by row in float64 numpy; some rows are ignored by the assignment, and some are positive."""
    factor = 5.0
    cross, teacher = _random_outputs(name), _random_outputs(name)
    calls = []
    for height, width in SIZES:
        rows = 2 * height * width
        calls.append(LossCall(torch.randint(0, 2 * CLASSES, (rows,)).clamp(max=CLASSES), torch.ones(rows), factor))
        calls[-1].label_weights[::3] = 0
    expected = {key: np.zeros(len(SIZES)) for key in FAMILIES[name].default_weights if key != "loss_feat_kd"}
    for level, (height, width) in enumerate(SIZES):
        for row, (n, y, x) in enumerate(np.ndindex(2, height, width)):
            mine, theirs = ([maps[level][n, :, y, x].double().numpy() for maps in maps_] for maps_ in (cross, teacher))
            probability, target = (one[0] if name == "tood" else _sigmoid(one[0]) for one in (mine, theirs))
            weight = float(calls[level].label_weights[row]) / factor
            loss = (_entropy(probability, target) * abs(probability - target)).sum()
            expected["loss_cls_kd"][level] += loss * weight
            boxes = [_box_xyxy(name, one[1], x, y, STRIDES[level]) for one in (mine, theirs)]
            expected["loss_reg_kd"][level] += (1 - _giou(*boxes)) * target.max() * weight
            if name == "ddod" and calls[level].labels[row] < CLASSES:
                entropy = _entropy(_sigmoid(mine[2]), _sigmoid(theirs[2])).sum()
                expected["loss_iou_kd"][level] += entropy / factor
    if name == "vfnet":  # its head calls its loss once
        parts = ([getattr(call, part) for call in calls] for part in ("labels", "label_weights"))
        calls = [LossCall(*map(torch.cat, parts), factor)]
    found = FAMILIES[name]().loss_by_outputs(cross, teacher, calls, _detector(name).teacher.bbox_head)
    assert set(found) == set(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-4, atol=1e-6)
