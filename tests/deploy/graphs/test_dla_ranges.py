from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest

from deploy.graphs.calibration_cache import amax_from_quantised
from deploy.graphs.dla_ranges import ranges_for_dla

onnx = pytest.importorskip("onnx")

PAIRED = """<ir_version: 8, opset_import: ["" : 17]>
paired (float[1,2,4,4] images) => (float[1,2,4,4] maps)
<float scale = {0.1}, float other = {0.2}, int8 zero = {0}, float[2,2,1,1] weight = {0.9, 0, 0, 0.9},
 int64[4] shape = {1, 2, 4, 4}, float three = {3}> {
    images_q = QuantizeLinear (images, scale, zero)
    images_dq = DequantizeLinear (images_q, scale, zero)
    first = Conv (images_dq, weight)
    BODY
    last_q = QuantizeLinear (last, other, zero)
    last_dq = DequantizeLinear (last_q, other, zero)
    maps = Conv (last_dq, weight)
}"""


@pytest.mark.parametrize(
    ("body", "told", "half"),
    [
        ("last = Relu (first)", {"first": 25.4}, ["maps"]),
        ("a = Relu (first) b = MaxPool <kernel_shape=[1,1]> (a) c = Transpose <perm=[0,1,3,2]> (b) "
         "last = Reshape (c, shape)", {"first": 25.4, "a": 25.4, "b": 25.4, "c": 25.4}, ["maps"]),
        ("gate = Sigmoid (first) last = Mul (images_dq, gate)", {"gate": 1.0}, ["first", "gate", "maps"]),
        ("scaled = Mul (images_dq, three) last = Identity (scaled)", {"scaled": 25.4}, ["maps"]),
        ("scaled = Mul (images_dq, three) last = AveragePool <kernel_shape=[1,1]> (scaled)", {"scaled": 38.1},
         ["maps"]),
        ("two = Concat <axis=1> (first, images_dq) last, rest = Split <axis=1> (two)", {},
         ["first", "two", "last", "maps"]),
        ("two = Concat <axis=2> (first, images_dq) last = MaxPool <kernel_shape=[1,1], strides=[2,1]> (two)",
         {"two": 25.4, "first": 25.4}, ["maps"]),
        ("last = Add (first, images_dq)", {}, ["first", "last", "maps"]),
    ],
)  # fmt: skip
def test_what_operators_tell(body: str, told: Any, half: Any) -> None:
    model = onnx.parser.parse_model(PAIRED.replace("BODY", body))
    found = ranges_for_dla(model, {})
    known = amax_from_quantised(model)
    assert found.amax == pytest.approx({**known, **told})
    assert list(found.half) == half


def test_ranges_of_the_calibration_are_taken_where_the_graph_says_nothing() -> None:
    model = onnx.parser.parse_model(PAIRED.replace("BODY", "last = Add (first, images_dq)"))
    found = ranges_for_dla(model, {"ranges": {"first": [-7.0, 3.0], "images": [-1.0, 1.0], "maps": [0.0, 0.0]}})
    assert found.amax == pytest.approx({"images": 12.7, "last": 25.4, "first": 7.0})
    assert found.half == ("maps",)


def test_a_detector(detector_model: Callable[..., Any]) -> None:
    assert ranges_for_dla(detector_model(), {}) == ({}, ())
    model = detector_model(np.int8)
    found = ranges_for_dla(model, {})
    names = {node.name or node.output[0] for node in model.graph.node if node.op_type not in ("Constant", "Identity")}
    assert set(found.amax) > set(amax_from_quantised(model))
    assert set(found.half) < names
    by_output = {node.output[0]: node for node in model.graph.node}
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    assert by_output[relu.input[0]].op_type == "Conv"
    assert by_output[relu.input[0]].name not in found.half  # INT8 in and out
