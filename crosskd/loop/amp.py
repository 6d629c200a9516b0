"""bf16 training on any device: mmengine's own AMP wrapper refuses to work on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from crosskd.models.families.tood import keep_boxes_in_float32
from crosskd.models.heads import DenseHead


def computes_in_bf16(device: str) -> bool:
    """Whether "cpu" or "cuda" has instructions for bf16; without them it is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Forward passes under bf16 autocast. bf16 has float32's exponent, so no loss scaling is needed."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield


def _float32(values: Any) -> Any:
    return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v, values)


def keep_losses_in_float32(head: DenseHead) -> None:
    """
    Makes `head.loss_by_feat` run in float32 on float32 inputs, also inside autocast.

    Autocast would run the integral over GFL's distance bins, a matrix product, in bf16: with 8 bits of mantissa the
    boxes that the loss compares are off by whole pixels.
    """
    original = head.loss_by_feat

    @functools.wraps(original)
    def loss_by_feat(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(get_device(), enabled=False):
            return original(*_float32(args), **_float32(kwargs))

    head.loss_by_feat = loss_by_feat
    keep_boxes_in_float32(head)


def widen_single_columns(detector: nn.Module) -> None:
    """
    Gives convolutions of stride 2 a column of zeros behind the only one of an input, in bf16 on a CPU.

    The output is the same. Without it oneDNN (3.10, in torch 2.11) leaves parts of the weights' gradient, those that
    only padding meets, as they were in memory: the coarsest levels of small images spoilt a training.
    """
    for module in detector.modules():
        if isinstance(module, nn.Conv2d) and module.stride[1] == 2 and module.kernel_size[1] in (3, 5, 7):
            module.register_forward_pre_hook(_widened)  # of the module, so that copies have it, too


def _widened(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    maps = inputs[0]
    if maps.shape[-1] > 1 or maps.device.type != "cpu" or module.padding_mode != "zeros":
        return None
    return (functional.pad(maps, (0, 1)), *inputs[1:])
