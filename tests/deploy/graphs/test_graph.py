from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from deploy.errors import ContractError, ExportError
from deploy.graphs import graph

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[1, 2, 8, 8] x) => (float[1, 3, 4, 4] y)
<float[3, 2, 1, 1] weight = {1, 2, 3, 4, 5, 6}, float[3] unused = {1, 2, 3}>
{
    bias = Constant <value = float[3] {0, 1, 2}> ()
    same_weight = Identity (weight)
    same_again = Identity (same_weight)
    first = Conv (x, weight, bias)
    second = Conv (x, same_again, bias)
    dead = Relu (second)
    sum = Add (first, second)
    y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (sum)
}
"""


@pytest.fixture
def model():
    return parser.parse_model(TEXT)


def test_saved_model_loads_as_it_was(model, tmp_path):
    path = tmp_path / "folder" / "small.onnx"
    graph.save_onnx(model, path)
    assert graph.load_onnx(path) == model
    assert [file.name for file in path.parent.iterdir()] == ["small.onnx"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ContractError, match=r"no such file: .*nothing\.onnx"):
        graph.load_onnx(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("kept_bytes", [0, 1, 40, -1])
def test_truncated_file_is_refused(model, tmp_path, kept_bytes):
    path = tmp_path / "cut.onnx"
    path.write_bytes(model.SerializeToString()[:kept_bytes])
    with pytest.raises(ContractError, match=r"cut\.onnx.*truncated"):
        graph.load_onnx(path)


def test_text_is_not_onnx(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("This is no model.\n" * 10)
    with pytest.raises(ContractError, match=r"text\.onnx"):
        graph.load_onnx(path)


def test_a_graph_without_nodes_is_refused(model, tmp_path):
    del model.graph.node[:]
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(ContractError, match=r"empty\.onnx holds no graph, or one without nodes"):
        graph.load_onnx(tmp_path / "empty.onnx")


@pytest.fixture
def with_external_data(model, tmp_path):
    """An ONNX file whose weight is in small.data beside it."""
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 2, 1, 1), np.float32), "weight"))
    path = tmp_path / "small.onnx"
    onnx.save(model, path, save_as_external_data=True, location="small.data", size_threshold=0)
    return path


def test_external_data_is_read(with_external_data):
    weight = graph.initializers(graph.load_onnx(with_external_data))["weight"]
    np.testing.assert_array_equal(numpy_helper.to_array(weight), np.ones((3, 2, 1, 1), np.float32))


def test_missing_external_data_is_refused(with_external_data):
    with_external_data.with_suffix(".data").unlink()
    with pytest.raises(
        ContractError,
        match=r"small\.onnx keeps weights in other files \(external data\), which cannot.*"
        r"small\.data",
    ):
        graph.load_onnx(with_external_data)


def test_truncated_external_data_is_refused(with_external_data):
    data = with_external_data.with_suffix(".data")
    data.write_bytes(data.read_bytes()[:10])
    with pytest.raises((ContractError, ExportError), match=r"external data|not valid ONNX: .*weight"):
        graph.check_graph(graph.load_onnx(with_external_data))


def test_valid_static_graph_passes(model):
    graph.check_graph(model)
    graph.check_static(model)


def test_invalid_graph_is_refused(model):
    model.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ExportError, match="nowhere"):
        graph.check_graph(model)


CUSTOM = '<ir_version: 8, opset_import: ["" : 17, "mmdeploy" : 1]> g (float[1] x) => (float[1] y) { y = %s (x) }'


@pytest.mark.parametrize(("operator", "domain"), [("mmdeploy.Nms", "mmdeploy"), ("EfficientNMS_TRT", "")])
def test_custom_operators_are_refused(operator, domain):
    name = operator.split(".")[-1]
    with pytest.raises(
        ExportError, match=f"the node y has the operator {name} of the domain '{domain}'; expected only"
    ):
        graph.check_graph(parser.parse_model(CUSTOM % operator))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(model, value):
    weight = np.array([1, 2, value, 4, value, 6], np.float32).reshape(3, 2, 1, 1)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    with pytest.raises(ExportError, match=r"constant 'weight' \[3, 2, 1, 1\] has 2 values that are NaN or infinite"):
        graph.check_graph(model)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_constant_with_more_bytes_than_its_sizes_say_is_refused(dtype):
    kind = {np.float32: "float", np.int64: "int64"}[dtype]
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g ({kind}[1] x) => ({kind}[1] y) <{kind}[1] c = {{2}}>
    {{ y = Mul (x, c) }}"""
    model = parser.parse_model(text)
    graph.check_graph(model)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(8, dtype), "c"))
    model.graph.initializer[0].dims[:] = [1]
    with pytest.raises(ExportError, match=r"the constant 'c' \[1\] cannot be read .*The file is damaged"):
        graph.check_graph(model)


def test_weights_are_looked_at_through_quantisers_and_identity():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y)
    <float[1, 1, 1, 1] w = {1}, float s = {0.5}, int8 z = {0}>
    { i = Identity (w) q = QuantizeLinear (i, s, z) d = DequantizeLinear (q, s, z) y = Conv (x, d) }"""
    model = parser.parse_model(text)
    graph.check_graph(model)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((1, 1, 1, 1), np.inf, np.float32), "w"))
    with pytest.raises(ExportError, match="constant 'w'"):
        graph.check_graph(model)


@pytest.mark.parametrize(("value", "refused"), [(np.inf, False), (np.nan, True)])
def test_a_limit_may_be_infinite_but_not_nan(value, refused):
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Clip (x, , top) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(value), "top"))
    if refused:
        with pytest.raises(ExportError, match="constant 'top'"):
            graph.check_graph(model)
    else:
        graph.check_graph(model)


def sized(x, y):
    """A model with these shapes of its input and output."""
    return parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[{x}] x) => (float[{y}] y) {{ y = Relu (x) }}"""
    )


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        ("1, 3, 8, 8", "1, 3, 8, 8", {}),
        ("N, 3, 8, 8", "N, 3, 8, 8", {"dynamic_batch": True}),
        ("1, 3, 8, 8", "1, 3, 8, 8", {"dynamic_batch": True, "dynamic_outputs": True}),
        ("1, 3, 8, 8", "found, 4", {"dynamic_outputs": True}),
        ("N, 3, 8, 8", "found, 4", {"dynamic_batch": True, "dynamic_outputs": True}),
    ],
)
def test_shapes_that_are_allowed(x, y, options):
    graph.check_static(sized(x, y), **options)


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        ("N, 3, 8, 8", "1, 3", {}, r"tensor x has the shape \['N', 3, 8, 8\]; expected a number for every dimension\."),
        ("1, 3, 8, 8", "N, 3", {}, r"tensor y has the shape \['N', 3\]"),
        ("N, 3, 8, 8", "found, 4", {"dynamic_outputs": True}, "tensor x has"),
        (
            "N, 3, H, W",
            "N, 4",
            {"dynamic_batch": True},
            r"tensor x .*'H', 'W'\]; expected a number for every .* but the",
        ),
        ("1, 3, 8, 8", "N, K", {"dynamic_batch": True}, "tensor y has"),
        ("1, 3, 8, 8", "1, K", {"dynamic_outputs": True}, "tensor y has"),
    ],
)
def test_shapes_that_are_refused(x, y, options, words):
    with pytest.raises(ExportError, match=words):
        graph.check_static(sized(x, y), **options)


def test_a_tensor_without_any_shape_is_refused(model):
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ExportError, match="tensor y has no shape at all"):
        graph.check_static(model)


def test_control_flow_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "b",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
    )
    node = helper.make_node("If", ["condition"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    inputs = [
        helper.make_tensor_value_info("condition", TensorProto.BOOL, [1]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]
    with pytest.raises(ExportError, match=r"choice.*subgraph"):
        graph.check_static(helper.make_model(helper.make_graph([node], "g", inputs, outputs)))


def test_producers_and_consumers(model):
    assert graph.producers(model)["sum"].op_type == "Add"
    assert "x" not in graph.producers(model)
    readers = [(node.output[0], index) for node, index in graph.consumers(model)["second"]]
    assert readers == [("dead", 0), ("sum", 1)]


def test_constants_resolve_identity_and_leave_the_model_alone(model):
    before = model.SerializeToString()
    found = graph.constants(model)
    assert {name: found[name].name for name in ("weight", "same_weight", "same_again", "bias")} == {
        "weight": "weight",
        "same_weight": "weight",
        "same_again": "weight",
        "bias": "bias",
    }
    np.testing.assert_array_equal(numpy_helper.to_array(found["bias"]), np.float32([0, 1, 2]))
    assert "first" not in found
    assert model.SerializeToString() == before


def test_remove_unused_keeps_what_outputs_need(model):
    graph.remove_unused(model)
    assert [node.output[0] for node in model.graph.node] == [
        "bias", "same_weight", "same_again", "first", "second", "sum", "y",
    ]  # fmt: skip
    assert [tensor.name for tensor in model.graph.initializer] == ["weight"]
    graph.check_graph(model)


def test_remove_unused_is_not_misled_by_outputs_left_out():
    """An unnamed output of a dead node is not what a node with an unnamed input asks for."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["", "indices"], kernel_shape=[1, 1]),
        helper.make_node("Clip", ["x", "", "top"], ["y"]),
    ]
    shape = [1, 1, 2, 2]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.float32(1), "top")],
        )
    )
    graph.remove_unused(model)
    assert [node.op_type for node in model.graph.node] == ["Clip"]


def test_shared_parameters_count_once(model):
    assert graph.count_parameters(model) == 6 + 3


def test_equal_initializers_are_stored_once_and_others_kept(model):
    first, second = np.ones((2, 2), np.float32), np.ones((4,), np.float32)
    names = {"a": first, "b": first.copy(), "other_shape": second, "other_type": first.astype(np.int32)}
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in names.items())
    model.graph.node.append(helper.make_node("Custom", list(names), ["z"], domain="own"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    graph.share_equal_initializers(model)
    assert list(model.graph.node[-1].input) == ["a", "a", "other_shape", "other_type"]
    assert [tensor.name for tensor in model.graph.initializer] == ["weight", "a", "other_shape", "other_type"]


def test_a_convolution_behind_pairs_says_the_size_of_its_kernel() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[1, 1, 4, 4] x) => (float[a, b, c, d] y)
    {
        p = Conv (x, w)
        q = QuantizeLinear <axis = 0> (w, s, z)
        d = DequantizeLinear <axis = 0> (q, s, z)
        y = Conv <pads = [1, 0, 1, 0]> (p, d)
    }"""
    model = parser.parse_model(text)
    constants = {"w": np.ones((1, 1, 3, 1), np.float32), "s": np.float32([1]), "z": np.int8([0])}
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())
    graph.write_kernel_shapes(model)
    plain, *_, behind = model.graph.node
    assert not plain.attribute  # its weights are a constant
    assert {entry.name: list(entry.ints) for entry in behind.attribute} == {
        "pads": [1, 0, 1, 0], "kernel_shape": [3, 1]
    }  # fmt: skip
    graph.check_graph(model)
