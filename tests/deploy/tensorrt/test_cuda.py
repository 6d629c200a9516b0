from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Dict

import numpy as np
import pytest

from deploy.errors import MissingDependencyError, PipelineError
from deploy.runtime.golden import noise_input
from deploy.tensorrt import cuda as cuda_module
from deploy.tensorrt.bindings import load_tensorrt
from deploy.tensorrt.cuda import CudaPython, DriverTooOldError, PyCuda, load_cuda
from deploy.tensorrt.session import TrtSession


def assert_all_given_back(cuda: Any) -> None:
    assert not cuda.memory
    assert not cuda.handles


def test_cuda_bindings_of_before_12_8(engine_file: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    sys.modules["cuda"].cudart = fake_cuda
    monkeypatch.setitem(sys.modules, "cuda.cudart", fake_cuda)
    with TrtSession(engine_file) as session:
        assert np.isfinite(session.infer({"images": noise_input(session.contract, 0)})["boxes"]).all()


class PyCudaEvent:
    def record(self, stream: Any) -> None:
        self.time_s = time.perf_counter()

    def time_till(self, event: PyCudaEvent) -> float:
        return 1e3 * (event.time_s - self.time_s)


class PyCudaDriver(ModuleType):
    """pycuda.driver on the memory of the other stand-in."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self, runtime: Any) -> None:
        super().__init__("pycuda.driver")
        self.runtime, self.kinds, self.contexts = runtime, runtime.cudaMemcpyKind, 0
        context = SimpleNamespace(push=lambda: self.count(1), pop=lambda: self.count(-1))
        self.Device = lambda index: SimpleNamespace(
            retain_primary_context=lambda: context, compute_capability=lambda: (8, 7), name=lambda: "Stand-in GPU",
            get_attribute={"multiprocessor_count": 8}.__getitem__,
        )  # fmt: skip
        self.device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT="multiprocessor_count")
        self.Stream = lambda: SimpleNamespace(handle=77, synchronize=lambda: None)
        self.Event = PyCudaEvent
        self.init, self.get_version, self.get_driver_version = lambda: None, lambda: (13, 0, 0), lambda: 13010

    def count(self, by: int) -> None:
        self.contexts += by

    def mem_alloc(self, nbytes: int) -> Any:
        address = self.runtime.cudaMalloc(nbytes)[1]
        if address is None:
            raise self.MemoryError("cuMemAlloc failed: out of memory")

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


@pytest.fixture
def pycuda_driver(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> PyCudaDriver:
    """pycuda's stand-in, where there is no cuda-python."""
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    driver, pycuda = PyCudaDriver(fake_cuda), ModuleType("pycuda")
    pycuda.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", pycuda)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    return driver


def test_pycuda_serves_where_cuda_python_is_missing(
    engine_file: Path, pycuda_driver: PyCudaDriver, fake_cuda: Any, run_detector: Any, detector_model: Any
) -> None:
    times: Dict[str, float] = {}
    with TrtSession(engine_file) as session:
        feed = {"images": noise_input(session.contract, 0)}
        assert np.array_equal(run_detector(detector_model(), feed)["boxes"], session.infer(feed, times)["boxes"])
        assert "no CUDA graph (pycuda cannot capture)" in session.description
    assert min(times.values()) > 0
    assert pycuda_driver.contexts == 0
    assert not fake_cuda.memory


def test_a_full_device_is_said_by_pycuda_too(engine_file: Path, pycuda_driver: PyCudaDriver, fake_cuda: Any) -> None:
    fake_cuda.full = True
    with pytest.raises(PipelineError, match=r"cuMemAlloc failed: out of memory: .*used up"):
        TrtSession(engine_file)
    assert pycuda_driver.contexts == 0


TOO_OLD = "cudaGetDevice says cudaErrorInsufficientDriver: the driver here is for CUDA 12.6, and cuda-python .* wants a"


@pytest.fixture
def old_driver(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """JetPack 6 with the cuda-python that pip takes without a pin."""
    status = fake_cuda.cudaError_t.cudaErrorInsufficientDriver
    monkeypatch.setattr(fake_cuda, "cudaGetDevice", lambda: (status, None))
    monkeypatch.setattr(cuda_module, "driver_cuda_version", lambda: (12, 6))


def test_a_driver_too_old_for_cuda_python_runs_pycuda(
    old_driver: None, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, pycuda = PyCudaDriver(fake_cuda), ModuleType("pycuda")
    pycuda.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", pycuda)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    cuda = load_cuda("a test")
    assert isinstance(cuda, PyCuda)
    cuda.close()
    assert re.search(f"pycuda is used: CUDA: {TOO_OLD}", capsys.readouterr().err)


def test_a_driver_too_old_is_named_with_the_pin_that_it_runs(old_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DriverTooOldError, match=rf"{TOO_OLD} newer one\. Do: pip install 'cuda-python==12\.6\.\*'"):
        load_cuda("a test")


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


# The stand-in for CUDA against cuda-python ----------------------------------------------------------------------------


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
