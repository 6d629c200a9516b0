"""The report's charts, as numbers that the template draws: all places are pixels of the chart."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

PLOT_WIDTH_PX, PLOT_HEIGHT_PX = 600, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, PLOT_WIDTH_PX - 18, 14, PLOT_HEIGHT_PX - 48
_LETTER_WIDTH_PX, _LABEL_HEIGHT_PX = 8.6, 17  # of a wide 14 px sans-serif
DISTRIBUTION_WIDTH_PX, DISTRIBUTION_ROW_PX = 460, 44
CURVE_SIDE_PX = 320
LINE_STYLES = 8
"""How many line styles the style sheet has; further models start again."""


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
        "front": _path([centres[index] for index in pareto_front(points)]),
        "x_ticks": [{"px": x_px(value), "text": f"{value:g}"} for value in x_ticks],
        "y_ticks": [{"px": y_px(value), "text": f"{value:g}"} for value in y_ticks],
        "points": [
            {**point, "x": x, "y": y, "label": label._asdict(), **_text(x, label)}
            for point, (x, y), label in zip(points, centres, labels)
        ],
    }


def pareto_front(points: Sequence[Mapping[str, Any]]) -> List[int]:
    """Indices of the points than which none is both as fast and more accurate, or faster and as accurate; by speed."""
    front: List[int] = []
    for index in sorted(range(len(points)), key=lambda one: (points[one]["ms"], -points[one]["ap_points"])):
        if not front or points[index]["ap_points"] > points[front[-1]]["ap_points"]:
            front.append(index)
    return front


def distribution_from_samples(samples_ms: Mapping[str, Sequence[float]]) -> Optional[Dict[str, Any]]:
    """
    What the template draws of latencies, each against its own median; None without samples.

    Per title the 5th, 25th, 50th, 75th, 95th and 99th percentile in ms and in pixels, and the longest in ms. A p99
    beyond three medians is drawn at three.
    """
    if not samples_ms:
        return None
    names = ("p5", "p25", "p50", "p75", "p95", "p99", "max")
    left, right = 22, DISTRIBUTION_WIDTH_PX - 26
    rows: List[Dict[str, Any]] = []
    for index, (title, samples) in enumerate(samples_ms.items()):
        percentiles = np.percentile(samples, [5, 25, 50, 75, 95, 99, 100]).tolist()
        ratios = [min(value / percentiles[2], 3.0) for value in percentiles[:-1]]
        rows.append(
            {
                "title": title,
                "y": index * DISTRIBUTION_ROW_PX + 28,
                "ms": dict(zip(names, percentiles)),
                "x": dict(zip(names, ratios)),
            }
        )
    ticks = ticks_linear([ratio for row in rows for ratio in row["x"].values()])

    def x_px(ratio: float) -> float:
        return round(left + (ratio - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left), 1)

    for row in rows:
        row["x"] = {name: x_px(ratio) for name, ratio in row["x"].items()}
    bottom = len(rows) * DISTRIBUTION_ROW_PX + 6
    return {
        "width": DISTRIBUTION_WIDTH_PX,
        "height": bottom + 44,
        "bottom": bottom,
        "rows": rows,
        "ticks": [{"px": x_px(value), "text": f"{100 * value:.0f} %"} for value in ticks],
    }


def curves_from_precisions(precisions: Mapping[str, Optional[Sequence[float]]]) -> Dict[str, Any]:
    """What the template draws of precision against recall: a line per title, whose style is its place among all."""
    left, top, side = 40, 10, CURVE_SIDE_PX - 40 - 12

    def place(recall: float, precision: float) -> Tuple[float, float]:
        return round(left + recall * side, 1), round(top + (1 - precision) * side, 1)

    lines = []
    for index, (title, curve) in enumerate(precisions.items()):
        if curve is not None:
            recalls = np.linspace(0, 1, len(curve)).tolist()
            path = _path([place(recall, precision) for recall, precision in zip(recalls, curve)])
            lines.append({"title": title, "style": index % LINE_STYLES, "path": path, "mean": float(np.mean(curve))})
    ticks = [
        {"x": place(value, 0)[0], "y": place(0, value)[1], "text": f"{value:g}"} for value in (0, 0.25, 0.5, 0.75, 1)
    ]
    return {
        "side": CURVE_SIDE_PX,
        "height": top + side + 42,
        "area": Rectangle(left, top, left + side, top + side)._asdict(),
        "ticks": ticks,
        "lines": lines,
    }


def _path(places: Sequence[Tuple[float, float]]) -> str:
    """SVG's path through these places."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


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
