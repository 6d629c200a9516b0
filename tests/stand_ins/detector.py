"""
A small detector as ONNX with its contract, and two graphs small enough that their detections can be seen in the input.

It has what real detectors have, and its weights are the same in each run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from deploy.contract import ModelContract, write_sidecar

SIZE_PX = 64
"""Height and width of the network input."""
BEST = 40
"""Candidates that are taken from each of the two levels."""
CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, SIZE_PX, SIZE_PX),
    channel_order="rgb",
    mean=(120.0, 120.0, 120.0),
    std=(60.0, 60.0, 60.0),
    pad_value=(120.0, 120.0, 120.0),
    resize="keep_ratio",
    output_names=("boxes", "scores", "labels"),
    class_names=("disc", "bar"),
    category_ids=(1, 2),
    score_threshold=0.05,
    nms_iou_threshold=0.6,
    max_detections=100,
)


class Net:
    """Builds an ONNX graph node by node: `net("Relu", x)` adds a node and gives the name of its output."""

    def __init__(self, quantised: type | None) -> None:
        self.nodes: list[Any] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.quantised = quantised
        self.random = np.random.default_rng(7)

    def __call__(self, op: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        from onnx import helper

        outputs = outputs or (f"{op.lower()}{len(self.nodes)}",)
        self.nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=f"{op}_{len(self.nodes)}", **attributes)
        )
        return outputs[0]

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        name = f"tensor{len(self.tensors)}"
        self.tensors[name] = np.asarray(values, dtype)
        return name

    def pair(self, name: str, largest: float) -> str:
        """Adds QuantizeLinear and DequantizeLinear, symmetric, for values up to `largest`."""
        zero = self.constant(128 if self.quantised is np.uint8 else 0, self.quantised)
        scale = self.constant(largest / 127)
        return self("DequantizeLinear", self("QuantizeLinear", name, scale, zero), scale, zero)

    def weight(self, out: int, inputs: int, kernel: int) -> str:
        bound = np.sqrt(3.0 / (inputs * kernel * kernel))
        return self.constant(self.random.uniform(-bound, bound, (out, inputs, kernel, kernel)))

    def conv(self, x: str, weight: str, stride: int = 1, final: bool = False) -> str:
        values = self.tensors[weight if weight in self.tensors else "shared"]
        if self.quantised and not final:
            x, weight = self.pair(x, 6.0), self.pair(weight, float(np.abs(values).max()))
        bias = self.constant(self.random.uniform(-0.1, 0.1, len(values)))
        pad = values.shape[-1] // 2
        return self("Conv", x, weight, bias, strides=[stride] * 2, pads=[pad] * 4, kernel_shape=list(values.shape[2:]))


def mini_detector(quantised: type | None = None) -> Any:
    """
    An ONNX model with what real detectors have: residual, top-down path, shared head, distribution decode, top-k.

    Args:
        quantised: np.int8 or np.uint8 puts Q/DQ pairs of that type around its convolutions but the final ones.
    """
    import onnx
    from onnx import helper, numpy_helper

    net = Net(quantised)
    x = net("Relu", net.conv("images", net.weight(8, 3, 3), stride=4))
    x = net("Relu", net("Add", net.conv(x, net.weight(8, 8, 3)), x))  # 8 x 16 x 16
    # a gate that has to stay FP32: the root mean square over the image
    squares = net("ReduceMean", net("Mul", x, x), axes=[2, 3], keepdims=1)
    x = net("Div", x, net("Sqrt", net("Add", squares, net.constant(1e-5))))
    coarse = net("Relu", net.conv(x, net.weight(8, 8, 3), stride=2))  # 8 x 8 x 8
    scales = net.constant([1, 1, 2, 2])
    fine = net("Add", net.conv(x, net.weight(8, 8, 1)), net("Resize", coarse, "", scales, mode="nearest"))
    net.tensors["shared"] = net.tensors.pop(net.weight(8, 8, 3))
    six = net("Constant", value=numpy_helper.from_array(np.float32(6.0)))
    bins = net.constant(np.arange(5.0).reshape(5, 1))
    found: dict[str, list[str]] = {name: [] for name in CONTRACT.output_names}
    for level, stride in ((fine, 4), (coarse, 8)):
        side = SIZE_PX // stride
        shared = "shared" if stride == 4 else net("Identity", "shared")
        tower = net("Clip", net.conv(level, shared), net.constant(0.0), six)
        scores = net.conv(tower, net.weight(2, 8, 3), final=True)
        scores = net("Reshape", net("Transpose", scores, perm=[0, 2, 3, 1]), net.constant([1, -1], np.int64))
        best = (net("Sigmoid", net("Mul", scores, net.constant(3.0))), net.constant([BEST], np.int64))
        names = (f"scores{stride}", f"index{stride}")
        found["scores"].append(net("TopK", *best, outputs=names))
        found["labels"].append(net("Mod", names[1], net.constant(2, np.int64)))
        sides = net.conv(tower, net.weight(20, 8, 3), final=True)
        sides = net(
            "Reshape", net("Transpose", sides, perm=[0, 2, 3, 1]), net.constant([1, side * side, 4, 5], np.int64)
        )
        sides = net("Reshape", net("MatMul", net("Softmax", sides, axis=-1), bins), net.constant([1, -1, 4], np.int64))
        sides = net("Mul", sides, net.constant([-stride, -stride, stride, stride]))
        y, x_px = np.mgrid[:side, :side] * stride + stride / 2
        points = net.constant(np.stack([x_px, y, x_px, y], -1).reshape(1, -1, 4))
        boxes = net("Gather", net("Add", points, sides), net("Div", names[1], net.constant(2, np.int64)), axis=1)
        found["boxes"].append(net("Reshape", boxes, net.constant([1, BEST, 4], np.int64)))
    for name, levels in found.items():
        net("Concat", *levels, outputs=(name,), axis=1)
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph = helper.make_graph(
        net.nodes,
        "mini",
        [helper.make_tensor_value_info("images", float32, list(CONTRACT.input_shape))],
        [
            helper.make_tensor_value_info("boxes", float32, [1, 2 * BEST, 4]),
            helper.make_tensor_value_info("scores", float32, [1, 2 * BEST]),
            helper.make_tensor_value_info("labels", int64, [1, 2 * BEST]),
        ],
        [numpy_helper.from_array(values, name) for name, values in net.tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_detector(path: Path, quantised: type | None = None, inputs: dict[str, Path] | None = None) -> Path:
    """Writes `mini_detector` to `path` with the sidecar of a file that was made from `inputs`."""
    import onnx

    onnx.save(mini_detector(quantised), str(path))
    write_sidecar(path, inputs or {}, CONTRACT)
    return path


SMALL_OUTPUTS = {
    "topk": "float[{batch},3,4] boxes, float[{batch},3] scores, int64[{batch},3] labels",
    "nms": "float[D,4] boxes, float[D] scores, int64[D] labels, int64[D] images",
}
SMALL_BODIES = {
    "topk": """
        boxes = ReduceMax <axes=[3], keepdims=0> (x)
        scores = ReduceMax <axes=[2], keepdims=0> (boxes)
        labels = ArgMax <axis=2, keepdims=0> (boxes)""",
    "nms": """
        least = Constant <value_float=0.5> ()
        zero = Constant <value_int=0> ()
        one = Constant <value_int=1> ()
        high = Greater (x, least)
        where = NonZero (high)
        places = Transpose <perm=[1, 0]> (where)
        boxes = Cast <to=1> (places)
        scores = GatherND (x, places)
        labels = Gather <axis=0> (where, one)
        images = Gather <axis=0> (where, zero)""",
}
"""Graphs with the outputs of a detector. `nms` finds every value above a half: its place as a box, its channel."""


def write_small_detector(path: Path, outputs: str, batch: int = 2, input_type: str = "float32") -> Path:
    """Writes the graph of `SMALL_BODIES` with these outputs to `path`, with its sidecar; batch -1 is dynamic."""
    import onnx

    size, is_uint8 = "N" if batch == -1 else str(batch), input_type == "uint8"
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        small ({"uint8" if is_uint8 else "float"}[{size},{"4,4,3" if is_uint8 else "3,4,4"}] pixels)
            => ({SMALL_OUTPUTS[outputs].format(batch=size)}) {{
            floats = Cast <to=1> (pixels)
            x = Transpose <perm={[0, 3, 1, 2] if is_uint8 else [0, 1, 2, 3]}> (floats)
            {SMALL_BODIES[outputs]}
        }}"""
    )
    onnx.save(model, str(path))
    contract = dataclasses.replace(
        CONTRACT,
        input_name="pixels",
        input_shape=(batch, 4, 4, 3) if is_uint8 else (batch, 3, 4, 4),
        input_type=input_type,
        outputs=outputs,
        output_names=("boxes", "scores", "labels", "images")[: 4 if outputs == "nms" else 3],
    )
    write_sidecar(path, {}, contract)
    return path
