"""
Deformable convolutions of ONNX's own operators, for export: mmcv's would need a plugin in every runtime.

A deformable convolution reads its input at places that lie between the pixels: GridSample (opset 16; TensorRT from 8.5)
reads them, an ordinary 1 x 1 convolution weighs them. Source: "Deformable ConvNets v2", arXiv 1811.11168, equation 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.utils import _pair

Pair = int | tuple[int, int]


@contextlib.contextmanager
def deform_convolutions_of_standard_operators() -> Iterator[None]:
    """Inside the block mmcv's layers DeformConv2d and ModulatedDeformConv2d are computed by this module."""
    with (
        mock.patch("mmcv.ops.deform_conv.deform_conv2d", _deform_conv2d),
        mock.patch("mmcv.ops.modulated_deform_conv.modulated_deform_conv2d", _modulated_deform_conv2d),
    ):
        yield


def sampled_points(
    maps: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    kernel: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> Tensor:
    """
    (N, C * K, H', W'): what the K points of a kernel read at each place, bilinearly, zero outside of the map.

    Args:
        maps: (N, C, H, W).
        offset: (N, G * K * 2, H', W'), y before x, by how many pixels each point is moved; G groups of channels.
        mask: (N, G * K, H', W'), a factor for each point.
    """
    channels, height, width = (int(size) for size in maps.shape[1:])
    out_height, out_width = (int(size) for size in offset.shape[2:])
    (kernel_h, kernel_w), (step_y, step_x) = _pair(kernel), _pair(stride)
    (pad_y, pad_x), (dilation_y, dilation_x) = _pair(padding), _pair(dilation)
    points = kernel_h * kernel_w
    groups = int(offset.shape[1]) // (2 * points)
    rows, columns = torch.arange(float(out_height)) * step_y - pad_y, torch.arange(float(out_width)) * step_x - pad_x
    kernel_rows = (torch.arange(float(kernel_h)) * dilation_y).repeat_interleave(kernel_w)  # (K,)
    kernel_columns = (torch.arange(float(kernel_w)) * dilation_x).repeat(kernel_h)
    y = kernel_rows[:, None, None] + rows[:, None]  # (K, H', 1)
    x = kernel_columns[:, None, None] + columns  # (K, 1, W')
    offset = offset.reshape(-1, points, 2, out_height, out_width)  # (N * G, K, 2, H', W')
    # GridSample counts from -1, the left edge of the first pixel, to 1, the right edge of the last.
    grid = torch.stack(
        [(2 * (offset[:, :, 1] + x) + 1) / width - 1, (2 * (offset[:, :, 0] + y) + 1) / height - 1], dim=-1
    )
    sampled = functional.grid_sample(
        maps.reshape(-1, channels // groups, height, width),
        grid.reshape(-1, points * out_height, out_width, 2),
        mode="bilinear", padding_mode="zeros", align_corners=False,
    )  # fmt: skip  # (N * G, C / G, K * H', W')
    if mask is not None:
        sampled = sampled * mask.reshape(-1, 1, points * out_height, out_width)
    return sampled.reshape(-1, channels * points, out_height, out_width)


def _deform_conv2d(
    maps: Tensor, offset: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair,
    groups: int, deform_groups: int, bias: bool = False, im2col_step: int = 32,
) -> Tensor:  # fmt: skip
    """With the arguments of mmcv's function; the number of deformable groups follows from the offset's shape."""
    sampled = sampled_points(maps, offset, None, _kernel_of(weight), stride, padding, dilation)
    return _weighed(sampled, weight, None, groups)


def _modulated_deform_conv2d(
    maps: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, deform_groups: int,
) -> Tensor:  # fmt: skip
    sampled = sampled_points(maps, offset, mask, _kernel_of(weight), stride, padding, dilation)
    return _weighed(sampled, weight, bias, groups)


def _kernel_of(weight: Tensor) -> tuple[int, int]:
    return int(weight.shape[2]), int(weight.shape[3])


def _weighed(sampled: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return functional.conv2d(sampled, weight.reshape(len(weight), -1, 1, 1), bias, groups=groups)
