from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.result import STAGES, read_result
from deploy.contract import write_sidecar


def run(*words):
    return latency.main([str(word) for word in words])


def test_summaries_of_known_samples():
    samples = [float(value) for value in range(1, 102)]  # 1 to 101: percentiles fall on samples
    assert latency.summarize(samples) == {"median": 51.0, "mean": 51.0, "p90": 91.0, "p99": 100.0}
    assert latency.relative_spread(samples) == pytest.approx(50 / 51)


def test_total_is_the_sum_of_the_stages_of_each_run():
    samples = {"preprocess": [1.0, 2.0], "inference": [10.0, 30.0], "postprocess": [0.5, 0.25]}
    numbers = latency.numbers_from_samples(samples, "x", None)
    assert numbers["samples_ms"]["total"] == [11.5, 32.25]
    assert numbers["summary_ms"]["total"]["median"] == pytest.approx(21.875)
    assert numbers["stable"] is False


@pytest.mark.parametrize(("width", "stable"), [(0.09, True), (0.11, False)])
def test_an_interquartile_range_above_a_tenth_of_the_median_is_unstable(width, stable):
    inference = (100 * (1 + width * np.linspace(-1, 1, 101))).tolist()  # interquartile range: `width` of the median
    zero = [0.0] * 101
    numbers = latency.numbers_from_samples({"preprocess": zero, "inference": inference, "postprocess": zero}, "x", None)
    assert numbers["spread"] == pytest.approx(width)
    assert numbers["stable"] is stable


def test_an_onnx_file_is_timed_stage_by_stage(data_dir, detector, tmp_path, capsys):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--role", "onnx-int8", "--runs", 30, "--warmup", 3, "--threads", 1, "-o", output)
    assert run(detector(), *words) == 0
    result = read_result(output)
    numbers = result["numbers"]
    assert {stage: len(samples) for stage, samples in numbers["samples_ms"].items()} == dict.fromkeys(STAGES, 30)
    for stage in STAGES:
        assert numbers["summary_ms"][stage] == latency.summarize(numbers["samples_ms"][stage])
    assert "1 threads" in numbers["description"]
    printed = capsys.readouterr().out
    assert "total: median" in printed
    assert ("UNSTABLE" in printed) is not numbers["stable"]


def test_images_are_used_in_turn_and_warm_up_is_left_out(data_dir, detector, monkeypatch):
    from deploy.session import OrtSession

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock, seen = Clock(), []

    class Slow(OrtSession):
        def infer(self, feed):
            clock.now += 1.0 if len(seen) < 2 else 0.004  # the first two runs are slow
            seen.append(float(feed["image"].mean()))
            return super().infer(feed)

    monkeypatch.setattr(latency, "time", clock)
    images = [np.full((64, 96, 3), value, np.uint8) for value in (10, 20, 30)]
    samples = latency.samples_from_session(Slow(detector()), images, runs=4, warmup=2)
    assert seen == [10, 20, 30, 10, 20, 30]
    assert samples["inference"] == pytest.approx([4.0] * 4)
    assert samples["preprocess"] == samples["postprocess"] == [0.0] * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--runs", "1"), "--runs is 1"),
        (("--warmup", "-1"), "--warmup is -1"),
        (("--threads", "0"), "--threads is 0"),
        (("--annotations", "x"), "give either --data"),
    ],
)
def test_bad_flags(data_dir, detector, tmp_path, capsys, words, message):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "-o", output, *words) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_threads_of_an_engine_are_refused(data_dir, tmp_path, capsys):
    engine = tmp_path / "student.engine"
    engine.write_bytes(b"engine")
    write_sidecar(engine, {})
    assert run(engine, "--data", data_dir, "--threads", "2", "-o", tmp_path / "x.result.json") == 2
    assert "--threads has no effect" in capsys.readouterr().err


TIME_DETECTOR = """
import json, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
times = [float(words["--warmup"])] * int(words["--runs"])
samples = {"preprocess": times, "inference": times, "postprocess": times}
json.dump({"samples_ms": samples, "description": "torch, " + words["--threads"]}, open(words["-o"], "w"))
"""


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    folder, package = tmp_path / "run", tmp_path / "package" / "crosskd"
    folder.mkdir()
    package.mkdir(parents=True)
    (folder / "detector.pth").write_bytes(b"weights")
    write_sidecar(folder / "detector.pth", {}, details={"parameters": 1234})
    (package / "__init__.py").write_text("")
    (package / "time_detector.py").write_text(TIME_DETECTOR)
    monkeypatch.chdir(package.parent)
    return folder


def test_a_run_directory_is_timed_by_the_training_side(run_dir, data_dir, tmp_path):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--runs", 7, "--warmup", 3, "--threads", 2, "--role", "teacher", "-o", output)
    assert run(run_dir, *words) == 0
    numbers = read_result(output)["numbers"]
    assert numbers["samples_ms"]["total"] == [9.0] * 7
    assert (numbers["description"], numbers["threads"], numbers["stable"]) == ("torch, 2", 2, True)


def test_a_run_directory_with_too_few_samples(run_dir, data_dir, tmp_path, capsys):
    program = TIME_DETECTOR.replace('int(words["--runs"])', "2")
    (tmp_path / "package" / "crosskd" / "time_detector.py").write_text(program)
    words = ("--data", data_dir, "--runs", 7, "--threads", 2, "-o", tmp_path / "x.result.json")
    assert run(run_dir, *words) == 2
    assert "wrote [2, 2, 2] samples; expected 7 of each stage" in capsys.readouterr().err


def test_result_files_are_json_without_nan(data_dir, detector, tmp_path):
    output = tmp_path / "x.result.json"
    run(detector(), "--data", data_dir, "--runs", 5, "-o", output)

    def refuse(name):
        raise AssertionError(name)

    json.loads(output.read_text(), parse_constant=refuse)
