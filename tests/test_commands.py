"""Every command: quick help, one message for bad input, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

from deploy.commands import COMMANDS
from deploy.contract import read_sidecar
from tests.stand_ins.detector import write_detector

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "mmdet",
    "mmengine",
    "mmcv",
    "onnx",
    "onnxruntime",
    "faster_coco_eval",
    "tensorrt",
    "matplotlib",
    "asyncssh",
    "ray",
)
HELP = """
import importlib, sys
try:
    importlib.import_module(sys.argv[1]).main(["--help"])
except SystemExit as end:
    assert end.code == 0, end.code
import os
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
print("HEAVY", sorted(set(sys.modules) & set(sys.argv[2:])))
"""
BAD_INPUT = {
    "benchmarks.fleet": ["nope.toml", "nope.tar.gz", "-o", "out"],
    "benchmarks.studies.calibration": ["methods", "x=nope.onnx:nope", "-o", "out"],
    "benchmarks.studies.tools_child": [
        "modelopt",
        "nope.onnx",
        "--method",
        "max",
        "--annotations",
        "nope.json",
        "--images-dir",
        "nope",
        "-o",
        "out.onnx",
    ],
    "benchmarks.studies.tools": ["nope.onnx", "--data", "nope", "-o", "out"],
    "calibration.audit": ["nope.onnx"],
    "calibration.choose": ["--rung", "nope.json", "nope.json", "--max-int8-drop", "0.5", "-o", "out.onnx"],
    "calibration.statistics": ["nope.npz"],
    "calibration.sensitivity": ["nope.onnx", "--data", "nope", "-o", "out.json"],
    "deploy.adopt_onnx": ["nope.onnx", "--contract", "nope.json"],
    "crosskd.adopt": ["nope.py", "--checkpoint", "nope.pth", "--data", "nope", "-o", "out"],
    "crosskd.export": ["nope", "-o", "out.onnx"],
    "crosskd.distill": ["nope.py", "--data", "nope", "-o", "out"],
    "crosskd.choose": ["--budget-ms", "5", "--data", "nope", "-o", "out"],
    "crosskd.pipeline": ["nope.py", "--data", "nope", "-o", "out"],
    "crosskd.predict": ["nope", "--annotations", "nope.json", "--images-dir", "nope", "-o", "out.json"],
    "crosskd.shapes": ["out", "--images", "1"],
    "crosskd.check_data": ["nope"],
    "crosskd.workers.time_detector": ["nope", "nope.png"],
    "crosskd.workers.time_training": ["nope.py", "--variant", "student", "-o", "out.json"],
    "crosskd.workers.export_untrained": ["nope.py", "--side", "96", "-o", "out.onnx"],
    "crosskd.train": ["nope.py", "--data", "nope", "-o", "out"],
    "deploy.build_trt": ["nope.onnx", "--fp16", "-o", "out.engine"],
    "deploy.bundle": ["nope.onnx", "-o", "out.tar.gz"],
    "deploy.detect": ["nope.onnx", "nope.jpg", "-o", "out"],
    "deploy.export": ["nope", "-o", "out.onnx"],
    "deploy.handover": ["nope.onnx", "--to", "triton", "-o", "out"],
    "calibration.quantize": ["nope.onnx", "--data", "nope", "-o", "out.onnx"],
    "benchmarks.accuracy": ["nope.onnx", "--data", "nope", "-o", "out.result.json"],
    "benchmarks.studies.distillation": ["bccd", "--data", "nope", "-o", "out"],
    "benchmarks.latency": ["nope.onnx", "--data", "nope", "-o", "out.result.json"],
    "benchmarks.report": ["nope.result.json", "-o", "out.html"],
    "benchmarks.studies.training_step": ["nope.py", "-o", "out.json"],
    "benchmarks.studies.operators": ["a=nope.onnx:nope.int8.onnx", "--data", "nope", "-o", "out"],
    "benchmarks.studies.recipes": ["--data", "nope", "-o", "out"],
}
WITHOUT_INPUT = ("deploy.doctor",)


def _run(words: List[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name has what a shell, a line, an encoding or a terminal may trip over."""
    folder = tmp_path / "a folder\nwith é 名 'q' $HOME \udcff"
    folder.mkdir()
    return folder


BARE = {"PATH": os.environ["PATH"], "LC_ALL": "C", "COLUMNS": "20"}
"""An environment without a home, with few columns and no language."""


def _cpu_s(words: List[str], cwd: Path) -> float:
    """Processor time of a run, which other processes do not lengthen as they do the wall clock."""
    before = os.times()
    assert _run(words, cwd).returncode == 0
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_the_list_of_commands_is_that_of_the_modules_that_can_be_run() -> None:
    runnable = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("crosskd", "deploy", "calibration", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert sorted(COMMANDS) == sorted(set(runnable) - {"deploy.board.run"})  # the runner inside bundles
    assert len(runnable) > 20


def test_all_commands_are_known_here() -> None:
    assert {*BAD_INPUT, *WITHOUT_INPUT} == set(COMMANDS)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_comes_without_the_heavy_packages(module: str, tmp_path: Path) -> None:
    done = _run(["-c", HELP, module, *HEAVY], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {module}" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_takes_well_under_a_second(module: str, tmp_path: Path) -> None:
    bare = _cpu_s(["-c", "import numpy, cv2"], tmp_path)  # which every command needs
    assert _cpu_s(["-m", module, "--help"], tmp_path) < bare + 0.5


@pytest.mark.parametrize("module", sorted(set(COMMANDS) - {*WITHOUT_INPUT}))
def test_bad_input_is_one_message_and_leaves_nothing_behind(module: str, odd: Path) -> None:
    done = _run(["-m", module, *BAD_INPUT.get(module, [])], odd, **BARE)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not [path for path in odd.rglob("*") if path.is_file()]


def test_odd_names_are_read_and_written_as_others_are(odd: Path) -> None:
    name = "m é\n"  # ONNX Runtime takes no bytes that are no text
    write_detector(odd / f"{name}.onnx")
    for words in (
        ["crosskd.shapes", name, "--images", "7", "--size", "64"],
        ["deploy.detect", f"{name}.onnx", f"{name}/images", "-o", f"{name}.detections"],
        ["calibration.quantize", f"{name}.onnx", "--data", name, "--method", "max", "-o", f"{name}.int8.onnx"],
        ["calibration.audit", f"{name}.int8.onnx"],
        ["benchmarks.report", f"{name}.result.json", "--check", "-o", f"{name}.html"],
    ):
        done = _run(["-m", *words], odd, **BARE)
        assert done.returncode == 0, done.stderr
    assert read_sidecar(odd / f"{name}.int8.onnx")["inputs"]["model"]["file"] == f"{name}.onnx"


# Not here: build_trt, which asks for TensorRT before anything else.
@pytest.mark.parametrize(
    "module", sorted(name for name, words in BAD_INPUT.items() if "-o" in words and name != "deploy.build_trt")
)
def test_an_output_that_cannot_be_written_is_refused(module: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words = list(BAD_INPUT[module])
    words[words.index("-o") + 1] = f"file/{words[words.index('-o') + 1]}"
    done = _run(["-m", module, *words], tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot write file/")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"
