from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from deploy.contract import sidecar_path, write_sidecar
from deploy.errors import ContractError, MissingDependencyError, PipelineError
from deploy.golden import noise_input
from deploy.session import OrtSession
from deploy.trt import CudaPython, PlanSession, TrtSession, describe_machine, load_cuda, load_tensorrt, logger

VERSIONS = ("10.3.0", "10.13.3.9", "11.4.0.106")
WHEELS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
File = Callable[..., Path]


@pytest.fixture
def engine_file(detector_file: File, fake_tensorrt: Callable[[str], Any]) -> Path:
    """An engine of the stand-in, with the sidecar that the builder writes, and the ONNX file beside it."""
    trt = fake_tensorrt("11.4.0.106")
    source = detector_file("mini.onnx")
    engine = source.with_suffix(".engine")
    engine.write_bytes(source.read_bytes())
    contract = OrtSession(source).contract
    write_sidecar(
        engine, {"onnx": source}, contract, {"precision": "fp32", **describe_machine(trt, load_cuda("a test"))}
    )
    return engine


def test_runs_as_onnx_runtime_does(engine_file: Path, fake_cuda: Any, run_detector: Any, detector_model: Any) -> None:
    with TrtSession(engine_file) as session:
        assert session.description == "TensorRT 11.4.0.106, Stand-in GPU, fp32"
        for seed in (0, 1):
            feed = {"images": noise_input(session.contract, seed)}
            expected, found = run_detector(detector_model(), feed), session.infer(feed)
            assert list(found) == ["boxes", "scores", "labels"]
            for name, values in expected.items():
                assert values.dtype == found[name].dtype
                assert np.array_equal(values, found[name])
    assert not fake_cuda.memory  # all given back
    session.close()  # a second time does nothing
    assert np.array_equal(found["boxes"], expected["boxes"])  # copies, not views into freed memory


def test_cuda_bindings_of_before_12_8(engine_file: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    sys.modules["cuda"].cudart = fake_cuda
    monkeypatch.setitem(sys.modules, "cuda.cudart", fake_cuda)
    with TrtSession(engine_file) as session:
        assert np.isfinite(session.infer({"images": noise_input(session.contract, 0)})["boxes"]).all()


class PyCudaDriver(ModuleType):
    """pycuda.driver on the memory of the other stand-in."""

    Error = RuntimeError

    def __init__(self, runtime: Any) -> None:
        super().__init__("pycuda.driver")
        self.runtime, self.kinds, self.contexts = runtime, runtime.cudaMemcpyKind, 0
        context = SimpleNamespace(push=lambda: self.count(1), pop=lambda: self.count(-1))
        self.Device = lambda index: SimpleNamespace(
            retain_primary_context=lambda: context, compute_capability=lambda: (8, 7), name=lambda: "Stand-in GPU"
        )
        self.Stream = lambda: SimpleNamespace(handle=77, synchronize=lambda: None)
        self.init, self.get_version, self.get_driver_version = lambda: None, lambda: (13, 0, 0), lambda: 13010

    def count(self, by: int) -> None:
        self.contexts += by

    def mem_alloc(self, nbytes: int) -> Any:
        address = self.runtime.cudaMalloc(nbytes)[1]

        class Allocation:
            def __int__(self) -> int:
                return address

            def free(self) -> None:
                runtime.cudaFree(address)

        runtime = self.runtime
        return Allocation()

    def pagelocked_empty(self, shape: int, dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream: Any) -> None:
        self.runtime.cudaMemcpyAsync(
            target, source.ctypes.data, source.nbytes, self.kinds.cudaMemcpyHostToDevice, stream.handle
        )

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream: Any) -> None:
        self.runtime.cudaMemcpyAsync(
            target.ctypes.data, source, target.nbytes, self.kinds.cudaMemcpyDeviceToHost, stream.handle
        )


def test_pycuda_serves_where_cuda_python_is_missing(
    engine_file: Path, fake_cuda: Any, run_detector: Any, detector_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    driver, pycuda = PyCudaDriver(fake_cuda), ModuleType("pycuda")
    pycuda.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", pycuda)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    with TrtSession(engine_file) as session:
        feed = {"images": noise_input(session.contract, 0)}
        assert np.array_equal(run_detector(detector_model(), feed)["boxes"], session.infer(feed)["boxes"])
    assert driver.contexts == 0
    assert not fake_cuda.memory


@pytest.mark.parametrize("key", ["tensorrt", "device", "compute_capability"])
def test_an_engine_of_another_machine_is_refused(engine_file: Path, key: str, fake_cuda: Any) -> None:
    document = json.loads(sidecar_path(engine_file).read_text())
    document["details"][key] = "other"
    sidecar_path(engine_file).write_text(json.dumps(document))
    with pytest.raises(ContractError, match=rf"built with {key} 'other'; here it is .*build it again"):
        TrtSession(engine_file)
    assert not fake_cuda.memory


def test_a_changed_engine_is_refused(engine_file: Path) -> None:
    engine_file.write_bytes(engine_file.read_bytes()[:-10])
    with pytest.raises(ContractError, match="not the file that its sidecar describes"):
        TrtSession(engine_file)


def test_an_engine_that_tensorrt_refuses(engine_file: Path, fake_cuda: Any) -> None:
    contract = OrtSession(engine_file.with_suffix(".onnx")).contract
    with pytest.raises(ContractError, match="cannot read the engine: the plan is empty"):
        PlanSession(b"", contract, load_tensorrt("a test"), load_cuda("a test"))
    assert not fake_cuda.memory


def test_another_input_shape_is_refused(engine_file: Path) -> None:
    with (
        TrtSession(engine_file) as session,
        pytest.raises(ContractError, match=r"shape \(1, 3, 8, 8\); expected \(1, 3, 64"),
    ):
        session.infer({"images": np.zeros((1, 3, 8, 8), np.float32)})


def test_a_full_device_is_said_and_cleaned_up(
    engine_file: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, calls = fake_cuda.cudaMalloc, []

    def second_fails(size: int) -> Any:
        calls.append(size)
        fake_cuda.full = len(calls) == 2
        return allocate(size)

    monkeypatch.setattr(fake_cuda, "cudaMalloc", second_fails)
    with pytest.raises(PipelineError, match="cudaMalloc says cudaErrorMemoryAllocation"):
        TrtSession(engine_file)
    assert not fake_cuda.memory


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "cuda", "cuda.bindings", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingDependencyError, match=r"a test needs the package tensorrt,.*pip install tensorrt-cu13.*JetPack"
    ):
        load_tensorrt("a test")
    with pytest.raises(
        MissingDependencyError, match=r"the package cuda-python,.*pip install cuda-python \(or pycuda\)"
    ):
        load_cuda("a test")


def test_the_logger_keeps_errors(fake_tensorrt: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    trt = fake_tensorrt("10.3.0")
    log = logger(trt)
    assert logger(trt) is log
    log.log(trt.ILogger.Severity.WARNING, "slow")
    log.log(trt.ILogger.Severity.ERROR, "broken")
    assert log.reasons() == "broken"
    assert capsys.readouterr().err == ""
    log.verbose = True
    log.log(trt.ILogger.Severity.VERBOSE, "tactic")
    assert capsys.readouterr().err == "tensorrt verbose: tactic\n"


# The stand-ins against the real bindings ------------------------------------------------------------------------------


def names_of(module: ModuleType) -> List[str]:
    """`Builder`, `Builder.create_network`, `BuilderFlag.TF32`, ...: all that the stand-in offers but its own `test`."""
    names = ["OnnxParser.num_errors", "ICudaEngine.num_io_tensors"]
    names += ["IBuilderConfig.progress_monitor", "IBuilderConfig.builder_optimization_level"]
    for name, value in vars(module).items():
        if name.startswith("_") or name == "test":
            continue
        names.append(name)
        if isinstance(value, type):
            members = getattr(value, "__members__", None) or [member for member in vars(value) if member[0] != "_"]
            names += [f"{name}.{member}" for member in members]
    return names


@pytest.mark.shared
@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_has_the_names_and_arguments_of_the_real_api(
    version: str, shared_dir: Path, fake_tensorrt: Callable[[str], Any]
) -> None:
    api = json.loads((shared_dir / f"facts/tensorrt_api/tensorrt-{version}.json").read_text())
    trt = fake_tensorrt(version)
    for name in names_of(trt):
        owner, _, member = name.partition(".")
        if owner in api["enums"]:
            assert not member or member in api["enums"][owner], name
        elif owner in api["functions"]:
            arguments = list(inspect.signature(getattr(trt, owner)).parameters)
            assert api["functions"][owner].startswith(f"{owner}({', '.join(arguments)}"), name
        else:
            assert owner in api["classes"], name
            assert not member or member in api["classes"][owner], name
            function = getattr(getattr(trt, owner), member, None) if member else None
            if inspect.isfunction(function):
                arguments = list(inspect.signature(function).parameters)
                assert re.findall(r"(\w+):", api["classes"][owner][member])[: len(arguments)] == arguments, name


def test_the_cuda_stand_in_has_the_names_of_cuda_python(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [name for name in vars(fake_cuda) if name.startswith("cuda")]
    assert len(own) > 10
    monkeypatch.undo()
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in own if not hasattr(runtime, name)] == []
    for enumeration in ("cudaError_t", "cudaMemcpyKind"):
        for member in getattr(fake_cuda, enumeration).__members__:
            assert hasattr(getattr(runtime, enumeration), member)
    status, _ = runtime.cudaRuntimeGetVersion()
    assert status == runtime.cudaError_t.cudaSuccess  # what CudaPython compares with


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    with pytest.raises(PipelineError, match=r"CUDA: cudaGetDevice says cudaError.*nvidia-smi"):
        CudaPython()


@pytest.mark.shared
def test_strong_typing_is_what_tensorrt_8_lacks(shared_dir: Path, fake_tensorrt: Callable[[str], Any]) -> None:
    for version in (*VERSIONS, "8.6.1"):
        api = json.loads((shared_dir / f"facts/tensorrt_api/tensorrt-{version}.json").read_text())
        real = "STRONGLY_TYPED" in api["enums"]["NetworkDefinitionCreationFlag"]
        assert real == hasattr(fake_tensorrt(version).NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        assert real == (version != "8.6.1")


@pytest.mark.shared
def test_nothing_is_used_that_some_version_lacks(shared_dir: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    words = [
        sys.executable,
        str(shared_dir / "facts/tensorrt_api/check_usage.py"),
        "deploy",
        "benchmarks",
        "--min",
        "10.0",
    ]
    found = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert int(re.findall(r"(\d+) uses, 0 missing", found.stderr)[0]) > 10


REAL_BINDINGS = """
import json, sys
from deploy.build_trt import _progress_monitor, build_plan, check_strong_typing
from deploy.trt import load_tensorrt, logger
trt = load_tensorrt("a test")
assert trt.__version__.startswith(sys.argv[1]), trt.__version__
for name in json.loads(sys.argv[2]):
    value = trt
    for part in name.split("."):
        value = getattr(value, part)
log = logger(trt)
log.log(trt.ILogger.Severity.ERROR, "broken")
assert log.reasons() == "broken"
monitor = _progress_monitor(trt)
monitor.phase_start("Building Engine", None, 2)
assert monitor.step_complete("Building Engine", 0) is True
monitor.phase_finish("Building Engine")
assert isinstance(monitor, trt.IProgressMonitor)
assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) in (0, 1)
check_strong_typing(trt)
for call in (lambda: build_plan(trt, b""), lambda: trt.Runtime(log)):
    try:
        call()
    except TypeError as error:
        assert "factory function returned nullptr" in str(error), error  # no TensorRT behind the bindings
    else:
        raise AssertionError("the stand-in libraries have no factory")
print("ok")
"""


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_bindings_over_stand_in_libraries(
    version: str, shared_dir: Path, tmp_path: Path, fake_tensorrt: Callable[[str], Any]
) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crosskd" / "tensorrt-bindings" / version
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("*.whl")):
        words = [
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(cache),
            f"{WHEELS[version]}=={version}",
        ]
        loaded = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, check=False)
        if loaded.returncode:
            pytest.skip(f"{WHEELS[version]} {version} cannot be downloaded: {loaded.stderr.strip().splitlines()[-1:]}")
    stand_in = ["sh", str(shared_dir / "facts/tensorrt_api/stand_in.sh"), str(next(cache.glob("*.whl"))), str(tmp_path)]
    made = subprocess.run(stand_in, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no stand-in libraries: {made.stderr.strip().splitlines()[-1:]} (gcc and binutils are needed)")
    root = Path(__file__).resolve().parents[2]
    environment: Dict[str, str] = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    names = json.dumps(names_of(fake_tensorrt(version)))
    words = [sys.executable, "-c", REAL_BINDINGS, version, names]
    found = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("ok\n")
