from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List

import numpy as np
import pytest

from deploy import build_trt
from deploy.build_trt import main
from deploy.contract import sidecar_path, write_sidecar
from deploy.golden import noise_input
from deploy.session import OrtSession
from deploy.trt import TrtSession

onnx = pytest.importorskip("onnx")
File = Callable[..., Path]
Install = Callable[[str], Any]
VERSIONS = ("10.3.0", "11.4.0.106")


def left_over(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("mini"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_builds_checks_and_runs(
    version: str, precision: str, detector_file: File, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake_tensorrt(version)
    source = detector_file("mini.onnx", np.int8 if precision == "int8" else None)
    engine = source.parent / "student.engine"
    words = [] if precision == "fp32" else [f"--{precision}"]
    assert main([str(source), *words, "-o", str(engine), "--workspace-mib", "64", "--opt-level", "5"]) == 0

    assert trt.test.flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    config = trt.test.config
    assert config._cleared == [trt.BuilderFlag.TF32]
    assert config._pools == {trt.MemoryPoolType.WORKSPACE: 64 << 20}
    assert config.builder_optimization_level == 5
    types = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(engine.read_bytes()).graph.initializer}
    half = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16]
    assert bool(half) == (precision != "fp32")
    document = json.loads(sidecar_path(engine).read_text())
    assert document["inputs"]["onnx"]["file"] == str(source)
    details = document["details"]
    assert (details["precision"], details["tensorrt"], details["device"]) == (precision, version, "Stand-in GPU")
    assert (details["compute_capability"], details["cuda_runtime"], details["cuda_driver"]) == ("8.7", "13.0", "13.1")
    assert details["golden"]["matched"] > 0.9
    shown = capsys.readouterr()
    assert "Building Engine: 1/1" in shown.err
    assert "Timing" not in shown.err
    assert "as in ONNX Runtime" in shown.out
    with TrtSession(engine) as session:
        found = session.infer({"images": noise_input(session.contract, 9)})
    assert found["boxes"].dtype == np.float32


def test_the_parser_says_which_node(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake_tensorrt("10.3.0")
    trt.test.parser_errors = [("TopK", "TopK_7", "K is too large"), ("Mod", "Mod_8", "not supported")]
    assert main([str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine")]) == 2
    error = capsys.readouterr().err
    assert "TensorRT 10.3.0 cannot parse the graph" in error
    assert "TopK 'TopK_7': K is too large" in error
    assert "Mod 'Mod_8': not supported" in error
    assert left_over(tmp_path) == []


def test_no_engine_gives_the_reason_from_the_log(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt, source = fake_tensorrt("11.4.0.106"), detector_file("mini.onnx")
    for reason in ("no tactic for Conv_3", "out of memory"):  # the second without the first
        trt.test.build_error = reason
        assert main([str(source), "--fp16", "-o", str(tmp_path / "student.engine")]) == 2
        assert f"built no engine: {reason}\n" in capsys.readouterr().err
    assert left_over(tmp_path) == []


def test_a_wrong_engine_is_not_kept_and_the_old_one_stays(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_cuda: Any
) -> None:
    trt = fake_tensorrt("11.4.0.106")
    source, engine = detector_file("mini.onnx"), tmp_path / "student.engine"
    assert main([str(source), "-o", str(engine)]) == 0
    before = engine.read_bytes(), sidecar_path(engine).read_bytes()
    trt.test.shift_px = 8.0
    assert main([str(source), "--fp16", "-o", str(engine)]) == 2
    assert "the engine is wrong" in capsys.readouterr().err
    assert (engine.read_bytes(), sidecar_path(engine).read_bytes()) == before
    assert left_over(tmp_path) == ["student.engine", "student.engine.json"]
    assert not fake_cuda.memory


def test_without_onnx_runtime_the_missing_check_is_told(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    fake_tensorrt("11.4.0.106")
    source, engine = detector_file("mini.onnx"), tmp_path / "student.engine"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([str(source), "-o", str(engine)]) == 0
    assert "NOT compared with ONNX Runtime" in capsys.readouterr().out
    assert json.loads(sidecar_path(engine).read_text())["details"]["golden"] is None


def test_interruption_writes_nothing(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt("11.4.0.106")

    class Terminal:
        def write(self, text: str) -> None:
            if text.startswith("Building Engine"):
                raise KeyboardInterrupt

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main([str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine")]) == 130
    assert trt.test.config.progress_monitor.interrupted
    assert left_over(tmp_path) == []


def test_the_timing_cache_is_read_and_updated(detector_file: File, fake_tensorrt: Install, tmp_path: Path) -> None:
    trt = fake_tensorrt("10.3.0")
    cache = tmp_path / "timing.cache"
    words = [str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine"), "--timing-cache", str(cache)]
    assert main(words) == 0
    assert cache.read_bytes() == b"+"
    assert main(words) == 0
    assert trt.test.config._cache._content == b"+"
    assert cache.read_bytes() == b"++"


def test_a_foreign_timing_cache_is_refused(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("10.3.0")
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"foreign")
    words = [str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine"), "--timing-cache", str(cache)]
    assert main(words) == 2
    assert "timing.cache is broken or of another GPU" in capsys.readouterr().err
    assert cache.read_bytes() == b"foreign"


def test_int8_of_a_float_graph_calibrates_first(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt("11.4.0.106")
    source, quantised, engine = detector_file("mini.onnx"), tmp_path / "mini.int8.onnx", tmp_path / "student.engine"
    called: List[List[str]] = []

    def quantise(words: List[str], check: bool) -> Any:
        called.append(words)
        onnx.save(onnx.load(detector_file("mini.made.onnx", np.int8)), str(quantised))
        write_sidecar(quantised, {"onnx": source}, OrtSession(source).contract)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(build_trt.subprocess, "run", quantise)
    words = [str(source), "--int8", "--data", "cells", "-o", str(engine)]
    assert main(words) == 0
    command = f"-m calibration.quantize {source} --data cells -o {quantised} --target tensorrt"
    assert called == [[sys.executable, *command.split()]]
    assert json.loads(sidecar_path(engine).read_text())["inputs"]["onnx"]["file"] == str(quantised)
    assert main(words) == 2  # never writes over a calibrated file
    assert len(called) == 1


@pytest.mark.parametrize(
    ("name", "quantised", "words", "message"),
    [
        ("mini.onnx", None, ["--int8"], "has no Q/DQ nodes, so --int8 has to quantise it first: add --data DIR"),
        ("mini.onnx", None, ["--int8", "--data", "nowhere"], "could not be quantised: calibration.quantize ended with"),
        ("mini.onnx", np.int8, ["--fp16"], "has Q/DQ nodes; fp16 needs the float graph"),
        ("mini.onnx", np.int8, [], "has Q/DQ nodes; fp32 needs the float graph"),
        ("mini.onnx", np.int8, ["--int8", "--data", "cells"], "is quantised already, --data cells would not be used"),
        ("mini.onnx", np.uint8, ["--int8"], "quantised for target onnxruntime"),
        ("mini.onnx", None, ["--fp16", "--data", "cells"], "--data is given with fp16"),
        ("mini.onnx", None, ["--workspace-mib", "0"], "--workspace-mib is 0; expected a positive number"),
    ],
)
def test_graph_and_precision_must_go_together(
    name: str, quantised: Any, words: List[str], message: str,
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake_tensorrt("11.4.0.106")
    assert main([str(detector_file(name, quantised)), *words, "-o", str(tmp_path / "student.engine")]) == 2
    assert message in capsys.readouterr().err
    assert left_over(tmp_path) == []


def test_bad_files(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("11.4.0.106")
    source, engine = detector_file("mini.onnx"), tmp_path / "student.engine"

    def message(*words: str) -> str:
        assert main(list(words)) == 2
        assert left_over(tmp_path) == []
        return capsys.readouterr().err

    assert "no such file" in message(str(tmp_path / "mini.none.onnx"), "-o", str(engine))
    assert "expected a name that ends in .engine" in message(str(source), "-o", str(tmp_path / "student.plan"))
    assert "cannot write" in message(str(source), "-o", str(source / "student.engine"))
    source.write_bytes(source.read_bytes()[:-100])
    assert "not the file that its sidecar describes" in message(str(source), "-o", str(engine))
    write_sidecar(source, {}, OrtSession(detector_file("mini.other.onnx")).contract)
    assert "truncated" in message(str(source), "-o", str(engine))


def test_tensorrt_8_is_refused(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("8.6.1")
    assert main([str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine")]) == 2
    assert "TensorRT 8.6.1 has no strongly typed networks; expected TensorRT 10.0 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["tensorrt", "cuda-python"])
def test_a_missing_package_is_said_before_anything_else(
    missing: str,
    tmp_path: Path,
    fake_tensorrt: Install,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_tensorrt("11.4.0.106")
    for name in ["tensorrt"] if missing == "tensorrt" else ["cuda", "cuda.bindings", "pycuda", "pycuda.driver"]:
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / "deep" / "student.engine"
    assert main([str(tmp_path / "none.onnx"), "--fp16", "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert f"building {output} needs the package {missing}, which is not installed here. Do: pip install" in error
    assert not output.parent.exists()


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom deploy.build_trt import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('onnx', 'onnxruntime', 'cv2', 'tensorrt', 'cuda', 'torch') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    for flag in (
        "--fp16",
        "--int8",
        "--data",
        "--output",
        "--workspace-mib",
        "--opt-level",
        "--timing-cache",
        "--verbose",
    ):
        assert flag in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_real_engine(precision: str, detector_file: File, tmp_path: Path) -> None:
    source, engine = detector_file("mini.onnx", np.int8 if precision == "int8" else None), tmp_path / "student.engine"
    assert main([str(source), *([] if precision == "fp32" else [f"--{precision}"]), "-o", str(engine)]) == 0
    with TrtSession(engine) as session:
        assert np.isfinite(session.infer({"images": noise_input(session.contract, 0)})["boxes"]).all()
