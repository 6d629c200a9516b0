"""
The few CUDA calls that running an engine takes, by cuda-python or by pycuda, whichever is installed.

Each is imported by its own class alone. Of cuda-python only what 11.8 to 13 have with the same arguments is used.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from deploy.errors import MissingDependencyError, PipelineError
from deploy.jetpack import gpu_check, install_cuda_binding
from deploy.machine import driver_cuda_version

STEPS = ("host_to_device", "inference", "device_to_host")
"""What `deploy.tensorrt.session.PlanSession.infer` measures, in order."""


def load_cuda(needed_for: str) -> Cuda:
    """
    The current CUDA device, through cuda-python where it is installed and this driver runs it, else through pycuda.

    Raises:
        MissingDependencyError: neither is installed.
        DriverTooOldError: there is only a cuda-python that wants a newer driver.
        PipelineError: there is no device or no driver.
    """
    too_new: Optional[DriverTooOldError] = None
    for binding in (CudaPython, PyCuda):
        try:
            cuda = binding()
        except ImportError as error:
            reason = error
        except DriverTooOldError as error:
            too_new = error
        else:
            if too_new is not None:
                print(f"pycuda is used: {too_new}", file=sys.stderr)
            return cuda
    if too_new is not None:
        raise too_new
    install = install_cuda_binding(driver_cuda_version())
    raise MissingDependencyError("cuda-python", needed_for, f"{install}. Python says: {reason}") from reason


class DriverTooOldError(PipelineError):
    """The driver is older than what cuda-python was made for."""


class Cuda:
    """
    The few CUDA calls that running an engine takes, on one stream. What was allocated lives until `close`.

    Every call raises PipelineError where CUDA reports an error.
    """

    def describe(self) -> Dict[str, str]:
        """Keys device, compute_capability, multiprocessors, cuda_runtime, cuda_driver."""
        raise NotImplementedError

    def stream(self) -> int:
        """The handle of a new stream, on which everything below runs. To be called once, first."""
        raise NotImplementedError

    def device_buffer(self, nbytes: int) -> int:
        """The address of new memory on the device."""
        raise NotImplementedError

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8, page-locked. Not to be touched after `close`."""
        raise NotImplementedError

    def copy_to_device(self, address: int, host: np.ndarray) -> None:
        raise NotImplementedError

    def copy_to_host(self, host: np.ndarray, address: int) -> None:
        raise NotImplementedError

    def record(self, index: int) -> None:
        """Notes the time, on the device's clock, at which the stream gets here; `index` is 0 to len(STEPS)."""
        raise NotImplementedError

    def elapsed_ms(self, first: int, second: int) -> float:
        """Milliseconds between two recorded times, after `synchronize`."""
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError

    def capture(self, enqueue: Callable[[], None]) -> str:
        """
        Records what `enqueue` puts on the stream, without running it, as a CUDA graph, which `launch` then runs.

        Returns why there is no graph; nothing if there is.
        """
        raise NotImplementedError

    def launch(self) -> None:
        """Runs the captured graph."""
        raise NotImplementedError

    def drop_graph(self) -> None:
        """Gives back the captured graph, if there is one."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives everything back. A second time it does nothing."""
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
        self._graph: Any = None
        self._events: List[Any] = []
        self._device_addresses: List[int] = []
        self._host_addresses: List[int] = []

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self._runtime, name)(*arguments)
        except RuntimeError as error:  # cuda-python before 13, where there is no libcuda
            raise PipelineError(f"CUDA: {name}: {error}. Install the GPU's driver.") from error
        if status == self._runtime.cudaError_t.cudaErrorInsufficientDriver:
            driver_cuda = driver_cuda_version()
            if driver_cuda is not None:  # it is also what is said where there is no driver at all
                raise DriverTooOldError(
                    f"CUDA: {name} says {status.name}: the driver here is for CUDA {driver_cuda[0]}.{driver_cuda[1]}, "
                    f"and cuda-python {_cuda_python_version()} wants a newer one. Do: "
                    f"{install_cuda_binding(driver_cuda)}"
                )
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise PipelineError(
                f"CUDA: {name} says {status.name}: the GPU's or the page-locked memory is used up. End other programs "
                f"that use the GPU ({gpu_check()}), or take a smaller model or batch."
            )
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise PipelineError(
                f"CUDA: {name} says {status.name}. Check that a GPU and a driver for this CUDA are there "
                f"({gpu_check()})."
            )
        return values[0] if values else None

    def describe(self) -> Dict[str, str]:
        properties = self._call("cudaGetDeviceProperties", self._device)
        return {
            "device": properties.name.split(b"\0")[0].decode(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multiProcessorCount),
            "cuda_runtime": _cuda_version(self._call("cudaRuntimeGetVersion")),
            "cuda_driver": _cuda_version(self._call("cudaDriverGetVersion")),
        }

    def stream(self) -> int:
        self._stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        for _ in range(len(STEPS) + 1):
            self._events.append(self._call("cudaEventCreate"))
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

    def record(self, index: int) -> None:
        self._call("cudaEventRecord", self._events[index], self._stream)

    def elapsed_ms(self, first: int, second: int) -> float:
        return float(self._call("cudaEventElapsedTime", self._events[first], self._events[second]))

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> str:
        # Thread-local, so that another thread's CUDA calls do not spoil the capture.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        reason = ""
        try:
            enqueue()
        except PipelineError as error:
            reason = str(error)
        status, graph = self._runtime.cudaStreamEndCapture(self._stream)
        if status != self._runtime.cudaError_t.cudaSuccess:  # then there is no graph
            reason = reason or f"cudaStreamEndCapture says {status.name}"
        else:
            try:
                if not reason:
                    # Not cudaGraphInstantiate, whose arguments changed with CUDA 12.
                    self._graph = self._call("cudaGraphInstantiateWithFlags", graph, 0)
            finally:
                self._call("cudaGraphDestroy", graph)
        if reason:
            self._runtime.cudaGetLastError()  # else the next call would report it again
        return reason

    def launch(self) -> None:
        self._call("cudaGraphLaunch", self._graph, self._stream)

    def drop_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        # No status is looked at: it may be that of work that failed before, and the rest has to go all the same.
        runtime = self._runtime
        if self._graph is not None:
            runtime.cudaGraphExecDestroy(self._graph)
            self._graph = None
        while self._events:
            runtime.cudaEventDestroy(self._events.pop())
        while self._device_addresses:
            runtime.cudaFree(self._device_addresses.pop())
        while self._host_addresses:
            runtime.cudaFreeHost(self._host_addresses.pop())
        if self._stream is not None:
            runtime.cudaStreamDestroy(self._stream)
            self._stream = None


class PyCuda(Cuda):
    """
    pycuda, on the device's primary context, which is the one that TensorRT uses.

    It has no stream capture (documentation of 2026.1, "Device Interface"), hence no CUDA graphs.
    """

    def __init__(self) -> None:
        import pycuda.driver as driver

        self._driver = driver
        self._call(driver.init)
        self._device = self._call(driver.Device, 0)
        self._context = self._call(self._device.retain_primary_context)
        self._call(self._context.push)
        self._stream: Any = None
        self._events: List[Any] = []
        self._buffers: List[Any] = []

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._driver.MemoryError as error:
            raise PipelineError(
                f"CUDA: {error}: the GPU's or the page-locked memory is used up. End other programs that use the GPU, "
                "or take a smaller model or batch."
            ) from error
        except self._driver.Error as error:
            raise PipelineError(
                f"CUDA: {error}. Check with {gpu_check()} that a GPU and its driver are there."
            ) from error

    def describe(self) -> Dict[str, str]:
        major, minor = self._call(self._device.compute_capability)
        return {
            "device": self._call(self._device.name),
            "compute_capability": f"{major}.{minor}",
            "multiprocessors": str(
                self._call(self._device.get_attribute, self._driver.device_attribute.MULTIPROCESSOR_COUNT)
            ),
            "cuda_runtime": ".".join(str(part) for part in self._driver.get_version()[:2]),
            "cuda_driver": _cuda_version(self._driver.get_driver_version()),
        }

    def stream(self) -> int:
        self._stream = self._call(self._driver.Stream)
        for _ in range(len(STEPS) + 1):
            self._events.append(self._call(self._driver.Event))
        return int(self._stream.handle)

    def device_buffer(self, nbytes: int) -> int:
        self._buffers.append(self._call(self._driver.mem_alloc, nbytes))
        return int(self._buffers[-1])

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return self._call(self._driver.pagelocked_empty, nbytes, np.uint8)  # freed with its last view

    def copy_to_device(self, address: int, host: np.ndarray) -> None:
        self._call(self._driver.memcpy_htod_async, address, host, self._stream)

    def copy_to_host(self, host: np.ndarray, address: int) -> None:
        self._call(self._driver.memcpy_dtoh_async, host, address, self._stream)

    def record(self, index: int) -> None:
        self._call(self._events[index].record, self._stream)

    def elapsed_ms(self, first: int, second: int) -> float:
        return float(self._call(self._events[first].time_till, self._events[second]))

    def synchronize(self) -> None:
        self._call(self._stream.synchronize)

    def capture(self, enqueue: Callable[[], None]) -> str:
        return "pycuda cannot capture"

    def drop_graph(self) -> None:
        pass

    def close(self) -> None:
        while self._buffers:
            self._buffers.pop().free()
        self._events = []
        self._stream = None
        if self._context is not None:
            self._context.pop()
            self._context = None


def _cuda_python_version() -> str:
    for package in ("cuda-python", "cuda-bindings"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"  # 12060 -> 12.6, as cudaRuntimeGetVersion is documented
