"""Each operator, through mmcv's public functions, against loops written from its definition."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
mmcv = pytest.importorskip("mmcv")

from crosskd.models.ops import register_mmcv_ops  # noqa: E402
from deploy.errors import MissingDependencyError  # noqa: E402


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    register_mmcv_ops()
    return importlib.import_module("mmcv.ops")


def _skip_where_compiled() -> None:
    if hasattr(sys.modules["mmcv._ext"], "__file__"):
        pytest.skip("this mmcv has compiled operators")


# ---- nms


def _nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for candidate in np.argsort(-scores):
        x1, y1, x2, y2 = boxes[candidate]
        for other in kept:
            u1, v1, u2, v2 = boxes[other]
            width = max(0, min(x2, u2) - max(x1, u1) + offset)
            height = max(0, min(y2, v2) - max(y1, v1) + offset)
            areas = (x2 - x1 + offset) * (y2 - y1 + offset) + (u2 - u1 + offset) * (v2 - v1 + offset)
            if width * height / (areas - width * height) > iou_threshold:
                break
        else:
            kept.append(int(candidate))
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("iou_threshold", [0.2, 0.5, 0.7])
def test_nms(ops: ModuleType, offset: int, iou_threshold: float) -> None:
    corner = np.random.uniform(-20, 20, (120, 2))
    boxes = np.concatenate([corner, corner + np.random.uniform(2, 30, (120, 2))], axis=1)
    scores = np.random.permutation(np.linspace(0.1, 0.9, 120))
    dets, kept = ops.nms(torch.tensor(boxes), torch.tensor(scores), iou_threshold, offset=offset)
    expected = _nms(boxes, scores, iou_threshold, offset)
    assert kept.tolist() == expected
    assert 1 < len(expected) < 120
    np.testing.assert_array_equal(dets, np.column_stack([boxes, scores])[expected])


def test_nms_offset_decides(ops: ModuleType) -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]])  # IoU 36 / 81 of points, 50 / 100 of pixels
    before = boxes.clone()
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.47, offset=0)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, 0.47, offset=1)[1].tolist() == [0]
    assert torch.equal(boxes, before)


def test_nms_of_nothing_and_of_few(ops: ModuleType) -> None:
    dets, kept = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.dtype == torch.int64
    boxes = torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]])
    scores = torch.tensor([0.3, 0.9, 0.6])
    assert ops.nms(boxes, scores, 0.5, max_num=2)[1].tolist() == [1, 2]
    assert ops.nms(boxes, scores, 0.5, score_threshold=0.5)[1].tolist() == [1, 2]


def test_nms_takes_scores_of_lower_precision(ops: ModuleType) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.7]).half(), 0.5)[1].tolist() == [1, 2]


# ---- sampling: roi_align and deformable convolution


def _bilinear(plane: np.ndarray, y: float, x: float) -> float:
    """The value of a plane between its pixels, with zeros around it."""
    top, left = int(np.floor(y)), int(np.floor(x))
    value = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                value += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def _roi_align(
    image: np.ndarray, roi: np.ndarray, size: tuple[int, int], scale: float, samples: int, aligned: bool
) -> np.ndarray:
    """Mask R-CNN (arXiv 1703.06870), section 3; border and grid as in Detectron."""
    height, width = image.shape[1:]
    x1, y1, x2, y2 = roi * scale - (0.5 if aligned else 0.0)
    roi_height, roi_width = y2 - y1, x2 - x1
    if not aligned:
        roi_height, roi_width = max(roi_height, 1), max(roi_width, 1)
    output = np.zeros((len(image), *size))
    rows = samples or int(np.ceil(roi_height / size[0]))
    columns = samples or int(np.ceil(roi_width / size[1]))
    for channel, i, j in np.ndindex(output.shape):
        values = []
        for a, b in np.ndindex(rows, columns):
            y = y1 + roi_height / size[0] * (i + (a + 0.5) / rows)
            x = x1 + roi_width / size[1] * (j + (b + 0.5) / columns)
            outside = y < -1 or y > height or x < -1 or x > width
            values.append(
                0 if outside else _bilinear(image[channel], np.clip(y, 0, height - 1), np.clip(x, 0, width - 1))
            )
        output[channel, i, j] = np.mean(values)
    return output


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_roi_align(ops: ModuleType, aligned: bool, samples: int, scale: float) -> None:
    images = np.random.randn(2, 3, 9, 13)
    rois = np.array([[0, 1.2, 0.7, 11.4, 7.9], [1, -3, -2, 5, 30.5], [1, 4, 4, 4.4, 4.3], [0, 0, 0, 13, 9]])
    output = ops.roi_align(torch.tensor(images), torch.tensor(rois), (3, 2), scale, samples, "avg", aligned)
    expected = [_roi_align(images[int(roi[0])], roi[1:], (3, 2), scale, samples, aligned) for roi in rois]
    np.testing.assert_allclose(output, expected, atol=1e-12)


def test_roi_align_gradient(ops: ModuleType) -> None:
    rois = torch.tensor([[0, 1.2, 0.7, 6.4, 4.9], [1, -3, -2, 5, 9.5]], dtype=torch.float64)
    images = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.RoIAlign((2, 3), 0.8, 2)(x, rois), images)


def test_roi_align_of_maxima_is_refused(ops: ModuleType) -> None:
    _skip_where_compiled()
    with pytest.raises(MissingDependencyError, match="pool_mode='max'"):
        ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max", True)


LAYERS = {
    "plain": {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "deform_groups": 1},
    "strided": {"stride": 2, "padding": (0, 2), "dilation": (1, 2), "groups": 1, "deform_groups": 1},
    "grouped": {"stride": (1, 2), "padding": 2, "dilation": 2, "groups": 2, "deform_groups": 4},
}
KERNEL = (3, 2)
CHANNELS_IN, CHANNELS_OUT = 4, 6


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _deform_inputs(layer: dict, images: int = 2, height: int = 5, width: int = 7) -> list[np.ndarray]:
    """input, offset, mask, weight, bias: float64; offsets reach beyond the border."""
    stride, padding, dilation = (_pair(layer[key]) for key in ("stride", "padding", "dilation"))
    rows, columns = (
        (side + 2 * pad - step * (kernel - 1) - 1) // s + 1
        for side, pad, step, kernel, s in zip((height, width), padding, dilation, KERNEL, stride, strict=True)
    )
    taps = layer["deform_groups"] * KERNEL[0] * KERNEL[1]
    return [
        np.random.randn(images, CHANNELS_IN, height, width),
        np.random.uniform(-3, 3, (images, 2 * taps, rows, columns)),
        np.random.uniform(0, 1, (images, taps, rows, columns)),
        np.random.randn(CHANNELS_OUT, CHANNELS_IN // layer["groups"], *KERNEL),
        np.random.randn(CHANNELS_OUT),
    ]


def _deform_conv(
    images: np.ndarray, offset: np.ndarray, mask: np.ndarray, weight: np.ndarray, bias: np.ndarray, layer: dict
) -> np.ndarray:
    """Deformable ConvNets v2 (arXiv 1811.11168), equation 1; channels of `offset`: group, tap, then y and x."""
    stride, padding, dilation = (_pair(layer[key]) for key in ("stride", "padding", "dilation"))
    count, taps = len(images), KERNEL[0] * KERNEL[1]
    outputs_per_group, inputs_per_group = len(weight) // layer["groups"], weight.shape[1]
    inputs_per_deform_group = images.shape[1] // layer["deform_groups"]
    output = np.zeros((count, len(weight), *offset.shape[2:])) + bias[:, None, None]
    for n, out_channel, i, j in np.ndindex(output.shape):
        for k, ky, kx in np.ndindex(inputs_per_group, *KERNEL):
            channel = out_channel // outputs_per_group * inputs_per_group + k
            tap = channel // inputs_per_deform_group * taps + ky * KERNEL[1] + kx
            y = i * stride[0] - padding[0] + ky * dilation[0] + offset[n, 2 * tap, i, j]
            x = j * stride[1] - padding[1] + kx * dilation[1] + offset[n, 2 * tap + 1, i, j]
            sample = _bilinear(images[n, channel], y, x) * mask[n, tap, i, j]
            output[n, out_channel, i, j] += weight[out_channel, k, ky, kx] * sample
    return output


def _layer_arguments(layer: dict) -> list:
    return [layer["stride"], layer["padding"], layer["dilation"], layer["groups"], layer["deform_groups"]]


@pytest.mark.parametrize("name", LAYERS)
def test_deform_conv(ops: ModuleType, name: str) -> None:
    layer = LAYERS[name]
    images, offset, mask, weight, bias = _deform_inputs(layer)
    module = ops.DeformConv2d(CHANNELS_IN, CHANNELS_OUT, KERNEL, **layer).double()
    module.weight.data = torch.tensor(weight)
    output = module(torch.tensor(images), torch.tensor(offset)).detach()
    expected = _deform_conv(images, offset, np.ones_like(mask), weight, np.zeros_like(bias), layer)
    np.testing.assert_allclose(output, expected, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_modulated_deform_conv(ops: ModuleType, name: str, with_bias: bool) -> None:
    layer = LAYERS[name]
    images, offset, mask, weight, bias = _deform_inputs(layer)
    module = ops.ModulatedDeformConv2d(CHANNELS_IN, CHANNELS_OUT, KERNEL, bias=with_bias, **layer).double()
    module.weight.data = torch.tensor(weight)
    if with_bias:
        module.bias.data = torch.tensor(bias)
    output = module(torch.tensor(images), torch.tensor(offset), torch.tensor(mask)).detach()
    expected = _deform_conv(images, offset, mask, weight, bias if with_bias else np.zeros_like(bias), layer)
    np.testing.assert_allclose(output, expected, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_deform_conv_gradients(ops: ModuleType, name: str) -> None:
    layer = LAYERS[name]
    tensors = [torch.tensor(array, requires_grad=True) for array in _deform_inputs(layer, 1, 4, 5)]
    images, offset, _, weight, _ = tensors

    def plain(images: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.deform_conv2d(images, offset, weight, *_layer_arguments(layer))

    def modulated(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.modulated_deform_conv2d(*tensors, *_layer_arguments(layer))

    def without_bias(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.modulated_deform_conv2d(*tensors, None, *_layer_arguments(layer))

    assert torch.autograd.gradcheck(plain, (images, offset, weight), fast_mode=True)
    assert torch.autograd.gradcheck(modulated, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(without_bias, tensors[:4], fast_mode=True)
    assert torch.autograd.gradcheck(lambda w: plain(images.detach(), offset.detach(), w), weight, fast_mode=True)


# ---- focal loss


def _focal_loss(logits: np.ndarray, target: np.ndarray, gamma: float, alpha: float) -> np.ndarray:
    """arXiv 1708.02002, equation 5, for each class on its own; a target beyond the classes is background."""
    loss = np.zeros_like(logits)
    for row, column in np.ndindex(logits.shape):
        p = 1 / (1 + np.exp(-logits[row, column]))
        if target[row] == column:
            loss[row, column] = -alpha * (1 - p) ** gamma * np.log(p)
        else:
            loss[row, column] = -(1 - alpha) * p**gamma * np.log(1 - p)
    return loss


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6)])
def test_sigmoid_focal_loss(ops: ModuleType, gamma: float, alpha: float) -> None:
    logits, target = np.random.randn(7, 3) * 3, np.array([0, 1, 2, 3, 3, 1, 0])
    expected = _focal_loss(logits, target, gamma, alpha)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / 7)):
        loss = ops.SigmoidFocalLoss(gamma, alpha, reduction=reduction)(torch.tensor(logits), torch.tensor(target))
        np.testing.assert_allclose(loss, value, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss_gradient(ops: ModuleType, reduction: str) -> None:
    target = torch.tensor([0, 1, 2, 3])
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, reduction), logits)


def test_sigmoid_focal_loss_weights_by_the_class_of_the_row(ops: ModuleType) -> None:
    logits, target, weight = np.random.randn(4, 3), np.array([0, 1, 2, 1]), np.array([0.5, 2.0, 3.0])
    loss = ops.sigmoid_focal_loss(torch.tensor(logits), torch.tensor(target), 2.0, 0.25, torch.tensor(weight), "none")
    np.testing.assert_allclose(loss, _focal_loss(logits, target, 2.0, 0.25) * weight[target][:, None], rtol=1e-12)


# ---- the extension itself


def test_another_operator_says_its_name(ops: ModuleType) -> None:
    _skip_where_compiled()
    with pytest.raises(MissingDependencyError, match=r"operator softnms .*compiled"):
        ops.soft_nms(torch.rand(3, 4), torch.rand(3))


@pytest.fixture
def no_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is searched for mmcv's extension; what was imported before comes back after the test."""
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.setattr(mmcv, "__path__", [str(tmp_path)])
    yield tmp_path
    sys.modules.pop("mmcv._ext", None)  # monkeypatch restores the earlier one, if there was one


def test_registering_twice_is_once(no_extension: Path) -> None:
    register_mmcv_ops()
    first = sys.modules["mmcv._ext"]
    register_mmcv_ops()
    assert sys.modules["mmcv._ext"] is first


def test_a_compiled_extension_wins(no_extension: Path) -> None:
    (no_extension / "_ext.py").write_text("compiled = True")
    register_mmcv_ops()
    assert sys.modules["mmcv._ext"].compiled is True
    assert not hasattr(sys.modules["mmcv._ext"], "nms")


def test_an_extension_that_does_not_load_is_reported(no_extension: Path) -> None:
    (no_extension / "_ext.py").write_text("raise ImportError('undefined symbol: at_foo')")
    with pytest.raises(MissingDependencyError, match="undefined symbol: at_foo"):
        register_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_a_missing_mmcv_is_named(no_extension: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingDependencyError, match=r"package mmcv.*crosskd\[train\]"):
        register_mmcv_ops()


# ---- whole detectors


@pytest.mark.parametrize(
    "config",
    [
        "gfl/gfl_r50_fpn_1x_coco.py",
        "tood/tood_r50_fpn_1x_coco.py",  # deformable convolution in the head
        "vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py",  # and modulated, in the backbone
    ],
)
def test_detectors_learn_and_predict(ops: ModuleType, config: str) -> None:
    hub = pytest.importorskip("mmengine.hub")
    detection = pytest.importorskip("mmdet.structures")
    from mmdet.registry import MODELS
    from mmengine.logging import MessageHub
    from mmengine.structures import InstanceData

    importlib.import_module("mmdet.models")
    model_config = hub.get_config(f"mmdet::{config}").model
    model_config._scope_ = "mmdet"
    model_config.backbone.init_cfg = None
    model_config.test_cfg.score_thr = 0.0
    model = MODELS.build(model_config)
    sample = detection.DetDataSample(
        metainfo={"img_shape": (64, 96), "ori_shape": (64, 96), "pad_shape": (64, 96), "batch_input_shape": (64, 96)}
    )
    sample.set_metainfo({"scale_factor": (1.0, 1.0)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 4, 60, 50]]), labels=torch.tensor([3]))
    inputs = torch.randn(1, 3, 64, 96)
    MessageHub.get_current_instance().update_info("epoch", 0)  # as a runner does; TOOD's assigner asks

    losses = model.loss(inputs, [sample])
    total = sum(sum(value) if isinstance(value, list) else value for value in losses.values())
    total.backward()
    learnt = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert torch.isfinite(total)
    assert any("bbox_head" in name for name in learnt)
    if model_config.backbone.get("dcn"):
        assert any("conv_offset" in name for name in learnt)

    model.eval()
    with torch.no_grad():
        found = model.predict(inputs, [sample])[0].pred_instances
    assert 0 < len(found) <= model_config.test_cfg.max_per_img
    assert torch.isfinite(found.bboxes).all()
    assert (found.scores.diff() <= 0).all()
