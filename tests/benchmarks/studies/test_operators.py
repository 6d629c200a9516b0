"""The time of an inference by operator: each node counts once, and what is rare is summed up."""

from __future__ import annotations

import json

import pytest

from benchmarks.studies import operators, turns
from benchmarks.studies.operators import _cells, main


def test_a_pair_is_timed_and_told_by_operator(detector, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "REST_S", 0.01)
    monkeypatch.setattr(turns, "MOST_TURNS", 2)
    monkeypatch.setattr(operators, "RUNS", 3)
    fp32, int8 = detector("a.onnx"), detector("a.int8.onnx")
    stem = tmp_path / "operators"
    assert main([f"a={fp32}:{int8}", "--data", str(data_dir), "-o", str(stem)]) == 0
    (row,) = json.loads(stem.with_suffix(".json").read_text())["rows"]
    assert row["operators"]["fp32"]["convolutions in FP32"]["nodes"] == 1
    assert row["operators"]["fp32"]["ReduceMax"]["ms"] > 0
    assert row["times"]["lowest"] <= row["times"]["median"] <= row["times"]["highest"]
    assert "## a\n" in stem.with_suffix(".md").read_text()


def test_what_takes_least_is_one_row(monkeypatch):
    monkeypatch.setattr(operators, "SHOWN", 2)
    own = {
        "fp32": {"convolutions in FP32": {"nodes": 3, "ms": 9.0}, "A": {"nodes": 1, "ms": 0.1}},
        "int8": {"QLinearAdd": {"nodes": 2, "ms": 4.0}, "A": {"nodes": 1, "ms": 0.25}, "B": {"nodes": 1, "ms": 0.5}},
    }
    assert _cells(own) == [
        ["convolutions in FP32", "3", "9.00", "", ""],
        ["QLinearAdd", "", "", "2", "4.00"],
        ["all others", "1", "0.10", "2", "0.75"],
    ]


@pytest.mark.parametrize("text", ["a.onnx", "a=a.onnx", "=a.onnx:b.onnx"])
def test_what_is_no_pair_is_one_message(text, data_dir, tmp_path, capsys):
    assert main([text, "--data", str(data_dir), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: the model is {text!r}; expected NAME=FP32.onnx:INT8.onnx\n"
