"""
The part of TensorRT's Python API that is used here, for any version: engines run on ONNX Runtime, in host memory.

The engine is the parsed ONNX graph and the device's memory is the host's, so that all that is above the bindings is
real. It refuses what the real one does where that has cost somebody a day (facts of its sources, in the code below).
tests/deploy/tensorrt/test_bindings.py compares names and signatures with those of the real bindings.
"""

from __future__ import annotations

import ctypes
import enum
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.stand_ins.cuda import cuda_modules, cuda_python_stand_in

ROOT = Path(__file__).resolve().parents[2]


def unoptimised_session(model: bytes) -> Any:
    """ONNX Runtime on the graph as it is: see `half_from_float` on what its optimiser does to FP16 Q/DQ."""
    import onnx
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < (1, 31) and "QuantizeLinear" in {node.op_type for node in onnx.load_from_string(model).graph.node}:
        import pytest

        pytest.skip(
            f"ONNX Runtime {onnxruntime.__version__} rounds FP16 Q/DQ otherwise (seen on 1.23.2); 1.31 is exact"
        )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def plan_of(model: bytes, **facts: str) -> bytes:
    """The graph, which a plan of the stand-in is, with what a real plan knows beside it."""
    import onnx

    beside = onnx.ModelProto()
    onnx.helper.set_model_props(beside, facts)
    return model + beside.SerializeToString()  # protobuf merges messages that stand one after the other


def facts_of(plan: bytes) -> dict[str, str]:
    """What `plan_of` was told; nothing of a plan that was not made by it."""
    import onnx

    return {entry.key: entry.value for entry in onnx.load_from_string(plan).metadata_props}


NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")


def half_norms(model: Any) -> dict[str, Any]:
    """Tensor -> the norm that reads it in FP16."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    half = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    return {node.input[0]: node for node in graph.node if node.op_type in NORMS and node.input[0] in half}


def overflows_in_half(values: np.ndarray, node: Any) -> bool:
    """Whether a variance of this norm's input is infinite in FP16: |x - mean| above 255 (NvInfer.h of 10.3)."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    values = values.astype(np.float64)
    if node.op_type == "LayerNormalization":
        rows = values.reshape(int(np.prod(values.shape[: attributes.get("axis", -1)])), -1)
    else:
        rows = values.reshape(len(values) * attributes.get("num_groups", values.shape[1]), -1)
    return bool(np.square(rows - rows.mean(1, keepdims=True)).max() > np.finfo(np.float16).max)


def refused_by_importer(model: Any) -> list[tuple[str, str, str]]:
    """(operator, node, reason) of what the parsers of all versions refuse."""
    from onnx import numpy_helper

    counts = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [
        (node.op_type, node.name, f"K is {counts[node.input[1]].item()}, the maximum is 3840")
        for node in model.graph.node
        if node.op_type == "TopK" and node.input[1] in counts and counts[node.input[1]].item() > 3840
    ]


def layers_json(plan: bytes, major: int) -> str:
    """
    The JSON of TensorRT's engine inspector for an engine that has a layer for each node of an ONNX graph.

    An input that comes from a DequantizeLinear is INT8. TensorRT 11 writes types under other keys than those before.
    """
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
    A module with the part of TensorRT's Python API that is used here, as `version` has it.

    Its attribute `test` is the tests' own. It holds what was done (flags, config, network, ...), and takes what shall
    go wrong (parser_errors, build_error, shift_px, ...) or be otherwise (dla_cores, takes_cache, inspector: the JSON of
    any engine's inspector). Each is a process of its own, whose `test.plugins` are registered; what the GPU is, it asks
    `test.cuda`.
    """
    major = int(version.split(".")[0])
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.test = test = SimpleNamespace(
        flags=None, config=None, parser_errors=[], build_error="", shift_px=0.0, network=None, parser_flags=[],
        dla_cores=0, takes_cache=True, inspector=None, plugins=set(),
    )  # fmt: skip

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None:
            self._is_initialised = True

    def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
        check_base(logger)
        test.plugins.add("InstanceNormalization_TRT")
        return True

    def multiprocessors() -> str:
        return str(test.cuda.cudaGetDeviceProperties(0)[1].multiProcessorCount) if test.cuda else ""

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
            self._shapes: dict[str, Any] = {}

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
            self._cleared: list[Any] = []
            self._flags: list[Any] = []
            self._pools: dict[Any, int] = {}
            self._cache: ITimingCache | None = None
            self._profiles: list[Any] = []
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

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

    class ITensor:
        def __init__(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
            self.name, self.shape, self.dtype = name, shape, dtype

    class ILayer:
        precision: Any = None

        def __init__(self, inputs: list[ITensor], outputs: list[ITensor]) -> None:
            self._inputs, self._outputs = inputs, outputs
            self._output_types: dict[int, Any] = {}
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
            self._model, self._plugins = b"", ""
            self._layers: list[ILayer] = []
            self._inputs: list[ITensor] = []
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

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> memoryview | None:
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
            if test.flags and major >= 10:  # strong typing: nothing is cast on its own
                try:
                    unoptimised_session(network._model)
                except Exception as error:  # ONNX Runtime raises a dozen types
                    self._logger.log(ILogger.Severity.ERROR, f"types do not agree: {error}")
                    return None
            plan = plan_of(network._model, plugins=network._plugins, multiprocessors=multiprocessors())
            if major < 10:
                return memoryview(plan)
            check_base(config.progress_monitor)
            config.progress_monitor.phase_start("Building Engine", None, 1)
            config.progress_monitor.phase_start("Timing", "Building Engine", 5)
            config.progress_monitor.step_complete("Timing", 0)
            config.progress_monitor.phase_finish("Timing")
            if not config.progress_monitor.step_complete("Building Engine", 0):
                return None
            config.progress_monitor.phase_finish("Building Engine")
            return memoryview(plan)

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
            init_libnvinfer_plugins(logger, "")  # as the real one does, for this process alone
            self._network = network
            self._native_norms = major >= 10
            self.num_errors = 0

        def parse(self, model: bytes, path: str | None = None) -> bool:
            import onnx

            self._errors = [*test.parser_errors, *refused_by_importer(onnx.load_from_string(model))]
            self.num_errors = len(self._errors)
            self._network._parse(model)
            if not self._native_norms and b"InstanceNormalization" in model:
                self._network._plugins = "InstanceNormalization_TRT"  # NvOnnxParser's importer of 8.5 and 8.6
            return not self._errors

        def set_flag(self, flag: Any) -> None:
            test.parser_flags.append(flag.name)
            self._native_norms = self._native_norms or flag.name == "NATIVE_INSTANCENORM"

        def get_error(self, index: int) -> ParserError:
            return ParserError(*self._errors[index])

    class EngineInspector:
        execution_context: Any = None

        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine

        def get_engine_information(self, format: Any) -> str:
            if test.inspector is not None:
                return test.inspector
            shapes = self._engine._sizes if self.execution_context is None else self.execution_context._shapes
            text = layers_json(self._engine._plan, major)
            name = self._engine.get_tensor_name(0)
            if all(isinstance(size, int) for size in shapes.get(name, self._engine._sizes[name])):
                return text
            return re.sub(r'"((?:Format/)?Data[tT]ype)": "[^"]*"', r'"\1": "N/A due to dynamic shapes"', text)

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
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._allocators: dict[str, Any] = {}
            self._runs = 0  # without those of a CUDA graph

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            fewest, _, most = self._engine.get_tensor_profile_shape(name, 0)
            self._shapes[name] = shape
            return all(low <= size <= high for low, size, high in zip(fewest, shape, most, strict=True))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
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
            built_for = facts_of(self._engine._plan).get("multiprocessors")
            foreign = "Cask unknown internal error" if built_for not in (None, "", multiprocessors()) else ""
            if test.run_error or foreign:
                self._engine._logger.log(ILogger.Severity.ERROR, test.run_error or foreign)
                return False
            self._runs += 1
            return self._run()

        def _run(self) -> bool:
            name, *names = self._engine._tensors
            shape, dtype = self.get_tensor_shape(name), self._engine._dtype(name)
            memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
            norms = self._engine._half_norms
            feed = {name: np.frombuffer(memory, dtype).reshape(shape)}
            found = self._engine._session.run([*names, *norms], feed)
            spoilt = any(overflows_in_half(found.pop(len(names)), node) for node in norms.values())
            for name, values in zip(names, found, strict=True):
                values = np.ascontiguousarray(values, self._engine._dtype(name))
                if spoilt and values.dtype.kind == "f":
                    values = np.full_like(values, np.nan)
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
            import onnx

            self._plan, self._logger = bytes(plan), logger
            model = onnx.load_from_string(self._plan)
            self._half_norms = half_norms(model)
            outputs = [onnx.ValueInfoProto(name=name) for name in self._half_norms]
            seen = onnx.ModelProto(graph=onnx.GraphProto(output=outputs)).SerializeToString()
            self._session = unoptimised_session(self._plan + seen if outputs else self._plan)
            kinds = {"tensor(float)": "FLOAT", "tensor(uint8)": "UINT8", "tensor(int64)": "INT64"}
            if major < 10:
                kinds["tensor(int64)"] = "INT32"
            ios = [*self._session.get_inputs(), *self._session.get_outputs()[: len(model.graph.output)]]
            self._tensors = {io.name: trt.DataType[kinds[io.type]] for io in ios}  # the input first
            self._sizes = {io.name: tuple(io.shape) for io in ios}
            self.num_io_tensors = len(self._tensors)

        def _dtype(self, name: str) -> np.dtype:
            kinds = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64}
            return np.dtype(kinds[self._tensors[name].name])

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(size if isinstance(size, int) else -1 for size in self._sizes[name])

        def get_tensor_mode(self, name: str) -> Any:
            is_input = name in [io.name for io in self._session.get_inputs()]
            return trt.TensorIOMode.INPUT if is_input else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return self._tensors[name]

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            return [(size, *self._sizes[name][1:]) for size in test.profile]

        def create_execution_context(self) -> IExecutionContext | None:
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

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            try:
                facts = facts_of(serialized_engine)
                missing = set(filter(None, [facts.get("plugins")])) - test.plugins
                if missing:
                    raise ValueError(f"getPluginCreator could not find plugin: {', '.join(missing)} version: 1")
                if facts.get("multiprocessors", "") not in ("", multiprocessors()):
                    self._logger.log(ILogger.Severity.WARNING, "Using an engine plan file across different models")
                return ICudaEngine(serialized_engine, self._logger)
            except Exception as error:  # ONNX Runtime raises a dozen types
                self._logger.log(ILogger.Severity.ERROR, f"no plan: {error}")
                return None

    trt.init_libnvinfer_plugins = init_libnvinfer_plugins
    creation = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}[
        major
    ]
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", creation)
    is_8_5 = version.startswith("8.5")
    flags = ["TF32", "GPU_FALLBACK"]
    flags += [] if major == 11 else ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    flags += [] if is_8_5 else ["VERSION_COMPATIBLE"]
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", flags, start=0)
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
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


def install(version: str) -> ModuleType:
    """Puts the stand-ins in place of the modules tensorrt and cuda.bindings.runtime, for the rest of this process."""
    trt: Any = tensorrt_stand_in(version)
    trt.test.cuda = cuda_python_stand_in()
    sys.modules.update({"tensorrt": trt, **cuda_modules(trt.test.cuda)})
    return trt


def write_module(folder: Path, version: str) -> None:
    """Writes folder/tensorrt.py: where a child process has `folder` on its path, `import tensorrt` does `install`."""
    folder.mkdir(exist_ok=True)
    (folder / "tensorrt.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.stand_ins.tensorrt import install\n"
        f"sys.path.remove({str(ROOT)!r})\ninstall({version!r})\n"
    )
