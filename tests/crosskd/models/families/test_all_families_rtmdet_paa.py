"""What holds for every head, of both RTMDet heads and of PAA: splitting, gradients, odd batches, methods, classes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd.config import load_config
from crosskd.loop.amp import keep_losses_in_float32
from crosskd.models.checkpoint import state_for_classes
from crosskd.models.detector import CrossKDDetector
from crosskd.models.families import paa, rtmdet  # noqa: F401  registers them
from crosskd.models.families.paa import skm
from crosskd.models.heads import family_of
from deploy.errors import ConfigError

LAYERS = 2
RTMDET = {
    "model.backbone": dict(widen_factor=0.0625, init_cfg=None),
    "model.neck": dict(in_channels=[16, 32, 64], out_channels=16),
    "model.bbox_head": dict(in_channels=16, feat_channels=16, num_classes=6),
}
PAA = {
    "model.backbone": dict(depth=18, base_channels=8, init_cfg=None),
    "model.neck": dict(in_channels=[8, 16, 32, 64], out_channels=16),
    "model.bbox_head": dict(
        in_channels=16, feat_channels=16, num_classes=6, stacked_convs=LAYERS, norm_cfg=dict(type="GN", num_groups=4)
    ),
}
HEADS = {
    "rtmdet": ("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", RTMDET),
    "rtmdet_with_objectness": ("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", RTMDET),
    "paa": ("mmdet::paa/paa_r50_fpn_1x_coco.py", PAA),
}
needs_sklearn = pytest.mark.skipif(skm is None, reason="PAA's target assignment needs scikit-learn")
CASES = [pytest.param(name, marks=[needs_sklearn] if name == "paa" else []) for name in HEADS]


@functools.cache
def _config(name: str) -> Any:
    return load_config(*HEADS[name])


def _model(name: str, head: dict[str, Any] | None = None) -> Any:
    model = copy.deepcopy(_config(name).model)
    if name == "rtmdet_with_objectness":  # the head without norms of its own at each level, with another activation
        for key in ("share_conv", "exp_on_reg"):
            del model.bbox_head[key]
        model.bbox_head.update(type="RTMDetHead", with_objectness=True, act_cfg=dict(type="ReLU"))
    model.bbox_head.update(head or {})
    return model


def _detector(name: str, **distill: Any) -> CrossKDDetector:
    distill = {"method": "crosskd", "split": 1, **distill}
    return CrossKDDetector(_model(name), {"model": _model(name)}, distill).train()


def _pyramid(head: nn.Module) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 16, 16 >> level, 24 >> level) for level in range(head.prior_generator.num_levels))


def _total(losses: dict[str, Any], suffix: str = "") -> Tensor:
    parts = [part if isinstance(part, list) else [part] for key, part in losses.items() if key.endswith(suffix)]
    return sum(value for values in parts for value in values)


@pytest.mark.parametrize("split", range(LAYERS + 1))
@pytest.mark.parametrize("name", HEADS)
def test_the_rest_of_a_head_equals_the_whole_head_bit_for_bit(name: str, split: int) -> None:
    head = _detector(name).teacher.bbox_head
    family = family_of(head)
    with torch.no_grad(), family.recorded_pass(head, split) as whole:
        head(_pyramid(head))
    with torch.no_grad():
        rest = family.rest_of_head(head, split)(whole.taps)
    assert len(rest) == len(whole.outputs) == (3 if name == "paa" else 2)
    for expected, found in zip(whole.outputs, rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("split", range(LAYERS + 1))
@pytest.mark.parametrize("name", CASES)
def test_cross_losses_reach_the_layers_before_the_split_and_none_behind_it(
    make_batch: Callable[..., Any], name: str, split: int
) -> None:
    detector = _detector(name, split=split)
    _total(detector.loss(*make_batch([3, 2])), "_kd").backward()
    head = detector.student.bbox_head
    for tower in (head.cls_convs, head.reg_convs):
        for layers in tower if isinstance(tower[0], nn.ModuleList) else [tower]:
            gradients = [layer.conv.weight.grad for layer in layers]
            reached = [gradient is not None and bool(gradient.abs().sum()) for gradient in gradients]
            assert reached == [index < split for index in range(LAYERS)]
    predictor = f"{family_of(head).predictor}."
    assert all(p.grad is None for key, p in head.named_parameters() if key.startswith(predictor))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in detector.student.neck.parameters())
    assert all(parameter.grad is None for parameter in detector.teacher.parameters())


@pytest.mark.parametrize("method", ["crosskd+pkd", "mimic"])
@pytest.mark.parametrize("boxes", [[3, 0], [0, 0], [2], [0]])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_finite(
    make_batch: Callable[..., Any], name: str, boxes: list[int], method: str
) -> None:
    detector = _detector(name, method=method)
    losses = detector.loss(*make_batch(boxes))
    expected = {"loss_cls_kd", "loss_reg_kd"} | ({"loss_iou_kd"} if name == "paa" else set())
    assert {key for key in losses if key.endswith("_kd")} - {"loss_feat_kd"} == expected
    assert all(len(losses[key]) == detector.student.bbox_head.prior_generator.num_levels for key in expected)
    total = _total(losses)
    assert torch.isfinite(total)
    assert _total(losses, "cls_kd") > 0
    assert _total(losses, "reg_kd") > 0
    total.backward()
    gradients = [p.grad for p in detector.student.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_mimicking_reaches_the_students_own_predictors(make_batch: Callable[..., Any], name: str) -> None:
    detector = _detector(name, method="mimic")
    _total(detector.loss(*make_batch([3, 2])), "_kd").backward()
    head = detector.student.bbox_head
    predictor = f"{family_of(head).predictor}."
    weights = [p for key, p in head.named_parameters() if key.startswith(predictor)]
    assert weights
    assert all(p.grad.abs().sum() > 0 for p in weights)


@pytest.mark.parametrize("method", ["crosskd", "mimic"])
@pytest.mark.parametrize("name", CASES)
def test_under_a_copy_of_itself_the_student_has_nothing_to_learn(
    make_batch: Callable[..., Any], name: str, method: str
) -> None:
    detector = _detector(name, method=method)
    detector.teacher.load_state_dict(detector.student.state_dict())
    detector.student.eval()  # with running statistics, as the teacher
    batch = make_batch([3, 2])
    same = detector.loss(*batch)
    for module in detector.student.neck.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    other = detector.loss(*batch)
    # Not quite zero: 1e-6 is added to deviations, and an IoU that an untrained PAA predicts has the entropy of a coin.
    for key in ("loss_cls_kd", "loss_reg_kd"):
        assert 0 <= sum(same[key]).item() < 0.01 * sum(other[key]).item()


@pytest.mark.parametrize("name", HEADS)
def test_classes_chosen_by_name_keep_the_heads_outputs(name: str) -> None:
    known, wanted = tuple("abcdef"), ("d", "new", "a")
    whole = _detector(name).teacher
    fewer = CrossKDDetector(_model(name, {"num_classes": 3}), {}, {"method": "none"}).student.eval()
    predictor = f"bbox_head.{family_of(whole.bbox_head).predictor}."
    fewer.load_state_dict(state_for_classes(whole.state_dict(), predictor, known, wanted))
    pyramid = _pyramid(whole.bbox_head)
    with torch.no_grad():
        before, after = whole.bbox_head(pyramid), fewer.bbox_head(pyramid)
    for expected, found in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(found[:, [0, 2]], expected[:, [3, 0]])
        assert found[:, 1].max() < -8
    for expected, found in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_a_prepared_teacher_predicts_the_same(name: str) -> None:
    """RTMDet's levels share convolutions and have BatchNorms of their own: each needs a convolution to go into."""
    teacher = _detector(name).teacher
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    detector = _detector(name)
    detector.teacher.load_state_dict(teacher.state_dict())
    detector.prepare_teacher()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = (one.bbox_head(one.extract_feat(images)) for one in (teacher, detector.teacher))
    for maps, others in zip(expected, found, strict=True):
        for level, other in zip(maps, others, strict=True):
            torch.testing.assert_close(other, level, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_few_steps_in_bf16(make_batch: Callable[..., Any], name: str) -> None:
    detector = _detector(name)
    detector.prepare_teacher(torch.bfloat16)
    keep_losses_in_float32(detector.student.bbox_head)
    optimiser = torch.optim.SGD(detector.student.parameters(), lr=0.01)
    batch, totals = make_batch([3, 2]), []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = _total(detector.loss(*batch))
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(detector.student.parameters(), 10.0, error_if_nonfinite=True)
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("name", ["rtmdet", "paa"])
def test_a_tap_before_an_activation_is_for_relu_only(name: str) -> None:
    head = _detector(name).teacher.bbox_head
    family = family_of(head)
    if name == "paa":
        with family.recorded_pass(head, 1, before_activation=True) as recorded:
            head(_pyramid(head))
        assert recorded.taps[0][0].min() < 0
    else:  # SiLU would have to be made up for in the rest of the head
        with (
            pytest.raises(ConfigError, match=r"before_activation.*SiLU"),
            family.recorded_pass(head, 1, before_activation=True),
        ):
            head(_pyramid(head))
