"""Corrections of COCO files that need no person: types, names, references, and boxes of turned or scaled images."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from deploy.coco_file import is_side
from deploy.dataset import CocoImage, ImageFile, file_of_image, path_in_other_letters, scale_of, size_fault

Entry = dict[str, Any]
Changes = collections.Counter[str]
FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1}
NO_BOXES = [np.zeros(0)] * 6
NAMES = {"images": "file_name", "categories": "name"}
"""List -> what two entries with one id must have in common to be the same thing twice."""


class ImageFiles:
    """What the files of images say of themselves; each file is looked at once."""

    def __init__(self) -> None:
        self.damaged: dict[Path, str] = {}
        """Pictures that cannot be decoded -> why."""
        self._known: dict[Path, ImageFile] = {}

    def of(self, images: Sequence[CocoImage]) -> list[ImageFile]:
        return [self.of_image(image) for image in images]

    def of_image(self, image: CocoImage) -> ImageFile:
        if image.path not in self._known:
            self._known[image.path] = file_of_image(image)
        return self._known[image.path]


def image_entries(document: Entry, images_dir: Path) -> list[CocoImage]:
    """The images of a file, sound or not, without their boxes; a size that is no size is 1."""
    return [_image(entry, images_dir) for entry in document["images"]]


def _image(entry: Entry, images_dir: Path) -> CocoImage:
    width, height = (side if is_side(side := entry.get(key)) else 1 for key in ("width", "height"))
    return CocoImage(entry.get("id"), images_dir / str(entry.get("file_name")), width, height, *NO_BOXES)  # type: ignore[arg-type]


def correct_entries(document: Entry, images_dir: Path, files: ImageFiles, changes: Changes) -> None:
    """
    Corrects names, ids, references, flags, boxes and areas in place, and drops images that cannot be read.

    Args:
        changes: counts what was corrected.
    """
    for entry in document["images"]:
        name = file_name_there(images_dir, entry.get("file_name"))
        if name is not None and name != entry.get("file_name"):
            entry["file_name"] = name
            changes["file names, made those of the files"] += 1
    readable = []
    for entry, image in zip(document["images"], image_entries(document, images_dir), strict=True):
        file = files.of_image(image)
        if file.missing or file.header.fault or image.path in files.damaged:
            changes["images that are missing or cannot be read, dropped"] += 1
            continue
        readable.append(entry)
        if not all(is_side(entry.get(key)) for key in ("width", "height")):
            entry["width"], entry["height"] = file.shown_wh_px
            changes["sizes of images, taken from the pictures"] += 1
    document["images"] = readable

    _use_class_indices(document, changes)
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        _renumber(document, key, field, changes)
    ids = [entry.get("id") for entry in document["annotations"]]
    if not all(type(value) is int for value in ids) or len(set(ids)) < len(ids):
        for number, entry in enumerate(document["annotations"], start=1):
            entry["id"] = number
        changes["ids of boxes, numbered anew"] += len(ids)
    for entry in document["annotations"]:
        for key in ("iscrowd", "ignore"):
            value = entry.get(key)
            if isinstance(value, str) and value.strip().lower() in FLAGS:
                entry[key] = FLAGS[value.strip().lower()]
                changes[f"{key} that was a string, made a number"] += 1
        box = _number_box(entry)
        if box is not None:
            entry["bbox"] = box
            changes["boxes made of strings or polygons"] += 1
        if isinstance(entry.get("area"), str):
            try:
                entry["area"] = float(entry["area"])
                changes["areas that were strings, made numbers"] += 1
            except ValueError:
                del entry["area"]
                changes["areas that were no numbers, dropped"] += 1
    if document["annotations"] and all(entry.get("iscrowd") in (1, True) for entry in document["annotations"]):
        for entry in document["annotations"]:
            entry["iscrowd"] = 0
        changes["iscrowd that was 1 for every box, taken off"] += len(document["annotations"])


def file_name_there(images_dir: Path, name: Any) -> str | None:
    """The file name that leads to an image: as it is, with slashes, or without folders at its beginning; or None."""
    if not isinstance(name, str) or "\0" in name:
        return None
    for form in (name, name.replace("\\", "/")):
        parts = [part for part in PurePosixPath(form).parts if part not in ("/", "..", ".")]
        for start in range(len(parts)):
            shorter = "/".join(parts[start:])
            if os.path.isfile(images_dir / shorter):
                return name if shorter == name else shorter
    there = path_in_other_letters(images_dir / name)
    return None if there is None or images_dir not in there.parents else there.relative_to(images_dir).as_posix()


def _number_box(entry: Entry) -> list[float] | None:
    """The box of an annotation whose box is four texts, or is not there but for polygons around it; else None."""
    box, polygons = entry.get("bbox"), entry.get("segmentation")
    try:
        if isinstance(box, list) and len(box) == 4 and all(isinstance(value, str) for value in box):
            return [float(value) for value in box]
        if box or not isinstance(polygons, list):
            return None
        points = np.array(list(itertools.chain.from_iterable(polygons)), np.float64).reshape(-1, 2)
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low.tolist(), *(high - low).tolist()]
    except (TypeError, ValueError):
        return None


def correct_sizes(document: Entry, images_dir: Path, files: ImageFiles, changes: Changes) -> None:
    """Turns and scales the boxes of images that were turned by EXIF or scaled since they were annotated, in place."""
    boxes_of: dict[Any, list[Entry]] = collections.defaultdict(list)
    for entry in document["annotations"]:
        if type(entry.get("image_id")) is int:
            boxes_of[entry["image_id"]].append(entry)
    for entry, image in zip(document["images"], image_entries(document, images_dir), strict=True):
        file = files.of_image(image)
        fault = size_fault(image, file)
        if fault not in ("turned", "scaled"):
            continue
        scale_x, scale_y = scale_of(image, file)
        for box in boxes_of[entry["id"]]:
            if not _is_box(box.get("bbox")):
                continue
            x, y, width, height = box["bbox"]
            if fault == "turned":
                box["bbox"] = turned_xywh(box["bbox"], image.width_px, image.height_px, file.header.orientation)
            else:
                box["bbox"] = [x * scale_x, y * scale_y, width * scale_x, height * scale_y]
                if type(box.get("area")) in (int, float):
                    box["area"] *= scale_x * scale_y
            changes[f"boxes of {fault} images, {fault} with them"] += 1
        entry["width"], entry["height"] = file.shown_wh_px
        changes[f"sizes of {fault} images"] += 1


def turned_xywh(box: list[float], width_px: int, height_px: int, orientation: int) -> list[float]:
    """
    A box of a picture as it is stored, in the picture as EXIF shows it (CIPA DC-008, orientation 5 to 8).

    Args:
        width_px, height_px: of the picture as it is stored.
    """
    x, y, width, height = box
    right, below = width_px - x - width, height_px - y - height
    new_x, new_y = {5: (y, x), 6: (below, x), 7: (below, right), 8: (y, right)}[orientation]
    return [new_x, new_y, height, width]


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)


def _canonical(value: Any) -> Any:
    """An id in the form in which '7', 7.0 and 7 are one; None if it is none."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() and len(value) < 100 else value
    return None


def _renumber(document: Entry, key: str, field: str, changes: Changes) -> None:
    """
    Makes the ids of a list integers, with the references to them. What is there twice stays once; different things
    with one id stay, since only a person knows which of them a box is of.
    """
    entries, forms = document[key], [_canonical(entry.get("id")) for entry in document[key]]
    changed = sum(
        entry.get("id") != form or type(entry.get("id")) is not int for entry, form in zip(entries, forms, strict=True)
    )
    references = sum(type(entry.get(field)) is not int for entry in document["annotations"])
    new_id = {form: form for form in forms}
    if not all(isinstance(form, int) for form in forms):
        # In the order of the ids, so that the same ones get the same numbers in all splits.
        new_id = {form: number for number, form in enumerate(sorted(set(forms), key=str), start=1)}
    kept: list[Entry] = []
    seen: dict[Any, Any] = {}
    for entry, form in zip(entries, forms, strict=True):
        name = entry.get(NAMES[key])
        if form is None or (form in seen and seen[form] == name):
            continue
        seen[form] = name
        entry["id"] = new_id[form]
        kept.append(entry)
    if changed:
        changes[f"ids of {key}, made integers"] += changed
    if len(kept) < len(entries):
        changes[f"{key} that are there twice or have no id, dropped"] += len(entries) - len(kept)
    document[key] = kept
    if changed or references:
        for entry in document["annotations"]:
            entry[field] = new_id.get(_canonical(entry.get(field)), entry.get(field))
        if references:
            changes[f"{field} of boxes, made integers"] += references


def _use_class_indices(document: Entry, changes: Changes) -> None:
    """Makes ids of categories of references that count them from 0."""
    ids = [entry.get("id") for entry in document["categories"]]
    used = {entry.get("category_id") for entry in document["annotations"] if type(entry.get("category_id")) is int}
    if used and 0 in used and 0 not in ids and used <= set(range(len(ids))):
        for entry in document["annotations"]:
            if type(entry.get("category_id")) is int:
                entry["category_id"] = ids[entry["category_id"]]
        changes["class indices of boxes, made ids"] += len(document["annotations"])
