from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calibration.collect import check_no_overlap, choose_images, collect_ranges, sha256_of_images
from deploy.dataset import load_split, read_image
from deploy.errors import CalibrationError, ConfigError, DataError
from deploy.preprocess import preprocess


def test_choice_is_seeded_and_independent_of_order(data_dir):
    images = load_split(data_dir, "train").images
    ids = [image.image_id for image in choose_images(images, 4, seed=3)]
    assert len(set(ids)) == 4
    assert ids == [image.image_id for image in choose_images(images[::-1], 4, seed=3)]
    assert any(ids != [image.image_id for image in choose_images(images, 4, seed)] for seed in range(4))


def test_choice_of_more_than_there_are_is_all(data_dir):
    images = load_split(data_dir, "train").images
    assert [image.image_id for image in choose_images(images, 512, seed=0)] == [image.image_id for image in images]


def test_choice_of_none_is_an_error(data_dir):
    with pytest.raises(ConfigError, match="--num-images is 0"):
        choose_images(load_split(data_dir, "train").images, 0, seed=0)


def test_hash_of_images_is_of_their_contents(data_dir):
    images = load_split(data_dir, "train").images
    before = sha256_of_images(images)
    assert sha256_of_images(images[::-1]) == before
    assert sha256_of_images(images[1:]) != before
    shutil.copy(images[0].path, images[1].path)
    assert sha256_of_images(images) != before


def test_ranges_are_those_of_all_images_in_any_order(detector, contract, data_dir):
    """Independent values: every activation of every image kept, and reduced at the end."""
    images = load_split(data_dir, "train").images
    tensors = ["image", "stem_relu", "merged", "prediction_4"]
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors[1:])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [preprocess(read_image(image.path), contract).input for image in images]
    kept = [[x, *session.run(tensors[1:], {"image": x})] for x in inputs]
    expected = {name: np.stack(values) for name, values in zip(tensors, zip(*kept, strict=True), strict=True)}

    ranges = collect_ranges(detector, tensors, images, contract)
    assert ranges == collect_ranges(detector, tensors, images[::-1], contract)
    for name, values in expected.items():
        np.testing.assert_allclose(
            [ranges[name].minimum, ranges[name].maximum], [values.min(), values.max()], rtol=1e-5, atol=1e-6
        )


def test_non_finite_activations_name_the_tensor_and_the_image(detector, contract, data_dir):
    model = onnx.ModelProto()
    model.CopyFrom(detector)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down1.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    images = load_split(data_dir, "train").images
    with pytest.raises(CalibrationError, match=r"tensor down1 holds NaN or infinity for the image .*00\.png"):
        collect_ranges(model, ["stem_relu", "down1"], images, contract)


def test_a_copy_under_another_name_overlaps(data_dir):
    train, val = load_split(data_dir, "train"), load_split(data_dir, "val")
    check_no_overlap(train.images, val)
    shutil.copy(train.images[2].path, val.images[1].path)
    with pytest.raises(CalibrationError, match=r"02\.png is the image 09\.png \(id 10\) of the evaluation set"):
        check_no_overlap(train.images, val)


def test_a_missing_evaluation_image_is_named(data_dir):
    train, val = load_split(data_dir, "train"), load_split(data_dir, "val")
    val.images[0].path.unlink()
    with pytest.raises(DataError, match=r"08\.png.*--evaluation-images-dir"):
        check_no_overlap(train.images, val)
