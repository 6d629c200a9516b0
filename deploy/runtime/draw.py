"""Detections drawn into a picture. numpy and OpenCV; for letters beyond ASCII Pillow, too."""

from __future__ import annotations

import colorsys
from typing import Sequence, Tuple

import cv2
import numpy as np

from deploy.runtime.lettering import letters_mask
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

    Lines and letters grow with the image.

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
        text, corner = f"{class_names[label]} {score:.2f}", (round(box[0]), round(box[1]))
        mask = None if text.isascii() else letters_mask(text, tuple(class_names), letter_px)
        if mask is None:
            _write(picture, text.encode("ascii", "replace").decode(), corner, colour_of(label), letter_px)
        else:
            _write_mask(picture, mask, corner, colour_of(label))
    return picture


def colour_of(label: int) -> Colour:
    """The blue, green and red of a class, 0 to 255: bright, and unlike that of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1.0, 0.85, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)


def _write(picture: np.ndarray, text: str, corner: Tuple[int, int], ground: Colour, letter_px: float) -> None:
    """Puts the text on a ground of the box's colour."""
    scale = letter_px / FONT_HEIGHT_PX
    weight = max(1, round(scale * 2))
    (text_width, text_height), below = cv2.getTextSize(text, FONT, scale, weight)
    border = max(1, round(letter_px / 5))
    left, top = _ground(picture, text_width + 2 * border, text_height + below + 2 * border, corner, ground)
    start = left + border, top + border + text_height
    cv2.putText(picture, text, start, FONT, scale, _ink(ground), weight, cv2.LINE_AA)


def _write_mask(picture: np.ndarray, mask: np.ndarray, corner: Tuple[int, int], ground: Colour) -> None:
    """Puts letters, of which `mask` says how much ink is where, on a ground of the box's colour."""
    left, top = _ground(picture, mask.shape[1], mask.shape[0], corner, ground)
    under = picture[top : top + mask.shape[0], left : left + mask.shape[1]]
    share = mask[: under.shape[0], : under.shape[1], None] / 255
    under[:] = np.round(under * (1 - share) + np.array(_ink(ground)) * share)


def _ground(picture: np.ndarray, width: int, height: int, corner: Tuple[int, int], colour: Colour) -> Tuple[int, int]:
    """Left and top of the ground that it draws for a text: above the corner or, where there is no room, below it."""
    left = max(0, min(corner[0], picture.shape[1] - width))
    top = corner[1] - height if corner[1] >= height else corner[1]
    cv2.rectangle(picture, (left, top), (left + width, top + height), colour, cv2.FILLED)
    return left, top


def _ink(ground: Colour) -> Colour:
    """Black or white, whichever shows on the ground."""
    blue, green, red = ground
    return (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 128 else (255, 255, 255)  # luma, ITU-R BT.601
