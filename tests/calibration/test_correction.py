from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calibration.correction import with_corrected_biases
from calibration.placement import FloatGraph, node_name
from deploy.graphs.graph import constants
from deploy.images import read_image
from deploy.runtime.preprocess import preprocess


@pytest.fixture
def quantizer(detector, quantizer_of, target):
    """Rounded badly on purpose, by clipping at the 80th percentile: so that there is something to correct."""
    return quantizer_of(detector, target, "percentile", 80.0)


def channel_means(model, tensor, images, contract):
    """(channels,): over the images and places."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.append(onnx.ValueInfoProto(name=tensor))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(changed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = [preprocess(read_image(image.path), contract).input for image in images]
    return np.mean([session.run(None, {"image": feed})[0].mean(axis=(0, 2, 3)) for feed in feeds], axis=0)


@pytest.mark.parametrize("name", ["stem", "down2", "tower_4"])
def test_the_mean_of_each_channel_is_that_of_float(quantizer, detector, images, contract, name):
    """Of a convolution that alone is in INT8: its input is float, as in the correction."""
    corrected = quantizer.corrected(images, contract)
    graph = quantizer.graph_of([f"node_{name}"])
    expected = channel_means(detector, name, images, contract)
    before = np.abs(channel_means(quantizer.quantize(graph), name, images, contract) - expected).max()
    after = np.abs(channel_means(corrected.quantize(graph), name, images, contract) - expected).max()
    assert before > 0.01
    assert after < before / 50


def test_where_nothing_is_clipped_there_is_little_to_correct(quantizer, images, contract):
    fine = dataclasses.replace(quantizer, method="max").corrected(images, contract)
    rough = quantizer.corrected(images, contract)
    sizes = [np.mean([np.abs(values).mean() for values in one.corrections.values()]) for one in (fine, rough)]
    assert sizes[0] < sizes[1] / 10


def test_levels_that_share_a_weight_have_biases_of_their_own(quantizer, detector, images, contract):
    corrections = quantizer.corrected(images, contract).corrections
    assert list(corrections) == [node.output[0] for node in FloatGraph(detector).quantized]
    graph = with_corrected_biases(quantizer.graph(["node_stem"]), corrections)
    before, after = constants(detector), graph.constants
    found = {node.output[0]: node for node in graph.products}
    for node in FloatGraph(detector).products:
        name = node.output[0]
        moved = numpy_helper.to_array(after[found[name].input[2]]) - numpy_helper.to_array(before[node.input[2]])
        expected = 0 if name == "stem" or name not in corrections else corrections[name]
        np.testing.assert_allclose(moved, np.broadcast_to(expected, moved.shape), atol=1e-6)
        assert found[name].input[1] == node.input[1]
    assert [node_name(node) for node in graph.quantized] == [
        node_name(node) for node in quantizer.graph(["node_stem"]).quantized
    ]


def test_a_convolution_without_bias_gets_one(detector, quantizer_of, images, contract):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    next(node for node in model.graph.node if node.name == "node_down1").input.pop()
    quantizer = quantizer_of(model, "tensorrt").corrected(images, contract)
    graph = with_corrected_biases(quantizer.graph(), quantizer.corrections)
    bias = next(node.input[2] for node in graph.products if node.output[0] == "down1")
    np.testing.assert_array_equal(numpy_helper.to_array(graph.constants[bias]), quantizer.corrections["down1"])
    onnx.checker.check_model(quantizer.quantize(quantizer.graph()), full_check=True)
