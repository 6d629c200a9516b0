"""
Draws a COCO-format data set of shapes, to train and try the whole line on where no data is at hand.

    python -m crosskd.shapes DIR --images 400 --difficulty easy

Circles, triangles, squares, stars, rings and crosses of very different sizes lie over one another, turned, stretched
and cut by the border, under stray strokes, uneven light, blur and noise; easy images have fewer and larger shapes, and
no strokes. Colour and texture say nothing of the class; the outline does. Needs numpy and OpenCV. The same flags give
the same bytes, with the same versions of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deploy.errors import ConfigError, command
from deploy.files import new_folder, write_json
from deploy.layouts import SPLITS
from deploy.progress import progress
from deploy.schema import Choice, Maybe, read_checked

VERSION = 1
"""To be raised with any change of what is drawn: folders of other versions are then not up to date."""
MARKER = "shapes.json"
JPEG_QUALITY = 95
SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard it is to find the shapes; pairs are least and most."""

    smallest_px: int
    """The diameter before stretching: with 12 the smallest boxes are about 8 pixels wide."""
    largest_share: float
    """Of the image's longer side."""
    most_shapes: int
    least_visible_share: float
    """A shape is not put where it would leave less of another one to be seen."""
    least_contrast: float
    """Distance in RGB between a shape's colours and the colours behind it."""
    strokes_below: tuple[int, int]
    """Stray strokes under the shapes."""
    strokes_above: tuple[int, int]
    noise: tuple[float, float]
    """Standard deviation, in grey levels of 255."""


DIFFICULTIES = {
    "easy": Difficulty(24, 0.6, 5, 0.6, 90.0, (0, 0), (0, 0), (1, 5)),
    "hard": Difficulty(12, 0.6, 10, 0.25, 55.0, (2, 8), (0, 3), (3, 14)),
}
HARD = DIFFICULTIES["hard"]
MARKER_KINDS = {
    "made_by": Choice(("crosskd.shapes",)),
    "version": int,
    "images": int,
    "size_px": int,
    "seed": int,
    "held_out": float,
    "difficulty": Maybe(Choice(tuple(DIFFICULTIES))),
}
"""Table of that file, which says what was drawn."""


def _regular(points: int, *radii: float) -> np.ndarray:
    """(points, 2), float64: corners at equal angles, at the radii in turn; the first one points up."""
    angle = np.arange(points) * 2 * np.pi / points
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.resize(radii, points)[:, None]


def _cross(half: float) -> np.ndarray:
    """(12, 2), float64: the corners of a cross, all but the inner four at radius 1; its arms are 2 * half wide."""
    arm = np.array([(-half, -half), (-half, -np.sqrt(1 - half**2)), (half, -np.sqrt(1 - half**2))])
    quarter = np.array([[0, -1], [1, 0]])  # (x, y) -> (-y, x)
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, turn).T for turn in range(4)])


OUTLINES: dict[str, list[np.ndarray]] = {
    "circle": [_regular(64, 1.0)],
    "triangle": [_regular(3, 1.0)],
    "square": [_regular(4, 1.0)],
    "star": [_regular(10, 1.0, 0.42)],
    "ring": [_regular(64, 1.0), _regular(64, 0.55)],
    "cross": [_cross(0.3)],
}
"""Class -> closed outlines of radius 1; where two overlap there is a hole."""
CLASS_NAMES = tuple(OUTLINES)


def draw_image(
    rng: np.random.Generator, size_px: int, difficulty: Difficulty = HARD
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    (image, boxes_xyxy, labels) of one drawn image.

    Args:
        size_px: the longer side.

    Returns:
        The image (height, width, 3), uint8; at least one box, (n, 4), int64, pixels, tight around the whole shape as
        far as it is in the image, also where another covers it; labels (n,), int64, index into CLASS_NAMES.
    """
    shorter = int(size_px * rng.uniform(0.7, 1.0))
    height, width = (size_px, shorter) if rng.random() < 0.4 else (shorter, size_px)
    image = _texture(rng, height, width, rng.uniform(0, 255, (2, 3)))
    _draw_strokes(rng, image, int(rng.integers(*difficulty.strokes_below, endpoint=True)))
    masks, labels = _place_shapes(rng, height, width, difficulty)
    boxes = np.array([_box_of_mask(mask) for mask in masks])
    for mask, box in zip(masks, boxes, strict=True):
        _paint(rng, image, mask, box, difficulty)
    _draw_strokes(rng, image, int(rng.integers(*difficulty.strokes_above, endpoint=True)))
    return _photograph(rng, image, difficulty), boxes, np.array(labels)


def write_shapes(
    folder: Path, images: int, size_px: int, seed: int, held_out: float = 0.15, difficulty: str = "hard"
) -> bool:
    """
    Whether the set was drawn: False where `folder` already holds it.

    Args:
        held_out: share of the images for val and for test, each. difficulty: a key of DIFFICULTIES.

    Raises:
        ConfigError: a value is out of range, or the folder holds something else. PipelineError: it cannot be written.
    """
    _check_at_least("--images", images, 3)  # one for each split
    _check_at_least("--size", size_px, 64)
    _check_at_least("--seed", seed, 0)
    if not 0 < held_out < 0.5:
        raise ConfigError(f"--held-out is {held_out}; expected a share between 0 and 0.5")
    parameters = {
        "made_by": "crosskd.shapes",
        "version": VERSION,
        "images": images,
        "size_px": size_px,
        "seed": seed,
        "held_out": held_out,
    }
    if difficulty != "hard":  # sets that were drawn before there was another have no such key
        parameters["difficulty"] = difficulty
    if _is_up_to_date(folder, parameters):
        return False
    with new_folder(folder) as drawn:
        _draw_set(drawn, images, size_px, seed, held_out, DIFFICULTIES[difficulty])
        write_json(drawn / MARKER, parameters)
    return True


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosskd.shapes", description="Draws a COCO-format set of shapes.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to; must be new, empty, or already this set")
    parser.add_argument("--images", type=int, default=400, help="in all: train, val and test (%(default)s)")
    parser.add_argument(
        "--held-out", type=float, default=0.15, help="share of the images for val and for test, each (%(default)s)"
    )
    parser.add_argument("--size", type=int, default=256, help="longer side of each image, in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (%(default)s)")
    parser.add_argument(
        "--difficulty",
        choices=DIFFICULTIES,
        default="hard",
        help="easy: fewer and larger shapes, no stray strokes, less noise (%(default)s)",
    )
    arguments = parser.parse_args(argv)
    folder = Path(os.path.abspath(arguments.folder))
    if write_shapes(folder, arguments.images, arguments.size, arguments.seed, arguments.held_out, arguments.difficulty):
        print(f"drew {arguments.images} images with {len(CLASS_NAMES)} classes into {arguments.folder}")
    else:
        print(f"{arguments.folder} is up to date")
    return 0


def _check_at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{flag} is {value}; expected at least {least}")


def _is_up_to_date(folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether the folder holds this set; raises where it holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder. Give another name")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise ConfigError(f"{folder} is not empty and was not made by this command. Give another folder, or empty it")
    found = read_checked(marker, MARKER_KINDS, ConfigError, "what crosskd.shapes wrote")
    if found != parameters:
        held = {key: found[key] for key in MARKER_KINDS if key in found}
        raise ConfigError(
            f"{folder} holds another set: {held}; asked for {parameters}. Give another folder, or delete it"
        )
    if sum(1 for _ in (folder / "images").glob("*.jpg")) != parameters["images"]:
        raise ConfigError(f"{folder} has lost images since it was made. Delete it and run this command again")
    return True


def _draw_set(folder: Path, images: int, size_px: int, seed: int, held_out: float, difficulty: Difficulty) -> None:
    count = max(1, round(images * held_out))
    starts = dict(zip(SPLITS, (0, images - 2 * count, images - count), strict=True))
    (folder / "images").mkdir(parents=True)
    documents = {split: _empty_document() for split in SPLITS}
    for index in progress(range(images), images, "drawing"):
        split = max((split for split in SPLITS if starts[split] <= index), key=starts.__getitem__)
        image, boxes, labels = draw_image(np.random.default_rng([seed, index]), size_px, difficulty)
        name = f"{index + 1:06d}.jpg"
        written = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        (folder / "images" / name).write_bytes(written.tobytes())
        _add_image(documents[split], index + 1, name, image.shape[:2], boxes, labels)
    for split, document in documents.items():
        write_json(folder / "annotations" / f"instances_{split}.json", document)


def _empty_document() -> dict[str, Any]:
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    return {"images": [], "annotations": [], "categories": categories}


def _add_image(
    document: dict[str, Any], image_id: int, name: str, shape: tuple[int, int], boxes: np.ndarray, labels: np.ndarray
) -> None:
    document["images"].append({"id": image_id, "file_name": name, "height": shape[0], "width": shape[1]})
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
        )


def _place_shapes(
    rng: np.random.Generator, height: int, width: int, difficulty: Difficulty = HARD
) -> tuple[list[np.ndarray], list[int]]:
    """(masks, labels), the lowest first; masks (height, width), uint8, 0 to 255, whole even where another is on top."""
    count = rng.integers(2, difficulty.most_shapes + 1)
    smallest, largest = np.log(difficulty.smallest_px), np.log(difficulty.largest_share * max(height, width))
    diameters = np.exp(rng.uniform(smallest, largest, count))
    # Mostly the small ones lie on top, or few of them would be seen.
    diameters = diameters[np.argsort(-diameters * rng.uniform(0.5, 2.0, count))]
    masks: list[np.ndarray] = []
    labels: list[int] = []
    areas: list[int] = []
    visible: list[np.ndarray] = []
    for diameter in diameters:
        label = int(rng.integers(len(CLASS_NAMES)))
        mask = _mask_of_shape(rng, CLASS_NAMES[label], diameter, height, width)
        solid = mask > 127
        left = [seen & ~solid for seen in visible]
        if any(
            np.count_nonzero(seen) < difficulty.least_visible_share * area
            for seen, area in zip(left, areas, strict=True)
        ):
            continue
        masks.append(mask)
        labels.append(label)
        areas.append(np.count_nonzero(solid))
        visible = [*left, solid]
    return masks, labels


def _mask_of_shape(rng: np.random.Generator, name: str, diameter_px: float, height: int, width: int) -> np.ndarray:
    """(height, width), uint8: 255 inside, less on the edge. Turned, stretched, its centre in the image."""
    centre = rng.uniform(0.05, 0.95, 2) * (width, height)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag([1, stretch]) * diameter_px / 2
    contours = [np.rint((outline @ matrix.T + centre) * SUPERSAMPLING).astype(np.int32) for outline in OUTLINES[name]]
    large = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(large, contours, 255)
    return cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)


def _box_of_mask(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 around what is more than half covered."""
    columns, rows = np.flatnonzero((mask > 127).any(axis=0)), np.flatnonzero((mask > 127).any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _paint(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, box: np.ndarray, difficulty: Difficulty
) -> None:
    """Fills the mask with a texture whose colours stand off what lies behind it; at times with a rim."""
    x1, y1, x2, y2 = box
    behind = image[y1:y2, x1:x2].mean(axis=(0, 1))
    colours = rng.uniform(0, 255, (2, 3))
    while np.linalg.norm(colours - behind, axis=1).min() < difficulty.least_contrast:
        colours = rng.uniform(0, 255, (2, 3))
    # One pixel more on each side, for the soft edge of the mask.
    part = np.s_[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1]
    height, width = mask[part].shape
    fill = _texture(rng, height, width, colours)
    if rng.random() < 0.3:
        inner = cv2.erode(mask[part], np.ones((3, 3), np.uint8))
        fill[inner < 128] *= rng.uniform(0.3, 0.8)
    alpha = mask[part][..., None] / np.float32(255) * np.float32(rng.uniform(0.8, 1.0))
    image[part] += alpha * (fill - image[part])


def _texture(rng: np.random.Generator, height: int, width: int, colours: np.ndarray) -> np.ndarray:
    """(height, width, 3), float32, 0 to 255: two colours, mixed by waves, checks, blobs or a slope."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 40)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        mix = np.sin(along * 2 * np.pi / period)
    elif kind == 1:
        mix = np.sign(np.sin(along * 2 * np.pi / period) * np.sin(across * 2 * np.pi / period))
    elif kind == 2:
        cells = [max(2, int(side / period) + 2) for side in (height, width)]
        mix = cv2.resize(
            rng.uniform(-1.5, 1.5, cells).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
    else:
        mix = along / max(height, width)
    mix = np.clip(mix * rng.uniform(0.3, 1.0), -1, 1)[..., None] / 2 + 0.5
    first, second = colours.astype(np.float32)
    return (first + mix * (second - first)).astype(np.float32)


def _draw_strokes(rng: np.random.Generator, image: np.ndarray, count: int) -> None:
    """Bent lines and arcs that are no shape of any class."""
    height, width = image.shape[:2]
    for _ in range(count):
        colour = rng.uniform(0, 255, 3).tolist()
        thickness = int(rng.integers(1, 4))
        centre = rng.uniform(0, 1, 2) * (width, height)
        reach = rng.uniform(0.05, 0.3) * max(height, width)
        if rng.random() < 0.5:
            points = centre + np.cumsum(rng.uniform(-reach, reach, (int(rng.integers(2, 5)), 2)), axis=0)
            cv2.polylines(image, [np.rint(points).astype(np.int32)], False, colour, thickness, cv2.LINE_AA)
        else:
            axes = np.rint(reach * rng.uniform(0.3, 1.0, 2)).astype(int).tolist()
            start = rng.uniform(0, 360)
            cv2.ellipse(
                image, np.rint(centre).astype(int).tolist(), axes, rng.uniform(0, 180), start,
                start + rng.uniform(40, 200), colour, thickness, cv2.LINE_AA,
            )  # fmt: skip


def _photograph(rng: np.random.Generator, image: np.ndarray, difficulty: Difficulty) -> np.ndarray:
    """(height, width, 3), uint8: the drawn image under uneven light, out of focus and with noise."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.75, 1.1) + rng.uniform(0, 0.6) * (x * np.cos(angle) + y * np.sin(angle))
    image = image * light[..., None].astype(np.float32)
    if rng.random() < 0.6:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0))
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(*difficulty.noise))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
