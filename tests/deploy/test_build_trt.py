from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest

from deploy import build_trt
from deploy.build_trt import main
from deploy.contract import sidecar_path, write_sidecar
from deploy.errors import MissingDependencyError
from deploy.graphs.calibration_cache import amax_from_quantised
from deploy.graphs.precision import BEHIND, typed_graph
from deploy.runtime.golden import TOLERANCES, noise_input
from deploy.runtime.session import OrtSession
from deploy.tensorrt.session import TrtSession

onnx = pytest.importorskip("onnx")
File = Callable[..., Path]
Install = Callable[[str], Any]
VERSIONS = ("8.5.3", "8.6.1", "10.3.0", "11.4.0.106")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where timing caches go, instead of the user's folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "crosskd" / "timing"


def left_over(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("mini"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_builds_checks_and_runs(
    version: str, precision: str, detector_file: File, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt(version)
    source = detector_file("mini.onnx", np.int8 if precision == "int8" else None)
    engine = source.parent / "student.engine"
    words = [] if precision == "fp32" else [f"--{precision}"]
    assert main([str(source), *words, "-o", str(engine), "--workspace-mib", "64"]) == 0

    by_flags = version.startswith("8") and precision != "fp32"
    graph = onnx.load_from_string(engine.read_bytes())
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types.values()) == (precision != "fp32" and not by_flags)
    document = json.loads(sidecar_path(engine).read_text())
    assert document["inputs"]["onnx"]["file"] == str(source)
    details = document["details"]
    assert (details["precision"], details["tensorrt"], details["device"]) == (precision, version, "Stand-in GPU")
    assert (details["compute_capability"], details["cuda_runtime"], details["cuda_driver"]) == ("8.7", "13.0", "13.1")
    assert (details["strongly_typed"], bool(details["flags"])) == (not version.startswith("8"), by_flags)
    assert (details["workspace_mib"], details["opt_level"], details["version_compatible"]) == (64, None, False)
    assert details["golden"]["matched"] > 0.9
    assert (details["coverage"]["layers"]["int8"]["count"] > 0) == (precision == "int8")
    reasons = details["kept_in_fp32"]
    assert (BEHIND in reasons) == (precision != "fp32")
    shown = capsys.readouterr()
    assert ("FP32, not FP16: " in shown.err) == (precision != "fp32")
    assert "as in ONNX Runtime; layers: " in shown.out
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


def test_a_differing_engine_is_kept_where_asked_and_says_so(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake_tensorrt("11.4.0.106")
    source, engine = detector_file("mini.onnx"), tmp_path / "student.engine"
    for shift_px, differs in ((8.0, True), (0.0, False)):
        trt.test.shift_px = shift_px
        assert main([str(source), "--fp16", "--keep-differing", "-o", str(engine)]) == 0
        assert ("kept since --keep-differing is given: " in capsys.readouterr().err) == differs
        golden = json.loads(sidecar_path(engine).read_text())["details"]["golden"]
        assert golden["agrees"] == (not differs)
        assert golden["tolerance"] == {"box": 0.02, "logit": 0.1, "matched": 0.95}
        with TrtSession(engine) as session:  # what latency results and the report show
            assert ("fp16, DIFFERS from ONNX Runtime (" in session.description) == differs


def test_what_is_half_on_a_dla_is_said(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt, engine = fake_tensorrt("10.3.0"), tmp_path / "student.engine"
    trt.test.dla_cores = 1
    trt.test.inspector = json.dumps({"Layers": [{"Name": "{ForeignNode[a...b]}", "LayerType": "DLA"}]})
    words = [str(detector_file("mini.onnx", np.int8)), "--int8", "-o", str(engine)]
    assert main([*words, "--dla-core", "0", "--gpu-fallback"]) == 0
    error = capsys.readouterr().err
    assert "FP16 on the DLA, for want of a range: " in error
    assert (
        "1 of its layers are blocks that were compiled as one (on a DLA, say). It is kept, and not called INT8" in error
    )
    half = json.loads(sidecar_path(engine).read_text())["details"]["dla_half"]
    relu = next(node for node in onnx.load(words[0]).graph.node if node.op_type == "Relu")
    assert half
    assert relu.name not in half
    with TrtSession(engine) as session:
        assert "int8 asked for, not seen in its layers" in session.description
    assert len(trt.test.cache.splitlines()) > len(amax_from_quantised(onnx.load(words[0])))
    trt.test.inspector = None
    assert main(words) == 0  # on the GPU Q/DQ say it all
    assert "for want of a range" not in capsys.readouterr().err
    assert json.loads(sidecar_path(engine).read_text())["details"]["dla_half"] == []


def test_the_tolerance_of_int8_is_that_of_integer_kernels(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path
) -> None:
    trt, source, engine = fake_tensorrt("10.3.0"), detector_file("mini.onnx", np.int8), tmp_path / "student.engine"
    assert main([str(source), "--int8", "-o", str(engine)]) == 0
    tolerance = json.loads(sidecar_path(engine).read_text())["details"]["golden"]["tolerance"]
    assert tolerance["box"] < TOLERANCES["int8"].box
    trt.test.shift_px = 2.0  # within what held for every INT8 model, beyond what rounding does to this one
    assert main([str(source), "--int8", "-o", str(engine)]) == 2


def test_without_onnx_runtime_the_missing_check_is_told(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    fake_tensorrt("11.4.0.106")
    source, engine = detector_file("mini.onnx"), tmp_path / "student.engine"

    def missing(path: Path) -> None:
        raise MissingDependencyError("onnxruntime", f"running {path.name}", "pip install onnxruntime")

    monkeypatch.setattr(build_trt, "OrtSession", missing)  # the stand-in itself needs the package
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
                os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Terminal())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores Ctrl-C
    before = signal.getsignal(signal.SIGINT)
    assert main([str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine")]) == 130
    assert trt.test.config.progress_monitor.interrupted.is_set()
    assert signal.getsignal(signal.SIGINT) is before
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
    assert main([*words[:-2], "--no-timing-cache"]) == 0


def test_by_default_the_timing_cache_is_the_devices(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, cache_folder: Path
) -> None:
    fake_tensorrt("10.3.0")
    words = [str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine")]
    assert main([*words, "--no-timing-cache"]) == 0
    assert not cache_folder.exists()
    for content in (b"+", b"++"):
        assert main(words) == 0
        (cache,) = cache_folder.glob("*.cache")
        assert cache.name == "Stand-in-GPU-8sm-tensorrt10.3.0-cuda13.0.cache"
        assert cache.read_bytes() == content
    assert json.loads(sidecar_path(tmp_path / "student.engine").read_text())["details"]["timing_cache"] == str(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiprocessors": "16"}, "cache was measured with multiprocessors '16'; here it is '8'. Give another file"),
        ({"power_mode": "15W"}, "cache was measured with power_mode '15W'; here it is None"),
        ([], "It should be what a build writes beside its timing cache: remove both."),
    ],
)
def test_times_of_another_machine_are_not_taken(
    change: Any, message: str, detector_file: File, fake_tensorrt: Install, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trt, cache = fake_tensorrt("10.3.0"), tmp_path / "timing.cache"
    words = [str(detector_file("mini.onnx")), "-o", str(tmp_path / "student.engine"), "--timing-cache", str(cache)]
    assert main(words) == 0
    beside = tmp_path / "timing.cache.json"
    measured_on = json.loads(beside.read_text())
    assert (measured_on["multiprocessors"], measured_on["tensorrt"]) == ("8", "10.3.0")
    beside.write_text(json.dumps({**measured_on, **change} if change else change))
    trt.test.config = None
    assert main(words) == 2
    told = capsys.readouterr().err
    assert str(cache) in told
    assert message in told
    assert trt.test.config is None
    beside.unlink()  # of a cache of trtexec nothing more is known: TensorRT itself compares
    assert main(words) == 0


def test_int8_of_a_float_graph_calibrates_first(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt("11.4.0.106")
    source, quantised, engine = detector_file("mini.onnx"), tmp_path / "mini.int8.onnx", tmp_path / "student.engine"
    called: List[List[str]] = []

    def quantise(words: List[str]) -> int:
        called.append(words)
        onnx.save(onnx.load(detector_file("mini.made.onnx", np.int8)), str(quantised))
        write_sidecar(quantised, {"onnx": source}, OrtSession(source).contract)
        return 0

    monkeypatch.setattr("deploy.commands.status_of", quantise)
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
        ("mini.onnx", None, ["--int8", "--data", "nowhere"], "calibration.quantize ended with status 2; its message"),
        ("mini.onnx", np.int8, ["--fp16"], "has Q/DQ nodes; fp16 needs the float graph"),
        ("mini.onnx", np.int8, [], "has Q/DQ nodes; fp32 needs the float graph"),
        ("mini.onnx", np.int8, ["--int8", "--data", "cells"], "is quantised already, --data cells would not be used"),
        ("mini.onnx", np.uint8, ["--int8"], "quantised for target onnxruntime"),
        ("mini.onnx", None, ["--fp16", "--data", "cells"], "--data is given with fp16"),
        ("mini.onnx", None, ["--workspace-mib", "0"], "--workspace-mib is 0; expected a positive number"),
        ("mini.onnx", None, ["--fp16", "--scales", "fp32"], "--scales is given with fp16"),
        ("mini.onnx", None, ["--fp16", "--gpu-fallback"], "--gpu-fallback is given without --dla-core"),
        ("mini.onnx", None, ["--fp16", "--dla-core", "-1"], "--dla-core is -1; expected 0 or more"),
        ("mini.onnx", None, ["--fp16", "--dla-core", "0"], "finds 0 DLA cores"),
        ("mini.onnx", None, ["--shapes", "1", "4", "2"], "--shapes is (1, 4, 2); expected positive batches"),
        ("mini.onnx", None, ["--shapes", "1", "2", "4"], "takes 1 image(s) at a time"),
        ("mini.onnx", None, ["--target", "10.3"], "--target 10.3 writes none: leave one of them out"),
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


def test_fp32_scales_keep_the_graph_and_say_what_is_around(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, engine = detector_file("mini.onnx", np.int8), tmp_path / "student.engine"
    for version, words in (
        ("10.16.1.11", "FP32 graph, flags FP16+INT8, Q/DQ of FP32 scales,"),
        ("11.4.0.106", "types in the graph, Q/DQ of FP32 scales, FP32 around the INT8 layers,"),
    ):
        fake_tensorrt(version)
        assert main([str(source), "--int8", "--scales", "fp32", "-o", str(engine)]) == 0
        assert f"int8, {words} TensorRT" in capsys.readouterr().err
        assert engine.read_bytes().startswith(
            source.read_bytes()
        )  # the stand-in's engine is the graph that it was given
    fake_tensorrt("8.6.1")
    assert main([str(source), "--int8", "--scales", "fp16", "-o", str(engine)]) == 2
    assert "TensorRT 8.6.1 does not have --scales fp16; expected TensorRT 10.0 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("input_type", ["float32", "uint8"])
def test_any_number_of_images(
    input_type: str, small_file: File, fake_tensorrt: Install, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trt, engine = fake_tensorrt("10.3.0"), tmp_path / "student.engine"
    source = small_file("topk", -1, input_type)
    assert main([str(source), "-o", str(engine)]) == 2
    assert "takes any number of images, --shapes is missing" in capsys.readouterr().err
    assert main([str(source), "--shapes", "1", "2", "4", "-o", str(engine)]) == 0
    (profile,) = trt.test.config._profiles
    rest = (4, 4, 3) if input_type == "uint8" else (3, 4, 4)
    assert list(profile._shapes.values()) == [tuple((batch, *rest) for batch in (1, 2, 4))]
    details = json.loads(sidecar_path(engine).read_text())["details"]
    assert details["shapes"] == [1, 2, 4]
    assert details["golden"]["matched"] == 1.0
    with TrtSession(engine) as session:
        assert session.batch_limits == (1, 4)


def test_ranges_seen_in_calibration_keep_a_node_in_fp32(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("11.4.0.106")
    source, engine = detector_file("mini.onnx", np.int8), tmp_path / "student.engine"
    node = [node for node in onnx.load(source).graph.node if node.op_type == "Conv"][1]
    write_sidecar(source, {}, OrtSession(source).contract, {"ranges": {node.output[0]: [-90000.0, 3.0]}})
    assert main([str(source), "--int8", "-o", str(engine)]) == 0
    reason = f"FP16 ends at 65504, the activation {node.output[0]} reached 90000"
    kept = json.loads(sidecar_path(engine).read_text())["details"]["kept_in_fp32"]
    assert node.name in kept[reason]
    assert f"({reason})" in capsys.readouterr().err


def convolutions_of(path: Path) -> List[Any]:
    return [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]


def test_fp16_of_a_float_file_knows_the_ranges_of_the_int8_file_beside_it(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("11.4.0.106")
    source, int8, engine = detector_file("mini.onnx"), detector_file("mini.int8.onnx", np.int8), tmp_path / "x.engine"
    assert main([str(source), "--fp16", "-o", str(engine)]) == 0
    growing = typed_graph(onnx.load(source), "fp16", {}).growing
    line = f"FP16: no range is known of the {growing} tensors that may leave it; {growing} run in FP16 unchecked ("
    assert line in capsys.readouterr().err
    node = convolutions_of(source)[1]
    ranges = {node.output[0]: [-90000.0, 3.0]}
    write_sidecar(int8, {"model": source}, OrtSession(int8).contract, {"ranges": ranges})
    assert main([str(source), "--fp16", "-o", str(engine)]) == 0
    document = json.loads(sidecar_path(engine).read_text())
    reason = f"FP16 ends at 65504, the activation {node.output[0]} reached 90000"
    assert node.name in document["details"]["kept_in_fp32"][reason]
    assert document["inputs"]["ranges_0"]["file"] == str(int8)
    shown = capsys.readouterr().err
    assert f"({reason})" in shown
    assert f"the ranges of 1 of {growing} tensors that may leave it are known, from mini.int8.onnx; " in shown
    assert main([str(source), "--fp16", "--target", "8.6"]) == 0  # which chooses types itself
    assert f"({reason})" in capsys.readouterr().err


def test_an_int8_engine_without_int8_is_not_kept(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt, source = fake_tensorrt("10.3.0"), detector_file("mini.onnx", np.int8)
    inputs = [{"Name": "x", "Format/Datatype": "Half"}]
    layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": inputs, "Outputs": []}
    trt.test.inspector = json.dumps({"Layers": [layer], "Bindings": []})
    assert main([str(source), "--int8", "-o", str(tmp_path / "student.engine")]) == 2
    assert "the engine has no INT8 layer, so it was not kept" in capsys.readouterr().err
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("precision", "version"), [("fp32", "8.5"), ("fp16", "10.3"), ("int8", "8.6"), ("int8", "11.1")]
)
def test_a_target_is_checked_without_tensorrt(
    precision: str, version: str, detector_file: File, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("tensorrt", "cuda", "cuda.bindings", "pycuda", "pycuda.driver", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    source = detector_file("mini.onnx", np.int8 if precision == "int8" else None)
    words = [] if precision == "fp32" else [f"--{precision}"]
    assert main([str(source), *words, "--target", version]) == 0
    assert f"TensorRT {version} takes its" in capsys.readouterr().out
    assert left_over(tmp_path) == []
    assert main([str(source), *words, "--target", "new"]) == 2
    assert "'new' is no version of TensorRT" in capsys.readouterr().err


DEPTHWISE = """<ir_version: 8, opset_import: ["" : 17]>
depthwise (float[2,3,4,4] pixels) => (float[2,3,4] boxes, float[2,3] scores, int64[2,3] labels)
<float[3,1,1,1] weight = {1, 2, 3}, float scale = {0.03}, int8 zero = {0}, float one = {1}> {
    quantised = QuantizeLinear (pixels, scale, zero)
    rounded = DequantizeLinear (quantised, scale, zero)
    weight_quantised = QuantizeLinear (weight, scale, zero)
    weight_rounded = DequantizeLinear (weight_quantised, scale, zero)
    silent = Conv <group=3> (rounded, weight_rounded)
    swish = Mul (silent, one)
    loud = Conv <group=3> (rounded, weight_rounded)
    positive = Relu (loud)
    maps = Add (swish, positive)
    boxes = ReduceMax <axes=[3], keepdims=0> (maps)
    scores = ReduceMax <axes=[2], keepdims=0> (boxes)
    labels = ArgMax <axis=2, keepdims=0> (boxes)
}"""


def test_depthwise_convolutions_without_a_kernel_in_tensorrt_8(
    small_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, engine = small_file("topk"), tmp_path / "student.engine"
    contract = OrtSession(source).contract
    onnx.save(onnx.parser.parse_model(DEPTHWISE), source)
    write_sidecar(source, {}, contract)
    text = "not INT8: silent (depthwise and not before a ReLU, for which TensorRT 8 has no INT8 kernel)\n"
    for version, told in (("8.6", True), ("10.3", False)):
        assert main([str(source), "--int8", "--target", version]) == 0
        assert (text in capsys.readouterr().err) == told
    for version, codes in (("8.6.1", {"silent": "depthwise"}), ("10.3.0", {})):
        trt = fake_tensorrt(version)
        trt.test.inspector = json.dumps({"Layers": [{"Name": "x", "LayerType": "", "Inputs": [{"Datatype": "Int8"}]}]})
        main([str(source), "--int8", "-o", str(engine)])
        assert (text in capsys.readouterr().err) == bool(codes)
        assert json.loads(sidecar_path(engine).read_text())["details"]["float_convolution_codes"] == codes


def test_what_a_target_lacks_is_said_before_a_build(
    detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake_tensorrt("8.6.1")
    source = detector_file("mini.onnx")
    model = onnx.load(source)
    model.opset_import[0].version = 18
    for node in model.graph.node:  # whose axes are inputs from opset 18 on
        if node.op_type == "ReduceMean":
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
            node.input.append("axes")
            del node.attribute[[attribute.name for attribute in node.attribute].index("axes")]
    onnx.save(model, source)
    write_sidecar(source, {}, OrtSession(detector_file("mini.other.onnx")).contract)
    for words in (["-o", str(tmp_path / "student.engine")], ["--target", "8.6.1"]):
        assert main([str(source), "--fp16", *words]) == 2
        assert "opset 18; expected at most 17" in capsys.readouterr().err
    assert trt.test.network is None
    assert main([str(source), "--fp16", "--target", "10.3"]) == 0


def test_named_ranges_are_for_fp16(detector_file: File, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", "10.3", "--ranges-from", str(tmp_path / "no.npz")]
    for precision, said in (("--fp32", "nothing of this engine is FP16"), ("--fp16", "no.npz tells no ranges of")):
        assert main([str(detector_file("mini.onnx")), precision, *words]) == 2
        assert said in capsys.readouterr().err


def test_what_a_target_changes_in_silence_is_said(detector_file: File, capsys: pytest.CaptureFixture[str]) -> None:
    source = detector_file("mini.onnx")
    model, contract = onnx.load(source), OrtSession(source).contract
    made_by = next(node for node in model.graph.node if "labels" in node.output)
    made_by.output[:] = ["all_labels" if name == "labels" else name for name in made_by.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1 << 40]), "most"))
    model.graph.node.append(onnx.helper.make_node("Min", ["all_labels", "most"], ["labels"], name="limit"))
    onnx.save(model, source)
    write_sidecar(source, {}, contract)
    for version, said in (("8.6", True), ("10.3", False)):
        assert main([str(source), "--target", version]) == 0
        line = f"TensorRT {version}: Min 'limit': the constant 'most' reaches from {1 << 40} to {1 << 40}; constants"
        assert (line in capsys.readouterr().err) == said


@pytest.mark.parametrize("which", ["student.engine", "student.engine.json"])
def test_a_full_disk_leaves_nothing(
    which: str, detector_file: File, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake_tensorrt("10.3.0")
    source, replace = detector_file("mini.onnx"), os.replace

    def full(temporary: Any, path: Any) -> None:
        if Path(path).name == which:
            raise OSError(28, "No space left on device")
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", full)
    assert main([str(source), "-o", str(tmp_path / "student.engine")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / which}" in error
    assert "No space left on device. Is the disk full?" in error
    assert left_over(tmp_path) == []
    assert not fake_cuda.memory


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
        "--fp16", "--int8", "--data", "--output", "--target", "--scales", "--workspace-mib", "--shapes", "--opt-level",
        "--timing-cache", "--no-timing-cache", "--dla-core", "--gpu-fallback", "--hardware-compatible",
        "--version-compatible", "--verbose", "--keep-differing",
    ):  # fmt: skip
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
