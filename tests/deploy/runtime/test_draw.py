"""Boxes and names in a picture, whatever its size."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.runtime.draw import colour_of, draw
from deploy.runtime.postprocess import Detections


def _one_box(box: list[float], label: int = 0) -> Detections:
    return Detections(np.float32([box]), np.float32([0.5]), np.array([label]))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 400), (40, 30), (600, 800), (3000, 4000)])
def test_boxes_are_drawn_at_their_edges_whatever_the_size(height: int, width: int) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    box = [0.0, 0.0, float(width), float(height)]
    drawn = draw(image, _one_box(box), ["thing"])
    assert drawn.shape == image.shape
    assert (image == 90).all()
    for row, column in ((height - 1, width - 1), (height // 2, width - 1), (height - 1, 0)):
        assert (drawn[row, column] == colour_of(0)).all() or height < 20


def test_a_name_above_the_picture_or_beside_it_is_moved_into_it() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    for box in ([100, 100, 150, 150], [280, 100, 300, 150], [100, 0, 150, 40]):
        drawn = draw(image, _one_box(box, label=1), ["", "bar"])
        ground = (drawn == colour_of(1)).all(axis=-1).sum()
        assert ground > 400  # the plate of the name, whole: lines alone are fewer
        assert (drawn != image).any(axis=-1).sum() > ground  # with letters on it


def test_the_best_is_drawn_last() -> None:
    boxes = np.float32([[20, 40, 80, 90], [20, 40, 80, 90]])
    both = Detections(boxes, np.float32([0.9, 0.4]), np.array([1, 0]))
    drawn = draw(np.zeros((100, 100, 3), np.uint8), both, ["under", "over"])
    assert (drawn[89, 50] == colour_of(1)).all()


def test_neighbouring_classes_have_colours_apart() -> None:
    colours = np.array([colour_of(label) for label in range(80)], int)
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 80
    assert len({tuple(colour) for colour in colours.tolist()}) == 80


def test_no_detections_leave_the_picture_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    drawn = draw(image, none, ["thing"])
    np.testing.assert_array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)
