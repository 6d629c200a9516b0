"""The images on which two detectors disagree most, with their boxes, as the report draws them."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import cv2
import numpy as np

from benchmarks.measuring.detections import NO_BOXES, Boxes, pairs
from deploy.errors import DataError
from deploy.images import read_image

GALLERY_IMAGES = 8
GALLERY_SIDE_PX = 480
COLOURS = 8
"""How many class colours the style sheet has; further classes start again."""


@dataclasses.dataclass(frozen=True)
class Side:
    """The boxes of one detector for the gallery, at the score that it is used at."""

    title: str
    boxes: Mapping[int, Boxes]
    """Image id -> boxes."""


def most_disagreed(first: Side, second: Side, count: int = GALLERY_IMAGES) -> List[int]:
    """At most `count` image ids, those with the most boxes that only one of the two finds first; none without any."""
    alone = {
        image_id: sum(map(len, alone_of(boxes, second.boxes[image_id]))) for image_id, boxes in first.boxes.items()
    }
    worst = sorted(alone, key=lambda image_id: (-alone[image_id], image_id))
    return [image_id for image_id in worst[:count] if alone[image_id]]


def alone_of(first: Boxes, second: Boxes) -> Tuple[List[int], List[int]]:
    """Indices of the boxes of each that the other does not have."""
    paired = pairs(first, second)
    used = [{pair[side] for pair in paired} for side in (0, 1)]
    return (
        [index for index in range(len(first.scores)) if index not in used[0]],
        [index for index in range(len(second.scores)) if index not in used[1]],
    )


def gallery(
    images: Sequence[Mapping[str, Any]],
    images_dir: Path,
    annotated: Mapping[int, Boxes],
    sides: Tuple[Side, Side],
    names: Mapping[int, str],
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """
    (pictures, names of images that could not be used): each picture once, as a JPEG data URI, with three panels.

    Args:
        images: entries of the annotation file, in the order of the pictures.
        annotated: image id -> annotated boxes.
        names: category id -> class name, in the order of the annotation file, which is that of the colours.
    """
    pictures, missing = [], []
    colour = {category: index % COLOURS for index, category in enumerate(names)}
    for image in images:
        size = (image["width"], image["height"])
        uri = _data_uri(images_dir / image["file_name"], size)
        if uri is None:
            missing.append(image["file_name"])
            continue
        first, second = (side.boxes[image["id"]] for side in sides)
        alone = alone_of(first, second)
        panels: List[Dict[str, Any]] = [
            {
                "title": "Annotated",
                "alone": None,
                "boxes": _drawn(annotated.get(image["id"], NO_BOXES), [], names, colour),
            }
        ]
        panels += [
            {"title": side.title, "alone": len(only), "boxes": _drawn(boxes, only, names, colour)}
            for side, boxes, only in zip(sides, (first, second), alone)
        ]
        pictures.append({"name": image["file_name"], "width": size[0], "height": size[1], "uri": uri, "panels": panels})
    return pictures, missing


def _data_uri(path: Path, wh_px: Tuple[int, int]) -> Optional[str]:
    try:
        image = read_image(path)
    except DataError:
        return None
    if (image.shape[1], image.shape[0]) != wh_px:
        return None  # another image of the same name
    scale = min(1.0, GALLERY_SIDE_PX / max(wh_px))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode("ascii")


def _drawn(
    boxes: Boxes, alone: Sequence[int], names: Mapping[int, str], colour: Mapping[int, int]
) -> List[Dict[str, Any]]:
    drawn = []
    for index, (box, score, category) in enumerate(zip(boxes.boxes_xyxy, boxes.scores, boxes.categories.tolist())):
        left, top, right, bottom = np.round(box, 1).tolist()
        drawn.append(
            {
                "x": left,
                "y": top,
                "width": round(right - left, 1),
                "height": round(bottom - top, 1),
                "colour": colour[category],
                "alone": index in alone,
                "text": f"{names[category]} {score:.2f}",
            }
        )
    return drawn
