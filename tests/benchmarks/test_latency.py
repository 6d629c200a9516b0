from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.measuring import timing
from benchmarks.measuring.result import read_result, summarize
from deploy.contract import write_sidecar

CPU_STAGES = {"read", "preprocess", "inference", "postprocess", "total"}


@pytest.fixture
def quick(monkeypatch):
    """No rest before the warm-up, which ends as soon as it is stable."""
    monkeypatch.setattr(timing, "REST_S", 0.01)
    monkeypatch.setattr(timing, "LEAST_WARMUP_S", 0.0)


def run(*words):
    return latency.main([str(word) for word in words])


def test_an_onnx_file_is_timed_stage_by_stage(data_dir, detector, tmp_path, capsys, quick):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--role", "onnx-int8", "--runs", 30, "--threads", 1, "-o", output)
    assert run(detector(), *words) == 0
    numbers = read_result(output)["numbers"]
    counts = {stage: len(samples) for stage, samples in numbers["samples_ms"].items() if samples is not None}
    assert counts == dict.fromkeys(CPU_STAGES, 30)
    for stage in CPU_STAGES - {"read"}:
        assert numbers["summary_ms"][stage] == summarize(numbers["samples_ms"][stage])
    stages = [numbers["samples_ms"][stage] for stage in ("preprocess", "inference", "postprocess")]
    for total, *parts in zip(numbers["samples_ms"]["total"], *stages, strict=True):
        assert total >= sum(parts) - 1e-3
    assert "1 threads" in numbers["description"]
    assert numbers["sweep"] is None
    printed = capsys.readouterr().out
    assert "total: median" in printed
    assert printed.count("NOT COMPARABLE: ") == len(numbers["comparable_reasons"])
    assert numbers["comparable"] is not bool(numbers["comparable_reasons"])


def test_an_image_for_which_the_model_gives_no_numbers_is_named(data_dir, detector, tmp_path, capsys, quick):
    model = detector(boxes=[[0.0, 0.0, np.nan, 20.0]])
    assert run(model, "--data", data_dir, "--runs", 10, "-o", tmp_path / "x.result.json") == 2
    assert f"{data_dir / 'images' / 'sub' / '1.png'}: the model gave values that are not" in capsys.readouterr().err


def test_a_paced_measurement(data_dir, detector, tmp_path, capsys, quick):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "--runs", 10, "--fps", 200, "-o", output) == 0
    numbers = read_result(output)["numbers"]
    assert (numbers["mode"], numbers["fps"]) == ("paced", 200.0)
    assert 0 <= numbers["late_frames"] <= 10
    assert f"at 200 frames/s, {numbers['late_frames']} late" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--runs", "9"), "--runs is 9; expected at least 10"),
        (("--max-warmup-s", "-1"), "--max-warmup-s is -1.0"),
        (("--max-warmup-s", "inf"), "--max-warmup-s is inf"),
        (("--threads", "0"), "--threads is 0"),
        (("--fps", "0"), "--fps is 0.0; expected a positive number"),
        (("--fps", "nan"), "--fps is nan"),
        (("--sweep-streams", "1", "0"), "--sweep-streams is [1, 0]; expected at least 1 each"),
        (("--sweep-batches", "1", "2"), "takes 1 images at once"),
        (("--annotations", "x"), "give either --data"),
    ],
)
def test_bad_flags(data_dir, detector, tmp_path, capsys, words, message):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "-o", output, *words) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_all_runtimes_have_as_many_threads_unless_told_otherwise(data_dir, detector, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(latency, "usable_cores", lambda: 1)
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "--runs", 10, "-o", output) == 0
    numbers = read_result(output)["numbers"]
    assert numbers["threads"] == 1
    assert "1 threads" in numbers["description"]


def test_no_images_are_refused(data_dir, detector, tmp_path, capsys):
    path = data_dir / "annotations" / "instances_test.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "images": [], "annotations": []}))
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "-o", output) == 2
    assert "images" in capsys.readouterr().err
    assert not output.exists()


def test_threads_of_an_engine_are_refused(data_dir, tmp_path, capsys):
    engine = tmp_path / "student.engine"
    engine.write_bytes(b"engine")
    write_sidecar(engine, {})
    assert run(engine, "--data", data_dir, "--threads", "2", "-o", tmp_path / "x.result.json") == 2
    assert "--threads has no effect" in capsys.readouterr().err


def test_openvino_is_timed_in_the_same_way(data_dir, detector, tmp_path, capsys, quick):
    pytest.importorskip("openvino")
    output = tmp_path / "x.result.json"
    words = ["--runtime", "openvino", "--threads", "1", "--role", "openvino-fp32", "--sweep-streams", "1"]
    assert run(detector(), "--data", data_dir, *words, "-o", output) == 0
    result = read_result(output)
    assert result["model"]["runtime"] == "openvino"
    assert result["numbers"]["description"].startswith("OpenVINO ")
    assert result["numbers"]["description"].endswith("CPU, 1 threads")
    assert result["numbers"]["threads"] == 1
    assert result["numbers"]["sweep"][0]["images_per_s"] > 0
    assert "openvino" in result["versions"]
    assert "openvino-fp32, OpenVINO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--role", "openvino-int8"], "is to run on onnxruntime: add --runtime openvino"),
        (["--runtime", "openvino", "--role", "onnx-fp32"], "is to run on openvino: add --runtime onnxruntime"),
        (["--runtime", "tensorrt"], "TensorRT does not run"),
    ],
)
def test_a_role_and_a_runtime_that_do_not_go_together_are_refused(data_dir, detector, tmp_path, capsys, words, message):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, *words, "-o", output) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_result_files_are_json_without_nan(data_dir, detector, tmp_path, quick):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "--runs", 10, "-o", output) == 0

    def refuse(name):
        raise AssertionError(name)

    json.loads(output.read_text(), parse_constant=refuse)


def test_a_sweep_over_streams(data_dir, detector, tmp_path, quick):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--runs", 10, "--threads", 1, "--sweep-streams", 1, 2, "-o", output)
    assert run(detector(), *words) == 0
    sweep = read_result(output)["numbers"]["sweep"]
    assert [(entry["batch"], entry["streams"]) for entry in sweep] == [(1, 1), (1, 2)]
    assert all(entry["images_per_s"] > 0 for entry in sweep)


# The training side

TIME_DETECTOR = """
import json, sys
images = [word for word in sys.argv[2:] if word.endswith(".png")]
print(json.dumps({"starting": True}), flush=True)
FAULT
words = f"torch, {sys.argv[-1]} threads, {len(images)} images"
print(json.dumps({"description": words, "on_gpu": False}), flush=True)
for line in sys.stdin:
    times = {"preprocess": 1.0, "inference": 7.0 + (int(line) % len(images)) / 1e3, "postprocess": 1.0, "total": 9.5}
    print(json.dumps(times), flush=True)
"""


@pytest.fixture
def run_dir(tmp_path, monkeypatch, quick):
    """`run_dir(fault="")`: a run directory, and a stand-in for the command of the training side."""

    def make(fault=""):
        folder, package = tmp_path / "run", tmp_path / "package" / "crosskd"
        folder.mkdir()
        (package / "workers").mkdir(parents=True)
        (folder / "detector.pth").write_bytes(b"weights")
        write_sidecar(folder / "detector.pth", {}, details={"parameters": 1234})
        (package / "__init__.py").write_text("")
        (package / "workers" / "__init__.py").write_text("")
        (package / "workers" / "time_detector.py").write_text(TIME_DETECTOR.replace("FAULT", fault))
        monkeypatch.chdir(package.parent)
        return folder

    return make


def test_a_run_directory_is_timed_by_the_training_side(run_dir, data_dir, tmp_path):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--runs", 10, "--threads", 2, "--role", "teacher", "-o", output)
    assert run(run_dir(), *words) == 0
    numbers = read_result(output)["numbers"]
    assert numbers["samples_ms"]["total"] == [9.5] * 10
    assert numbers["samples_ms"]["inference"] == [7.0, 7.001, 7.002, 7.003, 7.004] * 2  # the five images in turn
    assert len(numbers["samples_ms"]["read"]) == 10
    assert (numbers["description"], numbers["threads"]) == ("torch, 2 threads, 5 images", 2)
    assert numbers["stable"] is True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("print('error: no such weights', file=sys.stderr); sys.exit(2)", "error: no such weights"),
        ("print('lost', file=sys.stderr); sys.exit(3)", "ended with status 3: its output is above"),
        ("print('chatter', flush=True)", "wrote 'chatter'; expected JSON with ['description', 'on_gpu']"),
        ("print('[1]', flush=True)", "wrote '[1]'; expected JSON"),
    ],
)
def test_a_training_side_that_fails(run_dir, data_dir, tmp_path, capsys, fault, message):
    output = tmp_path / "x.result.json"
    assert run(run_dir(fault), "--data", data_dir, "-o", output) == 2
    error = capsys.readouterr().err
    assert message in error
    assert ("lost" in error) is ("lost" in fault)
    assert not output.exists()


def test_a_sweep_of_a_run_directory_is_refused(run_dir, data_dir, tmp_path, capsys):
    words = ("--data", data_dir, "--sweep-streams", "2", "-o", tmp_path / "x.result.json")
    assert run(run_dir(), *words) == 2
    assert "--sweep-streams is for .onnx and .engine files" in capsys.readouterr().err
