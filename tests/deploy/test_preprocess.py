from __future__ import annotations

import dataclasses
from typing import Tuple

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.preprocess import preprocess

CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, 64, 64),
    channel_order="rgb",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    pad_value=(114.0, 0.0, 30.0),
    resize="keep_ratio",
    output_names=("boxes", "scores", "labels"),
    class_names=("thing",),
    category_ids=(1,),
    score_threshold=0.05,
    nms_iou_threshold=0.6,
    max_detections=100,
)
HEIGHT_WIDTH = [(64, 64), (63, 65), (127, 33), (200, 301), (500, 375), (20, 11), (1, 1), (1, 40), (40, 1), (3, 190)]


def _image(height: int, width: int) -> np.ndarray:
    return np.random.randint(0, 256, (height, width, 3), np.uint8)


def _contract(height: int, width: int, **values: object) -> ModelContract:
    return dataclasses.replace(CONTRACT, input_shape=(1, 3, height, width), **values)


@pytest.mark.parametrize("height_width", HEIGHT_WIDTH)
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_pixels_are_those_of_mmcv(height_width: Tuple[int, int], channel_order: str) -> None:
    mmcv = pytest.importorskip("mmcv")
    image = _image(*height_width)
    contract = _contract(64, 64, channel_order=channel_order)
    prepared = preprocess(image, contract)

    resized = mmcv.imrescale(image, (64, 64))
    to_rgb = channel_order == "rgb"
    padding = contract.pad_value[::-1] if to_rgb else contract.pad_value  # mmcv pads before it swaps the channels
    padded = mmcv.impad(resized, shape=(64, 64), pad_val=padding)
    expected = mmcv.imnormalize(padded, np.array(contract.mean), np.array(contract.std), to_rgb)

    assert prepared.input.shape == (1, 3, 64, 64)
    assert prepared.input.dtype == np.float32
    assert prepared.input.flags.c_contiguous
    np.testing.assert_allclose(prepared.input[0].transpose(1, 2, 0), expected, rtol=0, atol=1e-5)
    assert prepared.resized_wh_px == resized.shape[1::-1]
    assert prepared.image_wh_px == image.shape[1::-1]


@pytest.mark.parametrize("height_width", [(48, 97), (200, 301), (375, 500), (60, 80)])
def test_an_oblong_input_holds_a_landscape_image_as_mmcv_does(height_width: Tuple[int, int]) -> None:
    mmcv = pytest.importorskip("mmcv")
    resized = mmcv.imrescale(_image(*height_width), (80, 60))
    assert preprocess(_image(*height_width), _contract(60, 80)).resized_wh_px == resized.shape[1::-1]


@pytest.mark.parametrize("height_width", [(300, 100), (100, 300), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("input_height_width", [(60, 80), (80, 60), (32, 640)])
def test_the_image_fits_and_touches_one_side(
    height_width: Tuple[int, int], input_height_width: Tuple[int, int]
) -> None:
    prepared = preprocess(_image(*height_width), _contract(*input_height_width))
    width, height = prepared.resized_wh_px
    assert 1 <= height <= input_height_width[0]
    assert 1 <= width <= input_height_width[1]
    assert height == input_height_width[0] or width == input_height_width[1]
    assert prepared.scale_xy == (width / height_width[1], height / height_width[0])


def test_padding_of_the_mean_is_zero_after_normalisation() -> None:
    prepared = preprocess(_image(10, 40), _contract(64, 64, pad_value=CONTRACT.mean))
    assert prepared.resized_wh_px == (64, 16)
    assert not prepared.input[:, :, 16:].any()


def test_stretch_fills_the_input() -> None:
    prepared = preprocess(_image(10, 40), _contract(32, 64, resize="stretch"))
    assert prepared.resized_wh_px == (64, 32)
    assert prepared.scale_xy == (1.6, 3.2)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = _image(64, 64)
    contract = _contract(64, 64, channel_order="bgr", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(preprocess(image, contract).input[0], image.transpose(2, 0, 1))


def test_the_image_is_left_as_it_was() -> None:
    image = _image(30, 40)
    before = image.copy()
    preprocess(image, CONTRACT)
    np.testing.assert_array_equal(image, before)
