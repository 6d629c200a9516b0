"""
ONNX graphs: read, checked, searched and written. What exporting and quantising both need.

Needs the package onnx.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from deploy.contract import external_files
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
ONNX_DOMAINS = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


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
    folder, elsewhere = Path(path).parent, external_files(path)
    sizes = [(folder / name).stat().st_size for name in elsewhere if (folder / name).is_file()]
    size = Path(path).stat().st_size + sum(sizes)
    if size > LARGEST_FILE_BYTES:
        raise ContractError(
            f"{path} has {size / 2**30:.1f} GiB{' with its other files' if elsewhere else ''}; expected below 2 GiB, "
            "the limit of one ONNX file. Choose a smaller detector, or export it with weights in FP16"
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, ValueError, OSError: no common base
        raise ContractError(
            f"{path} cannot be read as ONNX ({error}); expected a whole ONNX file. It may be truncated: export the "
            "model again."
        ) from error
    if not model.graph.node:  # an empty or cut file can still be a valid protobuf message
        raise ContractError(
            f"{path} holds no graph, or one without nodes; expected an ONNX model. It may be truncated: export the "
            "model again."
        )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except Exception as error:  # onnx's ValidationError, OSError, ValueError
        raise ContractError(
            f"{path} keeps weights in other files (external data), which cannot be read ({error}); expected them "
            "beside it, as they were exported. Copy them there, or export the model again into one file."
        ) from error
    return model


def check_graph(model: onnx.ModelProto) -> None:
    """
    Raises ExportError if the model is not valid ONNX, shapes included, has operators that are not ONNX's own, or
    weights that are no numbers.
    """
    import onnx

    _check_own_operators(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"the graph is not valid ONNX: {error}. Export the model again.") from error
    _check_finite(model)


def _check_own_operators(model: onnx.ModelProto) -> None:
    from onnx import defs

    for node in model.graph.node:
        if node.domain not in ONNX_DOMAINS or not defs.has(node.op_type):
            raise ExportError(
                f"the node {_name(node)} has the operator {node.op_type} of the domain {node.domain!r}; expected only "
                "ONNX's own operators (domain ''), since any other needs a plugin in every runtime. Export the model "
                "again with that layer written in ONNX's operators, and without a deployment tool's custom ones."
            )


def _check_finite(model: onnx.ModelProto) -> None:
    """
    Infinity is fine where it means "no limit" (Clip, masks); in weights it is not, and NaN is nowhere. Every constant
    can be read.
    """
    import onnx
    from onnx import numpy_helper

    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    learnt = learnt_tensors(model)
    for name, tensor in {tensor.name: tensor for tensor in constants(model).values()}.items():
        try:
            values = numpy_helper.to_array(tensor)
        except Exception as error:  # of a wrong type, or of more or fewer bytes than its sizes say: no common base
            raise ExportError(
                f"the constant {name!r} {list(tensor.dims)} cannot be read ({error}); expected one value for each "
                "place. The file is damaged: export the model again."
            ) from error
        if tensor.data_type not in floating:
            continue
        wrong = ~np.isfinite(values) if name in learnt else np.isnan(values)
        if wrong.any():
            raise ExportError(
                f"the constant {name!r} {list(values.shape)} has {np.count_nonzero(wrong)} values that are NaN or "
                "infinite; expected numbers. The training diverged or the file is damaged: look at the checkpoint's "
                "losses, and export an earlier one."
            )


def check_static(model: onnx.ModelProto, dynamic_batch: bool = False, dynamic_outputs: bool = False) -> None:
    """
    Raises ExportError if an input or output has a dimension without a number, or a node holds a subgraph (If, Loop).

    Args:
        dynamic_batch: let the first dimension of inputs and outputs be open: the batch.
        dynamic_outputs: let the first dimension of outputs be open: with NMS in the graph their number comes from the
            data (contract.outputs == "nms").
    """
    for values, first_may_be_open in (
        (model.graph.input, dynamic_batch),
        (model.graph.output, dynamic_batch or dynamic_outputs),
    ):
        for value in values:
            _check_sizes(value, first_may_be_open)
    check_no_subgraph(model)


def check_no_subgraph(model: onnx.ModelProto) -> None:
    """Raises ExportError if a node holds a subgraph: what is in it, and what it reads from outside, is not seen."""
    import onnx

    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(
                f"the node {_name(node)} ({node.op_type}) holds a subgraph; expected a graph without control flow. "
                "Export the model again by tracing."
            )


def _check_sizes(value: onnx.ValueInfoProto, first_may_be_open: bool) -> None:
    if not value.type.tensor_type.HasField("shape"):
        raise ExportError(
            f"the tensor {value.name} has no shape at all; expected a number for every dimension. "
            "Export the model again with a fixed input shape."
        )
    sizes = [size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim]
    fixed = sizes[1:] if first_may_be_open else sizes
    if not all(isinstance(size, int) for size in fixed):
        expected = "every dimension but the first" if first_may_be_open else "every dimension"
        raise ExportError(
            f"the tensor {value.name} has the shape {sizes}; expected a number for {expected}. "
            "Export the model again with a fixed input shape."
        )


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


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
    readers: Dict[str, List[Tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name:
                readers.setdefault(name, []).append((node, index))
    return readers


def constants(model: onnx.ModelProto) -> Dict[str, onnx.TensorProto]:
    """
    Name -> value of each constant tensor: initialisers, Constant nodes, and Identity of these.

    torch's exporter writes a weight that several nodes share once, and Identity nodes of it for the others; all of
    them map to the one TensorProto, known by its `name`.
    """
    import onnx

    tensors = initializers(model)
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            tensors[tensor.name] = tensor
    return tensors


def constant_behind(
    name: str, known: Mapping[str, onnx.TensorProto], made_by: Mapping[str, onnx.NodeProto]
) -> Optional[onnx.TensorProto]:
    """
    The constant that a tensor holds, read through Identity and Q/DQ, and however it is turned; None if it is computed.

    Args:
        known: as `constants`. made_by: as `producers`.
    """
    while name not in known and name in made_by and made_by[name].op_type in (*TRANSPARENT_OPS, "Transpose"):
        name = made_by[name].input[0]
    return known.get(name)


def write_kernel_shapes(model: onnx.ModelProto) -> None:
    """
    Writes `kernel_shape` on the convolutions that leave it to their weights, in place, where these are behind Q/DQ.

    There TensorRT's parser sees no constant up to 10.3, and refuses a convolution that does not say it.
    """
    from onnx import helper

    known, made_by = constants(model), producers(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or any(
            entry.name == "kernel_shape" for entry in node.attribute
        ):
            continue
        name = node.input[1]
        while name in made_by and made_by[name].op_type in ("QuantizeLinear", "DequantizeLinear"):
            name = made_by[name].input[0]
        if name != node.input[1] and name in known:
            node.attribute.append(helper.make_attribute("kernel_shape", known[name].dims[2:]))


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


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose only outputs are these tensors, without what they do not need."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    remove_unused(changed)
    return changed


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
    return sum(math.prod(tensor.dims) for tensor in learnt_tensors(model).values())


def learnt_tensors(model: onnx.ModelProto) -> Dict[str, onnx.TensorProto]:
    """Name -> constant, of the weights and biases of LEARNT_OPS, read through Identity and Q/DQ."""
    known, made_by = constants(model), producers(model)
    sources = [
        constant_behind(name, known, made_by)
        for node in model.graph.node
        if node.op_type in LEARNT_OPS
        for name in node.input[1:]
    ]
    return {tensor.name: tensor for tensor in sources if tensor is not None}
