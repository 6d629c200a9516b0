"""
Types of an ONNX graph: FP32 -> FP16 with the decoding left in FP32, and what a Q/DQ graph must look like for TensorRT.

TensorRT 11 takes precision from the graph alone, and TensorRT 10 can (strong typing): this is where the graph says so.
Runs on a board: needs onnx and numpy, no ONNX Runtime, whose `float16` converter also sends every value between two
FP32 nodes through FP16, where boxes above 512 pixels are rounded to half a pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Set

import numpy as np

from deploy.errors import EngineBuildError
from deploy.graph import constants, remove_unused

if TYPE_CHECKING:
    import onnx

CONVOLUTIONS = ("Conv", "ConvTranspose")
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
FLOAT_ONLY = (
    "Cast", "Exp", "Log", "LogSoftmax", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum", "Softmax",
    "Softplus", "Sqrt",
)  # fmt: skip
"""Kept in FP32 even before a convolution: FP16 overflows or cancels in them. A Cast says its own type."""
FLOAT_INPUTS = {"Resize": (1, 2)}
"""Operator -> inputs (roi, scales) that ONNX wants, or lets be, in FP32 when the data are FP16."""
HALF_QUANTISERS_OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take FP16 (onnx.ai, changelog of the operators)."""
SMALLEST_HALF = float(np.float16(2.0**-24))


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether the graph has QuantizeLinear or DequantizeLinear nodes."""
    return any(node.op_type in QUANTISERS for node in model.graph.node)


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


def half_from_float(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    A copy of an FP32 model in which everything up to and with the last convolutions is FP16 and the rest is FP32.

    Backbone, neck and head are FP16; softmax, box arithmetic and top-k behind the last convolution see FP32 alone, and
    inputs and outputs of the graph keep their types. Q/DQ before a convolution get FP16 scales, for which the graph is
    raised to opset 19.

    The result is for TensorRT. ONNX Runtime 1.31 gives wrong detections for FP16 Q/DQ unless its optimiser pass
    WeightBiasQuantization is disabled.

    Args:
        model: checked, static, FP32, its nodes in topological order.

    Raises:
        EngineBuildError: a constant lies beyond FP16, or the graph cannot be raised to opset 19.
    """
    import onnx

    typed = onnx.ModelProto()
    typed.CopyFrom(_with_half_quantisers(model) if is_quantised(model) else model)
    _Rewriter(typed).rewrite()
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


def _half_nodes(graph: onnx.GraphProto) -> Set[int]:
    """Indices of the nodes to run in FP16: convolutions and what leads to one, but for FLOAT_ONLY."""
    leads_to_convolution: Set[str] = set()
    half = set()
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if node.op_type in CONVOLUTIONS or leads_to_convolution.intersection(node.output):
            leads_to_convolution.update(name for name in node.input if name)  # '' is an optional input left out
            if node.op_type not in FLOAT_ONLY:
                half.add(index)
    return half


class _Rewriter:
    """Turns the chosen nodes of a graph to FP16 in place, with one Cast per tensor that crosses between the types."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.float, self.half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
        self.graph = model.graph
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        self.types = {
            value.name: value.type.tensor_type.elem_type
            for values in (inferred.input, inferred.value_info, inferred.output)
            for value in values
        }
        self.constants = constants(model)
        self.types.update((name, tensor.data_type) for name, tensor in self.constants.items())
        self.outputs = {value.name for value in model.graph.output}
        self.nodes: List[onnx.NodeProto] = []
        self.twins: Dict[str, str] = {}
        """Tensor name -> the same tensor in the other type."""
        self.new_constants: Dict[str, onnx.TensorProto] = {}

    def rewrite(self) -> None:
        half = _half_nodes(self.graph)
        for index, node in enumerate(self.graph.node):
            is_half = index in half and any(self.types.get(name) in (self.float, self.half) for name in node.input)
            for position, name in enumerate(node.input):
                to_half = is_half and position not in FLOAT_INPUTS.get(node.op_type, ())
                node.input[position] = self.as_type(name, self.half if to_half else self.float, node, position)
            self.nodes.append(node)
            if is_half:
                self.make_outputs_half(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(self.new_constants.values())

    def as_type(self, name: str, wanted: int, node: onnx.NodeProto, position: int) -> str:
        """The name of tensor `name` in the wanted type; what is no floating-point tensor stays as it is."""
        found = self.types.get(name)
        if found == wanted or found not in (self.float, self.half):
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
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(np.isfinite(values), np.isfinite(half)):
            raise EngineBuildError(
                f"constant {name!r} reaches {np.abs(values).max():g}; FP16 ends at 65504. "
                "Build with FP32, or rescale the model."
            )
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
