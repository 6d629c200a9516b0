from __future__ import annotations

import base64
import itertools

import cv2
import numpy as np
import pytest

from benchmarks.figures import (
    GALLERY_SIDE_PX,
    PLOT_HEIGHT_PX,
    PLOT_WIDTH_PX,
    Rectangle,
    gallery_from_samples,
    plot_from_points,
    ticks_linear,
    ticks_logarithmic,
)
from benchmarks.subject import ROLES


def points(times, aps):
    return [
        {"title": title, "ms": ms, "ap_points": ap, "kind": "other"}
        for title, ms, ap in zip(ROLES.values(), times, aps, strict=False)
    ]


@pytest.mark.parametrize(
    ("times", "aps"),
    [
        ([200, 60, 60, 45, 15, 4, 2], [42.0, 39.5, 41.2, 41.2, 40.1, 41.2, 40.0]),
        ([50] * 7, [40.0] * 7),
        ([50.0, 50.1, 50.2, 50.1, 50.0, 50.2, 50.1], [40.0, 40.01, 40.02, 40.0, 40.01, 40.0, 40.02]),
        ([0.2], [0.0]),
    ],
)
def test_labels_overlap_neither_each_other_nor_a_point_nor_the_edge(times, aps):
    plot = plot_from_points(points(times, aps))
    labels = [Rectangle(**point["label"]) for point in plot["points"]]
    dots = [Rectangle(point["x"] - 6, point["y"] - 6, point["x"] + 6, point["y"] + 6) for point in plot["points"]]
    for first, second in itertools.combinations(labels, 2):
        assert not first.overlaps(second)
    for label in labels:
        assert not any(label.overlaps(dot) for dot in dots)
        assert label.left >= 0
        assert label.right <= PLOT_WIDTH_PX
        assert label.top >= 0
        assert label.bottom <= PLOT_HEIGHT_PX


def test_points_are_where_their_values_are():
    plot = plot_from_points(points([10.0, 100.0], [30.0, 40.0]))
    slow, fast = plot["points"][1], plot["points"][0]
    assert slow["x"] > fast["x"]
    assert slow["y"] < fast["y"]  # downwards in SVG: the better is higher up
    middle = plot_from_points(points([10.0, 100.0, 10**1.5], [30.0, 40.0, 35.0]))["points"][2]
    assert middle["x"] == pytest.approx((slow["x"] + fast["x"]) / 2, abs=0.2)  # logarithmic
    assert middle["y"] == pytest.approx((slow["y"] + fast["y"]) / 2, abs=0.2)


def test_the_region_within_the_limits_holds_the_points_that_pass():
    plot = plot_from_points(points([10.0, 100.0], [30.0, 40.0]), most_ms=50.0, least_points=25.0)
    fast, slow = plot["points"]
    assert fast["x"] < plot["within"]["right"] < slow["x"]
    assert plot["within"]["bottom"] == plot["area"]["bottom"]  # the limit is below the axis: all of it passes
    assert plot_from_points(points([10.0], [30.0]), most_ms=0.001)["within"] is None
    assert plot_from_points(points([10.0], [30.0]))["within"] is None
    assert plot_from_points([]) is None


@pytest.mark.parametrize("values", [[0.03], [1.0], [12, 12.5], [2, 900], [5, 10, 20]])
def test_logarithmic_ticks_enclose_the_values(values):
    ticks = ticks_logarithmic(values)
    assert ticks[0] < min(values) <= max(values) < ticks[-1]
    assert len(ticks) >= 2


@pytest.mark.parametrize("values", [[0.0], [41.2, 41.2], [41.20, 41.23], [3, 62], [99.9, 100.0]])
def test_linear_ticks_enclose_the_values(values):
    ticks = ticks_linear(values)
    assert ticks[0] < min(values) <= max(values) < ticks[-1]
    assert 2 <= len(ticks) <= 9


def sample(name, width=192, height=128, score=0.9):
    box = {"box_xyxy": [10.0, 20.0, 30.0, 60.0], "label": 1}
    return {
        "file_name": name,
        "width_px": width,
        "height_px": height,
        "annotated": [box],
        "detected": [{**box, "score": score}],
    }


def test_the_gallery_shows_each_image_once_with_a_panel_per_model(tmp_path):
    pixels = np.zeros((900, 1200, 3), np.uint8)
    pixels[:, :600] = 255
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    models = {"teacher": [sample("a.png", 1200, 900)], "own": [sample("a.png", 1200, 900, score=0.1)]}
    (picture,), missing = gallery_from_samples(models, str(tmp_path), ["disc", "star"])
    assert missing == []
    assert [panel["title"] for panel in picture["panels"]] == ["Annotated", "Teacher", "own"]
    assert [len(panel["boxes"]) for panel in picture["panels"]] == [1, 1, 0]  # too low a score is not drawn
    box = picture["panels"][1]["boxes"][0]
    assert [box[key] for key in ("x", "y", "width", "height", "text")] == [10.0, 20.0, 20.0, 40.0, "star 0.90"]
    jpeg = base64.b64decode(picture["uri"].partition(",")[2])
    shown = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert max(shown.shape) == GALLERY_SIDE_PX
    assert shown[:, 100].mean() > 250
    assert shown[:, 400].mean() < 5


def test_images_that_are_missing_or_others_are_left_out(tmp_path):
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((10, 10, 3), np.uint8))
    models = {"teacher": [sample("none.png"), sample("small.png")]}
    assert gallery_from_samples(models, str(tmp_path), ["disc", "star"]) == ([], ["none.png", "small.png"])
