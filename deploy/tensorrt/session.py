"""
Running TensorRT engines: `PlanSession` of bytes in memory, `TrtSession` of a file with its sidecar.

Of TensorRT's run API only the part that goes by tensor names is used: 8.5 to 11.4 all have it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np

from deploy.contract import ModelContract, load_contract, read_sidecar
from deploy.errors import ContractError, PipelineError
from deploy.files import AnyPath
from deploy.machine import board_model, power_mode
from deploy.runtime.golden import words_of_agreement
from deploy.runtime.session import Arrays, Session
from deploy.targets import version_numbers
from deploy.tensorrt.bindings import load_tensorrt, logger
from deploy.tensorrt.coverage import words_of_precision
from deploy.tensorrt.cuda import STEPS, Cuda, load_cuda

AMPERE = (8, 0)
"""The lowest compute capability that hardware-compatible engines run on: HardwareCompatibilityLevel.AMPERE_PLUS."""
NUMPY_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip
"""Name of a TensorRT type -> numpy's. TensorRT 8's own `nptype` uses numpy.bool, which numpy 1.24 (JetPack 5) lacks."""


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
        built_on = read_sidecar(path, details=("precision", "tensorrt", "device", "compute_capability"))["details"]
        contract = load_contract(path)
        plan = Path(path).read_bytes()
        trt = load_tensorrt(f"running {Path(path).name}")
        cuda = load_cuda(f"running {Path(path).name}")
        try:
            here = describe_machine(trt, cuda)
            check_same_machine(built_on, here, path)
        except BaseException:
            cuda.close()
            raise
        mode, mode_here = built_on.get("power_mode"), here["power_mode"]
        if mode and mode_here and mode != mode_here:
            print(
                f"warning: {path} was built in the power mode {mode}, the board is in {mode_here} now: it runs, with "
                "kernels that were the fastest then. Build it again here before its speed is measured.",
                file=sys.stderr,
            )
        dla_core, version_compatible = built_on.get("dla_core"), bool(built_on.get("version_compatible"))
        super().__init__(plan, contract, trt, cuda, dla_core, version_compatible)
        self.description += f", {words_of_precision(built_on)}"
        golden = built_on.get("golden") or {}
        if not golden.get("agrees", True):
            self.description += f", DIFFERS from ONNX Runtime ({words_of_agreement(golden)})"


def describe_machine(trt: ModuleType, cuda: Cuda) -> Dict[str, Optional[str]]:
    """
    What an engine is built by and for: keys tensorrt, device, compute_capability, multiprocessors, cuda_runtime,
    cuda_driver, board, power_mode. The last two are None where there are none.
    """
    return {"tensorrt": trt.__version__, **cuda.describe(), "board": board_model(), "power_mode": power_mode()}


def check_same_machine(built_on: Mapping[str, Any], here: Mapping[str, Optional[str]], path: AnyPath) -> None:
    """
    Raises ContractError if the engine at `path` cannot run here: it was built by another TensorRT or for another GPU.

    Every Jetson Orin calls itself "Orin" of compute capability 8.7, and TensorRT lets an engine of an AGX be loaded on
    an NX, where it fails ("Cask unknown internal error"): hence multiprocessors, of which power modes switch some off,
    and the board's name. Inside a container that may be unknown, and then says nothing.

    Built `version_compatible`, it runs on the same major version of TensorRT, not older than that (TensorRT 11.3
    support matrix, "Engine Portability"). Built `hardware_compatible`, it runs on every GPU of compute capability 8.0
    or higher (HardwareCompatibilityLevel.AMPERE_PLUS).

    Args:
        built_on: the `details` of its sidecar.
        here: as `describe_machine` returns it.
    """
    for key in ("tensorrt", "device", "compute_capability", "multiprocessors", "board"):
        built, found = str(built_on.get(key)), str(here[key])
        if key == "board" and "None" in (built, found):
            continue
        if key == "tensorrt" and built_on.get("version_compatible"):
            old, new = version_numbers(built), version_numbers(found)
            fits = old[:1] == new[:1] and old <= new
            rule = "Version-compatible engines run on the same major version of TensorRT, on that one or newer"
        elif key != "tensorrt" and built_on.get("hardware_compatible"):
            fits = key != "compute_capability" or version_numbers(found) >= AMPERE
            rule = "Hardware-compatible engines run on GPUs of compute capability 8.0 or higher"
        else:
            fits = built == found
            rule = "Engines do not move between TensorRT versions, boards or GPUs"
        if not fits:
            raise ContractError(
                f"{path} was built with {key} {built!r}; here it is {found!r}. {rule}: build it again here with "
                "python -m deploy.build_trt."
            )
