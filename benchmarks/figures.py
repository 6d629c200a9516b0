"""The report's pictures, as numbers that the template draws: the plot of speed against AP, and the gallery."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import cv2

from benchmarks.subject import ROLES
from deploy.dataset import read_image
from deploy.errors import DataError

PLOT_WIDTH_PX, PLOT_HEIGHT_PX = 600, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, PLOT_WIDTH_PX - 18, 14, PLOT_HEIGHT_PX - 48
_LETTER_WIDTH_PX, _LABEL_HEIGHT_PX = 8.6, 17  # of a wide 14 px sans-serif
GALLERY_SIDE_PX = 480
DRAWN_SCORE = 0.3
COLOURS = 8
"""How many class colours the style sheet has; further classes start again."""


class Rectangle(NamedTuple):
    """Pixels of the plot."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Rectangle) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def plot_from_points(
    points: Sequence[Mapping[str, Any]], most_ms: Optional[float] = None, least_points: Optional[float] = None
) -> Optional[Dict[str, Any]]:
    """
    What the template draws of latency (logarithmic) against AP, in pixels; None without points.

    Args:
        points: each with `title`, `ms`, `ap_points` and `kind` (a CSS class).
        most_ms, least_points: the limits; the region within them is shaded.
    """
    if not points:
        return None
    x_ticks = ticks_logarithmic([point["ms"] for point in points])
    y_ticks = ticks_linear([point["ap_points"] for point in points])

    def x_px(ms: float) -> float:
        low, high = math.log(x_ticks[0]), math.log(x_ticks[-1])
        return round(_LEFT + (math.log(ms) - low) / (high - low) * (_RIGHT - _LEFT), 1)

    def y_px(ap_points: float) -> float:
        return round(_BOTTOM - (ap_points - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_BOTTOM - _TOP), 1)

    centres = [(x_px(point["ms"]), y_px(point["ap_points"])) for point in points]
    labels = label_places(centres, [point["title"] for point in points])
    within = None
    if most_ms is not None or least_points is not None:
        right = _RIGHT if most_ms is None else min(_RIGHT, x_px(max(most_ms, 1e-9)))
        bottom = _BOTTOM if least_points is None else min(_BOTTOM, y_px(least_points))
        if right > _LEFT and bottom > _TOP:
            within = Rectangle(_LEFT, _TOP, right, bottom)._asdict()
    return {
        "width": PLOT_WIDTH_PX,
        "height": PLOT_HEIGHT_PX,
        "area": Rectangle(_LEFT, _TOP, _RIGHT, _BOTTOM)._asdict(),
        "within": within,
        "x_ticks": [{"px": x_px(value), "text": f"{value:g}"} for value in x_ticks],
        "y_ticks": [{"px": y_px(value), "text": f"{value:g}"} for value in y_ticks],
        "points": [
            {**point, "x": x, "y": y, "label": label._asdict(), **_text(x, label)}
            for point, (x, y), label in zip(points, centres, labels)
        ],
    }


def _text(x: float, label: Rectangle) -> Dict[str, Any]:
    """SVG's anchor: the end of the text that is next to the point, as the width of the letters is only estimated."""
    if label.left > x:
        return {"text_x": label.left, "anchor": "start"}
    if label.right < x:
        return {"text_x": label.right, "anchor": "end"}
    return {"text_x": (label.left + label.right) / 2, "anchor": "middle"}


def ticks_logarithmic(values: Sequence[float]) -> List[float]:
    """1, 2, 5, 10, 20, 50 ... from just below the least of the positive `values` to just above the largest."""
    low, high = min(values) * 0.97, max(values) * 1.03
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= low)
    last = min(index for index, step in enumerate(steps) if step >= high)
    return steps[first : last + 1]


def ticks_linear(values: Sequence[float]) -> List[float]:
    """Round numbers, about five, that enclose `values` with room to spare."""
    low, high = min(values), max(values)
    wanted = max((high - low) / 4, 0.05)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= wanted)
    first, last = math.floor(low / step - 0.3), math.ceil(high / step + 0.3)
    return [round(index * step, 6) for index in range(first, last + 1)]


def label_places(centres: Sequence[Tuple[float, float]], texts: Sequence[str]) -> List[Rectangle]:
    """
    Where each point's label goes: near it, within the plot, and not over a point or another label.

    Each takes the first free place of those to the right, left, above, below and at the corners, then farther out.
    """
    taken = [Rectangle(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    places = []
    for (x, y), text in zip(centres, texts):
        width = _LETTER_WIDTH_PX * len(text)
        candidates = [
            Rectangle(left, top, left + width, top + _LABEL_HEIGHT_PX)
            for distance in range(11, 300, 9)
            for left, top in _around(x, y, width, distance)
        ]
        inside = [
            place
            for place in candidates
            if place.left >= _LEFT and place.right <= _RIGHT and place.top >= _TOP and place.bottom <= _BOTTOM
        ]
        free = [place for place in inside if not any(place.overlaps(other) for other in taken)]
        place = (free or inside or candidates)[0]
        taken.append(place)
        places.append(place)
    return places


def _around(x: float, y: float, width: float, distance: float) -> List[Tuple[float, float]]:
    right, left, middle = x + distance, x - distance - width, x - width / 2
    above, below, beside = y - distance - _LABEL_HEIGHT_PX, y + distance, y - _LABEL_HEIGHT_PX / 2
    return [
        (right, beside), (left, beside), (middle, above), (middle, below),
        (right, above), (right, below), (left, above), (left, below),
    ]  # fmt: skip


def gallery_from_samples(
    models: Mapping[str, Sequence[Mapping[str, Any]]], images_dir: str, class_names: Sequence[str]
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """
    (pictures, names of images that could not be used): each picture once, as a JPEG data URI, with a panel per model.

    Args:
        models: role -> the `samples` of its accuracy result.
    """
    pictures, missing = [], []
    by_name = {role: {sample["file_name"]: sample for sample in samples} for role, samples in models.items()}
    first = next(iter(models.values()), ())
    for sample in first:
        name = sample["file_name"]
        uri = _data_uri(Path(images_dir) / name, (sample["width_px"], sample["height_px"]))
        if uri is None:
            missing.append(name)
            continue
        panels = [{"title": "Annotated", "boxes": _drawn(sample["annotated"], class_names)}]
        panels += [
            {"title": ROLES.get(role, role), "boxes": _drawn(samples[name]["detected"], class_names)}
            for role, samples in by_name.items()
            if name in samples
        ]
        pictures.append(
            {"name": name, "width": sample["width_px"], "height": sample["height_px"], "uri": uri, "panels": panels}
        )
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


def _drawn(boxes: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> List[Dict[str, Any]]:
    drawn = []
    for box in boxes:
        score = box.get("score")
        if score is not None and score < DRAWN_SCORE:
            continue
        left, top, right, bottom = box["box_xyxy"]
        drawn.append(
            {
                "x": left,
                "y": top,
                "width": round(right - left, 1),
                "height": round(bottom - top, 1),
                "colour": box["label"] % COLOURS,
                "text": class_names[box["label"]] + ("" if score is None else f" {score:.2f}"),
            }
        )
    return drawn
