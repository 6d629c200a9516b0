"""Fully connected layers and attention in INT8: the form they are brought into, where pairs go, and what runs them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calibration.audit import INT8, audit, operators_of_onnxruntime
from calibration.blocks import count_multiplications
from calibration.matrix_products import write_gemms
from calibration.placement import PLACEMENTS, FloatGraph, node_name
from calibration.qdq import quantize_graph
from deploy.graphs.graph import check_graph, constants, producers
from deploy.graphs.precision import half_from_float
from deploy.graphs.products import Products, weight_axis
from deploy.int8_format import FloatReason, rounded_weight, weight_scales
from tests.calibration.test_placement import with_weights
from tests.calibration.transformer import LAYERS, LINEARS, PREDICTORS, build_transformer


def run(model, **feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


@pytest.fixture(scope="module")
def transformer():
    """Its MatMul and Add as Gemm; not to be changed."""
    model = build_transformer()
    check_graph(model)
    said = write_gemms(model)
    check_graph(model)
    assert said.startswith(f"{LINEARS + PREDICTORS + 1 + 2 * LAYERS} MatMul and the Add behind each are made a Gemm")
    return model


def test_results_are_those_of_before(transformer):
    image = np.random.default_rng(3).normal(size=(1, 3, 32, 48)).astype(np.float32)
    for before, after in zip(run(build_transformer(), image=image), run(transformer, image=image), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-4)


def test_what_of_a_decoder_is_quantised_and_why_not_the_rest(transformer):
    graph = FloatGraph(transformer)
    assert Counter(node.op_type for node in graph.quantized) == {"Conv": 2, "Gemm": LINEARS}
    assert Counter(graph.reasons.values()) == {
        FloatReason.FINAL_PREDICTION: PREDICTORS,
        FloatReason.PLACES: 1 + LAYERS,  # which queries, and where the deformable attention reads
        FloatReason.TWO_ACTIVATIONS: 4 * LAYERS,
        FloatReason.FEW_INPUTS: LAYERS,  # four sides of a box
    }
    kept = [name for name, reason in graph.reasons.items() if reason is FloatReason.PLACES]
    assert kept == ["node_encoder.classes.product", *(f"node_decoder.{n}.deformable.offsets.product" for n in range(2))]
    assert "boxes.corners" not in {node.output[0] for node in graph.products}  # it decodes


def test_the_sum_from_layer_to_layer_is_not_rounded(transformer, target):
    """Norms and additions of a decoder read what is made, also where a fully connected layer reads it in INT8."""
    placement = PLACEMENTS[target](FloatGraph(transformer))
    reading = {output for output, _ in placement.edges}
    made = producers(transformer)
    assert not [name for name in reading if made[name].op_type in ("Add", "LayerNormalization", "Softmax", "MatMul")]
    assert [made[name].op_type for name in reading].count("Gemm") == LINEARS
    assert len([name for name in placement.pairs if name.endswith("/as_rows")]) < LINEARS  # keys and values share one


def test_a_decoder_in_int8_is_near_float_and_has_no_fault(transformer, target, quantize, images):
    quantized = quantize(transformer, target)
    check_graph(quantized)
    run_as = operators_of_onnxruntime(quantized) if target == "onnxruntime" else None
    result = audit(quantized, {"target": target}, run_as, "ONNX Runtime")
    assert result.faults == []
    assert Counter(entry.operator for entry in result.products if entry.state == INT8) == {"Conv": 2, "Gemm": LINEARS}
    assert {entry.code for entry in result.products} == {
        "", "final_prediction", "no_pair", "two_activations",
    }  # fmt: skip
    assert result.int8_share > 0.85
    if run_as:
        assert Counter(run_as.values())["QGemm"] == LINEARS
    image = np.random.default_rng(3).uniform(-1.5, 1.5, size=(1, 3, 32, 48)).astype(np.float32)
    (_, scores, _), (_, expected, _) = run(quantized, image=image), run(transformer, image=image)
    assert np.abs(np.sort(scores) - np.sort(expected)).max() < 0.05


def test_scales_are_those_of_the_channels_of_the_output():
    model = with_weights("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[5, 16] x) => (float[5, 16] y)
        <float[16, 16] first, float[16, 16] second, float[16, 16] third, float[16] bias>
        {
            a = Gemm (x, first, bias)
            b = Gemm <transB = 1> (a, second, bias)
            c = MatMul (b, third)
            y = Gemm (c, first)
        }
    """)
    for target in PLACEMENTS:
        graph = FloatGraph(model)
        assert [node.output[0] for node in graph.quantized] == ["a", "b", "c"]
        placement = PLACEMENTS[target](graph)
        quantized = quantize_graph(graph, placement, dict.fromkeys(placement.pairs, (-60.0, 60.0)), target)
        check_graph(quantized)
        opened = onnx.ModelProto()
        opened.CopyFrom(quantized)
        made = {node.output[0]: node for node in quantized.graph.node}
        for name, axis in (("a", 1), ("b", 0), ("c", 1)):
            assert weight_axis(made[name]) == axis
            opened.graph.output.append(onnx.ValueInfoProto(name=made[name].input[1]))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(opened.SerializeToString(), options)
        found = session.run(None, {"x": np.zeros((5, 16), np.float32)})[1:]
        for values, weight, axis in zip(found, ("first", "second", "third"), (1, 0, 1), strict=True):
            weight = numpy_helper.to_array(constants(model)[weight])
            np.testing.assert_array_equal(values, rounded_weight(weight, weight_scales(weight, axis), axis))
        if target == "onnxruntime":
            counts = Counter(operators_of_onnxruntime(quantized).values())
            assert (counts["QGemm"], counts["MatMulIntegerToFloat"], counts["Gemm"]) == (2, 1, 1)


FORMS = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[{shape}] x) => (float[{output}] y)
    <float[16, 16] w, float[16] bias, float[1, 16] row, float[5, 1] column, float one>
    {{ {nodes} }}
"""


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("a = Gemm <alpha = 0.5, beta = 2.0> (x, w, bias) y = Gemm (a, w)", None),
        ("a = Gemm (x, w, row) y = Gemm (a, w)", None),
        ("a = Gemm (x, w, one) y = Gemm (a, w)", None),
        ("a = Gemm (x, w, column) y = Gemm (a, w)", FloatReason.FORM),
        ("t = Transpose (x) a = Gemm <transA = 1> (t, w, bias) y = Gemm (a, w)", FloatReason.FORM),
        ("m = MatMul (x, w) a = Add (m, bias) y = Gemm (a, w)", None),
        ("m = MatMul (x, w) a = Add (row, m) y = Gemm (a, w)", None),
        ("m = MatMul (x, w) n = Relu (m) a = Add (m, bias) s = Add (a, n) y = Gemm (s, w)", None),  # m is read twice
    ],
)
def test_every_form_is_computed_as_before_and_in_integers_or_said_not_to_be(nodes, reason):
    model = with_weights(FORMS.format(shape="5, 16", output="5, 16", nodes=nodes))
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    before = run(model, x=x)[0]
    write_gemms(model)
    check_graph(model)
    np.testing.assert_allclose(run(model, x=x)[0], before, rtol=1e-4, atol=1e-4)
    graph = FloatGraph(model)
    assert [graph.kept.get(node.output[0]) for node in graph.products] == [reason, FloatReason.FINAL_PREDICTION]
    if reason is None:
        placement = PLACEMENTS["onnxruntime"](graph)
        quantized = quantize_graph(graph, placement, {"x": (-4.0, 4.0)}, "onnxruntime")
        assert audit(quantized, {}, operators_of_onnxruntime(quantized), "ONNX Runtime").faults == []


@pytest.mark.parametrize("shape", ["2, 3, 5, 16", "N, 5, 16", "1, 5, 16"])
def test_rows_in_more_dimensions_and_in_any_batch(shape):
    model = with_weights(
        FORMS.format(
            shape=shape, output=shape, nodes="m = MatMul (x, w) a = Add (m, bias) b = Relu (a) y = MatMul (b, w)"
        )
    )
    sizes = [3 if size == "N" else int(size) for size in shape.split(", ")]
    x = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
    before = run(model, x=x)[0]
    assert write_gemms(model).startswith("1 MatMul")
    check_graph(model)
    np.testing.assert_allclose(run(model, x=x)[0], before, rtol=1e-4, atol=1e-4)
    graph = FloatGraph(model)
    quantized = quantize_graph(graph, PLACEMENTS["onnxruntime"](graph), {"x/as_rows": (-4.0, 4.0)}, "onnxruntime")
    counts = Counter(operators_of_onnxruntime(quantized).values())
    assert (counts["QGemm"], counts["Gemm"]) == (1, 0)


def test_without_that_form_the_audit_finds_what_runs_in_float():
    """Of a MatMul and an Add ONNX Runtime makes a Gemm, and leaves it in float."""
    model = with_weights(
        FORMS.format(shape="5, 16", output="5, 16", nodes="m = MatMul (x, w) a = Add (m, bias) y = Gemm (a, w)")
    )
    graph = FloatGraph(model)
    quantized = quantize_graph(graph, PLACEMENTS["onnxruntime"](graph), {"x": (-4.0, 4.0)}, "onnxruntime")
    (fault,) = audit(quantized, {}, operators_of_onnxruntime(quantized), "ONNX Runtime").faults
    assert "runs it in float, as " in fault


def test_multiplications_are_those_of_one_image(transformer, contract, quantize):
    found = count_multiplications(FloatGraph(transformer), contract)
    assert found == {
        entry.name: entry.multiplications
        for entry in audit(quantize(transformer, "onnxruntime")).products
        if entry.state == INT8
    }
    assert found["node_decoder.0.hidden.product"] == 10 * 32 * 64
    assert found["node_decoder.0.cross.k.product"] == 8 * 12 * 32 * 32


def test_a_mean_over_bins_decodes_also_where_its_bins_are_quantised():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[8, 16] x) => (float[8, 1] y)
        <float[16, 16] w, float scale = {{0.1}}, int8 zero = {{0}}, int8[16, 1] bins = {{{bins}}}>
        {{
            p = Gemm (x, w)
            shares = Softmax (p)
            fixed = DequantizeLinear (bins, scale, zero)
            y = MatMul (shares, fixed)
        }}
    """
    model = with_weights(text.format(bins=", ".join(map(str, range(16)))))
    assert Products(model).final == {"p"}
    assert [node_name(node) for node in Products(model).nodes] == ["p"]


def test_biases_of_fully_connected_layers_are_corrected(transformer, quantizer_of, images, contract, target):
    quantizer = quantizer_of(transformer, target)
    corrected = quantizer.corrected(images, contract)
    graph = quantizer.graph()
    names = {node.output[0] for node in graph.quantized}
    assert set(corrected.corrections) == names | graph.predictors  # which a search may take
    assert all(np.isfinite(values).all() and values.any() for values in corrected.corrections.values())
    model = corrected.quantize(corrected.graph())
    check_graph(model)
    assert audit(model, {}).faults == []


def test_a_decoder_becomes_fp16_but_for_its_boxes_and_places(transformer):
    """Up to and with the final predictions; each layer's boxes and places are FP32 though the next layer reads them."""
    half = half_from_float(transformer)
    check_graph(half)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(half, strict_mode=True).graph.value_info
    }
    gemms = [node.output[0] for node in half.graph.node if node.op_type == "Gemm"]
    assert {types[name] for name in gemms if name in types} == {onnx.TensorProto.FLOAT16}
    for name in ("decoder.0.self.qk", "decoder.1.cross.pv", "decoder.0.sum1"):
        assert types[name] == onnx.TensorProto.FLOAT16
    for name in ("boxes.1", "decoder.0.moved", "decoder.0.inverse.odds", "decoder.0.deformable.grid", "scores.all"):
        assert types[name] == onnx.TensorProto.FLOAT
