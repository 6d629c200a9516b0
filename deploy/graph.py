"""
ONNX graphs: read, checked, searched and written. What exporting and quantising both need.

Needs the package onnx.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple

from deploy.errors import ContractError, ExportError, MissingDependencyError
from deploy.files import AnyPath, replacing

if TYPE_CHECKING:
    import onnx

LARGEST_FILE_BYTES = 2**31 - 1
"""What one protobuf message can hold; beyond it ONNX needs external data, which breaks several tools."""
LEARNT_OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul",
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "PRelu",
)  # fmt: skip
TRANSPARENT_OPS = ("Identity", "QuantizeLinear", "DequantizeLinear")


def load_onnx(path: AnyPath) -> onnx.ModelProto:
    """
    The model in an ONNX file, its external data included.

    Raises:
        MissingDependencyError: onnx is not installed.
        ContractError: the file is missing, truncated or not ONNX, or its external data is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx", f"reading {Path(path).name}", "pip install onnx") from error
    if not Path(path).is_file():
        raise ContractError(f"no such file: {path}; expected an ONNX model")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, OSError: no common base
        raise ContractError(
            f"{path} cannot be read as ONNX ({error}); expected a whole ONNX file, with its external data if it has "
            "any. It may be truncated: export the model again."
        ) from error
    if not model.graph.node:  # an empty or cut file can still be a valid protobuf message
        raise ContractError(
            f"{path} holds no graph; expected an ONNX model. It may be truncated: export the model again."
        )
    return model


def check_graph(model: onnx.ModelProto) -> None:
    """
    Raises ExportError if onnx's checker, shape inference included, finds the model invalid.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"the graph is not valid ONNX: {error}. Export the model again.") from error


def check_static(model: onnx.ModelProto) -> None:
    """
    Raises ExportError if an input or output has a dimension without a number, or a node holds a subgraph (If, Loop).
    """
    import onnx

    for value in (*model.graph.input, *model.graph.output):
        dimensions = [d.dim_value or d.dim_param or "?" for d in value.type.tensor_type.shape.dim]
        if not all(isinstance(size, int) for size in dimensions):
            raise ExportError(
                f"the tensor {value.name} has the shape {dimensions}; expected a number for every dimension. "
                "Export the model again with a fixed input shape."
            )
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(
                f"the node {node.name or node.output[0]} ({node.op_type}) holds a subgraph; expected a graph without "
                "control flow. Export the model again by tracing."
            )


def save_onnx(model: onnx.ModelProto, path: AnyPath) -> None:
    """
    Writes one file, atomically.

    Raises:
        ExportError: the model does not fit in one file.
        PipelineError: `path` cannot be written.
    """
    import onnx

    size = model.ByteSize()
    if size > LARGEST_FILE_BYTES:
        raise ExportError(f"{path} would have {size} bytes; expected below 2 GiB, the limit of one ONNX file.")
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))


def initializers(model: onnx.ModelProto) -> Dict[str, onnx.TensorProto]:
    """Name -> initialiser."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def producers(model: onnx.ModelProto) -> Dict[str, onnx.NodeProto]:
    """Tensor name -> the node that computes it. Inputs and initialisers are not in it."""
    return {name: node for node in model.graph.node for name in node.output if name}


def consumers(model: onnx.ModelProto) -> Dict[str, List[Tuple[onnx.NodeProto, int]]]:
    """Tensor name -> (node, index of its input) of each node that reads it, in the order of the graph."""
    found: Dict[str, List[Tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name:
                found.setdefault(name, []).append((node, index))
    return found


def constants(model: onnx.ModelProto) -> Dict[str, onnx.TensorProto]:
    """
    Name -> value of each constant tensor: initialisers, Constant nodes, and Identity of these.

    torch's exporter writes a weight that several nodes share once, and Identity nodes of it for the others; all of
    them map to the one TensorProto, known by its `name`.
    """
    import onnx

    found = initializers(model)
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            found[tensor.name] = tensor
    return found


def remove_unused(model: onnx.ModelProto) -> None:
    """Removes the nodes and initialisers that no output of the graph needs, in place."""
    needed = {value.name for value in model.graph.output}
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)  # '' is an optional input left out
    nodes = [node for node in model.graph.node if needed.intersection(node.output)]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)


def share_equal_initializers(model: onnx.ModelProto) -> None:
    """Keeps one of the initialisers of equal type, shape and value, in place, and lets every node read that one."""
    kept: Dict[Tuple[int, Tuple[int, ...], bytes], onnx.TensorProto] = {}
    new_name = {}
    for tensor in model.graph.initializer:
        key = tensor.data_type, tuple(tensor.dims), _content(tensor)
        new_name[tensor.name] = kept.setdefault(key, tensor).name
    for node in model.graph.node:
        node.input[:] = [new_name.get(name, name) for name in node.input]
    remove_unused(model)


def _content(tensor: onnx.TensorProto) -> bytes:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor).tobytes()


def count_parameters(model: onnx.ModelProto) -> int:
    """
    Weights and biases of convolutions, matrix products and normalisations, each counted once however often it is used.

    Read through Identity and Q/DQ, so that a quantised model has the count of the float one, but for biases that
    integer kernels need once for every scale of their input.
    """
    known, made_by = constants(model), producers(model)

    def source(name: str) -> Optional[onnx.TensorProto]:
        while name not in known and name in made_by and made_by[name].op_type in TRANSPARENT_OPS:
            name = made_by[name].input[0]
        return known.get(name)

    learnt = [source(name) for node in model.graph.node if node.op_type in LEARNT_OPS for name in node.input[1:]]
    return sum(
        math.prod(dims) for dims in {tensor.name: tensor.dims for tensor in learnt if tensor is not None}.values()
    )
