"""TOOD: a tap of many layers, two kinds of assignment, a BatchNorm that does not fuse, boxes that need float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mmengine import MessageHub

from crosskd.models.detector import CrossKDDetector
from crosskd.models.families.tood import TOODFamily
from deploy.errors import ConfigError
from tests.stand_ins.heads import small_model

INITIAL_EPOCHS = 4  # of mmdet's config


@pytest.fixture(autouse=True)
def set_epoch() -> Iterator[Callable[[int], None]]:
    hub = MessageHub.get_current_instance()
    before = hub.runtime_info.get("epoch")
    hub.update_info("epoch", 0)
    yield lambda epoch: hub.update_info("epoch", epoch)
    hub.update_info("epoch", before)


def _model(**head: Any) -> Any:
    return small_model("TOODHead", 5, 3, **head)


def _detector(student: Any, teacher: Any = None, split: int = 2, method: str = "crosskd") -> CrossKDDetector:
    distill = {"method": method, "split": split}
    return CrossKDDetector(student, {"model": teacher or student}, distill).train()


def _pyramid() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 16, 32 >> level, 48 >> level) for level in range(5))


@pytest.mark.parametrize("anchor_type", ["anchor_free", "anchor_based"])
@pytest.mark.parametrize("epoch", [0, INITIAL_EPOCHS])
def test_both_kinds_of_assignment_are_recorded(
    make_batch: Callable[..., Any], set_epoch: Callable[[int], None], epoch: int, anchor_type: str
) -> None:
    set_epoch(epoch)
    detector = _detector(_model(anchor_type=anchor_type))
    head = detector.student.bbox_head
    inputs, samples = make_batch([2, 0, 1])
    for sample in samples:  # large enough to have places inside
        sample.gt_instances.bboxes[:] = torch.tensor([10.0, 10.0, 80.0, 60.0])
    with detector.family.recorded_assignment(head) as calls:
        detector.student.loss(inputs, samples)
    assert [len(call.labels) for call in calls] == [3 * size for size in (8 * 12, 4 * 6, 2 * 3, 1 * 2, 1)]
    positive = sum(int((call.labels < 6).sum()) for call in calls)
    assert positive >= 2
    assert all(call.avg_factor == positive + 1 for call in calls)  # the image without boxes counts as one
    losses = detector.loss(inputs, samples)
    assert all(torch.isfinite(value) for values in losses.values() for value in values)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_tap_k_is_the_outputs_of_the_layers_up_to_k(split: int) -> None:
    head = _detector(_model()).teacher.bbox_head
    pyramid = _pyramid()
    with torch.no_grad(), TOODFamily().recorded_pass(head, split) as recorded:
        head(pyramid)
        for level, taps in zip(pyramid, recorded.taps, strict=True):
            assert len(taps) == split
            for layer, tap in zip(head.inter_convs, taps, strict=False):
                level = layer(level)
                assert torch.equal(tap, level)


def test_probabilities_of_zero_and_one_have_finite_losses_and_gradients(make_batch: Callable[..., Any]) -> None:
    detector = _detector(_model(), method="mimic")
    for head, bias in ((detector.student.bbox_head, 200.0), (detector.teacher.bbox_head, -200.0)):
        torch.nn.init.constant_(head.tood_cls.bias, bias)
        torch.nn.init.constant_(head.cls_prob_module[-1].bias, bias)
    losses = detector.loss(*make_batch([1, 1]))
    total = sum(sum(losses[key]) for key in ("loss_cls_kd", "loss_reg_kd"))
    assert torch.isfinite(total)
    assert total > 10
    total.backward()
    gradients = [parameter.grad for parameter in detector.student.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_towers_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="stacked_convs is 2 in the student and 3 in the teacher"):
        _detector(_model(stacked_convs=2), _model(), split=1)


def test_another_width_is_adapted_to(make_batch: Callable[..., Any]) -> None:
    detector = _detector(_model(feat_channels=8), _model())
    assert [tuple(adapter.weight.shape) for adapter in detector.tap_adapters] == [(16, 8, 1, 1)] * 2
    sum(detector.loss(*make_batch([1, 1]))["loss_cls_kd"]).backward()
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in detector.tap_adapters)


def test_a_prepared_teacher_with_batch_norms_predicts_the_same() -> None:
    detector = _detector(_model(norm_cfg=dict(type="BN", requires_grad=True)))
    for module in detector.teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                torch.nn.init.uniform_(tensor, 0.5, 2.0)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = detector.teacher.bbox_head(detector.teacher.extract_feat(image))
        detector.prepare_teacher()
        after = detector.teacher.bbox_head(detector.teacher.extract_feat(image))
    assert not any(isinstance(layer.norm, torch.nn.BatchNorm2d) for layer in detector.teacher.bbox_head.inter_convs)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_boxes_are_sampled_in_float32_under_autocast() -> None:
    """bf16 has steps of half a stride among 64 to 128 strides from the corner."""
    detector = _detector(_model())
    detector.prepare_teacher(torch.bfloat16)
    head = detector.teacher.bbox_head
    boxes, offsets = 100 + torch.rand(1, 4, 5, 5), torch.zeros(1, 8, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head.deform_sampling(boxes, offsets), boxes)
