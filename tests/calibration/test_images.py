from __future__ import annotations

import shutil

import pytest

from calibration.images import check_no_overlap, choose_images, sha256_of_images
from deploy.dataset import load_split
from deploy.errors import CalibrationError, ConfigError, DataError


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
