"""
Where a data folder keeps the annotations and the images of each split, in the layouts that people have.

- ours: `annotations/instances_train.json` and `images/`, or `images/train/` as Datumaro and CVAT write it;
- COCO's own: `annotations/instances_train2017.json` and `train2017/`;
- Roboflow's: `train/_annotations.coco.json` with the images beside it, `valid/` and `test/` likewise;
- CVAT's export of one split: `annotations/instances_default.json` and `images/`, which is any split that is asked for;
  or a folder of such an export for each split.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import List, Optional, Tuple

from deploy.errors import DataError
from deploy.files import AnyPath

SPLITS = ("train", "val", "test")
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Split -> what its folder is called."""
LAYOUT = (
    "annotations/instances_{train,val,test}.json and images/, or the layout of COCO, Roboflow or CVAT (docs/data.md)"
)
ONE_SPLIT = "instances_default.json"
HEAD_BYTES = 1 << 20
"""The first file name of an annotation file is looked for in so many bytes."""


def split_paths(data_dir: AnyPath, split: str) -> Tuple[Path, Path]:
    """
    (annotation file, image folder) of a split of a data folder.

    Raises:
        DataError: the folder, the file or the image folder is not there, or several files could be meant.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"no such file or folder: {folder}. Expected one with {_expected(split)}")
    annotations = annotations_path(folder, split)
    if annotations is None:
        there = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.json"))[:10]
        ours = folder / "annotations" / f"instances_{split}.json"
        raise DataError(
            f"no such file or folder: {ours}. Expected {_expected(split)} in {folder}; it has "
            f"{', '.join(there) if there else 'no JSON file in a folder'}"
        )
    return annotations, _images_dir(folder, split, annotations)


def has_split(data_dir: AnyPath, split: str) -> bool:
    """Whether a data folder has a split of its own: CVAT's export of one split is none of them."""
    found = annotations_path(Path(data_dir), split) if Path(data_dir).is_dir() else None
    return found is not None and found != Path(data_dir) / "annotations" / ONE_SPLIT


def annotations_path(folder: Path, split: str) -> Optional[Path]:
    """
    The annotation file of a split, in the first layout that has one; None if none has.

    Raises:
        DataError: there are several years of COCO.
    """
    ours = folder / "annotations" / f"instances_{split}.json"
    if ours.is_file():
        return ours
    years = [
        path for name in FOLDERS[split] for path in sorted((folder / "annotations").glob(f"instances_{name}*.json"))
        if re.fullmatch(rf"instances_{name}(\d{{4}})?\.json", path.name)
    ]  # fmt: skip
    if len(years) > 1:
        raise DataError(
            f"{folder} has {' and '.join(path.name for path in years)}; expected one file of the {split} split. "
            "Name one with --annotations, or move the other away"
        )
    beside = [
        folder / name / part
        for name in FOLDERS[split]
        for part in ("_annotations.coco.json", f"annotations/{ONE_SPLIT}")
    ]
    one = folder / "annotations" / ONE_SPLIT
    return next((path for path in (*years, *beside, one) if path.is_file()), None)


def _images_dir(folder: Path, split: str, annotations: Path) -> Path:
    """The folder of the images: of those there are the one that has the first image that the file names."""
    if annotations.name == "_annotations.coco.json":
        return annotations.parent
    if annotations.parent.parent != folder:  # an export of CVAT in a folder of its own
        folder = annotations.parent.parent
    names = [annotations.stem[len("instances_") :], *FOLDERS[split]]
    expected = [folder / "images", *(folder / "images" / name for name in names), *(folder / name for name in names)]
    there = [path for path in dict.fromkeys(expected) if path.is_dir()]
    if not there:
        raise DataError(f"no such file or folder: {folder / 'images'}. Expected {_expected(split)} in {folder}")
    if len(there) > 1:
        first = _first_file_name(annotations)
        there.sort(key=lambda path: not (path / first).is_file())  # a stable sort: else the first of them
    return there[0]


def _first_file_name(annotations: Path) -> str:
    with annotations.open("rb") as file:
        found = re.search(rb'"file_name"\s*:\s*"([^"\\]+)"', file.read(HEAD_BYTES))
    return found.group(1).decode("utf-8", "replace") if found else ""


def _expected(split: str) -> str:
    name = FOLDERS[split][min(1, len(FOLDERS[split]) - 1)]
    return (
        f"annotations/instances_{split}.json and images/ (or COCO's instances_{split}2017.json and {split}2017/, "
        f"Roboflow's {name}/_annotations.coco.json, or CVAT's annotations/{ONE_SPLIT} of one split)"
    )


def check_splits(data_dir: AnyPath) -> None:
    """Raises DataError if a data folder lacks a split, as `split_paths` tells it."""
    for split in SPLITS:
        split_paths(data_dir, split)


def known_splits(data_dir: AnyPath) -> List[str]:
    """The splits that a data folder has."""
    return [split for split in SPLITS if has_split(data_dir, split)]
