"""A student with a Swin backbone in INT8: exported, quantised, audited, and trained with the rounding in the loop."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from calibration.audit import FLOAT, INT8, audit, operators_of_onnxruntime
from calibration.placement import PLACEMENTS
from deploy.graphs.graph import load_onnx
from deploy.int8_format import FloatReason
from tests.crosskd.int8.test_fake_quantization import SWIN, Quantized

SWIN_T = {"model.backbone": dict(_delete_=True, type="SwinTransformer", embed_dims=96, depths=[2, 2, 6, 2],
                                 num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.0, convert_weights=False),
          "model.neck.in_channels": [96, 192, 384, 768]}  # fmt: skip


def _scores(path: Path, feed: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.sort(np.asarray(session.run(["scores"], feed)[0]))


@pytest.mark.parametrize("target", sorted(PLACEMENTS))
@pytest.mark.parametrize(
    ("overrides", "blocks", "share"),
    [(SWIN, 5, 0.65), pytest.param(SWIN_T, 12, 0.85, marks=pytest.mark.slow)],
    ids=["tiny", "Swin-T"],
)
def test_fully_connected_layers_are_int8_and_nothing_is_lost(
    overrides: dict[str, Any], blocks: int, share: float, target: str, configs: Path, tmp_path: Path
) -> None:
    quantized = Quantized(overrides, configs, tmp_path, target)
    model = load_onnx(quantized.int8_path)
    run_as = operators_of_onnxruntime(model) if target == "onnxruntime" else None
    result = audit(model, {"target": target}, run_as, "ONNX Runtime")
    assert result.faults == []
    counts = Counter((entry.operator, entry.state) for entry in result.products)
    assert counts["Gemm", INT8] == 4 * blocks  # queries, keys and values in one; their end; two behind
    assert counts["MatMul", INT8] == 3  # to the next of four stages
    assert counts["MatMul", FLOAT] == 2 * blocks  # attention itself
    assert {entry.code for entry in result.products if (entry.operator, entry.state) == ("MatMul", FLOAT)} == {
        FloatReason.TWO_ACTIVATIONS.code
    }
    assert counts["Gemm", FLOAT] == 0
    assert result.int8_share > share
    expected = _scores(quantized.float_path, quantized.feed)
    assert np.abs(_scores(quantized.int8_path, quantized.feed) - expected).max() < 0.03
    if run_as:
        operators = Counter(run_as.values())
        assert (operators["QGemm"], operators["MatMulIntegerToFloat"]) == (4 * blocks, 3)


def test_layers_and_ranges_learn_with_the_rounding(configs: Path, tmp_path: Path) -> None:
    quantized = Quantized(SWIN, configs, tmp_path, "onnxruntime")
    fake, detector = quantized.fake(), quantized.detector.train()
    before = fake.ranges()
    weights = [module.weight for module in detector.backbone.modules() if isinstance(module, torch.nn.Linear)]
    optimizer = torch.optim.SGD([fake.offsets], lr=1.0)
    with fake.applied():
        outputs = detector.bbox_head(detector.extract_feat(quantized.images))
    sum(level.square().mean() for kind in outputs for level in kind).backward()
    assert fake.offsets.grad.count_nonzero() == len(fake.sources)
    assert len(weights) == 4 * 5 + 3
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in weights)
    optimizer.step()
    moved = [source for source, after in fake.ranges().items() if after != before[source]]
    assert len(moved) > len(fake.sources) / 2  # of the others, by less than a float32 can tell
