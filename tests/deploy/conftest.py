"""
A small detector as ONNX, and stand-ins for tensorrt and CUDA that run it.

The stand-in engine is the parsed ONNX graph on ONNX Runtime, and its device memory is host memory, so that everything
above the bindings is real. test_trt.py compares its names and signatures with those of the real bindings.
"""

from __future__ import annotations

import ctypes
import enum
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import pytest

from deploy.contract import ModelContract, write_sidecar

SIZE_PX = 64
BEST = 40
CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, SIZE_PX, SIZE_PX),
    channel_order="rgb",
    mean=(120.0, 120.0, 120.0),
    std=(60.0, 60.0, 60.0),
    pad_value=(120.0, 120.0, 120.0),
    resize="keep_ratio",
    output_names=("boxes", "scores", "labels"),
    class_names=("disc", "bar"),
    category_ids=(1, 2),
    score_threshold=0.05,
    nms_iou_threshold=0.6,
    max_detections=100,
)


class Net:
    """Builds a graph node by node: `net("Relu", x)` is the name of its output."""

    def __init__(self, quantised: Optional[type]) -> None:
        self.nodes: List[Any] = []
        self.tensors: Dict[str, np.ndarray] = {}
        self.quantised = quantised
        self.random = np.random.default_rng(7)

    def __call__(self, op: str, *inputs: str, outputs: Tuple[str, ...] = (), **attributes: Any) -> str:
        from onnx import helper

        outputs = outputs or (f"{op.lower()}{len(self.nodes)}",)
        self.nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=f"{op}_{len(self.nodes)}", **attributes)
        )
        return outputs[0]

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        name = f"tensor{len(self.tensors)}"
        self.tensors[name] = np.asarray(values, dtype)
        return name

    def pair(self, name: str, largest: float) -> str:
        """Q/DQ of a tensor, symmetric."""
        zero = self.constant(128 if self.quantised is np.uint8 else 0, self.quantised)
        scale = self.constant(largest / 127)
        return self("DequantizeLinear", self("QuantizeLinear", name, scale, zero), scale, zero)

    def weight(self, out: int, inputs: int, kernel: int) -> str:
        bound = np.sqrt(3.0 / (inputs * kernel * kernel))
        return self.constant(self.random.uniform(-bound, bound, (out, inputs, kernel, kernel)))

    def conv(self, x: str, weight: str, stride: int = 1, final: bool = False) -> str:
        values = self.tensors[weight if weight in self.tensors else "shared"]
        if self.quantised and not final:
            x, weight = self.pair(x, 6.0), self.pair(weight, float(np.abs(values).max()))
        bias = self.constant(self.random.uniform(-0.1, 0.1, len(values)))
        pad = values.shape[-1] // 2
        return self("Conv", x, weight, bias, strides=[stride] * 2, pads=[pad] * 4, kernel_shape=list(values.shape[2:]))


def mini_detector(quantised: Optional[type] = None) -> Any:
    """An ONNX model with what real detectors have: residual, top-down path, shared head, distribution decode, top-k."""
    import onnx
    from onnx import helper, numpy_helper

    net = Net(quantised)
    x = net("Relu", net.conv("images", net.weight(8, 3, 3), stride=4))
    x = net("Relu", net("Add", net.conv(x, net.weight(8, 8, 3)), x))  # 8 x 16 x 16
    # a gate that has to stay FP32: the root mean square over the image
    squares = net("ReduceMean", net("Mul", x, x), axes=[2, 3], keepdims=1)
    x = net("Div", x, net("Sqrt", net("Add", squares, net.constant(1e-5))))
    coarse = net("Relu", net.conv(x, net.weight(8, 8, 3), stride=2))  # 8 x 8 x 8
    scales = net.constant([1, 1, 2, 2])
    fine = net("Add", net.conv(x, net.weight(8, 8, 1)), net("Resize", coarse, "", scales, mode="nearest"))
    net.tensors["shared"] = net.tensors.pop(net.weight(8, 8, 3))
    six = net("Constant", value=numpy_helper.from_array(np.float32(6.0)))
    bins = net.constant(np.arange(5.0).reshape(5, 1))
    found: Dict[str, List[str]] = {name: [] for name in CONTRACT.output_names}
    for level, stride in ((fine, 4), (coarse, 8)):
        side = SIZE_PX // stride
        shared = "shared" if stride == 4 else net("Identity", "shared")
        tower = net("Clip", net.conv(level, shared), net.constant(0.0), six)
        scores = net.conv(tower, net.weight(2, 8, 3), final=True)
        scores = net("Reshape", net("Transpose", scores, perm=[0, 2, 3, 1]), net.constant([1, -1], np.int64))
        best = (net("Sigmoid", net("Mul", scores, net.constant(3.0))), net.constant([BEST], np.int64))
        names = (f"scores{stride}", f"index{stride}")
        found["scores"].append(net("TopK", *best, outputs=names))
        found["labels"].append(net("Mod", names[1], net.constant(2, np.int64)))
        sides = net.conv(tower, net.weight(20, 8, 3), final=True)
        sides = net(
            "Reshape", net("Transpose", sides, perm=[0, 2, 3, 1]), net.constant([1, side * side, 4, 5], np.int64)
        )
        sides = net("Reshape", net("MatMul", net("Softmax", sides, axis=-1), bins), net.constant([1, -1, 4], np.int64))
        sides = net("Mul", sides, net.constant([-stride, -stride, stride, stride]))
        y, x_px = np.mgrid[:side, :side] * stride + stride / 2
        points = net.constant(np.stack([x_px, y, x_px, y], -1).reshape(1, -1, 4))
        boxes = net("Gather", net("Add", points, sides), net("Div", names[1], net.constant(2, np.int64)), axis=1)
        found["boxes"].append(net("Reshape", boxes, net.constant([1, BEST, 4], np.int64)))
    for name, levels in found.items():
        net("Concat", *levels, outputs=(name,), axis=1)
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph = helper.make_graph(
        net.nodes,
        "mini",
        [helper.make_tensor_value_info("images", float32, list(CONTRACT.input_shape))],
        [
            helper.make_tensor_value_info("boxes", float32, [1, 2 * BEST, 4]),
            helper.make_tensor_value_info("scores", float32, [1, 2 * BEST]),
            helper.make_tensor_value_info("labels", int64, [1, 2 * BEST]),
        ],
        [numpy_helper.from_array(values, name) for name, values in net.tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def unoptimised_session(model: bytes) -> Any:
    """ONNX Runtime on the graph as it is: see `half_from_float` on what its optimiser does to FP16 Q/DQ."""
    import onnx
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < (1, 31) and "QuantizeLinear" in {node.op_type for node in onnx.load_from_string(model).graph.node}:
        pytest.skip(
            f"ONNX Runtime {onnxruntime.__version__} rounds FP16 Q/DQ otherwise (seen on 1.23.2); 1.31 is exact"
        )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def run_detector() -> Callable[..., Dict[str, np.ndarray]]:
    """`run_detector(model, feed)` -> output name -> array, by ONNX Runtime on the graph as it is."""
    pytest.importorskip("onnxruntime")

    def run(model: Any, feed: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        session = unoptimised_session(model.SerializeToString())
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feed), strict=True))

    return run


@pytest.fixture
def detector_model() -> Callable[..., Any]:
    """`detector_model(quantised=None | np.int8 | np.uint8)` -> onnx.ModelProto."""
    pytest.importorskip("onnx")
    return mini_detector


@pytest.fixture
def detector_contract() -> ModelContract:
    return CONTRACT


@pytest.fixture
def detector_file(tmp_path: Path) -> Callable[..., Path]:
    """`detector_file(name, quantised=None)` -> the ONNX file, with its sidecar."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")

    def write(name: str, quantised: Optional[type] = None) -> Path:
        path = tmp_path / name
        onnx.save(mini_detector(quantised), str(path))
        write_sidecar(path, {}, CONTRACT)
        return path

    return write


# tensorrt -------------------------------------------------------------------------------------------------------------


def tensorrt_stand_in(version: str) -> ModuleType:
    """
    A module with the part of tensorrt that is used here, as `version` has it.

    Its `test` says what was done (flags, config, ...) and what shall go wrong (parser_errors, build_error, shift_px).
    """
    major = int(version.split(".")[0])
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.test = test = SimpleNamespace(flags=None, config=None, parser_errors=[], build_error="", shift_px=0.0)

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None:
            self._is_initialised = True

    class IProgressMonitor:
        def __init__(self) -> None:
            self._is_initialised = True

    def check_base(value: Any) -> None:
        assert value._is_initialised, "pybind11 raises TypeError where the base's __init__ was not called"

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> memoryview:
            return memoryview(self._content + b"+")

    class IBuilderConfig:
        def __init__(self) -> None:
            self.builder_optimization_level = 3
            self.progress_monitor: Any = None
            self._cleared: List[Any] = []
            self._pools: Dict[Any, int] = {}
            self._cache: Optional[ITimingCache] = None

        def clear_flag(self, flag: Any) -> None:
            self._cleared.append(flag)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[pool] = pool_size

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return ignore_mismatch or not cache._content.startswith(b"foreign")

        def get_timing_cache(self) -> Optional[ITimingCache]:
            return self._cache

    class INetworkDefinition:
        def __init__(self) -> None:
            self._model = b""

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            check_base(logger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            test.flags = flags
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            test.config = IBuilderConfig()
            return test.config

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Optional[memoryview]:
            if test.build_error:
                self._logger.log(ILogger.Severity.WARNING, "something else")
                self._logger.log(ILogger.Severity.ERROR, test.build_error)
                return None
            check_base(config.progress_monitor)
            config.progress_monitor.phase_start("Building Engine", None, 1)
            config.progress_monitor.phase_start("Timing", "Building Engine", 5)
            config.progress_monitor.step_complete("Timing", 0)
            config.progress_monitor.phase_finish("Timing")
            if not config.progress_monitor.step_complete("Building Engine", 0):
                return None
            config.progress_monitor.phase_finish("Building Engine")
            return memoryview(network._model)

    class ParserError:
        def __init__(self, operator: str, name: str, text: str) -> None:
            self._values = operator, name, text

        def node_operator(self) -> str:
            return self._values[0]

        def node_name(self) -> str:
            return self._values[1]

        def desc(self) -> str:
            return self._values[2]

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            check_base(logger)
            self._network = network
            self.num_errors = len(test.parser_errors)

        def parse(self, model: bytes, path: Optional[str] = None) -> bool:
            self._network._model = model
            return not test.parser_errors

        def get_error(self, index: int) -> ParserError:
            return ParserError(*test.parser_errors[index])

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._addresses: Dict[str, int] = {}

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return name in self._engine._tensors

        def execute_async_v3(self, stream_handle: int) -> bool:
            feed = {
                name: np.ctypeslib.as_array(
                    (ctypes.c_float * int(np.prod(shape))).from_address(self._addresses[name])
                ).reshape(shape)
                for name, (is_input, shape, _) in self._engine._tensors.items()
                if is_input
            }
            names = [name for name, (is_input, _, _) in self._engine._tensors.items() if not is_input]
            for name, values in zip(names, self._engine._session.run(names, feed), strict=True):
                if name == "boxes":
                    values = values + np.float32(test.shift_px)
                ctypes.memmove(self._addresses[name], values.ctypes.data, values.nbytes)
            return True

    class ICudaEngine:
        def __init__(self, plan: bytes) -> None:
            self._session = unoptimised_session(bytes(plan))
            kinds = {"tensor(float)": trt.DataType.FLOAT, "tensor(int64)": trt.DataType.INT64}
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            self._tensors = {io.name: (io in inputs, tuple(io.shape), kinds[io.type]) for io in [*inputs, *outputs]}
            self.num_io_tensors = len(self._tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_shape(self, name: str) -> Tuple[int, ...]:
            return self._tensors[name][1]

        def get_tensor_dtype(self, name: str) -> Any:
            return self._tensors[name][2]

        def create_execution_context(self) -> IExecutionContext:
            return IExecutionContext(self)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            check_base(logger)
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Optional[ICudaEngine]:
            if not serialized_engine:
                self._logger.log(ILogger.Severity.ERROR, "the plan is empty")
                return None
            return ICudaEngine(serialized_engine)

    creation = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}[
        major
    ]
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", creation)
    flags = {"TF32": 6} if major == 11 else {"FP16": 0, "INT8": 1, "TF32": 6}
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", flags)
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.DataType = enum.Enum("DataType", ["FLOAT", "INT64"])
    trt.nptype = lambda trt_type: {trt.DataType.FLOAT: np.float32, trt.DataType.INT64: np.int64}[trt_type]
    for part in (
        ILogger,
        IProgressMonitor,
        ITimingCache,
        IBuilderConfig,
        INetworkDefinition,
        Builder,
        ParserError,
        OnnxParser,
    ):
        setattr(trt, part.__name__, part)
    for part in (IExecutionContext, ICudaEngine, Runtime):
        setattr(trt, part.__name__, part)
    return trt


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch, fake_cuda: Any) -> Callable[[str], Any]:
    """`fake_tensorrt("11.4.0.106")` puts the stand-in of that version in place of the module tensorrt."""

    def install(version: str) -> Any:
        trt = tensorrt_stand_in(version)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return install


# CUDA -----------------------------------------------------------------------------------------------------------------


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Copy(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


def cuda_python_stand_in() -> ModuleType:
    """`cuda.bindings.runtime` on host memory; `memory` has what is allocated, `full` makes the next allocation fail."""
    runtime: Any = ModuleType("cuda.bindings.runtime")
    runtime.memory, runtime.freed, runtime.full = {}, [], False
    runtime.cudaError_t, runtime.cudaMemcpyKind, runtime.cudaStreamNonBlocking = Status, Copy, 1

    def allocate(size: int) -> Tuple[Any, ...]:
        if runtime.full:
            return Status.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(size)
        runtime.memory[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def free(address: int) -> Tuple[Any, ...]:
        block = runtime.memory.pop(address)
        ctypes.memset(block, 0xFF, len(block))
        runtime.freed.append(block)  # a view into it finds not-a-numbers, not another's memory
        return (Status.cudaSuccess,)

    def copy(target: int, source: int, count: int, kind: Copy, stream: int) -> Tuple[Any, ...]:
        assert stream == 77
        device = target if kind is Copy.cudaMemcpyHostToDevice else source
        assert device in runtime.memory
        ctypes.memmove(target, source, count)
        return (Status.cudaSuccess,)

    runtime.cudaMalloc = runtime.cudaMallocHost = allocate
    runtime.cudaFree = runtime.cudaFreeHost = free
    runtime.cudaMemcpyAsync = copy
    runtime.cudaGetDevice = lambda: (Status.cudaSuccess, 0)
    properties = SimpleNamespace(name=b"Stand-in GPU\0\0", major=8, minor=7)
    runtime.cudaGetDeviceProperties = lambda device: (Status.cudaSuccess, properties)
    runtime.cudaRuntimeGetVersion = lambda: (Status.cudaSuccess, 13000)
    runtime.cudaDriverGetVersion = lambda: (Status.cudaSuccess, 13010)
    runtime.cudaStreamCreateWithFlags = lambda flags: (Status.cudaSuccess, 77)
    runtime.cudaStreamSynchronize = runtime.cudaStreamDestroy = lambda stream: (Status.cudaSuccess,)
    return runtime


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the stand-in in place of `cuda.bindings.runtime`."""
    runtime = cuda_python_stand_in()
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = runtime
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    return runtime
