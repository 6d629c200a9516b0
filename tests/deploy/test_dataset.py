from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any, Callable, Dict

import cv2
import numpy as np
import pytest

from deploy.dataset import load_coco, load_split
from deploy.errors import ConfigError, DataError
from deploy.images import read_image
from deploy.layouts import SPLITS, split_paths

Document = Dict[str, Any]
GOOD: Document = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 50},
        {"id": 9, "file_name": "c.bmp", "width": 8, "height": 8},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 20, "bbox": [1, 2, 3.5, 4]},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [-4, 10, 10, 50], "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 5, "bbox": [0, 0, 20, 50], "iscrowd": 0},
    ],
    "categories": [{"id": 20, "name": "nut"}, {"id": 5, "name": "bolt"}],
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images" / "sub").mkdir(parents=True)
    for entry in GOOD["images"]:
        pixels = np.random.randint(0, 255, (entry["height"], entry["width"], 3), np.uint8)
        assert cv2.imwrite(str(folder / "images" / entry["file_name"]), pixels)
    for split in SPLITS:
        _write(folder, GOOD, split)
    return folder


def _write(data_dir: Path, document: Any, split: str = "train") -> Path:
    path = data_dir / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_load_coco_returns_boxes_by_image_clipped_and_labelled(data_dir: Path) -> None:
    coco = load_coco(*split_paths(data_dir, "train"))
    assert (coco.class_names, coco.category_ids, coco.clipped) == (("nut", "bolt"), (20, 5), 1)
    first, second, third = coco.images
    assert (first.image_id, first.path, first.width_px, first.height_px) == (7, data_dir / "images/a.jpg", 40, 30)
    np.testing.assert_array_equal(first.boxes_xyxy, [[0, 10, 6, 30]])
    assert (first.labels.tolist(), first.crowd.tolist()) == ([1], [True])
    np.testing.assert_array_equal(second.boxes_xyxy, [[1, 2, 4.5, 6], [0, 0, 20, 50]])
    assert (second.labels.tolist(), second.crowd.tolist()) == ([0, 1], [False, False])
    assert third.boxes_xyxy.shape == (0, 4)
    assert (third.boxes_xyxy.dtype, third.labels.dtype, third.crowd.dtype) == (np.float32, np.int64, bool)


def test_a_box_out_by_rounding_is_not_counted(data_dir: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["annotations"][1]["bbox"] = [30.1, 10, 9.9000001, 20]
    assert load_coco(_write(data_dir, document), data_dir / "images").clipped == 0


def test_load_split_limits_images_and_checks_only_those(data_dir: Path) -> None:
    (data_dir / "images/c.bmp").unlink()
    assert [image.image_id for image in load_split(data_dir, "val", limit=2).images] == [7, 3]
    with pytest.raises(DataError, match=r"c\.bmp"):
        load_split(data_dir, "val")
    with pytest.raises(ConfigError, match="0"):
        load_split(data_dir, "val", limit=0)


@pytest.mark.parametrize("missing", ["", "annotations/instances_test.json", "images"])
def test_split_paths_names_what_is_missing(data_dir: Path, missing: str) -> None:
    (data_dir / missing).rename(data_dir.with_name("moved"))
    with pytest.raises(DataError, match=str(data_dir / missing)):
        split_paths(data_dir, "test")


def _changed(key: str, index: int, **values: Any) -> Callable[[Document], None]:
    """Sets fields of one entry; None removes a field."""

    def change(document: Document) -> None:
        for field, value in values.items():
            document[key][index][field] = value
            if value is None:
                del document[key][index][field]

    return change


BAD = {
    "no images key": (lambda d: d.pop("images"), "'images'"),
    "no annotations key": (lambda d: d.pop("annotations"), "'annotations'"),
    "no categories key": (lambda d: d.pop("categories"), "'categories'"),
    "images not a list": (lambda d: d.update(images={}), "'images'"),
    "entry not an object": (lambda d: d["annotations"].append(3), "'annotations'"),
    "no images": (lambda d: d.update(images=[]), "no images at all"),
    "no annotations": (lambda d: d.update(annotations=[]), "no annotations at all"),
    "no categories": (lambda d: d.update(categories=[]), "no categories at all"),
    "category without name": (_changed("categories", 1, name=None), r"categories\[1\] .*name"),
    "category with empty name": (_changed("categories", 0, name=""), r"categories\[0\] .*name"),
    "duplicate category id": (_changed("categories", 1, id=20), r"categories\[1\] \(id 20\).*\[0\] has the same id"),
    "duplicate category name": (_changed("categories", 1, name="nut"), r"categories\[1\].*'nut'"),
    "duplicate image id": (_changed("images", 2, id=7), r"images\[2\] \(id 7\).*\[0\] has the same id"),
    "image without id": (_changed("images", 2, id=None), r"images\[2\].*integer"),
    "duplicate annotation id": (_changed("annotations", 2, id=2), r"annotations\[2\] \(id 2\).*\[1\] has the same id"),
    "unknown image id": (_changed("annotations", 1, image_id=4), r"annotations\[1\] .*image_id is 4"),
    "unknown category id": (_changed("annotations", 0, category_id=1), r"annotations\[0\] .*category_id is 1"),
    "category id of a wrong type": (_changed("annotations", 0, category_id=[5]), r"category_id is \[5\]"),
    "bbox missing": (_changed("annotations", 1, bbox=None), r"annotations\[1\] .*bbox is None"),
    "bbox of three": (_changed("annotations", 1, bbox=[1, 2, 3]), "four finite numbers"),
    "bbox of words": (_changed("annotations", 1, bbox=[1, 2, "3", 4]), "four finite numbers"),
    "bbox not finite": (_changed("annotations", 1, bbox=[1, float("nan"), 3, 4]), "four finite numbers"),
    "bbox beyond any float": (_changed("annotations", 1, bbox=[1, 10**400, 3, 4]), "four finite numbers"),
    "bbox of truths": (_changed("annotations", 1, bbox=[1, True, 3, 4]), "four finite numbers"),
    "box of no width": (_changed("annotations", 2, bbox=[1, 1, 0, 4]), r"annotations\[2\] .*no size"),
    "box of negative height": (_changed("annotations", 2, bbox=[1, 1, 4, -4]), r"annotations\[2\] .*no size"),
    "box outside": (_changed("annotations", 2, bbox=[20, 1, 4, 4]), r"annotations\[2\] .*wholly outside .*20 x 50"),
    "box above": (_changed("annotations", 2, bbox=[2, -9, 4, 9]), r"annotations\[2\] .*wholly outside"),
    "image without file_name": (_changed("images", 0, file_name=None), r"images\[0\] .*file_name"),
    "absolute file_name": (_changed("images", 0, file_name="/etc/passwd"), r"images\[0\] .*leaves"),
    "file_name goes up": (_changed("images", 0, file_name="sub/../../a.jpg"), r"images\[0\] .*leaves"),
    "no width": (_changed("images", 1, width=None), r"images\[1\] .*width is None"),
    "height of zero": (_changed("images", 1, height=0), r"images\[1\] .*height is 0"),
    "image file missing": (_changed("images", 1, file_name="sub/z.png"), r"sub/z\.png.*id 3"),
    "image is a folder": (_changed("images", 1, file_name="sub"), r"images/sub .*id 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_load_coco_refuses(data_dir: Path, case: str) -> None:
    spoil, message = BAD[case]
    document = copy.deepcopy(GOOD)
    spoil(document)
    path = _write(data_dir, document)
    with pytest.raises(DataError, match=message) as caught:
        load_split(data_dir, "train")
    assert str(path) in str(caught.value) or "image" in case


@pytest.mark.parametrize("text", ["{", "[]", "3", '"images"'])
def test_load_coco_refuses_what_is_no_coco_at_all(data_dir: Path, text: str) -> None:
    path = _write(data_dir, text)
    with pytest.raises(DataError, match=r"expected .*COCO") as caught:
        load_split(data_dir, "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.jpg", "sub/b.png", "c.bmp"])
@pytest.mark.parametrize("left", [0.0, 0.02, 0.3, 0.98])
def test_a_truncated_image_is_refused(data_dir: Path, name: str, left: float) -> None:
    path = data_dir / "images" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    for read in (lambda: load_split(data_dir, "train"), lambda: read_image(path)):
        with pytest.raises(DataError, match=f"{name}.*(truncated|not an image)"):
            read()


def test_a_file_that_is_no_image_is_refused(data_dir: Path) -> None:
    path = data_dir / "images/a.jpg"
    path.write_text("<html>404</html>")
    for read in (lambda: load_split(data_dir, "train"), lambda: read_image(path)):
        with pytest.raises(DataError, match=r"a\.jpg.*not an image.*<html>"):
            read()
    path.write_bytes(b"\xff\xd8\xff\xd9")  # begins and ends as a JPEG, with nothing between
    with pytest.raises(DataError, match=r"a\.jpg.*cannot decode"):
        read_image(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jpg"):
        read_image(path)


def test_a_jpeg_with_a_thumbnail_is_whole_only_with_its_own_end(data_dir: Path) -> None:
    path = data_dir / "images/a.jpg"
    content = path.read_bytes()
    thumbnail = b"Exif\0\0" + content
    with_thumbnail = content[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + content[2:]
    path.write_bytes(with_thumbnail + bytes(100_000))  # phones append what they like
    assert read_image(path).shape == (30, 40, 3)
    # Cut within the image data, so that the thumbnail's end is the only one; then padded as a file system may.
    path.write_bytes(with_thumbnail[: -len(content) // 4] + bytes(100_000))
    with pytest.raises(DataError, match="truncated"):
        read_image(path)


def test_read_image_is_bgr_and_applies_exif(tmp_path: Path) -> None:
    blue = np.zeros((16, 32, 3), np.uint8)
    blue[:, :16] = (255, 0, 0)
    path = tmp_path / "blue.jpg"
    cv2.imwrite(str(path), blue, [cv2.IMWRITE_JPEG_QUALITY, 100])
    plain = read_image(path)
    assert plain.shape == (16, 32, 3)
    assert plain.dtype == np.uint8
    assert plain[8, 4, 0] > 250 > 5 > plain[8, 4, 2]
    # EXIF orientation 6: to be turned clockwise. TIFF header, one entry: tag 0x112, type SHORT, count 1, value 6.
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, 6, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])
    np.testing.assert_array_equal(read_image(path), np.rot90(plain, -1))


def test_a_grey_image_is_read_with_three_channels(tmp_path: Path) -> None:
    grey = np.random.randint(0, 255, (5, 7), np.uint8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))


def _resaved(data_dir: Path, name: str, width: int, height: int) -> None:
    assert cv2.imwrite(str(data_dir / "images" / name), np.zeros((height, width, 3), np.uint8))


def test_a_photo_that_exif_turns_is_refused_if_it_was_annotated_before_turning(data_dir: Path) -> None:
    path = data_dir / "images/a.jpg"
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, 6, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])
    with pytest.raises(DataError, match=r"1 of 3 images .*turned by their EXIF.*a\.jpg.*40 x 30 .*30 x 40"):
        load_split(data_dir, "train")
    document = copy.deepcopy(GOOD)
    document["images"][0].update(width=30, height=40)  # annotated as it is shown
    _write(data_dir, document)
    assert load_split(data_dir, "train").images[0].width_px == 30


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20, 15, r"1 of 3 images were scaled.*40 x 30 in the annotations, 20 x 15 as it is read, scaled by 0\.5"),
        (80, 61, r"1 of 3 images were scaled.*scaled by 2"),
        (64, 64, "1 of 3 images have other sizes.*stretched or cropped"),
        (30, 40, "1 of 3 images have width and height exchanged"),
    ],
)
def test_an_image_of_another_size_than_annotated_is_refused(
    data_dir: Path, width: int, height: int, message: str
) -> None:
    _resaved(data_dir, "a.jpg", width, height)
    with pytest.raises(DataError, match=message):
        load_split(data_dir, "train")
    load_coco(*split_paths(data_dir, "train"), check_files=False)


def test_a_size_that_is_a_pixel_off_is_said(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _resaved(data_dir, "a.jpg", 41, 30)
    load_split(data_dir, "train")
    assert "1 of 3 images differ by one pixel" in capsys.readouterr().err


def test_images_of_sixteen_bits_that_turn_black_are_said(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cv2.imwrite(str(data_dir / "images/sub/b.png"), np.full((50, 20), 4000, np.uint16))
    load_split(data_dir, "train")
    assert "1 of 3 images have 16 bits" in (told := capsys.readouterr().err)
    assert "uses 12 of its 16 bits" in told


@pytest.mark.parametrize(
    ("name", "hint"), [("sub\\b.png", "back-slashes of Windows"), ("images/sub/b.png", "without the folder images/")]
)
def test_what_is_wrong_with_a_file_name_is_recognised(data_dir: Path, name: str, hint: str) -> None:
    document = copy.deepcopy(GOOD)
    document["images"][1]["file_name"] = name
    _write(data_dir, document)
    with pytest.raises(DataError, match=rf"1 of 3 images are missing.*{hint}.*check_data"):
        load_split(data_dir, "train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_of_windows_is_read(data_dir: Path, encoding: str) -> None:
    path = _write(data_dir, GOOD)
    path.write_text(path.read_text(), encoding=encoding)
    assert len(load_split(data_dir, "train").images) == 3


@pytest.mark.shared
def test_blood_cells_load_whole(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "bccd"
    total = 0
    for split in SPLITS:
        coco = load_split(folder, split)
        raw = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        assert sum(len(image.labels) for image in coco.images) == len(raw["annotations"])
        assert coco.class_names == tuple(category["name"] for category in raw["categories"])
        total += len(coco.images)
        image = coco.images[0]
        assert read_image(image.path).shape == (image.height_px, image.width_px, 3)
    assert total == len(list((folder / "images").iterdir()))
