"""
The distillation losses: pure functions on tensors.

Source: "CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection", arXiv 2306.11369, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def kd_quality_focal_loss(logits: Tensor, target_logits: Tensor, beta: float = 1.0) -> Tensor:
    """
    BCE(x, sigmoid(t)) * |sigmoid(x) - sigmoid(t)|^beta, element by element; the target is detached.

    The quality focal loss of GFL (arXiv 2006.04388, equation 2) with the teacher's probability as its soft label.

    Args:
        logits: (n, classes), of the cross predictions.
        target_logits: (n, classes), of the teacher.

    Returns:
        (n, classes), not reduced.
    """
    target = target_logits.detach().sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return entropy * (logits.sigmoid() - target).abs().pow(beta)


def distribution_kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """
    KL(teacher || student) of each distribution, temperature 1; the target is detached.

    Args:
        logits: (..., bins), of the cross predictions.
        target_logits: (..., bins), of the teacher.

    Returns:
        (...): summed over the bins.
    """
    target = functional.log_softmax(target_logits.detach(), dim=-1)
    divergence = functional.kl_div(functional.log_softmax(logits, dim=-1), target, reduction="none", log_target=True)
    return divergence.sum(-1)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """
    PKD: half the mean squared difference of two feature maps, each standardised per channel; a scalar.

    Source: "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", arXiv
    2207.02039, equation 3.

    Args:
        student: (N, C, H, W). teacher: (N, C, H, W), needs no gradient.
    """
    return functional.mse_loss(_standardised(student), _standardised(teacher)) / 2


def aligned_to_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    """
    The student's feature map with the teacher's mean and standard deviation per channel, at least float32.

    `(x - mean) / (std + 1e-6) * teacher_std + teacher_mean`, statistics over batch, height and width, std unbiased.
    Gradients flow through the student's own mean and std. A map of one element has no unbiased std: it counts
    as zero here, which makes the result the teacher's mean, without a gradient.

    Args:
        student: (N, C, H, W). teacher: (N, C, H, W), needs no gradient.
    """
    centred, std, _ = _statistics(student)
    _, teacher_std, teacher_mean = _statistics(teacher)
    return centred * (teacher_std / (std + 1e-6)) + teacher_mean


def _statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    (features - mean, std, mean), the last two (1, C, 1, 1), over batch, height and width.

    In float32: means and deviations in bf16 would be off by up to 0.4 percent, alike for a whole channel.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    centred = features - mean
    variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / max(features[:, 0].numel() - 1, 1)
    # The gradient of a square root is infinite at zero; a channel that never fires gets none.
    return centred, variance.clamp(min=1e-24).sqrt(), mean


def _standardised(features: Tensor) -> Tensor:
    centred, std, _ = _statistics(features)
    return centred / (std + 1e-6)
