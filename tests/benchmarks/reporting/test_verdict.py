from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks.measuring.result import Reason
from benchmarks.reporting.verdict import (
    LIMITS,
    Estimate,
    check_limits,
    judge,
    limits_from_file,
    outcome,
    verdict_from_limits,
)
from deploy.errors import ConfigError, MeasurementError


def exactly(value):
    return {"value": value, "low": value, "high": value}


def row(**estimates):
    values = {
        "AP": exactly(0.47),
        "AP_gain": exactly(-0.01),
        "median_ms": exactly(12.0),
        "p99_ms": exactly(20.0),
        "speedup": exactly(4.0),
        "memory_mib": exactly(300.0),
        "energy_mj": exactly(50.0),
    }
    return {
        "role": "onnx-int8",
        "title": "ONNX INT8",
        "AP": 0.47,
        "AP_gain": -0.01,
        "speedup": 4.0,
        "doubts": {},
        "comparable": True,
        "comparable_reasons": [],
        "latency_ms": {"total": {"median": 12.0, "p99": 20.0}},
        "estimates": {**values, **estimates},
    }


@pytest.mark.parametrize(
    ("key", "holds", "fails", "measured"),
    [
        ("max_ap_drop", 1.0, 0.99, 1.0),
        ("min_ap", 47.0, 47.1, 47.0),
        ("max_latency_ms", 12.0, 11.9, 12.0),
        ("max_p99_ms", 20.0, 19.9, 20.0),
        ("min_speedup", 4.0, 4.1, 4.0),
        ("max_memory_mib", 300.0, 299.0, 300.0),
        ("max_energy_mj", 50.0, 49.0, 50.0),
    ],
)
def test_each_limit_holds_at_its_number_and_fails_beyond(key, holds, fails, measured):
    (passed,), (failed,) = judge(row(), {key: holds}), judge(row(), {key: fails})
    assert passed["measured"] == pytest.approx(measured)
    assert passed["outcome"] == "pass"
    assert failed["outcome"] == "fail"


def test_all_limits_are_tested_above():
    assert len(LIMITS) == 7


@pytest.mark.parametrize(
    ("low", "high", "at_most", "expected"),
    [
        (8.0, 10.0, True, "pass"),
        (8.0, 10.1, True, "cannot tell"),
        (10.0, 11.0, True, "cannot tell"),
        (10.1, 11.0, True, "fail"),
        (10.0, 11.0, False, "pass"),
        (9.9, 11.0, False, "cannot tell"),
        (8.0, 10.0, False, "cannot tell"),
        (8.0, 9.9, False, "fail"),
    ],
)
def test_a_limit_between_the_bounds_cannot_be_told(low, high, at_most, expected):
    assert outcome(Estimate((low + high) / 2, low, high), 10.0, at_most) == expected


def test_a_drop_is_a_negative_gain_and_its_bounds_turn_round():
    (limit,) = judge(row(AP_gain={"value": 0.02, "low": 0.01, "high": 0.05}), {"max_ap_drop": 0.0})
    assert [limit[key] for key in ("measured", "low", "high")] == pytest.approx([-2.0, -5.0, -1.0])
    assert limit["outcome"] == "pass"


@pytest.mark.parametrize(
    ("key", "missing", "needs"),
    [
        ("max_ap_drop", "AP_gain", "accuracy of 'onnx-int8', which is to ship and of a teacher"),
        ("min_ap", "AP", "accuracy of 'onnx-int8'"),
        ("max_p99_ms", "p99_ms", "latency of 'onnx-int8'"),
        ("min_speedup", "speedup", "latency of 'onnx-int8', which is to ship and of a teacher"),
        ("max_memory_mib", "memory_mib", "with its peak memory"),
        ("max_energy_mj", "energy_mj", "on a device that tells its power"),
    ],
)
def test_a_limit_without_its_measurement_is_an_error(key, missing, needs):
    flag = "--" + key.replace("_", "-")
    with pytest.raises(MeasurementError, match=f"{flag} cannot be judged: it needs the .*{needs}"):
        judge(row(**{missing: None}), {key: 1.0})


def test_the_sentence_says_what_ships_and_why():
    allowed = {"max_ap_drop": 1.5, "max_latency_ms": 40.0}
    good = verdict_from_limits(row(), judge(row(), allowed))
    assert (good["outcome"], good["roll_out"]) == ("pass", True)
    assert good["sentence"].startswith(
        "Roll out ONNX INT8: AP 47.0 (\N{MINUS SIGN}1.0 against the teacher); median 12.0 ms"
    )
    assert good["sentence"].endswith("all 2 limits hold.")
    bad = verdict_from_limits(row(), judge(row(), {"max_ap_drop": 0.5, "max_latency_ms": 40.0}))
    assert (bad["outcome"], bad["roll_out"]) == ("fail", False)
    assert bad["sentence"] == (
        "Do not roll out ONNX INT8: AP drop against the teacher is 1.00 points, at most 0.50 points is allowed."
    )
    unsure_row = row(p99_ms={"value": 20.0, "low": 19.0, "high": 23.0})
    unsure = verdict_from_limits(unsure_row, judge(unsure_row, {"max_p99_ms": 21.0, "max_latency_ms": 40.0}))
    assert (unsure["outcome"], unsure["roll_out"], unsure["label"]) == ("cannot tell", False, "Cannot tell")
    assert "p99 latency is 20.00 ms (19.00 to 23.00), at most 21.00 ms is allowed" in unsure["sentence"]
    none = verdict_from_limits(row(), [])
    assert (none["outcome"], none["roll_out"], none["label"]) == ("no limits", None, "No limits given")


def test_one_failure_outweighs_what_cannot_be_told():
    mixed = row(p99_ms={"value": 20.0, "low": 19.0, "high": 23.0})
    assert verdict_from_limits(mixed, judge(mixed, {"max_p99_ms": 21.0, "min_ap": 50.0}))["outcome"] == "fail"


def test_a_file_of_limits(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text("# for the line\nmax_ap_drop = 1.5\nmax_p99_ms = 40\n")
    assert limits_from_file(path) == {"max_ap_drop": 1.5, "max_p99_ms": 40.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_ap_drop = ", "is not TOML"),
        ("max_drop = 1.0", "max_drop is no limit; expected some of max_ap_drop, min_ap"),
        ("[max_ap_drop]\npoints = 1", "max_ap_drop is {'points': 1}; expected a number"),
        ("min_ap = true", "min_ap is True; expected a number"),
        ('min_ap = "40"', "min_ap is '40'; expected a number"),
    ],
)
def test_a_bad_file_of_limits_is_named(tmp_path, text, message):
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        limits_from_file(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        limits_from_file(tmp_path / "none.toml")


def test_a_python_without_a_toml_reader_is_told_which_to_install(tmp_path):
    (tmp_path / "limits.toml").write_text("min_ap = 40")
    program = (
        "import sys; sys.modules['tomllib'] = sys.modules['tomli'] = None\n"
        "from benchmarks.reporting.verdict import limits_from_file\n"
        "from deploy.errors import MissingDependencyError\n"
        f"try: limits_from_file({str(tmp_path / 'limits.toml')!r})\n"
        "except MissingDependencyError as error: assert 'pip install tomli' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"min_ap": 700.0}, "expected points, 1 to 100"),
        ({"min_ap": 0.48}, "expected points, 1 to 100: 48 for that fraction"),
        ({"max_p99_ms": float("nan")}, "--max-p99-ms is nan"),
        ({"max_energy_mj": 0.0}, "--max-energy-mj is 0.0; expected a positive number"),
    ],
)
def test_limits_that_no_limit_can_be(allowed, message):
    with pytest.raises(ConfigError, match=message):
        check_limits(allowed)
    check_limits({"max_ap_drop": -1.0, "min_ap": 48.0})


def test_nothing_is_judged_by_a_teacher_that_finds_nothing():
    nothing = {**row(), "AP": 0.0, "AP_gain": 0.0}
    nothing["estimates"] = {**nothing["estimates"], "AP": exactly(0.0), "AP_gain": exactly(0.0)}
    verdict = verdict_from_limits(nothing, judge(nothing, {"max_ap_drop": 1.5, "min_speedup": 2.0}))
    assert verdict["outcome"] == "cannot tell"
    assert verdict["sentence"].endswith("but the teacher's own AP is 0.0: give one that has learnt.")


def test_times_that_do_not_compare_decide_nothing():
    scatters, throttled = Reason("unstable", "it scatters"), Reason("throttled", "the device throttled")
    (limit,) = judge(row(), {"min_speedup": 3.0}, [scatters])
    assert limit["outcome"] == "pass"  # the bounds say how far it scatters
    for key in ("max_latency_ms", "max_p99_ms", "min_speedup"):
        (limit,) = judge(row(), {key: 3.0}, [scatters, throttled])
        assert (limit["outcome"], limit["why"]) == (
            "cannot tell",
            "its latency is not comparable: the device throttled",
        )
    unlike = {**row(speedup=None), "doubts": {"speedup": "the teacher was timed with threads 4"}}
    (limit,) = judge(unlike, {"min_speedup": 3.0})
    assert (limit["outcome"], limit["measured"]) == ("cannot tell", None)
    sentence = verdict_from_limits(unlike, [limit])["sentence"]
    assert "Speed-up against the teacher is unknown: the teacher was timed with threads 4." in sentence
    assert judge(row(), {"min_ap": 40.0}, [throttled])[0]["outcome"] == "pass"
