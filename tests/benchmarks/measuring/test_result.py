from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.measuring.result import (
    LEAST_REPETITIONS,
    STAGES,
    STATISTICS,
    Reason,
    numbers_from_reasons,
    numbers_from_samples,
    read_result,
    reasons_from_numbers,
    relative_spread,
    repetition_spread,
    samples_by_image,
    summarize,
)
from deploy.contract import RESULT_VERSION
from deploy.errors import MeasurementError


def edited(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def test_what_was_written_is_read_with_its_provenance(result):
    document = read_result(result("onnx-fp32", ap=0.5))
    assert document["numbers"]["AP"] == 0.5
    assert document["numbers"]["AP_small"] is None
    assert document["result_version"] == RESULT_VERSION
    assert document["versions"]["numpy"]
    assert document["created_utc"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("result_version"), "not a result file"),
        (lambda d: d.update(result_version=99), "result_version is 99; expected 2"),
        (lambda d: d.update(kind="power"), "kind is 'power'"),
        (lambda d: d["model"].pop("sha256"), "model.sha256 is missing"),
        (lambda d: d.update(model=3), "model is 3; expected an object with file"),
        (lambda d: d["numbers"].pop("AP75"), "numbers.AP75 is missing"),
        (lambda d: d["numbers"].update(AP="0.5"), "numbers.AP is '0.5'"),
        (lambda d: d["numbers"].update(AP=True), "numbers.AP is True"),
        (lambda d: d["numbers"].update(AP=float("nan")), "numbers.AP is nan"),
        (lambda d: d.update(role=None), "role is None; expected a string"),
        (lambda d: d["numbers"].update(AP=0.6), "was edited: the hash of its content"),
        (lambda d: d.update(role="student"), "was edited"),
        (lambda d: d["numbers"]["per_class"].pop("disc"), "was edited"),
        (lambda d: d.update(comment="mine"), "was edited"),
        (lambda d: d.pop("content_sha256"), "content_sha256 says None"),
    ],
)
def test_a_changed_file_is_refused_with_file_and_key(result, edit, message):
    path = edited(result("onnx-fp32", ap=0.5), edit)
    with pytest.raises(MeasurementError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(result):
    path = result("onnx-fp32", ms=10.0)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(MeasurementError, match="is not JSON"):
        read_result(path)


def test_no_file_and_no_object(tmp_path):
    with pytest.raises(MeasurementError, match="cannot read"):
        read_result(tmp_path / "none.result.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(MeasurementError, match="not a result file"):
        read_result(tmp_path / "list.json")


def test_nan_is_never_written(result, tmp_path):
    with pytest.raises(MeasurementError, match=r"numbers\.AP is nan"):
        result("onnx-fp32", ap=float("nan"))
    assert not list(tmp_path.glob("*.result.json"))


def test_a_reason_keeps_its_code_and_an_older_file_has_none(result):
    reasons = [Reason("unstable", "it is unstable: 20 %"), Reason("hot", "the device was too hot")]
    numbers = numbers_from_reasons(reasons)
    assert numbers["comparable"] is False
    assert reasons_from_numbers(numbers) == reasons
    del numbers["comparable_codes"]
    assert [reason.code for reason in reasons_from_numbers(numbers)] == ["unstable", "other"]
    assert numbers_from_reasons([])["comparable"] is True


@pytest.mark.parametrize("codes", [["hot"], ["hot", "hot"]])
def test_codes_that_do_not_go_with_the_reasons_are_refused(result, codes):
    path = edited(result("onnx-fp32", ms=5.0), lambda document: document["numbers"].update(comparable_codes=codes))
    with pytest.raises(MeasurementError, match=r"numbers\.comparable_codes is .* expected one for each"):
        read_result(path)


def test_summaries_of_known_samples():
    samples = [float(value) for value in range(1, 102)]  # 1 to 101: percentiles fall on samples
    expected = {"median": 51.0, "mean": 51.0, "p90": 91.0, "p95": 96.0, "p99": 100.0, "max": 101.0}
    assert summarize(samples) == expected
    assert tuple(expected) == STATISTICS
    assert relative_spread(samples) == pytest.approx(50 / 51)


def test_a_stage_that_a_runtime_does_not_have_is_null():
    numbers = numbers_from_samples({"inference": [1.0, 2.0], "total": [3.0, 4.0]}, "x", None, 1)
    assert set(numbers["samples_ms"]) == set(numbers["summary_ms"]) == set(STAGES)
    assert {stage for stage, values in numbers["samples_ms"].items() if values} == {"inference", "total"}
    assert {stage for stage, values in numbers["summary_ms"].items() if values} == {"inference", "total"}
    assert numbers["summary_ms"]["total"]["max"] == 4.0


@pytest.mark.parametrize(("width", "stable"), [(0.09, True), (0.11, False)])
def test_an_interquartile_range_above_a_tenth_of_the_median_is_unstable(width, stable):
    total = (100 * (1 + width * np.linspace(-1, 1, 101))).tolist()  # interquartile range: `width` of the median
    numbers = numbers_from_samples({"total": total}, "x", None, 1)
    assert numbers["spread"] == pytest.approx(width)
    assert numbers["stable"] is stable


def test_images_that_differ_are_no_spread_and_a_restless_machine_is_one():
    per_image = np.array([5.0, 6.0, 9.0])
    quiet = np.tile(per_image, LEAST_REPETITIONS).tolist()
    assert relative_spread(quiet) > 0.5
    assert repetition_spread(quiet, 3) == 0.0
    drifting = (np.tile(per_image, LEAST_REPETITIONS) * np.linspace(1, 2, 3 * LEAST_REPETITIONS)).tolist()
    assert repetition_spread(drifting, 3) > 0.2
    assert [own.tolist() for own in samples_by_image(quiet, 3)] == [[value] * LEAST_REPETITIONS for value in per_image]


@pytest.mark.parametrize("images", [0, 4, 1000])
def test_an_image_of_few_runs_is_not_looked_at_by_itself(images):
    samples = np.tile([1.0, 2.0, 4.0, 8.0], LEAST_REPETITIONS - 1).tolist()
    assert len(samples_by_image(samples, images)) == 1
    assert repetition_spread(samples, images) == relative_spread(np.divide(samples, np.median(samples)))
