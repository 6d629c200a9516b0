"""
INT8: the number format that calibration writes, training repeats and TensorRT's caches hold, and why what is not in it
is in float.

Activations have one scale and zero point for each tensor, in one of two formats: signed symmetric int8, which is all
that TensorRT takes (zero point 0;
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html), or unsigned
asymmetric uint8, which ONNX Runtime's CPU kernels are fast on. Weights are signed and symmetric, with one scale for
each output channel.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Dict, Mapping, Tuple, Union

import numpy as np

LARGEST_INT8 = 127
"""-128 is left out, so that the format is symmetric."""
LARGEST_UINT8 = 255
SMALLEST_SCALE = 2.0**-24
"""The smallest positive FP16 number. What would need a smaller scale is dead: all its values are 0, or next to it."""
SCALE_SUFFIX = "_scale"
"""Ends the name of the constant that is an activation's scale; before it stands the tensor whose range it is of."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The format of one tensor's values: real = scale * (integer - zero_point)."""

    scale: float
    zero_point: Union[np.int8, np.uint8]
    """Its type is that of the integers."""

    @property
    def limits(self) -> Tuple[int, int]:
        """The smallest and the largest integer, to which QuantizeLinear saturates: -128 and 127, or 0 and 255."""
        integers = np.iinfo(self.zero_point.dtype)
        return int(integers.min), int(integers.max)

    @property
    def multiples(self) -> Tuple[int, int]:
        """The smallest and the largest multiple of the scale that a range is spread over: without int8's -128."""
        smallest, largest = self.limits
        return max(smallest, -largest) - int(self.zero_point), largest - int(self.zero_point)

    @property
    def range(self) -> Tuple[float, float]:
        """The smallest and the largest real value of that spread: the range that gives this format again."""
        smallest, largest = self.multiples
        return self.scale * smallest, self.scale * largest


def signed_from_range(minimum: float, maximum: float) -> Quantization:
    """Symmetric int8: the larger of |minimum| and |maximum| becomes 127."""
    largest = max(abs(minimum), abs(maximum))
    return Quantization(max(largest / LARGEST_INT8, SMALLEST_SCALE), np.int8(0))


def unsigned_from_range(minimum: float, maximum: float) -> Quantization:
    """Asymmetric uint8. The range is widened to include 0, which padding and ReLU need to be exact."""
    minimum, maximum = min(minimum, 0.0), max(maximum, 0.0)
    scale = max((maximum - minimum) / LARGEST_UINT8, SMALLEST_SCALE)
    return Quantization(scale, np.uint8(round(-minimum / scale)))


def quantization_from_range(minimum: float, maximum: float, signed: bool) -> Quantization:
    """The format of an activation that is to hold a range, signed and symmetric or unsigned."""
    return signed_from_range(minimum, maximum) if signed else unsigned_from_range(minimum, maximum)


def weight_scales(weight: np.ndarray, axis: int = 0) -> np.ndarray:
    """
    The symmetric int8 scale of each output channel of a weight: (output channels,), float32.

    Args:
        weight: float32, its output channels on `axis`.
    """
    largest = np.abs(weight).max(axis=tuple(other for other in range(weight.ndim) if other != axis))
    return np.maximum(largest / np.float32(LARGEST_INT8), np.float32(SMALLEST_SCALE)).astype(np.float32)


def int8_from_weight(weight: np.ndarray, scales: np.ndarray, axis: int = 0) -> np.ndarray:
    """
    A weight as int8 of the same shape, -127 to 127.

    Args:
        weight: float32, its output channels on `axis`.
        scales: (output channels,), as from `weight_scales`.
    """
    integers = np.rint(weight / per_channel(scales, weight.ndim, axis))
    return np.clip(integers, -LARGEST_INT8, LARGEST_INT8).astype(np.int8)


def rounded_weight(weight: np.ndarray, scales: np.ndarray, axis: int = 0) -> np.ndarray:
    """A weight as `int8_from_weight` rounds it, in float32 again."""
    return (int8_from_weight(weight, scales, axis) * per_channel(scales, weight.ndim, axis)).astype(np.float32)


def per_channel(values: np.ndarray, dimensions: int, axis: int) -> np.ndarray:
    """(channels,) -> the same in so many dimensions, on `axis`, to multiply a tensor channel by channel."""
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


class FloatReason(enum.Enum):
    """
    Why a product (a convolution or matrix product) of an INT8 model is in float: a code, which files hold and programs
    decide by, and a text for people.
    """

    FINAL_PREDICTION = "final_prediction", "final prediction"
    PLACES = "places", "says where to read, for which INT8 is too coarse"
    NOT_CONSTANT = "not_constant", "weight or bias not an FP32 constant"
    TWO_ACTIVATIONS = "two_activations", "multiplies two activations, which integers do no faster"
    FORM = "form", "of a form without integer kernels: data turned, a bias for each row, or a batch of weights"
    FEW_INPUTS = "few_inputs", "reads few values, so that integers win nothing"
    ASKED = "asked", "kept in float as asked"
    AP_BUDGET = "ap_budget", "kept in float for the AP budget"
    NO_PAIR = "no_pair", "its weight has no pair"
    RUNTIME = "runtime", "the runtime computes it in float"
    DEPTHWISE = "depthwise", "depthwise and not before a ReLU, for which TensorRT 8 has no INT8 kernel"

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        self.text = text

    @property
    def is_chosen(self) -> bool:
        """Whether it could be in INT8, and somebody wants it in float."""
        return self in (FloatReason.ASKED, FloatReason.AP_BUDGET)


def float_codes(details: Mapping[str, Any]) -> Dict[str, str]:
    """
    Name of each product in float -> code of a `FloatReason`.

    Args:
        details: of the sidecar of an INT8 file of calibration.quantize. Older files have texts alone: each is looked
            up, and has no code if it is none of ours.
    """
    codes = {reason.text: reason.code for reason in FloatReason}
    texts: Dict[str, str] = details.get("float_convolutions", {})
    known: Dict[str, str] = details.get("float_convolution_codes", {})
    return {name: known.get(name) or codes.get(text, "") for name, text in texts.items()}
