"""
Whether a TensorRT version takes the operators of an ONNX graph. Needs onnx, and no TensorRT.

`operators.json` is the support table that NVIDIA's ONNX parser ships with each version (onnx-tensorrt,
docs/operators.md, 8.5 to 11.1): the versions with the opset that each reads, and for each operator a row wherever types
or restrictions change, without types where it is not supported. Rows of QuantizeLinear and DequantizeLinear follow the
parser's and the layers' own checks (NvInfer.h, onnxOpImporters.cpp), the limit of NonMaxSuppression INMSLayer's notes.
A restriction that is no key of RESTRICTIONS stands there to be read, and is not checked.

Its `importers` is what else the parser's source asserts or changes in silence, each with the versions that it holds
for ("before": the first that does not) and a verdict: `refused` by the parser or a layer; `misread`, so that the engine
would compute something else than the ONNX file; `changed`, which matters only for extreme values. Where the source of a
version was not at hand, what was read of the last one before it holds on. "*" is every operator.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple

from deploy.errors import EngineBuildError
from deploy.graphs.graph import ONNX_DOMAINS
from deploy.graphs.restrictions import RESTRICTIONS, GraphFacts
from deploy.targets import version_numbers

if TYPE_CHECKING:
    import onnx

TABLE = Path(__file__).with_name("operators.json")
LISTED = 10
"""Faults that a message names."""
TYPED_INPUT = {"Where": 1, "OneHot": 2}
"""Operator -> index of the input whose type the table means; 0 for all others."""
TYPED_OUTPUT = ("ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform")
"""Operators whose types the table gives for the output."""


class Importer(NamedTuple):
    """What the source of the parser says of some operators."""

    operators: List[str]
    since: str
    before: Optional[str]
    """The first version that it does not hold for; None: it holds still."""
    restriction: str
    verdict: str
    """'refused', 'misread' or 'changed'."""


def check_operators(model: onnx.ModelProto, version: str) -> List[str]:
    """
    What the parser of TensorRT `version` ("10.3", "10.13.3.9.post1") changes in the graph in silence, a line for each.

    The graph is compared with the table of that version, or of the last one before it that is known: operators, the
    types they take, restrictions, and the opset.

    Args:
        model: checked by `check_graph` and `check_static`, which refuses what is not looked into here: subgraphs.

    Raises:
        EngineBuildError: the parser would refuse the graph, or make something else of it. What the message names: node,
            operator and reason, of the first ten faults.
    """
    table_version, highest_opset, operators = _table_for(version)
    graph = GraphFacts(model)
    faults, notes = [], []
    if graph.opset > highest_opset:
        faults.append(f"the graph has opset {graph.opset}; expected at most {highest_opset}: export it with that")
    # Up to 8.6 the parser reads INT64 as INT32 (onnx-tensorrt, docs/operators.md of 8.x).
    long_name = "INT32" if _numbers(table_version) < (10,) else "INT64"
    for node in model.graph.node:
        name = f"{node.op_type} {node.name or node.output[0]!r}"
        importers = [entry for entry in _importers_for(version) if {node.op_type, "*"} & set(entry.operators)]
        reason = _fault(graph, node, operators, long_name) or _importer_fault(graph, node, importers)
        if reason:
            faults.append(f"{name}: {reason}")
        broken = ((RESTRICTIONS[entry.restriction](graph, node), entry) for entry in importers)
        notes += [f"{name}: {found}; {entry.restriction}" for found, entry in broken if found and _is_note(entry)]
    if faults:
        more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        lines = "".join(f"\n  {line}" for line in faults[:LISTED] + more)
        raise EngineBuildError(
            f"TensorRT {version} does not take the graph, by the operator table of TensorRT {table_version}:{lines}\n"
            "Export the model again without these, or build with another TensorRT version."
        )
    return notes


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


@functools.lru_cache(maxsize=None)
def _importers_for(version: str) -> List[Importer]:
    wanted = _numbers(version)
    return [
        entry
        for entry in (Importer(**{"before": None, **fields}) for fields in _document()["importers"])
        if _numbers(entry.since) <= wanted and (entry.before is None or wanted < _numbers(entry.before))
    ]


def _is_note(importer: Importer) -> bool:
    return importer.verdict == "changed"


def _importer_fault(graph: GraphFacts, node: onnx.NodeProto, importers: List[Importer]) -> Optional[str]:
    """Why the parser's source refuses the node, or makes something else of it; None if it does not."""
    for entry in importers:
        broken = None if _is_note(entry) else RESTRICTIONS[entry.restriction](graph, node)
        if broken and entry.verdict == "misread":
            return f"{broken}, which this parser reads otherwise, and says nothing; expected: {entry.restriction}"
        if broken:
            return f"{broken}; supported only with: {entry.restriction}"
    return None


def _fault(
    graph: GraphFacts, node: onnx.NodeProto, operators: Dict[str, Dict[str, Any]], long_name: str
) -> Optional[str]:
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
