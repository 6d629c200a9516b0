from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crosskd import shapes
from crosskd.shapes import CLASS_NAMES, HARD, draw_image, main
from deploy.dataset import load_split
from deploy.images import read_image
from deploy.layouts import SPLITS


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_loads_and_is_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "new" / "set"), "--images", "20", "--size", "96"]) == 0
    assert "20 images with 6 classes" in capsys.readouterr().out
    assert os.listdir(tmp_path / "new") == ["set"]
    names = []
    for split, count in zip(SPLITS, (14, 3, 3), strict=True):
        coco = load_split(tmp_path / "new" / "set", split)
        assert len(coco.images) == count
        assert coco.class_names == CLASS_NAMES
        assert coco.clipped == 0
        names += [image.path.name for image in coco.images]
        for image in coco.images:
            assert max(image.width_px, image.height_px) == 96
            assert read_image(image.path).shape == (image.height_px, image.width_px, 3)
            assert len(image.labels) > 0
    assert len(set(names)) == 20


@pytest.mark.parametrize(("images", "counts"), [(3, [1, 1, 1]), (10, [6, 2, 2])])
def test_no_split_is_empty(tmp_path: Path, images: int, counts: list[int]) -> None:
    main([str(tmp_path / "set"), "--images", str(images), "--size", "64"])
    assert [len(load_split(tmp_path / "set", split).images) for split in SPLITS] == counts


def test_the_same_flags_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main([str(tmp_path / name), "--images", "4", "--size", "64", "--seed", str(seed)])
    first, second, other = (_files(tmp_path / name) for name in "abc")
    assert first == second
    assert first["images/000001.jpg"] != other["images/000001.jpg"]


def test_a_set_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()  # an empty folder will do
    flags = [str(folder), "--images", "3", "--size", "64"]
    assert main(flags) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(flags) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert main([*flags, "--seed", "1"]) == 2
    assert "holds another set" in capsys.readouterr().err
    (folder / "images" / "000002.jpg").unlink()
    assert main(flags) == 2
    assert "lost images" in capsys.readouterr().err


def test_easy_images_are_others_with_fewer_and_larger_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {}
    for name in ("easy", "hard"):
        main([str(tmp_path / name), "--images", "30", "--size", "128", "--difficulty", name])
        sets[name] = load_split(tmp_path / name, "train").images
    boxes = {name: [box for image in images for box in image.boxes_xyxy] for name, images in sets.items()}
    assert max(len(image.labels) for image in sets["easy"]) <= 5 < max(len(image.labels) for image in sets["hard"])
    sides = {name: np.median([max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in found]) for name, found in boxes.items()}
    assert sides["easy"] > sides["hard"]
    capsys.readouterr()
    assert main([str(tmp_path / "easy"), "--images", "30", "--size", "128"]) == 2
    assert "'difficulty': 'easy'" in capsys.readouterr().err
    assert main([str(tmp_path / "hard"), "--images", "30", "--size", "128"]) == 0  # the default


def test_hard_images_stay_as_they_were_drawn() -> None:
    """The studies' results are of them."""
    image, boxes, labels = draw_image(np.random.default_rng([3, 0]), 160)
    assert image.shape == (160, 116, 3)
    assert boxes.tolist() == [
        [34, 104, 86, 150], [10, 49, 81, 118], [33, 15, 95, 58], [40, 65, 71, 104], [44, 16, 79, 60], [39, 133, 52, 145]
    ]  # fmt: skip
    assert labels.tolist() == [1, 1, 0, 3, 4, 0]


@pytest.mark.parametrize("marker", [None, "{", '{"made_by": "somebody"}'])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    if marker is not None:
        (tmp_path / "shapes.json").write_text(marker)
    before = _files(tmp_path)
    assert main([str(tmp_path), "--images", "3"]) == 2
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "2"], "--images is 2; expected at least 3"),
        (["--size", "63"], "--size is 63; expected at least 64"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
    ],
)
def test_bad_flags_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([str(tmp_path / "set"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        assert main([str(tmp_path / folder), "--images", "3"]) == 2
        assert str(tmp_path / folder) in capsys.readouterr().err


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "write_json", interrupt)
    assert main([str(tmp_path / "set"), "--images", "3", "--size", "64"]) == 130
    assert os.listdir(tmp_path) == []


def test_boxes_are_tight_around_shapes_that_can_be_seen() -> None:
    for index in range(30):
        masks, labels = shapes._place_shapes(np.random.default_rng(index), 80, 100)
        assert 1 <= len(masks) == len(labels)
        covered = np.zeros((80, 100), bool)
        for mask in reversed(masks):  # the highest first
            solid = mask > 127
            assert np.count_nonzero(solid & ~covered) >= HARD.least_visible_share * np.count_nonzero(solid) > 0
            covered |= solid
            x1, y1, x2, y2 = shapes._box_of_mask(mask)
            assert solid[y1:y2, x1:x2].sum() == solid.sum()
            assert solid[y1].any()
            assert solid[y2 - 1].any()
            assert solid[:, x1].any()
            assert solid[:, x2 - 1].any()


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_outlines_fill_the_area_of_their_shape(name: str) -> None:
    """The largest of many is neither stretched nor cut by the border: it has the area of the shape of radius 1."""
    expected = {
        "circle": np.pi,
        "triangle": 3 * np.sqrt(3) / 4,
        "square": 2.0,
        "star": 10 * 0.42 * np.sin(np.pi / 5) / 2,
        "ring": np.pi * (1 - 0.55**2),
        "cross": 2 * 0.6 * 2 * np.sqrt(1 - 0.3**2) - 0.6**2,
    }[name]
    areas = []
    for index in range(300):
        mask = shapes._mask_of_shape(np.random.default_rng(index), name, 100.0, 200, 200)
        areas.append((mask > 127).sum() / 50**2)
    assert 0.95 * expected < max(areas) < 1.03 * expected


def test_sizes_and_classes_vary_and_colour_does_not_tell_the_class() -> None:
    sides, labels, colours = [], [], []
    for index in range(150):
        image, boxes, image_labels = draw_image(np.random.default_rng([3, index]), 160)
        for (x1, y1, x2, y2), label in zip(boxes, image_labels, strict=True):
            sides.append(max(x2 - x1, y2 - y1))
            labels.append(label)
            colours.append(image[y1:y2, x1:x2].mean(axis=(0, 1)))
    assert 8 <= min(sides) <= 12
    assert 80 <= max(sides) <= 0.6 * 160 + 2
    shares = np.bincount(labels, minlength=len(CLASS_NAMES)) / len(labels)
    assert (shares > 0.1).all()
    by_class = np.array(
        [np.mean([c for c, own in zip(colours, labels, strict=True) if own == label], axis=0) for label in range(6)]
    )
    assert np.ptp(by_class, axis=0).max() < 30


def test_annotations_have_what_coco_tools_ask_for(tmp_path: Path) -> None:
    main([str(tmp_path / "set"), "--images", "3", "--size", "64"])
    document = json.loads((tmp_path / "set" / "annotations" / "instances_train.json").read_text())
    for annotation in document["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert annotation["area"] == width * height
        assert annotation["iscrowd"] == 0
        assert x >= 0
        assert y >= 0


def test_the_command_needs_no_torch() -> None:
    words = "import sys, crosskd.shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
