from __future__ import annotations

import collections
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from calibration.images import (
    check_no_overlap,
    choose_covering,
    choose_images,
    classes_and_sizes,
    sha256_of_images,
)
from deploy.dataset import CocoImage, load_split
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


def image_of(image_id, *boxes):
    """An image of 640 x 480 pixels with (label, side in pixels) as its boxes."""
    sides = np.array([side for _, side in boxes], np.float32).reshape(-1, 1)
    corners = np.concatenate([np.zeros((len(boxes), 2), np.float32), np.repeat(sides, 2, axis=1)], axis=1)
    labels = np.array([label for label, _ in boxes], np.int64)
    flags = np.zeros(len(boxes), bool)
    return CocoImage(
        image_id, Path(f"{image_id}.jpg"), 640, 480, corners, labels, flags, flags, corners.astype(float),
        (sides[:, 0] ** 2).astype(float),
    )  # fmt: skip


def test_covering_shows_every_class_in_every_size_before_one_of_them_again():
    common = [image_of(number, (0, 100), (0, 110)) for number in range(1, 51)]
    rare = [image_of(60, (1, 100)), image_of(61, (0, 20)), image_of(62, (1, 300), (2, 40)), image_of(63)]
    for seed in range(5):
        chosen = choose_covering([*common, *rare], 4, seed)
        ids = [image.image_id for image in chosen]
        assert ids == sorted(ids)
        assert {60, 61, 62} < set(ids)
        assert 63 not in ids  # it shows nothing
        assert len({image.image_id for image in choose_covering([*common, *rare], 10, seed)}) == 10


def test_covering_depends_on_the_seed_among_equals_and_not_on_the_order():
    images = [image_of(number, (number % 2, 100)) for number in range(1, 41)]
    first = choose_covering(images, 6, 0)
    assert choose_covering(images[::-1], 6, 0) == first
    assert choose_covering(images, 6, 1) != first
    assert [image.image_id % 2 for image in first].count(1) == 3
    assert choose_covering(images, 40, 0) == choose_covering(images, 99, 1) == images


@pytest.mark.parametrize("seed", range(5))
def test_covering_takes_what_adds_most_each_time(seed):
    chooser = random.Random(seed)
    kinds = [(label, side) for label in range(4) for side in (20, 100, 300)]
    images = [image_of(number, *chooser.sample(kinds, chooser.randint(0, 5))) for number in range(1, 31)]
    times, left = collections.Counter(), images
    for number in range(1, 12):
        chosen = choose_covering(images, number, seed)
        added = next(image for image in chosen if image in left)

        def gain(image, times=times):
            return sum(1 / (1 + times[kind]) for kind in classes_and_sizes(image))

        assert gain(added) == pytest.approx(max(map(gain, left)))
        times.update(classes_and_sizes(added))
        left = [image for image in left if image is not added]


def test_covering_needs_at_least_one_image():
    with pytest.raises(ConfigError, match="--num-images is 0; expected at least 1"):
        choose_covering([image_of(1, (0, 10))], 0, 0)
