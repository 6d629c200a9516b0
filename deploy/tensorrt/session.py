"""
Running TensorRT engines: `TrtSession`, the CUDA calls below it, and the process's one TensorRT logger.

Needs tensorrt and one of cuda-python and pycuda, each imported by the function that uses it. Of the run API only the
part that goes by tensor names is used: TensorRT 8.5 to 11.4 all have it. Of cuda-python only what 11.8 to 13 have with
the same arguments.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from deploy.contract import ModelContract, load_contract, read_sidecar, sidecar_path
from deploy.errors import ContractError, MissingDependencyError, PipelineError
from deploy.files import AnyPath
from deploy.runtime.session import Arrays, Session

INSTALL_TENSORRT = (
    "pip install tensorrt-cu13 (on a Jetson JetPack brings it: make the environment with --system-site-packages)"
)
INSTALL_CUDA = "pip install cuda-python (or pycuda)"
AMPERE = (8, 0)
"""The lowest compute capability that hardware-compatible engines run on: HardwareCompatibilityLevel.AMPERE_PLUS."""
NUMPY_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip
"""Name of a TensorRT type -> numpy's. TensorRT 8's own `nptype` uses numpy.bool, which numpy 1.24 (JetPack 5) lacks."""
STEPS = ("host_to_device", "inference", "device_to_host")
"""What `infer` measures, in order."""


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
    """
    The few CUDA calls that running an engine takes, on one stream. What was allocated lives until `close`.

    Every call raises PipelineError where CUDA reports an error.
    """

    def describe(self) -> Dict[str, str]:
        """Keys device, compute_capability, cuda_runtime, cuda_driver."""
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
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise PipelineError(
                f"CUDA: {name} says {status.name}: the GPU's or the page-locked memory is used up. End other programs "
                "that use the GPU (nvidia-smi), or take a smaller model or batch."
            )
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise PipelineError(
                f"CUDA: {name} says {status.name}. Check that a GPU and a driver for this CUDA are there (nvidia-smi)."
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
            raise PipelineError(f"CUDA: {error}. Check with nvidia-smi that a GPU and its driver are there.") from error

    def describe(self) -> Dict[str, str]:
        major, minor = self._call(self._device.compute_capability)
        return {
            "device": self._call(self._device.name),
            "compute_capability": f"{major}.{minor}",
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


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"  # 12060 -> 12.6, as cudaRuntimeGetVersion is documented


class _Tensor:
    """
    The memory of one input or output, enough for the largest batch.

    Attributes:
        address: on the device.
        host: the page-locked counterpart, as an array of the present shape.
        result: of an output, the ordinary array that `infer` returns; of an input never touched, and so no memory.
    """

    host: np.ndarray
    result: np.ndarray

    def __init__(self, cuda: Cuda, nbytes: int, dtype: np.dtype) -> None:
        self.address = cuda.device_buffer(nbytes)
        self._page_locked = cuda.host_buffer(nbytes)
        self._ordinary = np.empty(nbytes, np.uint8)
        self._dtype = dtype

    def set_shape(self, shape: Tuple[int, ...]) -> None:
        nbytes = int(np.prod(shape)) * self._dtype.itemsize
        self.host = self._page_locked[:nbytes].view(self._dtype).reshape(shape)
        self.result = self._ordinary[:nbytes].view(self._dtype).reshape(shape)


def _output_allocator(trt: ModuleType) -> Any:
    class Allocator(trt.IOutputAllocator):  # type: ignore[name-defined]
        """
        Hands out memory that is there already, and is told the shape of outputs whose size depends on the data.

        An address of 0 makes the inference fail (NvInferRuntime.h on IOutputAllocator), an exception would be lost.
        """

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffers: Dict[str, Tuple[int, int]] = {}  # name -> address, bytes
            self.shapes: Dict[str, Tuple[int, ...]] = {}

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            address, nbytes = self.buffers[tensor_name]
            return address if size <= nbytes else 0

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:  # what TensorRT from 10.0 on calls
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shapes[tensor_name] = tuple(shape)

    return Allocator()


class PlanSession(Session):
    """
    A serialised engine in memory.

    Everything is allocated when it starts, for the largest batch: page-locked memory and its counterpart on the device
    for each tensor, and the ordinary arrays that `infer` returns, which outlive the session. The network runs as a CUDA
    graph where it can; `description` says whether, and why not. With a dynamic batch the first inference of another
    batch size than the one before runs without, and the second captures the graph anew.

    Args:
        plan: the engine's bytes. They are code: run only what you built or trust.
        trt: the module, from `load_tensorrt`.
        cuda: from `load_cuda`; the session closes it.
        dla_core: the DLA core that the engine was built for.
        version_compatible: the engine was built so that newer TensorRT versions run it.

    Raises:
        ContractError: TensorRT refuses the bytes, or their tensors are not those of the contract.
        PipelineError: the device fails or has no memory left.
    """

    def __init__(
        self,
        plan: bytes,
        contract: ModelContract,
        trt: ModuleType,
        cuda: Cuda,
        dla_core: Optional[int] = None,
        version_compatible: bool = False,
    ) -> None:
        self.contract = contract
        self._trt, self._cuda, self._log = trt, cuda, logger(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._allocator: Any = None
        self._tensors: Dict[str, _Tensor] = {}
        self._batch = 0
        self._warm = self._captured = False
        self._no_graph = ""
        try:
            self._load(plan, dla_core, version_compatible)
            self._start()
        except BaseException:
            self.close()
            raise

    def _load(self, plan: bytes, dla_core: Optional[int], version_compatible: bool) -> None:
        self.description = f"TensorRT {self._trt.__version__}, {self._cuda.describe()['device']}"
        self._stream = self._cuda.stream()
        self._log.errors.clear()
        self._runtime = self._trt.Runtime(self._log)
        if dla_core is not None:
            if dla_core >= self._runtime.num_DLA_cores:
                raise ContractError(
                    f"the engine was built for DLA core {dla_core}; this device has {self._runtime.num_DLA_cores} DLA "
                    "cores, counted from 0. Build it again here."
                )
            self._runtime.DLA_core = dla_core
        if version_compatible:
            # It brings a lean runtime of its own; TensorRT asks whether that may run ("Version Compatibility").
            self._runtime.engine_host_code_allowed = True
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

    def _start(self) -> None:
        self.batch_limits = self._check_tensors()
        if self.contract.outputs == "nms":
            self._allocator = _output_allocator(self._trt)
            # TensorRT, "CUDA Graphs": not with data-dependent shapes. A replay would not tell the allocator either.
            self._no_graph = "the number of detections is known only afterwards"
        largest = self.batch_limits[1]
        self._set_batch(largest)
        for name in (self.contract.input_name, *self.contract.output_names):
            self._allocate(name)
        # TensorRT loads what it needs with the first inference; the second captures the graph.
        blank = np.zeros((largest, *self.contract.input_shape[1:]), self.contract.input_type)
        for _ in range(2):
            self.infer({self.contract.input_name: blank})
        self.description += f", no CUDA graph ({self._no_graph})" if self._no_graph else ", CUDA graph"

    def _check_tensors(self) -> Tuple[int, int]:
        """The fewest and the most images of a batch. Raises ContractError if the tensors are not the contract's."""
        engine, contract = self._engine, self.contract
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        expected = [contract.input_name, *contract.output_names]
        if sorted(names) != sorted(expected):
            raise ContractError(f"the engine has the tensors {names}; its contract expects {expected}. Build it again.")
        dtype, shape = self._dtype(contract.input_name), tuple(engine.get_tensor_shape(contract.input_name))
        batch = contract.input_shape[0]
        if dtype != contract.input_type or shape[1:] != tuple(contract.input_shape[1:]) or batch not in (-1, shape[0]):
            raise ContractError(
                f"the engine takes {dtype} {shape}; its contract expects {contract.input_type} "
                f"{tuple(contract.input_shape)}. Build it again."
            )
        if shape[0] > 0:
            return shape[0], shape[0]
        fewest, _, most = engine.get_tensor_profile_shape(contract.input_name, 0)
        return fewest[0], most[0]

    def _dtype(self, name: str) -> np.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in NUMPY_TYPES:
            raise ContractError(
                f"the engine's tensor {name!r} is of type {kind}; expected one of {list(NUMPY_TYPES)}. Export again."
            )
        return np.dtype(NUMPY_TYPES[kind])

    def _set_batch(self, batch: int) -> None:
        """Gives all tensors their shapes for `batch` images."""
        self._cuda.drop_graph()  # it was captured for other shapes
        self._warm = self._captured = False
        if self.contract.input_shape[0] == -1:
            shape = (batch, *self.contract.input_shape[1:])
            if not self._context.set_input_shape(self.contract.input_name, shape):
                raise PipelineError(f"TensorRT refuses the input shape {shape}: {self._log.reasons()}")
        for name, tensor in self._tensors.items():
            self._set_shape(name, tensor)
        self._batch = batch

    def _set_shape(self, name: str, tensor: _Tensor) -> None:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) >= 0:  # else an output whose size depends on the data: known after each inference
            tensor.set_shape(shape)

    def _allocate(self, name: str) -> None:
        shape, dtype = tuple(self._context.get_tensor_shape(name)), self._dtype(name)
        if min(shape, default=0) >= 0:
            nbytes = int(np.prod(shape)) * dtype.itemsize
        elif self._allocator is not None:
            nbytes = self._context.get_max_output_size(name)  # for the batch that is set: the largest
        else:
            nbytes = -1
        if nbytes < 0:
            raise ContractError(
                f"the engine's tensor {name!r} has the shape {shape}; expected sizes that follow from the batch size. "
                "Export the model again."
            )
        tensor = _Tensor(self._cuda, max(nbytes, dtype.itemsize), dtype)  # CUDA has no address for nothing
        self._tensors[name] = tensor
        self._set_shape(name, tensor)
        accepted = self._context.set_tensor_address(name, tensor.address)
        if self._allocator is not None and name != self.contract.input_name:
            self._allocator.buffers[name] = (tensor.address, nbytes)
            accepted = accepted and self._context.set_output_allocator(name, self._allocator)
        if not accepted:
            raise PipelineError(f"TensorRT refuses a buffer for the tensor {name!r}: {self._log.reasons()}")

    def infer(self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None) -> Arrays:
        if self._context is None:
            raise PipelineError(f"{self.description}: the session is closed; open another")
        array = self._input_of(feed)
        if array.shape[0] != self._batch:
            self._set_batch(array.shape[0])
        source = self._tensors[self.contract.input_name]
        outputs = {name: self._tensors[name] for name in self.contract.output_names}

        def mark(index: int) -> None:
            if times_ms is not None:
                self._cuda.record(index)

        np.copyto(source.host, array)
        mark(0)
        self._cuda.copy_to_device(source.address, source.host)
        mark(1)
        self._run()
        mark(2)
        for name, tensor in outputs.items():
            if self._allocator is not None:  # it was told before execute_async_v3 returned (NvInferRuntime.h)
                tensor.set_shape(self._allocator.shapes[name])
            if tensor.host.size:
                self._cuda.copy_to_host(tensor.host, tensor.address)
        mark(3)
        self._cuda.synchronize()
        for tensor in outputs.values():
            # A few thousand numbers. A view of the page-locked memory would point nowhere once the session is closed.
            np.copyto(tensor.result, tensor.host)
        if times_ms is not None:
            times_ms.update({step: self._cuda.elapsed_ms(index, index + 1) for index, step in enumerate(STEPS)})
        return {name: tensor.result for name, tensor in outputs.items()}

    def _run(self) -> None:
        """
        Puts the network on the stream.

        After a change of shapes TensorRT has work to do that does not belong into a graph ("CUDA Graphs" in its
        guide), hence the first run of a batch size without.
        """
        if self._warm and not self._captured and not self._no_graph:
            self._no_graph = self._cuda.capture(self._enqueue)
            self._captured = not self._no_graph
        if self._captured:
            self._cuda.launch()
        else:
            self._enqueue()
            self._warm = True

    def _enqueue(self) -> None:
        self._log.errors.clear()
        if not self._context.execute_async_v3(self._stream):
            raise PipelineError(
                f"TensorRT could not run the engine: {self._log.reasons()}. If memory of the GPU is short, free some."
            )

    def close(self) -> None:
        self._tensors = {}
        self._context = None  # before its allocator and its engine, and that before its runtime
        self._allocator = None
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
        contract, built_on = load_contract(path), read_sidecar(path).get("details")
        if not isinstance(built_on, dict) or "precision" not in built_on:
            raise ContractError(
                f"{sidecar_path(path)} does not say what built the engine; expected the sidecar that "
                "deploy.build_trt writes. Build the engine again."
            )
        plan = Path(path).read_bytes()
        trt = load_tensorrt(f"running {Path(path).name}")
        cuda = load_cuda(f"running {Path(path).name}")
        try:
            check_same_machine(built_on, describe_machine(trt, cuda), path)
        except BaseException:
            cuda.close()
            raise
        dla_core, version_compatible = built_on.get("dla_core"), bool(built_on.get("version_compatible"))
        super().__init__(plan, contract, trt, cuda, dla_core, version_compatible)
        self.description += f", {built_on['precision']}"


def check_same_machine(built_on: Mapping[str, Any], here: Mapping[str, str], path: AnyPath) -> None:
    """
    Raises ContractError if the engine at `path` cannot run here: it was built by another TensorRT or for another GPU.

    Built `version_compatible`, it runs on the same major version of TensorRT, not older than that (TensorRT 11.3
    support matrix, "Engine Portability"). Built `hardware_compatible`, it runs on every GPU of compute capability 8.0
    or higher (HardwareCompatibilityLevel.AMPERE_PLUS).

    Args:
        built_on: the `details` of its sidecar.
        here: as `describe_machine` returns it.
    """
    for key in ("tensorrt", "device", "compute_capability"):
        built, found = str(built_on.get(key)), here[key]
        if key == "tensorrt" and built_on.get("version_compatible"):
            old, new = version_numbers(built), version_numbers(found)
            fits = old[:1] == new[:1] and old <= new
            rule = "Version-compatible engines run on the same major version of TensorRT, on that one or newer"
        elif key != "tensorrt" and built_on.get("hardware_compatible"):
            fits = key == "device" or version_numbers(found) >= AMPERE
            rule = "Hardware-compatible engines run on GPUs of compute capability 8.0 or higher"
        else:
            fits = built == found
            rule = "Engines do not move between TensorRT versions or GPUs"
        if not fits:
            raise ContractError(
                f"{path} was built with {key} {built!r}; here it is {found!r}. {rule}: build it again here with "
                "python -m deploy.build_trt."
            )


def version_numbers(version: str) -> Tuple[int, ...]:
    """(10, 13, 3, 9) for "10.13.3.9.post1"."""
    return tuple(int(part) for part in itertools.takewhile(str.isdigit, version.split(".")))
