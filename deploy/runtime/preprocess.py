"""Image -> network input, as the model contract says. numpy and OpenCV, or numpy alone to the same bits."""

from __future__ import annotations

import dataclasses
from typing import Tuple

import numpy as np

from deploy.contract import ModelContract
from deploy.pixels import channel, resized, rgb_from_bgr


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network input and what is needed to bring boxes back to the image."""

    input: np.ndarray
    """One image as the contract's `input_type` says: (1, 3, height, width) float32 or (1, height, width, 3) uint8.

    C-contiguous.
    """
    scale_xy: Tuple[float, float]
    """Input pixels per image pixel, along x and y."""
    resized_wh_px: Tuple[int, int]
    """Width and height of the image inside the input; the rest is padding."""
    image_wh_px: Tuple[int, int]


def preprocess(image: np.ndarray, contract: ModelContract) -> Prepared:
    """
    Resizes and pads one image, and normalises it unless the graph does.

    Sizes are rounded and pixels interpolated as mmcv does it (`rescale_size`: int(size * scale + 0.5); OpenCV's
    bilinear), so that training and deployment see the same pixels.

    Args:
        image: (height, width, 3), uint8, blue-green-red, as OpenCV reads it.
    """
    height, width = image.shape[:2]
    to_width, to_height = contract.resize_wh_px or (contract.input_width_px, contract.input_height_px)
    if contract.resize == "keep_ratio":
        scale = min(to_width / width, to_height / height)
        resized_wh = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
    else:
        resized_wh = to_width, to_height
    inside = image if resized_wh == (width, height) else resized(image, resized_wh)
    fill = _pixels if contract.input_type == "uint8" else _normalised
    return Prepared(
        fill(inside, contract), (resized_wh[0] / width, resized_wh[1] / height), resized_wh, (width, height)
    )


def _normalised(image: np.ndarray, contract: ModelContract) -> np.ndarray:
    """(1, 3, height, width), float32: (pixel - mean) / std, padded right and below."""
    height, width = image.shape[:2]
    tensor = np.empty((1, 3, contract.input_height_px, contract.input_width_px), np.float32)
    mean, std, pad_value = (np.array(v, np.float32) for v in (contract.mean, contract.std, contract.pad_value))
    for index, plane in enumerate(tensor[0]):  # one at a time, in place: ten times as fast as all three at once
        inside = plane[:height, :width]
        np.subtract(channel(image, 2 - index if contract.channel_order == "rgb" else index), mean[index], out=inside)
        inside /= std[index]
        plane[height:] = plane[:height, width:] = (pad_value[index] - mean[index]) / std[index]
    return tensor


def _pixels(image: np.ndarray, contract: ModelContract) -> np.ndarray:
    """(1, height, width, 3), uint8: the pixels, padded right and below with the nearest integers to pad_value."""
    height, width = image.shape[:2]
    tensor = np.empty((1, contract.input_height_px, contract.input_width_px, 3), np.uint8)
    tensor[0, :height, :width] = rgb_from_bgr(image) if contract.channel_order == "rgb" else image
    padding = [round(value) for value in contract.pad_value]
    tensor[0, height:] = tensor[0, :height, width:] = padding
    return tensor
