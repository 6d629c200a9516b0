"""Non-maximum suppression in the graph. Needs the package onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import numpy as np

from deploy.contract import ModelContract

if TYPE_CHECKING:
    import onnx


def add_suppression(model: onnx.ModelProto, contract: ModelContract) -> None:
    """
    Appends threshold and NMS per class to a graph with the outputs of 'topk', in place: outputs as of 'nms'.

    As mmdet's `batched_nms`: the boxes of each class are moved to a place of their own, so that boxes overlap within
    their class only. Boxes are clipped to the network input before: the size of the image in it, to which
    deploy/runtime/postprocess.py clips, the graph does not know. TensorRT looks at the best 5000 candidates of an image
    only (`INMSLayer.topk_box_limit` in its Python API). What NMS reads has to stay in float32, where large numbers keep
    their pixels.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    boxes, scores, labels = (value.name for value in graph.output)
    width, height = contract.input_width_px, contract.input_height_px

    def constant(name: str, value: Any, kind: Any = np.int64) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, kind), f"nms_{name}"))
        return f"nms_{name}"

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(operator, inputs, [output], name=f"nms/{output}", **attributes))
        return output

    clipped = add("Max", [boxes, constant("zero", 0, np.float32)], "nms_inside")
    limits = constant("limits", [width, height, width, height], np.float32)
    clipped = add("Min", [clipped, limits], "nms_clipped")  # (N, K, 4)
    corners = [
        add("Gather", [clipped, constant(name, axes)], f"nms_{name}_corner", axis=2)
        for name, axes in (("second", [2, 3]), ("first", [0, 1]))
    ]
    sides = add("Sub", corners, "nms_sides")
    # Of a box without an area NonMaxSuppression would swap the corners; mmdet drops it.
    shortest = add("ReduceMin", [sides], "nms_shortest", axes=[2], keepdims=0)  # (N, K)
    solid = add("Cast", [add("Greater", [shortest, "nms_zero"], "nms_solid")], "nms_factor", to=TensorProto.FLOAT)
    solid_scores = add("Mul", [scores, solid], "nms_scores")
    place = add("Cast", [labels], "nms_class", to=TensorProto.FLOAT)
    place = add("Mul", [place, constant("offset", max(width, height) + 1, np.float32)], "nms_place")
    moved = add("Add", [clipped, add("Unsqueeze", [place, constant("last", [2])], "nms_place_column")], "nms_moved")
    rows = add("Unsqueeze", [solid_scores, constant("middle", [1])], "nms_score_rows")  # (N, 1, K)
    settings = [
        constant("max_detections", [contract.max_detections]),
        constant("iou_threshold", [contract.nms_iou_threshold], np.float32),
        constant("score_threshold", [contract.score_threshold], np.float32),
    ]
    selected = add("NonMaxSuppression", [moved, rows, *settings], "nms_selected")  # (D, 3): image, 0, candidate
    index = add("Gather", [selected, constant("image_and_candidate", [0, 2])], "nms_index", axis=1)
    box_name, score_name, label_name, image_name = contract.output_names
    add("GatherND", [clipped, index], box_name)
    add("GatherND", [scores, index], score_name)
    add("GatherND", [labels, index], label_name)
    add("Gather", [selected, constant("image", 0)], image_name, axis=1)
    del graph.output[:]
    for name, kind, sizes in (
        (box_name, TensorProto.FLOAT, (4,)),
        (score_name, TensorProto.FLOAT, ()),
        (label_name, TensorProto.INT64, ()),
        (image_name, TensorProto.INT64, ()),
    ):
        graph.output.append(helper.make_tensor_value_info(name, kind, ["D", *sizes]))
