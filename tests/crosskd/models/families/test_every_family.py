"""What every family of heads must do: splitting, gradients, odd batches, each method, classes by name, bf16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mmengine import MessageHub
from torch import Tensor, nn

from crosskd.loop.amp import keep_losses_in_float32
from crosskd.models.checkpoint import state_for_classes
from crosskd.models.detector import CrossKDDetector
from crosskd.models.families.paa import call_by_level, skm
from crosskd.models.heads import FAMILIES, family_of, priors_of_maps
from deploy.errors import ConfigError
from tests.stand_ins.heads import CLASSES, HEADS, small_model

LAYERS = 3
BATCH_NORMS = "GFLHead, batch norms"
CHANGED = {
    BATCH_NORMS: ("GFLHead", {"norm_cfg": {"type": "BN"}}),
    "RTMDetHead": ("RTMDetHead", {"act_cfg": {"type": "ReLU"}}),
}
"""Name -> head of HEADS, and more changes to it."""
NAMES = [*HEADS, BATCH_NORMS]
THREE_OUTPUTS = ("ATSSHead", "FCOSHead", "PAAHead", "DDODHead")
needs_sklearn = pytest.mark.skipif(skm is None, reason="PAA's target assignment needs scikit-learn")
TRAINED = [pytest.param(name, marks=[needs_sklearn] if name == "PAAHead" else []) for name in NAMES]
every_head = pytest.mark.parametrize("name", NAMES)
every_trained_head = pytest.mark.parametrize("name", TRAINED)
every_split = pytest.mark.parametrize("split", range(LAYERS + 1))


@pytest.fixture(autouse=True)
def _first_epoch() -> Iterator[None]:
    """TOODHead asks mmengine's hub which epoch it is."""
    hub = MessageHub.get_current_instance()
    before = hub.runtime_info.get("epoch")
    hub.update_info("epoch", 0)
    yield
    hub.update_info("epoch", before)


@functools.cache
def _model(name: str, classes: int = CLASSES) -> Any:
    levels = 3 if name.startswith("RTMDet") else 5  # BatchNorm cannot be trained on a level of one place
    head, changes = CHANGED.get(name, (name, {}))
    return small_model(head, levels, LAYERS, num_classes=classes, **changes)


def _detector(name: str, **distill: Any) -> CrossKDDetector:
    distill = {"method": "crosskd", "split": 2, **distill}
    detector = CrossKDDetector(_model(name), {"model": _model(name)}, distill).train()
    assert type(detector.student.bbox_head).__name__ == name.partition(",")[0]
    if name == BATCH_NORMS:  # BatchNorm cannot be trained on a level of one place
        detector.student.bbox_head.apply(lambda module: module.eval() if isinstance(module, nn.BatchNorm2d) else None)
    return detector


def _head(name: str) -> Any:
    """In eval mode, as the teacher's."""
    return _detector(name).teacher.bbox_head


def _pyramid(head: nn.Module) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 16, 32 >> level, 48 >> level) for level in range(head.prior_generator.num_levels))


def _values(losses: dict[str, Any], suffix: str = "") -> list[Tensor]:
    parts = [part if isinstance(part, list) else [part] for key, part in losses.items() if key.endswith(suffix)]
    return [value for values in parts for value in values]


def _layers(head: nn.Module, split: int) -> list[nn.Module]:
    """Those of all towers before the split."""
    towers = [getattr(head, tower) for tower in family_of(head).towers]
    lists = [level for tower in towers for level in (tower if isinstance(tower[0], nn.ModuleList) else [tower])]
    return [layer for layers in lists for layer in layers[:split]]


def _equal(found: Any, expected: Any) -> bool:
    """Whether two outputs of a head are the same, bit for bit."""
    return all(
        torch.equal(a, b)
        for maps, others in zip(found, expected, strict=True)
        for a, b in zip(maps, others, strict=True)
    )


def test_every_family_is_among_them() -> None:
    own = {name for name, family in FAMILIES.items() if type(family).__module__.startswith("crosskd.")}
    assert {name.partition(",")[0] for name in NAMES} == own


# How a head is split


@every_split
@every_head
def test_the_rest_of_a_head_equals_the_whole_head_bit_for_bit(name: str, split: int) -> None:
    head = _head(name)
    family, pyramid = family_of(head), _pyramid(head)
    with torch.no_grad(), family.recorded_pass(head, split) as recorded:
        whole = head(pyramid)
    with torch.no_grad():
        rest = family.rest_of_head(head, split)(recorded.taps)
    assert all(a is b for a, b in zip(recorded.features, pyramid, strict=True))
    assert all(a is b for a, b in zip(recorded.outputs, whole, strict=True))
    assert len(rest) == len(whole) == (3 if name.startswith(THREE_OUTPUTS) else 2)
    assert _equal(rest, whole)


@every_split
@every_head
def test_aligned_taps_pass_a_relu_but_the_pyramid_does_not(name: str, split: int) -> None:
    head = _head(name)
    family = family_of(head)
    with torch.no_grad(), family.recorded_pass(head, split) as recorded:
        head(_pyramid(head))
    rest = family.rest_of_head(head, split)
    taps = [tuple(torch.randn_like(tap) for tap in level) for level in recorded.taps]
    with torch.no_grad():
        signed, positive = rest(taps), rest([tuple(tap.relu() for tap in level) for level in taps])
    same = [torch.equal(a, b) for kinds in zip(signed, positive, strict=True) for a, b in zip(*kinds, strict=True)]
    has_relu = name != "RTMDetSepBNHead"
    assert all(same) if split and has_relu else not any(same)


@every_head
def test_a_tap_before_an_activation_is_for_relu_only(name: str) -> None:
    head = _head(name)
    family, pyramid = family_of(head), _pyramid(head)
    if name == "RTMDetSepBNHead":  # SiLU would have to be made up for in the rest of the head
        message = r"before_activation.*SiLU"
        with pytest.raises(ConfigError, match=message), family.recorded_pass(head, 1, before_activation=True):
            head(pyramid)
        return
    with family.recorded_pass(head, 1) as after:
        head(pyramid)
    with family.recorded_pass(head, 1, before_activation=True) as before:
        head(pyramid)
    assert len(after.taps) == len(before.taps) == len(pyramid)
    for taps, others in zip(after.taps, before.taps, strict=True):
        for tap, signed in zip(taps, others, strict=True):
            assert signed.min() < 0  # a copy: the activation works in place
            torch.testing.assert_close(signed.relu(), tap)


@every_head
def test_the_rest_shares_its_parameters_and_leaves_the_head_as_it_was(name: str) -> None:
    head = _head(name)
    modules, keys = dict(head.named_modules()), list(head.state_dict())
    rest = family_of(head).rest_of_head(head, 1)
    assert {id(p) for p in rest.parameters()} < {id(p) for p in head.parameters()}
    behind = {id(layer) for layer in _layers(head, LAYERS)} - {id(layer) for layer in _layers(head, 1)}
    assert behind < {id(module) for module in rest.modules()}
    assert list(head.state_dict()) == keys
    assert list(map(id, dict(head.named_modules()).values())) == list(map(id, modules.values()))


@pytest.mark.parametrize("split", [0, 1])
@every_head
def test_nothing_is_left_behind_in_the_head_also_after_an_exception(name: str, split: int) -> None:
    head = _detector(name).student.bbox_head
    family = family_of(head)

    def state() -> tuple[Any, int]:
        return dict(head.__dict__), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in head.modules())

    before = state()
    with family.recorded_pass(head, split), family.recorded_assignment(head):
        assert state() != before
    assert state() == before
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        family.recorded_pass(head, split),
        family.recorded_assignment(head),
    ):
        raise RuntimeError("on purpose")
    assert state() == before


# Whom the losses reach


@every_split
@every_trained_head
def test_cross_losses_reach_the_layers_before_the_split_and_none_behind_it(
    make_batch: Callable[..., Any], name: str, split: int
) -> None:
    detector = _detector(name, split=split)
    sum(_values(detector.loss(*make_batch([3, 2])), "_kd")).backward()
    head = detector.student.bbox_head
    layers = _layers(head, split)
    for layer in layers:
        assert layer.conv.weight.grad.abs().sum() > 0
    before = {id(parameter) for layer in layers for parameter in layer.parameters()}
    assert all(parameter.grad is None for parameter in head.parameters() if id(parameter) not in before)
    assert all(layer.conv.weight.grad.abs().sum() > 0 for layer in detector.student.neck.fpn_convs[:3])
    assert all(parameter.grad is None for parameter in detector.teacher.parameters())


@every_trained_head
def test_mimicking_reaches_the_students_own_predictors(make_batch: Callable[..., Any], name: str) -> None:
    detector = _detector(name, method="mimic")
    sum(_values(detector.loss(*make_batch([3, 2])), "_kd")).backward()
    head = detector.student.bbox_head
    reached = {key: p.grad is not None and bool(p.grad.abs().sum() > 0) for key, p in head.named_parameters()}
    assert any(key.startswith(f"{family_of(head).predictor}.") for key in reached)
    # Nothing compares FCOS's centernesses; VFNet's coarse levels of one place may have only boxes without a gradient.
    left_out = {"FCOSHead": "conv_centerness.", "VFNetHead": "scales."}.get(name.partition(",")[0], "none")
    assert all(is_reached or key.startswith(left_out) for key, is_reached in reached.items())


@pytest.mark.parametrize("method", ["crosskd+pkd", "mimic"])
@pytest.mark.parametrize("boxes", [[3, 0], [0, 0], [2], [0]])
@every_trained_head
def test_losses_and_gradients_are_finite(
    make_batch: Callable[..., Any], name: str, boxes: list[int], method: str
) -> None:
    """Images of 64 x 96 have levels of one place."""
    detector = _detector(name, method=method)
    losses = detector.loss(*make_batch(boxes))
    expected = set(detector.family.default_weights) - {"loss_feat_kd", "loss_ld"}
    assert {key for key in losses if key.endswith("_kd")} - {"loss_feat_kd"} == expected
    assert ("loss_feat_kd" in losses) == (method == "crosskd+pkd")
    levels = 1 if name.startswith("FCOSHead") else detector.student.bbox_head.prior_generator.num_levels
    assert all(len(losses[key]) == levels for key in expected)
    assert all(torch.isfinite(value) for value in _values(losses))
    is_zero = name.startswith("FCOSHead") and not any(boxes)  # it has nothing to divide by
    for suffix in ("cls_kd", "reg_kd"):
        assert float(sum(_values(losses, suffix))) == 0 if is_zero else sum(_values(losses, suffix)) > 0
    sum(_values(losses)).backward()
    gradients = [parameter.grad for parameter in detector.student.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("method", ["crosskd", "mimic"])
@every_trained_head
def test_under_a_copy_of_itself_the_student_has_nothing_to_learn(
    make_batch: Callable[..., Any], name: str, method: str
) -> None:
    detector = _detector(name, method=method)
    detector.student.eval().bbox_head.train()  # with running statistics, as the teacher; its loss takes what it returns
    for module in detector.student.bbox_head.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    if name == "FCOSHead, normed":  # else some sides are 0, and no box overlaps an empty one, not even itself
        for head in (detector.student.bbox_head, detector.teacher.bbox_head):
            nn.init.constant_(head.conv_reg.bias, 2.0)
    batch = make_batch([3, 2])

    def totals() -> dict[str, float]:
        losses = detector.loss(*batch)
        # A cross entropy against itself is the entropy of its target.
        return {key: sum(losses[key]).item() for key in ("loss_cls_kd", "loss_reg_kd")}

    other = totals()
    detector.teacher.load_state_dict(detector.student.state_dict())
    same = totals()
    assert all(total > 0.1 for total in other.values())
    assert all(abs(total) < 1e-3 for total in same.values())


@every_trained_head
def test_it_trains_in_bf16(make_batch: Callable[..., Any], name: str) -> None:
    detector = _detector(name)
    detector.prepare_teacher(torch.bfloat16)
    keep_losses_in_float32(detector.student.bbox_head)
    step = 0.003 if name == "PAAHead" else 0.01  # PAA assigns anew after each step, and a large one shows in its losses
    optimizer = torch.optim.SGD(detector.student.parameters(), step)
    weights = [layer.conv.weight for layer in _layers(detector.student.bbox_head, 1)]
    before = [weight.detach().clone() for weight in weights]
    batch, totals = make_batch([3, 2]), []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector.loss(*batch)
        assert all(torch.isfinite(value) for value in _values(losses))
        total = sum(_values(losses))
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(detector.student.parameters(), 10.0, error_if_nonfinite=True)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


# What is recorded of the assignment


@every_trained_head
def test_positive_rows_are_the_priors_inside_the_box(make_batch: Callable[..., Any], name: str) -> None:
    """Labels and maps are in the same order."""
    detector = _detector(name)
    inputs, samples = make_batch([0, 1])
    samples[1].gt_instances.bboxes[:] = torch.tensor([17.0, 9.0, 55.0, 47.0])
    samples[1].gt_instances.labels[:] = 3
    family, head = detector.family, detector.student.bbox_head
    with family.recorded_pass(head) as recorded, family.recorded_assignment(head) as calls:
        detector.student.loss(inputs, samples)
    maps, kind = recorded.outputs[0], name.partition(",")[0]
    if kind == "PAAHead":
        calls = call_by_level(calls[0], [torch.zeros(2, 1, *level.shape[2:]) for level in maps])
    labels, weights = (torch.cat([getattr(call, part) for call in calls]) for part in ("labels", "label_weights"))
    rows = [level[0, 0].numel() * head.num_base_priors for level in maps]
    priors, image = (
        torch.cat(priors_of_maps(head, maps)),
        torch.cat([torch.arange(2).repeat_interleave(n) for n in rows]),
    )
    positive = labels < CLASSES
    assert (labels[positive] == 3).all()
    assert (image[positive] == 1).all()
    assert kind == "RetinaHead" or (weights == 1).all()
    # PAA and RTMDet choose by what the head predicts, RetinaNet by the overlap with an anchor.
    assert positive.sum() >= (1 if kind in ("PAAHead", "RTMDetHead", "RTMDetSepBNHead") else 5)
    if kind not in ("PAAHead", "RetinaHead"):
        centers = (priors[:, :2] + priors[:, -2:])[positive] / 2
        assert ((centers > torch.tensor([17.0, 9.0])) & (centers < torch.tensor([55.0, 47.0]))).all()
    if kind == "FCOSHead":  # the sum of the centernesses
        assert 0 < float(calls[0].avg_factor) < positive.sum()
    elif not kind.startswith("RTMDet"):  # which divides later
        assert float(calls[0].avg_factor) >= positive.sum()


# Teachers


@pytest.mark.parametrize("wanted", [("d", "new", "a"), ("e", "b")])
@every_head
def test_classes_are_chosen_by_name(name: str, wanted: tuple[str, ...]) -> None:
    known = "abcdef"
    head = _head(name)
    state = state_for_classes(head.state_dict(), f"{family_of(head).predictor}.", tuple(known), wanted)
    model = _model(name, len(wanted))
    fewer = CrossKDDetector(model, {"model": model}, {"method": "none"}).student.bbox_head.eval()
    fewer.load_state_dict(state)
    pyramid = _pyramid(head)
    with torch.no_grad():
        (classes, *others), (chosen, *same) = head(pyramid), fewer(pyramid)
    for before, after in zip(classes, chosen, strict=True):
        before, after = (maps.unflatten(1, (head.num_base_priors, -1)) for maps in (before, after))  # (N, A, C, H, W)
        for index, word in enumerate(wanted):
            if word in known:
                torch.testing.assert_close(after[:, :, index], before[:, :, known.index(word)])
            else:
                logits = after[:, :, index].logit() if name.startswith("TOODHead") else after[:, :, index]
                assert logits.max() < -8
    assert _equal(same, others)


@every_head
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
