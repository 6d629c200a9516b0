from __future__ import annotations

import json

import pytest

from benchmarks.studies.tables import check_tables, disturbed, interval, points, table, write_tables
from deploy.errors import PipelineError


@pytest.mark.parametrize(
    ("fraction", "sign", "expected"),
    [(0.26974, "", "26.97"), (-0.0018, "+", "-0.18"), (0.0018, "+", "+0.18"), (-0.00001, "+", "+0.00"),
     (None, "+", "\N{EN DASH}")],
)  # fmt: skip
def test_points_have_hundredths_and_no_negative_zero(fraction, sign, expected):
    assert points(fraction, sign) == expected


def test_an_interval_has_signs():
    assert interval({"low": -0.01, "high": 0.002}) == "-1.00 to +0.20"


@pytest.mark.parametrize(
    ("others_cores", "expected"), [(None, ""), (0.0, ""), (0.25, ""), (0.3, ", disturbed"), (2.0, ", disturbed")]
)
def test_a_time_is_disturbed_when_others_were_busy(others_cores, expected):
    assert disturbed(others_cores) == expected


def test_a_table_has_the_same_columns_in_every_line():
    lines = table(["a", "b"], [["1", "2 | 3"], ["4\n5", ""]])
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 2 \\| 3 |", "| 4 5 |  |"]


def test_json_and_markdown_lie_beside_each_other(tmp_path):
    write_tables(tmp_path / "new" / "x.y", {"a": 1}, "# A\n")
    assert json.loads((tmp_path / "new" / "x.y.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "x.y.md").read_text() == "# A\n"


def test_both_files_must_be_writable_before_long_work(tmp_path):
    check_tables(tmp_path / "new" / "x")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "x.md").mkdir()
    with pytest.raises(PipelineError, match=r"cannot write .*x\.md"):
        check_tables(tmp_path / "x")
