"""
Whether a TensorRT version takes the operators of an ONNX graph. Needs onnx, and no TensorRT.

`operators.json` is the support table that NVIDIA's ONNX parser ships with each version (onnx-tensorrt,
docs/operators.md, 8.5 to 11.1): the versions with the opset that each reads, and for each operator a row wherever types
or restrictions change, without types where it is not supported. Rows of QuantizeLinear and DequantizeLinear follow the
parser's and the layers' own checks (NvInfer.h, onnxOpImporters.cpp), the limit of NonMaxSuppression INMSLayer's notes.
A restriction that is no key of RESTRICTIONS stands there to be read, and is not checked.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from deploy.errors import EngineBuildError
from deploy.graphs.graph import ONNX_DOMAINS, constants, producers
from deploy.targets import version_numbers

if TYPE_CHECKING:
    import onnx

TABLE = Path(__file__).with_name("operators.json")
LISTED = 10
"""Faults that a message names."""
TYPE_NAMES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "DOUBLE": "FP64", "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
}  # fmt: skip
"""ONNX's name of a type -> the table's, where they differ."""
TYPED_INPUT = {"Where": 1, "OneHot": 2}
"""Operator -> index of the input whose type the table means; 0 for all others."""
TYPED_OUTPUT = ("ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform")
"""Operators whose types the table gives for the output."""
MOST_TOP_K = 3839
MOST_NMS_BOXES = 5000
"""Of more boxes INMSLayer takes the best 5000 and drops the rest (NvInfer.h), which ONNX Runtime does not."""


def check_operators(model: onnx.ModelProto, version: str) -> None:
    """
    Raises EngineBuildError if the parser of TensorRT `version` ("10.3", "10.13.3.9.post1") would refuse the graph.

    Compared with the table of that version, or of the last one before it that is known: operators, the types they take,
    restrictions, and the opset. What the message names: node, operator and reason, of the first ten faults.

    Args:
        model: checked by `check_graph` and `check_static`, which refuses what is not looked into here: subgraphs.
    """
    table_version, highest_opset, operators = _table_for(version)
    graph = _Graph(model)
    faults = []
    if graph.opset > highest_opset:
        faults.append(f"the graph has opset {graph.opset}; expected at most {highest_opset}: export it with that")
    # Up to 8.6 the parser reads INT64 as INT32 (onnx-tensorrt, docs/operators.md of 8.x).
    long_name = "INT32" if _numbers(table_version) < (10,) else "INT64"
    for node in model.graph.node:
        reason = _fault(graph, node, operators, long_name)
        if reason:
            faults.append(f"{node.op_type} {node.name or node.output[0]!r}: {reason}")
    if faults:
        more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        lines = "".join(f"\n  {line}" for line in faults[:LISTED] + more)
        raise EngineBuildError(
            f"TensorRT {version} does not take the graph, by the operator table of TensorRT {table_version}:{lines}\n"
            "Export the model again without these, or build with another TensorRT version."
        )


@functools.lru_cache(maxsize=None)
def _document() -> Dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _numbers(version: str) -> Tuple[int, ...]:
    """(10, 13, 3, 9) of "10.13.3.9.post1"; at least two numbers."""
    numbers = version_numbers(version)
    return numbers if len(numbers) != 1 else (*numbers, 0)


def _table_for(version: str) -> Tuple[str, int, Dict[str, Dict[str, Any]]]:
    """The version whose table holds for `version`, its highest opset, and operator -> row."""
    document, wanted = _document(), _numbers(version)
    known = [name for name in document["versions"] if _numbers(name) <= wanted]
    if not known:
        raise EngineBuildError(
            f"no operator table for TensorRT {version!r}; expected 8.5 or newer, as 10.3. Give the version that is on "
            "the board: python3 -c 'import tensorrt; print(tensorrt.__version__)'"
        )
    operators = {}
    for operator, rows in document["operators"].items():
        valid = [row for row in rows if _numbers(row["since"]) <= wanted]
        if valid and valid[-1]["types"] is not None:
            operators[operator] = valid[-1]
    return known[-1], document["versions"][known[-1]], operators


class _Graph:
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


def _fault(graph: _Graph, node: onnx.NodeProto, operators: Dict[str, Dict[str, Any]], long_name: str) -> Optional[str]:
    """Why the node is refused, None if it is not."""
    if node.domain not in ONNX_DOMAINS:
        return f"not an operator of ONNX but of {node.domain!r}; TensorRT would look for a plugin of that name"
    row = operators.get(node.op_type)
    if row is None:
        return "not supported"
    for name in _typed_tensors(node):
        found = graph.type_name(name)
        if found == "INT64":
            found = long_name
        if found and row["types"] and found not in row["types"].split():
            return f"does not take {found} ({name!r}); takes {row['types']}"
    for restriction in row["restrictions"]:
        broken = RESTRICTIONS[restriction](graph, node) if restriction in RESTRICTIONS else None
        if broken:
            return f"{broken}; supported only with: {restriction}"
    return None


def _typed_tensors(node: onnx.NodeProto) -> List[str]:
    """The tensors whose type is that of the table's row."""
    if node.op_type == "Constant":  # as an initialiser: what counts is what the nodes that read it take
        return []
    if node.op_type in TYPED_OUTPUT:
        return [node.output[0]]
    if node.op_type == "Cast":
        return [node.input[0], node.output[0]]
    return [node.input[TYPED_INPUT.get(node.op_type, 0)]]


# Restrictions: what was found if one is broken, else None ------------------------------------------------------------

Check = Callable[[_Graph, "onnx.NodeProto"], Optional[str]]


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    from onnx import helper

    value = next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


def _attribute_in(name: str, default: Any, *allowed: Any) -> Check:
    def check(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
        value = _attribute(node, name, default)
        return None if value in allowed else f"{name} = {value}"

    return check


def _constant(*names: str) -> Check:
    def check(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
        computed = [
            name for name in names if graph.input(node, name) and graph.input(node, name) not in graph.constants
        ]
        return f"{', '.join(computed)} computed in the graph" if computed else None

    return check


def _rank_of_input(*allowed: int) -> Check:
    def check(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
        shape = graph.shape(node.input[0])
        return None if shape is None or len(shape) in allowed else f"an input of {len(shape)} dimensions"

    return check


def _kernel_rank(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    rank = len(_attribute(node, "kernel_shape"))
    return None if rank in (2, 3) else f"{rank}-D"


def _no_further_output(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    further = [name for name in node.output[1:] if name]
    return f"the output {', '.join(further)}" if further else None


def _no_dilations(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    dilations = _attribute(node, "dilations", [])
    return None if all(size == 1 for size in dilations) else f"dilations {list(dilations)}"


def _static_input(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    shape = graph.shape(node.input[0])
    return "an input of unknown shape" if shape is None or None in shape else None


def _no_training(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    name = graph.input(node, "training_mode")
    return "training_mode" if name and (graph.value(name) is None or graph.value(name)) else None


def _top_k(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    count = graph.value(graph.input(node, "K"))
    return f"K = {count.item()}" if count is not None and count.item() > MOST_TOP_K else None


def _nms_boxes(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    shape = graph.shape(graph.input(node, "boxes"))
    count = shape[1] if shape is not None and len(shape) == 3 else None
    return f"{count} boxes" if count is not None and count > MOST_NMS_BOXES else None


def _resize_axes(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    axes, shape = _attribute(node, "axes"), graph.shape(node.input[0])
    if not axes or not graph.input(node, "scales") or shape is None:
        return None
    return None if list(axes) == list(range(len(shape))) else f"axes {list(axes)}"


def _equal_pads(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    pads = list(_attribute(node, "pads", []))
    half = len(pads) // 2
    return None if pads[:half] == pads[half:] else f"pads {pads}"


def _constant_kinds(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    refused = [
        entry.name for entry in node.attribute if entry.name in ("sparse_value", "value_string", "value_strings")
    ]
    return refused[0] if refused else None


def _no_ellipsis(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    equation = _attribute(node, "equation")
    return f"the equation {equation}" if "..." in equation else None


def _no_diagonal(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    equation = _attribute(node, "equation").replace(" ", "")
    terms = equation.replace("...", "").split("->")[0].split(",")
    return f"the equation {equation}" if any(len(set(term)) < len(term) for term in terms) else None


def _three_inputs(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    count = len([name for name in node.input if name])
    return None if count == 3 else f"{count} inputs"


def _float_scale(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    found = graph.type_name(node.input[1])
    return None if found in ("FP32", None) else f"an {found} scale {node.input[1]!r}"


def _constant_scale(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    return None if node.input[1] in graph.constants else f"the scale {node.input[1]!r} computed in the graph"


def _positive_scale(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    scale = graph.value(node.input[1])
    return f"the scale {float(scale.min()):g}" if scale is not None and not np.all(scale > 0) else None


def _scale_per_tensor(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    shape, source = graph.shape(node.input[1]), node.input[0]
    if node.op_type == "DequantizeLinear" and source in graph.producers:
        source = graph.producers[source].input[0]
    many = bool(shape) and shape != [1]
    return f"several scales on the computed tensor {source!r}" if many and source not in graph.constants else None


def _zero_point(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    zero = graph.value(node.input[2]) if len(node.input) > 2 else None
    if zero is None:
        return None  # then ONNX takes the type UINT8, which the types refuse
    found = graph.type_name(node.input[2])
    return f"the {found} zero point {zero.ravel()[:3].tolist()}" if found == "UINT8" or np.any(zero) else None


def _no_int8_constants(graph: _Graph, node: onnx.NodeProto) -> Optional[str]:
    return f"the INT8 constant {node.input[0]!r}" if node.input[0] in graph.constants else None


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
    "K < 3840": _top_k,
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
    "scale above 0": _positive_scale,
    "one scale per tensor but for weights": _scale_per_tensor,
    "zero point all zeros": _zero_point,
    "no INT8 constants": _no_int8_constants,
}
"""Restriction, as operators.json words it -> its check."""
