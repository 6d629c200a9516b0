"""
Types of an ONNX graph: what runs in FP16 and what has to stay FP32, and what a Q/DQ graph must look like for TensorRT.

TensorRT 11 takes precision from the graph alone, and TensorRT 10 can (strong typing): `half_from_float` is where the
graph says so. TensorRT 8 takes an FP32 graph and chooses itself where flags let it: there the same decision is a list
of tensors that are to be FP32. `typed_graph` makes each of these forms from the one ONNX file.

Runs on a board: needs onnx and numpy, no ONNX Runtime, whose `float16` converter also sends every value between two
FP32 nodes through FP16, where boxes above 512 pixels are rounded to half a pixel.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Set, Tuple

import numpy as np

from deploy.errors import ContractError, EngineBuildError
from deploy.graphs.calibration_cache import amax_from_quantised, float_from_quantised, tensors_before_pairs
from deploy.graphs.graph import constants, consumers, remove_unused, write_kernel_shapes
from deploy.graphs.products import COORDINATES, Products

if TYPE_CHECKING:
    import onnx

QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
FLOAT_ONLY = (
    "Cast", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax",
    "LpNormalization", "MeanVarianceNormalization", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "Softmax", "Softplus", "Sqrt",
)  # fmt: skip
"""
Kept in FP32 even before a convolution: FP16 overflows or cancels in them. A Cast says its own type.

Norms square x - mean, which leaves FP16 at 255; a strongly typed network computes them in the type of their inputs
(NvInfer.h 10.3, INormalizationLayer::setComputePrecision).
"""
GROWING_OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul",
    "InstanceNormalization", "GroupNormalization", "LayerNormalization",
)  # fmt: skip
"""Operators whose outputs can be larger than their inputs: where FP16 may overflow, which a sidecar's `ranges` tell."""
UNTYPED = ("GroupNormalization",)
"""Operators of FLOAT_ONLY of whose results onnx's shape inference says nothing: what the file says is kept."""
FLOAT_INPUTS = {"Resize": (1, 2)}
"""Operator -> inputs (roi, scales) that ONNX wants, or lets be, in FP32 when the data are FP16."""
KEEPS_RANGE = (*QUANTISERS, "Identity", "MaxPool", "Relu", "Reshape", "Resize", "Transpose")
"""Operators whose output reaches no further than their first input."""
HALF_QUANTISERS_OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take FP16 (onnx.ai, changelog of the operators)."""
SMALLEST_HALF = float(np.float16(2.0**-24))
LARGEST_HALF = 65504.0
LARGEST_SEEN = LARGEST_HALF / 2
"""Of an activation in calibration: other images reach further."""
GRAPHS = ("fp32", "fp16", "int8", "int8_fp32_scales", "int8_tensorrt8")
"""The forms that `typed_graph` makes, and `deploy.tensorrt.options.recipe_for` asks for.

fp32: no Q/DQ. fp16: FP16 up to the last products. int8: the same with Q/DQ of FP16 scales. int8_fp32_scales: FP32
with Q/DQ of FP32 scales. int8_tensorrt8: the same without Q/DQ on the convolutions of `without_kernel_in_8`.
"""
NOTHING_SEEN: Mapping[str, Any] = {}
BEHIND = "behind the final predictions, where boxes, scores and places to read are made"
UNSAFE = "exponents, roots, sums, squares, norms: FP16 overflows or cancels in them"
PLACES = "reads between pixels: FP16 is too coarse for places"


@dataclasses.dataclass(frozen=True)
class TypedGraph:
    """A graph in one of GRAPHS."""

    model: onnx.ModelProto
    float_tensors: Tuple[str, ...]
    """What has to stay FP32, for a TensorRT that chooses types itself."""
    kept: Dict[str, List[str]]
    """Why nodes stay FP32 where others are FP16 -> their names."""
    float_convolutions: Tuple[str, ...] = ()
    """Names of convolutions that have Q/DQ in the file and none in this form: FloatReason.DEPTHWISE."""
    growing: int = 0
    """How many tensors are in FP16, or would be if it could hold them, that may be larger than what they come from."""
    unseen: Tuple[str, ...] = ()
    """Those of them in FP16 whose ranges nobody knows."""


def typed_graph(
    model: onnx.ModelProto, graph: str, details: Mapping[str, Any], further: Mapping[str, Any] = NOTHING_SEEN
) -> TypedGraph:
    """
    The model with the types that a build of TensorRT needs: one of GRAPHS.

    Args:
        model: checked, its nodes in topological order, FP32; with Q/DQ for the forms of INT8. "fp32" and "fp16" of one
            with Q/DQ are those of the float graph below them.
        details: of the sidecar of the model's file, for `largest_values`.
        further: tensor -> [smallest, largest], of `deploy.graphs.known_ranges.known_ranges`.

    Raises:
        EngineBuildError: the graph does not go with the form, or has no valid FP16 form.
        ContractError: as `largest_values`.
    """
    amax = largest_values(model, details)
    for name, value in largest_values(model, {"ranges": further}).items():
        amax[name] = max(value, amax.get(name, 0.0))
    if graph.startswith("int8"):
        check_symmetric_int8(model)
        model = copy.deepcopy(model)
        write_kernel_shapes(model)
    elif is_quantised(model):
        model = float_from_quantised(model)
    left_out: List[str] = []
    if graph == "int8_tensorrt8":
        model, left_out = _without_pairs(model, without_kernel_in_8(model))
    kept = float_nodes(model, amax)
    names: Dict[str, List[str]] = {}
    for index, reason in kept.items():
        node = model.graph.node[index]
        names.setdefault(reason, []).append(node.name or node.output[0])
    typed = half_from_float(model, amax) if graph in ("fp16", "int8") else model
    growing = _growing_tensors(model)
    unseen = tuple(name for name in growing if name not in amax)
    return TypedGraph(typed, tuple(_float_outputs(model, kept)), names, tuple(left_out), len(growing), unseen)


def _growing_tensors(model: onnx.ModelProto) -> List[str]:
    """The outputs of GROWING_OPS that are FP16 unless they are seen to be larger."""
    kept, floating = float_nodes(model, NOTHING_SEEN), float_tensors(model)
    nodes = [node for index, node in enumerate(model.graph.node) if index not in kept]
    return [node.output[0] for node in nodes if node.op_type in GROWING_OPS and node.output[0] in floating]


def without_kernel_in_8(model: onnx.ModelProto) -> List[int]:
    """
    Indices of the depthwise convolutions for which TensorRT 8 finds no INT8 implementation.

    With Q/DQ it has one where a ReLU follows and nothing else (TensorRT issues 3385 on 8.5.2, 4060 on 8.6; TensorRT 10
    has the others), also one with an upper end: a Clip from 0, as its inspector shows of a MobileNetV2.
    """
    from onnx import numpy_helper

    known, readers = constants(model), consumers(model)
    before = tensors_before_pairs(model)
    indices = []
    for index, node in enumerate(model.graph.node):
        weight = known.get(before.get(node.input[1], node.input[1])) if node.op_type == "Conv" else None
        groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
        if weight is None or groups == 1 or weight.dims[1] != 1:
            continue
        following = [reader for reader, _ in readers.get(node.output[0], [])]
        if len(following) == 1 and node.output[0] not in {value.name for value in model.graph.output}:
            (reader,) = following
            least = known.get(reader.input[1]) if reader.op_type == "Clip" and len(reader.input) > 1 else None
            if reader.op_type == "Relu" or (least is not None and not numpy_helper.to_array(least).any()):
                continue
        indices.append(index)
    return indices


def _without_pairs(model: onnx.ModelProto, indices: List[int]) -> Tuple[onnx.ModelProto, List[str]]:
    """A copy in which the nodes read what their Q/DQ pairs round, and the names of those that had any."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    before = tensors_before_pairs(result)
    changed = []
    for node in (result.graph.node[index] for index in indices):
        if before.keys() & set(node.input):
            node.input[:] = [before.get(name, name) for name in node.input]
            changed.append(node.name or node.output[0])
    remove_unused(result)
    return result, changed


def largest_values(model: onnx.ModelProto, details: Mapping[str, Any]) -> Dict[str, float]:
    """
    Tensor -> largest absolute value that calibration saw.

    Args:
        model: where it has Q/DQ, their scales say it.
        details: of the file's sidecar; `ranges`, tensor -> [smallest, largest], says it of further tensors.

    Raises:
        ContractError: `ranges` is something else.
    """
    amax = amax_from_quantised(model)
    try:
        for name, (smallest, largest) in details.get("ranges", {}).items():
            amax[name] = max(abs(float(smallest)), abs(float(largest)), amax.get(name, 0.0))
    except (AttributeError, TypeError, ValueError) as error:
        raise ContractError(
            f"the sidecar's details have ranges that are not tensor -> [smallest, largest] ({error}); quantise the "
            "model again"
        ) from error
    return amax


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether the graph has QuantizeLinear or DequantizeLinear nodes."""
    return any(node.op_type in QUANTISERS for node in model.graph.node)


def is_symmetric_int8(model: onnx.ModelProto) -> bool:
    """Whether a quantised graph is one that `check_symmetric_int8` takes."""
    try:
        check_symmetric_int8(model)
    except EngineBuildError:
        return False
    return True


def check_symmetric_int8(model: onnx.ModelProto) -> None:
    """
    Raises EngineBuildError unless every Q and DQ has an int8 zero point of 0, the only kind that TensorRT runs.

    A missing zero point is uint8 in ONNX, and refused too.
    """
    from onnx import numpy_helper

    known = constants(model)
    for node in model.graph.node:
        if node.op_type not in QUANTISERS:
            continue
        tensor = known.get(node.input[2]) if len(node.input) > 2 else None
        values = None if tensor is None else numpy_helper.to_array(tensor)
        if values is None or values.dtype != np.int8 or np.any(values):
            found = "none" if values is None else f"{values.dtype} {values.ravel()[:3].tolist()}"
            raise EngineBuildError(
                f"{node.op_type} {node.name!r} has the zero point {found}; TensorRT runs int8 with zero point 0 only. "
                "The graph was quantised for target onnxruntime: quantise the float model again with --target tensorrt."
            )


def float_nodes(model: onnx.ModelProto, amax: Mapping[str, float]) -> Dict[int, str]:
    """
    Index -> reason, of each node with floating-point results that stays FP32 when the others become FP16.

    FP16 are convolutions, matrix products by a constant, and what leads to one, but for what is behind the final
    predictions, FLOAT_ONLY and COORDINATES, and for what reads or writes a constant or an activation beyond FP16.

    Args:
        model: checked, its nodes in topological order.
        amax: tensor -> largest absolute value in calibration.
    """
    known = _float_constants(model)
    beyond = {name: f"the activation {name} reached {value:g}" for name, value in amax.items() if value > LARGEST_SEEN}
    for name, values in known.items():
        finite = np.abs(values[np.isfinite(values)])
        if finite.size and finite.max() > LARGEST_HALF:
            beyond[name] = f"the constant {name} reaches {finite.max():g}"
    leading, floating = _leading_to_products(model), float_tensors(model)
    kept = {}
    for index, node in enumerate(model.graph.node):
        if (
            node.op_type == "Constant"
            or node.output[0] in known
            or not floating.intersection((*node.input, *node.output))
        ):
            continue
        apart = FLOAT_INPUTS.get(node.op_type, ())
        touched = [*(name for i, name in enumerate(node.input) if i not in apart), *node.output]
        reasons = [beyond[name] for name in touched if name in beyond]
        if index not in leading:
            kept[index] = BEHIND
        elif node.op_type in FLOAT_ONLY or _is_square(node):
            kept[index] = UNSAFE
        elif node.op_type in COORDINATES:
            kept[index] = PLACES
        elif reasons:
            kept[index] = f"FP16 ends at {LARGEST_HALF:g}, {reasons[0]}"
        if node.op_type in KEEPS_RANGE and node.input[0] in beyond and node.output[0] not in amax:
            beyond.setdefault(node.output[0], beyond[node.input[0]])
    return kept


def _is_square(node: onnx.NodeProto) -> bool:
    return node.op_type == "Mul" and node.input[0] == node.input[1]


def _leading_to_products(model: onnx.ModelProto) -> Set[int]:
    """
    Indices of the products by a weight and of what they depend on, but for that which only says where to read.

    Nor are those among them that are behind a final prediction: of a decoder with several layers, each layer reads the
    boxes of the one before.
    """
    import onnx

    places = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    types, products = _types(model), Products(model)
    by_weight = {node.output[0] for node in products.nodes if products.weight(node) is not None}
    needed: Set[str] = set()
    indices = set()
    for index in range(len(model.graph.node) - 1, -1, -1):
        node = model.graph.node[index]
        is_product = node.op_type in ("Conv", "ConvTranspose") or node.output[0] in by_weight
        if is_product or needed.intersection(node.output):
            values = [name for i, name in enumerate(node.input) if i != COORDINATES.get(node.op_type)]
            needed.update(name for name in values if name and types.get(name) not in places)
            if products.behind.isdisjoint(node.output):
                indices.add(index)
    return indices


def _float_constants(model: onnx.ModelProto) -> Dict[str, np.ndarray]:
    import onnx
    from onnx import numpy_helper

    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in constants(model).items()
        if tensor.data_type == onnx.TensorProto.FLOAT
    }


def float_tensors(model: onnx.ModelProto) -> Set[str]:
    """Names of the FP32 tensors: inputs, results and constants."""
    import onnx

    return {name for name, kind in _types(model).items() if kind == onnx.TensorProto.FLOAT}


def _float_outputs(model: onnx.ModelProto, kept: Mapping[int, str]) -> List[str]:
    """FP32 results of the kept nodes, but for Q/DQ, whose types TensorRT knows."""
    floating = float_tensors(model)
    nodes = [model.graph.node[index] for index in kept]
    return [name for node in nodes if node.op_type not in QUANTISERS for name in node.output if name in floating]


def _types(model: onnx.ModelProto) -> Dict[str, int]:
    """Tensor -> its type, of inputs, results and constants."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for values in (inferred.input, inferred.value_info, inferred.output)
        for value in values
    }
    types.update((name, tensor.data_type) for name, tensor in constants(model).items())
    return types


def half_from_float(model: onnx.ModelProto, amax: Mapping[str, float] = NOTHING_SEEN) -> onnx.ModelProto:
    """
    A copy of an FP32 model in which everything up to and with the final predictions is FP16 and the rest is FP32.

    Backbone, neck and head are FP16, but for the nodes of `float_nodes`; softmax, box arithmetic and top-k behind the
    predictions see FP32 alone, and inputs and outputs of the graph keep their types. Q/DQ before a product get FP16
    scales, for which the graph is raised to opset 19.

    The result is for TensorRT. ONNX Runtime 1.31 gives wrong detections for FP16 Q/DQ unless its optimiser pass
    WeightBiasQuantization is disabled.

    Args:
        model: checked, FP32, its nodes in topological order.
        amax: tensor -> largest absolute value in calibration.

    Raises:
        EngineBuildError: the graph cannot be raised to opset 19.
    """
    import onnx

    typed = onnx.ModelProto()
    typed.CopyFrom(_with_half_quantisers(model) if is_quantised(model) else model)
    _Rewriter(typed, set(float_nodes(typed, amax))).rewrite()
    remove_unused(typed)
    try:
        onnx.checker.check_model(typed, full_check=True)
    except Exception as error:  # the checker and shape inference raise different types
        raise EngineBuildError(
            f"the FP16 form of the graph is not valid ONNX: {error}. Build with FP32, and report this."
        ) from error
    return typed


def _with_half_quantisers(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import version_converter

    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    try:
        return version_converter.convert_version(model, max(opset, HALF_QUANTISERS_OPSET))
    except Exception as error:  # onnx raises RuntimeError, ConvertError and others here
        raise EngineBuildError(
            f"the graph cannot be raised from opset {opset} to {HALF_QUANTISERS_OPSET}: {error}"
        ) from error


class _Rewriter:
    """Turns the chosen nodes of a graph to FP16 in place, with one Cast per tensor that crosses between the types."""

    def __init__(self, model: onnx.ModelProto, kept: Set[int]) -> None:
        import onnx

        self.float, self.half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
        self.graph = model.graph
        self.kept = kept
        self.types = _types(model)
        self.constants = constants(model)
        self.outputs = {value.name for value in model.graph.output}
        self.nodes: List[onnx.NodeProto] = []
        self.twins: Dict[str, str] = {}
        """Tensor name -> the same tensor in the other type."""
        self.new_constants: Dict[str, onnx.TensorProto] = {}

    def rewrite(self) -> None:
        for index, node in enumerate(self.graph.node):
            is_half = index not in self.kept and any(
                self.types.get(name) in (self.float, self.half) for name in node.input
            )
            for position, name in enumerate(node.input):
                to_half = is_half and position not in FLOAT_INPUTS.get(node.op_type, ())
                node.input[position] = self.as_type(name, self.half if to_half else self.float, node, position)
            self.nodes.append(node)
            if is_half:
                self.make_outputs_half(node)
        told = {name for node in self.nodes if node.op_type in UNTYPED for name in node.output}
        told_types = [value for value in self.graph.value_info if value.name in told]
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.value_info.extend(told_types)
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(self.new_constants.values())

    def as_type(self, name: str, wanted: int, node: onnx.NodeProto, position: int) -> str:
        """The name of tensor `name` in the wanted type; what is no floating-point tensor stays as it is."""
        given = self.types.get(name)
        if given == wanted or given not in (self.float, self.half):
            return name
        if name not in self.twins:
            if name in self.constants and wanted == self.half:
                is_scale = node.op_type in QUANTISERS and position == 1
                self.twins[name] = self.half_constant(name, SMALLEST_HALF if is_scale else 0.0)
            else:
                self.twins[name] = self.cast(name, f"{name}_{'float16' if wanted == self.half else 'float32'}", wanted)
        return self.twins[name]

    def half_constant(self, name: str, at_least: float) -> str:
        from onnx import numpy_helper

        values = numpy_helper.to_array(self.constants[name])
        with np.errstate(over="ignore"):  # beyond FP16 is infinity, which a mask or a limit may mean
            half = values.astype(np.float16)
        if at_least:
            half = np.maximum(half, np.float16(at_least))  # TensorRT refuses a scale of 0
        half_name = f"{self.constants[name].name}_float16"  # one for all the names of a shared weight
        self.new_constants[half_name] = numpy_helper.from_array(half, half_name)
        return half_name

    def make_outputs_half(self, node: onnx.NodeProto) -> None:
        for position, name in enumerate(node.output):
            if self.types.get(name) != self.float:
                continue
            if name in self.outputs:  # the graph's outputs keep name and type
                node.output[position] = f"{name}_float16"
                self.cast(node.output[position], name, self.float)
            else:
                self.types[name] = self.half

    def cast(self, source: str, target: str, to: int) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to))
        return target
