"""The folders in which people keep COCO-format data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.errors import DataError
from deploy.layouts import SPLITS, known_splits, split_paths

LAYOUTS = {
    "ours": ("annotations/instances_{split}.json", "images"),
    "ours, split by Datumaro": ("annotations/instances_{split}.json", "images/{split}"),
    "COCO's own": ("annotations/instances_{split}2017.json", "{split}2017"),
    "COCO's own in images": ("annotations/instances_{split}2017.json", "images/{split}2017"),
    "another year": ("annotations/instances_{split}2014.json", "{split}2014"),
    "Roboflow's": ("{folder}/_annotations.coco.json", "{folder}"),
    "CVAT's, one a split": ("{split}/annotations/instances_default.json", "{split}/images"),
}


def _made(folder: Path, annotations: str, images_dir: str, name: str = "a.jpg") -> None:
    for split in SPLITS:
        words = {"split": split, "folder": {"val": "valid"}.get(split, split)}
        path, images = folder / annotations.format(**words), folder / images_dir.format(**words)
        path.parent.mkdir(parents=True, exist_ok=True)
        images.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": [{"id": 1, "file_name": name}]}))
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).touch()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_known(tmp_path: Path, layout: str) -> None:
    _made(tmp_path, *LAYOUTS[layout])
    assert known_splits(tmp_path) == list(SPLITS)
    for split in SPLITS:
        words = {"split": split, "folder": {"val": "valid"}.get(split, split)}
        expected = tuple(tmp_path / part.format(**words) for part in LAYOUTS[layout])
        assert split_paths(tmp_path, split) == expected


def test_the_image_folder_is_the_one_that_has_the_first_image(tmp_path: Path) -> None:
    _made(tmp_path, *LAYOUTS["ours"], name="train/a.jpg")  # a folder of the split, which the names have too
    assert split_paths(tmp_path, "train")[1] == tmp_path / "images"


def test_an_export_of_cvat_is_the_split_that_is_asked_for_but_none_of_its_own(tmp_path: Path) -> None:
    _made(tmp_path, "annotations/instances_default.json", "images")
    assert split_paths(tmp_path, "test") == (tmp_path / "annotations/instances_default.json", tmp_path / "images")
    assert known_splits(tmp_path) == []


def test_two_years_are_not_guessed_between(tmp_path: Path) -> None:
    _made(tmp_path, *LAYOUTS["COCO's own"])
    _made(tmp_path, *LAYOUTS["another year"])
    with pytest.raises(DataError, match=r"instances_val2014\.json and instances_val2017\.json"):
        split_paths(tmp_path, "val")


def test_what_is_there_is_said_where_nothing_fits(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/train.json").write_text("{}")
    with pytest.raises(DataError, match=r"Roboflow's valid/_annotations\.coco\.json.*it has labels/train\.json"):
        split_paths(tmp_path, "val")
