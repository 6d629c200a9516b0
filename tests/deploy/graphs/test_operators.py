from __future__ import annotations

import dataclasses
import json
from typing import Any, Callable, Optional

import numpy as np
import pytest
from onnx import numpy_helper, parser

from deploy.contract import ModelContract
from deploy.errors import EngineBuildError
from deploy.graphs.cleaning import graph_of_any_batch
from deploy.graphs.graph import check_graph, check_static
from deploy.graphs.operators import RESTRICTIONS, TABLE, check_operators
from deploy.graphs.precision import half_from_float
from deploy.graphs.suppression import add_suppression

TARGETS = ("8.6", "10.3", "10.16", "11")
EVERY_TABLE = ("8.5", "8.6", "10.0", "10.3", "10.15", "10.16", "11")
NOT_CHECKED = {
    "seed ignored",
    "bidirectional: same activations both ways",
    "branch outputs: broadcastable shapes, distinct names",
    "branch outputs: same rank, distinct names",
    "size along axis known at build time",
    "axis known at build time",
    "depth known at build time",
    "scan output length static",
    "carried shapes constant over iterations",
    "position_ids INT64",
    "past_cache and update 4-D",
    "axis=-2",
    "no broadcast between inputs",
    "frame_step and window constant",
    "real input",
    "Q, K, V and mask 4-D",
    "no past/present KV, no nonpad_kv_seqlen, no qk_matmul_output, no softcap",
    "head counts come from the shapes",
}
"""What a graph does not show, or no detector has."""
Detector = Callable[..., Any]


def model(text: str, opset: int = 17, **tensors: np.ndarray) -> Any:
    """An ONNX model of the textual graph; `tensors` are initialisers."""
    made = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    made.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in tensors.items())
    return made


def refusal(made: Any, version: str) -> Optional[str]:
    """What check_operators says, None if it lets the graph pass."""
    check_graph(made)
    try:
        check_operators(made, version)
    except EngineBuildError as error:
        return str(error)
    return None


# The graphs that we write ---------------------------------------------------------------------------------------------

FORMS = {
    # name: (whether quantised, whether then typed as FP16)
    "fp32": (None, False),
    "fp16": (None, True),
    "int8, FP32 scales": (np.int8, False),
    "int8, FP16 scales": (np.int8, True),
}


def with_suppression(made: Any, contract: ModelContract) -> Any:
    """The graph with NMS behind it."""
    names = ("found_boxes", "found_scores", "found_labels", "found_images")
    add_suppression(made, dataclasses.replace(contract, outputs="nms", output_names=names))
    return made


@pytest.mark.parametrize("outputs", ["topk", "nms"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_valid_and_taken(
    form: str, outputs: str, detector_model: Detector, detector_contract: ModelContract, run_detector: Any
) -> None:
    quantised, is_half = FORMS[form]
    made = detector_model(quantised)
    if outputs == "nms":
        made = with_suppression(made, detector_contract)
    made = half_from_float(made) if is_half else made
    check_graph(made)
    check_static(made, dynamic_outputs=outputs == "nms")
    images = np.random.default_rng(0).normal(size=detector_contract.input_shape).astype(np.float32)
    found = run_detector(made, {"images": images})
    assert all(len(values) and np.isfinite(values).all() for values in found.values())
    for version in EVERY_TABLE:
        said = refusal(made, version)
        if form == "int8, FP16 scales" and version in ("8.5", "8.6"):
            assert said is not None
            assert "opset 19; expected at most 17" in said
            assert "an FP16 scale" in said
        else:
            assert said is None, said


@pytest.mark.parametrize("is_half", [False, True])
def test_a_graph_of_any_batch_is_valid_and_taken(is_half: bool, run_detector: Any) -> None:
    texts = [
        f"""g (float[{images}, 2, 8, 8] images) => (float[{images}, 5] scores, int64[{images}, 5] labels)
        {{
            fine = Conv (images, weight)
            coarse = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (fine)
            large = Resize <mode = "nearest"> (coarse, , , sizes)
            sum = Add (fine, large)
            rows = Reshape (sum, rows_shape)
            scores, labels = TopK (rows, count)
        }}"""
        for images in (2, 3)
    ]
    weight = np.random.default_rng(0).normal(size=(3, 2, 1, 1)).astype(np.float32)
    two, three = (
        model(
            text, weight=weight, sizes=np.int64([images, 3, 8, 8]), rows_shape=np.int64([images, 192]),
            count=np.int64([5]),
        )
        for images, text in zip((2, 3), texts, strict=True)
    )  # fmt: skip
    made = graph_of_any_batch(two, three)
    made = half_from_float(made) if is_half else made
    check_graph(made)
    check_static(made, dynamic_batch=True)
    for images in (1, 4):
        found = run_detector(made, {"images": np.ones((images, 2, 8, 8), np.float32)})
        assert found["scores"].shape == (images, 5)
    assert [refusal(made, version) for version in EVERY_TABLE] == [None] * len(EVERY_TABLE)


def test_a_graph_for_onnx_runtime_is_refused(detector_model: Detector) -> None:
    found = refusal(detector_model(np.uint8), "10.3")
    assert found is not None
    assert "QuantizeLinear 'QuantizeLinear_0': the UINT8 zero point [128]; supported only with: zero point" in found
    assert "DequantizeLinear 'DequantizeLinear_1': does not take UINT8" in found


# Which table ----------------------------------------------------------------------------------------------------------

UNSUPPORTED = "g (float[1, 4] x, float[2, 2] w) => (float[1, 4] y) { y = Hardmax (x) z = Det (w) }"
"""Det never was supported, Hardmax is from 10.0."""
RELU = "g (float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }"


@pytest.mark.parametrize(
    ("version", "table"),
    [
        ("8.5", "8.5"), ("8.5.2.2", "8.5"), ("8.6.2", "8.6"), ("9.3.0", "8.6"), ("10.0.1", "10.0"), ("10.2", "10.1"),
        ("10.3", "10.3"), ("10.9.0.34", "10.3"), ("10.13.3.9.post1", "10.13"), ("10.16.1.11", "10.16"), ("11", "10.16"),
        ("11.4.0.106", "11.1"), ("12.0", "11.1"),
    ],
)  # fmt: skip
def test_the_table_is_that_of_the_version_or_the_last_before_it(version: str, table: str) -> None:
    found = refusal(model(UNSUPPORTED), version)
    assert found is not None
    assert found.startswith(f"TensorRT {version} does not take the graph, by the operator table of TensorRT {table}:")
    assert "Det 'z': not supported" in found
    assert ("Hardmax" in found) == (table in ("8.5", "8.6"))


@pytest.mark.parametrize("version", ["8.4.1", "7", "8", "newest", ""])
def test_a_version_without_a_table_is_refused(version: str) -> None:
    assert "expected 8.5 or newer" in str(refusal(model(RELU), version))


@pytest.mark.parametrize(
    ("opset", "version", "taken"),
    [(17, "8.5", True), (18, "8.6", False), (20, "10.3", True), (21, "10.3", False), (21, "10.14", True)],
)
def test_the_opset_has_a_limit(opset: int, version: str, taken: bool) -> None:
    found = refusal(model(RELU, opset), version)
    assert (found is None) == taken
    assert taken or f"the graph has opset {opset}; expected at most " in str(found)


def test_the_message_stops_after_ten() -> None:
    nodes = " ".join(f"y{index} = Det (x)" for index in range(13))
    found = refusal(model(f"g (float[2, 2] x) => (float y0) {{ {nodes} }}"), "10.16")
    assert "Det 'y9': not supported\n  and 3 more\nExport" in str(found)


# Types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "versions_that_take_it"),
    [
        ("g (double[4] x) => (double[4] y) { y = Relu (x) }", ""),
        ("g (int64[4] x) => (int64[4] y) { y = Add (x, x) }", "8.6 10.3 10.16 11"),  # as INT32 up to 8.6
        ("g (int64[4] x) => (int64[4] y) { y = Neg (x) }", "8.6 10.3 10.16 11"),
        ("g (int64[4] x) => (int64[4] y) { y = Clip (x) }", ""),
        ("g (float16[4] x) => (float16[4] y) { y = Exp (x) }", "8.6 10.3 10.16 11"),
        ("g (bfloat16[4] x) => (bfloat16[4] y) { y = Exp (x) }", "10.3 10.16 11"),
        ("g (uint8[4] x) => (float[4] y) { y = Cast <to = 1> (x) }", "8.6 10.3 10.16 11"),
        ("g (float[4] x) => (uint16[4] y) { y = Cast <to = 4> (x) }", ""),
        ("g (uint8[1, 2, 2, 3] x) => (uint8[1, 3, 2, 2] y) { y = Transpose <perm = [0, 3, 1, 2]> (x) }", ""),
        ("g (bool[4] c, float[4] x) => (float[4] y) { y = Where (c, x, x) }", "8.6 10.3 10.16 11"),
        ("g (bool[4] c, uint8[4] x) => (uint8[4] y) { y = Where (c, x, x) }", ""),
        ("g (float[4] x, int64[2] i) => (float[2] y) { y = Gather (x, i) }", "8.6 10.3 10.16 11"),
        ("g (int64[1] s) => (int64[N] y) { y = ConstantOfShape <value = int64[1] {0}> (s) }", "8.6 10.3 10.16 11"),
        ("g (uint8[4] x) => (int32[4] y) { y = Cast <to = 6> (x) }", ""),
        ("g (float[4] x) => (uint8[4] y) { y = Cast <to = 2> (x) }", "8.6 10.3 10.16 11"),
        ("g (uint8[4] x, uint8[4] w) => (bool[4] y) { f = Cast <to = 1> (x) y = Equal (x, w) }", ""),
    ],
)  # fmt: skip
def test_types(text: str, versions_that_take_it: str) -> None:
    taken = [version for version in TARGETS if refusal(model(text), version) is None]
    assert taken == versions_that_take_it.split()


def test_a_refused_type_is_named_with_its_tensor() -> None:
    found = refusal(model("g (float[4] x) => (double[4] y) { d = Cast <to = 11> (x) y = Exp (d) }"), "10.3")
    assert "Cast 'd': does not take FP64 ('d'); takes FP32 FP16" in str(found)
    assert "Exp 'y': does not take FP64 ('d'); takes FP32 FP16 BF16" in str(found)


# Restrictions ---------------------------------------------------------------------------------------------------------


def test_every_restriction_is_checked_or_known_not_to_be() -> None:
    rows = [row for rows in json.loads(TABLE.read_text())["operators"].values() for row in rows]
    listed = {restriction for row in rows for restriction in row["restrictions"]}
    importers = json.loads(TABLE.read_text())["importers"]
    assert {entry["verdict"] for entry in importers} == {"refused", "misread", "changed"}
    assert listed | {entry["restriction"] for entry in importers} == set(RESTRICTIONS) | NOT_CHECKED
    assert listed >= NOT_CHECKED
    assert not set(RESTRICTIONS) & NOT_CHECKED


def pair(scale: str = "s", zero: str = "z", values: str = "x") -> str:
    """Q/DQ of a tensor of shape (2, 3)."""
    zero = f", {zero}" if zero else ""
    return (
        f"g (float[2, 3] x) => (float[2, 3] y) {{ q = QuantizeLinear <axis = 0> ({values}, {scale}{zero}) "
        f"y = DequantizeLinear <axis = 0> (q, {scale}{zero}) }}"
    )


ONE, ZERO = np.float32(0.5), np.int8(0)
IMAGE = "g (float[1, 2, 8, 8] x) => (float[a, b, c, d] y)"
RESIZE = f"{IMAGE} {{ y = Resize <%s> (x, , s) }}"
SCALES = np.float32([1, 1, 2, 2])
CASES = {
    # name: (graph, initialisers, opset, version that refuses, words, version that takes it)
    "TopK K computed": (
        "g (float[1, 9] x, int64[1] k) => (float[a, b] y, int64[a, b] i) { y, i = TopK (x, k) }",
        {}, 17, "8.5", "TopK 'y': K computed in the graph; supported only with: K constant", "8.6",
    ),
    "TopK K": (
        "g (float[1, 9000] x) => (float[a, b] y, int64[a, b] i) { y, i = TopK (x, k) }",
        {"k": np.int64([3841])}, 17, "8.5", "K = 3841; supported only with: K at most 3840", None,
    ),
    "TopK unsorted": (
        "g (float[1, 9] x) => (float[a, b] y, int64[a, b] i) { y, i = TopK <sorted = 0> (x, k) }",
        {"k": np.int64([3])}, 17, "10.3", "sorted = 0", "10.0",
    ),
    "Slice axes": (
        "g (float[4, 4] x, int64[1] a) => (float[b, c] y) { y = Slice (x, s, e, a) }",
        {"s": np.int64([0]), "e": np.int64([2])}, 17, "10.2", "Slice 'y': axes computed in the graph", "10.3",
    ),
    "Squeeze axes": (
        "g (float[1, 4] x, int64[1] a) => (float[b] y) { y = Squeeze (x, a) }", {}, 17, "10.16", "axes computed", None,
    ),
    "ReduceMean axes": (
        "g (float[4, 4] x, int64[1] a) => (float[b, c] y) { y = ReduceMean (x, a) }",
        {}, 18, "10.3", "axes computed", None,
    ),
    "ReduceSum axes": (
        "g (float[4, 4] x, int64[1] a) => (float[b, c] y) { y = ReduceSum (x, a) }",
        {}, 17, "8.6", "axes computed", None,
    ),
    "CumSum axis": (
        "g (float[4] x, int64 a) => (float[4] y) { y = CumSum (x, a) }", {}, 17, "8.6", "axis computed", "10.14",
    ),
    "Resize cubic": (RESIZE % 'mode = "cubic"', {"s": SCALES}, 17, "11.4", "mode = cubic", None),
    "Resize coordinates": (
        RESIZE % 'mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"',
        {"s": SCALES}, 19, "10.16", "coordinate_transformation_mode = half_pixel_symmetric", None,
    ),
    "Resize antialias": (RESIZE % 'mode = "linear", antialias = 1', {"s": SCALES}, 18, "10.0", "antialias = 1", None),
    "Resize axes": (RESIZE % "axes = [2, 3]", {"s": SCALES[2:]}, 18, "10.3", "axes [2, 3]", None),
    "MaxPool indices": (
        "g (float[1, 2, 8, 8] x) => (float[a, b, c, d] y, int64[a, b, c, d] i) "
        "{ y, i = MaxPool <kernel_shape = [2, 2]> (x) }",
        {}, 17, "8.6", "the output i; supported only with: no Indices output", None,
    ),
    "MaxPool dilated": (
        f"{IMAGE} {{ y = MaxPool <kernel_shape = [2, 2], dilations = [2, 2]> (x) }}",
        {}, 17, "8.5", "dilations [2, 2]", None,
    ),
    "MaxPool 1-D": (
        "g (float[1, 2, 8] x) => (float[a, b, c] y) { y = MaxPool <kernel_shape = [2]> (x) }",
        {}, 17, "8.5", "1-D; supported only with: 2-D or 3-D", None,
    ),
    "ScatterND": (
        'g (float[4] x, int64[1, 1] i, float[1] u) => (float[4] y) { y = ScatterND <reduction = "add"> (x, i, u) }',
        {}, 17, "10.3", "ScatterND 'y': reduction = add", None,
    ),
    "GridSample 5-D": (
        "g (float[1, 2, 4, 4, 4] x, float[1, 2, 2, 2, 3] i) => (float[a, b, c, d, e] y) "
        '{ y = GridSample <mode = "linear"> (x, i) }',
        {}, 20, "10.0", "an input of 5 dimensions; supported only with: 4-D", None,
    ),
    "InstanceNormalization": (
        "g (float[1, 2, 8, 8] x, float[2] s) => (float[1, 2, 8, 8] y) { y = InstanceNormalization (x, s, s) }",
        {}, 17, "8.6", "scale, B computed", "10.0",
    ),
    "LayerNormalization": (
        "g (float[2, 4] x, float[4] s) => (float[2, 4] y, float[a, b] m) { y, m = LayerNormalization (x, s) }",
        {}, 17, "10.1", "the output m", "10.0",
    ),
    "LayerNormalization itself": (
        "g (float[2, 4] x, float[4] s) => (float[2, 4] y) { y = LayerNormalization (x, s) }",
        {}, 17, "8.5", "LayerNormalization 'y': not supported", "8.6",
    ),
    "Mish": ("g (float[4] x) => (float[4] y) { y = Mish (x) }", {}, 18, "8.6", "Mish 'y': not supported", "10.0"),
    "DeformConv pads": (
        "g (float[1, 1, 4, 4] x, float[1, 8, 3, 3] o) => (float[a, b, c, d] y) "
        "{ y = DeformConv <kernel_shape = [2, 2], pads = [0, 0, 1, 1]> (x, w, o) }",
        {"w": np.ones((1, 1, 2, 2), np.float32)}, 19, "10.3", "pads [0, 0, 1, 1]", None,
    ),
    "Dropout": (
        "g (float[4] x) => (float[4] y) { y = Dropout (x, r, t) }",
        {"r": np.float32(0.5), "t": np.array(True)}, 17, "10.1", "training_mode", "10.0",
    ),
    "Einsum": (
        'g (float[2, 2] x) => (float[a] y) { y = Einsum <equation = "ii->i"> (x) }',
        {}, 17, "8.6", "equation ii->i", "10.0",
    ),
    "NonMaxSuppression": (
        "g (float[1, 5001, 4] x, float[1, 2, 5001] s) => (int64[a, 3] y) { y = NonMaxSuppression (x, s, n) }",
        {"n": np.int64([100])}, 17, "10.3", "5001 boxes; supported only with: at most 5000 boxes", None,
    ),
    "Q/DQ without zero point": (pair(zero=""), {"s": ONE}, 17, "8.6", "2 inputs; supported only with: 3 inputs", None),
    "DQ of uint8": (pair(zero=""), {"s": ONE}, 17, "10.3", "DequantizeLinear 'y': does not take UINT8", None),
    "zero point": (pair(), {"s": ONE, "z": np.int8(3)}, 17, "11.4", "the INT8 zero point [3]", None),
    "scale of zero": (pair(), {"s": np.float32(0), "z": ZERO}, 17, "10.3", "the scale 0; supported only with", None),
    "scale without a bound": (pair(), {"s": np.float32(np.inf), "z": ZERO}, 17, "8.6", "the scale inf; sup", None),
    "scale below zero": (pair(), {"s": np.float32(-0.5), "z": ZERO}, 17, "11.4", "the scale -0.5; supported", None),
    "denormal scale": (pair(), {"s": np.float32(1e-42), "z": ZERO}, 17, "10.15", "e-42; supported only with", None),
    "scale computed": (
        pair().replace("{ q", "{ s = ReduceMax <keepdims = 0> (x) q"),
        {"z": ZERO}, 17, "10.16", "scale 's' computed", "11.4",
    ),
    "scales of a computed tensor": (
        pair(values="r").replace("{ q", "{ r = Relu (x) q"), {"s": np.float32([1, 2]), "z": np.int8([0, 0])},
        17, "10.3", "several scales on the computed tensor 'r'", None,
    ),
    "INT8 constant": (
        "g (float[2] x) => (float[2] y) { w = DequantizeLinear (q, s, z) y = Add (x, w) }",
        {"q": np.int8([1, 2]), "s": ONE, "z": ZERO}, 17, "8.6", "the INT8 constant 'q'", "10.0",
    ),
    "quantised bias": (
        "g (float[2] x) => (float[2] y) { w = DequantizeLinear (q, s, z) y = Add (x, w) }",
        {"q": np.int32([1, 2]), "s": ONE, "z": np.int32(0)}, 17, "10.16", "does not take INT32", None,
    ),
    "QLinearMatMul": (
        "g (int8[2, 2] x) => (int8[2, 2] y) { y = QLinearMatMul (x, s, z, x, s, z, s, z) }",
        {"s": ONE, "z": ZERO}, 17, "11.4", "not supported", None,
    ),
}  # fmt: skip


NORM = "g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) { y = GroupNormalization <num_groups = 2> (x, s, b) }"
CHANNELS = (
    "g (float[2, 3] x) => (float[2, 3] y) { q = QuantizeLinear%s (w, s, z) d = DequantizeLinear%s (q, s, z) "
    "y = Add (x, d) }"
)
BOXES = "g (float[1, 9, 4] x, float[1, 2, 9] s) => (int64[a, 3] y) { y = NonMaxSuppression (x, s%s) }"
SAMPLED = "g (float[1, 2, 4, 4] x, float[1, 2, 2, 2] i) => (float[a, b, c, d] y) { y = GridSample %s (x, i) }"
CASES.update({
    "UINT8 image": (
        "g (uint8[1, 2, 2, 3] x) => (uint8[1, 3, 2, 2] y) { y = Transpose <perm = [0, 3, 1, 2]> (x) }",
        {}, 17, "8.5", "Transpose 'y': does not take UINT8", None,
    ),
    "UINT8 image as the second input": (
        "g (float[4] x, uint8[4] w) => (int64[1] y) { y = Shape (w) }", {}, 17, "10.3", "does not take UINT8", None,
    ),
    "UINT8 between nodes": (
        "g (float[4] x) => (float[4] y) { u = Cast <to = 2> (x) y = Cast <to = 1> (u) }",
        {}, 17, "10.3", "Cast 'u': the UINT8 tensor 'u' between nodes", "8.5",
    ),
    "nine dimensions": (
        "g (float[1, 1, 1, 1, 1, 1, 1, 1, 3] x) => (float[1, 1, 1, 1, 1, 1, 1, 1, 3] y) { y = Relu (x) }",
        {}, 17, "8.6", "the tensor 'x' of 9 dimensions", None,
    ),
    "Conv with quantised weights": (
        "g (float[1, 1, 4, 4] x) => (float[1, 1, b, c] y) "
        "{ q = QuantizeLinear <axis = 0> (w, s, z) d = DequantizeLinear <axis = 0> (q, s, z) y = Conv (x, d) }",
        {"w": np.ones((1, 1, 3, 3), np.float32), "s": np.float32([1]), "z": np.int8([0])},
        17, "10.3", "Conv 'y': no kernel_shape, and the weights 'd' computed in the graph", "10.4",
    ),
    "pads beside auto_pad": (
        "g (float[1, 1, 4, 4] x) => (float[1, 1, b, c] y) "
        '{ y = MaxPool <kernel_shape = [2, 2], auto_pad = "SAME_UPPER", pads = [0, 0, 1, 1]> (x) }',
        {}, 17, "10.0", "pads beside auto_pad = SAME_UPPER", "8.6",
    ),
    "integer exponent": (
        "g (float[4] x) => (float[4] y) { y = Pow (x, e) }",
        {"e": np.int64(2)}, 17, "10.3", "INT64 exponent 'e'", "10.8",
    ),
    "Constant of integers": (
        "g (float[1, 4] x) => (float[4] y) { s = Constant <value_ints = [4]> () y = Reshape (x, s) }",
        {}, 17, "8.6", "Constant 's': the attribute value_ints = [4], which this parser reads otherwise", "10.0",
    ),
    "Shape of a part": (
        "g (float[1, 4] x) => (int64[1] y) { y = Shape <start = 1> (x) }", {}, 17, "8.6", "start = 1, which", "10.0",
    ),
    "Pad axes": (
        "g (float[1, 4] x) => (float[1, b] y) { y = Pad (x, p, , a) }",
        {"p": np.int64([1, 1]), "a": np.int64([1])}, 18, "8.6", "the graph has opset 18", "10.3",
    ),
    "Pad below zero": (
        "g (float[1, 4] x) => (float[1, b] y) { y = Pad (x, p) }",
        {"p": np.int64([0, -1, 0, 0])}, 17, "10.3", "pads [0, -1, 0, 0]; supported only with", "10.15",
    ),
    "Pad wraps": (
        'g (float[1, 4] x) => (float[1, b] y) { y = Pad <mode = "wrap"> (x, p) }',
        {"p": np.int64([0, 1, 0, 1])}, 19, "8.6", "mode = wrap", "10.0",
    ),
    "ScatterND in 8": (
        'g (float[4] x, int64[1, 1] i, float[1] u) => (float[4] y) { y = ScatterND <reduction = "add"> (x, i, u) }',
        {}, 16, "8.6", "reduction = add, which this parser reads otherwise, and says nothing", None,
    ),
    "ScatterND of no reduction": (
        'g (float[4] x, int64[1, 1] i, float[1] u) => (float[4] y) { y = ScatterND <reduction = "none"> (x, i, u) }',
        {}, 16, "10.3", "the attribute reduction = none", "10.9",
    ),
    "Resize as TensorFlow": (
        RESIZE % 'mode = "nearest", coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "floor"',
        {"s": SCALES}, 13, "10.3", "tf_half_pixel_for_nn with floor", None,
    ),
    "InstanceNormalization of two types": (
        "g (float16[1, 2, 8, 8] x) => (float16[1, 2, 8, 8] y) { c = Cast <to = 10> (x) "
        "y = InstanceNormalization (c, s, s) }",
        {"s": np.float16([1, 1])}, 17, "8.6", "FP16 's', FP16 's', which this parser reads otherwise", "10.3",
    ),
    "GroupNormalization per channel": (
        NORM, {"s": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, 21, "10.14",
        "a scale of shape [4] for 2 groups", "10.15",
    ),
    "TopK of an early axis": (
        "g (float[9, 1, 1, 1, 1] x) => (float[a, b, c, d, e] y, int64[a, b, c, d, e] i) "
        "{ y, i = TopK <axis = 0> (x, k) }",
        {"k": np.int64([3])}, 17, "10.3", "axis 0 of 5 dimensions", None,
    ),
    "NMS without a maximum": (BOXES % "", {}, 17, "10.3", "no max_output_boxes_per_class (0 boxes), which", None),
    "NMS with several maxima": (
        BOXES % ", n", {"n": np.int64([3, 4])}, 17, "8.6", "the limit 'n' of 2 values", None,
    ),
    "GridSample's names of opset 20": (
        SAMPLED % '<mode = "linear">', {}, 20, "10.3", "mode = linear, which this parser reads otherwise", None,
    ),
    "GridSample's names of opset 16": (SAMPLED % '<mode = "cubic">', {}, 16, "8.5", "mode = cubic, which", None),
    "scales without an axis": (
        CHANNELS % ("", ""), {"w": np.ones((2, 3), np.float32), "s": np.float32([1, 1, 1]), "z": np.int8([0, 0, 0])},
        17, "10.3", "several scales 's' and no axis, by which ONNX means 1, which this parser reads otherwise", "10.15",
    ),
    "more zero points than scales": (
        CHANNELS % ("", ""), {"w": np.ones((2, 3), np.float32), "s": np.float32(1), "z": np.int8([0, 0])},
        17, "10.3", "1 scales and 2 zero points", None,
    ),
    "too few scales": (
        CHANNELS % (("<axis = 1>",) * 2),
        {"w": np.ones((2, 3), np.float32), "s": np.float32([1, 1]), "z": np.int8([0, 0])},
        17, "10.3", "2 scales for 3 places on axis 1", None,
    ),
    "scale of another type": (
        "g (float[2] x) => (float[2] y) "
        "{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Cast <to = 1> (d) }",
        {"s": np.float16(0.5), "z": ZERO}, 23, "10.15", "the FP32 input 'x' and an FP16 scale", None,
    ),
})  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_restrictions(name: str) -> None:
    text, tensors, opset, refused_by, words, taken_by = CASES[name]
    made = model(text, opset, **tensors)
    assert words in str(refusal(made, refused_by))
    if taken_by:
        assert refusal(made, taken_by) is None


def test_constants_of_a_shape_have_any_type() -> None:
    """As torch's older exporter writes them for anchors and labels."""
    made = model("g (int64[1] s) => (int64[N] y) { y = ConstantOfShape <value = int64[1] {1}> (s) }")
    assert [refusal(made, version) for version in EVERY_TABLE] == [None] * len(EVERY_TABLE)


def test_what_keeps_the_restrictions_passes() -> None:
    """The same operators as above, as detectors have them."""
    text = """g (float[1, 2, 8, 8] x) => (float[1, 5] y, int64[1, 5] i)
    {
        a = Resize <mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel"> (x, , scales)
        b = MaxPool <kernel_shape = [2, 2], dilations = [1, 1]> (a)
        axes = Constant <value = int64[1] {1}> ()
        same = Identity (axes)
        c = Slice (b, start, end, same)
        d = Squeeze (c, axes)
        e = QuantizeLinear (d, scale, zero)
        f = DequantizeLinear (e, scale, zero)
        g = Reshape (f, flat)
        y, i = TopK <sorted = 1> (g, count)
    }"""
    made = model(
        text, scales=SCALES, start=np.int64([0]), end=np.int64([1]), scale=ONE, zero=ZERO,
        flat=np.int64([1, -1]), count=np.int64([5]),
    )  # fmt: skip
    for version in ("8.5", "8.6", "10.0", "10.3", "10.16", "11.4"):
        assert refusal(made, version) is None


@pytest.mark.parametrize(
    ("text", "tensors", "version", "note"),
    [
        ("g (float[1, 9] x, int64[1] k) => (float[a, b] y, int64[a, b] i) { y, i = TopK (x, k) }", {}, "10.3",
         "TopK 'y': K 'k' computed in the graph; where K is above 3840 the engine fails when it runs"),
        ("g (int32[1, 9] x) => (int32[a, b] y, int64[a, b] i) { y, i = TopK (x, k) }", {"k": np.int64([2])}, "8.6",
         "TopK 'y': an INT32 input; INT32 is compared as FP32"),
        ("g (int64[4] x) => (int64[4] y) { y = Add (x, w) }", {"w": np.int64([1, 2, 3, 1 << 40])}, "8.6",
         "Add 'y': the constant 'w' reaches from 1 to 1099511627776; constants beyond INT32 are clamped to it"),
    ],
)  # fmt: skip
def test_what_is_changed_in_silence_is_noted(text: str, tensors: Any, version: str, note: str) -> None:
    made = model(text, **tensors)
    check_graph(made)
    assert check_operators(made, version) == [note]
    assert check_operators(made, "10.15") == ([note] if "K 'k'" in note else [])


def test_an_end_of_a_slice_beyond_int32_is_no_matter() -> None:
    made = model(
        "g (float[1, 9] x) => (float[a, b] y) { y = Slice (x, s, e) }", s=np.int64([0]), e=np.int64([(1 << 63) - 1])
    )
    assert check_operators(made, "8.6") == []


def test_weights_may_have_a_scale_per_channel() -> None:
    text = pair(values="w").replace("y = Deq", "d = Deq").replace("z) }", "z) y = Add (x, d) }")
    tensors = {"w": np.ones((2, 3), np.float32), "s": np.float32([1, 2]), "z": np.int8([0, 0])}
    for version in TARGETS:
        assert refusal(model(text, **tensors), version) is None


def test_a_plugin_is_named_with_its_domain() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "trt" : 1]> g (float[1] x) => (float[1] y) { y = trt.Nms (x) }'
    with pytest.raises(EngineBuildError, match="Nms 'y': not an operator of ONNX but of 'trt'"):
        check_operators(parser.parse_model(text), "10.3")
