from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict

import pytest

from deploy import doctor, machine
from deploy.commands import COMMANDS, NEEDS

ROOT = Path(__file__).parents[2]
BARE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = ("numpy", "cv2", "onnx", "onnxruntime", "tensorrt", "cuda", "pycuda", "torch", "mmdet")
sys.meta_path.insert(0, Blocked())
from deploy.doctor import main
status = main(sys.argv[1:])
print("LOADED", sorted(set(sys.modules) & set(BLOCKED)), status)
"""


def _report(capsys: pytest.CaptureFixture[str]) -> Dict[str, Any]:
    assert doctor.main(["--json"]) == 0
    report: Dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def _block(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_every_command_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    spoken_of = {label.split()[0] for label in _report(capsys)["commands"]}
    assert spoken_of == set(COMMANDS) - {"deploy.doctor"}


def test_what_a_command_needs_is_looked_for() -> None:
    assert {name for needs in NEEDS.values() for name in needs} <= set(doctor.probes())


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    report = _report(capsys)
    import numpy as np

    assert report["found"]["numpy"] == {"version": np.__version__, "note": ""}
    assert "CPUExecutionProvider loads" in report["found"]["onnxruntime"]["note"]
    assert report["commands"]["deploy.detect MODEL.onnx"] == {"works": True, "to_do": []}
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for name in [*report["found"], *report["commands"]]:
        assert f"\n  {name} " in text


def test_with_nothing_installed_it_says_what_to_install() -> None:
    for words in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", BARE, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.splitlines()
        assert last == "LOADED [] 0"
    report = json.loads("\n".join(lines))
    assert report["found"]["onnxruntime"] == {"version": None, "note": "onnxruntime is blocked"}
    assert not any(command["works"] for command in report["commands"].values())
    assert report["commands"]["deploy.detect MODEL.onnx"]["to_do"] == [
        "pip install numpy", "pip install opencv-python-headless", "pip install onnxruntime"
    ]  # fmt: skip


def test_a_board_with_tensorrt_alone(
    fake_tensorrt: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("10.3.0")
    _block(monkeypatch, "onnx", "onnxruntime")
    report = _report(capsys)
    assert report["found"]["tensorrt"] == {"version": "10.3.0", "note": ""}
    assert report["found"]["gpu"]["version"] == "Stand-in GPU"
    assert "compute capability 8.7, CUDA 13.0" in report["found"]["gpu"]["note"]
    assert report["commands"]["deploy.detect MODEL.engine"]["works"]
    assert report["commands"]["benchmarks.latency MODEL.engine"]["works"]
    assert report["commands"]["deploy.detect MODEL.onnx"] == {"works": False, "to_do": ["pip install onnxruntime"]}
    assert report["commands"]["deploy.build_trt"] == {"works": False, "to_do": ["pip install onnx"]}


def test_cuda_without_a_gpu_is_told_from_no_cuda(
    fake_tensorrt: Callable[[str], Any],
    fake_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_tensorrt("11.4.0.106")
    missing = next(status for status in type(fake_cuda.cudaError_t.cudaSuccess) if status)
    monkeypatch.setattr(fake_cuda, "cudaGetDevice", lambda: (missing, None))
    report = _report(capsys)
    assert report["found"]["cuda binding"]["version"]
    assert report["found"]["gpu"]["version"] is None
    assert f"cudaGetDevice says {missing.name}" in report["found"]["gpu"]["note"]
    assert report["commands"]["deploy.detect MODEL.engine"]["to_do"] == [doctor.TO_DO["gpu"]]
    _block(monkeypatch, "cuda", "cuda.bindings", "cuda.bindings.runtime", "pycuda", "pycuda.driver")
    report = _report(capsys)
    assert report["commands"]["deploy.detect MODEL.engine"]["to_do"] == [  # of the GPU nothing is known without it
        "pip install cuda-python (or pycuda)"
    ]


def test_an_old_tensorrt_is_refused(
    fake_tensorrt: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake_tensorrt("8.6.1")
    assert _report(capsys)["found"]["tensorrt"]["version"] == "8.6.1"
    monkeypatch.setattr(trt, "__version__", "8.4.3")
    monkeypatch.delattr(trt.IExecutionContext, "execute_async_v3")
    found = _report(capsys)["found"]["tensorrt"]
    assert found == {"version": None, "note": "TensorRT 8.4.3 is here; expected 8.5 or newer"}


def test_a_provider_that_falls_back_or_fails_does_not_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime: Any = ModuleType("onnxruntime")
    runtime.__version__ = "1.99"
    runtime.set_default_logger_severity = lambda severity: None
    runtime.get_available_providers = lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPU"]

    class InferenceSession:
        def __init__(self, model: bytes, providers: Any) -> None:
            if providers == ["TensorrtExecutionProvider"]:
                raise RuntimeError("libnvinfer.so.10: cannot open shared object file")

        def get_providers(self) -> Any:
            return ["CPU"]

    runtime.InferenceSession = InferenceSession
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    assert _report(capsys)["found"]["onnxruntime"]["note"] == (
        "TensorrtExecutionProvider does NOT load; CUDAExecutionProvider does NOT load; CPU loads"
    )


def test_a_package_that_breaks_when_it_is_loaded_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def load(name: str) -> Any:
        if name == "cv2":
            raise OSError("libGL.so.1:\n cannot open")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", load)
    report = _report(capsys)
    assert report["found"]["opencv"] == {"version": None, "note": "libGL.so.1: cannot open"}
    assert not report["commands"]["deploy.detect MODEL.onnx"]["works"]


def test_the_network_is_what_it_says() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(doctor.IDENTITY)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`jetson("R36 (release), REVISION: 4.3")`: this machine is a Jetson with that release of Jetson Linux."""

    def become(release: str) -> None:
        for name, text in (
            ("etc/nv_tegra_release", f"# {release}, GCID: 38968081, BOARD: generic, EABI: aarch64\n"),
            ("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0"),
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(machine, "ROOT", tmp_path)
        answers = {"dpkg-query": "6.2.1+b38", "nvpmodel": "NV Power Mode: 15W\n0"}
        for module in (machine, doctor):
            monkeypatch.setattr(module, "output_of", lambda *words: answers[words[0]])

    return become


Jetson = Callable[[str], None]


def test_a_jetson_is_recognised(jetson: Jetson, capsys: pytest.CaptureFixture[str]) -> None:
    jetson("R36 (release), REVISION: 4.3")
    assert doctor._jetson() == ("L4T 36.4.3", "JetPack 6.2.1+b38, NVIDIA Jetson Orin Nano Developer Kit, 15W")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "\nJetPack 6.1, 6.2: Python 3.10, CUDA 12.6, TensorRT 10.3\n" in text
    assert "\n  install for CUDA   pip install 'cuda-python==12.6.*' or pip install pycuda\n" in text
    assert "\n  known not to       cuda-python 13" in text
    assert "nvidia-smi" not in text
    assert "sudo apt install nvidia-jetpack" in text
    assert _report(capsys)["jetpack"]["tensorrt"] == "10.3"


def test_an_unknown_jetpack_is_said(jetson: Jetson, capsys: pytest.CaptureFixture[str]) -> None:
    jetson("R51 (release), REVISION: 0.0")
    assert doctor.main([]) == 0
    assert "Jetson Linux 51.0.0 belongs to no JetPack that is known here (4; 5.0; 5.1;" in capsys.readouterr().out
    assert _report(capsys)["jetpack"] is None


def test_no_jetpack_is_spoken_of_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert "JetPack 6" not in capsys.readouterr().out


def test_a_driver_that_is_too_old_is_named_with_what_it_runs(
    jetson: Jetson,
    fake_tensorrt: Callable[[str], Any],
    fake_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_tensorrt("10.3.0")
    jetson("R36 (release), REVISION: 4.3")
    _block(monkeypatch, "pycuda", "pycuda.driver")
    monkeypatch.setattr("deploy.tensorrt.cuda.driver_cuda_version", lambda: (12, 6))
    monkeypatch.setattr(fake_cuda, "cudaGetDevice", lambda: (fake_cuda.cudaError_t.cudaErrorInsufficientDriver, None))
    report = _report(capsys)
    assert report["found"]["cuda binding"]["version"] is None
    assert "cudaErrorInsufficientDriver: the driver here is for CUDA 12.6" in report["found"]["cuda binding"]["note"]
    assert report["commands"]["deploy.detect MODEL.engine"]["to_do"] == [
        "pip install 'cuda-python==12.6.*' (or pycuda)"
    ]


def test_where_pip_refuses_an_environment_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "is_externally_managed", lambda: True)
    assert doctor.to_do(["opencv"]) == [machine.VENV, "pip install opencv-python-headless"]
    assert doctor.to_do(["gpu"]) == [doctor.TO_DO["gpu"]]
