"""
A small detector as ONNX, and stand-ins for tensorrt and CUDA that run it.

The stand-in engine is the parsed ONNX graph on ONNX Runtime, and its device memory is host memory, so that everything
above the bindings is real. test_bindings.py compares its names and signatures with those of the real bindings.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import itertools
import json
import sys
import time
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


SMALL_OUTPUTS = {
    "topk": "float[{batch},3,4] boxes, float[{batch},3] scores, int64[{batch},3] labels",
    "nms": "float[D,4] boxes, float[D] scores, int64[D] labels, int64[D] images",
}
SMALL_BODIES = {
    "topk": """
        boxes = ReduceMax <axes=[3], keepdims=0> (x)
        scores = ReduceMax <axes=[2], keepdims=0> (boxes)
        labels = ArgMax <axis=2, keepdims=0> (boxes)""",
    "nms": """
        least = Constant <value_float=0.5> ()
        zero = Constant <value_int=0> ()
        one = Constant <value_int=1> ()
        high = Greater (x, least)
        where = NonZero (high)
        places = Transpose <perm=[1, 0]> (where)
        boxes = Cast <to=1> (places)
        scores = GatherND (x, places)
        labels = Gather <axis=0> (where, one)
        images = Gather <axis=0> (where, zero)""",
}
"""Graphs with the outputs of a detector. `nms` finds every value above a half: its place as a box, its channel."""


@pytest.fixture
def small_file(tmp_path: Path) -> Callable[..., Path]:
    """`small_file(outputs, batch=2, input_type="float32")` -> ONNX file, with its sidecar; batch -1 is dynamic."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def write(outputs: str, batch: int = 2, input_type: str = "float32") -> Path:
        size, is_uint8 = "N" if batch == -1 else str(batch), input_type == "uint8"
        model = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            small ({"uint8" if is_uint8 else "float"}[{size},{"4,4,3" if is_uint8 else "3,4,4"}] pixels)
                => ({SMALL_OUTPUTS[outputs].format(batch=size)}) {{
                floats = Cast <to=1> (pixels)
                x = Transpose <perm={[0, 3, 1, 2] if is_uint8 else [0, 1, 2, 3]}> (floats)
                {SMALL_BODIES[outputs]}
            }}"""
        )
        path = tmp_path / f"{outputs}.onnx"
        onnx.save(model, str(path))
        contract = dataclasses.replace(
            CONTRACT,
            input_name="pixels",
            input_shape=(batch, 4, 4, 3) if is_uint8 else (batch, 3, 4, 4),
            input_type=input_type,
            outputs=outputs,
            output_names=("boxes", "scores", "labels", "images")[: 4 if outputs == "nms" else 3],
        )
        write_sidecar(path, {}, contract)
        return path

    return write


# tensorrt -------------------------------------------------------------------------------------------------------------


def layers_json(plan: bytes, major: int) -> str:
    """What the inspector of that TensorRT says of a graph built as it is: each node a layer, a pair before it INT8."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(plan)).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds.update((value.name, value.type.tensor_type.elem_type) for value in (*graph.input, *graph.value_info))
    words = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.FLOAT16: "FP16 format", onnx.TensorProto.INT64: "Int64"}
    integers = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    layers = []
    for node in graph.node:
        inputs = []
        for name in filter(None, node.input):
            word = "Int8 format" if name in integers else words.get(kinds.get(name, 0), "Bool")
            split = {"Format": "Row major linear", "DataType": word}
            inputs.append({"Name": name, **({"Format/Datatype": f"Row major linear {word}"} if major < 11 else split)})
        kind = "CaskConvolution" if node.op_type == "Conv" else "Reformat" if node.op_type == "Cast" else node.op_type
        layers.append({"Name": node.name or node.output[0], "LayerType": kind, "Inputs": inputs, "Outputs": []})
    return json.dumps({"Layers": layers, "Bindings" if major < 11 else "I/O Tensors": []})


def tensorrt_stand_in(version: str) -> ModuleType:
    """
    A module with the part of tensorrt that is used here, as `version` has it.

    Its `test` says what was done (flags, config, network, ...) and what shall go wrong (parser_errors, build_error,
    shift_px) or be otherwise (dla_cores, takes_cache, inspector: what the inspector says of any engine).
    """
    major = int(version.split(".")[0])
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.test = test = SimpleNamespace(
        flags=None, config=None, parser_errors=[], build_error="", shift_px=0.0, network=None, parser_flags=[],
        dla_cores=0, takes_cache=True, inspector=None,
    )  # fmt: skip

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

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: Dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = (min, opt, max)

    class IInt8EntropyCalibrator2:
        def __init__(self) -> None:
            self._is_initialised = True

    class IBuilderConfig:
        builder_optimization_level = 3
        hardware_compatibility_level: Any = None
        profiling_verbosity: Any = None
        default_device_type: Any = None
        DLA_core = -1
        progress_monitor: Any = None
        int8_calibrator: Any = None

        def __init__(self) -> None:
            self._cleared: List[Any] = []
            self._flags: List[Any] = []
            self._pools: Dict[Any, int] = {}
            self._cache: Optional[ITimingCache] = None
            self._profiles: List[Any] = []
            self._calibration_profile: Any = None

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and not hasattr(type(self), name):
                raise AttributeError(f"as pybind11: IBuilderConfig of TensorRT {version} has no {name}")
            object.__setattr__(self, name, value)

        def clear_flag(self, flag: Any) -> None:
            self._cleared.append(flag)

        def set_flag(self, flag: Any) -> None:
            self._flags.append(flag.name)

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def set_calibration_profile(self, profile: IOptimizationProfile) -> bool:
            self._calibration_profile = profile
            return True

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[pool] = pool_size

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return ignore_mismatch or not cache._content.startswith(b"foreign")

        def get_timing_cache(self) -> Optional[ITimingCache]:
            return self._cache

    class ITensor:
        def __init__(self, name: str, shape: Tuple[int, ...], dtype: Any) -> None:
            self.name, self.shape, self.dtype = name, shape, dtype

    class ILayer:
        precision: Any = None

        def __init__(self, inputs: List[ITensor], outputs: List[ITensor]) -> None:
            self._inputs, self._outputs = inputs, outputs
            self._output_types: Dict[int, Any] = {}
            self.num_inputs, self.num_outputs = len(inputs), len(outputs)

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

        def get_output(self, index: int) -> ITensor:
            return self._outputs[index]

        def set_output_type(self, index: int, dtype: Any) -> None:
            self._output_types[index] = dtype

    class INetworkDefinition:
        """One layer for each node, but two for a Softmax, as the real parser makes several of some nodes."""

        def __init__(self) -> None:
            self._model = b""
            self._layers: List[ILayer] = []
            self._inputs: List[ITensor] = []
            self.num_layers = self.num_inputs = 0

        def get_layer(self, index: int) -> ILayer:
            return self._layers[index]

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

        def _parse(self, model: bytes) -> None:
            import onnx

            graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(model)).graph
            tensors, long = {}, getattr(trt.DataType, "INT64", trt.DataType.INT32)
            for value in (*graph.input, *graph.value_info, *graph.output):
                kind = value.type.tensor_type
                dtype = trt.DataType.FLOAT if kind.elem_type == onnx.TensorProto.FLOAT else long
                sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim)
                tensors[value.name] = ITensor(value.name, sizes, dtype)
            for node in graph.node:
                inputs, outputs = (
                    [tensors[name] for name in names if name in tensors] for names in (node.input, node.output)
                )
                if node.op_type == "Softmax":
                    name = f"(Unnamed Layer* {len(self._layers)}) [Shuffle]_output"
                    between = ITensor(name, inputs[0].shape, trt.DataType.FLOAT)
                    self._layers.append(ILayer(inputs, [between]))
                    inputs = [between]
                self._layers.append(ILayer(inputs, outputs))
            self._model, self._inputs = model, [tensors[value.name] for value in graph.input]
            self.num_layers, self.num_inputs = len(self._layers), len(self._inputs)

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            check_base(logger)
            self._logger = logger
            self.num_DLA_cores = test.dla_cores

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            test.flags = flags
            test.network = INetworkDefinition()
            return test.network

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def create_builder_config(self) -> IBuilderConfig:
            test.config = IBuilderConfig()
            return test.config

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Optional[memoryview]:
            if test.build_error:
                self._logger.log(ILogger.Severity.WARNING, "something else")
                self._logger.log(ILogger.Severity.ERROR, test.build_error)
                return None
            calibrator = getattr(config, "int8_calibrator", None)
            if calibrator is not None:
                check_base(calibrator)
                test.cache = calibrator.read_calibration_cache()
                if not test.takes_cache and not calibrator.get_batch(["images"]):
                    self._logger.log(ILogger.Severity.ERROR, "no calibration data")
                    return None
            if major < 10:
                return memoryview(network._model)
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

        def node(self) -> int:
            return 7

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
            self._network._parse(model)
            return not test.parser_errors

        def set_flag(self, flag: Any) -> None:
            test.parser_flags.append(flag.name)

        def get_error(self, index: int) -> ParserError:
            return ParserError(*test.parser_errors[index])

    class EngineInspector:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine

        def get_engine_information(self, format: Any) -> str:
            return layers_json(self._engine._plan, major) if test.inspector is None else test.inspector

    test.cuda = None  # the stand-in for CUDA, once it is there
    test.profile = (1, 2, 4)  # fewest, usual and most images of a dynamic batch
    test.most_rows = 100  # the bound of an output whose size depends on the data
    test.context_error = test.run_error = test.capture_error = ""
    test.runtime = test.context = None  # the last of each

    class IOutputAllocator:
        def __init__(self) -> None:
            self._is_initialised = True

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._shapes: Dict[str, Tuple[int, ...]] = {}
            self._addresses: Dict[str, int] = {}
            self._allocators: Dict[str, Any] = {}
            self._runs = 0  # without those of a CUDA graph

        def set_input_shape(self, name: str, shape: Tuple[int, ...]) -> bool:
            fewest, _, most = self._engine.get_tensor_profile_shape(name, 0)
            self._shapes[name] = shape
            return all(low <= size <= high for low, size, high in zip(fewest, shape, most, strict=True))

        def get_tensor_shape(self, name: str) -> Tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            # Names of sizes: the input's first is the batch, any other depends on the data.
            sizes, batch = self._engine._sizes[name], self._engine._sizes[self._engine.get_tensor_name(0)][0]
            known = {batch: self._shapes[self._engine.get_tensor_name(0)][0]} if self._shapes else {}
            return tuple(size if isinstance(size, int) else known.get(size, -1) for size in sizes)

        def get_max_output_size(self, name: str) -> int:
            sizes = (size if size >= 0 else test.most_rows for size in self.get_tensor_shape(name))
            return int(np.prod(list(sizes))) * self._engine._dtype(name).itemsize

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return name in self._engine._tensors

        def set_output_allocator(self, name: str, output_allocator: IOutputAllocator) -> bool:
            check_base(output_allocator)
            self._allocators[name] = output_allocator
            return name in self._engine._tensors

        def execute_async_v3(self, stream_handle: int) -> bool:
            if test.cuda is not None and test.cuda.captured is not None:
                if test.capture_error:
                    self._engine._logger.log(ILogger.Severity.ERROR, test.capture_error)
                    return False
                test.cuda.captured.append(self._run)
                return True
            if test.run_error:
                self._engine._logger.log(ILogger.Severity.ERROR, test.run_error)
                return False
            self._runs += 1
            return self._run()

        def _run(self) -> bool:
            name, *names = self._engine._tensors
            shape, dtype = self.get_tensor_shape(name), self._engine._dtype(name)
            memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
            found = self._engine._session.run(names, {name: np.frombuffer(memory, dtype).reshape(shape)})
            for name, values in zip(names, found, strict=True):
                values = np.ascontiguousarray(values, self._engine._dtype(name))
                if name == "boxes":
                    values = values + values.dtype.type(test.shift_px)
                address = self._addresses[name]
                if name in self._allocators:
                    allocator, size = self._allocators[name], max(1, values.nbytes)
                    if major < 10:
                        address = allocator.reallocate_output(name, address, size, 256)
                    else:
                        address = allocator.reallocate_output_async(name, address, size, 256, 77)
                    if not address:
                        return False
                    allocator.notify_shape(name, values.shape)
                ctypes.memmove(address, values.ctypes.data, values.nbytes)
            return True

    class ICudaEngine:
        def __init__(self, plan: bytes, logger: ILogger) -> None:
            self._plan, self._logger = bytes(plan), logger
            self._session = unoptimised_session(self._plan)
            kinds = {"tensor(float)": "FLOAT", "tensor(uint8)": "UINT8", "tensor(int64)": "INT64"}
            if major < 10:
                kinds["tensor(int64)"] = "INT32"
            ios = [*self._session.get_inputs(), *self._session.get_outputs()]
            self._tensors = {io.name: trt.DataType[kinds[io.type]] for io in ios}  # the input first
            self._sizes = {io.name: tuple(io.shape) for io in ios}
            self.num_io_tensors = len(self._tensors)

        def _dtype(self, name: str) -> np.dtype:
            kinds = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64}
            return np.dtype(kinds[self._tensors[name].name])

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_shape(self, name: str) -> Tuple[int, ...]:
            return tuple(size if isinstance(size, int) else -1 for size in self._sizes[name])

        def get_tensor_dtype(self, name: str) -> Any:
            return self._tensors[name]

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> List[Tuple[int, ...]]:
            return [(size, *self._sizes[name][1:]) for size in test.profile]

        def create_execution_context(self) -> Optional[IExecutionContext]:
            if test.context_error:
                self._logger.log(ILogger.Severity.ERROR, test.context_error)
                return None
            test.context = IExecutionContext(self)
            return test.context

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector(self)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            check_base(logger)
            self._logger = logger
            self.num_DLA_cores, self.DLA_core = test.dla_cores, -1
            if not version.startswith("8.5"):
                self.engine_host_code_allowed = False
            test.runtime = self

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Optional[ICudaEngine]:
            try:
                return ICudaEngine(serialized_engine, self._logger)
            except Exception as error:  # ONNX Runtime raises a dozen types
                self._logger.log(ILogger.Severity.ERROR, f"no plan: {error}")
                return None

    creation = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}[
        major
    ]
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", creation)
    is_8_5 = version.startswith("8.5")
    flags = ["TF32", "GPU_FALLBACK"]
    flags += [] if major == 11 else ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    flags += [] if is_8_5 else ["VERSION_COMPATIBLE"]
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", flags, start=0)
    trt.DeviceType = enum.Enum("DeviceType", ["GPU", "DLA"])
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED", "NONE"])
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "UINT8", *(["INT64"] * (major >= 10))])
    for part in (
        ILogger, IProgressMonitor, IInt8EntropyCalibrator2, ITimingCache, IOptimizationProfile, IBuilderConfig, ITensor,
        ILayer, INetworkDefinition, Builder, ParserError, OnnxParser, EngineInspector,
    ):  # fmt: skip
        setattr(trt, part.__name__, part)
    if is_8_5:
        del IBuilderConfig.builder_optimization_level, IBuilderConfig.hardware_compatibility_level, OnnxParser.set_flag
    else:
        trt.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"])
        trt.OnnxParserFlag = enum.Enum("OnnxParserFlag", ["NATIVE_INSTANCENORM"])
    if major < 10:
        del IBuilderConfig.progress_monitor, ParserError.node_name, ParserError.node_operator, trt.IProgressMonitor
    if major == 11:
        del IBuilderConfig.int8_calibrator, IBuilderConfig.set_calibration_profile, trt.IInt8EntropyCalibrator2
        del ILayer.precision, ILayer.set_output_type
    for part in (IOutputAllocator, IExecutionContext, ICudaEngine, Runtime):
        setattr(trt, part.__name__, part)
    return trt


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch, fake_cuda: Any) -> Callable[[str], Any]:
    """`fake_tensorrt("11.4.0.106")` puts the stand-in of that version in place of the module tensorrt."""

    def install(version: str) -> Any:
        trt = tensorrt_stand_in(version)
        trt.test.cuda = fake_cuda
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return install


# CUDA -----------------------------------------------------------------------------------------------------------------


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Copy(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Capture(enum.Enum):
    cudaStreamCaptureModeThreadLocal = 1


def cuda_python_stand_in() -> ModuleType:
    """
    `cuda.bindings.runtime` on host memory.

    `memory` has what is allocated, `handles` what was created and lives; `full` makes the next of either fail,
    `capture_fails` the next capture. `captured` is what the stream records during a capture, else None.
    """
    runtime: Any = ModuleType("cuda.bindings.runtime")
    runtime.memory, runtime.freed, runtime.full = {}, [], False
    runtime.handles, runtime.captured, runtime.capture_fails, runtime.launches = {}, None, False, 0
    runtime.cudaError_t, runtime.cudaMemcpyKind, runtime.cudaStreamNonBlocking = Status, Copy, 1
    runtime.cudaStreamCaptureMode = Capture

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
        assert runtime.captured is None
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

    def create(value: Any) -> Tuple[Any, ...]:
        if runtime.full:
            return Status.cudaErrorMemoryAllocation, None
        handle = 77 if value == "stream" else 1000 + next(numbers)
        runtime.handles[handle] = value
        return Status.cudaSuccess, handle

    def destroy(handle: int) -> Tuple[Any, ...]:
        del runtime.handles[handle]
        return (Status.cudaSuccess,)

    def record(event: int, stream: int) -> Tuple[Any, ...]:
        assert runtime.captured is None
        runtime.handles[event] = time.perf_counter()
        return (Status.cudaSuccess,)

    def begin(stream: int, mode: Capture) -> Tuple[Any, ...]:
        runtime.captured = []
        return (Status.cudaSuccess,)

    def end(stream: int) -> Tuple[Any, ...]:
        steps, runtime.captured = runtime.captured, None
        if runtime.capture_fails:
            return Status.cudaErrorStreamCaptureUnsupported, None
        return create(steps)

    def launch(graph: int, stream: int) -> Tuple[Any, ...]:
        runtime.launches += 1
        for step in runtime.handles[graph]:
            step()
        return (Status.cudaSuccess,)

    numbers = itertools.count()
    runtime.cudaStreamCreateWithFlags = lambda flags: create("stream")
    runtime.cudaEventCreate = lambda: create(None)
    runtime.cudaGraphInstantiateWithFlags = lambda graph, flags: create(runtime.handles[graph])
    runtime.cudaStreamDestroy = runtime.cudaEventDestroy = destroy
    runtime.cudaGraphDestroy = runtime.cudaGraphExecDestroy = destroy
    runtime.cudaEventRecord, runtime.cudaGraphLaunch = record, launch
    runtime.cudaEventElapsedTime = lambda start, end: (
        Status.cudaSuccess,
        1e3 * (runtime.handles[end] - runtime.handles[start]),
    )
    runtime.cudaStreamBeginCapture, runtime.cudaStreamEndCapture = begin, end
    runtime.cudaGetLastError = lambda: (Status.cudaSuccess,)
    runtime.cudaStreamSynchronize = lambda stream: (Status.cudaSuccess,)
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
