"""What is affine beside a convolution is folded; the graph computes the same."""

from __future__ import annotations

import collections
from typing import Dict, List

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from calibration.affine import fold_affine

WEIGHTS = {
    "w": (4, 4, 3, 3), "w2": (4, 4, 3, 3), "wide": (4, 8, 1, 1), "depthwise": (4, 1, 3, 3), "grouped": (4, 2, 1, 1),
    "point": (4, 4, 1, 1), "b": (4,), "c": (1, 4, 1, 1), "d": (4, 1, 1), "c8": (1, 8, 1, 1), "one": (1,), "v": (4,),
    "v8": (8,), "map": (1, 4, 6, 6),
}  # fmt: skip


def _model(body: str, outputs: int = 1) -> onnx.ModelProto:
    """Of a body that makes y of x, with random weights; the last convolution of each path is the prediction."""
    random = np.random.default_rng(0)
    more = "".join(f", float[n, m, h, w] y{index}" for index in range(1, outputs))
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4, 6, 6] x) => (float[1, 4, h, w] y{more})
        {{ {body} }}"""
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(random.uniform(0.2, 1.5, shape).astype(np.float32), name)
        for name, shape in WEIGHTS.items()
    )
    return model


def _run(model: onnx.ModelProto) -> List[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: List[np.ndarray] = session.run(None, {"x": np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype("f")})
    return found


def _counts(model: onnx.ModelProto) -> Dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph.node))


PADDED = "pads = [1, 1, 1, 1]"
FOLDED = {
    "frozen norm": (
        f"a = Conv <{PADDED}> (x, w) m = Mul (a, c) s = Add (d, m) r = Relu (s) y = Conv (r, w)",
        {"Relu": 1},
    ),
    "scalar, shared weight": (
        f"a = Conv <{PADDED}> (x, w, b) m = Mul (one, a) r = Relu (m) e = Conv <{PADDED}> (r, w, b) "
        "y = Conv (e, point)",
        {"Relu": 1},
    ),
    "subtracted from, divided": (
        f"a = Conv <{PADDED}, group = 4> (x, depthwise) m = Sub (c, a) s = Sub (m, d) q = Div (s, c) r = Relu (q) "
        "y = Conv (r, w)",
        {"Relu": 1},
    ),
    "batch norm": (f"a = Conv <{PADDED}> (x, w) n = BatchNormalization (a, v, b, v, b) y = Conv (n, w)", {}),
    "batch norm after concat": (
        f"a = Conv <{PADDED}> (x, w) e = Conv <{PADDED}> (x, w2, b) j = Concat <axis = 1> (a, e) "
        "n = BatchNormalization (j, v8, v8, v8, v8) r = Relu (n) y = Conv (r, wide) ",
        {"Concat": 1, "Relu": 1},
    ),
    "batch norm before concat": (
        f"a = Conv <{PADDED}> (x, w) r = Relu (a) n = BatchNormalization (r, v, b, v, b) j = Concat <axis = 1> (x, n) "
        "e = Conv (j, wide) f = Relu (e) y = Conv (f, w)",
        {"Concat": 1, "Relu": 2},
    ),
    "before the convolutions that read it": (
        f"a = Conv <{PADDED}> (x, w) r = Relu (a) m = Mul (r, c) s = Add (m, d) e = Conv (s, point, b) "
        "f = Conv <group = 2> (s, grouped) g = Add (e, f) y = Conv (g, w)",
        {"Relu": 1, "Add": 1},
    ),
    "scale alone before padding": (
        f"r = Relu (x) m = Mul (r, c) e = Conv <{PADDED}> (m, w) f = Relu (e) y = Conv (f, w)",
        {"Relu": 2},
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_it_is_folded(name: str) -> None:
    body, others = FOLDED[name]
    model = _model(body)
    before, names = _run(model), {value for node in model.graph.node for value in node.output}
    said = fold_affine(model)
    assert said.startswith("affine nodes beside convolutions are folded into their weights: ")
    counts = _counts(model)
    assert {operator: count for operator, count in counts.items() if operator != "Conv"} == others
    np.testing.assert_allclose(_run(model)[0], before[0], rtol=1e-4, atol=1e-4)
    assert {node.output[0] for node in model.graph.node if node.op_type == "Relu"} <= names
    assert fold_affine(model) == ""


KEPT = {
    "prediction": "a = Conv (x, point) y = Mul (a, c)",
    "read elsewhere": "a = Conv (x, point) m = Mul (a, c) r = Relu (m) t = Add (r, a) y = Conv (t, w)",
    "an output": "a = Conv (x, point) y1 = Mul (a, c) r = Relu (y1) y = Conv (r, w)",
    "a map": "a = Conv (x, point) m = Mul (a, map) r = Relu (m) y = Conv (r, w)",
    "two activations": "a = Conv (x, point) e = Conv (x, point) m = Mul (a, e) r = Relu (m) y = Conv (r, w)",
    "shift before padding": f"r = Relu (x) m = Add (r, c) e = Conv <{PADDED}> (m, w) f = Relu (e) y = Conv (f, w)",
    "shift before padding by itself": (
        'r = Relu (x) m = Add (r, c) e = Conv <auto_pad = "SAME_UPPER"> (m, w) f = Relu (e) y = Conv (f, w)'
    ),
    "divided by it": "a = Conv (x, point) m = Div (c, a) r = Relu (m) y = Conv (r, w)",
    "concat of rows": (
        "a = Conv (x, point) e = Conv (x, point) j = Concat <axis = 2> (a, e) m = Mul (j, c) r = Relu (m) "
        "y = Conv (r, w)"
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_would_compute_something_else_stays(name: str) -> None:
    model = _model(KEPT[name], outputs=2 if "y1" in KEPT[name] else 1)
    before = model.SerializeToString()
    assert fold_affine(model) == ""
    assert model.SerializeToString() == before


def test_the_sentence_counts_what_was_folded() -> None:
    model = _model(FOLDED["frozen norm"][0])
    assert fold_affine(model) == "affine nodes beside convolutions are folded into their weights: 1 Mul, 1 Add"
