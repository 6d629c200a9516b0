from __future__ import annotations

import pytest

from benchmarks.verdict import judge, verdict_from_limits
from deploy.errors import MeasurementError


def row(**changes):
    values = {
        "role": "onnx-int8",
        "title": "ONNX INT8",
        "AP": 0.47,
        "AP_gain": -0.01,
        "speedup": 4.0,
        "latency_ms": {"total": {"median": 12.0, "p99": 20.0}},
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("key", "holds", "fails", "measured"),
    [
        ("max_ap_drop", 1.0, 0.99, 1.0),
        ("min_ap", 47.0, 47.1, 47.0),
        ("max_latency_ms", 12.0, 11.9, 12.0),
        ("max_p99_ms", 20.0, 19.9, 20.0),
        ("min_speedup", 4.0, 4.1, 4.0),
    ],
)
def test_each_limit_holds_at_its_number_and_fails_beyond(key, holds, fails, measured):
    (passed,), (failed,) = judge(row(), {key: holds}), judge(row(), {key: fails})
    assert passed["measured"] == pytest.approx(measured)
    assert passed["passed"] is True
    assert failed["passed"] is False


def test_a_gain_over_the_teacher_is_a_negative_drop():
    (limit,) = judge(row(AP_gain=0.02), {"max_ap_drop": 0.0})
    assert limit["measured"] == pytest.approx(-2.0)
    assert limit["passed"] is True


@pytest.mark.parametrize(
    ("key", "missing"),
    [("max_ap_drop", "AP_gain"), ("min_ap", "AP"), ("max_p99_ms", "latency_ms"), ("min_speedup", "speedup")],
)
def test_a_limit_without_its_measurement_is_an_error(key, missing):
    flag = "--" + key.replace("_", "-")
    with pytest.raises(
        MeasurementError, match=f"{flag} cannot be judged: it needs the (accuracy|latency) of 'onnx-int8'"
    ):
        judge(row(**{missing: None}), {key: 1.0})


def test_the_sentence_says_what_ships_and_why():
    allowed = {"max_ap_drop": 1.5, "max_latency_ms": 40.0}
    good = verdict_from_limits(row(), judge(row(), allowed))
    assert good["roll_out"] is True
    assert good["sentence"].startswith(
        "Roll out ONNX INT8: AP 47.0 (\N{MINUS SIGN}1.0 against the teacher); median 12.0 ms"
    )
    assert good["sentence"].endswith("all 2 limits hold.")
    bad = verdict_from_limits(row(), judge(row(), {"max_ap_drop": 0.5, "max_latency_ms": 40.0}))
    assert bad["roll_out"] is False
    assert bad["sentence"] == (
        "Do not roll out ONNX INT8: AP drop against the teacher is 1.00 points, at most 0.50 points is allowed."
    )
    none = verdict_from_limits(row(), [])
    assert (none["roll_out"], none["label"]) == (None, "No limits given")
