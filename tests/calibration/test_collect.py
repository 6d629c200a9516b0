from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

import calibration.collect
from calibration.activation_statistics import Collected
from calibration.collect import (
    empty_statistics,
    extend_statistics,
)
from deploy.dataset import load_split
from deploy.errors import CalibrationError
from deploy.files import sha256_of
from deploy.images import read_image
from deploy.runtime.preprocess import preprocess

TENSORS = ["image", "stem_relu", "merged", "prediction_4"]


def collect_statistics(model, tensors, images, contract, minmax_only=()):
    collected = empty_statistics(tensors, minmax_only)
    extend_statistics(collected, model, images, contract)
    return collected.statistics


def same(found, expected):
    """Bit by bit."""
    for name in expected:
        values, others = dataclasses.asdict(found[name]), dataclasses.asdict(expected[name])
        for entry in (values, others):
            entry.update(counts=entry["counts"].tolist(), sums=math.fsum(entry["sums"]))
            entry.update(squares=math.fsum(entry["squares"]))
        assert values == others
    return list(found) == list(expected)


def test_statistics_are_those_of_all_images_in_any_order(detector, contract, data_dir, monkeypatch):
    """Independent values: every activation of every image kept, and reduced at the end."""
    monkeypatch.setattr("calibration.activation_statistics.SAMPLE", 10_000)  # all values
    images = load_split(data_dir, "train").images
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in TENSORS[1:])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [preprocess(read_image(image.path), contract).input for image in images]
    kept = [[x, *session.run(TENSORS[1:], {"image": x})] for x in inputs]
    expected = {name: np.stack(values) for name, values in zip(TENSORS, zip(*kept, strict=True), strict=True)}

    found = collect_statistics(detector, TENSORS, images, contract, minmax_only=["fpn4"])
    assert same(found, collect_statistics(detector, TENSORS, images[::-1], contract, minmax_only=["fpn4"]))
    assert not found["fpn4"].has_histogram
    assert found["fpn4"].minimum < 0 < found["fpn4"].maximum
    for name, values in expected.items():
        statistics = found[name]
        np.testing.assert_allclose(
            [statistics.minimum, statistics.maximum, statistics.mean, statistics.std],
            [values.min(), values.max(), values.mean(dtype=float), values.std(dtype=float)],
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip
        assert statistics.count == values.size
        counts = np.histogram(values[values != 0], statistics.edges)[0]
        assert np.abs(counts - statistics.counts).sum() <= 4  # another session may round otherwise


def test_images_that_are_in_already_are_not_added_again(detector, contract, data_dir):
    images = load_split(data_dir, "train").images
    expected = collect_statistics(detector, TENSORS, images, contract)
    shutil.copy(images[0].path, images[0].path.with_name("copy.png"))
    copy = dataclasses.replace(images[0], path=images[0].path.with_name("copy.png"))
    collected = empty_statistics(TENSORS)
    for part in (images[5:], images[3:6], images[:4], [copy], []):
        extend_statistics(collected, detector, part, contract)
    assert same(collected.statistics, expected)
    assert sorted(collected.image_ids.values()) == [image.image_id for image in images]
    assert collected.image_ids[sha256_of(images[2].path)] == images[2].image_id


def test_tensors_with_a_histogram_come_first():
    """In the file and in the table of calibration.statistics: they are what the methods are compared by."""
    statistics = empty_statistics(["b"], ["a"]).statistics
    assert [(name, one.has_histogram) for name, one in statistics.items()] == [("b", True), ("a", False)]


def test_nothing_runs_when_all_images_are_in(contract, data_dir):
    """The model is not even looked at."""
    images = load_split(data_dir, "train").images
    collected = Collected({}, {sha256_of(image.path): image.image_id for image in images})
    extend_statistics(collected, onnx.ModelProto(), images, contract)
    assert len(collected.image_ids) == len(images)


@pytest.mark.parametrize("limit_bytes", [0, 20_000])
def test_large_activations_are_looked_at_in_groups(detector, contract, data_dir, monkeypatch, limit_bytes):
    images = load_split(data_dir, "train").images[:3]
    tensors = ["fpn4", "stem_relu", "merged", "image", "plain1_relu"]
    expected = collect_statistics(detector, tensors, images, contract)
    monkeypatch.setattr("calibration.collect.LARGEST_GROUP_BYTES", limit_bytes)
    groups = calibration.collect._groups(detector, tensors, contract)
    assert (
        groups
        == {
            0: [["image"], ["stem_relu"], ["plain1_relu"], ["merged"], ["fpn4"]],
            20_000: [["image"], ["stem_relu", "plain1_relu", "merged", "fpn4"]],
        }[limit_bytes]
    )
    found = collect_statistics(detector, tensors, images, contract)
    for name in tensors:
        np.testing.assert_allclose(found[name].maximum, expected[name].maximum, rtol=1e-5)
        assert found[name].count == expected[name].count


@pytest.mark.parametrize("images_per_batch", ["N", "3"])
def test_statistics_do_not_depend_on_the_batch_size(contract, data_dir, images_per_batch):
    def collect(size, number):
        model = parser.parse_model(f"""
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[{size}, 3, 32, 48] image) => (float[{size}, 3, 32, 48] y) {{ x = Relu (image)  y = Abs (x) }}
        """)
        batched = dataclasses.replace(contract, input_shape=(number, 3, 32, 48))
        return collect_statistics(model, ["x"], load_split(data_dir, "train").images, batched)["x"]

    number = -1 if images_per_batch == "N" else int(images_per_batch)
    assert same({"x": collect(images_per_batch, number)}, {"x": collect("1", 1)})


@pytest.mark.parametrize("number", [1, 3, 100])
def test_statistics_do_not_depend_on_how_many_are_counted_together(detector, contract, data_dir, monkeypatch, number):
    images = load_split(data_dir, "train").images
    expected = collect_statistics(detector, TENSORS, images, contract)
    monkeypatch.setattr("calibration.collect.IMAGES_PER_COUNT", number)
    assert same(collect_statistics(detector, TENSORS, images, contract), expected)


@pytest.mark.parametrize(
    ("activation", "looked_at"),
    [
        ("Relu (image)", ["image"]),
        ("LeakyRelu (image)", ["image"]),
        ("LeakyRelu <alpha = 0.3> (image)", ["image"]),
        ("LeakyRelu <alpha = -0.3> (image)", ["image", "x"]),
        ("LeakyRelu <alpha = 2.0> (image)", ["image", "x"]),
        ("Abs (image)", ["image", "x"]),
    ],
)
def test_what_follows_from_an_input_does_not_leave_the_graph(contract, data_dir, monkeypatch, activation, looked_at):
    model = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 3, 32, 48] image) => (float[1, 3, 32, 48] z) {{ x = {activation}  y = Relu (x)  z = Abs (y) }}
    """)
    images = load_split(data_dir, "train").images
    expected = collect_statistics(model, ["x"], images, contract)  # without the input, x itself is looked at
    expected.update(collect_statistics(model, ["y"], images, contract))
    outputs = []
    with_outputs = calibration.collect.with_outputs
    monkeypatch.setattr(
        "calibration.collect.with_outputs", lambda m, names: outputs.extend(names) or with_outputs(m, names)
    )
    found = collect_statistics(model, ["x"], images, contract, minmax_only=["image"])
    assert outputs == looked_at
    assert found["x"].minimum < found["x"].maximum
    assert same({"x": found["x"]}, {"x": expected["x"]})
    chain = collect_statistics(model, ["image", "x", "y"], images, contract)
    assert same({name: chain[name] for name in "xy"}, expected)


def test_pixels_as_input(contract, data_dir):
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1, 32, 48, 3] image) => (float[1, 32, 48, 3] y) { x = Cast <to = 1> (image)  y = Abs (x) }
    """)
    pixels = dataclasses.replace(contract, input_shape=(1, 32, 48, 3), input_type="uint8")
    images = load_split(data_dir, "train").images
    found = collect_statistics(model, ["image", "x"], images, pixels)
    assert same({"x": found["image"]}, {"x": found["x"]})
    assert found["x"].maximum > 200


def test_a_graph_that_cannot_run_is_one_message(detector, contract, data_dir):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    model.graph.node[0].op_type = "Convolution"
    with pytest.raises(CalibrationError, match="ONNX Runtime cannot run the model"):
        collect_statistics(model, ["stem_relu"], load_split(data_dir, "train").images, contract)


def test_non_finite_activations_name_the_tensor_and_the_image(detector, contract, data_dir):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down1.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    images = load_split(data_dir, "train").images
    with pytest.raises(CalibrationError, match=r"tensor down1 holds NaN or infinity for the image .*00\.png"):
        collect_statistics(model, ["stem_relu"], images, contract, minmax_only=["down1"])


@pytest.mark.parametrize(("value", "wanted"), [("nan", ["x", "y"]), ("inf", ["x", "y"]), ("inf", ["y"])])
def test_what_a_relu_makes_of_no_number_names_a_tensor(contract, data_dir, value, wanted):
    """Where its input is looked at in its place, that is the one to name."""
    model = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 3, 32, 48] image) => (float[1, 3, 32, 48] z) <float[1] w = {{{value}}}>
        {{ x = Add (image, w)  y = Relu (x)  z = Abs (y) }}
    """)
    with pytest.raises(
        CalibrationError, match=rf"the tensor {wanted[0]} holds NaN or infinity for the image .*00\.png"
    ):
        collect_statistics(model, wanted, load_split(data_dir, "train").images, contract)
