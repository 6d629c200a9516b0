"""Measurements are kept, and made again only under other conditions; a board that fails is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from crosskd import choose
from crosskd.choice import measure
from crosskd.choice.measure import Bench, Target, export, measured_on_boards
from crosskd.choice.search import Candidate, Measured
from deploy.contract import load_contract
from deploy.dataset import load_split
from deploy.errors import MeasurementError
from deploy.files import write_json

SMALL = Candidate("mobilenetv4_conv_small_050", 32, 1, 160, 10**8)
LARGE = dataclasses.replace(SMALL, side_px=192, macs=2 * 10**8)


def _never(*_: object) -> Measured:
    raise AssertionError("it was measured")


def test_what_was_measured_is_not_measured_again(
    shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, target = load_split(shapes_dir, "val"), Target(str(shapes_dir))
    times = iter([5.0, 6.0])
    monkeypatch.setattr(measure, "measured_once", lambda *_: Measured(next(times), 1.0, 50.0))
    bench = Bench(tmp_path, target, data)
    assert bench.measure(SMALL).p99_ms == bench.measure(SMALL).p99_ms == 5.0
    assert bench.measure_again(SMALL).p99_ms == 6.0
    monkeypatch.setattr(measure, "measured_once", _never)
    assert Bench(tmp_path, target, data).measure(SMALL).p99_ms == 5.0  # an interrupted run goes on
    with pytest.raises(AssertionError, match="it was measured"):
        Bench(tmp_path, dataclasses.replace(target, threads=1), data).measure(SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [measure.JOURNAL]
    (tmp_path / measure.JOURNAL).write_text('{"measured": [{"candidate": 3}]}')
    with pytest.raises(MeasurementError, match=r"measured\.json"):
        Bench(tmp_path, target, data)


def test_a_candidate_is_exported_with_its_contract(shapes_dir: Path, tmp_path: Path) -> None:
    data = load_split(shapes_dir, "val")
    export(SMALL, data, tmp_path / "student.onnx")
    contract = load_contract(tmp_path / "student.onnx")
    assert contract.input_shape == (1, 3, 160, 160)
    assert contract.class_names == data.class_names


def test_of_boards_the_slowest_counts_and_those_that_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [
        {"board": "a", "state": "ok", "p99_ms": 3.0, "reason": None},
        {"board": "b", "state": "ok", "p99_ms": 4.0, "reason": None},
    ]

    def fleet(_module: str, *words: Any) -> int:
        write_json(Path(words[-1]) / "fleet.json", {"outcomes": outcomes})
        return 1

    monkeypatch.setattr(measure, "run_captured", lambda *_words: "")
    monkeypatch.setattr(measure, "run_status", fleet)
    model = tmp_path / "student.onnx"
    model.write_bytes(bytes(2**20))
    assert measured_on_boards(model, tmp_path / "boards.toml", tmp_path) == Measured(4.0, 1.0, None)
    outcomes[1] = {"board": "b", "state": "failed", "p99_ms": None, "reason": "no route to host"}
    with pytest.raises(
        MeasurementError, match=r"1 of 2 boards .*: b \(no route to host\)\. .* what was measured is kept"
    ):
        measured_on_boards(model, tmp_path / "boards.toml", tmp_path)


def test_the_command_writes_the_choice_and_goes_on_from_what_was_measured(
    shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "families", lambda: [[SMALL, LARGE]])
    monkeypatch.setattr(measure, "measured_once", lambda one, *_: Measured(one.macs / 1e7, 1.0, None))
    words = ["--data", str(shapes_dir), "-o", str(tmp_path)]
    assert choose.main(["--budget-ms", "15", *words]) == 0
    printed = capsys.readouterr().out
    assert f"chosen: {SMALL.name}, measured again: p99 10.00 ms; 2 of 2 students were measured" in printed
    assert f"{LARGE.name:<34}    0.20    20.00    1.0       -  too much" in printed
    assert json.loads((tmp_path / "choice.json").read_text())["chosen"]["side_px"] == 160
    assert "<circle" in (tmp_path / "choice.svg").read_text()
    assert "(160, 160)" in (tmp_path / "student.py").read_text()
    monkeypatch.setattr(measure, "measured_once", _never)
    assert choose.main(["--budget-ms", "5", *words]) == 2
    assert "no student keeps the limits: the fastest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "there is no budget; expected --budget-ms, or --fps"),
        (["--budget-ms", "0"], "--budget-ms is 0; expected a number above 0"),
        (["--budget-ms", "nan"], "--budget-ms is nan; expected a number above 0"),
        (["--budget-ms", "5", "--boards", "nope.toml"], "no such file: nope.toml; expected a list of boards"),
        (["--fps", "5", "--boards", "nope.toml"], "--fps is given with --boards"),
        (["--budget-ms", "5", "--data", "nope"], "nope"),
    ],
)
def test_what_cannot_be_asked_for_is_one_message(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose.main([*words, "-o", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out" / "measured.json").exists()
