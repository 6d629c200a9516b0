from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper, parser

from calibration.quantize import (
    Graph,
    check_quantizable,
    final_convolutions,
    int8_from_float,
    main,
    place_for_tensorrt,
)
from deploy.contract import load_contract, read_sidecar, sidecar_path, write_sidecar
from deploy.dataset import load_split, read_image
from deploy.errors import CalibrationError
from deploy.files import sha256_of
from deploy.graph import check_graph, consumers, count_parameters, initializers, load_onnx, producers
from deploy.preprocess import preprocess
from deploy.session import OrtSession

PREDICTIONS = ["prediction_3", "prediction_4"]
QUANTIZED = [
    "stem", "plain1", "plain2", "down1", "down2", "down_skip",
    "lateral3", "lateral4", "fpn3", "fpn4", "tower_3", "tower_4",
]  # fmt: skip


@pytest.fixture
def images(data_dir):
    return load_split(data_dir, "train").images


@pytest.fixture(params=["tensorrt", "onnxruntime"])
def target(request):
    return request.param


@pytest.fixture
def quantized(detector, target, images, contract):
    return int8_from_float(Graph(detector), target, images, contract)


@pytest.fixture
def for_tensorrt(detector, images, contract):
    return int8_from_float(Graph(detector), "tensorrt", images, contract)


@pytest.fixture
def for_onnxruntime(detector, images, contract):
    return int8_from_float(Graph(detector), "onnxruntime", images, contract)


def activation_pairs(model):
    """Tensor with a Q/DQ pair -> outputs of the nodes that read the pair."""
    constant, reading = initializers(model), consumers(model)
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constant:
            ((dequantize, _),) = reading[node.output[0]]
            assert list(dequantize.input[1:]) == list(node.input[1:])
            assert node.input[0] not in found, "a second pair"
            found[node.input[0]] = sorted(reader.output[0] for reader, _ in reading[dequantize.output[0]])
    return found


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


def test_final_convolutions_are_found_behind_the_decode(detector):
    assert final_convolutions(detector) == set(PREDICTIONS)


def test_paths_through_shape_carry_no_values():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2}>
        {
            a = Conv (x, w)
            shape = Shape (a)
            b = Conv (a, w)
            y = Reshape (b, shape)
        }
    """)
    assert final_convolutions(model) == {"b"}


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


def test_result_does_not_depend_on_the_order_of_images(detector, quantized, target, images, contract):
    again = int8_from_float(Graph(detector), target, images[::-1], contract)
    assert again.SerializeToString(deterministic=True) == quantized.SerializeToString(deterministic=True)


def test_tensorrt_pairs_are_on_inputs_and_on_skip_branches(for_tensorrt):
    assert activation_pairs(for_tensorrt) == {
        "image": ["stem"],
        "stem_relu": ["pooled"],  # one pair before MaxPool, for the convolution and the addition after it
        "plain1_relu": ["plain2"],
        "plain_sum_relu": ["down1", "down_skip", "lateral3"],
        "down1_relu": ["down2"],
        "down_skip": ["down_sum"],  # not down2, with which the addition fuses
        "down_sum_relu": ["lateral4"],
        "lateral4": ["fpn4", "upsampled"],  # one pair before Resize, for the addition after it
        "merged": ["fpn3"],
        "fpn3": ["tower_3"],
        "fpn4": ["tower_4"],
    }


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


def test_skip_branch_needs_a_convolution_to_fuse_with():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2}, float[1] c = {1}>
        {
            a = Conv (x, w)
            b = Relu (a)
            no_convolution = Add (x, b)
            d = Conv (no_convolution, w)
            constant = Add (d, c)
            e = Conv (constant, w)
            read_twice = Add (e, constant)
            f = Relu (e)
            both = Mul (read_twice, f)
            y = Conv (both, w)
        }
    """)
    assert place_for_tensorrt(Graph(model)).edges == {("a", 0), ("d", 0), ("e", 0)}


def test_onnxruntime_uses_its_integer_kernels(for_onnxruntime, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(for_onnxruntime.SerializeToString(), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["QLinearConv"] == len(QUANTIZED)
    assert counts["QLinearAdd"] == 3
    assert counts["Conv"] + counts["FusedConv"] == len(PREDICTIONS)
    assert counts["QuantizeLinear"] == 1  # the image
    assert counts["Relu"] == 0


def test_onnxruntime_activations_are_unsigned_and_weights_stored_as_int8(for_onnxruntime):
    constant = initializers(for_onnxruntime)
    for node in for_onnxruntime.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constant[node.input[2]].data_type == TensorProto.UINT8
    assert sorted(name for name in constant if name.endswith(".weight")) == ["predictor.weight"]
    assert constant["tower.weight_int8"].data_type == TensorProto.INT8


def test_onnxruntime_values_that_are_only_chosen_keep_their_scale(for_onnxruntime):
    scale_of = {n.input[0]: n.input[1] for n in for_onnxruntime.graph.node if n.op_type == "QuantizeLinear"}
    assert scale_of["pooled"] == scale_of["stem_relu"]
    assert scale_of["upsampled"] == scale_of["lateral4"]


def test_bias_of_a_dead_channel_survives_int32(detector, images, contract):
    """Its weight is next to 0, so that bias / (input scale x weight scale) is beyond what int32 holds."""
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    for name, value in (("down1.weight", 1e-12), ("down1.bias", 7.0)):
        tensor = initializers(model)[name]
        values = numpy_helper.to_array(tensor).copy()
        values[3] = value
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    quantized = int8_from_float(Graph(model), "onnxruntime", images, contract)
    (expected,), (found,) = (run(m, ["down1_relu"], contract, images) for m in (model, quantized))
    np.testing.assert_allclose(found[:, 3], expected[:, 3], rtol=0.01)


def test_batch_normalisation_must_be_folded():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2}, float[1] one = {1}>
        {
            a = Conv (x, w)
            b = BatchNormalization (a, one, one, one, one)
            y = Conv (b, w)
        }
    """)
    with pytest.raises(CalibrationError, match="BatchNormalization follows the convolution a"):
        check_quantizable(Graph(model))


def test_old_opset_is_refused(detector):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    model.opset_import[0].version = 12
    with pytest.raises(CalibrationError, match="opset 12; expected 13 or newer"):
        check_quantizable(Graph(model))


def test_nothing_to_quantize_is_an_error():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}> { y = Conv (x, w) }
    """)
    with pytest.raises(CalibrationError, match=r"none of the 1 convolutions can be quantised: \['final prediction'\]"):
        check_quantizable(Graph(model))


def test_command_writes_model_and_sidecar(model_path, data_dir, target, capsys):
    output = model_path.with_name("student.int8.onnx")
    status = main(
        [str(model_path), "--data", str(data_dir), "-o", str(output), "--target", target, "--num-images", "5"]
    )
    printed = capsys.readouterr()
    assert status == 0
    assert "12 of 14 convolutions in INT8" in printed.out
    assert "2 final prediction" in printed.out
    assert "warning: 5 calibration images" in printed.err

    sidecar = read_sidecar(output)
    details = sidecar["details"]
    assert sidecar["inputs"]["model"]["sha256"] == sha256_of(model_path)
    assert sidecar["inputs"]["annotations"]["file"].endswith("instances_train.json")
    assert load_contract(output) == load_contract(model_path)
    assert (details["target"], details["method"], details["seed"], details["num_images"]) == (target, "max", 0, 5)
    assert len(set(details["image_ids"])) == 5
    assert len(details["images_sha256"]) == 64
    assert details["quantized_convolutions"] == [f"node_{name}" for name in QUANTIZED]
    assert details["float_convolutions"] == {f"node_{name}": "final prediction" for name in PREDICTIONS}
    assert details["op_counts"] == Counter(node.op_type for node in load_onnx(output).graph.node)
    with OrtSession(output, threads=1) as session:
        outputs = session.infer({"image": np.zeros((1, 3, 32, 48), np.float32)})
    assert outputs["boxes"].shape == (1, 24, 4)


def test_command_takes_explicit_paths(model_path, data_dir, capsys):
    """The evaluation images lie in a folder of their own, under the names of calibration images."""
    evaluation = data_dir / "evaluation"
    evaluation.mkdir()
    for index in range(3):
        shutil.copy(data_dir / "images" / f"{index + 8:02}.png", evaluation / f"{index:02}.png")
    annotations = json.loads((data_dir / "annotations" / "instances_val.json").read_text())
    for index, image in enumerate(annotations["images"]):
        image["file_name"] = f"{index:02}.png"
    named = data_dir / "evaluation.json"
    named.write_text(json.dumps(annotations))
    output = model_path.with_name("student.int8.onnx")
    words = [str(model_path), "--annotations", str(data_dir / "annotations" / "instances_train.json")]
    words += ["--images-dir", str(data_dir / "images"), "-o", str(output)]

    assert main(words) == 0
    assert "no overlap was looked for" in capsys.readouterr().err
    words += ["--evaluation-annotations", str(named), "--evaluation-images-dir", str(evaluation)]
    assert main(words) == 0
    assert "no overlap was looked for" not in capsys.readouterr().err
    assert read_sidecar(output)["details"]["evaluation_annotations"] == [str(named)]
    shutil.copy(data_dir / "images" / "03.png", evaluation / "01.png")
    assert main(words) == 2
    assert "03.png is the image 01.png" in capsys.readouterr().err


def set_weight_to_nan(path):
    model = onnx.load(path)
    tensor = initializers(model)["down1.weight"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(np.nan), tensor.name))
    onnx.save(model, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def quantize_by_hand(path):
    model = onnx.load(path)
    model.graph.node[1].op_type = "QuantizeLinear"
    model.graph.node[1].input.extend(["scale", "zero"])
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(1), "scale"), zero])
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", ["integers", "scale", "zero"], [model.graph.node[1].output[0]]
    )
    model.graph.node[1].output[0] = "integers"
    model.graph.node.insert(2, dequantize)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("change", "renew_sidecar", "message"),
    [
        (truncate, False, "is not the file that its sidecar describes"),
        (truncate, True, "truncated"),
        (set_weight_to_nan, False, "is not the file that its sidecar describes"),
        (set_weight_to_nan, True, "NaN or infinity"),
        (quantize_by_hand, True, "quantised already"),
    ],
)
def test_bad_model_is_one_message_and_no_file(model_path, data_dir, contract, capsys, change, renew_sidecar, message):
    change(model_path)
    if renew_sidecar:
        write_sidecar(model_path, {}, contract)
    check_refused(model_path, data_dir, ["--data", str(data_dir)], message, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "DATA", "--images-dir", "DATA/images"], "--images-dir is"),
        (["--annotations", "DATA/annotations/instances_train.json"], "without --images-dir"),
        (
            ["--annotations", "DATA/annotations/instances_train.json", "--images-dir", "DATA/images", "--split", "val"],
            "--split is val",
        ),
        (["--data", "DATA", "--evaluation-images-dir", "DATA"], "without --evaluation-annotations"),
        (["--data", "DATA/nothing"], "no such file or folder"),
        (["--data", "DATA", "--split", "val"], "expected no image in both"),
        (["--data", "DATA", "--num-images", "0"], "--num-images is 0"),
    ],
)
def test_bad_flags_are_one_message_and_no_file(model_path, data_dir, capsys, words, message):
    check_refused(model_path, data_dir, [word.replace("DATA", str(data_dir)) for word in words], message, capsys)


def test_overlap_is_an_error(model_path, data_dir, capsys):
    shutil.copy(data_dir / "images" / "04.png", data_dir / "images" / "10.png")
    check_refused(model_path, data_dir, ["--data", str(data_dir)], "04.png is the image 10.png (id 11)", capsys)


def test_truncated_image_is_an_error(model_path, data_dir, capsys):
    truncate(data_dir / "images" / "02.png")
    check_refused(model_path, data_dir, ["--data", str(data_dir)], "02.png", capsys)


def check_refused(model_path, data_dir, words, message, capsys):
    output = model_path.with_name("student.int8.onnx")
    assert main([str(model_path), *words, "-o", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(model_path.parent.iterdir()) == sorted([data_dir, model_path, sidecar_path(model_path)])


@pytest.mark.parametrize("name", ["student.onnx", "student.int8", "student.onnx/int8.onnx"])
def test_output_that_cannot_be_written_is_an_error(model_path, data_dir, capsys, name):
    before = sha256_of(model_path)
    assert main([str(model_path), "--data", str(data_dir), "-o", str(model_path.parent / name)]) == 2
    assert name in capsys.readouterr().err
    assert sha256_of(model_path) == before


def test_help_needs_no_heavy_package():
    code = (
        "import sys\nfrom calibration.quantize import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(bool({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
