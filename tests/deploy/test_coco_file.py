"""Every field of a detection file: what is read, what is left out, what is refused and what is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from deploy.coco_file import ERROR, LEFT_OUT, NOTE, CocoFile, coco_file_from_document, read_document
from deploy.dataset import coco_document, load_coco, renumbered, with_classes
from deploy.errors import DataError

Document = Dict[str, Any]
RNG = np.random.default_rng(0)
IMAGES = 20


def _document(boxes: int = 200) -> Document:
    """Images of 64 x 48 pixels with boxes of two classes anywhere in them."""
    corners = RNG.integers(0, (40, 30), (boxes, 2))
    sides = RNG.integers(4, 18, (boxes, 2))
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(IMAGES)],
        "annotations": [
            {
                "id": i + 1, "image_id": i % IMAGES + 1, "category_id": i % 2 + 1, "iscrowd": 0,
                "bbox": [*corner, *side], "area": side[0] * side[1],
            }
            for i, (corner, side) in enumerate(zip(corners.tolist(), sides.tolist(), strict=True))
        ],
        "categories": [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}],
    }  # fmt: skip


def _read(document: Document, tmp_path: Path) -> CocoFile:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    return coco_file_from_document(read_document(path), path, tmp_path)


def _load(document: Document, tmp_path: Path, **options: Any) -> Any:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    return load_coco(path, tmp_path, check_files=False, **options)


def _codes(file: CocoFile, severity: str) -> List[str]:
    return [fault.code for fault in file.faults if fault.severity == severity]


def _each(change: Callable[[Document], None]) -> Document:
    document = _document()
    for entry in document["annotations"]:
        change(entry)
    return document


BAD_BOXES = {
    "no height": ([3, 4, 5, 0], "no_size"),
    "negative": ([3, 4, -5, 6], "no_size"),
    "outside": ([64, 4, 5, 6], "outside"),
    "not finite": ([3, float("nan"), 5, 6], "not_a_box"),
    "infinite": ([3, float("inf"), 5, 6], "not_a_box"),
    "beyond any image": ([3, 3.5e38, 5, 6], "not_a_box"),
    "of a size beyond any image": ([3, 4, 1e300, 1e300], "not_a_box"),
    "empty": ([], "not_a_box"),
    "null": (None, "not_a_box"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_a_bad_box_among_many_is_left_out_and_said(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _document()
    box, code = BAD_BOXES[case]
    for row in (7, 150):
        document["annotations"][row]["bbox"] = box
    file = _read(document, tmp_path)
    assert _codes(file, LEFT_OUT) == [code]
    assert _codes(file, ERROR) == []
    coco = _load(document, tmp_path)
    assert sum(len(image.labels) for image in coco.images) == 198
    told = capsys.readouterr().err
    assert "2 boxes left out" in told
    assert "2 of 200 entries" in told
    assert "annotations[7] (id 8)" in told
    assert "annotations[150] (id 151)" in told
    with pytest.raises(DataError, match=r"annotations\[7\] \(id 8\)"):
        _load(document, tmp_path, strict=True)


def test_more_than_one_bad_box_in_a_hundred_is_an_error(tmp_path: Path) -> None:
    document = _document()
    for row in (7, 150, 151):
        document["annotations"][row]["bbox"][2] = 0
    with pytest.raises(DataError, match=r"of no size; expected .*Above 1% of all boxes.*3 of 200 entries"):
        _load(document, tmp_path)


def _shares(entry: Document) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x / 64, y / 48, width / 64, height / 48]


def _corners(entry: Document) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x, y, x + width, y + height]


def _class_index(entry: Document) -> None:
    entry["category_id"] -= 1


MISTAKES = {
    "shares": (_shares, "go from 0 to 1"),
    "corners": (_corners, r"look like \[x1, y1, x2, y2\]"),
    "class indices": (_class_index, "class indices, counted from 0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_of_the_whole_file_is_named(case: str, tmp_path: Path) -> None:
    change, message = MISTAKES[case]
    with pytest.raises(DataError, match=message):
        _load(_each(change), tmp_path)


def test_centre_boxes_are_named(tmp_path: Path) -> None:
    """Large objects all over the image, so that many would stick out if x and y were a corner."""
    document = _document()
    for entry in document["annotations"]:
        width, height = RNG.integers(20, 40), RNG.integers(16, 30)
        x, y = RNG.uniform(0, 64 - width), RNG.uniform(0, 48 - height)
        entry["bbox"] = [x + width / 2, y + height / 2, float(width), float(height)]
    with pytest.raises(DataError, match=r"look like \[centre x, centre y, width, height\]"):
        _load(document, tmp_path)


def test_large_boxes_from_near_the_corner_are_no_mistake(tmp_path: Path) -> None:
    """One large object an image: wider than it is far from the edge, and a little out of the image."""

    def large(entry: Document) -> None:
        entry["bbox"] = [2, 3, 63, 44]

    assert _load(_each(large), tmp_path).clipped == 200


def test_exchanged_sizes_are_guessed_where_boxes_lie_outside(tmp_path: Path) -> None:
    document = _document()
    for image in document["images"]:
        image.update(width=30, height=64)
    document["annotations"] = [
        dict(entry, bbox=[40 + i % 5, 5, 10, 10]) for i, entry in enumerate(document["annotations"])
    ]
    with pytest.raises(DataError, match="Width and height of the images look exchanged"):
        _load(document, tmp_path)


@pytest.mark.parametrize("value", ["0", "1", 2, [0], 0.5])
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_a_flag_of_a_wrong_type_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    document = _document()
    document["annotations"][3][key] = value
    with pytest.raises(DataError, match=rf"annotations\[3\] \(id 4\): {key} is .*expected 0 or 1.*check_data"):
        _load(document, tmp_path)


@pytest.mark.parametrize("value", [None, False, 0.0, 0])
def test_a_flag_that_is_null_or_false_is_0(value: Any, tmp_path: Path) -> None:
    file = _read(_each(lambda entry: entry.update(iscrowd=value, ignore=value)), tmp_path)
    assert not file.crowd.any()
    assert not file.ignored.any()


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_nothing_to_learn_is_an_error(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"none of its 200 boxes .*200 have {key} 1"):
        _load(_each(lambda entry: entry.update({key: 1})), tmp_path)


def test_boxes_without_a_whole_pixel_are_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="200 have no whole pixel"):
        _load(_each(lambda entry: entry.update(bbox=[7, 7, 0.5, 20])), tmp_path)


@pytest.mark.parametrize("value", ["25", [25], True])
def test_an_area_of_a_wrong_type_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    document = _document()
    document["annotations"][3]["area"] = value
    with pytest.raises(DataError, match=r"annotations\[3\] \(id 4\): area is .*expected a number"):
        _load(document, tmp_path)


@pytest.mark.parametrize("value", [None, 0, float("nan"), -3, 10**400])
def test_an_area_that_says_nothing_is_that_of_the_box(value: Any, tmp_path: Path) -> None:
    document = _document()
    document["annotations"][3].update(area=value, bbox=[1, 2, 5, 6])
    file = _read(document, tmp_path)
    assert file.areas[3] == 30
    assert file.areas[4] == document["annotations"][4]["area"]
    assert _codes(file, NOTE) == ["area_unknown"]


def test_a_missing_area_is_nothing_to_speak_of(tmp_path: Path) -> None:
    file = _read(_each(lambda entry: entry.pop("area")), tmp_path)
    assert file.faults == []
    np.testing.assert_array_equal(file.areas, file.boxes_xywh[:, 2] * file.boxes_xywh[:, 3])


@pytest.mark.parametrize("value", ["7", 7.0, None, True])
def test_an_id_of_a_wrong_type_names_the_command(value: Any, tmp_path: Path) -> None:
    document = _document()
    document["images"][6]["id"] = value
    with pytest.raises(DataError, match=r"images\[6\].*no integer.*python -m crosskd\.check_data DIR --write"):
        _load(document, tmp_path)


def test_ids_of_any_size_are_kept_and_renumbered_apart(tmp_path: Path) -> None:
    document = _document()
    for entry in document["images"]:
        entry["id"] += 2**64
    for entry in document["annotations"]:
        entry["image_id"] += 2**64
    coco = _load(document, tmp_path)
    assert [image.image_id for image in coco.images] == [2**64 + 1 + i for i in range(IMAGES)]
    written = coco_document(renumbered(coco))
    assert [entry["id"] for entry in written["images"]] == list(range(1, IMAGES + 1))
    assert {entry["category_id"] for entry in written["annotations"]} == {1, 2}


def test_a_document_of_a_set_says_what_the_file_said(tmp_path: Path) -> None:
    document = _document()
    document["annotations"][3].update(iscrowd=1)
    document["annotations"][4].update(ignore=1)
    document["annotations"][5].update(bbox=[60, 5, 10, 10], area=77)
    coco = _load(document, tmp_path)
    whole = coco_document(coco, as_annotated=True)["annotations"]
    assert sum(entry["iscrowd"] for entry in whole) == 1
    assert sum(entry.get("ignore", 0) for entry in whole) == 1
    boxes = [(*entry["bbox"], entry["area"]) for entry in document["annotations"]]
    assert sorted((*entry["bbox"], entry["area"]) for entry in whole) == sorted(boxes)
    clipped = [entry["bbox"] for entry in coco_document(coco)["annotations"]]
    assert [60, 5, 4, 10] in clipped


def test_classes_without_boxes_and_the_name_of_a_group_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _document()
    document["categories"] = [
        {"id": 0, "name": "parts", "supercategory": "none"},
        {"id": 1, "name": "nut", "supercategory": "parts"},
        {"id": 2, "name": "bolt", "supercategory": "parts"},
        {"id": 3, "name": "rivet", "supercategory": "parts"},
    ]
    _load(document, tmp_path)
    assert capsys.readouterr().err == ""
    _load(document, tmp_path, by_class=True)
    told = capsys.readouterr().err
    assert "2 of 4 classes have no box to learn from: 'parts', 'rivet'" in told
    assert "'parts' looks like a name of the group" in told
    assert "--drop-empty-classes" in told


def test_classes_in_another_order_are_put_in_order(tmp_path: Path) -> None:
    document = _document()
    document["categories"].reverse()
    coco = _load(document, tmp_path)
    there = with_classes(coco, ("nut", "bolt"), (1, 2), "train.json")
    assert there.class_names == ("nut", "bolt")
    for before, after in zip(coco.images, there.images, strict=True):
        assert [coco.class_names[label] for label in before.labels] == [
            there.class_names[label] for label in after.labels
        ]
    assert with_classes(there, ("nut", "bolt"), (1, 2), "train.json") is there


DIFFERENT = {
    "missing": (("nut", "bolt", "rivet"), (1, 2, 3), r"'rivet' \(id 3\) is missing"),
    "another id": (("nut", "bolt"), (1, 5), r"'bolt' has the id 2 in place of 5"),
    "one more": (("nut",), (1,), r"'bolt' \(id 2\) is there besides"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_classes_are_refused_by_name(case: str, tmp_path: Path) -> None:
    names, ids, message = DIFFERENT[case]
    with pytest.raises(
        DataError, match=rf"train\.json has the classes .*a\.json has the classes \['nut', 'bolt'\]: {message}"
    ):
        with_classes(_load(_document(), tmp_path), names, ids, "train.json")


def test_a_further_class_without_boxes_is_left_out(tmp_path: Path) -> None:
    document = copy.deepcopy(_document())
    document["categories"].insert(0, {"id": 9, "name": "parts"})
    coco = with_classes(_load(document, tmp_path), ("nut", "bolt"), (1, 2), "train.json")
    assert (coco.class_names, coco.category_ids) == (("nut", "bolt"), (1, 2))
    assert {label for image in coco.images for label in image.labels.tolist()} == {0, 1}
