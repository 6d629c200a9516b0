"""A report beside an earlier one: what changed."""

from __future__ import annotations

import json

import pytest


def test_what_changed_since_an_earlier_report(result, run_report, tmp_path):
    first = [result("student", ap=0.5), result("student", ms=20.0), result("onnx-int8", ap=0.48)]
    run_report(first)
    old = tmp_path / "old.json"
    (tmp_path / "out" / "report.json").rename(old)
    second = [result("student", ap=0.5, model__sha256="e" * 64), result("student", ms=10.0, model__sha256="e" * 64)]
    changes = run_report([*second, result("teacher", ap=0.6)], "--against", old)[2]["changes"]
    assert (changes["added"], changes["gone"], changes["machines"]) == (["Teacher"], ["ONNX INT8"], None)
    (row,) = changes["rows"]
    assert (row["title"], row["same_file"]) == ("Distilled student", False)
    assert row["changes"]["AP"] == {"old": 0.5, "new": 0.5, "sure": False}
    assert row["changes"]["median_ms"] == {"old": 20.0, "new": 10.0, "sure": True}
    assert row["changes"]["energy_mj"] is None
    assert "20.0 → 10.0 (changed)" in (tmp_path / "out" / "report.md").read_text()
    assert "What changed since" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda old: old["verdict"].update(sentence="Roll out."), "was edited"),
        (lambda old: old.update(report_version=1), "report_version is 1; expected 2"),
        (lambda old: old.pop("report_version"), "is not a report"),
    ],
)
def test_an_old_report_that_cannot_be_used(result, run_report, tmp_path, edit, message):
    path = result("student", ap=0.5)
    document = run_report([path])[2]
    edit(document)
    (tmp_path / "old.json").write_text(json.dumps(document))
    status, error, _ = run_report([path], "--against", tmp_path / "old.json")
    assert status == 2
    assert message in error


def test_an_old_report_on_other_data_is_refused(result, run_report, tmp_path):
    run_report([result("student", ap=0.5, data__images=4)])
    (tmp_path / "out" / "report.json").rename(tmp_path / "old.json")
    status, error, _ = run_report([result("student", ap=0.5)], "--against", tmp_path / "old.json")
    assert status == 2
    assert "Rollouts on different data do not compare" in error
