"""
A graph from elsewhere put into the form in which every stage finds what it looks for; it computes the same.

Needs the packages onnx and onnxruntime.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Sequence, Set, Tuple

import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ContractError
from deploy.graphs.decoding import rename_tensors
from deploy.graphs.graph import LEARNT_OPS, constants, learnt_tensors, producers, remove_unused, with_outputs

if TYPE_CHECKING:
    import onnx

OUR_NAMES = re.compile(
    r"(.+?)(_scale|_zero_point|_quantized|_dequantized|_int8|_bias_int32|_float16|_float32|_of_any_batch)"
)
"""Names that quantising and typing a graph make of the name of a tensor."""
OLDEST_IR = 4
"""The first version of the file in which an initialiser need not be an input, too."""


def normalise_inputs(
    model: onnx.ModelProto, contract: ModelContract, constant_inputs: Mapping[str, Any]
) -> Iterator[str]:
    """
    Leaves the graph, in place, the one input of the contract, of its size; yields a sentence for each change.

    Args:
        constant_inputs: as of `deploy.graphs.decoding.OutputLayout`.

    Raises:
        ContractError: the graph has other inputs than the contract, and what they are to get cannot be told.
    """
    graph = model.graph
    fixed = {tensor.name for tensor in graph.initializer}
    doubled = [value for value in graph.input if value.name in fixed]
    for value in doubled:
        graph.input.remove(value)
    model.ir_version = max(model.ir_version, OLDEST_IR)
    if doubled:
        yield f"{len(doubled)} initialisers were inputs, too: they are constants alone"
    seen = {value.name: _sizes(value) for value in graph.input}
    if contract.input_name not in seen:
        raise ContractError(
            f"the graph has the inputs {seen}; its contract expects {contract.input_name!r}. Correct input_name"
        )
    unknown = sorted(set(constant_inputs) - (set(seen) - {contract.input_name}))
    if unknown:
        raise ContractError(
            f"constant_inputs has {unknown}; expected inputs of the graph, which are {seen}, other than input_name"
        )
    for value in list(graph.input):
        if value.name != contract.input_name:
            values = constant_inputs.get(value.name)
            values = _proposed_values(value, contract) if values is None else values
            graph.initializer.append(_constant_of_input(value, values, contract))
            graph.input.remove(value)
            yield f"the input {value.name} always gets {np.asarray(values).ravel().tolist()}"
    sizes, wanted = seen[contract.input_name], contract.input_shape
    open_sizes = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    fits = len(sizes) == 4 and all(i in open_sizes or size == wanted[i] for i, size in enumerate(sizes))
    if not fits:
        raise ContractError(
            f"the graph has the inputs {seen}; its contract expects {contract.input_name!r} of the shape "
            f"{list(wanted)}, -1 for any. Correct input_shape, or export the model again"
        )
    to_fix = [index for index in open_sizes if wanted[index] > 0]
    if to_fix:
        dimensions = graph.input[0].type.tensor_type.shape.dim
        for index in to_fix:
            dimensions[index].dim_value = wanted[index]
        del graph.value_info[:]  # of any size
        yield f"the input is {list(sizes)} in the graph: fixed to {list(wanted)}"


def _sizes(value: onnx.ValueInfoProto) -> List[Any]:
    return [size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim]


def _proposed_values(value: onnx.ValueInfoProto, contract: ModelContract) -> List[float]:
    """What a second input gets where the contract does not say: the size of the network input, or a scale of 1."""
    sizes, name = _sizes(value), value.name.lower()
    width, height = contract.input_width_px, contract.input_height_px
    if len(sizes) == 2 and sizes[1] == 2:
        if "scale" in name:
            return [1, 1]
        if re.search("size|shape", name) and width == height:
            return [width, height]
    square = (
        "" if width == height else f", in the order that the graph wants: [{width}, {height}] or [{height}, {width}]"
    )
    raise ContractError(
        f"the graph has a second input, {value.name!r} {sizes}; expected the picture alone. Say what it is always to "
        f"get, such as the size of the network input{square}: "
        f'"constant_inputs": {{"{value.name}": [{width}, {height}]}}'
    )


def _constant_of_input(value: onnx.ValueInfoProto, values: Any, contract: ModelContract) -> onnx.TensorProto:
    from onnx import helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    batch = max(1, contract.input_shape[0])
    shape = [size if isinstance(size, int) else batch for size in _sizes(value)]
    try:
        array = np.asarray(values, np.float64)
        array = np.broadcast_to(array, shape) if array.size != np.prod(shape) else array.reshape(shape)
    except (TypeError, ValueError) as error:
        raise ContractError(
            f"constant_inputs has {values!r} for {value.name!r}; expected numbers of the shape {shape}"
        ) from error
    return numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)), value.name)


def keep_outputs(model: onnx.ModelProto, names: Sequence[str]) -> Iterator[str]:
    """
    Leaves the graph these outputs, in this order, in place; yields a sentence where others are dropped.

    Raises:
        ContractError: the graph has no such output.
    """
    there = {value.name: value for value in model.graph.output}
    missing = [name for name in names if name not in there]
    if missing:
        found = {name: _sizes(value) for name, value in there.items()}
        raise ContractError(
            f"the graph has the outputs {found}; its contract expects {list(names)}. Correct output_names, or leave it "
            "out where all outputs are to be read"
        )
    kept = [there[name] for name in names]
    dropped = [name for name in there if name not in names]
    copies = []
    for value in kept:
        copies.append(type(value)())
        copies[-1].CopyFrom(value)
    del model.graph.output[:]
    model.graph.output.extend(copies)
    remove_unused(model)
    if dropped:
        yield f"the outputs {', '.join(dropped)} are dropped: the contract does not name them"


def float_from_half(model: onnx.ModelProto) -> Iterator[str]:
    """
    Makes a graph in FP16 one in FP32, in place, its weights the same numbers; yields a sentence if it was one.

    What is in FP16 on a device `deploy.build_trt --fp16` decides, for each node; INT8 is made of FP32.
    """
    import onnx
    from onnx import numpy_helper

    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    graph = model.graph
    learnt = learnt_tensors(model).values()
    if not any(tensor.data_type == half for tensor in learnt):
        return

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    for tensor in graph.initializer:
        widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i == half:
                attribute.i = single
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    del graph.value_info[:]
    yield "the graph is in FP16: it is in FP32 now, with the same weights. Build it with --fp16"


def fold_weights(model: onnx.ModelProto) -> Iterator[str]:
    """
    Replaces what computes a weight from constants by the weight, in place; yields a sentence if there was any.

    Weights that are stored as FP16 behind a Cast, or as integers behind a DequantizeLinear, or that are scaled. Where
    the graph also quantises, its DequantizeLinear nodes stay: they are the second ones of its pairs.
    """
    from onnx import numpy_helper

    known, made_by = set(constants(model)), producers(model)
    kept_ops = {"QuantizeLinear"}
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        kept_ops.add("DequantizeLinear")
    constant: Dict[str, bool] = dict.fromkeys(known, True)
    for node in model.graph.node:  # in topological order
        is_constant = bool(node.input) and all(constant.get(name, not name) for name in node.input)
        for name in node.output:
            constant.setdefault(name, is_constant and node.op_type not in kept_ops)
    computed = sorted(
        {
            name
            for node in model.graph.node
            if node.op_type in LEARNT_OPS
            for name in node.input[1:]
            if constant.get(name) and name not in known
        }
    )
    if not computed:
        return
    operators = sorted({made_by[name].op_type for name in computed})
    values = _values(with_outputs(model, computed))
    nodes = [node for node in model.graph.node if not set(node.output) & set(computed)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in zip(computed, values))
    remove_unused(model)
    yield f"{len(computed)} weights were computed from constants ({', '.join(operators)}): they are stored as they are"


def _values(model: onnx.ModelProto) -> List[np.ndarray]:
    """The outputs of a graph that needs no input."""
    import onnxruntime

    del model.graph.input[:]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: List[np.ndarray] = session.run(None, {})
    return found


def name_nodes(model: onnx.ModelProto) -> Iterator[str]:
    """Gives every node a name of its own, in place; yields a sentence if one was missing or doubled."""
    counts = Counter(node.name for node in model.graph.node)
    wrong = [node for node in model.graph.node if not node.name or counts[node.name] > 1]
    taken: Set[str] = {name for name, count in counts.items() if name and count == 1}
    for node in wrong:
        base = node.name or node.output[0]
        node.name = next(name for name in _numbered(base) if name not in taken)
        taken.add(node.name)
    if wrong:
        yield f"{len(wrong)} nodes had no name of their own: they are named after what they compute"


def free_our_names(model: onnx.ModelProto) -> Iterator[str]:
    """Renames tensors, in place, whose names later stages would give to others; yields a sentence if there were any."""
    graph = model.graph
    outside = {value.name for value in (*graph.input, *graph.output)}
    names = {tensor.name for tensor in graph.initializer}
    names.update(name for node in graph.node for name in (*node.input, *node.output) if name)
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return  # it is quantised, and will not be again
    new_names: Dict[str, str] = {}
    for name in sorted(names - outside):
        made_of = OUR_NAMES.fullmatch(name)
        if name.startswith(("nms_", "decoding")) or (made_of and made_of.group(1) in names):
            new_names[name] = next(new for new in _numbered(f"{name}.given") if new not in names)
    rename_tensors(model, new_names)
    if new_names:
        listed = ", ".join(list(new_names)[:3])
        yield f"{len(new_names)} tensors had names that later stages use, and got others: {listed}"


def _numbered(base: str) -> Iterator[str]:
    yield base
    for number in itertools.count(2):
        yield f"{base}.{number}"


def fix_output_shapes(model: onnx.ModelProto, shapes: Mapping[str, Tuple[int, ...]]) -> Iterator[str]:
    """Writes the sizes that a run showed where the graph leaves them open, in place, and yields a sentence."""
    changed = []
    for value in model.graph.output:
        sizes = _sizes(value)
        if len(sizes) == len(shapes[value.name]) and all(isinstance(size, int) for size in sizes):
            continue
        del value.type.tensor_type.shape.dim[:]
        for size in shapes[value.name]:
            value.type.tensor_type.shape.dim.add().dim_value = size
        changed.append(f"{value.name} {list(shapes[value.name])}")
    if changed:
        yield f"the sizes of the outputs were open, and are those of a run: {', '.join(changed)}"
