from __future__ import annotations

import pytest

from benchmarks.reporting.int8_budget import words_of_miss
from deploy.contract import read_sidecar, write_sidecar
from deploy.files import sha256_of

RUNG = {"file": "x.onnx", "low": -0.001, "high": 0.02, "int8_share": 0.87, "median_ms": 12.25, "elapsed_s": 300.0,
        "comparable": True}  # fmt: skip


@pytest.fixture
def chosen(tmp_path):
    """(what ships) -> an INT8 file as calibration.choose leaves it."""

    def make(ships=None):
        path = tmp_path / "student.int8.onnx"
        path.write_bytes(b"INT8")
        rungs = [
            {"title": "max", "ap": 0.49, "drop": 0.0101, "holds": False, **RUNG},
            {
                "title": "auto",
                "ap": 0.499,
                "drop": 0.002,
                "holds": ships is None,
                **RUNG,
                "int8_share": None,
                "comparable": False,
            },
        ]
        budget = {"max_int8_drop": 0.5, "ships": ships, "sentence": "It <came> so.", "rungs": rungs}
        write_sidecar(path, {}, details={"int8_budget": budget})
        return path

    return make


@pytest.fixture
def int8_results(results, result, chosen):
    """The results of a whole run, whose INT8 model is that file."""
    path = chosen()
    kept = [one for one in results if "onnx-int8" not in one.name]
    change = {"model__sha256": sha256_of(path)}
    return [
        *kept,
        *(result("onnx-int8", **one, **change, made_from="onnx-fp32") for one in ({"ap": 0.495}, {"ms": 16})),
    ]


def test_how_int8_was_reached_stands_in_the_report(int8_results, chosen, run_report, tmp_path):
    path = chosen()
    status, _, document = run_report(int8_results, "--int8-budget", path)
    assert status == 0
    assert document["verdict"]["ship"] == "onnx-int8"
    assert "do not roll out INT8" not in document["verdict"]["sentence"]
    assert document["int8_budget"] == read_sidecar(path)["details"]["int8_budget"]
    assert document["inputs"][str(path)]["sha256"] == sha256_of(path)
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "## How INT8 was reached" in markdown
    assert "| max | 49.0 | 1.01 (\N{MINUS SIGN}0.10 to 2.00) | 87 % | 12.2 | 5 min | missed |" in markdown
    assert (
        "| auto | 49.9 | 0.20 (\N{MINUS SIGN}0.10 to 2.00) | \N{EN DASH} | 12.2 (not comparable) | 5 min | kept |"
        in markdown
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "It &lt;came&gt; so." in page
    assert '<a href="#int8">' in page


def test_where_no_way_keeps_the_budget_float_ships_and_the_verdict_ends_so(int8_results, chosen, run_report):
    status, _, document = run_report(int8_results, "--int8-budget", chosen("onnx-fp32"), "--min-speedup", 2)
    assert status == 0
    assert document["verdict"]["ship"] == "onnx-fp32"
    assert document["verdict"]["sentence"].startswith("Roll out ONNX FP32: ")
    assert document["verdict"]["sentence"].endswith("do not roll out INT8.")
    assert run_report(int8_results, "--int8-budget", chosen("onnx-fp32"), "--ship", "student")[2]["verdict"]["ship"] \
        == "student"  # fmt: skip


def test_a_report_without_a_budget_has_no_such_section(results, run_report, tmp_path):
    assert run_report(results)[2]["int8_budget"] is None
    assert "How INT8 was reached" not in (tmp_path / "out" / "report.html").read_text()


def test_an_int8_file_that_was_not_measured_or_not_chosen_is_refused(results, chosen, run_report):
    path = chosen()
    status, error, document = run_report(results, "--int8-budget", path)
    assert (status, document) == (2, None)
    assert f"--int8-budget is {path}, of which none of the results is" in error
    write_sidecar(path, {})
    status, error, _ = run_report(results, "--int8-budget", path)
    assert status == 2
    assert "details.int8_budget is missing" in error


def test_words_of_a_miss_are_none_where_int8_ships():
    assert words_of_miss({"ships": None, "max_int8_drop": 0.5}) == ""
