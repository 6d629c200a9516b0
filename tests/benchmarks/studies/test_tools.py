from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from benchmarks.studies import tools as calibration_tools
from benchmarks.studies import tools_child as calibration_child
from benchmarks.studies import turns
from benchmarks.studies.tools import (
    AS_OURS,
    DEFAULTS,
    MODELOPT,
    NNCF,
    ONNX_RUNTIME,
    OURS,
    PREDICTIONS_FROM,
    WAYS,
    YARDSTICK,
    Way,
    main,
    numbers_from_runs,
    run_child,
)
from deploy.contract import load_contract, write_sidecar
from deploy.errors import CalibrationError, MeasurementError

ROOT = Path(__file__).parents[3]
FAKE_PYTHON = """#!/bin/sh
if [ "$1" = "-c" ]; then echo 0.47.0 on some runtime; exit; fi
echo "$@" >> {log}
{rest}
"""
NUMBERS = (
    "seconds_per_image", "cpu_seconds_per_image", "mib_per_image", "seconds", "peak_mib", "AP", "AP50", "convolutions",
    "latency",
)  # fmt: skip
COPIES = """shift 3  # -m benchmarks.studies.tools_child modelopt
cp "$1" "$(echo "$@" | sed 's/.* -o \\([^ ]*\\).*/\\1/')"
"""


@pytest.fixture
def student(detector):
    """The tiny detector behind a convolution that can be quantised, and with names for its nodes."""
    path = detector()
    contract, model = load_contract(path), onnx.load(path)
    model.graph.node[0].input[0] = "stem_relu"
    stem = [
        helper.make_node("Conv", ["image", "stem_weight"], ["stem"]),
        helper.make_node("Relu", ["stem"], ["stem_relu"]),
    ]
    nodes = [*stem, *model.graph.node]
    for node in nodes:
        node.name = f"/{node.output[0]}"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    weight = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "stem_weight"))
    onnx.save(model, path)
    write_sidecar(path, {}, contract)
    return path


@pytest.fixture
def data(data_dir):
    """The data folder with eight images of its own to calibrate on."""
    document = json.loads((data_dir / "annotations/instances_test.json").read_text())
    box = document["annotations"][0]
    document["images"] = [{"id": n, "file_name": f"{n}.png", "width": 192, "height": 128} for n in range(11, 19)]
    document["annotations"] = [{**box, "id": n, "image_id": n} for n in range(11, 19)]
    for entry in document["images"]:
        pixels = np.random.default_rng(entry["id"]).integers(0, 256, (128, 192, 3), np.uint8)
        cv2.imwrite(str(data_dir / "images" / entry["file_name"]), pixels)
    (data_dir / "annotations/instances_train.json").write_text(json.dumps(document))
    return data_dir


@pytest.fixture
def modelopt(tmp_path):
    """modelopt(shell) makes a Python that has ModelOpt, and to calibrate runs `shell`; its words are in `.log`."""

    def make(rest):
        path = tmp_path / "python"
        path.write_text(FAKE_PYTHON.format(log=make.log, rest=rest))
        path.chmod(0o755)
        return path

    make.log = tmp_path / "words.txt"
    return make


@pytest.fixture
def bench(tmp_path, data, student, monkeypatch):
    """bench(ways, words...) runs the command with these ways and returns (result, table)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(calibration_tools, "busy_cores", lambda seconds: run.others_cores)
    monkeypatch.setattr(calibration_tools, "_latency", lambda *_: run.latency)

    def run(ways, *words):
        monkeypatch.setattr(calibration_tools, "WAYS", ways)
        run.status = main(
            [str(student), "--data", str(data), "--num-images", "8", "-o", str(run.out), *map(str, words)]
        )
        return json.loads(Path(f"{run.out}.json").read_text()), Path(f"{run.out}.md").read_text()

    run.out, run.others_cores = tmp_path / "out" / "tools", 0.0
    speed = {"median": 1.5, "lowest": 1.4, "highest": 1.6}
    run.latency = {"onnxruntime": {"fp32_ms": 9.0, "int8_ms": 6.0, "times": speed}, "openvino": {"error": "no layer"}}
    return run


def test_time_memory_ap_and_convolutions_of_each_tool(bench, modelopt, student):
    before = {path.name: path.read_bytes() for path in student.parent.glob("student*")}
    ways = (YARDSTICK, PREDICTIONS_FROM, Way(ONNX_RUNTIME, "MinMax", AS_OURS), Way(MODELOPT, "max", AS_OURS))
    result, table = bench(ways, "--modelopt-python", modelopt(COPIES))
    assert {path.name: path.read_bytes() for path in student.parent.glob("student*")} == before
    plain, ours, runtime, copied = result["rows"]
    for row in (plain, ours, runtime):
        assert row["error"] is None
        assert [run["images"] for run in row["runs"]] == [2, 8]
        assert row["seconds"] == row["runs"][1]["seconds"] > 0
        assert row["peak_mib"] > 40
        assert row["AP"] == row["AP50"] == pytest.approx(1)  # its boxes are constants
    assert plain["convolutions"] is None
    assert ours["convolutions"] == runtime["convolutions"] == {"INT8": 1, "weight-only": 0, "float": 1}
    assert ours["final_predictions"] == runtime["inputs"]["float_from"] == ["/map"]
    # The stand-in for ModelOpt copies the float model: its AP is measured, its convolutions cannot be.
    assert (copied["version"], copied["AP"]) == ("0.47.0 on some runtime", pytest.approx(1))
    assert "no DequantizeLinear" in copied["error"]
    few, every = modelopt.log.read_text().splitlines()
    assert few.startswith("-m benchmarks.studies.tools_child modelopt ")
    assert "/2.json " in few
    assert "/8.json " in every
    assert "--method max --float-from /map" in every

    lines = table.splitlines()
    header = next(line for line in lines if line.startswith("| tool"))
    (line,) = [line for line in lines if line.startswith("| ONNX Runtime")]
    cells = dict(zip(*([cell.strip() for cell in one.strip("|").split("|")] for one in (header, line)), strict=True))
    assert cells["AP"] == "100.00"
    assert cells["method, setting"] == "MinMax, predictions in float"
    assert cells["peak MiB"] == f"{runtime['peak_mib']:.0f}"
    assert cells["INT8 / weight-only / float"] == "1 / 0 / 1"
    assert cells["ms on ONNX Runtime (times faster)"] == "6.00 (1.50\N{MULTIPLICATION SIGN})"
    assert cells["ms on OpenVINO (times faster)"] == calibration_tools.UNKNOWN
    assert "- ONNX Runtime MinMax predictions in float: no latency on OpenVINO: no layer" in table
    assert "- ModelOpt max predictions in float: failed: " in table
    assert "ModelOpt: 0.47.0 on some runtime." in table
    assert "disturbed" not in cells["s per image (of plain)"]


def test_a_tool_that_fails_is_a_row_and_is_tried_again_while_finished_rows_are_kept(
    bench, modelopt, student, monkeypatch
):
    ways = (YARDSTICK, Way(OURS, "nonsense", "tensorrt"), Way(MODELOPT, "max", DEFAULTS))
    fails = modelopt("echo first line; echo 'ValueError: no such thing'; exit 3")
    first, table = bench(ways, "--modelopt-python", fails)
    assert bench.status == 0
    plain, ours, broken = first["rows"]
    assert "invalid choice: 'nonsense'" in ours["error"]
    assert (broken["error"], broken["seconds"], broken["AP"]) == ("ValueError: no such thing", None, None)
    assert "ValueError: no such thing" in table

    again, _ = bench(ways, "--modelopt-python", fails)
    assert again["rows"][0] == plain
    assert again["rows"][2]["error"] == broken["error"]
    assert len(modelopt.log.read_text().splitlines()) == 2

    model = onnx.load(student)
    model.producer_name = "another"
    contract = load_contract(student)
    onnx.save(model, student)
    write_sidecar(student, {}, contract)
    monkeypatch.setattr(calibration_tools, "_accuracy", lambda *_: {"AP": 0.5, "AP50": 0.7})
    changed, _ = bench((YARDSTICK,))
    assert changed["rows"][0]["inputs"]["model_sha256"] != plain["inputs"]["model_sha256"]
    assert changed["rows"][0]["AP"] == 0.5  # measured again


def test_a_row_before_which_others_were_busy_says_so(bench, monkeypatch):
    numbers = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 100.0}
    monkeypatch.setattr(calibration_tools, "run_child", lambda words, log: dict(numbers))
    monkeypatch.setattr(calibration_tools, "_accuracy", lambda *_: {"AP": 0.5, "AP50": 0.7})
    bench.others_cores = 1.5
    result, table = bench((YARDSTICK,))
    assert result["rows"][0]["others_cores"] == 1.5
    assert "| 0.0000, disturbed |" in table


def test_what_is_finished_stays_when_a_later_run_is_cut_off(bench, monkeypatch):
    def measured_until_onnxruntime(words, log):
        if "onnxruntime" in words:
            raise KeyboardInterrupt
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 100.0}

    monkeypatch.setattr(calibration_tools, "run_child", measured_until_onnxruntime)
    monkeypatch.setattr(calibration_tools, "_accuracy", lambda *_: {"AP": 0.5, "AP50": 0.7})
    first, _ = bench((YARDSTICK,))
    second, table = bench((PREDICTIONS_FROM, Way(ONNX_RUNTIME, "MinMax", DEFAULTS), YARDSTICK))
    assert bench.status == 130
    assert second["rows"][0]["error"] == "it ended well and wrote no file"
    assert second["rows"][1] == first["rows"][0]
    assert "2 of 3 rows" in table


def test_rows_of_others_stay_when_ours_changed_and_finds_the_same_predictions(bench, monkeypatch):
    measured, versions, predictions = [], {OURS: "1", ONNX_RUNTIME: "1"}, ["/map"]

    def measure(row, way, few, every, pythons):
        measured.append(way)
        return {**dict.fromkeys(NUMBERS), "final_predictions": list(predictions), "error": None}

    monkeypatch.setattr(calibration_tools, "measure", measure)
    monkeypatch.setattr(calibration_tools, "tool_versions", lambda pythons: versions)
    monkeypatch.setattr(calibration_tools, "_line", str)
    ways = (PREDICTIONS_FROM, Way(ONNX_RUNTIME, "MinMax", AS_OURS))
    first, _ = bench(ways)
    versions[OURS] = "2"
    second, _ = bench(ways)
    assert measured == [*ways, PREDICTIONS_FROM]
    assert second["rows"][1] == first["rows"][1]
    versions[OURS], predictions[:] = "3", ["/map", "/another"]
    third, _ = bench(ways)
    assert measured[3:] == list(ways)
    assert third["rows"][1]["inputs"]["float_from"] == ["/map", "/another"]


def test_another_file_is_not_written_over(bench, capsys):
    bench.out.parent.mkdir()
    Path(f"{bench.out}.json").write_text('{"schema_version": 1}')
    with pytest.raises(FileNotFoundError):  # the table
        bench((YARDSTICK,))
    assert "is not of this command" in capsys.readouterr().err
    assert Path(f"{bench.out}.json").read_text() == '{"schema_version": 1}'


def test_rows_of_a_model_that_is_not_named_any_more_are_not_lost(bench, capsys):
    bench.out.parent.mkdir()
    document = {"kind": calibration_tools.KIND, "rows": [{"model": "other.onnx", "error": None}]}
    Path(f"{bench.out}.json").write_text(json.dumps(document))
    with pytest.raises(FileNotFoundError):  # the table
        bench((YARDSTICK,))
    assert "has rows of other.onnx, which would be lost" in capsys.readouterr().err
    assert json.loads(Path(f"{bench.out}.json").read_text()) == document


def test_what_is_not_installed_says_so_and_the_command_goes_on(bench, monkeypatch):
    monkeypatch.setattr(calibration_tools, "run_child", lambda words, log: pytest.fail("nothing is to be run"))
    monkeypatch.setattr(calibration_tools, "package_versions", dict)
    result, _ = bench((YARDSTICK, Way(MODELOPT, "max", DEFAULTS)), "--modelopt-python", "nowhere/python")
    assert [row["error"] for row in result["rows"]] == ["not installed"] * 2
    assert bench.status == 0


def test_without_our_row_it_is_not_guessed_what_to_exclude(bench, monkeypatch):
    def fails(words, log):
        raise MeasurementError("broken")

    monkeypatch.setattr(calibration_tools, "run_child", fails)
    result, _ = bench((YARDSTICK, PREDICTIONS_FROM, Way(ONNX_RUNTIME, "MinMax", AS_OURS)))
    assert [row["error"] for row in result["rows"][:2]] == ["broken"] * 2
    assert "what to exclude is not known" in result["rows"][2]["error"]


def test_all_tools_and_methods_are_planned_and_ours_comes_before_what_needs_it():
    assert WAYS[0] == YARDSTICK
    others = [way for way in WAYS if way.setting == AS_OURS]
    assert {way.tool for way in others} == {ONNX_RUNTIME, MODELOPT, NNCF}
    assert WAYS.index(PREDICTIONS_FROM) < min(map(WAYS.index, others))
    assert len(set(WAYS)) == len(WAYS) == 20


@pytest.mark.parametrize(
    ("models", "number", "message"),
    [
        (1, "7", "--num-images is 7; expected at least 8"),
        (2, "8", "expected each of them once"),
        (1, "9", "--num-images is 9; expected at most 8"),
    ],
)
def test_bad_input_is_refused(student, data, tmp_path, monkeypatch, capsys, models, number, message):
    monkeypatch.chdir(ROOT)
    words = [*[str(student)] * models, "--data", str(data), "--num-images", number]
    assert main([*words, "-o", str(tmp_path / "out" / "tools")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_the_command_is_run_in_the_checkout(bench, student, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(student), "--data", str(data), "-o", str(tmp_path / "out")]) == 2
    assert "run this command in the folder of the checkout" in capsys.readouterr().err


def python(code):
    return [sys.executable, "-c", code]


PEAKS = """
import json, sys
from pathlib import Path
import numpy as np
from benchmarks.studies.tools import run_child
ballast = np.ones(200 * 2**17)  # 200 MiB of our own, as the kernel first counts them
del ballast
codes = ("x = b'x' * (120 * 2**20)", "pass")
print(json.dumps([run_child([sys.executable, "-c", code], Path(sys.argv[1]))["peak_mib"] for code in codes]))
"""


def test_peak_memory_is_that_of_the_child_alone(tmp_path):
    # Not from this process: what it still holds of the tests before is the least that a child of it is said to have.
    done = subprocess.run(
        [*python(PEAKS), str(tmp_path / "log.txt")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    large, small = json.loads(done.stdout)
    assert 120 < large < 200
    assert small < 120


def test_processor_time_is_not_that_of_the_clock(tmp_path):
    asleep = run_child(python("import time; time.sleep(0.5)"), tmp_path / "log.txt")
    assert asleep["seconds"] > 0.5
    assert asleep["cpu_seconds"] < 0.4


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('one'); print('two'); raise SystemExit(3)", "two"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("import sys; print('error: no such file', file=sys.stderr); sys.exit(2)", "no such file"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", r"killed \(signal 9\)"),
    ],
)
def test_a_failing_process_is_told_by_its_last_line(tmp_path, code, message):
    with pytest.raises(MeasurementError, match=f"^{message}"):
        run_child(python(code), tmp_path / "log.txt")


def test_an_interrupt_ends_the_child(tmp_path, monkeypatch):
    started = []

    def interrupted(pid, options):
        started.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "wait4", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child(python("import time; time.sleep(60)"), tmp_path / "log.txt")
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_what_an_image_costs_is_the_difference_of_two_runs():
    start = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_mib": 100.0}
    cost = {"seconds": 0.5, "cpu_seconds": 0.25, "peak_mib": 4.0}
    runs = [{"images": n, **{key: start[key] + n * cost[key] for key in start}} for n in (8, 32)]
    numbers = numbers_from_runs(runs)
    assert (numbers["seconds_per_image"], numbers["cpu_seconds_per_image"], numbers["mib_per_image"]) == (0.5, 0.25, 4)
    assert (numbers["seconds"], numbers["peak_mib"]) == (18.0, 228.0)


def test_nodes_are_excluded_with_all_that_reads_what_comes_of_them(student):
    found = calibration_child.nodes_from(str(student), ["/map"])
    assert found == ["/map", "/zero", "/boxes", "/scores"]
    with pytest.raises(CalibrationError, match="'/nowhere'"):
        calibration_child.nodes_from(str(student), ["/map", "/nowhere"])
    model = onnx.load(student)
    model.graph.node[-2].name = ""
    onnx.save(model, student)
    with pytest.raises(CalibrationError, match="nodes without a name"):
        calibration_child.nodes_from(str(student), ["/map"])


def test_the_child_gives_each_image_once_and_can_start_anew(student, data):
    images = calibration_child.Images(
        str(student), str(data / "annotations/instances_train.json"), str(data / "images")
    )
    first = images.get_first()["image"]
    feeds = [feed["image"] for feed in iter(images.get_next, None)]
    assert len(feeds) == 8
    assert first.shape == (1, 3, 64, 96)
    np.testing.assert_array_equal(feeds[0], first)
    assert all((one != other).any() for one, other in itertools.pairwise(feeds))
    images.rewind()
    np.testing.assert_array_equal(images.get_next()["image"], first)


def test_the_child_wants_a_method_and_an_output_with_a_tool_alone(student, data, tmp_path, capsys):
    words = [str(student), "--annotations", str(data / "annotations/instances_train.json")]
    words += ["--images-dir", str(data / "images")]
    assert calibration_child.main(["onnxruntime", *words, "--method", "MinMax"]) == 2
    assert "expected both of --method and --output" in capsys.readouterr().err
    assert calibration_child.main(["plain", *words, "-o", str(tmp_path / "x.onnx")]) == 2
    assert "expected neither of --method and --output" in capsys.readouterr().err
    assert calibration_child.main(["plain", *words]) == 0


def test_the_child_wants_two_files_and_a_runtime_for_a_latency(student, data, tmp_path, capsys):
    words = [str(student), "--annotations", str(data / "annotations/instances_train.json")]
    words += ["--images-dir", str(data / "images"), "-o", str(tmp_path / "latency.json")]
    assert calibration_child.main(["latency", *words, "--runtime", "openvino"]) == 2
    assert "expected --int8, --runtime and --output" in capsys.readouterr().err


def test_a_file_that_a_runtime_does_not_run_has_no_latency_there(student, data, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "REST_S", 0.01)
    monkeypatch.setattr(turns, "MOST_TURNS", 2)
    annotations = data / "annotations/instances_train.json"
    images = calibration_tools.Images(8, annotations, data / "images", "", str(data), "test")

    def child(words, log):
        if "onnxruntime" in words:
            raise MeasurementError("no such layer")
        assert calibration_child.main(words[words.index("latency") :]) == 0

    monkeypatch.setattr(calibration_tools, "run_child", child)
    found = calibration_tools._latency(student, student, images, tmp_path / "log.txt")
    assert found["onnxruntime"] == {"error": "no such layer"}
    on_openvino = found["openvino"]
    assert on_openvino["description"].startswith("OpenVINO")
    assert min(on_openvino["fp32_ms"], on_openvino["int8_ms"]) > 0
    assert on_openvino["times"]["lowest"] <= on_openvino["times"]["median"] <= on_openvino["times"]["highest"]
