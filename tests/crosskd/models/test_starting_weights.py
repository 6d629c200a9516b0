"""load_from: weights that fit are taken, class by class by name; others are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd.models.checkpoint import save_detector_weights
from crosskd.models.starting_weights import FileInit, start_from_checkpoint
from deploy.errors import CheckpointError

NAMES = ("a", "b", "c")
LAYER = "bbox_head.gfl_cls"


@pytest.fixture
def make(configs: Path) -> Callable[..., Any]:
    """Number of classes -> a tiny detector with random weights."""
    from crosskd.config import load_config
    from crosskd.models.detector import detector_from_config

    def make(classes: int, **overrides: Any) -> Any:
        values = {"model.bbox_head.num_classes": classes, **overrides}
        detector = detector_from_config(load_config(configs / "gfl_tiny.py", values))
        for parameter in detector.parameters():
            torch.nn.init.normal_(parameter)
        return detector

    return make


def _saved(detector: Any, path: Path, names: Sequence[str] | None) -> Path:
    save_detector_weights(detector, path, {"dataset_meta": {"classes": tuple(names)}} if names else {})
    return path


def test_weights_of_the_same_classes_are_taken_whole(make: Callable[..., Any], tmp_path: Path) -> None:
    source, detector = make(3), make(3)
    start_from_checkpoint(detector, _saved(source, tmp_path / "w.pth", NAMES), NAMES)
    state = detector.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())


def test_classes_are_taken_by_name_and_new_ones_start_anew(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, detector = make(3), make(3)
    path = _saved(source, tmp_path / "w.pth", NAMES)
    start_from_checkpoint(detector, path, ("c", "new", "a"))
    assert capsys.readouterr().out == f"starting from {path}: classes by name; ['new'] are new to it and start anew\n"
    for kind in ("weight", "bias"):
        found, given = detector.state_dict()[f"{LAYER}.{kind}"], source.state_dict()[f"{LAYER}.{kind}"]
        assert torch.equal(found[0], given[2])
        assert torch.equal(found[2], given[0])
        assert not torch.equal(found[1], given[1])
    prior = detector.bbox_head.gfl_cls.bias[1].sigmoid()
    assert prior.item() == pytest.approx(0.01, rel=1e-3)  # as a new head begins
    assert torch.equal(detector.backbone.conv1.weight, source.backbone.conv1.weight)


def test_without_names_a_class_layer_of_another_size_starts_anew(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, detector = make(80), make(3)
    start_from_checkpoint(detector, _saved(source, tmp_path / "w.pth", None), NAMES)
    assert f"all but {LAYER}.bias, {LAYER}.weight, which are of other classes" in capsys.readouterr().out
    assert detector.bbox_head.gfl_cls.weight.std() < 0.1  # initialised, not the random numbers that were there
    assert torch.equal(detector.neck.lateral_convs[0].conv.weight, source.neck.lateral_convs[0].conv.weight)


def test_weights_of_another_detector_are_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    wider = {"model.backbone.base_channels": 16, "model.neck.in_channels": [16, 32, 64, 128]}
    for source in (make(3, **wider), make(3, **{"model.bbox_head.stacked_convs": 1})):
        path = _saved(source, tmp_path / "w.pth", NAMES)
        with pytest.raises(CheckpointError, match=r"load_from: .*w.pth is not a checkpoint of this GFL: .*Expected"):
            start_from_checkpoint(make(3), path, NAMES)
    with pytest.raises(CheckpointError, match=r"no such checkpoint: nowhere.pth"):
        start_from_checkpoint(make(3), "nowhere.pth", NAMES)


def test_a_pretrained_part_is_found_behind_a_prefix_and_refused_where_nothing_fits_or_is_a_number(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    source, path = make(3).backbone, tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.student.backbone.{k}": v for k, v in source.state_dict().items()}}, path)
    backbone = make(3).backbone
    backbone.init_cfg = dict(type="Pretrained", checkpoint=str(path))
    backbone.init_weights()
    assert torch.equal(backbone.conv1.weight, source.conv1.weight)

    torch.save({"stem.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"holds no weights of this ResNet: .*conv1\.weight, found stem\.weight"):
        FileInit(str(path))(backbone)
    source.conv1.weight.data.fill_(torch.inf)
    torch.save(source.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"conv1\.weight has \d+ of \d+ values that are NaN or infinite"):
        FileInit(str(path))(backbone)
