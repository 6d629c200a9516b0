"""
What a quantised graph really does: each convolution and matrix product in INT8, weight-only or float, and why.

    python -m calibration.audit student.int8.onnx
    python -m calibration.audit student.int8.onnx --json

Reads any ONNX file with Q/DQ pairs, whoever wrote it; needs onnx, and onnxruntime for files of that target. A product
(Conv, Gemm, MatMul) is

- INT8 where both of its factors come from a DequantizeLinear (activations also through operators that only
  choose or move values, past which runtimes move the pair: MaxPool, nearest Resize, Reshape, Transpose, Slice, Split);
- weight-only where only the weight does: it is computed in float from rounded weights, accuracy lost and no time won;
- float otherwise.

A file for ONNX Runtime is also compared, node by node, with what that really runs: its optimised graph. A product
that has its pairs and runs in float there counts as float, and is a fault.

Beside them: norms between INT8 convolutions, each of which costs a way to float and back; the input scales of the
products that share a weight, level by level; the share of multiplications that is done in INT8.

Exit status 1 where something is wrong: weight-only products, final predictions rounded or, where nobody asked for it,
in INT8, products that ONNX Runtime runs in float in spite of their pairs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Set, Tuple

from calibration.placement import INTEGER_PRODUCTS, node_name, only_moves
from deploy.contract import read_sidecar, sidecar_path
from deploy.errors import CalibrationError, command
from deploy.graphs.graph import (
    TRANSPARENT_OPS,
    check_graph,
    check_no_subgraph,
    constants,
    consumers,
    load_onnx,
    producers,
)
from deploy.graphs.products import Products
from deploy.int8_format import FloatReason, float_codes

if TYPE_CHECKING:
    import onnx

NORMS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization")
COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators whose multiplications are counted."""
INTEGER_OPERATORS = ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul")
"""Of ONNX Runtime, for products of integers."""
INT8, WEIGHT_ONLY, FLOAT = "INT8", "weight-only", "float"


@dataclasses.dataclass(frozen=True)
class Product:
    """One convolution or matrix product of a quantised graph: what it is computed in, and why."""

    name: str
    operator: str
    """Conv, Gemm or MatMul."""
    state: str
    """INT8, WEIGHT_ONLY or FLOAT."""
    why: str
    """Why it is not INT8, for people; empty where it is."""
    code: str
    """Why it is in float, for programs: that of a `FloatReason`; empty where the sidecar has another reason."""
    multiplications: Optional[int]
    """Multiplications for one image; None where the graph's shapes do not say."""
    input_scale: Optional[float]
    """Scale of its quantised input."""
    weight: str
    """The name of its weight: the levels of a head share one."""
    fault: str
    """What is wrong with it, for people; empty where nothing is."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """Every product of a quantised graph, and what of them can cost accuracy or time."""

    products: List[Product]
    int8_share: Optional[float]
    """Multiplications in INT8 / all of convolutions and matrix products; None where shapes are not known."""
    norm_sandwiches: List[Dict[str, str]]
    """`norm`, and one INT8 convolution `before` and one `after` it."""
    shared_weights: Dict[str, List[Tuple[str, float]]]
    """Weight of several INT8 products -> (product, scale of its input), in the order of the graph."""
    runtime: Optional[str] = None
    """Whose optimised graph the states were compared with; None: they were not."""

    @property
    def faults(self) -> List[str]:
        """What is wrong, product by product, for people."""
        return [f"{entry.name}: {entry.fault}" for entry in self.products if entry.fault]


class _Tables:
    """The tables of a graph that the audit asks."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = constants(model)
        self.producers = producers(model)
        self.consumers = consumers(model)
        self.shapes = _shapes(model)
        self.products = Products(model)
        self.final = self.products.final
        first = model.graph.input[0].type.tensor_type.shape.dim[:1] if model.graph.input else []
        self.batch = max(1, *(size.dim_value for size in first), 1)
        """Images in a batch; an open number counts as 1."""

    def dequantizer(self, tensor: str) -> Optional[onnx.NodeProto]:
        """The DequantizeLinear whose values a tensor holds, if there is one."""
        node = self.producers.get(tensor)
        while node is not None and only_moves(node):
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def constant_name(self, tensor: str) -> str:
        """The constant that a tensor holds, through Identity, Q and DQ; else the tensor itself."""
        source = tensor
        while source in self.producers and self.producers[source].op_type in TRANSPARENT_OPS:
            source = self.producers[source].input[0]
        return self.constants[source].name if source in self.constants else tensor

    def scale(self, dequantizer: onnx.NodeProto) -> Optional[float]:
        from onnx import numpy_helper

        tensor = self.constants.get(dequantizer.input[1])
        return None if tensor is None else float(numpy_helper.to_array(tensor).max())

    def neighbours(self, tensors: Iterable[str], forward: bool) -> Set[str]:
        """Outputs of the convolutions behind or before some tensors with no other product between."""
        pending, seen, convolutions = list(tensors), set(), set()
        products = {node.output[0] for node in self.products.nodes}
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            nodes = [node for node, _ in self.consumers.get(name, [])] if forward else [self.producers.get(name)]
            for node in nodes:
                if node is None or node.op_type == "Shape":
                    continue
                if node.op_type == "Conv":
                    convolutions.add(node.output[0])
                elif node.output[0] not in products:
                    pending.extend(node.output if forward else node.input)
        return convolutions


def operators_of_onnxruntime(model: onnx.ModelProto) -> Dict[str, str]:
    """
    Node name -> operator, of the graph that ONNX Runtime makes of a model before it runs it on the CPU.

    Raises:
        CalibrationError: it cannot run it.
    """
    import onnx
    import onnxruntime

    named = onnx.ModelProto()
    named.CopyFrom(model)
    for node in named.graph.node:  # by its name a node is found again
        node.name = node_name(node)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The level above only changes the layout of data, and the nodes' names with it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(named.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
            raise CalibrationError(f"ONNX Runtime, for which the file was made, cannot run it: {error}") from error
        optimized = onnx.load(options.optimized_model_filepath)
    return {node.name: node.op_type for node in optimized.graph.node}


def audit(
    model: onnx.ModelProto,
    details: Optional[Mapping[str, Any]] = None,
    run_as: Optional[Mapping[str, str]] = None,
    runtime: Optional[str] = None,
) -> Audit:
    """
    What the quantised model does.

    Args:
        details: of the model's sidecar, which says why products are in float.
        run_as: as `operators_of_onnxruntime`, to compare with. runtime: its name and version.

    Raises:
        ExportError: it has control flow.
        CalibrationError: it has no Q/DQ pairs, or integer operators instead of them.
    """
    check_no_subgraph(model)
    operators = {node.op_type for node in model.graph.node}
    if operators.intersection(INTEGER_PRODUCTS):
        raise CalibrationError(
            f"the graph has {sorted(operators.intersection(INTEGER_PRODUCTS))}, integer operators of one runtime; "
            "expected Q/DQ pairs around float ones. Quantise to the Q/DQ format."
        )
    if "DequantizeLinear" not in operators:
        raise CalibrationError("the graph has no DequantizeLinear; expected a quantised model, of calibration.quantize")
    tables = _Tables(model)
    products = {
        node.output[0]: _as_run(_product(tables, node, details or {}), run_as or {}, runtime)
        for node in tables.products.nodes
    }
    shared: Dict[str, List[Tuple[str, float]]] = {}
    for entry in products.values():
        if entry.state == INT8 and entry.input_scale is not None:
            shared.setdefault(entry.weight, []).append((entry.name, entry.input_scale))
    return Audit(
        list(products.values()),
        _int8_share(tables, products),
        _norm_sandwiches(tables, products),
        {weight: levels for weight, levels in shared.items() if len(levels) > 1},
        runtime,
    )


def _as_run(entry: Product, run_as: Mapping[str, str], runtime: Optional[str]) -> Product:
    """The product in the state in which the runtime has it."""
    operator = run_as.get(entry.name, "another node")
    if entry.state != INT8 or not run_as or operator in INTEGER_OPERATORS:
        return entry
    why = f"{runtime} runs it in float, as {operator}, in spite of its pairs"
    fault = entry.fault or f"{why}: accuracy lost and no time won; leave them out, with --keep-float {entry.name}"
    code = FloatReason.RUNTIME.code
    return dataclasses.replace(entry, state=FLOAT, why=why, code=code, input_scale=None, fault=fault)


def _product(tables: _Tables, node: onnx.NodeProto, details: Mapping[str, Any]) -> Product:
    dequantizer = tables.dequantizer(node.input[0])
    weight_quantized = tables.dequantizer(node.input[1]) is not None
    has_weight = node.op_type == "Conv" or tables.products.weight(node) is not None
    final, code, fault = node.output[0] in tables.final, "", ""
    if dequantizer is not None and weight_quantized:
        state, why = INT8, ""
        if final and not details.get("int8_predictors"):
            fault = "a final prediction in INT8: scores shrink and boxes move; keep it in float"
    elif weight_quantized and has_weight:
        maker = tables.producers.get(node.input[0])
        source = "an input of the graph" if maker is None else f"{maker.op_type} {node_name(maker)}"
        state, why = WEIGHT_ONLY, f"its input comes from {source} without a pair"
        fault = f"weight-only, {why}: accuracy lost and no time won; quantise its input too, or leave its weight float"
    else:
        without_weight = FloatReason.NO_PAIR if has_weight else FloatReason.TWO_ACTIVATIONS
        reason = FloatReason.FINAL_PREDICTION if final else without_weight
        state, why = FLOAT, details.get("float_convolutions", {}).get(node_name(node), reason.text)
        code = float_codes(details).get(node_name(node), reason.code)
    rounded = _rounded_after(tables, node.output[0]) if final and not fault else ""
    if rounded:
        fault = f"the final prediction is rounded by {rounded}: scores shrink and boxes move; leave out that pair"
    scale = None if dequantizer is None or state != INT8 else tables.scale(dequantizer)
    count, weight = _multiplications(tables, node), tables.constant_name(node.input[1])
    return Product(node_name(node), node.op_type, state, why, code, count, scale, weight, fault)


def _rounded_after(tables: _Tables, tensor: str) -> str:
    """The name of a QuantizeLinear between a tensor and the outputs, no other product between, or nothing."""
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node, _ in tables.consumers.get(name, []):
            on_the_way = tables.products.behind.intersection(node.output)
            if node.op_type == "QuantizeLinear" and on_the_way:
                return node_name(node)
            pending.extend(on_the_way)
    return ""


def _norm_sandwiches(tables: _Tables, products: Dict[str, Product]) -> List[Dict[str, str]]:
    def nearest_int8(tensors: Iterable[str], forward: bool) -> List[str]:
        near = (products[name] for name in tables.neighbours(tensors, forward))
        return sorted(convolution.name for convolution in near if convolution.state == INT8)

    sandwiches = []
    for node in tables.nodes:
        if node.op_type in NORMS:
            before, after = nearest_int8([node.input[0]], forward=False), nearest_int8(node.output, forward=True)
            if before and after:
                sandwiches.append({"norm": node_name(node), "before": before[0], "after": after[0]})
    return sandwiches


def _int8_share(tables: _Tables, products: Dict[str, Product]) -> Optional[float]:
    counts = [
        (products[node.output[0]].state if node.output[0] in products else FLOAT, _multiplications(tables, node))
        for node in tables.nodes
        if node.op_type in COUNTED
    ]
    known = [(state, number) for state, number in counts if number is not None]
    if not known or len(known) < len(counts):
        return None
    return sum(number for state, number in known if state == INT8) / sum(number for _, number in known)


def _multiplications(tables: _Tables, node: onnx.NodeProto) -> Optional[int]:
    """
    Multiplications of a convolution or matrix product, for one image; None where the shapes are not known.

    Each value of a convolution's output takes one for every weight of its channel. A transposed one spreads each value
    of its input instead. The rows of a matrix product may be those of several images.
    """
    read, weight, made = (tables.shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if read is None or weight is None or made is None:
        return None
    if node.op_type == "Conv":
        return math.prod(made[1:]) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(read[1:]) * math.prod(weight[1:])
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(made) * read[0 if transposed else 1] // tables.batch
    return math.prod(made) * read[-1] // tables.batch


def _shapes(model: onnx.ModelProto) -> Dict[str, Tuple[int, ...]]:
    """Tensor -> its sizes, of those whose sizes are all known; an open batch counts as 1."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: Dict[str, Tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    batch = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} - {""}
    for value in (*graph.value_info, *graph.input, *graph.output):
        sizes = [1 if size.dim_param in batch else size.dim_value for size in value.type.tensor_type.shape.dim]
        if all(sizes):
            shapes[value.name] = tuple(sizes)
    return shapes


def table_from_audit(result: Audit) -> str:
    """The audit as text, for people."""
    total = sum(entry.multiplications or 0 for entry in result.products)
    counts = collections.Counter(entry.state for entry in result.products)
    width = max((len(entry.name) for entry in result.products), default=len("product"))
    lines = [f"{'product':{width}}  {'state':11}  share of  input scale  why", f"{'':{width + 15}}products"]
    for entry in result.products:
        share = f"{entry.multiplications / total:8.1%}" if entry.multiplications and total else f"{'?':>8}"
        scale = f"{entry.input_scale:11.4g}" if entry.input_scale is not None else f"{'':11}"
        lines.append(f"{entry.name:{width}}  {entry.state:11}  {share}  {scale}  {entry.why}".rstrip())
    lines += ["", ", ".join(f"{counts[state]} {state}" for state in (INT8, WEIGHT_ONLY, FLOAT))]
    if result.int8_share is not None:
        lines.append(f"{result.int8_share:.1%} of the multiplications in INT8")
    else:
        lines.append(
            "the share of multiplications in INT8 is not known: onnx cannot infer all shapes (onnxslim may help)"
        )
    if result.runtime:
        lines.append(f"compared with what {result.runtime} runs, node by node")
    for weight, levels in result.shared_weights.items():
        scales = ", ".join(f"{scale:.4g}" for _, scale in levels)
        lines.append(f"weight {weight} at {len(levels)} levels, input scales {scales}")
    for sandwich in result.norm_sandwiches:
        lines.append(
            f"{sandwich['norm']} runs in float between {sandwich['before']} and {sandwich['after']} in INT8; a "
            "BatchNorm, folded into its convolution, would not"
        )
    return "\n".join(lines)


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Audits one model; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.audit",
        description="What each convolution and matrix product of a quantised ONNX model is run in.",
    )
    parser.add_argument("model", help="ONNX file with Q/DQ pairs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    model = load_onnx(arguments.model)
    check_graph(model)
    details: Dict[str, Any] = {}
    if sidecar_path(Path(arguments.model)).is_file():  # who else wrote the file need not have left one
        details = read_sidecar(arguments.model).get("details", {})
    run_as, runtime = None, None
    if details.get("target") == "onnxruntime":
        try:
            import onnxruntime

            runtime = f"ONNX Runtime {onnxruntime.__version__}"
            run_as = operators_of_onnxruntime(model)
        except ImportError:
            print("note: onnxruntime is not installed: what it runs is not compared", file=sys.stderr)
    result = audit(model, details, run_as, runtime)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "faults": result.faults}, indent=1))
    else:
        print(table_from_audit(result))
    for fault in result.faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
