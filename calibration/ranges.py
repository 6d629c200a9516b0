"""
Ranges -> scales and zero points.

The range method is `max`: from the smallest to the largest value that was seen. Two number formats: signed symmetric
int8, which is all that TensorRT takes (zero point 0; https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html),
and unsigned asymmetric uint8, which ONNX Runtime's CPU kernels are fast on.
"""

from __future__ import annotations

import dataclasses
from typing import Union

import numpy as np

LARGEST_INT8 = 127
"""-128 is left out, so that the format is symmetric."""
SMALLEST_SCALE = 2.0**-24
"""The smallest positive FP16 number. What would need a smaller scale is dead: all its values are 0, or next to it."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """real = scale * (integer - zero_point), for a whole tensor."""

    scale: float
    zero_point: Union[np.int8, np.uint8]
    """Its type is that of the integers."""


def signed_from_range(minimum: float, maximum: float) -> Quantization:
    """Symmetric int8: the larger of |minimum| and |maximum| becomes 127."""
    largest = max(abs(minimum), abs(maximum))
    return Quantization(max(largest / LARGEST_INT8, SMALLEST_SCALE), np.int8(0))


def unsigned_from_range(minimum: float, maximum: float) -> Quantization:
    """Asymmetric uint8. The range is widened to include 0, which padding and ReLU need to be exact."""
    minimum, maximum = min(minimum, 0.0), max(maximum, 0.0)
    scale = max((maximum - minimum) / 255, SMALLEST_SCALE)
    return Quantization(scale, np.uint8(round(-minimum / scale)))


def weight_scales(weight: np.ndarray) -> np.ndarray:
    """
    (output channels,), float32: the symmetric int8 scale of each output channel.

    Args:
        weight: (output channels, ...), float32.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
    return np.maximum(largest / np.float32(LARGEST_INT8), np.float32(SMALLEST_SCALE)).astype(np.float32)


def int8_from_weight(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """
    `weight` as int8 of the same shape, -127 to 127.

    Args:
        scales: (output channels,), as from `weight_scales`.
    """
    per_channel = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight / per_channel), -LARGEST_INT8, LARGEST_INT8).astype(np.int8)
