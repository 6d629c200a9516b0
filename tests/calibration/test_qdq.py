from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from deploy.dataset import load_split
from deploy.graphs.graph import check_graph, count_parameters, initializers, producers
from deploy.graphs.operators import check_operators
from deploy.graphs.precision import typed_graph
from deploy.images import read_image
from deploy.runtime.preprocess import preprocess
from deploy.tensorrt.options import BuildOptions, recipe_for, typing_of_version

PREDICTIONS = ["prediction_3", "prediction_4"]
QUANTIZED = [
    "stem", "plain1", "plain2", "down1", "down2", "down_skip",
    "lateral3", "lateral4", "fpn3", "fpn4", "tower_3", "tower_4",
]  # fmt: skip


def run(model, outputs, contract, images):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in contract.output_names)
    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [preprocess(read_image(image.path), contract).input for image in images]
    return [
        np.concatenate(values) for values in zip(*(session.run(outputs, {"image": x}) for x in inputs), strict=True)
    ]


def signal_to_noise_db(expected, found):
    return 10 * np.log10(expected.var() / np.square(found - expected).mean())


def test_result_is_valid_and_close_to_float(detector, quantized, target, contract, data_dir):
    check_graph(quantized)
    unseen = load_split(data_dir, "val").images
    expected = run(detector, PREDICTIONS, contract, unseen)
    found = run(quantized, PREDICTIONS, contract, unseen)
    assert [signal_to_noise_db(e, f) > 25 for e, f in zip(expected, found, strict=True)] == [True, True]
    (scores,), (int8_scores,) = (
        run(detector, ["scores"], contract, unseen),
        run(quantized, ["scores"], contract, unseen),
    )
    np.testing.assert_allclose(int8_scores, scores, atol=0.03)
    assert not np.array_equal(int8_scores, scores)


@pytest.mark.parametrize("version", ["8.5", "8.6", "10.0", "10.3", "10.15"])
def test_every_tensorrt_takes_it(for_tensorrt, version):
    """The convolutions of the mini detector leave their size to their weights, as some exporters do."""
    assert check_operators(for_tensorrt, version) == []
    graph = recipe_for(BuildOptions(precision="int8"), typing_of_version(version)).graph
    assert check_operators(typed_graph(for_tensorrt, graph, {}).model, version) == []


def test_a_convolution_has_both_operands_quantized_or_neither(quantized, target):
    made_by = producers(quantized)

    def is_quantized(name):
        while name in made_by and made_by[name].op_type == "MaxPool":
            name = made_by[name].input[0]
        return name in made_by and made_by[name].op_type == "DequantizeLinear"

    convolutions = [node for node in quantized.graph.node if node.op_type == "Conv"]
    assert [node.output[0] for node in convolutions if is_quantized(node.input[1])] == QUANTIZED
    # ONNX Runtime's integer kernels have integer outputs: the predictions read those, with their float weights.
    expected = QUANTIZED + PREDICTIONS if target == "onnxruntime" else QUANTIZED
    assert sorted(node.output[0] for node in convolutions if is_quantized(node.input[0])) == sorted(expected)


def test_parameters_count_as_in_float(detector, quantized, target):
    biases_per_level = 8 if target == "onnxruntime" else 0  # the tower's: int32, in the scale of each level's input
    assert count_parameters(quantized) == count_parameters(detector) + biases_per_level


def test_result_does_not_depend_on_the_order_of_images(detector, quantize, quantized, target, images):
    again = quantize(detector, target, images=images[::-1])
    assert again.SerializeToString(deterministic=True) == quantized.SerializeToString(deterministic=True)


def test_tensorrt_pairs_have_the_form_that_its_parser_wants(detector, for_tensorrt):
    constant = initializers(for_tensorrt)
    weights = Counter()
    for node in for_tensorrt.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        tensor, scale, zero_point = node.input
        assert constant[scale].data_type == TensorProto.FLOAT
        assert constant[zero_point].data_type == TensorProto.INT8
        assert constant[zero_point].dims == constant[scale].dims
        assert not numpy_helper.to_array(constant[zero_point]).any()
        if tensor in constant:
            assert constant[tensor] == initializers(detector)[tensor]  # FP32, as it was
            assert [(a.name, a.i) for a in node.attribute] == [("axis", 0)]
            assert list(constant[scale].dims) == [constant[tensor].dims[0]]
            weights[tensor] += 1
    expected = {f"{name}.weight": 1 for name in QUANTIZED[:-2]}
    assert weights == {**expected, "tower.weight": 2}  # two levels share a constant, each has a pair


def test_tensorrt_biases_and_predictions_stay_as_they_are(detector, for_tensorrt):
    before, after = producers(detector), producers(for_tensorrt)
    for name in QUANTIZED:
        assert after[name].input[2] == before[name].input[2]
    for name in PREDICTIONS:
        assert after[name] == before[name]


def test_onnxruntime_activations_are_unsigned_and_weights_stored_as_int8(for_onnxruntime):
    constant = initializers(for_onnxruntime)
    for node in for_onnxruntime.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constant[node.input[2]].data_type == TensorProto.UINT8
    assert sorted(name for name in constant if name.endswith(".weight")) == ["predictor.weight"]
    assert constant["tower.weight_int8"].data_type == TensorProto.INT8


def test_bias_of_a_dead_channel_survives_int32(detector, quantize, images, contract):
    """Its weight is next to 0, so that bias / (input scale x weight scale) is beyond what int32 holds."""
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    for name, value in (("down1.weight", 1e-12), ("down1.bias", 7.0)):
        tensor = initializers(model)[name]
        values = numpy_helper.to_array(tensor).copy()
        values[3] = value
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    quantized = quantize(model, "onnxruntime")
    (expected,), (found,) = (run(m, ["down1_relu"], contract, images) for m in (model, quantized))
    np.testing.assert_allclose(found[:, 3], expected[:, 3], rtol=0.01)
