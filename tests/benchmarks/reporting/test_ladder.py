from __future__ import annotations

import numpy as np
import pytest

from benchmarks.measuring.detections import Boxes
from benchmarks.measuring.subject import ROLES
from benchmarks.reporting.ladder import RUNGS, RungLimit, faults, movement

LIMIT = RungLimit(ap_points=0.5, box_px=2.0, score=0.1, share=0.9)


def boxes(*rows):
    """(left, score) each: a box of class 1, 40 pixels wide and high."""
    values = np.array(rows, np.float64).reshape(-1, 2)
    corners = np.stack([values[:, 0], 0 * values[:, 0], values[:, 0] + 40, 0 * values[:, 0] + 40], axis=1)
    return Boxes(corners, values[:, 1], np.ones(len(values), np.int64))


def test_the_worst_move_and_the_boxes_that_are_gone():
    before = {1: boxes((0, 0.9), (100, 0.8)), 2: boxes((0, 0.7)), 3: boxes((0, 0.6))}
    after = {1: boxes((1, 0.85), (105, 0.8)), 2: boxes((0, 0.2)), 4: boxes((0, 0.9))}
    moved = movement(before, after, LIMIT)
    assert moved["worst_px"] == pytest.approx(5.0)
    assert moved["worst_score"] == pytest.approx(0.5)
    assert (moved["boxes"], moved["gone"]) == (4, 1)
    assert moved["same"] == pytest.approx(1 / 4)


def test_a_step_that_changes_nothing_has_no_faults():
    before = {1: boxes((0, 0.9), (100, 0.8))}
    moved = movement(before, before, LIMIT)
    assert (moved["worst_px"], moved["worst_score"], moved["gone"], moved["same"]) == (0.0, 0.0, 0, 1.0)
    assert faults(0.0, moved, LIMIT) == []
    assert faults(0.02, moved, LIMIT) == []


def test_faults_say_what_was_found_and_what_is_allowed():
    moved = movement({1: boxes((0, 0.9), (100, 0.8))}, {1: boxes((0, 0.9), (110, 0.8))}, LIMIT)
    lost, moved_too_far = faults(-0.006, moved, LIMIT)
    assert lost == "AP falls by 0.60 points, more than 0.5"
    assert moved_too_far == "50 % of the boxes stay within 2 px and 0.1 of score, fewer than 90 %"
    assert faults(-0.004, moved, LIMIT) == [moved_too_far]


def test_without_boxes_only_ap_is_judged():
    moved = movement({}, {}, LIMIT)
    assert (moved["worst_px"], moved["worst_score"], moved["same"]) == (None, None, None)
    assert faults(None, moved, LIMIT) == []


def test_every_rung_is_made_from_one_that_comes_before():
    order = list(ROLES)
    for role, parent, _ in RUNGS:
        assert order.index(parent) < order.index(role)
