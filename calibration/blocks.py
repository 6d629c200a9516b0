"""
Blocks of products that belong together, from the graph alone: what is quantised or kept in float as one.

torch's exporters name a node by the path of its module ("/backbone/layer1/layer1.0/conv1/Conv"), which says where
residual blocks, levels and tower layers begin. In other graphs blocks are runs between the places where branches meet.

Needs onnx, and onnxruntime to count operations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Dict, List, Mapping, Set, Tuple

import numpy as np

from calibration.collect import runtime_session
from calibration.placement import FloatGraph, node_name
from deploy.contract import ModelContract
from deploy.errors import CalibrationError
from deploy.graphs.graph import remove_unused
from deploy.graphs.products import weight_axis

BLOCK_KINDS = ("grouped", "each")
MEETING_OPS = ("Add", "Concat")
"""Where branches meet, and a run of products ends."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Products that are quantised or kept in float together."""

    name: str
    products: Tuple[str, ...]
    """Names of the products, in the order of the graph."""
    multiplications: int
    """Multiplications of all products in the block, for one image."""


def count_multiplications(graph: FloatGraph, contract: ModelContract) -> Dict[str, int]:
    """
    Name of each product to quantise -> its multiplications for one image.

    Each value of the output takes one for every weight of its channel. The sizes come from one run, since onnx cannot
    infer all of them where an exporter has left their computation in the graph.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CalibrationError: ONNX Runtime cannot run the graph.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    for index, node in enumerate(graph.quantized):
        model.graph.node.append(onnx.helper.make_node("Shape", [node.output[0]], [f"sizes_of_product_{index}"]))
        model.graph.output.append(onnx.ValueInfoProto(name=f"sizes_of_product_{index}"))
    remove_unused(model)
    session = runtime_session(model, "counting operations")
    image = np.zeros((max(1, contract.input_shape[0]), *contract.input_shape[1:]), contract.input_type)
    try:
        shapes = session.run(None, {contract.input_name: image})
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise CalibrationError(f"ONNX Runtime cannot run the model: {error}. Export it again.") from error
    weights = (graph.constants[node.input[1]].dims for node in graph.quantized)
    return {
        node_name(node): math.prod(shape.tolist()) // len(image) * math.prod(dims) // dims[weight_axis(node)]
        for node, shape, dims in zip(graph.quantized, shapes, weights)
    }


def blocks_from_graph(graph: FloatGraph, kind: str, multiplications: Mapping[str, int]) -> List[Block]:
    """
    Every product that is to be quantised, in one block each; in the order of the graph.

    Args:
        kind: of BLOCK_KINDS. 'each': a product is a block. 'grouped': by the names of the nodes if all are paths,
            else by `runs_of_graph`.
        multiplications: as `count_multiplications`.
    """
    names = [node_name(node) for node in graph.quantized]
    if kind == "each":
        block_of = {name: name for name in names}
    elif all(name.startswith("/") for name in names):
        block_of = {name: block_of_path(name) for name in names}
        blocks = set(block_of.values())
        for name, block in block_of.items():  # what stands beside the blocks of a stage is none with all of them
            if any(other.startswith(f"{block}/") for other in blocks):
                block_of[name] = name.rpartition("/")[0]
    else:
        block_of = runs_of_graph(graph)
    members: Dict[str, List[str]] = {}
    for name in names:
        members.setdefault(block_of[name], []).append(name)
    return [
        Block(block, tuple(products), sum(multiplications[name] for name in products))
        for block, products in members.items()
    ]


def block_of_path(name: str) -> str:
    """
    The part of a node's path that names its block; also what --keep-float takes.

    As far as the first module with an index, and on while modules have one: "/layer1/layer1.0" of
    "/layer1/layer1.0/conv1/Conv", "/stages.0/blocks.1" of "/stages.0/blocks.1/ffn/MatMul". Without an index all but the
    operator. The levels of a head have the same path but for a suffix of the product, and are together.
    """
    parts = name.split("/")
    for index, part in enumerate(parts):
        if re.search(r"\.\d+$", part):
            last = index
            while re.search(r"\.\d+$", parts[min(last + 1, len(parts) - 1)]):
                last += 1
            return "/".join(parts[: last + 1])
    return "/".join(parts[:-1]) or name


def runs_of_graph(graph: FloatGraph) -> Dict[str, str]:
    """
    Name of each product to quantise -> name of its block, whatever the nodes are called.

    Products that share a weight (the levels of a head) are a block. Of the others, those of which one feeds the
    other and no MEETING_OPS lie between. A block is named after its first product.
    """
    by_weight: Dict[str, List[str]] = {}
    for node in graph.quantized:
        by_weight.setdefault(graph.constants[node.input[1]].name, []).append(node_name(node))
    shared = {name: names[0] for names in by_weight.values() if len(names) > 1 for name in names}
    runs_at: Dict[str, Set[str]] = {}  # tensor -> first products of the runs that come to it
    first_of: Dict[str, str] = {}
    to_quantize = {node.output[0] for node in graph.quantized}
    products = {node.output[0] for node in graph.products}

    for node in graph.nodes:
        arriving = set().union(*(runs_at.get(name, set()) for name in node.input))
        if node.output[0] in to_quantize and node_name(node) not in shared:
            first = min(arriving, key=list(first_of).index) if arriving else node_name(node)
            first_of[node_name(node)] = first
            arriving = {first}
        elif node.output[0] in products or node.op_type in MEETING_OPS:
            arriving = set()
        runs_at.update((name, arriving) for name in node.output)
    return {**first_of, **shared}
