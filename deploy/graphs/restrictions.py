"""
Restrictions of TensorRT's ONNX parser, each as a check of one node. Needs onnx, and no TensorRT.

Those of the table of operators are NVIDIA's (onnx-tensorrt, docs/operators.md); the others were read off the parser's
own source (onnx-tensorrt, onnxOpImporters.cpp and importerUtils.cpp of 8.5-GA to 10.1-GA, 10.6 for Q/DQ, 10.15, with
docs/Changelog.md for what lies between) and the layers' documentation (NvInfer.h). Which holds for which operator and
version stands in operators.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional

import numpy as np

from deploy.graphs.calibration_cache import is_scale
from deploy.graphs.graph import ONNX_DOMAINS, constants, producers

if TYPE_CHECKING:
    import onnx

TYPE_NAMES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "DOUBLE": "FP64", "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
}  # fmt: skip
"""ONNX's name of a type -> the table's, where they differ."""
INTEGERS = ("INT32", "INT64")
MOST_TOP_K = 3840
"""NvInfer.h of each version, ITopKLayer."""
MOST_NMS_BOXES = 5000
"""Of more boxes INMSLayer takes the best 5000 and drops the rest (NvInfer.h), which ONNX Runtime does not."""
MOST_DIMENSIONS = 8


class GraphFacts:
    """What the checks ask about a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.values = {
            value.name: value.type.tensor_type
            for values in (inferred.input, inferred.value_info, inferred.output)
            for value in values
        }
        self.constants = constants(model)
        self.producers = producers(model)
        self.outputs = {value.name for value in model.graph.output}
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS), 1)

    def type_name(self, name: str) -> Optional[str]:
        """The tensor's type as the table writes it, None if unknown."""
        import onnx

        if name in self.constants:
            number = self.constants[name].data_type
        else:
            number = self.values[name].elem_type if name in self.values else onnx.TensorProto.UNDEFINED
        if number == onnx.TensorProto.UNDEFINED:
            return None
        onnx_name = onnx.TensorProto.DataType.Name(number)
        return TYPE_NAMES.get(onnx_name, onnx_name)

    def shape(self, name: str) -> Optional[List[Optional[int]]]:
        """The tensor's sizes, each None if unknown; None if not even their number is known."""
        if name in self.constants:
            return list(self.constants[name].dims)
        if name not in self.values or not self.values[name].HasField("shape"):
            return None
        return [size.dim_value if size.HasField("dim_value") else None for size in self.values[name].shape.dim]

    def value(self, name: str) -> Optional[np.ndarray]:
        """The values of a constant tensor, None for others."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def input(self, node: onnx.NodeProto, name: str) -> str:
        """The tensor at the input that ONNX calls `name`, '' if it is left out."""
        from onnx import defs

        names = [formal.name for formal in defs.get_schema(node.op_type, self.opset, "").inputs]
        index = names.index(name) if name in names else len(node.input)  # older opsets have some as attributes
        return node.input[index] if index < len(node.input) else ""


Check = Callable[[GraphFacts, "onnx.NodeProto"], Optional[str]]


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    from onnx import helper

    value = next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


def _attribute_in(name: str, default: Any, *allowed: Any) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        value = _attribute(node, name, default)
        return None if value in allowed else f"{name} = {value}"

    return check


def _constant(*names: str) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        computed = [
            name for name in names if graph.input(node, name) and graph.input(node, name) not in graph.constants
        ]
        return f"{', '.join(computed)} computed in the graph" if computed else None

    return check


def _rank_of_input(*allowed: int) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        shape = graph.shape(node.input[0])
        return None if shape is None or len(shape) in allowed else f"an input of {len(shape)} dimensions"

    return check


def _kernel_rank(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    rank = len(_attribute(node, "kernel_shape"))
    return None if rank in (2, 3) else f"{rank}-D"


def _no_further_output(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    further = [name for name in node.output[1:] if name]
    return f"the output {', '.join(further)}" if further else None


def _no_dilations(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    dilations = _attribute(node, "dilations", [])
    return None if all(size == 1 for size in dilations) else f"dilations {list(dilations)}"


def _static_input(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    shape = graph.shape(node.input[0])
    return "an input of unknown shape" if shape is None or None in shape else None


def _no_training(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    name = graph.input(node, "training_mode")
    return "training_mode" if name and (graph.value(name) is None or graph.value(name)) else None


def _top_k(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    count = graph.value(graph.input(node, "K"))
    return f"K = {count.item()}" if count is not None and count.item() > MOST_TOP_K else None


def _nms_boxes(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    shape = graph.shape(graph.input(node, "boxes"))
    count = shape[1] if shape is not None and len(shape) == 3 else None
    return f"{count} boxes" if count is not None and count > MOST_NMS_BOXES else None


def _resize_axes(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    axes, shape = _attribute(node, "axes"), graph.shape(node.input[0])
    if not axes or not graph.input(node, "scales") or shape is None:
        return None
    return None if list(axes) == list(range(len(shape))) else f"axes {list(axes)}"


def _equal_pads(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    pads = list(_attribute(node, "pads", []))
    half = len(pads) // 2
    return None if pads[:half] == pads[half:] else f"pads {pads}"


def _constant_kinds(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    refused = [
        entry.name for entry in node.attribute if entry.name in ("sparse_value", "value_string", "value_strings")
    ]
    return refused[0] if refused else None


def _no_ellipsis(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    equation = _attribute(node, "equation")
    return f"the equation {equation}" if "..." in equation else None


def _no_diagonal(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    equation = _attribute(node, "equation").replace(" ", "")
    terms = equation.replace("...", "").split("->")[0].split(",")
    return f"the equation {equation}" if any(len(set(term)) < len(term) for term in terms) else None


def _three_inputs(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    count = len([name for name in node.input if name])
    return None if count == 3 else f"{count} inputs"


def _float_scale(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    found = graph.type_name(node.input[1])
    return None if found in ("FP32", None) else f"an {found} scale {node.input[1]!r}"


def _constant_scale(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    return None if node.input[1] in graph.constants else f"the scale {node.input[1]!r} computed in the graph"


def _positive_scale(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    scale = graph.value(node.input[1])
    wrong = [] if scale is None else [value for value in scale.ravel().tolist() if not is_scale(value)]
    return f"the scale {wrong[0]:g}" if wrong else None


def _scale_per_tensor(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    shape, source = graph.shape(node.input[1]), node.input[0]
    if node.op_type == "DequantizeLinear" and source in graph.producers:
        source = graph.producers[source].input[0]
    many = bool(shape) and shape != [1]
    return f"several scales on the computed tensor {source!r}" if many and source not in graph.constants else None


def _zero_point(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    zero = graph.value(node.input[2]) if len(node.input) > 2 else None
    if zero is None:
        return None  # then ONNX takes the type UINT8, which the types refuse
    found = graph.type_name(node.input[2])
    return f"the {found} zero point {zero.ravel()[:3].tolist()}" if found == "UINT8" or np.any(zero) else None


def _no_int8_constants(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    return f"the INT8 constant {node.input[0]!r}" if node.input[0] in graph.constants else None


# What the parser's source asserts or changes besides the table -------------------------------------------------------


def _takes_uint8(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    if node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):  # the last two: see their types
        return None
    found = [name for name in node.input if name not in graph.constants and graph.type_name(name) == "UINT8"]
    return f"the UINT8 tensor {found[0]!r}" if found else None


def _makes_uint8(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    made = [name for name in node.output if name not in graph.constants and graph.type_name(name) == "UINT8"]
    between = [name for name in made if name not in graph.outputs]
    return f"the UINT8 tensor {between[0]!r} between nodes" if between else None


def _uint8_cast(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    types = [graph.type_name(node.input[0]), graph.type_name(node.output[0])]
    others = [name for name in types if name not in ("UINT8", "FP32", "FP16", None)]
    return f"a cast from {types[0]} to {types[1]}" if "UINT8" in types and others else None


def _dimensions(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    ranks = {name: len(graph.shape(name) or []) for name in (*node.input, *node.output)}
    large = [name for name, rank in ranks.items() if rank > MOST_DIMENSIONS]
    return f"the tensor {large[0]!r} of {ranks[large[0]]} dimensions" if large else None


def _beyond_int32(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    if node.op_type == "Slice":  # whose ends are clamped to the tensor anyway
        return None
    limits = np.iinfo(np.int32)
    for name in node.input:
        values = graph.value(name) if graph.type_name(name) == "INT64" else None
        if values is not None and values.size and not limits.min <= values.min() <= values.max() <= limits.max:
            return f"the constant {name!r} reaches from {values.min()} to {values.max()}"
    return None


def _written_kernel(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    if node.input[1] in graph.constants or _attribute(node, "kernel_shape"):
        return None
    return f"no kernel_shape, and the weights {node.input[1]!r} computed in the graph"


def _pads_beside_auto_pad(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    auto_pad = _attribute(node, "auto_pad", "NOTSET")
    return f"pads beside auto_pad = {auto_pad}" if auto_pad.startswith("SAME") and _attribute(node, "pads") else None


def _empty_bias(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    return "a third input without a name" if len(node.input) > 2 and not node.input[2] else None


def _factors(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    factors = {name: _attribute(node, name, 1.0) for name in ("alpha", "beta")}
    found = graph.type_name(node.input[0])
    other = [f"{name} = {value:g}" for name, value in factors.items() if value != 1]
    return f"{' and '.join(other)} in {found}" if other and found in ("FP16", "BF16") else None


def _integer_exponent(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    found = graph.type_name(node.input[1])
    return f"the {found} exponent {node.input[1]!r}" if found in INTEGERS else None


def _type_of_input_in(*allowed: str) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        found = graph.type_name(node.input[0])
        return None if found in (*allowed, None) else f"an {found} input"

    return check


def _type_of_input_not(refused: str) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        return f"an {refused} input" if graph.type_name(node.input[0]) == refused else None

    return check


def _no_attribute(*names: str) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        found = [entry.name for entry in node.attribute if entry.name in names]
        return f"the attribute {found[0]} = {_attribute(node, found[0])}" if found else None

    return check


def _squeezed_axes(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    if graph.input(node, "axes") or _attribute(node, "axes"):
        return None
    return "no axes, and an input of unknown shape" if _static_input(graph, node) else None


def _pad_axes(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    name = graph.input(node, "axes")
    return f"the input axes {name!r}" if name else None


def _negative_pads(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    name = graph.input(node, "pads")
    pads = graph.value(name) if name else np.array(_attribute(node, "pads", []))
    return f"pads {pads.tolist()}" if pads is not None and pads.size and pads.min() < 0 else None


def _indices_length(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    shape = graph.shape(node.input[1])
    return f"indices {node.input[1]!r} of unknown length" if not shape or shape[-1] is None else None


def _tf_half_pixel(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    if _attribute(node, "coordinate_transformation_mode") != "tf_half_pixel_for_nn":
        return None
    rounding = _attribute(node, "nearest_mode", "round_prefer_floor")
    if rounding != "round_prefer_floor":
        return f"tf_half_pixel_for_nn with {rounding}"
    return "tf_half_pixel_for_nn with sizes" if graph.input(node, "sizes") else None


def _rank_at_least(least: int) -> Check:
    def check(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
        shape = graph.shape(node.input[0])
        return f"an input of {len(shape)} dimensions" if shape is not None and len(shape) < least else None

    return check


def _float_norm(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    found = [f"{graph.type_name(name)} {name!r}" for name in node.input[1:] if graph.type_name(name) == "FP16"]
    return ", ".join(found) or None


def _norm_of_one_type(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    types = [graph.type_name(name) for name in node.input]
    return f"inputs of {', '.join(map(str, types))}" if len({*types} - {None}) > 1 else None


def _scale_per_group(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    scale, groups = graph.shape(node.input[1]), _attribute(node, "num_groups")
    return f"a scale of shape {scale} for {groups} groups" if scale is not None and scale != [groups] else None


def _computed_k(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    name = graph.input(node, "K")
    return f"K {name!r} computed in the graph" if name and name not in graph.constants else None


def _integer_compared(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    found = graph.type_name(node.input[0])
    return f"an {found} input" if found in INTEGERS else None


def _last_axes(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    shape, axis = graph.shape(node.input[0]), _attribute(node, "axis", -1 if node.op_type == "TopK" else 0)
    if shape is None:
        return None
    return f"axis {axis} of {len(shape)} dimensions" if axis % len(shape) < len(shape) - 4 else None


def _no_most_boxes(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    return None if graph.input(node, "max_output_boxes_per_class") else "no max_output_boxes_per_class (0 boxes)"


def _several_limits(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    for name in node.input[2:]:
        values = graph.value(name) if name else None
        if values is not None and values.size != 1:
            return f"the limit {name!r} of {values.size} values"
    return None


def _several_scales(graph: GraphFacts, node: onnx.NodeProto) -> bool:
    shape = graph.shape(node.input[1])
    return bool(shape) and shape != [1]


def _written_axis(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    if not _several_scales(graph, node) or _attribute(node, "axis") is not None:
        return None
    return f"several scales {node.input[1]!r} and no axis, by which ONNX means 1"


def _zero_points(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    scale, *zero = (graph.value(name) for name in node.input[1:3])
    if scale is None or not zero or zero[0] is None or scale.size == zero[0].size:
        return None
    return f"{scale.size} scales and {zero[0].size} zero points"


def _scales_of_axis(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    scale, shape, axis = graph.shape(node.input[1]), graph.shape(node.input[0]), _attribute(node, "axis", 1)
    if not _several_scales(graph, node) or scale is None or len(scale) != 1 or shape is None:
        return None
    length = shape[axis] if -len(shape) <= axis < len(shape) else None
    return None if scale[0] == length else f"{scale[0]} scales for {length} places on axis {axis}"


def _type_of_scale(graph: GraphFacts, node: onnx.NodeProto) -> Optional[str]:
    scale, data = (graph.type_name(node.input[index]) for index in (1, 0))  # ONNX lets them differ from opset 23 on
    differ = scale in ("FP16", "BF16") and data not in (scale, None)
    return f"the {data} input {node.input[0]!r} and an {scale} scale" if differ else None


COORDINATES = "half_pixel, pytorch_half_pixel, tf_half_pixel_for_nn, asymmetric, align_corners"
ROUNDING = "floor, ceil, round_prefer_floor, round_prefer_ceil"
RESTRICTIONS: Dict[str, Check] = {
    "2-D or 3-D only": _kernel_rank,
    "no Indices output": _no_further_output,
    "first output only": _no_further_output,
    "dilations empty or 1": _no_dilations,
    "static input shape": _static_input,
    "axes constant": _constant("axes"),
    "axis constant": _constant("axis"),
    "K constant": _constant("K"),
    "scale and B constant": _constant("scale", "B"),
    "rank 3..5": _rank_of_input(3, 4, 5),
    "4-D input only": _rank_of_input(4),
    "1-D or 2-D spatial": _rank_of_input(3, 4),
    "training input constant False": _no_training,
    "sorted=1": _attribute_in("sorted", 1, 1),
    "K at most 3840": _top_k,
    "at most 5000 boxes": _nms_boxes,
    "reduction none": _attribute_in("reduction", "none", "none"),
    "modes nearest, linear": _attribute_in("mode", "nearest", "nearest", "linear"),
    f"coordinates {COORDINATES}": _attribute_in(
        "coordinate_transformation_mode", "half_pixel", *COORDINATES.split(", ")
    ),
    f"nearest {ROUNDING}": _attribute_in("nearest_mode", "round_prefer_floor", *ROUNDING.split(", ")),
    "keep_aspect_ratio_policy stretch only": _attribute_in("keep_aspect_ratio_policy", "stretch", "stretch"),
    "with scales, axes must be 0..rank-1": _resize_axes,
    "no antialias": _attribute_in("antialias", 0, 0),
    "begin and end pads equal": _equal_pads,
    "no sparse_value, value_string(s)": _constant_kinds,
    "no ellipsis": _no_ellipsis,
    "no diagonal": _no_diagonal,
    "input_forget=0": _attribute_in("input_forget", 0, 0),
    "layout=0": _attribute_in("layout", 0, 0),
    "3 inputs": _three_inputs,
    "scale FP32": _float_scale,
    "scale constant": _constant_scale,
    "scale finite and above 0": _positive_scale,
    "one scale per tensor but for weights": _scale_per_tensor,
    "zero point all zeros": _zero_point,
    "no INT8 constants": _no_int8_constants,
    "UINT8 goes only into a Cast": _takes_uint8,
    "UINT8 only as an input or output of the graph": _makes_uint8,
    "UINT8 only from and to FP32 or FP16": _uint8_cast,
    "at most 8 dimensions": _dimensions,
    "constants beyond INT32 are clamped to it": _beyond_int32,
    "kernel_shape written where the weights are computed": _written_kernel,
    "no pads beside auto_pad": _pads_beside_auto_pad,
    "no empty name for the bias": _empty_bias,
    "alpha and beta 1, but in FP32": _factors,
    "no integer exponent": _integer_exponent,
    "FP32 or integers": _type_of_input_in("FP32", *INTEGERS),
    "FP32 or FP16": _type_of_input_in("FP32", "FP16"),
    "no BF16": _type_of_input_not("BF16"),
    "value, not value_int or value_ints": _no_attribute("value_int", "value_ints"),
    "no start, no end": _no_attribute("start", "end"),
    "axes, or a static shape": _squeezed_axes,
    "modes constant, reflect, edge": _attribute_in("mode", "constant", "constant", "reflect", "edge"),
    "modes constant, reflect, edge, wrap": _attribute_in("mode", "constant", "constant", "reflect", "edge", "wrap"),
    "no axes": _pad_axes,
    "pads of 0 or more": _negative_pads,
    "indices of known length": _indices_length,
    "no attribute reduction, not even none": _no_attribute("reduction"),
    "tf_half_pixel_for_nn only with scales and round_prefer_floor": _tf_half_pixel,
    "training_mode 0": _attribute_in("training_mode", 0, 0),
    "scale and B in FP32": _float_norm,
    "input, scale and B of one type": _norm_of_one_type,
    "rank 3 or more": _rank_at_least(3),
    "a scale for each group (opset 18), not for each channel": _scale_per_group,
    "where K is above 3840 the engine fails when it runs": _computed_k,
    "INT32 is compared as FP32": _integer_compared,
    "one of the last 4 dimensions": _last_axes,
    "max_output_boxes_per_class given": _no_most_boxes,
    "limits of one value each": _several_limits,
    "modes bilinear, nearest, bicubic (opset 16 to 19)": _attribute_in(
        "mode", "bilinear", "bilinear", "nearest", "bicubic"
    ),
    "axis written where there are several scales": _written_axis,
    "as many zero points as scales": _zero_points,
    "one scale, or one for each place on the axis": _scales_of_axis,
    "an FP16 or BF16 scale only for an input of its type": _type_of_scale,
}
"""Restriction, as operators.json words it -> its check."""
