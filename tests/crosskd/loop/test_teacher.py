"""The check of a teacher: its AP on the pixels that it will get, a floor, and nothing changed by it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import TRANSFORMS
from mmengine.dataset import Compose
from mmengine.structures import InstanceData
from torch import Tensor

from crosskd.config import load_config, set_classes
from crosskd.data import TrainingData
from crosskd.loop.teacher import check_teacher
from crosskd.models.checkpoint import load_detector_weights
from crosskd.models.detector import detector_from_config
from crosskd.predict import predictor
from deploy.dataset import load_coco
from deploy.errors import ConfigError
from deploy.layouts import split_paths


@pytest.fixture
def data(shapes_dir: Path) -> TrainingData:
    """Eight images, here to validate on."""
    coco = load_coco(*split_paths(shapes_dir, "train"))
    assert len(coco.images) == 8
    return TrainingData(coco, coco)


@pytest.fixture
def config(configs: Path, data: TrainingData) -> Any:
    config = load_config(configs / "crosskd_tiny.py")
    set_classes(config, data.class_names)
    return config


@pytest.fixture
def detector(config: Any) -> Any:
    return detector_from_config(config, load_weights=False).train()


def _answer_truth(detector: Any, data: TrainingData, label_offset: int = 0, most: int | None = None) -> list[Any]:
    """Makes the teacher answer with the annotated boxes; returns the list of images and inputs that it gets."""
    images = {image.image_id: image for image in data.val.images}
    seen: list[Any] = []
    inputs: list[Tensor] = []

    def extract_feat(batch: Tensor) -> Any:
        inputs.append(batch)
        return type(detector.teacher).extract_feat(detector.teacher, batch)

    def predict_by_feat(*_outputs: Any, batch_img_metas: list[Any], rescale: bool) -> list[Any]:
        assert rescale
        image = images[batch_img_metas[0]["img_id"]]
        seen.append((image, inputs[-1]))
        boxes, labels = torch.tensor(image.boxes_xyxy)[:most], torch.tensor(image.labels)[:most]
        return [InstanceData(bboxes=boxes, labels=(labels + label_offset) % 6, scores=torch.ones(len(boxes)))]

    detector.teacher.extract_feat = extract_feat
    detector.teacher.bbox_head.predict_by_feat = predict_by_feat
    return seen


def test_the_ap_is_that_of_what_the_teacher_answers(
    config: Any, data: TrainingData, detector: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = _answer_truth(detector, data)
    assert check_teacher(config, detector, data) == {"teacher_ap": 100.0, "teacher_images": 8}
    captured = capsys.readouterr()
    assert captured.out == "teacher: AP 100.0, AP50 100.0 on 8 of 8 validation images\n"
    assert "warning" not in captured.err
    assert [image.image_id for image, _ in seen] == [image.image_id for image in data.val.images]
    _answer_truth(detector, data, most=1)  # one box of each image
    assert 0 < check_teacher(config, detector, data)["teacher_ap"] < 100


def test_a_slice_is_evenly_spread_and_counts_only_its_own_boxes(config: Any, data: TrainingData, detector: Any) -> None:
    seen = _answer_truth(detector, data)
    assert check_teacher(config, detector, data, images=3) == {"teacher_ap": 100.0, "teacher_images": 3}
    assert [image.image_id for image, _ in seen] == [data.val.images[number].image_id for number in (0, 2, 5)]
    with pytest.raises(ConfigError, match="checked on 0 images; expected at least 1"):
        check_teacher(config, detector, data, images=0)


@pytest.mark.parametrize("answers", ["other classes", "nothing"])
def test_a_teacher_that_knows_nothing_is_told(
    config: Any, data: TrainingData, detector: Any, capsys: pytest.CaptureFixture[str], answers: str
) -> None:
    _answer_truth(detector, data, **({"most": 0} if answers == "nothing" else {"label_offset": 1}))
    assert check_teacher(config, detector, data)["teacher_ap"] < 1
    assert "warning: a teacher that knows nothing" in capsys.readouterr().err
    message = r"AP 0\.\d, AP50 0\.\d on 8 of 8 validation images; expected at least 30 \(--min-teacher-ap\)"
    with pytest.raises(ConfigError, match=message):
        check_teacher(config, detector, data, min_teacher_ap=30)


def test_a_floor_that_is_reached_is_no_error(config: Any, data: TrainingData, detector: Any) -> None:
    _answer_truth(detector, data)
    assert check_teacher(config, detector, data, min_teacher_ap=100)["teacher_ap"] == 100


def test_without_boxes_there_is_no_ap(
    config: Any, data: TrainingData, detector: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in data.val.images:
        image.crowd[:] = True
    assert check_teacher(config, detector, data)["teacher_ap"] is None
    assert capsys.readouterr().out == "teacher: no AP on 8 of 8 validation images, which have no boxes\n"
    with pytest.raises(ConfigError, match=r"no AP on 8 of 8 .* expected at least 1 "):
        check_teacher(config, detector, data, min_teacher_ap=1)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_teacher_detects_what_it_detects_by_itself(
    config: Any, data: TrainingData, detector: Any, teacher_run: Path, dtype: torch.dtype | None
) -> None:
    load_detector_weights(detector.teacher, teacher_run / "detector.pth")
    alone = predictor(config, copy.deepcopy(detector.teacher))
    if dtype is not None:
        detector.prepare_teacher(dtype)
    head, found = detector.teacher.bbox_head, []

    def predict_by_feat(*outputs: Any, **kwargs: Any) -> Any:
        assert {level.dtype for levels in outputs for level in levels} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")
        found.extend(type(head).predict_by_feat(head, *outputs, **kwargs))
        return found[-1:]

    head.predict_by_feat = predict_by_feat
    check_teacher(config, detector, data)
    assert len(found) == 8
    for image, instances in zip(data.val.images, found, strict=True):
        boxes, scores, labels = alone(image)
        assert len(boxes) > 0
        if dtype == torch.bfloat16:  # many scores are nearly the same, so that rounding changes their order
            assert abs(instances.scores.max() - max(scores)) < 0.02 * max(scores)
        else:
            torch.testing.assert_close(instances.scores, torch.tensor(scores), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(instances.bboxes, torch.tensor(boxes), rtol=1e-3, atol=1e-2)
            assert instances.labels.tolist() == labels


@pytest.mark.parametrize("norm", ["the student's own", "another"])
def test_it_gets_the_pixels_of_the_training(config: Any, data: TrainingData, detector: Any, norm: str) -> None:
    from mmdet.models import DetDataPreprocessor

    if norm == "another":
        detector.teacher.data_preprocessor = DetDataPreprocessor([103.53, 116.28, 123.675], [1.0, 2.0, 3.0])
    seen = _answer_truth(detector, data)
    check_teacher(config, detector, data, images=1)
    ((image, inputs),) = seen
    pipeline = Compose(
        [TRANSFORMS.build(t) for t in config.val_dataloader.dataset.pipeline if t["type"] != "LoadAnnotations"]
    )
    loaded = pipeline({"img_path": str(image.path), "img_id": image.image_id})["inputs"]
    expected = detector.teacher.data_preprocessor({"inputs": [loaded]}, False)["inputs"]
    assert inputs.shape == (1, 3, 64, 96)
    torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-3)


def test_nothing_is_changed_by_the_check(
    config: Any, data: TrainingData, detector: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = detector.teacher.bbox_head

    def predict_by_feat(*args: Any, **kwargs: Any) -> Any:
        random.random(), np.random.random(), torch.rand(1)  # as a pipeline or a detector may
        return type(head).predict_by_feat(head, *args, **kwargs)

    head.predict_by_feat = predict_by_feat
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    modes = [module.training for module in detector.modules()]
    weights = {key: value.clone() for key, value in [*detector.named_parameters(), *detector.named_buffers()]}
    settings = str(config)
    check_teacher(config, detector, data, images=1)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert modes == [module.training for module in detector.modules()]
    after = dict([*detector.named_parameters(), *detector.named_buffers()])
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert settings == str(config)
    assert list(tmp_path.iterdir()) == []
