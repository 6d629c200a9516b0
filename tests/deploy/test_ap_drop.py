from __future__ import annotations

import pytest

from deploy.ap_drop import INT8_PREDICTORS, Drop, checked_budget, drop_from_result
from deploy.contract import RESULT_VERSION, provenance, sealed
from deploy.errors import ConfigError, MeasurementError
from deploy.files import write_json


def write_result(path, role="max", **against):
    numbers = {"AP": 0.38, "against": against or None}
    write_json(path, sealed({"result_version": RESULT_VERSION, "role": role, "numbers": numbers, **provenance({})}))
    return path


def test_a_drop_is_what_is_missing_against_float_as_a_result_tells_it(tmp_path):
    path = write_result(tmp_path / "x.result.json", AP_difference=-0.02, low=-0.03, high=0.01)
    assert drop_from_result(path) == Drop(ap=0.38, drop=0.02, low=-0.01, high=0.03)


@pytest.mark.parametrize(("shift", "kept"), [(0.0, True), (-0.1, True), (0.11, False), (-0.2, False), (None, False)])
def test_scores_are_judged_where_predictions_are_in_int8(tmp_path, shift, kept):
    numbers = dict(AP_difference=-0.002, low=-0.03, high=0.01, score_shift=shift)
    drop = drop_from_result(write_result(tmp_path / "x.result.json", role=INT8_PREDICTORS, **numbers))
    assert (drop.keeps(0.5), drop.keeps(0.1)) == (kept, False)
    assert "moved by" in str(drop)
    assert ("more than 0.1" in str(drop)) is not kept
    other = drop_from_result(write_result(tmp_path / "x.result.json", **numbers))
    assert (other.keeps(0.5), other.score_shift) == (True, None)


def test_a_result_against_nothing_or_edited_is_refused(tmp_path):
    path = write_result(tmp_path / "x.result.json")
    with pytest.raises(MeasurementError, match=r"x.result.json: numbers.against is None; expected .* with --against"):
        drop_from_result(path)
    path = write_result(tmp_path / "x.result.json", AP_difference=-0.02, low=-0.03, high=0.01)
    path.write_text(path.read_text().replace("-0.02", "-0.002"))
    with pytest.raises(MeasurementError, match="was edited"):
        drop_from_result(path)


@pytest.mark.parametrize(
    ("drop", "budget", "kept"),
    [(0.005, 0.5, True), (0.48 - 0.475, 0.5, True), (0.0051, 0.5, False), (-0.01, 0, True), (0.001, 0, False)],
)
def test_a_budget_is_kept_by_the_drop_as_measured(drop, budget, kept):
    assert Drop(0.4, drop, drop - 0.1, drop + 0.1).keeps(budget) is kept


@pytest.mark.parametrize("budget", [-0.1, 100.5, float("nan"), float("inf"), "0.5", True, None, [0.5]])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ConfigError, match=r"--max-int8-drop is .*; expected points of AP, 0 or more and at most 100"):
        checked_budget(budget, "--max-int8-drop")


@pytest.mark.parametrize("budget", [0, 0.5, 100])
def test_a_budget_from_0_to_100_is_taken(budget):
    assert checked_budget(budget, "--max-int8-drop") == budget
