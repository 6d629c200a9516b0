from __future__ import annotations

import itertools

import pytest

from benchmarks.measuring.subject import ROLES
from benchmarks.reporting.figures import (
    PLOT_HEIGHT_PX,
    PLOT_WIDTH_PX,
    Rectangle,
    curves_from_precisions,
    distribution_from_samples,
    pareto_front,
    plot_from_points,
    ticks_linear,
    ticks_logarithmic,
)


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


def test_the_front_is_what_no_other_beats():
    front = pareto_front(points([10.0, 5.0, 20.0, 20.0, 5.0, 30.0], [40.0, 30.0, 45.0, 46.0, 31.0, 46.0]))
    assert front == [4, 0, 3]  # by speed; of equal speed the better; as good but slower is beaten
    plot = plot_from_points(points([10.0, 100.0, 50.0], [30.0, 40.0, 20.0]))
    first, last, _ = plot["points"]
    assert plot["front"] == f"M{first['x']:g} {first['y']:g}L{last['x']:g} {last['y']:g}"


def test_a_distribution_is_drawn_against_its_own_median():
    samples = {"fast": list(range(90, 111)), "slow": [10 * value for value in range(90, 111)], "wild": [1, 1, 1, 50]}
    drawn = distribution_from_samples(samples)
    fast, slow, wild = drawn["rows"]
    assert fast["x"] == slow["x"]
    assert (fast["ms"]["p50"], slow["ms"]["p50"], slow["ms"]["max"]) == (100, 1000, 1100)
    assert wild["x"]["p50"] == fast["x"]["p50"]
    order = ["p5", "p25", "p50", "p75", "p95", "p99"]
    for row in drawn["rows"]:
        places = [row["x"][name] for name in order]
        assert places == sorted(places)
        assert 0 <= places[0] <= places[-1] <= drawn["width"]
    assert fast["y"] < slow["y"] < wild["y"] < drawn["bottom"] < drawn["height"]
    assert distribution_from_samples({}) is None


def test_curves_go_from_no_recall_to_all_and_keep_their_style():
    chart = curves_from_precisions({"Teacher": [1.0, 0.5, 0.0], "none": None, "ONNX": [0.25] * 101})
    teacher, onnx = chart["lines"]
    area = chart["area"]
    assert teacher["path"] == (
        f"M{area['left']} {area['top']}L{(area['left'] + area['right']) / 2:g} {(area['top'] + area['bottom']) / 2:g}"
        f"L{area['right']} {area['bottom']}"
    )
    assert (teacher["style"], onnx["style"]) == (0, 2)  # the same model has the same style in every chart
    assert (teacher["mean"], onnx["mean"]) == (0.5, 0.25)
