"""
A COCO detection file, field by field: what it holds as arrays, and everything that is wrong with it.

The format is that of https://cocodataset.org/#format-data, "object detection"; masks and licences are not looked at.
Fields are read as whole columns, so that a million boxes take seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from deploy.errors import DataError
from deploy.files import AnyPath, read_json
from deploy.limits import FURTHEST_PX
from deploy.machine import no_garbage_collection
from deploy.schema import short

SHARE_OF_BAD_BOXES = 0.01
"""So many of all boxes may be left out; more are a mistake of the file."""
EXAMPLES = 3
ROUNDING_PX = 0.01
"""A box that leaves its image by no more was rounded, and is not counted as clipped."""
LEAST_SIDE_PX = 1.0
"""Thinner boxes are not trained on: mmdet leaves them out (`CocoDataset.parse_data_info`)."""
COMMAND = "python -m crosskd.check_data DIR --write CLEAN_DIR"
"""What corrects a set of data."""

ERROR, LEFT_OUT, NOTE = "error", "left out", "note"
"""What a fault comes to: the file will not do; the entries are left out; it is good to know."""

Entry = Dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something in a file, or in the images of a set, that is not as expected."""

    code: str
    """A name for programs, such as 'no_size'."""
    severity: str
    """ERROR, LEFT_OUT or NOTE."""
    count: int
    """How many entries have it."""
    text: str
    """For people: how many, the first of them, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """
    The content of a detection file that can be used, and its faults.

    Boxes that are left out, and those that refer to an image or category that is not there, are in none of the arrays.
    """

    path: Path
    class_names: Tuple[str, ...]
    category_ids: Tuple[int, ...]
    supercategories: Tuple[Any, ...]
    image_ids: List[int]
    file_names: List[str]
    sizes_px: np.ndarray
    """(images, 2), int64: width and height."""
    rows: np.ndarray
    """(n,), int64: the boxes' positions in the file's list of annotations."""
    image_index: np.ndarray
    """(n,), int64."""
    labels: np.ndarray
    """(n,), int64, index into class_names."""
    boxes_xywh: np.ndarray
    """(n, 4), float64, pixels, as the file has them."""
    inside_xyxy: np.ndarray
    """(n, 4), float32, pixels, clipped to the image."""
    crowd: np.ndarray
    """(n,), bool: iscrowd."""
    ignored: np.ndarray
    """(n,), bool: ignore, which mmdet does not train on and COCO's evaluation does not know."""
    areas: np.ndarray
    """(n,), float64, square pixels: of the mask where the file has it, else of the box."""
    clipped: int
    """How many of the boxes stick out of their image."""
    faults: List[Fault]

    @property
    def usable(self) -> np.ndarray:
        """(n,), bool: what a detector learns from."""
        sides = self.inside_xyxy[:, 2:] - self.inside_xyxy[:, :2]
        return ~self.crowd & ~self.ignored & (sides >= LEAST_SIDE_PX).all(axis=1)

    def boxes_by_class(self) -> np.ndarray:
        """(classes,), int64: usable boxes."""
        return np.bincount(self.labels[self.usable], minlength=len(self.class_names))


def read_document(path: AnyPath) -> Dict[str, Any]:
    """
    The JSON object of a detection file, whose three lists are there; entries are not looked at.

    Raises:
        DataError: the file is missing or is no COCO detection file.
    """
    path = Path(path)
    with no_garbage_collection():
        document = read_json(path, DataError, "a COCO detection file")
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}; expected an object: a COCO detection file")
    for key in ("categories", "images", "annotations"):
        if key not in document:
            raise DataError(f"{path} has no key {key!r}; expected a COCO file: images, annotations, categories")
        entries = document[key]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: {key!r} is not a list of objects; expected a COCO detection file")
        if not entries:
            raise DataError(
                f"{path} has no {key} at all: there is nothing to learn or to measure. Is it the right file?"
            )
    return document


def coco_file_from_document(document: Dict[str, Any], path: Path, images_dir: Path) -> CocoFile:
    """
    The checked content of a detection file, with all of its faults.

    Args:
        document: of `read_document`.
    """
    faults = _Faults(path, document)
    categories, images, annotations = (document[key] for key in ("categories", "images", "annotations"))
    names = _names(categories, faults)
    label_of_id = _index_of_id(categories, "categories", faults)
    index_of_id = _index_of_id(images, "images", faults)
    _index_of_id(annotations, "annotations", faults)
    sizes = np.array([_sizes(images, key, faults) for key in ("width", "height")], np.int64).T
    file_names = _file_names(images, images_dir, faults)

    image_index = _referred(annotations, "image_id", index_of_id, "images", faults)
    labels = _referred(annotations, "category_id", label_of_id, "categories", faults)
    crowd, ignored = (_flags(annotations, key, faults) for key in ("iscrowd", "ignore"))
    boxes, numeric = _boxes(annotations)
    areas = _areas(annotations, boxes, faults)
    known = (image_index >= 0) & (labels >= 0)
    limits = sizes[image_index]
    limits[~known] = 0
    bad = _bad_boxes(boxes, numeric, limits, known, faults)

    rows = np.flatnonzero(known & ~bad)
    kept, limits = boxes[rows], np.tile(limits[rows], 2)
    whole = np.concatenate([kept[:, :2], kept[:, :2] + kept[:, 2:]], axis=1)
    inside = np.clip(whole, 0, limits).astype(np.float32)
    file = CocoFile(
        path, tuple(names), _column(categories, "id"), _column(categories, "supercategory"),
        list(_column(images, "id")), file_names, sizes, rows, image_index[rows], labels[rows], kept, inside,
        crowd[rows], ignored[rows], areas[rows],
        int((np.abs(inside - whole) > ROUNDING_PX).any(axis=1).sum()), faults.found,
    )  # fmt: skip
    if len(index_of_id) == len(images) and len(label_of_id) == len(categories):
        _tell_of_learning(file, faults)
    return file


class _Faults:
    """Collects the faults of a file, with the first entries that have each."""

    def __init__(self, path: Path, document: Dict[str, Any]) -> None:
        self._path, self._document = path, document
        self.found: List[Fault] = []

    def where(self, key: str, index: int) -> str:
        return f"{key}[{index}] (id {short(self._document[key][index].get('id'))})"

    def add(
        self, code: str, severity: str, key: str, indices: Sequence[int], what: Callable[[int], str], expected: str
    ) -> None:
        """
        Notes that entries of a list have a fault; does nothing if none has.

        Args:
            what: index -> what is wrong with the entry.
            expected: what was expected, and what to do.
        """
        if not len(indices):
            return
        first, *others = (f"{self.where(key, index)}: {what(index)}" for index in indices[:EXAMPLES])
        more = f" ({len(indices)} of {len(self._document[key])} entries; also {'; '.join(others)})" if others else ""
        self.found.append(Fault(code, severity, len(indices), f"{first}; expected {expected}{more}"))

    def tell(self, code: str, severity: str, count: int, text: str) -> None:
        """Notes what is no fault of single entries."""
        if count:
            self.found.append(Fault(code, severity, count, text))


def _column(entries: Sequence[Entry], key: str) -> Tuple[Any, ...]:
    return tuple(entry.get(key) for entry in entries)


def _is_integer(value: Any) -> bool:
    return type(value) is int  # JSON's true is an int to isinstance


def is_side(value: Any) -> bool:
    """Whether a value is a width or height of an image, in pixels."""
    return _is_integer(value) and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    """Whether a value is a text that a file or a class can have as its name."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    # JSON may hold one half of a surrogate pair, which no encoding has.
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _only_of(values: Sequence[Any], types: Tuple[type, ...]) -> bool:
    return set(map(type, values)) <= set(types)


def _where_not(values: Sequence[Any], is_right: Callable[[Any], bool]) -> List[int]:
    return [index for index, value in enumerate(values) if not is_right(value)]


def _names(categories: Sequence[Entry], faults: _Faults) -> List[str]:
    names = [entry.get("name") for entry in categories]
    wrong = _where_not(names, _is_text)
    faults.add(
        "category_name", ERROR, "categories", wrong, lambda index: f"name is {short(names[index])}",
        "the name of the class. Add it",
    )  # fmt: skip
    first: Dict[str, int] = {}
    again = [
        index for index, name in enumerate(names)
        if isinstance(name, str) and name and first.setdefault(name, index) != index
    ]  # fmt: skip
    faults.add(
        "category_name_twice", ERROR, "categories", again,
        lambda index: f"the name {names[index]!r} was used before", "one category per name",
    )  # fmt: skip
    return [str(name) for name in names]


def _index_of_id(entries: Sequence[Entry], key: str, faults: _Faults) -> Dict[int, int]:
    """id -> position in the list, in the order of the list; of equal ids the first."""
    ids = [entry.get("id") for entry in entries]
    if not _only_of(ids, (int,)):
        wrong = _where_not(ids, _is_integer)
        faults.add(
            "id", ERROR, key, wrong,
            lambda index: f"the id is no integer but {short(ids[index])} ({type(ids[index]).__name__})",
            f"an integer, different for each entry. {COMMAND} numbers them anew",
        )  # fmt: skip
    index_of: Dict[int, int] = {}
    again = []
    for index, value in enumerate(ids):
        if _is_integer(value) and index_of.setdefault(value, index) != index:  # type: ignore[arg-type]
            again.append(index)
    faults.add(
        "id_twice", ERROR, key, again,
        lambda index: f"entry [{index_of[ids[index]]}] has the same id",  # type: ignore[index]
        "a different one for each",
    )  # fmt: skip
    return index_of


def _sizes(images: Sequence[Entry], key: str, faults: _Faults) -> List[int]:
    values = [entry.get(key) for entry in images]
    wrong = _where_not(values, is_side)
    faults.add(
        "size", ERROR, "images", wrong, lambda index: f"{key} is {short(values[index])}",
        f"a positive integer, in pixels. {COMMAND} takes it from the picture",
    )  # fmt: skip
    for index in wrong:
        values[index] = 0
    return values  # type: ignore[return-value]


def _file_names(images: Sequence[Entry], images_dir: Path, faults: _Faults) -> List[str]:
    names = [entry.get("file_name") for entry in images]
    wrong = _where_not(names, _is_text)
    faults.add(
        "file_name", ERROR, "images", wrong, lambda index: f"file_name is {short(names[index])}",
        f"the image's path inside {images_dir}",
    )  # fmt: skip
    unnamed = set(wrong)
    leaves = [
        index for index, name in enumerate(names)
        if index not in unnamed and name and (name[0] == "/" or (".." in name and ".." in PurePosixPath(name).parts))
    ]  # fmt: skip
    faults.add(
        "file_name_leaves", ERROR, "images", leaves,
        lambda index: f"file_name {names[index]!r} leaves the image folder", f"a path inside {images_dir}",
    )  # fmt: skip
    if not wrong and len(set(names)) < len(names):
        first: Dict[Any, int] = {}
        again = [index for index, name in enumerate(names) if first.setdefault(name, index) != index]
        faults.add(
            "file_name_twice", NOTE, "images", again,
            lambda index: f"file_name {names[index]!r} is also that of images[{first[names[index]]}], so that each of "
            "the two has a part of the picture's boxes, or all twice",
            "one entry for each picture",
        )  # fmt: skip
    return [str(name) for name in names]


def _referred(
    annotations: Sequence[Entry], key: str, index_of: Dict[int, int], target: str, faults: _Faults
) -> np.ndarray:
    """(n,), int64: the positions of the entries that a field refers to; -1: of none."""
    values = [entry.get(key) for entry in annotations]
    usable: Sequence[Any] = values
    if not _only_of(values, (int,)):
        usable = [value if _is_integer(value) else None for value in values]
    index = np.array([index_of.get(value, -1) for value in usable], np.int64)
    wrong = np.flatnonzero(index < 0)
    hint = ""
    if (
        target == "categories"
        and wrong.size
        and {value for value in usable if value is not None} <= set(range(len(index_of)))
    ):  # 0 is used, and is the id of none
        hint = f". They look like class indices, counted from 0: {COMMAND} makes ids of them"
    faults.add(
        "class_indices" if hint else key, ERROR, "annotations", wrong.tolist(),
        lambda row: f"{key} is {short(values[row])}",
        f"the id of an entry of {target!r}. Correct or remove it{hint}",
    )  # fmt: skip
    return index


def _flags(annotations: Sequence[Entry], key: str, faults: _Faults) -> np.ndarray:
    """(n,), bool: of a field that is 0 or 1, or is missing, or null: 0."""
    values = [entry.get(key) for entry in annotations]
    if not _only_of(values, (int, float, bool, type(None))) or not set(values) <= {0, 1, None}:
        wrong = _where_not(values, lambda value: value is None or (isinstance(value, (int, float)) and value in (0, 1)))
        faults.add(
            key, ERROR, "annotations", wrong, lambda row: f"{key} is {short(values[row])}",
            f"0 or 1. {COMMAND} makes numbers of strings",
        )  # fmt: skip
        for row in wrong:
            values[row] = 0
    return np.array(values, object).astype(bool)


def _boxes(annotations: Sequence[Entry]) -> Tuple[np.ndarray, np.ndarray]:
    """(boxes_xywh, numeric): (n, 4), float64; (n,), bool: four numbers of pixels. Others are 0."""
    values = [entry.get("bbox") for entry in annotations]
    if _only_of(values, (list,)) and set(map(len, values)) == {4}:  # type: ignore[arg-type]
        flat = list(itertools.chain.from_iterable(values))  # type: ignore[arg-type]
        if _only_of(flat, (int, float)):
            try:
                boxes = np.array(flat, np.float64).reshape(-1, 4)
            except OverflowError:  # an integer may be too long for a float
                pass
            else:
                numeric = np.asarray((np.abs(boxes) <= FURTHEST_PX).all(axis=1))  # NaN is below nothing
                boxes[~numeric] = 0
                return boxes, numeric
    numeric = np.array([_is_box(value) for value in values])
    nothing = [0.0] * 4
    return np.array([v if is_box else nothing for v, is_box in zip(values, numeric)], np.float64), numeric


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(v) in (int, float) and abs(v) <= FURTHEST_PX for v in value)
    )


def _areas(annotations: Sequence[Entry], boxes: np.ndarray, faults: _Faults) -> np.ndarray:
    """(n,), float64: the field, or the box's own area where there is none that could be meant."""
    values = [entry.get("area", 0) for entry in annotations]
    if not _only_of(values, (int, float)):
        wrong = _where_not(values, lambda value: value is None or type(value) in (int, float))
        faults.add(
            "area", ERROR, "annotations", wrong, lambda row: f"area is {short(values[row])}",
            f"a number of square pixels. {COMMAND} makes numbers of strings",
        )  # fmt: skip
        for row in wrong:
            values[row] = 0
    areas = np.array(
        [np.nan if value is None or abs(value) > FURTHEST_PX**2 else value for value in values], np.float64
    )
    unknown = ~(areas > 0)
    with_size = (boxes[:, 2:] > 0).all(axis=1)  # what is said of others is enough
    given = [row for row in np.flatnonzero(unknown & with_size).tolist() if "area" in annotations[row]]
    faults.tell(
        "area_unknown", NOTE, len(given),
        f"{len(given)} of {len(values)} boxes have an area that is null, 0 or no number, such as "
        f"{faults.where('annotations', given[0]) if given else ''}: that of the box is taken",
    )  # fmt: skip
    areas[unknown] = boxes[unknown, 2] * boxes[unknown, 3]
    return areas


def _bad_boxes(
    boxes: np.ndarray, numeric: np.ndarray, limits_wh: np.ndarray, known: np.ndarray, faults: _Faults
) -> np.ndarray:
    """(n,), bool: boxes of no use, which are left out, or are an error where they are many or show a mistake."""
    no_size = numeric & (boxes[:, 2:] <= 0).any(axis=1)
    low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], limits_wh)
    # In float32, as they are used: nothing may be left of a box that reaches in by a thousandth of a pixel.
    empty = (low.astype(np.float32) >= high.astype(np.float32)).any(axis=1)
    outside = known & numeric & ~no_size & (limits_wh > 0).all(axis=1) & empty
    bad = ~numeric | no_size | outside
    mistake = _mistake(boxes, limits_wh, numeric & known & ~no_size)
    if mistake:
        faults.tell(
            "box_pattern", ERROR, len(boxes),
            f"{mistake}, in {len(boxes)} boxes, such as {boxes[0].tolist()} in "
            f"{faults.where('annotations', 0)} of an image of {limits_wh[0, 0]} x {limits_wh[0, 1]} pixels; expected "
            "[x, y, width, height] of the upper left corner, in pixels. Write them so",
        )  # fmt: skip
        return bad
    many = bad.sum() > SHARE_OF_BAD_BOXES * len(boxes)
    severity = ERROR if many else LEFT_OUT
    share = f". Above {SHARE_OF_BAD_BOXES:.0%} of all boxes are such: correct or remove them" if many else ""
    entries = faults._document["annotations"]
    hint = share
    if many and outside.sum() > SHARE_OF_BAD_BOXES * len(boxes):
        swapped = limits_wh[:, ::-1]
        fits = (boxes[:, :2] + boxes[:, 2:] <= swapped + 1).all(axis=1)
        if fits[known & numeric].mean() > 1 - SHARE_OF_BAD_BOXES:
            hint += ". Width and height of the images look exchanged"
    form = f"four finite numbers [x, y, width, height], in pixels, none above {FURTHEST_PX:.0e}"
    if any(not entries[row].get("bbox") and entries[row].get("segmentation") for row in np.flatnonzero(~numeric)):
        form += f". Some have a segmentation in its place: {COMMAND} makes boxes of polygons"
    for code, chosen, what, expected in (
        ("not_a_box", ~numeric, "", form),
        ("no_size", no_size, ", of no size", "positive width and height"),
        ("outside", outside, " lies wholly outside its image", "some of it in the image"),
    ):
        rows = np.flatnonzero(chosen).tolist()

        def words(row: int, code: str = code, what: str = what) -> str:
            box = short(entries[row].get("bbox"))
            size = f" of {limits_wh[row, 0]} x {limits_wh[row, 1]} pixels" if code == "outside" else ""
            return f"bbox {box}{what}{size}" if code == "outside" else f"bbox is {box}{what}"

        faults.add(code, severity, "annotations", rows, words, expected + (hint if code == "outside" else share))
    return bad


def _mistake(boxes: np.ndarray, limits_wh: np.ndarray, usable: np.ndarray) -> str:
    """What is wrong with most boxes of a file, by their pattern; empty if nothing is."""
    boxes, limits = boxes[usable], limits_wh[usable]
    if not len(boxes):
        return ""
    in_unit_square = (boxes >= 0).all(axis=1) & (boxes <= 1).all(axis=1)
    broken = in_unit_square & (boxes != np.round(boxes)).any(axis=1)
    if in_unit_square.all() or broken.mean() > SHARE_OF_BAD_BOXES:
        return "the boxes go from 0 to 1: they are shares of the image, not pixels"
    # Few boxes stick out of their image, and by little, where they are meant as they are read.
    sticks_out = (boxes[:, :2] + boxes[:, 2:] > 1.05 * limits + 1).any(axis=1)
    if sticks_out.mean() < 0.2:
        return ""
    corners = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= limits + 1).all(axis=1)
    if corners.mean() > 1 - SHARE_OF_BAD_BOXES:
        return "the boxes look like [x1, y1, x2, y2], two corners"
    half = boxes[:, 2:] / 2
    centres = (boxes[:, :2] - half >= -1).all(axis=1) & (boxes[:, :2] + half <= limits + 1).all(axis=1)
    if centres.mean() > 1 - SHARE_OF_BAD_BOXES:
        return "the boxes look like [centre x, centre y, width, height]"
    return ""


def _tell_of_learning(file: CocoFile, faults: _Faults) -> None:
    """Whether there is anything to learn, and of which classes there is not."""
    total = len(file.rows)
    if file.ignored.any():
        faults.tell(
            "ignored", NOTE, int(file.ignored.sum()),
            f"{file.ignored.sum()} of {total} boxes have ignore: 1: not trained on, but counted in AP, as mmdet and "
            "COCO's evaluation do",
        )  # fmt: skip
    sides = file.inside_xyxy[:, 2:] - file.inside_xyxy[:, :2]
    thin = int((sides < LEAST_SIDE_PX).any(axis=1).sum())
    faults.tell(
        "thin", NOTE, thin,
        f"{thin} of {total} boxes are less than a pixel wide or high: not trained on, as mmdet does it",
    )  # fmt: skip
    by_class = file.boxes_by_class()
    if not by_class.any() and total:
        reasons = [
            f"{count} have {what}"
            for count, what in (
                (int(file.crowd.sum()), "iscrowd 1"), (int(file.ignored.sum()), "ignore 1"), (thin, "no whole pixel")
            )
            if count
        ]  # fmt: skip
        hint = ""
        if file.crowd.all():
            hint = f" CVAT writes iscrowd: 1 for masks: {COMMAND} takes it off."
        faults.tell(
            "nothing_to_learn", ERROR, total,
            f"none of its {total} boxes can be learned from or measured with: {', '.join(reasons)}; expected boxes of "
            f"single objects, with iscrowd: 0.{hint}",
        )  # fmt: skip
        return
    empty = [index for index, count in enumerate(by_class) if not count]
    groups = _groups(empty, file)
    if empty:
        shown = ", ".join(repr(file.class_names[index]) for index in empty[:10]) + (", ..." if empty[10:] else "")
        group = ""
        if groups:
            named = ", ".join(repr(file.class_names[index]) for index in groups)
            group = f"; {named} looks like a name of the group, as Roboflow writes: --drop-empty-classes leaves it out"
        faults.tell(
            "empty_classes", NOTE, len(empty),
            f"{len(empty)} of {len(by_class)} classes have no box to learn from: {shown}{group}",
        )  # fmt: skip


def is_group(label: int, file: CocoFile) -> bool:
    """Whether a class without boxes is the name of the group that other classes belong to (`supercategory`)."""
    return label in _groups([label], file)


def _groups(labels: Sequence[int], file: CocoFile) -> List[int]:
    """Those of some classes that are groups, as `is_group`."""
    used = set(file.labels.tolist())
    members = collections.Counter(name for name in file.supercategories if isinstance(name, str))
    return [
        label for label in labels
        if label not in used
        and members[file.class_names[label]] > (file.supercategories[label] == file.class_names[label])
    ]  # fmt: skip


def first_error(faults: Sequence[Fault], strict: bool) -> Optional[Fault]:
    """The first fault that a set is refused for: an error; with `strict` also a box that would be left out."""
    refused = (ERROR, LEFT_OUT) if strict else (ERROR,)
    return next((fault for fault in faults if fault.severity in refused), None)
