"""
Running TensorRT engines: `TrtSession`, the CUDA calls below it, and the process's one TensorRT logger.

Needs tensorrt and one of cuda-python and pycuda, each imported by the function that uses it. Of the run API only the
part that goes by tensor names is used: TensorRT 8.5 to 11.4 all have it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Mapping

import numpy as np

from deploy.contract import ModelContract, load_contract, read_sidecar
from deploy.errors import ContractError, MissingDependencyError, PipelineError
from deploy.files import AnyPath
from deploy.session import Arrays, Session

INSTALL_TENSORRT = (
    "pip install tensorrt-cu13 (on a Jetson JetPack brings it: make the environment with --system-site-packages)"
)
INSTALL_CUDA = "pip install cuda-python (or pycuda)"
SAME_MACHINE = ("tensorrt", "device", "compute_capability")
"""What an engine is bound to, as its sidecar's `details` name it."""


def load_tensorrt(needed_for: str) -> ModuleType:
    """
    The module tensorrt.

    Raises:
        MissingDependencyError: it is not installed, or its libraries are not.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise MissingDependencyError("tensorrt", needed_for, f"{INSTALL_TENSORRT}. Python says: {error}") from error
    return tensorrt


def load_cuda(needed_for: str) -> Cuda:
    """
    The current CUDA device, through cuda-python where it is installed, else through pycuda.

    Raises:
        MissingDependencyError: neither is installed.
        PipelineError: there is no device or no driver.
    """
    for binding in (CudaPython, PyCuda):
        try:
            return binding()
        except ImportError as error:
            reason = error
    raise MissingDependencyError("cuda-python", needed_for, f"{INSTALL_CUDA}. Python says: {reason}") from reason


def describe_machine(trt: ModuleType, cuda: Cuda) -> Dict[str, str]:
    """What an engine is built by and for: keys tensorrt, device, compute_capability, cuda_runtime, cuda_driver."""
    return {"tensorrt": trt.__version__, **cuda.describe()}


@functools.lru_cache(maxsize=None)
def logger(trt: ModuleType) -> Any:
    """
    The one logger of this process, which every builder and runtime shares: TensorRT holds on to the first it is given.

    Its list `errors` keeps the messages of severity ERROR and worse, the only place where TensorRT gives reasons;
    `verbose` prints everything on stderr. `reasons()` is the errors as one text.
    """
    severity_type = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: List[str] = []
            self.verbose = False

        def reasons(self) -> str:
            return "; ".join(self.errors) or "no reason given"

        def log(self, severity: Any, msg: str) -> None:
            if severity in (severity_type.INTERNAL_ERROR, severity_type.ERROR):
                self.errors.append(msg)
            if self.verbose:
                print(f"tensorrt {severity.name.lower()}: {msg}", file=sys.stderr)

    return Log()


class Cuda:
    """The few CUDA calls that running an engine takes. What was allocated lives until `close`."""

    def describe(self) -> Dict[str, str]:
        """Keys device, compute_capability, cuda_runtime, cuda_driver."""
        raise NotImplementedError

    def stream(self) -> int:
        """The handle of a new stream, which the copies and `synchronize` use. To be called once, first."""
        raise NotImplementedError

    def device_buffer(self, nbytes: int) -> int:
        """The address of new memory on the device."""
        raise NotImplementedError

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8, page-locked."""
        raise NotImplementedError

    def copy_to_device(self, address: int, host: np.ndarray) -> None:
        raise NotImplementedError

    def copy_to_host(self, host: np.ndarray, address: int) -> None:
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class CudaPython(Cuda):
    """NVIDIA's cuda-python: `cuda.bindings.runtime` from 12.8, `cuda.cudart` before and up to 12."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._runtime = runtime
        self._device: int = self._call("cudaGetDevice")
        self._stream: Any = None
        self._device_addresses: List[int] = []
        self._host_addresses: List[int] = []

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise PipelineError(
                f"CUDA: {name} says {status.name}. Check that a GPU, its driver and free memory are there (nvidia-smi)."
            )
        return values[0] if values else None

    def describe(self) -> Dict[str, str]:
        properties = self._call("cudaGetDeviceProperties", self._device)
        return {
            "device": properties.name.split(b"\0")[0].decode(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda_runtime": _cuda_version(self._call("cudaRuntimeGetVersion")),
            "cuda_driver": _cuda_version(self._call("cudaDriverGetVersion")),
        }

    def stream(self) -> int:
        self._stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        return int(self._stream)

    def device_buffer(self, nbytes: int) -> int:
        self._device_addresses.append(self._call("cudaMalloc", nbytes))
        return self._device_addresses[-1]

    def host_buffer(self, nbytes: int) -> np.ndarray:
        self._host_addresses.append(self._call("cudaMallocHost", nbytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self._host_addresses[-1]))

    def copy_to_device(self, address: int, host: np.ndarray) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, host.ctypes.data, host.nbytes, kind, self._stream)

    def copy_to_host(self, host: np.ndarray, address: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, address, host.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        while self._device_addresses:
            self._call("cudaFree", self._device_addresses.pop())
        while self._host_addresses:
            self._call("cudaFreeHost", self._host_addresses.pop())
        if self._stream is not None:
            self._call("cudaStreamDestroy", self._stream)
            self._stream = None


class PyCuda(Cuda):
    """pycuda, on the device's primary context, which is the one that TensorRT uses."""

    def __init__(self) -> None:
        import pycuda.driver as driver

        self._driver = driver
        try:
            driver.init()
            self._device = driver.Device(0)
            self._context = self._device.retain_primary_context()
        except driver.Error as error:
            raise PipelineError(f"CUDA: {error}. Check with nvidia-smi that a GPU and its driver are there.") from error
        self._context.push()
        self._stream: Any = None
        self._buffers: List[Any] = []

    def describe(self) -> Dict[str, str]:
        major, minor = self._device.compute_capability()
        return {
            "device": self._device.name(),
            "compute_capability": f"{major}.{minor}",
            "cuda_runtime": ".".join(str(part) for part in self._driver.get_version()[:2]),
            "cuda_driver": _cuda_version(self._driver.get_driver_version()),
        }

    def stream(self) -> int:
        self._stream = self._driver.Stream()
        return int(self._stream.handle)

    def device_buffer(self, nbytes: int) -> int:
        try:
            self._buffers.append(self._driver.mem_alloc(nbytes))
        except self._driver.Error as error:
            raise PipelineError(f"CUDA: {error}. Free memory of the GPU.") from error
        return int(self._buffers[-1])

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return self._driver.pagelocked_empty(nbytes, np.uint8)

    def copy_to_device(self, address: int, host: np.ndarray) -> None:
        self._driver.memcpy_htod_async(address, host, self._stream)

    def copy_to_host(self, host: np.ndarray, address: int) -> None:
        self._driver.memcpy_dtoh_async(host, address, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        while self._buffers:
            self._buffers.pop().free()
        self._stream = None
        if self._context is not None:
            self._context.pop()
            self._context = None


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"  # 12060 -> 12.6, as cudaRuntimeGetVersion is documented


class PlanSession(Session):
    """
    A serialised engine in memory, with its buffers on host and device allocated once.

    Args:
        plan: the engine's bytes. They are code: run only what you built or trust.
        trt: the module, from `load_tensorrt`.
        cuda: from `load_cuda`; the session closes it.

    Raises:
        ContractError: TensorRT refuses the bytes, or their tensors are not those of the contract.
        PipelineError: the device fails or has no memory left.
    """

    def __init__(self, plan: bytes, contract: ModelContract, trt: ModuleType, cuda: Cuda) -> None:
        self.contract = contract
        self._trt, self._cuda, self._log = trt, cuda, logger(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._host: Dict[str, np.ndarray] = {}
        self._addresses: Dict[str, int] = {}
        try:
            self._start(plan)
        except BaseException:
            self.close()
            raise

    def _start(self, plan: bytes) -> None:
        self.description = f"TensorRT {self._trt.__version__}, {self._cuda.describe()['device']}"
        self._stream = self._cuda.stream()
        self._log.errors.clear()
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ContractError(
                f"{self.description} cannot read the engine: {self._log.reasons()}. Build it again here."
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise PipelineError(
                f"{self.description} cannot start the engine: {self._log.reasons()}. Free memory of the GPU."
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        expected = [self.contract.input_name, *self.contract.output_names]
        if sorted(names) != sorted(expected):
            raise ContractError(f"the engine has the tensors {names}; its contract expects {expected}. Build it again.")
        for name in names:
            self._allocate(name)
        found, shape = self._host[self.contract.input_name], self.contract.input_shape
        if found.shape != shape or found.dtype != np.float32:
            raise ContractError(
                f"the engine takes {found.dtype} {found.shape}; its contract expects float32 {shape}. Build it again."
            )

    def _allocate(self, name: str) -> None:
        shape = tuple(self._engine.get_tensor_shape(name))
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        if min(shape) < 0:
            raise ContractError(
                f"the engine's tensor {name!r} has the shape {shape}; expected fixed sizes. Export a static graph."
            )
        host = self._cuda.host_buffer(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        self._host[name], self._addresses[name] = host, self._cuda.device_buffer(host.nbytes)
        if not self._context.set_tensor_address(name, self._addresses[name]):
            raise PipelineError(f"TensorRT refuses a buffer for the tensor {name!r}: {self._log.reasons()}")

    def infer(self, feed: Mapping[str, np.ndarray]) -> Arrays:
        name, names = self.contract.input_name, self.contract.output_names
        if feed[name].shape != self._host[name].shape:
            raise ContractError(f"input {name!r} has the shape {feed[name].shape}; expected {self._host[name].shape}")
        np.copyto(self._host[name], feed[name], casting="no")
        self._cuda.copy_to_device(self._addresses[name], self._host[name])
        if not self._context.execute_async_v3(self._stream):
            raise PipelineError(f"TensorRT could not run the engine: {self._log.reasons()}")
        for output in names:
            self._cuda.copy_to_host(self._host[output], self._addresses[output])
        self._cuda.synchronize()
        # Copies, of a few thousand numbers: a view would outlive the page-locked memory when the session closes.
        return {output: self._host[output].copy() for output in names}

    def close(self) -> None:
        self._host, self._addresses = {}, {}
        self._context = None  # before its engine, and that before its runtime
        self._engine = None
        self._runtime = None
        self._cuda.close()


class TrtSession(PlanSession):
    """
    An engine file of `deploy.build_trt`, with its sidecar.

    Raises:
        MissingDependencyError: tensorrt, or both of cuda-python and pycuda, are missing.
        ContractError: the file does not match its sidecar, or was built by another TensorRT or for another device.
        Otherwise as `PlanSession`.
    """

    def __init__(self, path: AnyPath) -> None:
        contract, built_on = load_contract(path), read_sidecar(path)["details"]
        trt = load_tensorrt(f"running {Path(path).name}")
        cuda = load_cuda(f"running {Path(path).name}")
        try:
            check_same_machine(built_on, describe_machine(trt, cuda), path)
        except BaseException:
            cuda.close()
            raise
        super().__init__(Path(path).read_bytes(), contract, trt, cuda)
        self.description += f", {built_on['precision']}"


def check_same_machine(built_on: Mapping[str, Any], here: Mapping[str, str], path: AnyPath) -> None:
    """Raises ContractError if the engine at `path` was built by another TensorRT, or for another device."""
    for key in SAME_MACHINE:
        if built_on.get(key) != here[key]:
            raise ContractError(
                f"{path} was built with {key} {built_on.get(key)!r}; here it is {here[key]!r}. Engines do not move "
                "between TensorRT versions or GPUs: build it again here with python -m deploy.build_trt."
            )
