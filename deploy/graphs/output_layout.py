"""The outputs of an exported graph, as a contract says: their layout and names. Needs the package onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List

import numpy as np

from deploy.contract import OUTPUTS, ModelContract
from deploy.graphs.decoding import free_names, rename_tensors
from deploy.graphs.suppression import add_suppression

if TYPE_CHECKING:
    import onnx

CANDIDATES = tuple(f"candidate_{name}" for name in OUTPUTS["topk"])
"""Names of what `lay_out` starts from."""


def lay_out(model: onnx.ModelProto, contract: ModelContract) -> None:
    """
    Gives a graph whose outputs are CANDIDATES, boxes, scores and labels, those of `contract`, in place.

    Args:
        model: of opset 13 or newer.
    """
    free_names(model, contract.output_names)
    if contract.outputs == "nms":
        add_suppression(model, contract)
    elif contract.outputs == "rows":
        _join(model, contract.output_names[0])
    else:
        rename_tensors(model, dict(zip(CANDIDATES, contract.output_names)))


def _join(model: onnx.ModelProto, name: str) -> None:
    """One output (N, K, 6) in place of the three: x1 y1 x2 y2 score label, float32."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    boxes, scores, labels = CANDIDATES
    graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "rows_axis"))
    nodes: List[Any] = [
        helper.make_node("Cast", [labels], ["rows_class"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [scores, "rows_axis"], ["rows_score"]),
        helper.make_node("Unsqueeze", ["rows_class", "rows_axis"], ["rows_label"]),
        helper.make_node("Concat", [boxes, "rows_score", "rows_label"], [name], axis=2),
    ]
    for node in nodes:
        node.name = f"rows/{node.output[0]}"
    graph.node.extend(nodes)
    batch, candidates, _ = (size.dim_value or size.dim_param for size in graph.output[0].type.tensor_type.shape.dim)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, candidates, 6]))
