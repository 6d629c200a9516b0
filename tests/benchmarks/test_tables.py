from __future__ import annotations

import json

import pytest

from benchmarks.tables import interval, points, table, write_tables


@pytest.mark.parametrize(
    ("fraction", "sign", "expected"),
    [(0.26974, "", "26.97"), (-0.0018, "+", "-0.18"), (0.0018, "+", "+0.18"), (-0.00001, "+", "+0.00"),
     (None, "+", "\N{EN DASH}")],
)  # fmt: skip
def test_points_have_hundredths_and_no_negative_zero(fraction, sign, expected):
    assert points(fraction, sign) == expected


def test_an_interval_has_signs():
    assert interval({"low": -0.01, "high": 0.002}) == "-1.00 to +0.20"


def test_a_table_has_the_same_columns_in_every_line():
    lines = table(["a", "b"], [["1", "2 | 3"], ["4\n5", ""]])
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 2 \\| 3 |", "| 4 5 |  |"]


def test_json_and_markdown_lie_beside_each_other(tmp_path):
    write_tables(tmp_path / "new" / "x.y", {"a": 1}, "# A\n")
    assert json.loads((tmp_path / "new" / "x.y.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "x.y.md").read_text() == "# A\n"
