"""Deformable convolutions of standard operators compute what torchvision's do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("mmengine")

from crosskd.models.ops import register_mmcv_ops  # noqa: E402

register_mmcv_ops()
from crosskd.models.families.deform import deform_convolutions_of_standard_operators  # noqa: E402


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 2, 2), (1, 1, 0, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_they_compute_what_torchvision_does(
    kernel: int, stride: int, padding: int, dilation: int, groups: int, masked: bool
) -> None:
    from mmcv.ops import DeformConv2d, ModulatedDeformConv2d

    settings = dict(stride=stride, padding=padding, dilation=dilation)
    maps = torch.randn(2, 8, 7, 10)
    layer_type = ModulatedDeformConv2d if masked else DeformConv2d
    layer = layer_type(8, 6, kernel, groups=groups, deform_groups=2, bias=masked, **settings).eval()
    size = torch.nn.functional.conv2d(maps[:, :1], torch.ones(1, 1, kernel, kernel), **settings).shape[2:]
    offset = 3 * torch.randn(2, 2 * 2 * kernel**2, *size)  # beyond the map, too
    mask = torch.rand(2, 2 * kernel**2, *size) if masked else None
    bias = layer.bias if masked else None
    expected = torchvision.ops.deform_conv2d(maps, offset, layer.weight, bias, mask=mask, **settings)
    inputs = (maps, offset, mask) if masked else (maps, offset)
    with torch.no_grad(), deform_convolutions_of_standard_operators():
        found = layer(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
