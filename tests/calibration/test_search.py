from __future__ import annotations

import random

import pytest

from calibration.blocks import Block
from calibration.search import Drop, Journal, Step, blocks_to_keep, text_of_result
from deploy.dataset import CocoSet
from deploy.errors import CalibrationError


def make(products):
    return [Block(name, (f"{name}/Conv",), number) for name, number in products.items()]


def measure_from(costs):
    """The drop is the sum of the costs of the blocks in INT8; and the sets that were asked for."""
    asked = []

    def measure(kept):
        names = {block.name for block in kept}
        asked.append(names)
        drop = sum(cost for name, cost in costs.items() if name not in names)
        return Drop(0.4 - drop, drop, drop - 0.01, drop + 0.01)

    return measure, asked


def test_nothing_is_kept_where_int8_holds_the_budget():
    measure, asked = measure_from({"a": 0.001, "b": 0.001})
    kept, steps = blocks_to_keep(make({"a": 1, "b": 1}), measure, None, 0.002)
    assert (kept, asked) == ([], [set()])
    assert [step.holds for step in steps] == [True]


def test_what_moves_detections_most_for_its_operations_is_kept_first():
    costs = {"large": 0.01, "small": 0.01, "harmless": 0.0}
    measure, asked = measure_from(costs)
    kept, steps = blocks_to_keep(make({"large": 900, "small": 50, "harmless": 50}), measure, lambda: costs, 0.01)
    assert [block.name for block in kept] == ["small"]
    assert asked == [set(), {"small"}]
    assert steps[-1].float_share == pytest.approx(0.05)


def test_what_turns_out_needless_goes_back_to_int8():
    """The errors mislead: `b` seems to be the worst and costs nothing."""
    measure, asked = measure_from({"a": 0.02, "b": 0.0, "c": 0.0})
    errors = {"a": 0.2, "b": 0.3, "c": 0.1}
    kept, steps = blocks_to_keep(make({"a": 10, "b": 10, "c": 10}), measure, lambda: errors, 0.01)
    assert [block.name for block in kept] == ["a"]
    assert asked == [set(), {"b"}, {"b", "a"}, {"a"}]
    assert [step.change for step in steps][-1] == "b back in INT8"
    assert [step.holds for step in steps] == [False, False, True, True]


@pytest.mark.parametrize("seed", range(20))
def test_the_result_holds_and_no_kept_block_is_needless(seed):
    chooser = random.Random(seed)
    names = [f"block{number}" for number in range(12)]
    costs = {name: chooser.random() ** 4 / 20 for name in names}
    blocks = make({name: chooser.randrange(1, 100) for name in names})
    errors = {name: costs[name] * chooser.uniform(0.2, 5) for name in names}  # a rough guess only
    measure, _ = measure_from(costs)
    budget = sum(costs.values()) * chooser.uniform(0.2, 0.9)
    kept, steps = blocks_to_keep(blocks, measure, lambda: errors, budget)
    final = [step for step in steps if step.holds][-1]
    assert final.kept == tuple(block.name for block in kept)
    assert measure(kept).drop == final.drop.drop <= budget
    for block in kept:
        assert measure([one for one in kept if one is not block]).drop > budget
    assert len(steps) <= 2 * len(blocks)


def test_a_budget_that_cannot_be_met_is_an_error():
    measure, asked = measure_from({"a": 0.02, "b": 0.03, "c": 0.02})
    with pytest.raises(CalibrationError, match=r"budget of 0.3 points of AP cannot be met.*2 of 3 blocks in float"):
        blocks_to_keep(make({"a": 1, "b": 1, "c": 1}), measure, lambda: {"a": 1, "b": 3, "c": 2}, 0.003)
    assert asked == [set(), {"b"}, {"b", "c"}]


def test_the_nearest_is_taken_where_it_is_asked_for(capsys):
    measure, _ = measure_from({"a": 0.01, "b": 0.02})
    kept, steps = blocks_to_keep(make({"a": 1, "b": 1}), measure, lambda: {"a": 0.1, "b": 0.2}, 0.001, nearest=True)
    assert [block.name for block in kept] == ["b"]
    assert not any(step.holds for step in steps)
    assert "cannot be met: the best of 2 models, with 1 of 2 blocks in float, has AP 39.00" in capsys.readouterr().err


def test_journal_gives_back_what_was_measured(tmp_path, capsys):
    a, b = make({"a": 1, "b": 2})
    journal, drop = Journal(tmp_path / "x.search.json", {"model": "m"}), Drop(0.3, 0.1, 0.05, 0.2)
    journal.float_ap = 0.4
    journal.add_drop([a, b], drop)
    journal.add_error(a, 0.25)
    assert capsys.readouterr().err == ""
    again = Journal(journal.path, {"model": "m"})
    assert (again.drop([b, a]), again.drop([a]), again.drop([])) == (drop, None, None)
    assert (again.float_ap, again.errors) == (0.4, {"a": 0.25})
    assert "1 sets and 1 blocks are known from an earlier run" in capsys.readouterr().err


def test_journal_knows_predictors_in_int8_apart(tmp_path):
    (a,) = make({"a": 1})
    journal = Journal(tmp_path / "x.search.json", {"model": "m"})
    with_them = Drop(0.3, 0.1, 0.05, 0.2, score_shift=-0.02)
    journal.add_drop([a], with_them, int8_predictors=True)
    again = Journal(journal.path, {"model": "m"})
    assert (again.drop([a]), again.drop([a], int8_predictors=True)) == (None, with_them)


def test_journal_of_other_settings_is_left_behind_and_said(tmp_path, capsys):
    a, b = make({"a": 1, "b": 2})
    path = tmp_path / "x.search.json"
    Journal(path, {"method": "max"}).add_drop([a], Drop(0.3, 0.1, 0.05, 0.2))
    other = Journal(path, {"method": "mse"})
    assert other.drop([a]) is None
    assert "x.search.json is of other method: the search begins anew" in capsys.readouterr().err
    other.add_error(b, 0.5)
    assert Journal(path, {"method": "mse"}).errors == {"b": 0.5}
    assert Journal(path, {"method": "max"}).drop([a]) is None


@pytest.mark.parametrize(
    "content",
    [
        '{"key": {',
        "[1, 2]",
        '{"key": {}, "float_ap": 0.4}',
        '{"key": [], "float_ap": 0.4, "errors": {}, "drops": []}',
        '{"key": {}, "float_ap": 0.4, "errors": 3, "drops": []}',
        '{"key": {}, "float_ap": 0.4, "errors": {}, "drops": [{"kept": ["a"], "other": 0.1}]}',
    ],
)
def test_a_file_that_is_no_journal_is_an_error_and_stays(tmp_path, content):
    path = tmp_path / "x.search.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"x\.search\.json.* expected .*; delete it to begin anew"):
        Journal(path, {"method": "max"})
    assert path.read_text() == content


def test_journal_of_a_version_with_other_settings_is_left_behind(tmp_path, capsys):
    (a,) = make({"a": 1})
    path = tmp_path / "x.search.json"
    Journal(path, {"method": "max", "equalised": True}).add_drop([a], Drop(0.3, 0.1, 0.05, 0.2))
    assert Journal(path, {"method": "max"}).drop([a]) is None
    assert "is of other equalised:" in capsys.readouterr().err


@pytest.mark.parametrize(("high", "kept"), [(0.006, ("a",)), (0.004, ("a",)), (0.006, ()), (0.004, ())])
def test_what_a_search_came_to_is_said_with_its_limits(tmp_path, high, kept):
    final = Step("a in float", kept, 0.25, Drop(0.3, 0.002, -0.001, high), holds=True)
    text = text_of_result(final, 0.5, CocoSet(tmp_path / "val.json", tmp_path, [], (), (), 0))
    interval = f"(95 % interval -0.10 to {100 * high:.2f})"
    assert text.startswith(f"AP 30.00, a drop of 0.20 points against float {interval}, on 0 images")
    assert ("the interval reaches beyond the budget of 0.5" in text) == (high > 0.005)
    assert ("in float for it: a, 25.0 %" in text) == ("another split" in text) == bool(kept)


def test_drop_is_what_is_missing_against_float():
    numbers = {"AP": 0.38, "against": {"AP_difference": -0.02, "low": -0.03, "high": 0.01}}
    assert Drop.from_numbers(numbers) == Drop(ap=0.38, drop=0.02, low=-0.01, high=0.03)
