"""Detections drawn into a picture. numpy and OpenCV only."""

from __future__ import annotations

import colorsys
from typing import Sequence, Tuple

import cv2
import numpy as np

from deploy.runtime.postprocess import Detections

Colour = Tuple[int, int, int]
FONT = cv2.FONT_HERSHEY_SIMPLEX
FONT_HEIGHT_PX = 22
"""Of a capital letter at scale 1."""
GOLDEN = 0.618034
"""Steps of this part of the circle keep hues apart, however many there are."""


def draw(image: np.ndarray, detections: Detections, class_names: Sequence[str]) -> np.ndarray:
    """
    A copy of the image with the boxes, in a colour per class, their class names and scores; the best on top.

    Lines and letters grow with the image. OpenCV's letters are ASCII: others become question marks.

    Args:
        image: (height, width, 3), uint8, blue-green-red.
    """
    picture = np.array(image, order="C")
    height, width = picture.shape[:2]
    size_px = (height * width) ** 0.5
    line_px = max(1, round(size_px / 300))
    letter_px = max(7.0, size_px / 50)
    rows = list(zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist()))[::-1]
    for box, _score, label in rows:
        left, top, right, bottom = (round(value) for value in box)
        cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), colour_of(label), line_px)
    for box, score, label in rows:  # after all boxes, so that no line runs through a name
        name = class_names[label].encode("ascii", "replace").decode()
        _write(picture, f"{name} {score:.2f}", (round(box[0]), round(box[1])), colour_of(label), letter_px)
    return picture


def colour_of(label: int) -> Colour:
    """The blue, green and red of a class, 0 to 255: bright, and unlike that of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1.0, 0.85, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)


def _write(picture: np.ndarray, text: str, corner: Tuple[int, int], ground: Colour, letter_px: float) -> None:
    """Puts the text on a ground of the box's colour, above the corner or, where there is no room, below it."""
    scale = letter_px / FONT_HEIGHT_PX
    weight = max(1, round(scale * 2))
    (text_width, text_height), below = cv2.getTextSize(text, FONT, scale, weight)
    border = max(1, round(letter_px / 5))
    left = max(0, min(corner[0], picture.shape[1] - text_width - 2 * border))
    high = text_height + below + 2 * border
    top = corner[1] - high if corner[1] >= high else corner[1]
    cv2.rectangle(picture, (left, top), (left + text_width + 2 * border, top + high), ground, cv2.FILLED)
    blue, green, red = ground
    ink = (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 128 else (255, 255, 255)  # luma, ITU-R BT.601
    cv2.putText(picture, text, (left + border, top + border + text_height), FONT, scale, ink, weight, cv2.LINE_AA)
