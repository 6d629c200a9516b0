"""The layout of tensors in which convolutions run fastest, but for those that torch cannot differentiate in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAFE_CHANNELS = 16
"""With fewer input channels the backward pass of a strided 1x1 convolution writes beyond its memory on CPUs."""


def use_channels_last(model: nn.Module, device: str) -> None:
    """
    Brings a model to the layout in which its convolutions run fastest, in bf16 most of all.

    On a CPU, strided 1x1 convolutions of fewer than SAFE_CHANNELS input channels stay in torch's own layout: in
    channels_last their backward pass ends in a segmentation fault or a broken heap, in float32 as in bf16, for all but
    the smallest maps (torch 2.11; the shortcuts of a ResNet with base_channels=8 are such convolutions).

    Args:
        device: "cpu" or "cuda", where the model is to be trained.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads leave it out
    if device != "cpu":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_broken_in_channels_last(module):
            module.weight.data = _in_torchs_layout(module.weight.data)
            module.register_forward_pre_hook(lambda _module, args: (_in_torchs_layout(args[0]),))


def _is_broken_in_channels_last(convolution: nn.Conv2d) -> bool:
    return convolution.kernel_size == (1, 1) and max(convolution.stride) > 1 and convolution.in_channels < SAFE_CHANNELS


def _in_torchs_layout(tensor: Tensor) -> Tensor:
    """A copy: with sides or channels of 1, a tensor counts as contiguous in both layouts and would stay as it is."""
    return tensor.clone(memory_format=torch.contiguous_format)
