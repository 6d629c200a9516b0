"""Everything that is wrong with a set, told at once, and corrected where that needs no person."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from crosskd.check_data import main
from crosskd.corrections import turned_xywh
from deploy.dataset import CocoSet, load_split
from deploy.images import read_image

SPLITS = ("train", "val", "test")
Document = dict[str, Any]


def _box(number: int) -> list[int]:
    return [4 + number % 20, 3 + number % 9, 17, 11]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Black images of 60 x 40 pixels, in which each box is white."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    number = 0
    for split in SPLITS:
        document: Document = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        }
        for _ in range(4):
            number += 1
            x, y, width, height = _box(number)
            pixels = np.zeros((40, 60, 3), np.uint8)
            pixels[y : y + height, x : x + width] = 255
            pixels[0, 0] = number  # no two images have the same content
            assert cv2.imwrite(str(folder / f"images/{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
            document["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 60, "height": 40})
            document["annotations"].append(
                {"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": _box(number), "iscrowd": 0}
            )
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return folder


def _change(data_dir: Path, change: Callable[[Document], None]) -> None:
    for path in (data_dir / "annotations").iterdir():
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))


def _whiteness(coco: CocoSet) -> float:
    """How white the images are inside their boxes, 0 to 255; that of a box beside the white one is far lower."""
    means = []
    for image in coco.images:
        pixels = read_image(image.path)
        for x1, y1, x2, y2 in image.boxes_xyxy.round().astype(int).tolist():
            means.append(pixels[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].mean())
    return float(np.mean(means))


def test_a_sound_set_has_status_0_and_a_table(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data_dir)]) == 0
    said = capsys.readouterr().out
    assert said.count("nothing is wrong") == 3
    rows = [line.split() for line in said.splitlines()]
    assert ["class", "train", "val", "test"] in rows
    assert ["a", "2", "2", "2"] in rows
    assert "no image stands in two splits" in said


def test_all_faults_are_told_at_once(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(document: Document) -> None:
        document["images"][0]["id"] = str(document["images"][0]["id"])
        document["annotations"][1]["bbox"][2] = 0
        document["annotations"][2]["iscrowd"] = "0"

    _change(data_dir, spoil)
    (data_dir / "images/2.jpg").unlink()
    (data_dir / "images/12.jpg").write_bytes((data_dir / "images/1.jpg").read_bytes())
    assert main([str(data_dir)]) == 2
    captured = capsys.readouterr()
    for words in ("no integer", "of no size", "iscrowd is '0'", "2.jpg (No such file", "1 images stand in two splits"):
        assert words in captured.out
    assert "12.jpg (test)" in captured.out
    assert captured.err.splitlines()[-1].startswith(f"error: {data_dir} cannot be used")


def _exif(path: Path, orientation: int) -> None:
    block = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_are_turned_as_exif_turns_the_pictures(data_dir: Path, tmp_path: Path, orientation: int) -> None:
    for path in (data_dir / "images").iterdir():
        _exif(path, orientation)
    clean = tmp_path / "clean"
    assert main([str(data_dir), "--write", str(clean)]) == 0
    for split in SPLITS:
        coco = load_split(clean, split)
        assert (coco.images[0].width_px, coco.images[0].height_px) == (40, 60)
        assert _whiteness(coco) > 245


def test_boxes_are_scaled_with_the_pictures(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def double(document: Document) -> None:
        for image in document["images"]:
            image.update(width=120, height=80)
        for entry in document["annotations"]:
            entry.update(bbox=[2 * value for value in entry["bbox"]], area=100)

    _change(data_dir, double)
    clean = tmp_path / "clean"
    assert main([str(data_dir), "--write", str(clean)]) == 0
    assert "corrected: 4 boxes of scaled images, scaled with them" in capsys.readouterr().out
    coco = load_split(clean, "train")
    assert _whiteness(coco) > 245
    assert coco.images[0].areas.tolist() == [25]


def _strings(document: Document) -> None:
    for image in document["images"]:
        image["id"] = f"image {image['id']}"
    for entry in document["annotations"]:
        entry.update(
            image_id=f"image {entry['image_id']}", category_id=str(entry["category_id"]), iscrowd="0", area="187"
        )


def _windows(document: Document) -> None:
    for image in document["images"]:
        image["file_name"] = f"images\\{image['file_name']}"


def _class_indices(document: Document) -> None:
    for entry in document["annotations"]:
        entry["category_id"] -= 1


def _all_crowd(document: Document) -> None:
    for entry in document["annotations"]:
        entry["iscrowd"] = 1


@pytest.mark.parametrize("change", [_strings, _windows, _class_indices, _all_crowd])
def test_types_names_and_references_are_corrected(data_dir: Path, tmp_path: Path, change: Any) -> None:
    expected = {split: load_split(data_dir, split) for split in SPLITS}
    _change(data_dir, change)
    clean = tmp_path / "clean"
    assert main([str(data_dir)]) == 2
    assert main([str(data_dir), "--write", str(clean)]) == 0
    for split in SPLITS:
        coco = load_split(clean, split)
        assert coco.class_names == ("a", "b")
        for image, before in zip(coco.images, expected[split].images, strict=True):
            assert image.path.name == before.path.name
            assert image.labels.tolist() == before.labels.tolist()
            np.testing.assert_array_equal(image.boxes_xyxy, before.boxes_xyxy)
            assert not image.crowd.any()


def test_what_cannot_be_used_is_dropped_and_counted(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(document: Document) -> None:
        document["annotations"][1]["bbox"][2] = 0
        document["annotations"][2]["image_id"] = 999

    _change(data_dir, spoil)
    (data_dir / "images/1.jpg").write_text("<html>")
    clean = tmp_path / "clean"
    assert main([str(data_dir), "--write", str(clean)]) == 0
    said = capsys.readouterr().out
    assert "corrected: 1 images that are missing or cannot be read, dropped" in said
    assert "corrected: 3 boxes of no use, dropped" in said  # in train: no width, no image, and that of the image
    assert [image.image_id for image in load_split(clean, "train").images] == [2, 3, 4]


def test_nothing_is_written_where_a_person_is_needed(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stretch(document: Document) -> None:
        document["images"][0].update(width=50, height=77)

    _change(data_dir, stretch)
    clean = tmp_path / "clean"
    assert main([str(data_dir), "--write", str(clean)]) == 2
    assert "stretched or cropped" in capsys.readouterr().out
    assert not clean.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert main([str(data_dir), "--write", str(data_dir)]) == 2
    assert "is there already" in capsys.readouterr().err


def _for_each(key: str, **fields: Any) -> Callable[[Document], None]:
    """Changes every entry of a list; a value that can be called gets the old one."""

    def change(document: Document) -> None:
        for entry in document[key]:
            entry.update({name: new(entry.get(name)) if callable(new) else new for name, new in fields.items()})

    return change


def _merged_without_new_ids(document: Document) -> None:
    document["images"][1]["id"] = document["images"][0]["id"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_for_each("annotations", bbox=[0, 0, -3, 5]), id="no box has a size"),
        pytest.param(_for_each("annotations", bbox=lambda box: [*box, 0.9]), id="five numbers"),
        pytest.param(_for_each("annotations", bbox=lambda box: [20 * v for v in box]), id="thousandths of the image"),
        pytest.param(_for_each("annotations", image_id=[1]), id="no box has an image"),
        pytest.param(_for_each("images", file_name="\ud800.jpg"), id="no text"),
        pytest.param(_for_each("images", file_name="1.jpg\0"), id="no file name"),
        pytest.param(_for_each("images", file_name="a" * 5000), id="longer than a file name"),
        pytest.param(_merged_without_new_ids, id="two images with one id"),
    ],
)
def test_what_leaves_nothing_or_is_a_guess_is_not_written(
    data_dir: Path, tmp_path: Path, change: Callable[[Document], None], capsys: pytest.CaptureFixture[str]
) -> None:
    _change(data_dir, change)
    assert main([str(data_dir)]) == 2
    assert main([str(data_dir), "--write", str(tmp_path / "clean")]) == 2
    said = capsys.readouterr()
    assert "need a person" in said.err
    assert (said.out + said.err).isascii()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def _polygons(document: Document) -> None:
    for entry in document["annotations"]:
        x, y, width, height = entry.pop("bbox")
        entry["segmentation"] = [[x, y, x + width, y], [x + width, y + height, x, y + height]]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_polygons, id="polygons"),
        pytest.param(_for_each("annotations", bbox=lambda box: [str(value) for value in box]), id="strings"),
        pytest.param(_for_each("images", file_name=lambda name: name.upper()), id="letter case"),
        pytest.param(lambda document: document["images"].append(dict(document["images"][0])), id="an image twice"),
    ],
)
def test_boxes_and_names_are_corrected(data_dir: Path, tmp_path: Path, change: Callable[[Document], None]) -> None:
    expected = [image.boxes_xyxy.tolist() for image in load_split(data_dir, "train").images]
    _change(data_dir, change)
    assert main([str(data_dir)]) == 2
    assert main([str(data_dir), "--write", str(tmp_path / "clean")]) == 0
    assert [image.boxes_xyxy.tolist() for image in load_split(tmp_path / "clean", "train").images] == expected


def test_ids_that_are_words_become_the_same_numbers_in_every_split(data_dir: Path, tmp_path: Path) -> None:
    def words(document: Document) -> None:
        names = {1: "first", 2: "second"}
        document["categories"] = [{"id": names[entry["id"]], "name": entry["name"]} for entry in document["categories"]]
        for entry in document["annotations"]:
            entry["category_id"] = names[entry["category_id"]]

    _change(data_dir, words)
    path = data_dir / "annotations/instances_val.json"
    document = json.loads(path.read_text())
    document["categories"].reverse()
    path.write_text(json.dumps(document))
    assert main([str(data_dir), "--write", str(tmp_path / "clean")]) == 0
    sets = [load_split(tmp_path / "clean", split) for split in SPLITS]
    assert [dict(zip(one.class_names, one.category_ids, strict=True)) for one in sets] == [{"a": 1, "b": 2}] * 3


def _spoil_pixels(path: Path) -> None:
    """A PNG whose first and last bytes are as they should be."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    content = cv2.imencode(".png", pixels)[1].tobytes()
    start = content.index(b"IDAT") + 4
    path.write_bytes(content[:start] + bytes(200) + content[start + 200 :])


def test_pictures_are_decoded(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _spoil_pixels(data_dir / "images/2.jpg")
    assert main([str(data_dir)]) == 2
    assert "error: 1 of 4 pictures cannot be decoded" in capsys.readouterr().out
    assert main([str(data_dir), "--write", str(tmp_path / "clean")]) == 0
    assert [image.image_id for image in load_split(tmp_path / "clean", "train").images] == [1, 3, 4]


def test_of_many_pictures_some_are_decoded_unless_all_are_asked_for(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crosskd.check_data.PICTURES_DECODED", 2)
    _spoil_pixels(data_dir / "images/2.jpg")
    assert main([str(data_dir)]) == 0
    assert "2 of 4 pictures were decoded; --decode-all tries all" in capsys.readouterr().out
    assert main([str(data_dir), "--decode-all"]) == 2


def test_a_picture_in_two_entries_is_said(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(data_dir, _for_each("images", file_name="1.jpg"))
    assert main([str(data_dir)]) == 0
    assert "file_name '1.jpg' is also that of images[0]" in capsys.readouterr().out


def test_turning_four_times_is_no_turning() -> None:
    box, width, height = [3.0, 5.0, 7.0, 11.0], 60, 40
    for _ in range(4):
        box = turned_xywh(box, width, height, 6)
        width, height = height, width
    assert box == [3, 5, 7, 11]
