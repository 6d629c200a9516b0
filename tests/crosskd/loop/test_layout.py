"""channels_last wherever torch can differentiate it; a crash would end the tests, so the steps have a process."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from crosskd.loop.layout import use_channels_last

STEPS = """
import copy, torch
from torch import nn
from crosskd.loop.layout import use_channels_last

def train(channels, stride, is_bf16):
    plain = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 16, 1, stride), nn.Conv2d(16, 8, 3))
    quick = copy.deepcopy(plain)
    use_channels_last(quick, "cpu")
    for _ in range(4):
        images = torch.randn(2, 3, 80, 80)
        for model in (plain, quick):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                outputs = model(images)
            outputs.float().square().mean().backward()
        room = [torch.randn(1000) for _ in range(50)]  # finds a heap that was written to
        for expected, found in zip(plain.parameters(), quick.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=0.05, atol=0.05 if is_bf16 else 1e-5)

torch.manual_seed(0)
for channels, stride in ((1, 2), (4, 3), (8, 2), (15, 2), (16, 2)):
    for is_bf16 in (False, True):
        print(channels, stride, is_bf16, flush=True)
        train(channels, stride, is_bf16)
print("done")
"""


def test_a_network_of_any_width_trains_and_has_the_gradients_of_torchs_own_layout() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.endswith("16 2 True\ndone\n")


def test_only_the_convolutions_that_would_crash_keep_torchs_layout() -> None:
    shapes = {(8, 16, 1, 2): False, (8, 16, 3, 2): True, (8, 16, 1, 1): True, (16, 16, 1, 2): True}
    model = nn.ModuleList(nn.Conv2d(*shape) for shape in shapes)
    use_channels_last(model, "cpu")
    found = [convolution.weight.stride()[1] == 1 and not convolution._forward_pre_hooks for convolution in model]
    assert found == list(shapes.values())
    on_gpu = nn.Conv2d(8, 16, 1, 2)
    use_channels_last(on_gpu, "cuda")
    assert not on_gpu._forward_pre_hooks


def test_the_weights_stay_as_they_are() -> None:
    convolution = nn.Conv2d(8, 16, 1, 2)
    before = convolution.weight.clone()
    use_channels_last(convolution, "cpu")
    assert torch.equal(convolution.weight, before)
