"""
From the graph that a tracer wrote to the one that is deployed: folded, of static shapes, for any number of images, and
compared with what it was traced from.

Needs the packages onnx, onnxslim and onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Sequence

import numpy as np

from deploy.errors import ExportError
from deploy.graphs.graph import check_graph, check_static, initializers, remove_unused, share_equal_initializers

if TYPE_CHECKING:
    import onnx


def clean_graph(model: onnx.ModelProto, feed: Dict[str, Any]) -> onnx.ModelProto:
    """
    The graph with constants and shape arithmetic folded by onnxslim, and equal weights stored once.

    Folding the norms gives each level a copy of the head's convolutions, which are the same for all levels.

    Args:
        feed: input name -> array, of the one shape that the graph was traced for.

    Raises:
        ExportError: onnx's checker refuses the graph, or an operator is not ONNX's own, or a shape is not static.
    """
    import onnxslim

    model = onnxslim.slim(model)
    if any(node.op_type == "Shape" for node in model.graph.node):  # onnxslim cannot infer every one, as behind a Pad
        fix_shapes(model, feed)
        model = onnxslim.slim(model)
    share_equal_initializers(model)
    check_graph(model)
    check_static(model)
    left = sorted({node.op_type for node in model.graph.node} & {"Shape", "ConstantOfShape", "NonZero", "If", "Loop"})
    if left:
        raise ExportError(f"the graph still computes shapes ({', '.join(left)}); expected a static graph")
    return model


def fix_shapes(model: onnx.ModelProto, feed: Dict[str, Any]) -> None:
    """Replaces each Shape by what it gives for `feed`, in place, and each output's shape; all sizes are static."""
    import onnx
    import onnxruntime

    nodes = [node for node in model.graph.node if node.op_type == "Shape"]
    outputs = list(model.graph.output)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in nodes)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, feed)
    for value, result in zip(outputs, results):
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, result.shape))
    for node, result in zip(nodes, results[len(outputs) :]):
        model.graph.initializer.append(onnx.numpy_helper.from_array(result, node.output[0]))
        model.graph.node.remove(node)
    del model.graph.value_info[:]  # inferred without these


def graph_of_any_batch(two: onnx.ModelProto, three: onnx.ModelProto) -> onnx.ModelProto:
    """
    `two`, changed so that it takes any number of images, without computing a shape.

    What differs between a graph for two images and one for three is the number of images. In a Reshape it becomes -1,
    in an Expand 1, since there is nothing to repeat; the sizes of a Resize become scales.

    Raises:
        ExportError: another operator depends on the number of images, or the nodes themselves.
    """
    from onnx import numpy_helper, shape_inference

    def differs(reason: str) -> ExportError:
        return ExportError(
            f"the graph depends on the number of images by more than sizes: {reason}. Give a number, as in --batch 1"
        )

    def shapes_in(model: onnx.ModelProto) -> Dict[str, Any]:
        graph = shape_inference.infer_shapes(model).graph
        values = (*graph.input, *graph.value_info, *graph.output)
        return {value.name: np.array([d.dim_value for d in value.type.tensor_type.shape.dim]) for value in values}

    values = [{name: numpy_helper.to_array(t) for name, t in initializers(model).items()} for model in (two, three)]
    shapes, other_shapes = shapes_in(two), shapes_in(three)
    if [node.op_type for node in two.graph.node] != [node.op_type for node in three.graph.node]:
        raise differs("its nodes are others")
    for node, other in zip(two.graph.node, three.graph.node):
        for index, (name, other_name) in enumerate(zip(node.input, other.input)):
            if name not in values[0] or other_name not in values[1]:
                continue
            if np.array_equal(values[0][name], values[1][other_name]):
                continue
            known = values[0].get(node.input[0])
            before = shapes[node.input[0]] if known is None else np.array(known.shape)
            after = shapes[node.output[0]]
            of_batch = after != other_shapes[other.output[0]]
            if node.op_type == "Reshape" and of_batch.sum() == 1:
                changed = np.where(of_batch, -1, after)
            elif node.op_type == "Expand" and len(before) == len(after) and (before == after)[of_batch].all():
                changed = np.where(of_batch, 1, after)
            elif node.op_type == "Resize" and index == 3 and of_batch.tolist() == [True, False, False, False]:
                changed = (after / before).astype(np.float32)
                del node.input[3]
                index = 2
            else:
                raise differs(f"the input {name} of {node.name or node.output[0]} ({node.op_type})")
            two.graph.initializer.append(numpy_helper.from_array(changed, f"{node.output[0]}_{index}_of_any_batch"))
            node.input[index] = two.graph.initializer[-1].name
    for value in (*two.graph.input, *two.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del two.graph.value_info[:]  # for two images
    remove_unused(two)
    return two


def run_once(path: Path, feed: Dict[str, Any]) -> List[Any]:
    """
    The outputs of an ONNX file for one feed, by ONNX Runtime.

    Raises:
        ExportError: it cannot run there.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, feed)
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise ExportError(f"ONNX Runtime cannot run the exported graph: {error}") from error


def check_same_outputs(path: Path, input_name: str, images: Any, expected: Sequence[Any]) -> None:
    """
    Runs the file on ONNX Runtime and compares it with torch: scores to 1e-4, boxes to 0.05 pixel.

    Candidates of equal score may change places, so scores are compared in order and boxes by their nearest.

    Args:
        images: the network input. expected: boxes, scores and labels before NMS.

    Raises:
        ExportError: they differ.
    """
    boxes, scores, _labels = run_once(path, {input_name: images})
    score_error = float(np.abs(np.sort(scores) - np.sort(expected[1])).max())
    box_error = max(
        float(
            np.abs(boxes_here[:, None] - boxes_of_torch[None, :100]).max(-1).min(0).max()
        )  # each of torch's first to its nearest
        for boxes_here, boxes_of_torch in zip(boxes, expected[0])
    )
    if not (score_error <= 1e-4 and box_error <= 0.05):  # so written, not-a-number differs, too
        raise ExportError(
            f"the exported graph does not compute what the detector does: scores differ by {score_error:.2g}, boxes by "
            f"{box_error:.2g} pixel; expected at most 1e-4 and 0.05"
        )
