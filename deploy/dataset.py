"""
COCO-format data: read, checked, clipped. numpy and OpenCV only.

A data folder has `annotations/instances_{train,val,test}.json` and `images/`. The format is that of
https://cocodataset.org/#format-data, "object detection"; masks, areas and licences are not looked at.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Dict, Iterable, List, Optional, Tuple

import cv2
import numpy as np

from deploy.errors import ConfigError, DataError
from deploy.files import AnyPath, read_json

SPLITS = ("train", "val", "test")
TAIL_BYTES = 4096
"""The end of an image file is looked for in this many last bytes, so that checking a file costs two small reads."""
ROUNDING_PX = 0.01
"""A box that leaves its image by no more was rounded, and is not counted as clipped."""
LARGEST_IMAGE_PX = 1 << 28
"""Larger images are not decoded: 768 MiB of pixels, more than cameras take (2026: 200 megapixels), while a file of few
bytes may claim any size."""
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the JPEG markers that a picture's size follows."""


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """One image of a set, with its annotations."""

    image_id: int
    path: Path
    width_px: int
    height_px: int
    boxes_xyxy: np.ndarray
    """(n, 4), float32, pixels, clipped to the image."""
    labels: np.ndarray
    """(n,), int64, index into the set's class_names."""
    crowd: np.ndarray
    """(n,), bool: COCO's iscrowd, ignored by the evaluation."""


@dataclasses.dataclass(frozen=True)
class CocoSet:
    """An annotation file that has been checked."""

    annotations_path: Path
    images_dir: Path
    images: List[CocoImage]
    class_names: Tuple[str, ...]
    """In the order of the file's `categories`, which is the order of the labels."""
    category_ids: Tuple[int, ...]
    clipped: int
    """How many boxes of the file stuck out of their image and were clipped."""


def split_paths(data_dir: AnyPath, split: str) -> Tuple[Path, Path]:
    """
    (annotation file, image folder) of a split of a data folder.

    Raises:
        DataError: the folder, the file or the image folder is not there.
    """
    folder = Path(data_dir)
    annotations, images_dir = folder / "annotations" / f"instances_{split}.json", folder / "images"
    for path in (folder, annotations, images_dir):
        if not path.exists():
            raise DataError(
                f"no such file or folder: {path}. Expected a folder with annotations/instances_{split}.json, images/"
            )
    return annotations, images_dir


def load_coco(annotations: AnyPath, images_dir: AnyPath, check_files: bool = True) -> CocoSet:
    """
    The checked content of a COCO detection file.

    Args:
        check_files: also look at every image file: it is there, is a JPEG, PNG or BMP, and ends where such a file ends.

    Raises:
        DataError: what is wrong, where, and what was expected.
    """
    annotations, images_dir = Path(annotations), Path(images_dir)
    document = read_json(annotations, DataError, "a COCO detection file")
    if not isinstance(document, dict):
        raise DataError(f"{annotations} holds a {type(document).__name__}; expected an object: a COCO detection file")
    categories = _entries(document, "categories", annotations)
    image_entries = _entries(document, "images", annotations)
    annotation_entries = _entries(document, "annotations", annotations)

    names = [_name(entry, where) for where, entry in categories]
    for index, (where, _) in enumerate(categories):
        if names[index] in names[:index]:
            raise DataError(f"{where}: the name {names[index]!r} was used before; expected one category per name")
    label_of_category = _index_of_id(categories)
    index_of_image = _index_of_id(image_entries)
    _index_of_id(annotation_entries)
    sizes = [(_size_px(entry, "width", where), _size_px(entry, "height", where)) for where, entry in image_entries]
    paths = [_image_path(entry, images_dir, where) for where, entry in image_entries]

    rows: List[List[int]] = [[] for _ in image_entries]
    boxes = np.zeros((len(annotation_entries), 4), np.float64)
    labels = np.zeros(len(annotation_entries), np.int64)
    crowd = np.zeros(len(annotation_entries), bool)
    limits = np.zeros((len(annotation_entries), 2), np.float64)
    for row, (where, entry) in enumerate(annotation_entries):
        image_index = _referred(entry, "image_id", index_of_image, "images", where)
        labels[row] = _referred(entry, "category_id", label_of_category, "categories", where)
        boxes[row] = _box_xywh(entry, where)
        crowd[row] = bool(entry.get("iscrowd", 0))
        limits[row] = sizes[image_index]
        rows[image_index].append(row)

    boxes[:, 2:] += boxes[:, :2]  # x1 y1 x2 y2
    inside = _clipped(boxes, limits, annotation_entries)
    images = [
        CocoImage(entry["id"], path, *size, inside[chosen], labels[chosen], crowd[chosen])
        for (_, entry), path, size, chosen in zip(image_entries, paths, sizes, (np.array(r, np.int64) for r in rows))
    ]
    if check_files:
        check_image_files(images)
    clipped = int((np.abs(inside - boxes) > ROUNDING_PX).any(axis=1).sum())
    return CocoSet(annotations, images_dir, images, tuple(names), tuple(label_of_category), clipped)


def load_split(data_dir: AnyPath, split: str, limit: Optional[int] = None) -> CocoSet:
    """
    `load_coco` of a split of a data folder; the first `limit` images of it.

    Raises:
        ConfigError: `limit` is below 1.
        DataError: as `split_paths` and `load_coco`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of images is {limit}; expected at least 1")
    coco = load_coco(*split_paths(data_dir, split), check_files=False)
    coco = dataclasses.replace(coco, images=coco.images[:limit])
    check_image_files(coco.images)
    return coco


def check_image_files(images: Iterable[CocoImage]) -> None:
    """
    Looks at the first and last bytes of each image file; nothing is decoded.

    Raises:
        DataError: a file is missing, is not an image of a known format, or does not end where such a file ends.
    """
    for image in images:
        try:
            with image.path.open("rb") as file:
                fault = _image_fault(file)
        except OSError as error:
            raise DataError(f"cannot read {image.path} ({error.strerror}), image id {image.image_id}") from error
        if fault:
            raise DataError(f"{image.path}, image id {image.image_id}: {fault}. Bring the file again or drop the image")


def read_image(path: AnyPath) -> np.ndarray:
    """
    (height, width, 3), uint8, blue-green-red, EXIF orientation applied.

    As mmcv's `imread` gives it: grey is repeated, alpha is dropped, of 16 bits the upper 8 are left.

    Raises:
        DataError: the file is missing, truncated, not an image, or larger than LARGEST_IMAGE_PX.
    """
    try:
        with Path(path).open("rb") as file:
            fault = _image_fault(file)
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise DataError(f"cannot read the image {path} ({error.strerror})") from error
    if fault:
        raise DataError(f"{path}: {fault}")
    width, height = _size_in_header_px(content)
    if width * height > LARGEST_IMAGE_PX:
        raise DataError(
            f"{path} says that it has {width} x {height} pixels; expected at most {LARGEST_IMAGE_PX / 1e6:.0f} "
            "megapixels. Scale it down or cut it into tiles"
        )
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # a size beyond OpenCV's limits, for one
        raise DataError(f"{path}: OpenCV cannot decode the image: {error}") from error
    if image is None:
        raise DataError(f"{path}: OpenCV cannot decode the image; expected a JPEG, PNG or BMP")
    return image


def _entries(document: Dict[str, Any], key: str, path: Path) -> List[Tuple[str, Dict[str, Any]]]:
    """(where it stands, entry) of each entry of a list of the file, none of which may be empty."""
    if key not in document:
        raise DataError(f"{path} has no key {key!r}; expected a COCO file: images, annotations, categories")
    entries = document[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: {key!r} is not a list of objects; expected a COCO detection file")
    if not entries:
        raise DataError(f"{path} has no {key} at all: there is nothing to learn or to measure. Is it the right file?")
    return [(f"{path}: {key}[{index}] (id {entry.get('id')!r})", entry) for index, entry in enumerate(entries)]


def _clipped(boxes_xyxy: np.ndarray, limits_wh: np.ndarray, entries: List[Tuple[str, Dict[str, Any]]]) -> np.ndarray:
    """The boxes as far as they are in their images, (n, 4), float32; raises where nothing of one is."""
    inside = np.clip(boxes_xyxy, 0, np.tile(limits_wh, 2)).astype(np.float32)
    outside = np.flatnonzero((inside[:, 2:] <= inside[:, :2]).any(axis=1))
    if outside.size:
        where, entry = entries[outside[0]]
        width, height = limits_wh[outside[0]].astype(int)
        raise DataError(
            f"{where}: bbox {entry['bbox']} lies wholly outside its image of {width} x {height} pixels; expected "
            "[x, y, width, height] in pixels, some of it in the image. Correct or remove it"
        )
    return inside


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _index_of_id(entries: List[Tuple[str, Dict[str, Any]]]) -> Dict[int, int]:
    """id -> position in the list, in the order of the list."""
    index_of: Dict[int, int] = {}
    for index, (where, entry) in enumerate(entries):
        if not _is_integer(entry.get("id")):
            raise DataError(f"{where}: the id is no integer; expected an integer, different for each entry")
        first = index_of.setdefault(entry["id"], index)
        if first != index:
            raise DataError(f"{where}: entry [{first}] has the same id; expected a different one for each")
    return index_of


def _name(entry: Dict[str, Any], where: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: name is {name!r}; expected the name of the class. Add it")
    return name


def _size_px(entry: Dict[str, Any], key: str, where: str) -> int:
    value: Any = entry.get(key)
    if not _is_integer(value) or value <= 0:
        raise DataError(f"{where}: {key} is {value!r}; expected a positive integer, in pixels")
    return int(value)


def _image_path(entry: Dict[str, Any], images_dir: Path, where: str) -> Path:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: file_name is {name!r}; expected the image's path inside {images_dir}")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{where}: file_name {name!r} leaves the image folder; expected a path inside {images_dir}")
    return images_dir / name


def _referred(entry: Dict[str, Any], key: str, index_of: Dict[int, int], target: str, where: str) -> int:
    value: Any = entry.get(key)
    if not _is_integer(value) or value not in index_of:
        raise DataError(f"{where}: {key} is {value!r}; expected the id of an entry of {target!r}. Correct or remove it")
    return index_of[value]


def _box_xywh(entry: Dict[str, Any], where: str) -> List[float]:
    box: Any = entry.get("bbox")
    # JSON's true is an int here, NaN is below nothing, and an integer may be too long for a float.
    if (
        not isinstance(box, list)
        or not all(type(v) in (int, float) and abs(v) < sys.float_info.max for v in box)
        or len(box) != 4
    ):
        raise DataError(f"{where}: bbox is {box!r}; expected four finite numbers [x, y, width, height], in pixels")
    if box[2] <= 0 or box[3] <= 0:
        raise DataError(f"{where}: bbox is {box!r}, of no size; expected positive width and height. Remove it")
    return [float(value) for value in box]


def _image_fault(file: BinaryIO) -> str:
    """What is wrong with an image file, or nothing; found without decoding it."""
    head = file.read(8)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read()
    if head.startswith(b"\xff\xd8\xff"):
        if b"\xff\xd9" in tail:
            return ""
        file.seek(0)
        # Phones append previews and films of any length to a JPEG: then the end is further ahead.
        return "" if _has_jpeg_end(file.read()) else "a truncated JPEG (it has no end-of-image marker)"
    if head == b"\x89PNG\r\n\x1a\n":
        return "" if b"IEND" in tail else "a truncated PNG (it has no IEND chunk)"
    if head.startswith(b"BM"):
        return "" if size >= int.from_bytes(head[2:6], "little") else "a truncated BMP (its header says more)"
    return f"not an image: it begins with {head!r}; expected a JPEG, PNG or BMP"


def _has_jpeg_end(content: bytes) -> bool:
    """
    Whether an end-of-image marker follows the image data. Those of thumbnails stand before it, in header segments.

    Markers and segments: ITU-T T.81, annex B.
    """
    position, marker = 2, 0
    while marker != 0xDA:  # start of scan: image data from here on, where 0xFF is followed by 0 or a restart marker
        if position + 4 > len(content) or content[position] != 0xFF:
            return False
        marker = content[position + 1]
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return b"\xff\xd9" in content[position:]


def _size_in_header_px(content: bytes) -> Tuple[int, int]:
    """
    Width and height that a JPEG, PNG or BMP claims; (0, 0) where none is found, which decoding then stumbles over.

    Layouts: PNG specification 11.2.1 (IHDR); BITMAPINFOHEADER, and BITMAPCOREHEADER of 12 bytes; ITU-T T.81, B.2.2.
    """
    if content.startswith(b"\x89PNG"):
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    if content.startswith(b"BM"):
        side = 2 if content[14:18] == b"\x0c\0\0\0" else 4
        width, height = content[18 : 18 + side], content[18 + side : 18 + 2 * side]
        # Negative heights stand for rows from top to bottom.
        return abs(int.from_bytes(width, "little", signed=True)), abs(int.from_bytes(height, "little", signed=True))
    position = 2
    while position + 9 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker in FRAME_MARKERS:
            height, width = content[position + 5 : position + 7], content[position + 7 : position + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return 0, 0
