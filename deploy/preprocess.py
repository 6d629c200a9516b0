"""Image -> network input, as the model contract says. numpy and OpenCV only."""

from __future__ import annotations

import dataclasses
from typing import Tuple

import cv2
import numpy as np

from deploy.contract import ModelContract


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network input and what is needed to bring boxes back to the image."""

    input: np.ndarray
    """(1, 3, height, width), float32, normalised, C-contiguous."""
    scale_xy: Tuple[float, float]
    """Input pixels per image pixel, along x and y."""
    resized_wh_px: Tuple[int, int]
    """Width and height of the image inside the input; the rest is padding."""
    image_wh_px: Tuple[int, int]


def preprocess(image: np.ndarray, contract: ModelContract) -> Prepared:
    """
    Resizes, pads and normalises one image.

    Sizes are rounded and pixels interpolated as mmcv does it (`rescale_size`: int(size * scale + 0.5); OpenCV's
    bilinear), so that training and deployment see the same pixels.

    Args:
        image: (height, width, 3), uint8, blue-green-red, as OpenCV reads it.
    """
    height, width = image.shape[:2]
    to_wh = contract.input_width_px, contract.input_height_px
    if contract.resize == "keep_ratio":
        scale = min(to_wh[0] / width, to_wh[1] / height)
        resized_wh = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
    else:
        resized_wh = to_wh
    resized = image
    if resized_wh != (width, height):
        resized = cv2.resize(image, resized_wh, interpolation=cv2.INTER_LINEAR)
    if contract.channel_order == "rgb":
        resized = resized[..., ::-1]
    mean, std, pad_value = (np.array(v, np.float32) for v in (contract.mean, contract.std, contract.pad_value))
    tensor = np.empty((1, 3, to_wh[1], to_wh[0]), np.float32)
    tensor[:] = ((pad_value - mean) / std)[:, None, None]
    tensor[0, :, : resized_wh[1], : resized_wh[0]] = ((resized - mean) / std).transpose(2, 0, 1)
    return Prepared(tensor, (resized_wh[0] / width, resized_wh[1] / height), resized_wh, (width, height))
