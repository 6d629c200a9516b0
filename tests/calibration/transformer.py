"""A detector with a decoder as RT-DETR's, small enough to read, in the operators that torch's exporter writes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from tests.calibration.conftest import CLASSES, HEIGHT_PX, TOP, WIDTH_PX, Builder

WIDTH, HEADS, QUERIES, LAYERS = 32, 2, 10, 2
TOKENS = (HEIGHT_PX // 4) * (WIDTH_PX // 4)
LINEARS = 2 + LAYERS * 14
"""Fully connected layers that are to be INT8: two of the encoder's boxes; of each layer of the decoder one of the
position (the other reads four values), one of the deformable attention (the other says where), four of each of the two
others, two behind them and two of the box."""
PREDICTORS = 1 + LAYERS + 1
"""The last of each box's, and the classes. Those of the encoder say which queries are read."""


class _Transformer(Builder):
    def linear(self, x, name, inputs, outputs, bias=True):
        """MatMul and Add, as torch writes a fully connected layer of more than two dimensions."""
        deviation = inputs**-0.5
        weight = self.random.normal(0, deviation, (inputs, outputs)).astype(np.float32)
        y = self.node("MatMul", [x, self.constant(f"{name}.weight", weight)], f"{name}.product" if bias else name)
        if not bias:
            return y
        values = self.random.normal(0, 0.1, outputs).astype(np.float32)
        return self.node("Add", [self.constant(f"{name}.bias", values), y], name)

    def integers(self, name, *values):
        return self.constant(name, np.int64(values))

    def norm(self, x, name):
        gain = self.random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        bias = self.random.normal(0, 0.1, WIDTH).astype(np.float32)
        constants = [self.constant(f"{name}.gain", gain), self.constant(f"{name}.bias", bias)]
        return self.node("LayerNormalization", [x, *constants], name, axis=-1)

    def split_heads(self, x, name, perm=(0, 2, 1, 3)):
        x = self.node("Reshape", [x, self.integers(f"{name}.shape", 1, -1, HEADS, WIDTH // HEADS)], f"{name}.heads")
        return self.node("Transpose", [x], f"{name}.turned", perm=perm)

    def attention(self, queries, keys, values, name):
        q = self.split_heads(self.linear(queries, f"{name}.q", WIDTH, WIDTH), f"{name}.q")
        k = self.split_heads(self.linear(keys, f"{name}.k", WIDTH, WIDTH), f"{name}.k", perm=(0, 2, 3, 1))
        v = self.split_heads(self.linear(values, f"{name}.v", WIDTH, WIDTH), f"{name}.v")
        scale = self.constant(f"{name}.scale", np.float32((WIDTH // HEADS) ** -0.5))
        logits = self.node("Mul", [self.node("MatMul", [q, k], f"{name}.qk"), scale], f"{name}.logits")
        x = self.node("MatMul", [self.node("Softmax", [logits], f"{name}.shares", axis=-1), v], f"{name}.pv")
        x = self.node("Transpose", [x], f"{name}.joined", perm=[0, 2, 1, 3])
        x = self.node("Reshape", [x, self.integers(f"{name}.joined_shape", 1, -1, WIDTH)], f"{name}.rows")
        return self.linear(x, f"{name}.out", WIDTH, WIDTH)

    def sampled(self, x, reference, memory, name):
        """A deformable attention's: values at places that each query says, of one point and head."""
        values = self.linear(memory, f"{name}.value", WIDTH, WIDTH)
        values = self.node("Transpose", [values], f"{name}.channels", perm=[0, 2, 1])
        shape = self.integers(f"{name}.map_shape", 1, WIDTH, HEIGHT_PX // 4, WIDTH_PX // 4)
        values = self.node("Reshape", [values, shape], f"{name}.map")
        offsets = self.linear(x, f"{name}.offsets", WIDTH, 2)
        start, end, axis = (self.integers(f"{name}.{key}", value) for key, value in (("s", 0), ("e", 2), ("a", 2)))
        centres = self.node("Slice", [reference, start, end, axis], f"{name}.centres")
        two, one = self.constant(f"{name}.two", np.float32(2)), self.constant(f"{name}.one", np.float32(1))
        places = self.node("Sub", [self.node("Mul", [centres, two], f"{name}.doubled"), one], f"{name}.around_zero")
        grid = self.node("Add", [places, offsets], f"{name}.grid_rows")
        grid = self.node("Reshape", [grid, self.integers(f"{name}.grid_shape", 1, QUERIES, 1, 2)], f"{name}.grid")
        read = self.node("GridSample", [values, grid], f"{name}.read")
        read = self.node("Reshape", [read, self.integers(f"{name}.read_shape", 1, WIDTH, QUERIES)], f"{name}.read_rows")
        return self.node("Transpose", [read], f"{name}.sampled", perm=[0, 2, 1])

    def mlp(self, x, name, inputs, outputs, layers):
        widths = [inputs, *[WIDTH] * (layers - 1), outputs]
        for layer in range(layers):
            x = self.linear(x, f"{name}.{layer}", widths[layer], widths[layer + 1])
            x = self.relu(x) if layer + 1 < layers else x
        return x

    def inverse_sigmoid(self, x, name):
        low, high = (
            self.constant(f"{name}.{key}", np.float32(value)) for key, value in (("low", 0.01), ("high", 0.99))
        )
        x = self.node("Clip", [x, low, high], f"{name}.clipped")
        rest = self.node("Sub", [self.constant(f"{name}.one", np.float32(1)), x], f"{name}.rest")
        return self.node("Log", [self.node("Div", [x, rest], f"{name}.odds")], f"{name}.logit")


def build_transformer():
    """Two convolutions, an encoder that chooses queries, and a decoder of LAYERS layers that refines their boxes."""
    b = _Transformer()
    x = b.conv_relu("image", "stem", 3, 16, stride=2)
    x = b.conv_relu(x, "features", 16, WIDTH, stride=2)
    memory = b.node("Reshape", [x, b.integers("memory.shape", 1, WIDTH, TOKENS)], "memory.columns")
    memory = b.norm(b.node("Transpose", [memory], "memory.rows", perm=[0, 2, 1]), "memory")

    best = b.node(
        "ReduceMax", [b.linear(memory, "encoder.classes", WIDTH, CLASSES)], "encoder.best", axes=[2], keepdims=0
    )
    names = ["encoder.values", "encoder.index"]
    b.node("TopK", [best, b.integers("queries", QUERIES)], names[0], outputs=names, axis=1)
    index = b.node("Reshape", [names[1], b.integers("flat", QUERIES)], "encoder.chosen")
    x = b.node("Gather", [memory, index], "queries.0", axis=1)
    reference = b.node("Sigmoid", [b.mlp(x, "encoder.box", WIDTH, 4, 3)], "boxes.0")
    for layer in range(LAYERS):
        name = f"decoder.{layer}"
        position = b.mlp(reference, f"{name}.position", 4, WIDTH, 2)
        placed = b.node("Add", [x, position], f"{name}.placed")
        x = b.norm(b.node("Add", [x, b.attention(placed, placed, x, f"{name}.self")], f"{name}.sum1"), f"{name}.norm1")
        read = b.sampled(x, reference, memory, f"{name}.deformable")
        x = b.norm(b.node("Add", [x, read], f"{name}.sum2"), f"{name}.norm2")
        crossed = b.attention(x, memory, memory, f"{name}.cross")
        x = b.norm(b.node("Add", [x, crossed], f"{name}.sum3"), f"{name}.norm3")
        hidden = b.relu(b.linear(x, f"{name}.hidden", WIDTH, 2 * WIDTH))
        x = b.norm(
            b.node("Add", [x, b.linear(hidden, f"{name}.back", 2 * WIDTH, WIDTH)], f"{name}.sum4"), f"{name}.norm4"
        )
        delta = b.mlp(x, f"{name}.box", WIDTH, 4, 3)
        moved = b.node("Add", [delta, b.inverse_sigmoid(reference, f"{name}.inverse")], f"{name}.moved")
        reference = b.node("Sigmoid", [moved], f"boxes.{layer + 1}")
    scores = b.node("Sigmoid", [b.linear(x, "classes", WIDTH, CLASSES)], "scores.all")
    scores = b.node("Reshape", [scores, b.integers("one_row", 1, -1)], "scores.row")
    top = ["scores", "top.index"]
    b.node("TopK", [scores, b.integers("k", TOP)], "topk", outputs=top, axis=1)
    classes = b.integers("number_of_classes", CLASSES)
    b.node("Mod", [top[1], classes], "labels")
    points = b.node(
        "Reshape", [b.node("Div", [top[1], classes], "top.query"), b.integers("top.shape", TOP)], "top.rows"
    )
    # centre, width and height -> corners, in pixels: a matrix product with weights that nobody has learnt
    corners = np.float32([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
    boxes = b.node("MatMul", [reference, b.constant("corners", corners)], "boxes.corners")
    pixels = b.node("Mul", [boxes, b.constant("size", np.float32([WIDTH_PX, HEIGHT_PX] * 2))], "boxes.pixels")
    b.node("Gather", [pixels, points], "boxes", axis=1)
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, TOP, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, TOP]),
        helper.make_tensor_value_info("labels", TensorProto.INT64, [1, TOP]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, HEIGHT_PX, WIDTH_PX])
    graph = helper.make_graph(b.nodes, "transformer", [image], outputs, b.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
