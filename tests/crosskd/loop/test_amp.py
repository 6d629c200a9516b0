"""Under bf16 the network is rounded, the losses are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.registry import OPTIM_WRAPPERS

from crosskd.loop.amp import Bf16OptimWrapper, keep_losses_in_float32, widen_single_columns


def test_losses_are_computed_in_float32_under_autocast(
    build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    detector = build("gfl_tiny.py").eval()
    head = detector.bbox_head
    seen: list[Any] = []
    original = head.loss_by_feat

    def spy(*args: Any, **kwargs: Any) -> Any:
        maps = [level for levels in args[:2] for level in levels]
        seen.append(({level.dtype for level in maps}, torch.is_autocast_enabled("cpu")))
        return original(*args, **kwargs)

    head.loss_by_feat = spy
    batch = make_batch([3, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        detector.loss(*batch)
    keep_losses_in_float32(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = detector.loss(*batch)
        outputs = detector(batch[0])
    assert seen[0][1]
    assert torch.bfloat16 in seen[0][0]
    assert seen[1] == ({torch.float32}, False)
    # The same losses, of the same rounded outputs, without any autocast.
    head.loss_by_feat = original
    rounded = [[level.float() for level in levels] for levels in outputs]
    samples = batch[1]
    expected = head.loss_by_feat(
        *rounded, [sample.gt_instances for sample in samples], [sample.metainfo for sample in samples]
    )
    for key, values in expected.items():
        torch.testing.assert_close(torch.stack(kept[key]), torch.stack(values))


def test_a_distillation_step_under_bf16(build: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    detector = build()
    keep_losses_in_float32(detector.student.bbox_head)
    optimiser = torch.optim.SGD(detector.student.parameters(), lr=0.01)
    wrapper = OPTIM_WRAPPERS.build(dict(type="Bf16OptimWrapper", optimizer=optimiser))
    assert isinstance(wrapper, Bf16OptimWrapper)
    before = detector.student.bbox_head.gfl_cls.weight.clone()
    batch = make_batch([3, 2])
    with wrapper.optim_context(detector):
        assert torch.is_autocast_enabled("cpu")
        losses = detector.loss(*batch)
    assert not torch.is_autocast_enabled("cpu")
    values = [value for values in losses.values() for value in values]
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in values)
    wrapper.update_params(sum(values))
    assert not torch.equal(before, detector.student.bbox_head.gfl_cls.weight)
    assert before.dtype == torch.float32


@pytest.mark.parametrize(("kernel", "height", "groups"), [(3, 1, 1), (3, 4, 1), (3, 2, 64), (5, 3, 1), (7, 1, 1)])
def test_gradients_of_single_columns_are_right_in_bf16(kernel: int, height: int, groups: int) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(64, 64, kernel, 2, kernel // 2, groups=groups)
    maps = torch.randn(3, 64, height, 1)
    plain = convolution(maps)
    change = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, convolution.weight, change)
    network = torch.nn.Sequential(convolution)
    widen_single_columns(network)
    for _ in range(5):
        for dtype in (torch.float32, torch.bfloat16):  # memory that is then free
            torch.full((expected.numel(),), torch.nan, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(maps)
        assert output.shape == plain.shape
        (found,) = torch.autograd.grad(output, convolution.weight, change.to(output.dtype))
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
