"""GFL: the assignment that it gives to its loss, and the losses on distributions by their formulas."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from crosskd.models.heads import FAMILIES, LossCall, family_of

GFL = FAMILIES["GFLHead"]


def test_recorded_assignment_has_the_weights_and_the_factor_of_each_level(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    detector = build("gfl_tiny.py")
    inputs, samples = make_batch([3, 2])
    with family_of(detector.bbox_head).recorded_assignment(detector.bbox_head) as calls:
        detector.loss(inputs, samples)
    sizes = [(16 >> level) * (24 >> level) for level in range(4)] + [1 * 2]
    assert [len(call.label_weights) for call in calls] == [2 * size for size in sizes]
    assert len({float(call.avg_factor) for call in calls}) == 1
    assert calls[0].avg_factor >= 2  # at least one anchor for each image


def test_the_losses_of_gfl_are_those_of_its_formulas() -> None:
    """Anchor by anchor in float64 numpy; some anchors are ignored by the assignment."""
    classes, bins, factor, sizes = 3, 17, 5.0, [(4, 6), (2, 3)]
    head = types.SimpleNamespace(cls_out_channels=classes, reg_max=bins - 1)
    cross, teacher = (
        tuple([torch.randn(2, width, *size) for size in sizes] for width in (classes, 4 * bins)) for _ in range(2)
    )
    calls = [
        LossCall(torch.zeros(rows), (torch.rand(rows) > 0.3).float(), factor)
        for rows in (2 * height * width for height, width in sizes)
    ]
    losses_cls, losses_reg, total = np.zeros(2), np.zeros(2), 0.0
    for level, (height, width) in enumerate(sizes):
        for row, (n, y, x) in enumerate(np.ndindex(2, height, width)):
            if not calls[level].label_weights[row]:
                continue
            mine, theirs = (
                [maps[level][n, :, y, x].double().numpy() for maps in outputs] for outputs in (cross, teacher)
            )
            probability, target = (1 / (1 + np.exp(-logits)) for logits in (mine[0], theirs[0]))
            entropy = -target * np.log(probability) - (1 - target) * np.log(1 - probability)
            losses_cls[level] += (entropy * abs(probability - target)).sum() / factor
            for side in range(4):
                p, q = (
                    np.exp(maps) / np.exp(maps).sum()
                    for maps in (one[1].reshape(4, bins)[side] for one in (theirs, mine))
                )
                losses_reg[level] += target.max() * (p * np.log(p / q)).sum()
            total += target.max()
    found = FAMILIES["GFLHead"].loss_by_outputs(cross, teacher, calls, head)
    np.testing.assert_allclose(found["loss_cls_kd"], losses_cls, rtol=1e-5)
    np.testing.assert_allclose(found["loss_reg_kd"], losses_reg / total, rtol=1e-5)


def test_localisation_distillation_against_numpy() -> None:
    """Row by row in float64: KL at temperature 10, times 100, mean over the bins, on positives only."""
    classes, bins = 3, 17
    head = types.SimpleNamespace(cls_out_channels=classes, num_classes=classes, reg_max=bins - 1)
    student, teacher = ([[torch.randn(2, width, 3, 4)] for width in (classes, 4 * bins)] for _ in range(2))
    labels = torch.randint(0, classes + 1, (24,))
    found = GFL.loss_ld(student, teacher, [LossCall(labels, torch.ones(24), 1.0)], head)
    loss, total = 0.0, 0.0
    for row, (n, y, x) in enumerate(np.ndindex(2, 3, 4)):
        if labels[row] == classes:
            continue
        confidence = 1 / (1 + np.exp(-student[0][0][n, :, y, x].double().numpy().max()))
        for side in range(4):
            p, q = (
                np.exp(maps / 10) / np.exp(maps / 10).sum()
                for maps in (
                    one[1][0][n, :, y, x].double().numpy().reshape(4, bins)[side] for one in (teacher, student)
                )
            )
            loss += confidence * (p * np.log(p / q)).mean() * 100 / 4
        total += confidence
    np.testing.assert_allclose(float(found[0]), loss / max(total, 1), rtol=1e-4)
