from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import report


def test_a_whole_run_is_one_table_and_a_verdict(data_dir, results, run_report, tmp_path):
    status, _, document = run_report(results, "--max-ap-drop", 3, "--max-latency-ms", 20, "--min-speedup", 10)
    assert status == 0
    assert document["verdict"]["outcome"] == "pass"
    assert document["verdict"]["ship"] == "onnx-int8"
    assert [row["role"] for row in document["rows"]] == ["teacher", "baseline", "student", "onnx-fp32", "onnx-int8"]
    last = document["rows"][-1]
    assert last["AP_gain"] == pytest.approx(-0.025)
    assert last["speedup"] == pytest.approx(12.5)
    assert [rung.get("change") for rung in document["ladder"]] == [None, pytest.approx(0.0001), pytest.approx(-0.0051)]
    assert document["first_bad_rung"] is None
    assert last["gain_kept"] == pytest.approx((0.495 - 0.47) / (0.50 - 0.47))
    assert (last["lost"], last["gained"], last["score_shift"]) == (1, 0, 0.0)
    for name, value in (("AP", 0.495), ("AP_gain", -0.025), ("median_ms", 16.0), ("speedup", 12.5)):
        estimate = last["estimates"][name]
        assert estimate["value"] == pytest.approx(value)
        assert estimate["low"] < value < estimate["high"]
    assert document["distillation"]["gain"] == pytest.approx(0.03)
    assert document["notes"] == []
    assert [entry["inputs"][0]["role"] for entry in document["lineage"][2:]] == ["teacher", "student", "onnx-fp32"]
    assert len(document["environments"]) == 1
    assert len(document["inputs"]) == 10
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| ONNX INT8 (ships) | 49.5 (" in markdown
    assert "| \N{MINUS SIGN}2.5 (\N{MINUS SIGN}2." in markdown
    assert markdown.startswith("# Roll out\n")


def test_a_failed_limit_is_status_1_and_says_which(results, run_report):
    status, _, document = run_report(results, "--max-ap-drop", 2, "--max-p99-ms", 1000)
    assert status == 1
    assert document["verdict"]["roll_out"] is False
    assert [limit["outcome"] for limit in document["limits"]] == ["fail", "pass"]
    assert "2.50 points" in document["verdict"]["sentence"]


def test_a_limit_within_the_bounds_is_status_1_and_cannot_be_told(results, run_report, tmp_path):
    status, _, document = run_report(results, "--max-ap-drop", 2.5, "--junit", tmp_path / "gate.xml")
    assert status == 1
    assert document["verdict"]["outcome"] == "cannot tell"
    assert "It cannot be told" in (tmp_path / "out" / "report.html").read_text()
    assert 'type="cannot tell"' in (tmp_path / "gate.xml").read_text()


def test_limits_come_from_a_file_or_from_flags_but_once(results, run_report, tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text("max_ap_drop = 3.0\nmax_memory_mib = 100\n")
    status, _, document = run_report(results, "--limits", path, "--max-p99-ms", 99)
    assert status == 1
    outcomes = {limit["flag"]: limit["outcome"] for limit in document["limits"]}
    assert outcomes == {"--max-ap-drop": "pass", "--max-p99-ms": "pass", "--max-memory-mib": "fail"}
    status, error, _ = run_report(results, "--limits", path, "--max-ap-drop", 1)
    assert status == 2
    assert "--max-ap-drop is also in" in error


def test_junit_without_limits_is_refused(results, run_report, tmp_path):
    status, error, _ = run_report(results, "--junit", tmp_path / "gate.xml")
    assert status == 2
    assert "--junit writes limits" in error
    assert not (tmp_path / "gate.xml").exists()


def test_without_limits_there_is_no_verdict(results, run_report):
    status, _, document = run_report(results)
    assert status == 0
    assert document["verdict"]["roll_out"] is None
    assert document["verdict"]["label"] == "No limits given"


def test_ship_names_another_model(results, run_report):
    _, _, document = run_report(results, "--ship", "baseline")
    assert document["verdict"]["ship"] == "baseline"
    status, error, _ = run_report(results, "--ship", "engine-int8")
    assert status == 2
    assert "--ship is 'engine-int8'" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-ap", "0.48"), "expected points, 1 to 100: 48 for that fraction"),
        (("--max-p99-ms", "nan"), "--max-p99-ms is nan"),
        (("--min-speedup", "0"), "expected a positive number"),
        (("--max-p99-ms", "5"), "--max-p99-ms cannot be judged: it needs the latency of 'student'"),
        (("--max-ap-drop", "1"), "and of a teacher to compare it with"),
    ],
)
def test_limits_that_cannot_be_judged(result, run_report, words, message):
    status, error, document = run_report([result("student", ap=0.5)], *words)
    assert status == 2
    assert message in error
    assert document is None


def test_output_paths(result, tmp_path, capsys):
    path = result("student", ap=0.5)
    assert report.main([str(path), "-o", str(tmp_path / "report.json")]) == 2
    assert "expected a name that ends in .html" in capsys.readouterr().err
    assert report.main([str(path), "-o", str(path.with_suffix(".html"))]) == 2
    assert "written over an input" in capsys.readouterr().err
    assert json.loads(path.read_text())["kind"] == "accuracy"


@pytest.mark.parametrize("module", ["accuracy", "latency", "report"])
def test_help_needs_no_heavy_package(module):
    program = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('benchmarks.{module}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'onnx', 'onnxruntime', 'faster_coco_eval', 'tensorrt', 'torch', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m benchmarks." in done.stdout
