from __future__ import annotations

import random

import pytest

from calibration.placement import FloatGraph, node_name
from calibration.quantizer import tensors_of_any_choice, tensors_of_placement


def test_any_choice_of_float_convolutions_needs_no_further_tensors(detector, target):
    names = [node_name(node) for node in FloatGraph(detector).quantized]
    known = set(tensors_of_any_choice(FloatGraph(detector), target))
    needed = set()
    for seed in range(100):
        chooser = random.Random(seed)
        kept = chooser.sample(names, chooser.randrange(len(names)))
        needed.update(tensors_of_placement(FloatGraph(detector, kept), target))
    assert needed <= known
    assert known - set(tensors_of_placement(FloatGraph(detector), target))  # those of the whole model are not enough


@pytest.fixture
def quantizer(detector, quantizer_of, images, target):
    return quantizer_of(detector, target, keep_float=("node_tower_3",), images=images[:1])


def weight_pairs(model):
    names = {node.output[0]: node.name for node in model.graph.node if node.op_type == "Conv"}
    made_by = {node.output[0]: node.op_type for node in model.graph.node}
    return {
        names[node.output[0]]
        for node in model.graph.node
        if node.op_type == "Conv" and made_by.get(node.input[1]) == "DequantizeLinear"
    }


def test_a_block_alone_is_in_int8(quantizer):
    model = quantizer.quantize(quantizer.graph_of(["node_down1", "node_fpn4"]))
    assert weight_pairs(model) == {"node_down1", "node_fpn4"}


def test_what_is_kept_in_any_case_stays_in_float(quantizer):
    found = weight_pairs(quantizer.quantize(quantizer.graph(["node_down1"])))
    assert len(found) == 10
    assert not found & {"node_down1", "node_tower_3"}
