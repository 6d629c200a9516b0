"""CrossKDDetector: two plain mmdet detectors, of which one learns and the other stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd.config import load_config, set_classes
from crosskd.models.checkpoint import save_detector_weights
from crosskd.models.detector import CrossKDDetector, detector_from_config
from deploy.errors import CheckpointError, ConfigError

DISTILLED = {"loss_cls_kd", "loss_reg_kd"}


def _total(losses: dict[str, list[Tensor]]) -> Tensor:
    return sum(value for values in losses.values() for value in values)


def _step(detector: nn.Module, batch: tuple[Tensor, list[Any]]) -> dict[str, list[Tensor]]:
    losses = detector.loss(*batch)
    _total(losses).backward()
    return losses


def test_student_and_teacher_are_plain_mmdet_detectors(build: Callable[..., Any]) -> None:
    from mmdet.models.detectors import GFL

    detector = build()
    assert type(detector.student) is GFL
    assert type(detector.teacher) is GFL
    assert detector.student.state_dict().keys() == build("gfl_tiny.py").state_dict().keys()
    assert detector.teacher.backbone.base_channels == 16


def test_a_step_leaves_the_teacher_as_it_was(build: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    detector = build().train()
    before = {key: value.clone() for key, value in detector.teacher.state_dict().items()}
    optimiser = torch.optim.SGD(detector.parameters(), lr=0.1)
    _step(detector, make_batch([3, 2]))
    optimiser.step()
    assert detector.student.training
    assert not any(module.training for module in detector.teacher.modules())
    assert not any(parameter.requires_grad for parameter in detector.teacher.parameters())
    after = detector.teacher.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())  # running statistics are among them
    assert any("running_mean" in key for key in before)


def test_state_dict_leaves_the_teacher_out_and_comes_back(build: Callable[..., Any]) -> None:
    first, second = build(), build()
    state = first.state_dict()
    assert state.keys() == {f"student.{key}" for key in first.student.state_dict()}
    teacher = {key: value.clone() for key, value in second.teacher.state_dict().items()}
    second.load_state_dict(state, strict=True)
    assert all(torch.equal(second.state_dict()[key], value) for key, value in state.items())
    assert all(torch.equal(second.teacher.state_dict()[key], value) for key, value in teacher.items())
    with pytest.raises(RuntimeError, match="student"):  # only the teacher may be missing
        second.load_state_dict({key: value for key, value in state.items() if "gfl_cls" not in key}, strict=True)


def test_the_students_own_losses_are_those_without_a_teacher(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    detector = build()
    batch = make_batch([3, 2])
    losses, alone = detector.loss(*batch), detector.student.loss(*batch)
    assert losses.keys() == alone.keys() | DISTILLED
    for key, values in alone.items():
        torch.testing.assert_close(torch.stack(losses[key]), torch.stack(values))


def test_the_weights_scale_the_losses(build: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    plain = build(overrides={"model.distill.method": "crosskd+pkd", "model.distill.weights": {"loss_feat_kd": 1}})
    weights = {"loss_cls_kd": 2.0, "loss_reg_kd": 0.5, "loss_feat_kd": 3.0}
    weighted = build(overrides={"model.distill.method": "crosskd+pkd", "model.distill.weights": weights})
    published = build(overrides={"model.distill.method": "crosskd+pkd"})
    for other in (weighted, published):
        other.student.load_state_dict(plain.student.state_dict())
        other.teacher.load_state_dict(plain.teacher.state_dict())
    batch = make_batch([3, 2])
    base, found, default = (detector.loss(*batch) for detector in (plain, weighted, published))
    for key, factor, published_factor in (
        ("loss_cls_kd", 2, 1), ("loss_reg_kd", 0.5, 1), ("loss_feat_kd", 3, 6), ("loss_cls", 1, 1)
    ):  # fmt: skip
        torch.testing.assert_close(torch.stack(found[key]), factor * torch.stack(base[key]))
        torch.testing.assert_close(torch.stack(default[key]), published_factor * torch.stack(base[key]))
    assert sum(base["loss_feat_kd"]).item() > 0


@pytest.mark.parametrize("norm", ["the student's own", "other numbers", "another order"])
def test_the_teacher_sees_the_same_pixels(build: Callable[..., Any], norm: str) -> None:
    detector = build()
    mine = detector.student.data_preprocessor
    if norm != "the student's own":
        from mmdet.models import DetDataPreprocessor

        detector.teacher.data_preprocessor = DetDataPreprocessor(
            mean=[103.53, 116.28, 123.675], std=[1.0, 2.0, 3.0], bgr_to_rgb=norm == "other numbers"
        )
    pixels = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8) for _ in range(2)]
    inputs = mine({"inputs": pixels}, False)["inputs"]
    expected = detector.teacher.data_preprocessor({"inputs": pixels}, False)["inputs"]
    found = detector.teacher_inputs_from_student(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert (found is inputs) == (norm == "the student's own")


def test_predictions_are_the_students_own(build: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    detector = build().eval()
    nn.init.constant_(detector.student.bbox_head.gfl_cls.bias, 0)
    inputs, samples = make_batch([1])
    expected = detector.student.predict(inputs, samples)[0].pred_instances
    boxes, scores = expected.bboxes.clone(), expected.scores.clone()
    found = detector.predict(inputs, samples)[0].pred_instances
    assert len(scores) > 0
    assert torch.equal(found.bboxes, boxes)
    assert torch.equal(found.scores, scores)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("method", "kd", "model.distill.method is 'kd'; expected one of none, crosskd, pkd"),
        ("tap", "inside", "model.distill.tap is 'inside'; expected one of after_activation"),
        ("spilt", 1, "model.distill has the keys .*'spilt'"),
        ("weights", {"loss_cls_kd": "much"}, "model.distill.weights is .*'much'.*; expected numbers for some of"),
        ("weights", {"loss_cls": 1.0}, "model.distill.weights is .*; expected numbers for some of .*'loss_cls_kd'"),
        ("split", 3, "model.distill.split is 3; expected 0 to 2"),
    ],
)
def test_a_wrong_distill_entry_is_refused(build: Callable[..., Any], key: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(overrides={f"model.distill.{key}": value})


def test_missing_distill_entries_are_refused(build: Callable[..., Any], configs: Any) -> None:
    config = load_config(configs / "crosskd_tiny.py")
    del config.model.distill["split"]
    with pytest.raises(ConfigError, match=r"model.distill.split is missing; expected the number of a tower layer"):
        detector_from_config(config, load_weights=False)
    del config.model.distill["method"]
    with pytest.raises(ConfigError, match="expected method and, as wanted"):
        detector_from_config(config, load_weights=False)


def test_a_model_that_mmdet_cannot_build_is_a_config_error(build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be built: KeyError: 'invalid depth 17"):
        build("gfl_tiny.py", {"model.backbone.depth": 17})


def test_the_teachers_weights_come_from_its_checkpoint(build: Callable[..., Any], configs: Any, tmp_path: Any) -> None:
    teacher = build("gfl_tiny_teacher.py")
    save_detector_weights(teacher, tmp_path / "teacher.pth", meta={})
    config = load_config(configs / "crosskd_tiny.py", {"model.teacher.checkpoint": str(tmp_path / "teacher.pth")})
    detector = detector_from_config(config)
    assert isinstance(detector, CrossKDDetector)
    assert all(torch.equal(detector.teacher.state_dict()[key], value) for key, value in teacher.state_dict().items())
    config.model.teacher.checkpoint = None
    with pytest.raises(ConfigError, match="no teacher checkpoint; give --teacher-checkpoint"):
        detector_from_config(config)
    save_detector_weights(build("gfl_tiny.py"), tmp_path / "student.pth", meta={})
    config.model.teacher.checkpoint = str(tmp_path / "student.pth")
    with pytest.raises(CheckpointError, match="keys of another shape"):
        detector_from_config(config)


KEYS = {
    "none": set(),
    "crosskd": DISTILLED,
    "pkd": {"loss_feat_kd"},
    "crosskd+pkd": DISTILLED | {"loss_feat_kd"},
    "mimic": DISTILLED,
    "ld": {"loss_ld"},
}


@pytest.mark.parametrize("method", KEYS)
def test_each_method_adds_its_own_losses(
    build: Callable[..., Any], make_batch: Callable[..., Any], method: str
) -> None:
    detector = build(overrides={"model.distill.method": method})
    batch = make_batch([3, 2])
    losses = _step(detector, batch)
    assert losses.keys() == detector.student.loss(*batch).keys() | KEYS[method]
    assert all(torch.isfinite(value) for key in KEYS[method] for value in losses[key])
    assert all(sum(losses[key]) > 0 for key in KEYS[method])
    if method == "none":
        assert detector.teacher is None
    else:
        assert all(parameter.grad is None for parameter in detector.teacher.parameters())


WIDER = {
    "model.teacher.model.neck.out_channels": 24,
    "model.teacher.model.bbox_head.in_channels": 24,
    "model.teacher.model.bbox_head.feat_channels": 32,
}


@pytest.mark.parametrize("split", [0, 1])
def test_a_teacher_of_another_width_and_depth_teaches_through_adapters(
    build: Callable[..., Any], make_batch: Callable[..., Any], configs: Any, split: int
) -> None:
    config = load_config(configs / "crosskd_tiny.py")
    config.merge_from_dict(
        {
            **WIDER,
            "model.teacher.model.bbox_head.stacked_convs": 3,
            "model.distill": {"method": "crosskd+pkd", "split": split},
        }
    )
    detector = detector_from_config(config, load_weights=False).train()
    losses = _step(detector, make_batch([3, 2]))
    assert all(torch.isfinite(value) for key in KEYS["crosskd+pkd"] for value in losses[key])
    adapters = [*detector.tap_adapters, detector.feature_adapter]
    assert [tuple(adapter.weight.shape[:2]) for adapter in adapters] == [(32, 16), (32, 16), (24, 16)]
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in adapters)
    # They are part of what a run resumes from, and no part of the student.
    assert {key.split(".")[0] for key in detector.state_dict()} == {"student", "tap_adapters", "feature_adapter"}


def test_adapters_leave_the_students_first_weights_as_they_are(build: Callable[..., Any], configs: Any) -> None:
    states = []
    for overrides in ({}, WIDER):
        config = load_config(configs / "crosskd_tiny.py")
        config.merge_from_dict(overrides)
        torch.manual_seed(0)
        states.append(detector_from_config(config, load_weights=False).student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_tap_before_the_activation_gives_other_losses(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    after = build()
    before = build(overrides={"model.distill.tap": "before_activation"})
    before.student.load_state_dict(after.student.state_dict())
    before.teacher.load_state_dict(after.teacher.state_dict())
    batch = make_batch([3, 2])
    one, other = after.loss(*batch), before.loss(*batch)
    torch.testing.assert_close(torch.stack(one["loss_cls"]), torch.stack(other["loss_cls"]))
    assert not torch.allclose(torch.stack(one["loss_cls_kd"]), torch.stack(other["loss_cls_kd"]))


def test_a_prepared_teacher_teaches_the_same(build: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    detector = build(overrides={"model.distill.method": "crosskd+pkd"})
    for module in detector.teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    detector.student.eval()
    batch = make_batch([3, 2])
    expected = detector.loss(*batch)
    detector.prepare_teacher()
    found = detector.loss(*batch)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.teacher.modules())
    assert not any(parameter.requires_grad for parameter in detector.teacher.parameters())
    for key in KEYS["crosskd+pkd"]:
        torch.testing.assert_close(torch.stack(found[key]), torch.stack(expected[key]), rtol=1e-4, atol=1e-6)
    detector.prepare_teacher(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        quick = detector.loss(*batch)
    for key in KEYS["crosskd+pkd"]:
        torch.testing.assert_close(sum(quick[key]), sum(expected[key]), rtol=0.05, atol=1e-4)


def test_a_teacher_that_knows_more_classes_in_another_order_is_matched_by_name(
    build: Callable[..., Any], make_batch: Callable[..., Any], configs: Any, tmp_path: Any
) -> None:
    known = ("ring", "house", "square", "triangle", "circle", "cross", "star")
    wanted = ("circle", "triangle", "square", "star", "ring", "cross")
    teacher = build("gfl_tiny_teacher.py", {"model.bbox_head.num_classes": len(known)}).eval()
    save_detector_weights(teacher, tmp_path / "teacher.pth", meta={"dataset_meta": {"classes": known}})
    overrides = {"model.teacher.checkpoint": str(tmp_path / "teacher.pth")}
    config = load_config(configs / "crosskd_tiny.py", overrides)
    set_classes(config, wanted)
    matched = detector_from_config(config, class_names=wanted).teacher
    inputs = make_batch([1])[0]
    with torch.no_grad():
        (all_scores, all_boxes), (scores, boxes) = (one._forward(inputs) for one in (teacher, matched.eval()))
    for level, everything in enumerate(all_scores):
        torch.testing.assert_close(scores[level], everything[:, [known.index(name) for name in wanted]])
        torch.testing.assert_close(boxes[level], all_boxes[level])


def test_a_teacher_that_lacks_classes_is_refused_unless_that_is_wanted(
    build: Callable[..., Any], make_batch: Callable[..., Any], configs: Any, tmp_path: Any
) -> None:
    known, wanted = ("circle", "triangle", "square", "star", "ring"), ("circle", "heart", "square", "star", "cross")
    teacher = build("gfl_tiny_teacher.py", {"model.bbox_head.num_classes": 5})
    save_detector_weights(teacher, tmp_path / "teacher.pth", meta={"CLASSES": known})
    config = load_config(configs / "crosskd_tiny.py", {"model.teacher.checkpoint": str(tmp_path / "teacher.pth")})
    set_classes(config, wanted)
    with pytest.raises(CheckpointError, match=r"does not know the classes \['heart', 'cross'\]; it knows .*'ring'"):
        detector_from_config(config, class_names=wanted)
    config.model.distill.allow_missing_classes = True
    detector = detector_from_config(config, class_names=wanted)
    inputs, samples = make_batch([2])
    for sample in samples:
        sample.gt_instances.labels %= 5
    with torch.no_grad():
        scores = detector.teacher._forward(inputs)[0]
    assert all(level.sigmoid()[:, [1, 4]].max() < 1e-8 for level in scores)
    assert all(torch.isfinite(value) for values in detector.loss(inputs, samples).values() for value in values)


def test_a_timm_teacher_computes_the_same_once_prepared(configs: Any) -> None:
    backbone = dict(_delete_=True, type="TimmBackbone", model="mobilenetv4_conv_small_050", out_indices=(1, 2, 3, 4))
    teacher = load_config(configs / "gfl_tiny.py", {"model.backbone": backbone, "model.neck.in_channels": "backbone"})
    config = load_config(configs / "crosskd_tiny.py")
    config.model.teacher.model = teacher.model
    detector = detector_from_config(config, load_weights=False).train()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = detector.teacher.extract_feat(images)
        detector.prepare_teacher()
        after = detector.teacher.extract_feat(images)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
