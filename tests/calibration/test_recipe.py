from __future__ import annotations

import random

import pytest

from calibration.collect import collect_statistics
from calibration.placement import Graph, node_name
from calibration.ranges import PERCENTILE
from calibration.recipe import Recipe, tensors_of_any_choice, tensors_of_placement


def test_any_choice_of_float_convolutions_needs_no_further_tensors(detector, target):
    names = [node_name(node) for node in Graph(detector).quantized]
    known = set(tensors_of_any_choice(Graph(detector), target))
    needed = set()
    for seed in range(100):
        chooser = random.Random(seed)
        kept = chooser.sample(names, chooser.randrange(len(names)))
        needed.update(tensors_of_placement(Graph(detector, kept), target))
    assert needed <= known
    assert known - set(tensors_of_placement(Graph(detector), target))  # those of the whole model are not enough


@pytest.fixture
def recipe(detector, images, contract, target):
    statistics = collect_statistics(detector, tensors_of_any_choice(Graph(detector), target), images[:1], contract)
    return Recipe(detector, target, "max", PERCENTILE, ("node_tower_3",), statistics)


def weight_pairs(model):
    names = {node.output[0]: node.name for node in model.graph.node if node.op_type == "Conv"}
    made_by = {node.output[0]: node.op_type for node in model.graph.node}
    return {
        names[node.output[0]]
        for node in model.graph.node
        if node.op_type == "Conv" and made_by.get(node.input[1]) == "DequantizeLinear"
    }


def test_a_block_alone_is_in_int8(recipe):
    model = recipe.quantize(recipe.graph_of(["node_down1", "node_fpn4"]))
    assert weight_pairs(model) == {"node_down1", "node_fpn4"}


def test_what_is_kept_in_any_case_stays_in_float(recipe):
    found = weight_pairs(recipe.quantize(recipe.graph(["node_down1"])))
    assert len(found) == 10
    assert not found & {"node_down1", "node_tower_3"}
