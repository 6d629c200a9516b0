from __future__ import annotations

import json

import pytest

from benchmarks import session_overhead
from benchmarks.session_overhead import main, numbers_from_rounds, time_pairs
from deploy.files import sha256_of


def test_each_call_keeps_its_own_times(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock, order = Clock(), []

    def call(name, elapsed_s):
        def run():
            order.append(name)
            clock.now += elapsed_s

        return run

    monkeypatch.setattr(session_overhead, "time", clock)
    pairs = time_pairs(call("bare", 0.002), call("ours", 0.003), 4)
    assert order == ["bare", "ours", "ours", "bare"] * 2  # neither always comes second
    assert [pytest.approx(pair) for pair in pairs] == [(2.0, 3.0)] * 4


def test_the_ratio_is_that_of_medians_and_its_spread_that_of_rounds():
    rounds = [
        [(10.0, 11.0), (10.0, 11.0), (99.0, 11.0)],  # 1.1: what happened once does not count
        [(10.0, 10.0), (10.0, 10.0), (10.0, 10.0)],
        [(10.0, 12.0), (10.0, 12.0), (10.0, 99.0)],
    ]
    numbers = numbers_from_rounds(rounds)
    assert numbers["ratio"] == {"median": 1.1, "lowest": 1.0, "highest": 1.2}
    assert (numbers["bare_ms"], numbers["ours_ms"]) == (10.0, 11.0)
    assert "bare 10.000 ms, ours 11.000 ms: +10.00 % (+0.00 to +20.00" in session_overhead.line_from_numbers(numbers)


def test_the_command_writes_what_it_prints(detector, tmp_path, capsys):
    model, output = detector(), tmp_path / "overhead.json"
    assert main([str(model), "--pairs", "4", "--rounds", "3", "--threads", "1", "-o", str(output)]) == 0
    document = json.loads(output.read_text())
    assert document["kind"] == "session_overhead"
    assert document["inputs"]["model"]["sha256"] == sha256_of(model)
    assert document["settings"] == {"pairs": 4, "rounds": 3, "threads": 1}
    assert [len(pairs) for pairs in document["numbers"]["rounds_ms"]] == [4, 4, 4]
    assert 0 < document["numbers"]["ratio"]["lowest"] <= document["numbers"]["ratio"]["median"]
    printed = capsys.readouterr().out
    assert "1 threads, 3 rounds of 4 pairs" in printed
    assert session_overhead.line_from_numbers(document["numbers"]) in printed


@pytest.mark.parametrize("flag", ["--pairs", "--rounds", "--threads"])
def test_numbers_below_one_are_refused(detector, flag, capsys):
    assert main([str(detector()), flag, "0"]) == 2
    assert f"{flag} is 0; expected at least 1" in capsys.readouterr().err
