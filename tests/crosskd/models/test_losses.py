"""The formulas against float64 numpy, and the corners where a naive version gives NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosskd.models.losses import aligned_to_teacher, distribution_kl, feature_distance, kd_quality_focal_loss


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _standardised(x: np.ndarray) -> np.ndarray:
    mean, std = x.mean((0, 2, 3), keepdims=True), x.std((0, 2, 3), ddof=1, keepdims=True)
    return (x - mean) / (std + 1e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_kd_quality_focal_loss(beta: float) -> None:
    logits, target = np.random.normal(0, 3, (2, 7, 4))
    probability, soft_label = _sigmoid(logits), _sigmoid(target)
    entropy = -soft_label * np.log(probability) - (1 - soft_label) * np.log(1 - probability)
    expected = entropy * np.abs(probability - soft_label) ** beta
    found = kd_quality_focal_loss(torch.tensor(logits), torch.tensor(target), beta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_distribution_kl_sums_over_the_bins_from_the_teacher() -> None:
    logits, target = np.random.normal(0, 2, (2, 5, 3, 17))
    student, teacher = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, target))
    expected = (teacher * np.log(teacher / student)).sum(-1)
    found = distribution_kl(torch.tensor(logits), torch.tensor(target))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_aligned_to_teacher_uses_the_unbiased_deviation_per_channel() -> None:
    student, teacher = np.random.normal(1, 2, (2, 2, 3, 4, 5))
    mean, std = teacher.mean((0, 2, 3), keepdims=True), teacher.std((0, 2, 3), ddof=1, keepdims=True)
    found = aligned_to_teacher(torch.tensor(student), torch.tensor(teacher))
    np.testing.assert_allclose(found.numpy(), _standardised(student) * std + mean, rtol=1e-10)


def test_feature_distance_is_half_the_mean_squared_difference() -> None:
    student, teacher = np.random.normal(1, 2, (2, 2, 3, 4, 5))
    expected = np.square(_standardised(student) - _standardised(teacher)).mean() / 2
    np.testing.assert_allclose(float(feature_distance(*map(torch.tensor, (student, teacher)))), expected, rtol=1e-10)


@pytest.mark.parametrize("loss", [kd_quality_focal_loss, distribution_kl])
def test_the_target_gets_no_gradient(loss: object) -> None:
    student, target = torch.randn(2, 6, 4, requires_grad=True).unbind()
    student, target = student.detach().requires_grad_(), target.detach().requires_grad_()
    loss(student, target).sum().backward()
    assert target.grad is None
    assert student.grad.abs().sum() > 0


def test_a_map_of_one_element_is_the_teachers_mean_without_a_gradient() -> None:
    student, teacher = torch.randn(1, 8, 1, 1, requires_grad=True), torch.randn(1, 8, 1, 1)
    aligned = aligned_to_teacher(student, teacher)
    torch.testing.assert_close(aligned, teacher, rtol=0, atol=0)
    (aligned.square().sum() + feature_distance(student, teacher)).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_constant_channel_has_finite_values_and_gradients(constant: float) -> None:
    student = torch.randn(2, 3, 4, 4)
    student[:, 1] = constant  # a dead ReLU
    student.requires_grad_()
    teacher = torch.randn(2, 3, 4, 4)
    teacher[:, 2] = constant
    (aligned_to_teacher(student, teacher).square().sum() + feature_distance(student, teacher)).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad[:, 0].abs().sum() > 0


def test_the_gradient_of_the_alignment_is_that_of_its_formula() -> None:
    student, teacher = torch.randn(2, 2, 2, 3, 3, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(lambda x: aligned_to_teacher(x, teacher), student.clone().requires_grad_())
