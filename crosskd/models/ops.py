"""
The few compiled operators of mmcv that detectors need, served by torchvision where mmcv has none.

mmdet imports `mmcv.ops`, which imports the extension module `mmcv._ext`: hours of compiling where no wheel fits. Call
`register_mmcv_ops()` before anything imports `mmcv.ops` or `mmdet.models`. A compiled mmcv wins.

The signatures are those by which `mmcv/ops/*.py` (onedl-mmcv 2.3) calls its extension: most write into tensors that
they are given. Gradients are those of the torchvision operator, run again with recording on.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor

from deploy.errors import MissingDependencyError

EXTENSION = "mmcv._ext"
INSTALL = (
    "install a build of mmcv with compiled operators for your versions of torch and CUDA "
    "(https://onedl-mmcv.readthedocs.io), or choose a detector without this operator"
)


def register_mmcv_ops() -> None:
    """
    Makes `import mmcv.ops` work; may be called any number of times.

    Raises:
        MissingDependencyError: mmcv itself is not installed, or its compiled extension is there but does not load.
    """
    try:
        importlib.import_module(EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != EXTENSION:
            raise MissingDependencyError(str(error.name), "training", "pip install 'crosskd[train]'") from error
        sys.modules[EXTENSION] = _Extension()
    except ImportError as error:  # most often built for another torch; to serve it in silence would hide that
        raise MissingDependencyError(f"mmcv, in a build that loads ({error})", "training", INSTALL) from error


class _Extension(ModuleType):
    """Stands for mmcv's extension: has every name; those that torchvision does not serve raise when called."""

    def __init__(self) -> None:
        super().__init__(EXTENSION, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, loader=None)
        self.__dict__.update({operator.__name__: operator for operator in _SERVED})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # asked for by the import machinery and by inspect
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise MissingDependencyError("mmcv with compiled operators", f"the operator {name} of mmcv", INSTALL)

        return missing


def get_compiler_version() -> str:
    return "none: operators served by torchvision " + torchvision.__version__


def get_compiling_cuda_version() -> str:
    return "none"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """
    Indices of the boxes that are kept, int64, the best score first.

    Args:
        boxes: (n, 4), x1 y1 x2 y2. scores: (n,).
        offset: 1 where x2 and y2 are the last pixel inside the box, which then is x2 - x1 + 1 wide; else 0.
    """
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **settings: Any
) -> None:
    output.copy_(_roi_align(input, rois, **settings))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **settings: Any
) -> None:
    # Averages are linear in the input, so that the gradient is the same at any input: grad_input has its shape.
    (gradient,) = _gradients(lambda input: _roi_align(input, rois, **settings), [grad_input], grad_output)
    grad_input.copy_(gradient)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **settings: int
) -> None:
    output.copy_(_deform_conv(input, offset, weight, **settings))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **settings: int,
) -> None:
    gradients = _gradients(lambda x, o: _deform_conv(x, o, weight, **settings), [input, offset], grad_output)
    _copy_all([grad_input, grad_offset], gradients)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **settings: int,
) -> None:
    # Linear in the weight: the gradient is the same at any weight, and grad_weight has its shape.
    (gradient,) = _gradients(lambda w: _deform_conv(input, offset, w, **settings), [grad_weight], grad_output)
    grad_weight.copy_(gradient * scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **settings: Any,
) -> None:
    output.copy_(_modulated_deform_conv(input, weight, bias, offset, mask, **settings))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **settings: Any,
) -> None:
    gradients = _gradients(
        lambda *tensors: _modulated_deform_conv(*tensors, **settings), [input, weight, bias, offset, mask], grad_output
    )
    _copy_all([grad_input, grad_weight, grad_bias, grad_offset, grad_mask], gradients)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_sigmoid_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    (gradient,) = _gradients(
        lambda x: _sigmoid_focal_loss(x, target, weight, gamma, alpha), [input], torch.ones_like(input)
    )
    grad_input.copy_(gradient)


_SERVED = (
    get_compiler_version,
    get_compiling_cuda_version,
    nms,
    roi_align_forward,
    roi_align_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
)


def _roi_align(
    input: Tensor,
    rois: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> Tensor:
    if pool_mode != 1:  # 0: the maximum of the samples, which torchvision does not have
        raise MissingDependencyError("mmcv with compiled operators", "RoIAlign with pool_mode='max'", INSTALL)
    size = (aligned_height, aligned_width)
    return torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned)


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    *,
    dH: int,
    dW: int,
    padH: int,
    padW: int,
    dilationH: int,
    dilationW: int,
    **other: int,
) -> Tensor:
    # torchvision takes the kernel's size and both numbers of groups from the shapes, and has no im2col_step.
    stride, padding, dilation = (dH, dW), (padH, padW), (dilationH, dilationW)
    return _deform_conv2d(input, offset, weight, None, None, stride=stride, padding=padding, dilation=dilation)


def _modulated_deform_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    with_bias: bool,
    **other: int,
) -> Tensor:
    stride, padding, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    return _deform_conv2d(
        input, offset, weight, bias if with_bias else None, mask, stride=stride, padding=padding, dilation=dilation
    )


def _deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, **settings: tuple[int, int]
) -> Tensor:
    """torchvision's operator; in float32 for bf16, of which it has no kernel."""
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if input.dtype == torch.bfloat16:
        tensors = {name: None if tensor is None else tensor.float() for name, tensor in tensors.items()}
    return torchvision.ops.deform_conv2d(**tensors, **settings).to(input.dtype)


def _sigmoid_focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """(n, classes); target (n,) is a class index, or `classes` for background; weight is empty or one per class."""
    positive = target[:, None] == torch.arange(input.size(1), device=input.device)
    loss = torchvision.ops.sigmoid_focal_loss(input, positive.to(input.dtype), alpha, gamma)
    return loss * weight[target][:, None] if weight.numel() else loss


def _gradients(operator: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> Sequence[Tensor]:
    """d(operator(*tensors) . grad_output) / d(tensor) of each; zeros where the operator does not use it."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        output = operator(*leaves)
    return torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
