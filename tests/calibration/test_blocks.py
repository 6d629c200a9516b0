from __future__ import annotations

import onnx
import pytest
from onnx import parser

from calibration.audit import INT8, audit
from calibration.blocks import block_of_path, blocks_from_graph, count_multiplications, runs_of_graph
from calibration.placement import FloatGraph, node_name
from deploy.int8_format import FloatReason


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("/backbone/conv1/Conv", "/backbone/conv1"),
        ("/backbone/layer1/layer1.0/conv1/Conv", "/backbone/layer1/layer1.0"),
        ("/backbone/layer2/layer2.0/downsample/downsample.0/Conv", "/backbone/layer2/layer2.0"),
        ("/backbone/model/blocks.2/blocks.2.1/conv_pw/Conv", "/backbone/model/blocks.2/blocks.2.1"),
        ("/neck/lateral_convs.0/conv/Conv", "/neck/lateral_convs.0"),
        ("/bbox_head/cls_convs.1/conv_3/Conv", "/bbox_head/cls_convs.1"),
        ("/cls_convs.0/cls_convs.0.1/depthwise/Conv", "/cls_convs.0/cls_convs.0.1"),
        ("/backbone/stages.0/blocks.1/ffn/layers/layers.0/layers.0.0/MatMul", "/backbone/stages.0/blocks.1"),
        ("/stem/stem.0/Conv", "/stem/stem.0"),
        ("/features.0/Conv", "/features.0"),
        ("/Conv_12", "/Conv_12"),
    ],
)
def test_block_of_a_path(name, block):
    assert block_of_path(name) == block


def multiplications(graph):
    return {node_name(node): 10 for node in graph.products}


def test_runs_end_where_branches_meet(detector):
    blocks = blocks_from_graph(FloatGraph(detector), "grouped", multiplications(FloatGraph(detector)))
    assert {block.name: [name[5:] for name in block.products] for block in blocks} == {
        "node_stem": ["stem", "plain1", "plain2"],
        "node_down1": ["down1", "down2"],
        "node_down_skip": ["down_skip"],
        "node_lateral3": ["lateral3"],
        "node_lateral4": ["lateral4", "fpn4"],
        "node_fpn3": ["fpn3"],
        "node_tower_3": ["tower_3", "tower_4"],  # one weight
    }
    assert [block.multiplications for block in blocks] == [30, 20, 10, 10, 20, 10, 20]


def test_what_is_kept_in_float_is_in_no_block(detector):
    graph = FloatGraph(detector, ["node_plain1"])
    runs = runs_of_graph(graph)
    assert "node_plain1" not in runs
    assert runs["node_plain2"] == "node_plain2"  # no longer one run with the stem


def test_paths_are_blocks_of_modules():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}>
        { a = Conv (x, w)  b = Conv (a, w)  c = Conv (b, w)  y = Conv (c, w) }
    """)
    for node, name in zip(
        model.graph.node, ("/stem/Conv", "/layer/layer.0/a/Conv", "/layer/layer.0/b/Conv", "/last/Conv"), strict=True
    ):
        node.name = name
    graph = FloatGraph(model)
    blocks = blocks_from_graph(graph, "grouped", multiplications(graph))
    assert [block.name for block in blocks] == ["/stem", "/layer/layer.0"]
    assert FloatGraph(model, ["/layer/layer.0"]).kept.keys() == {
        "b",
        "c",
        "y",
    }  # a block's name is one for --keep-float


def test_what_stands_beside_the_blocks_of_a_stage_is_one_of_its_own():
    """As in Swin: a name for --keep-float means the same as in the list of blocks."""
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}>
        { a = Conv (x, w)  b = Conv (a, w)  c = Conv (b, w)  y = Conv (c, w) }
    """)
    names = (
        "/stages.0/blocks.0/qkv/Conv",
        "/stages.0/blocks.1/ffn/Conv",
        "/stages.0/downsample/reduction/Conv",
        "/head/Conv",
    )
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    graph = FloatGraph(model)
    blocks = blocks_from_graph(graph, "grouped", multiplications(graph))
    assert [block.name for block in blocks] == [
        "/stages.0/blocks.0", "/stages.0/blocks.1", "/stages.0/downsample/reduction",
    ]  # fmt: skip
    for block in blocks:
        kept = FloatGraph(model, [block.name]).reasons
        assert [name for name, reason in kept.items() if reason is FloatReason.ASKED] == list(block.products)


def test_each_convolution_can_be_a_block(detector):
    blocks = blocks_from_graph(FloatGraph(detector), "each", multiplications(FloatGraph(detector)))
    assert [(block.name,) for block in blocks] == [block.products for block in blocks]
    assert len(blocks) == 12


def test_multiplications_are_those_that_the_audit_counts(detector, quantized, contract):
    found = count_multiplications(FloatGraph(detector), contract)
    assert found == {
        entry.name: entry.multiplications for entry in audit(quantized).products if entry.state == INT8
    }  # fmt: skip
    assert found["node_stem"] == 16 * 24 * 27 * 8


def sizes(value):
    return all(size.dim_value for size in value.type.tensor_type.shape.dim)


def test_sizes_that_onnx_cannot_infer_are_counted(contract):
    """As torch leaves them where it traces a channel shuffle: the shape is computed in the graph."""
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 3, 32, 48] image) => (float[n, c, h, w] y)
        <float[2, 3, 1, 1] v = {1, 1, 1, 1, 1, 1}, float[2, 2, 1, 1] w = {1, 1, 1, 1}>
        {
            a = Conv (image, v)
            sizes = Shape (a)
            order = Abs (sizes)
            b = Reshape (a, order)
            c = Conv (b, w)
            y = Conv (c, w)
        }
    """)
    assert "c" not in {
        value.name for value in onnx.shape_inference.infer_shapes(model).graph.value_info if sizes(value)
    }
    graph = FloatGraph(model)
    found = count_multiplications(graph, contract)
    assert found == {"a": 32 * 48 * 3 * 2, "c": 32 * 48 * 2 * 2}
