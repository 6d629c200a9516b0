"""
Small detectors as other projects export them: families of them, and their detections by a slow decoding of one's own.

All have the same backbone, with weights that are the same in each run, and three levels of strides 8, 16 and 32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.stand_ins.detector import Net

SIZE_PX, BINS = 64, 8
STRIDES = (8, 16, 32)
CLASS_NAMES = ("disc", "bar", "ring")
CLASSES = len(CLASS_NAMES)
SCORE_THRESHOLD, NMS_IOU_THRESHOLD = 0.05, 0.6
CONTRACT: dict[str, Any] = {
    "input_name": "image",
    "input_shape": [1, 3, SIZE_PX, SIZE_PX],
    "channel_order": "rgb",
    "mean": [120.0, 120.0, 120.0],
    "std": [60.0, 60.0, 60.0],
    "pad_value": [120.0, 120.0, 120.0],
    "resize": "stretch",
    "class_names": list(CLASS_NAMES),
    "category_ids": [1, 2, 3],
    "score_threshold": SCORE_THRESHOLD,
    "nms_iou_threshold": NMS_IOU_THRESHOLD,
    "max_detections": 1000,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "yolox": {"output_names": ["output"], "decode": "grid"},
    "yolov5": {"output_names": ["output0"], "box_format": "cxcywh"},
    "yolov8": {"output_names": ["output0"], "box_format": "cxcywh"},
    "rtdetr": {},
    "end_to_end": {"output_names": ["output0"], "output_parts": [["boxes", "score", "label"]]},
    "detr": {
        "score_format": "softmax_logits",
        "background": "last",
        "box_format": "cxcywh",
        "box_units": "fractions",
    },
    "ssd": {"background": "first", "box_units": "fractions"},
    "picodet": {"decode": "bins", "strides": [8, 16, 32]},
    "nanodet": {"decode": "bins", "score_format": "logits", "output_parts": [["scores", "boxes"]]},
}
"""Family -> what its contract says beside CONTRACT."""


class ForeignNet(Net):
    """A graph with the backbone that all share."""

    def backbone(self) -> list[str]:
        """Maps of 8 channels, of strides 8, 16 and 32."""
        x = self("Relu", self.conv("image", self.weight(8, 3, 3), stride=4))
        maps = []
        for _ in STRIDES:
            x = self("Relu", self.conv(x, self.weight(8, 8, 3), stride=2))
            maps.append(x)
        return maps

    def prediction(self, x: str, channels: int, factor: float = 1.0) -> str:
        return self("Mul", self.conv(x, self.weight(channels, 8, 1), final=True), self.constant(factor))

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def rows(self, x: str, channels: int) -> str:
        """(1, channels, h, w) -> (1, h w, channels)."""
        return self("Transpose", self("Reshape", x, self.ints(1, channels, -1)), perm=[0, 2, 1])

    def all_rows(self, maps: list[str], channels: int, factor: float = 1.0) -> str:
        return self("Concat", *(self.rows(self.prediction(x, channels, factor), channels) for x in maps), axis=1)


def points_px() -> tuple[np.ndarray, np.ndarray]:
    """(the corners of the cells (K, 2), their strides (K, 1))."""
    corners, strides = [], []
    for stride in STRIDES:
        for row in range(SIZE_PX // stride):
            for column in range(SIZE_PX // stride):
                corners.append((column * stride, row * stride))
                strides.append([stride])
    return np.array(corners, np.float64), np.array(strides, np.float64)


def foreign_model(family: str, opset: int = 17) -> Any:
    """The ONNX model of a family, as its exporter writes it."""
    import onnx
    from onnx import helper, numpy_helper

    net = ForeignNet(None)
    maps = net.backbone()
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    corners, strides = points_px()
    rows = len(corners)
    inputs = [helper.make_tensor_value_info("image", float32, [1, 3, SIZE_PX, SIZE_PX])]
    outputs: list[tuple[str, int, list[int]]] = []

    def distances_px() -> str:
        return net("Mul", net("Softplus", net.all_rows(maps, 4)), net.constant(strides[None]))

    def centre_boxes_px() -> str:
        """(1, K, 4), centre and size."""
        centres = net("Add", net("Mul", net("Tanh", net.all_rows(maps, 2)), net.constant(strides[None])),
                      net.constant((corners + strides / 2)[None]))  # fmt: skip
        sizes = net("Mul", net("Softplus", net.all_rows(maps, 2)), net.constant(strides[None]))
        return net("Concat", centres, sizes, axis=2)

    if family == "yolox":
        scores = net("Sigmoid", net.all_rows(maps, 1 + CLASSES, 3.0))
        net("Concat", net.all_rows(maps, 4, 0.5), scores, outputs=("output",), axis=2)
        outputs = [("output", float32, [1, rows, 5 + CLASSES])]
    elif family == "yolov5":
        scores = net("Sigmoid", net.all_rows(maps, 1 + CLASSES, 3.0))
        net("Concat", centre_boxes_px(), scores, outputs=("output0",), axis=2)
        outputs = [("output0", float32, [1, rows, 5 + CLASSES])]
    elif family == "yolov8":  # sums over bins are a convolution with the weights 0, 1, 2, ...
        bins = net(
            "Reshape", net("Transpose", net.all_rows(maps, 4 * BINS, 3.0), perm=[0, 2, 1]), net.ints(1, 4, BINS, rows)
        )
        shares = net("Softmax", net("Transpose", bins, perm=[0, 2, 1, 3]), axis=1)
        sums = net("Conv", shares, net.constant(np.arange(BINS).reshape(1, BINS, 1, 1)), kernel_shape=[1, 1])
        sides = net("Reshape", sums, net.ints(1, 4, rows))
        middle = net.constant((corners / strides + 0.5).T[None])
        low, high = (
            net(operator, middle, net("Slice", sides, net.ints(start), net.ints(start + 2), net.ints(1)))
            for operator, start in (("Sub", 0), ("Add", 2))
        )
        centre, size = net("Mul", net("Add", low, high), net.constant(0.5)), net("Sub", high, low)
        boxes = net("Mul", net("Concat", centre, size, axis=1), net.constant(strides.T[None]))
        scores = net("Transpose", net("Sigmoid", net.all_rows(maps, CLASSES, 3.0)), perm=[0, 2, 1])
        net("Concat", boxes, scores, outputs=("output0",), axis=1)
        outputs = [("output0", float32, [1, 4 + CLASSES, rows])]
    elif family in ("rtdetr", "end_to_end"):  # boxes in pixels of the photo, whose size is a second input
        inputs.append(helper.make_tensor_value_info("orig_target_sizes", int64, [1, 2]))
        queries = 30
        probabilities = net("Reshape", net("Sigmoid", net.all_rows(maps, CLASSES, 3.0)), net.ints(1, rows * CLASSES))
        net("TopK", probabilities, net.ints(queries), outputs=("scores", "pairs"))
        net("Mod", "pairs", net.ints(CLASSES), outputs=("labels",))
        centre = net("Mul", centre_boxes_px(), net.constant(1 / SIZE_PX))
        place, half = (net("Slice", centre, net.ints(a), net.ints(a + 2), net.ints(2)) for a in (0, 2))
        half = net("Mul", half, net.constant(0.5))
        corners_01 = net("Concat", net("Sub", place, half), net("Add", place, half), axis=2)
        size = net("Cast", "orig_target_sizes", to=float32)
        scaled = net("Mul", corners_01, net("Unsqueeze", net("Concat", size, size, axis=1), net.ints(1)))
        index = net("Unsqueeze", net("Div", "pairs", net.ints(CLASSES)), net.ints(2))
        net("GatherElements", scaled, net("Expand", index, net.ints(1, 1, 4)), outputs=("boxes",), axis=1)
        outputs = [
            ("labels", int64, [1, queries]),
            ("boxes", float32, [1, queries, 4]),
            ("scores", float32, [1, queries]),
        ]
        if family == "end_to_end":  # one tensor, of boxes in pixels of the input
            inputs.pop()
            net.tensors["orig_target_sizes"] = np.array([[SIZE_PX, SIZE_PX]])
            columns = [net("Unsqueeze", name, net.ints(2)) for name in ("scores", net("Cast", "labels", to=float32))]
            net("Concat", "boxes", *columns, outputs=("output0",), axis=2)
            outputs = [("output0", float32, [1, queries, 6])]
    elif family == "detr":  # the last class is none
        net("Identity", net.all_rows(maps, CLASSES + 1, 3.0), outputs=("logits",))
        net("Mul", centre_boxes_px(), net.constant(1 / SIZE_PX), outputs=("pred_boxes",))
        outputs = [("logits", float32, [1, rows, CLASSES + 1]), ("pred_boxes", float32, [1, rows, 4])]
    elif family == "ssd":  # class 0 is the background
        net("Softmax", net.all_rows(maps, 1 + CLASSES, 3.0), outputs=("scores",), axis=2)
        away = net("Mul", distances_px(), net.constant([-1, -1, 1, 1]))
        middle = net.constant(np.tile(corners + strides / 2, 2)[None])
        net("Mul", net("Add", away, middle), net.constant(1 / SIZE_PX), outputs=("boxes",))
        outputs = [("scores", float32, [1, rows, 1 + CLASSES]), ("boxes", float32, [1, rows, 4])]
    elif family == "picodet":  # maps of each level, classes first, all of them probabilities
        for kind, channels in (("cls_pred", CLASSES), ("dis_pred", 4 * BINS)):
            for x, stride in zip(maps, STRIDES, strict=True):
                name, found = f"{kind}_stride_{stride}", net.rows(net.prediction(x, channels, 3.0), channels)
                net("Sigmoid" if kind == "cls_pred" else "Identity", found, outputs=(name,))
                outputs.append((name, float32, [1, (SIZE_PX // stride) ** 2, channels]))
    else:
        net("Identity", net.all_rows(maps, CLASSES + 4 * BINS, 3.0), outputs=("output",))
        outputs = [("output", float32, [1, rows, CLASSES + 4 * BINS])]
    graph = helper.make_graph(
        net.nodes,
        family,
        inputs,
        [helper.make_tensor_value_info(name, kind, sizes) for name, kind, sizes in outputs],
        [numpy_helper.from_array(values, name) for name, values in net.tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model if opset == 17 else onnx.version_converter.convert_version(model, opset)


def write_foreign(folder: Path, family: str, opset: int = 17) -> Path:
    """Writes FAMILY.onnx and its contract, FAMILY.contract.json, to the folder."""
    import onnx

    path = folder / f"{family}.onnx"
    onnx.save(foreign_model(family, opset), str(path))
    path.with_suffix(".contract.json").write_text(json.dumps({**CONTRACT, **FAMILIES[family]}))
    return path


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def slow_candidates(family: str, outputs: Mapping[str, np.ndarray]) -> list[tuple[float, int, list[float]]]:
    """(score, label, [x1, y1, x2, y2] in pixels) of every row and class, one by one."""
    corners, strides = points_px()
    found = []
    if family == "end_to_end":
        return [(float(row[4]), int(row[5]), [float(value) for value in row[:4]]) for row in outputs["output0"][0]]
    if family == "rtdetr":
        for row in range(outputs["boxes"].shape[1]):
            box = [float(value) for value in outputs["boxes"][0, row]]
            found.append((float(outputs["scores"][0, row]), int(outputs["labels"][0, row]), box))
        return found
    if family == "picodet":
        per_level = {kind: [outputs[f"{kind}_stride_{s}"][0] for s in STRIDES] for kind in ("cls_pred", "dis_pred")}
        raw = np.concatenate([np.concatenate(per_level["cls_pred"]), np.concatenate(per_level["dis_pred"])], axis=1)
    elif family == "detr":
        raw = np.concatenate([outputs["pred_boxes"][0] * SIZE_PX, outputs["logits"][0]], axis=1)
    elif family == "ssd":
        raw = np.concatenate([outputs["boxes"][0], outputs["scores"][0]], axis=1)
    else:
        (raw,) = outputs.values()
        raw = raw[0].T if family == "yolov8" else raw[0]
    for (x, y), (stride,), row in zip(corners, strides, raw.astype(np.float64), strict=True):
        if family in ("yolox", "yolov5", "yolov8", "detr"):
            cx, cy, w, h = row[:4]
            if family == "yolox":
                cx, cy, w, h = x + cx * stride, y + cy * stride, math.exp(w) * stride, math.exp(h) * stride
            box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            if family == "detr":
                weights = [math.exp(value) for value in row[4:]]
                scores = [weight / sum(weights) for weight in weights[:-1]]
            else:
                scores = list(row[4:]) if family == "yolov8" else [row[4] * score for score in row[5:]]
        elif family == "ssd":
            box, scores = [value * SIZE_PX for value in row[:4]], list(row[5:])
        else:
            scores = [_sigmoid(value) if family == "nanodet" else value for value in row[:CLASSES]]
            sides = []
            for side in range(4):
                weights = [math.exp(value) for value in row[CLASSES + side * BINS : CLASSES + (side + 1) * BINS]]
                sides.append(stride * sum(i * weight for i, weight in enumerate(weights)) / sum(weights))
            cx, cy = x + stride / 2, y + stride / 2
            box = [cx - sides[0], cy - sides[1], cx + sides[2], cy + sides[3]]
        found += [(float(score), label, box) for label, score in enumerate(scores)]
    return found


def slow_detections(family: str, outputs: Mapping[str, np.ndarray]) -> list[tuple[float, int, list[float]]]:
    """What is left of `slow_candidates` after threshold, clipping and suppression per class, the best first."""

    def iou(first: list[float], second: list[float]) -> float:
        w = min(first[2], second[2]) - max(first[0], second[0])
        h = min(first[3], second[3]) - max(first[1], second[1])
        if w <= 0 or h <= 0:
            return 0.0
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
        return w * h / (sum(areas) - w * h)

    kept: list[tuple[float, int, list[float]]] = []
    for score, label, box in sorted(slow_candidates(family, outputs), key=lambda one: -one[0]):
        clipped = [min(max(value, 0.0), float(SIZE_PX)) for value in box]
        if score <= SCORE_THRESHOLD or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            continue
        if all(label != other or iou(clipped, best) <= NMS_IOU_THRESHOLD for _, other, best in kept):
            kept.append((score, label, clipped))
    return kept
