"""Weights to start from: what fits is taken, class by class by name; those of another network are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd.models.checkpoint import save_detector_weights
from crosskd.models.starting_weights import (
    FileInit,
    _rows_by_name,
    pretrained_parts,
    start_from_checkpoint,
    start_from_teacher,
    tensors_of_teacher,
)
from deploy.errors import CheckpointError
from deploy.files import sha256_of

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


def test_weights_of_the_same_classes_are_taken_whole(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, detector = make(3), make(3)
    path = _saved(source, tmp_path / "w.pth", NAMES)
    assert start_from_checkpoint(detector, path, NAMES).is_whole(detector)
    state = detector.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
    first, *parts = capsys.readouterr().out.splitlines()
    assert first == f"starting from {path}:"
    parameters = {name: sum(one.numel() for one in part.parameters()) for name, part in detector.named_children()}
    assert [line.split(":")[0] for line in parts] == ["  backbone", "  neck", "  bbox_head"]
    for line in parts:
        count = parameters[line.split(":")[0].strip()]
        assert line.endswith(f"{count:,} of {count:,} parameters")


def test_classes_are_taken_by_name_and_new_ones_start_anew(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, detector = make(3), make(3)
    path = _saved(source, tmp_path / "w.pth", NAMES)
    assert not start_from_checkpoint(detector, path, ("c", "new", "a")).is_whole(detector)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  classes by name: c, a; new: new"
    assert lines[-2].endswith(f"; the others as mmdet starts them, such as {LAYER}.weight")
    for kind in ("weight", "bias"):
        found, given = detector.state_dict()[f"{LAYER}.{kind}"], source.state_dict()[f"{LAYER}.{kind}"]
        assert torch.equal(found[0], given[2])
        assert torch.equal(found[2], given[0])
        assert not torch.equal(found[1], given[1])
    prior = detector.bbox_head.gfl_cls.bias[1].sigmoid()
    assert prior.item() == pytest.approx(0.01, rel=1e-3)  # as a new head begins
    assert torch.equal(detector.backbone.conv1.weight, source.backbone.conv1.weight)
    assert torch.equal(detector.bbox_head.gfl_reg.weight, source.bbox_head.gfl_reg.weight)


def test_rows_of_another_number_of_classes_are_taken_by_name(make: Callable[..., Any], tmp_path: Path) -> None:
    source, detector = make(3), make(2)
    start_from_checkpoint(detector, _saved(source, tmp_path / "w.pth", NAMES), ("c", "new"))
    assert torch.equal(detector.bbox_head.gfl_cls.weight[0], source.bbox_head.gfl_cls.weight[2])


def test_without_names_a_class_layer_of_another_size_starts_anew(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, detector = make(80), make(3)
    start_from_checkpoint(detector, _saved(source, tmp_path / "w.pth", None), NAMES)
    assert f"the others as mmdet starts them, such as {LAYER}.weight" in capsys.readouterr().out
    assert detector.bbox_head.gfl_cls.weight.std() < 0.1  # initialised, not the random numbers that were there
    assert torch.equal(detector.neck.lateral_convs[0].conv.weight, source.neck.lateral_convs[0].conv.weight)


def test_a_head_and_a_neck_of_other_widths_start_anew_on_the_same_backbone(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = {"model.neck.out_channels": 24, "model.bbox_head.in_channels": 24, "model.bbox_head.feat_channels": 24}
    source, detector = make(3, **wider), make(3)
    start_from_checkpoint(detector, _saved(source, tmp_path / "w.pth", NAMES), NAMES)
    assert torch.equal(detector.backbone.conv1.weight, source.backbone.conv1.weight)
    assert detector.neck.lateral_convs[0].conv.weight.std() < 0.5  # initialised
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("  neck: 0 of ")
    assert "such as neck." in lines[2]


def test_a_backbone_alone_is_taken(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, detector = make(3), make(3)
    state = {**source.backbone.state_dict(), "fc.weight": torch.ones(1000, 64)}
    torch.save(state, tmp_path / "imagenet.pth")
    start_from_checkpoint(detector, tmp_path / "imagenet.pth", NAMES)
    assert torch.equal(detector.backbone.layer4[1].conv2.weight, source.backbone.layer4[1].conv2.weight)
    assert detector.bbox_head.gfl_cls.weight.std() < 0.1
    assert capsys.readouterr().out.splitlines()[2].startswith("  neck: 0 of ")


def test_weights_of_another_detector_are_refused_with_what_differs(make: Callable[..., Any], tmp_path: Path) -> None:
    wider = {"model.backbone.base_channels": 16, "model.neck.in_channels": [16, 32, 64, 128]}
    path = _saved(make(3, **wider), tmp_path / "w.pth", NAMES)
    expected = (
        r"w.pth is of another network: 0% of the backbone's parameters fit this GFL, expected at least 90%: "
        r"backbone\.bn1\.bias is \(16,\) there and \(8,\) here, as are \d+ more"
    )
    with pytest.raises(CheckpointError, match=expected):
        start_from_checkpoint(make(3), path, NAMES)
    torch.save({"stem.weight": torch.ones(3)}, path)
    with pytest.raises(
        CheckpointError, match=r"\d+ are missing there \(such as backbone.*\); it has others \(such as stem"
    ):
        start_from_checkpoint(make(3), path, NAMES)
    path.write_bytes(_saved(make(3), path, NAMES).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*w\.pth .* may be truncated"):
        start_from_checkpoint(make(3), path, NAMES)
    with pytest.raises(CheckpointError, match=r"no such checkpoint: nowhere.pth"):
        start_from_checkpoint(make(3), "nowhere.pth", NAMES)


def test_several_anchors_a_place_and_channels_that_are_of_no_class_keep_their_rows() -> None:
    loaded = torch.arange(10.0)[:, None]  # 2 anchors of the classes a, b, c, d; and 2 others
    drawn = torch.full((6, 1), -1.0)  # 2 anchors of c, new
    rows = _rows_by_name("k", drawn, loaded, "abcd", ("c", "new"), others=2)["k"]
    assert rows.flatten().tolist() == [2, -1, 6, -1, 8, 9]
    assert _rows_by_name("k", drawn, loaded, "abc", ("c", "new"), others=2) == {}  # 8 rows are not of 3 classes


def test_the_teachers_head_and_neck_are_taken_where_they_fit(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make(3, **{"model.backbone.base_channels": 16, "model.neck.in_channels": [16, 32, 64, 128]})
    student = make(3)
    start_from_teacher(student, tensors_of_teacher(student, teacher))
    assert torch.equal(student.bbox_head.gfl_cls.weight, teacher.bbox_head.gfl_cls.weight)
    assert torch.equal(student.neck.fpn_convs[0].conv.weight, teacher.neck.fpn_convs[0].conv.weight)
    assert student.neck.lateral_convs[0].conv.weight.shape[1] == 8
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "starting from the teacher:"
    assert lines[1].startswith("  backbone: 0 of ")
    narrow = make(3, **{"model.neck.out_channels": 8, "model.bbox_head.in_channels": 8,
                        "model.bbox_head.feat_channels": 8, "model.neck.norm_cfg": None})  # fmt: skip
    with pytest.raises(CheckpointError, match="--from teacher: no tensor of the teacher"):
        tensors_of_teacher(narrow, teacher.backbone)


def test_a_pretrained_part_is_found_behind_a_prefix_and_refused_where_too_little_fits_or_is_a_number(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    source, path = make(3).backbone, tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.student.backbone.{k}": v for k, v in source.state_dict().items()}}, path)
    backbone = make(3).backbone
    backbone.init_cfg = dict(type="Pretrained", checkpoint=str(path))
    backbone.init_weights()
    assert torch.equal(backbone.conv1.weight, source.conv1.weight)

    torch.save({"stem.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"0% of .* fit this ResNet, .*such as bn1\.bias.*such as stem\.weight"):
        FileInit(str(path))(backbone)
    torch.save({"conv1.weight": source.conv1.weight}, path)  # mmengine takes the one, and is silent of the others
    with pytest.raises(CheckpointError, match=r"1% of .* fit this ResNet"):
        FileInit(str(path))(backbone)
    source.conv1.weight.data.fill_(torch.inf)
    torch.save(source.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"conv1\.weight has \d+ of \d+ values that are NaN or infinite"):
        FileInit(str(path))(backbone)


def test_a_pretrained_part_at_an_address_is_fetched_and_checked_by_its_hash(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSKD_CACHE", str(tmp_path / "cache"))
    detector, source = make(3), make(3)
    torch.save(source.backbone.state_dict(), tmp_path / "r18.pth")
    path = (tmp_path / "r18.pth").rename(tmp_path / f"r18-{sha256_of(tmp_path / 'r18.pth')[:8]}.pth")
    detector.backbone.init_cfg = dict(type="Pretrained", checkpoint=path.as_uri())
    assert pretrained_parts(detector) == {"backbone": str(tmp_path / "cache" / path.name)}
    path.unlink()  # it is in the cache
    detector.backbone.init_weights()
    assert torch.equal(detector.backbone.conv1.weight, source.backbone.conv1.weight)
    (tmp_path / "cache" / path.name).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot download file://.*put it at .*{path.name}"):
        pretrained_parts(detector)
