"""Models take turns, and their ratio is that of the same rounds."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from benchmarks.studies import turns
from benchmarks.studies.turns import latencies, ratio, take_turns
from deploy.contract import load_contract
from deploy.runtime.session import Session


class Busy(Session):
    """A session that keeps the processor busy for so many milliseconds, and sleeps for others."""

    description = "some runtime"

    def __init__(self, busy_ms, sleep_ms=0.0, contract=None):
        self.busy_ms, self.sleep_ms, self.contract = busy_ms, sleep_ms, contract
        self.calls, self.shapes, self.closed = [], set(), False

    def infer(self, feed):
        self.calls.append(time.perf_counter())
        self.shapes.update(value.shape for value in feed.values())
        time.sleep(self.sleep_ms / 1e3)
        end = time.thread_time() + self.busy_ms / 1e3
        while time.thread_time() < end:
            pass

    def close(self):
        self.closed = True


def test_two_models_take_turns_and_what_others_do_does_not_count():
    first, second = Busy(1.0, sleep_ms=10.0), Busy(3.0)
    taken = take_turns({"first": first, "second": second}, {"first": {}, "second": {}}, 4)
    assert np.median(taken["first"]) == pytest.approx(1.0, abs=0.5)
    assert np.median(taken["second"]) == pytest.approx(3.0, abs=0.5)
    order = sorted([(at, "first") for at in first.calls] + [(at, "second") for at in second.calls])
    assert [name for _, name in order] == ["first", "second", "second", "first"] * 2


def test_models_of_two_batches_are_timed_in_one_run(detector, data_dir, monkeypatch):
    contract = load_contract(detector())
    batched = dataclasses.replace(contract, input_shape=(2, *contract.input_shape[1:]))
    sessions = {"slow": Busy(2.0, contract=contract), "fast": Busy(0.5, contract=batched)}
    monkeypatch.setattr(turns, "REST_S", 0.01)
    monkeypatch.setattr(turns, "MOST_TURNS", 2)
    image = next((data_dir / "images").rglob("*.png"))
    measured = latencies(sessions, image)
    assert all(session.closed for session in sessions.values())
    assert sessions["slow"].shapes == {contract.input_shape}
    assert sessions["fast"].shapes == {batched.input_shape}
    assert measured["ms"] == pytest.approx({"slow": 2.0, "fast": 0.5}, abs=0.4)
    speed = ratio(measured, "slow", "fast")
    assert speed["lowest"] <= speed["median"] <= speed["highest"]
    assert speed["median"] == pytest.approx(4.0, abs=1.5)
