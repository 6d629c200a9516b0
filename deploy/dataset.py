"""COCO-format data sets: read, checked, compared with their images. numpy and OpenCV only."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from deploy.coco_file import (
    COMMAND,
    ERROR,
    EXAMPLES,
    LEFT_OUT,
    NOTE,
    CocoFile,
    Fault,
    coco_file_from_document,
    first_error,
    read_document,
)
from deploy.errors import ConfigError, DataError
from deploy.files import AnyPath
from deploy.images import ImageHeader, read_header, read_image, shown_size_px, used_bits, words_of_empty_bits
from deploy.layouts import split_paths
from deploy.machine import no_garbage_collection
from deploy.progress import progress

IMAGES_OF_16_BITS = 16
"""So many are decoded to see whether their upper bits are in use."""


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
    ignored: np.ndarray
    """(n,), bool: `ignore`, not trained on, but counted by the evaluation."""
    annotated_xywh: np.ndarray
    """(n, 4), float64, pixels: the boxes as the file has them."""
    areas: np.ndarray
    """(n,), float64, square pixels: of the mask where the file has it, else of the annotated box."""


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


def load_coco(
    annotations: AnyPath, images_dir: AnyPath, check_files: bool = True, strict: bool = False, by_class: bool = False
) -> CocoSet:
    """
    The checked content of a COCO detection file. What was left out of it, or is good to know, is said on stderr.

    Args:
        check_files: also look at every image file, as `check_image_files`.
        strict: refuse boxes of no use, which are left out otherwise where they are few.
        by_class: say also which classes have no box, for those who learn or measure by class.

    Raises:
        DataError: what is wrong, where, and what was expected.
    """
    annotations, images_dir = Path(annotations), Path(images_dir)
    with no_garbage_collection():
        file = coco_file_from_document(read_document(annotations), annotations, images_dir)
        error = first_error(file.faults, strict)
        if error:
            raise DataError(f"{annotations}: {error.text}")
        coco = coco_set_from_file(file, images_dir)
    for fault in file.faults:
        if by_class or fault.code != "empty_classes":
            number = f"{fault.count} boxes left out: " if fault.severity == LEFT_OUT else ""
            print(f"{annotations}: {number}{fault.text}", file=sys.stderr)
    if check_files:
        check_image_files(coco.images)
    return coco


def load_split(data_dir: AnyPath, split: str, limit: Optional[int] = None, strict: bool = False) -> CocoSet:
    """
    `load_coco` of a split of a data folder; the first `limit` images of it.

    Raises:
        ConfigError: `limit` is below 1.
        DataError: as `split_paths` and `load_coco`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of images is {limit}; expected at least 1")
    coco = load_coco(*split_paths(data_dir, split), check_files=False, strict=strict)
    coco = dataclasses.replace(coco, images=coco.images[:limit])
    check_image_files(coco.images)
    return coco


def coco_set_from_file(file: CocoFile, images_dir: Path) -> CocoSet:
    """The images of a file without errors, each with its boxes."""
    order = np.argsort(file.image_index, kind="stable")
    ends = np.cumsum(np.bincount(file.image_index, minlength=len(file.image_ids)))
    bounds = list(zip([0, *ends[:-1].tolist()], ends.tolist()))
    columns = [
        column[order]
        for column in (file.inside_xyxy, file.labels, file.crowd, file.ignored, file.boxes_xywh, file.areas)
    ]
    images = [
        CocoImage(image_id, images_dir / name, width, height, *(column[start:end] for column in columns))
        for image_id, name, (width, height), (start, end) in zip(
            file.image_ids, file.file_names, file.sizes_px.tolist(), bounds
        )
    ]
    return CocoSet(file.path, images_dir, images, file.class_names, file.category_ids, file.clipped)


def with_classes(
    coco: CocoSet, class_names: Sequence[str], category_ids: Sequence[int], whose: str, ordered: bool = False
) -> CocoSet:
    """
    A set with its labels in the order of other classes: the one rule by which classes are compared.

    Each of those classes must be there, by its name and with its category id; further classes may be there if no box
    is of them, and are left out.

    Args:
        whose: what has those classes, for the message.
        ordered: refuse another order, which shows that the files of a set were not written together.

    Raises:
        DataError: the classes differ.
    """
    wanted, here = dict(zip(class_names, category_ids)), dict(zip(coco.class_names, coco.category_ids))
    labels = np.concatenate([np.zeros(0, np.int64), *(image.labels for image in coco.images)])
    counts = np.bincount(labels, minlength=len(here))
    used = {name: here[name] for name, count in zip(here, counts) if name in wanted or count}
    if used != wanted or (ordered and list(used) != list(wanted)):
        differences = [f"{name!r} (id {wanted[name]}) is missing" for name in wanted if name not in here]
        differences += [f"{name!r} (id {used[name]}) is there besides" for name in used if name not in wanted]
        differences += [
            f"{name!r} has the id {used[name]} in place of {wanted[name]}"
            for name in used if name in wanted and used[name] != wanted[name]
        ]  # fmt: skip
        raise DataError(
            f"{whose} has the classes {list(wanted)}, {coco.annotations_path} has the classes {list(here)}: "
            f"{', '.join(differences[:10]) or 'another order'}; expected the same names with the same ids in all files"
        )
    if tuple(wanted) == coco.class_names:
        return coco
    label_of = {name: label for label, name in enumerate(wanted)}
    new_label = np.array([label_of.get(name, -1) for name in here], np.int64)
    images = [dataclasses.replace(image, labels=new_label[image.labels]) for image in coco.images]
    return dataclasses.replace(coco, images=images, class_names=tuple(wanted), category_ids=tuple(wanted.values()))


def renumbered(coco: CocoSet) -> CocoSet:
    """
    A set whose images and categories have new ids, from 1 in their order.

    Ids are of any size; libraries that keep them in arrays, pycocotools for one, take those beyond 2^53 for each other.
    """
    images = [dataclasses.replace(image, image_id=number) for number, image in enumerate(coco.images, start=1)]
    return dataclasses.replace(coco, images=images, category_ids=tuple(range(1, 1 + len(coco.class_names))))


def coco_document(coco: CocoSet, as_annotated: bool = False) -> Dict[str, Any]:
    """
    A COCO detection document of a checked set: every field that COCO asks for, of the right type.

    Args:
        as_annotated: boxes as the file has them; else clipped to their image.
    """
    annotations: List[Dict[str, Any]] = []
    for image in coco.images:
        boxes = image.annotated_xywh
        if not as_annotated:
            boxes = np.concatenate([image.boxes_xyxy[:, :2], image.boxes_xyxy[:, 2:] - image.boxes_xyxy[:, :2]], axis=1)
        columns = (column.tolist() for column in (boxes, image.labels, image.areas, image.crowd, image.ignored))
        for box, label, area, crowd, ignored in zip(*columns):
            annotations.append(
                {
                    "id": 1 + len(annotations),
                    "image_id": image.image_id,
                    "category_id": coco.category_ids[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                    **({"ignore": 1} if ignored else {}),
                }
            )
    images = [
        {
            "id": image.image_id,
            "file_name": image.path.relative_to(coco.images_dir).as_posix(),
            "width": image.width_px,
            "height": image.height_px,
        }
        for image in coco.images
    ]
    categories = [{"id": category_id, "name": name} for category_id, name in zip(coco.category_ids, coco.class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def check_image_files(images: Iterable[CocoImage]) -> None:
    """
    Compares the images of a set with their files: each is there, whole, and of the size that the annotations are for.

    Only the first and last bytes are read. What is good to know is said on stderr.

    Raises:
        DataError: a file is missing, is no image that OpenCV reads, does not end where such a file ends, or has another
            size than the annotations say.
    """
    images = list(images)
    faults = faults_of_files(images, [file_of_image(image) for image in images])
    error = first_error(faults, strict=False)
    if error:
        raise DataError(error.text)
    for fault in faults:
        print(fault.text, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """What was found where an image should be."""

    header: ImageHeader
    shown_wh_px: Tuple[int, int]
    """As the picture is read, after turning; (0, 0): not known."""
    missing: str = ""
    """Why it cannot be opened, or nothing."""


def file_of_image(image: CocoImage) -> ImageFile:
    """What the first and last bytes of an image's file say."""
    try:
        header = read_header(image.path)
        if header.fault:
            return ImageFile(header, (0, 0))
        return ImageFile(header, shown_size_px(image.path, header))
    except (OSError, ValueError) as error:  # a name may be one that no file can have
        return ImageFile(ImageHeader(""), (0, 0), getattr(error, "strerror", None) or str(error))
    except DataError as error:
        return ImageFile(ImageHeader("", fault=str(error)), (0, 0))


def check_pictures(images: Sequence[CocoImage]) -> None:
    """
    Decodes every picture, in some threads: for those who would else find a damaged one after long work.

    Raises:
        DataError: some cannot be decoded; names the first of them.
    """
    damaged = undecodable(images)
    if damaged:
        raise DataError(fault_of_pictures(damaged, len(images)).text)


def undecodable(images: Sequence[CocoImage]) -> Dict[Path, str]:
    """The pictures that cannot be decoded -> why."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes without Python's lock
        reasons = pool.map(_reason_not_to_decode, (image.path for image in images))
        told = progress(zip(images, reasons), len(images), "decoding pictures") if images else ()
        return {image.path: reason for image, reason in told if reason}


def _reason_not_to_decode(path: Path) -> str:
    try:
        read_image(path)
    except DataError as error:
        return str(error)
    return ""


def fault_of_pictures(damaged: Mapping[Path, str], tried: int) -> Fault:
    """The fault of a set with pictures as `undecodable` gives them, of so many that were tried."""
    examples = "; ".join(list(damaged.values())[:EXAMPLES])
    more = "; ..." if len(damaged) > EXAMPLES else ""
    text = f"{len(damaged)} of {tried} pictures cannot be decoded: {examples}{more}. {FILE_FAULTS['unreadable'][2]}"
    return Fault("undecodable", ERROR, len(damaged), text)


def scale_of(image: CocoImage, file: ImageFile) -> Tuple[float, float]:
    """Pixels of the file per pixel of the annotations, along x and y."""
    return file.shown_wh_px[0] / image.width_px, file.shown_wh_px[1] / image.height_px


def size_fault(image: CocoImage, file: ImageFile) -> str:
    """
    What became of an image after its annotations were made: 'turned' (by EXIF), 'exchanged' (width and height, without
    EXIF), 'scaled', 'another_size', 'rounded' (by one pixel), or nothing.
    """
    annotated, (width, height) = (image.width_px, image.height_px), file.shown_wh_px
    if annotated == (width, height) or not width:
        return ""
    if annotated == (height, width):
        return "turned" if file.header.orientation > 4 else "exchanged"
    if abs(annotated[0] - width) <= 1 and abs(annotated[1] - height) <= 1:
        return "rounded"
    factor = scale_of(image, file)[0]
    # Sizes are whole pixels, so that the two factors are equal up to rounding.
    return "scaled" if abs(image.height_px * factor - height) <= max(1.0, factor) else "another_size"


FILE_FAULTS = {
    "missing": (ERROR, "are missing", "Bring the files, or name the folder that they are in"),
    "unreadable": (ERROR, "cannot be used", "Bring the files again or drop the images"),
    "turned": (
        ERROR,
        "are annotated as they are stored, but turned by their EXIF orientation when they are read, so that the boxes "
        "would lie elsewhere",
        f"{COMMAND} turns the boxes",
    ),
    "exchanged": (
        ERROR,
        "have width and height exchanged in the annotations, or were turned since",
        "Bring the images that were annotated, or correct width, height and boxes",
    ),
    "scaled": (
        ERROR,
        "were scaled after they were annotated, so that the boxes would lie elsewhere",
        f"{COMMAND} scales the boxes",
    ),
    "another_size": (
        ERROR,
        "have other sizes than the annotations say, by different factors along x and y: they were stretched or "
        "cropped, or are other pictures",
        "Bring the images that were annotated, or annotate these",
    ),
    "rounded": (NOTE, "differ by one pixel from the size in the annotations", "That shifts no box by more"),
    "turned_unseen": (
        NOTE,
        "are turned or mirrored by EXIF in a way that their size does not show",
        "Their boxes must be for the picture as it is shown",
    ),
}
"""Code -> severity, what is wrong with the images, what to do. In the order in which they are told."""


def faults_of_files(images: Sequence[CocoImage], files: Sequence[ImageFile]) -> List[Fault]:
    """Everything that is wrong with the files of some images, the errors first."""
    indices_of: Dict[str, List[int]] = collections.defaultdict(list)
    for index, (image, file) in enumerate(zip(images, files)):
        code = "missing" if file.missing else "unreadable" if file.header.fault else size_fault(image, file)
        indices_of[code].append(index)
        if file.header.orientation > 1 and (file.header.orientation < 5 or image.width_px == image.height_px):
            indices_of["turned_unseen"].append(index)
    faults = []
    for code, (severity, sentence, remedy) in FILE_FAULTS.items():
        indices = indices_of[code]
        if not indices:
            continue
        if code == "missing":
            remedy = _hint_for_missing([images[index] for index in indices[:EXAMPLES]]) + remedy
        examples = "; ".join(_words_of_file(images[index], files[index]) for index in indices[:EXAMPLES])
        text = f"{len(indices)} of {len(images)} images {sentence}: {examples}. {remedy}"
        shown = text.encode("utf-8", "backslashreplace").decode("utf-8")  # a name of half a surrogate pair
        faults.append(Fault(code, severity, len(indices), shown))
    deep = [image for image, file in zip(images, files) if file.header.bits == 16]
    tried = deep[:IMAGES_OF_16_BITS]
    bits = max((used_bits(image.path) for image in tried), default=16)
    if bits < 16:
        text = (
            f"{len(deep)} of {len(images)} images have 16 bits, such as {deep[0].path}; each of the first {len(tried)} "
            f"{words_of_empty_bits(bits)}"
        )
        faults.append(Fault("empty_bits", NOTE, len(deep), text))
    return faults


def _words_of_file(image: CocoImage, file: ImageFile) -> str:
    """An image with what was found, for a message."""
    if file.missing:
        return f"cannot read {image.path} ({file.missing}), image id {image.image_id}"
    named = f"{image.path}, image id {image.image_id}"
    if file.header.fault:
        return f"{named}: {file.header.fault}"
    (width, height), by = file.shown_wh_px, ""
    if size_fault(image, file) == "scaled":
        by = f", scaled by {scale_of(image, file)[0]:.4g}"
    return f"{named}, {image.width_px} x {image.height_px} in the annotations, {width} x {height} as it is read{by}"


def path_in_other_letters(path: Path) -> Optional[Path]:
    """A file that is there, whose name differs by the case of its ending or the Unicode form (macOS writes NFD)."""
    names = [path.name, path.stem + path.suffix.lower(), path.stem + path.suffix.upper()]
    forms = [path.with_name(unicodedata.normalize(form, name)) for name in names for form in ("NFC", "NFD")]
    return next((form for form in forms if form != path and os.path.isfile(form)), None) if path.name else None


def _hint_for_missing(images: Sequence[CocoImage]) -> str:
    """What may be wrong with file names that lead nowhere, as far as the names show it."""
    for image in images:
        if "\\" in image.path.name:
            return f"The name has the back-slashes of Windows: {COMMAND} makes slashes of them. "
        there = path_in_other_letters(image.path)
        if there is not None:
            return f"There is {there.name!r}, in other letters: {COMMAND} corrects the name. "
        parts = image.path.parts
        for index in range(1, len(parts) - 1):
            if os.path.isfile(Path(*parts[:index], *parts[index + 1 :])):
                return f"It is there without the folder {parts[index]}/ in the name: {COMMAND} takes it off. "
    return ""
