"""Fixtures around the stand-ins: a small detector as ONNX, and tensorrt and CUDA that run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from deploy.contract import ModelContract
from tests.stand_ins.cuda import cuda_modules, cuda_python_stand_in
from tests.stand_ins.detector import CONTRACT, mini_detector, write_detector, write_small_detector
from tests.stand_ins.tensorrt import tensorrt_stand_in, unoptimised_session


@pytest.fixture
def run_detector() -> Callable[..., dict[str, np.ndarray]]:
    """`run_detector(model, feed)` -> output name -> array, by ONNX Runtime on the graph as it is."""
    pytest.importorskip("onnxruntime")

    def run(model: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = unoptimised_session(model.SerializeToString())
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feed), strict=True))

    return run


@pytest.fixture
def detector_model() -> Callable[..., Any]:
    """`detector_model(quantised=None | np.int8 | np.uint8)` -> onnx.ModelProto."""
    pytest.importorskip("onnx")
    return mini_detector


@pytest.fixture
def detector_contract() -> ModelContract:
    return CONTRACT


@pytest.fixture
def detector_file(tmp_path: Path) -> Callable[..., Path]:
    """`detector_file(name, quantised=None)` -> the ONNX file, with its sidecar."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    return lambda name, quantised=None: write_detector(tmp_path / name, quantised)


@pytest.fixture
def small_file(tmp_path: Path) -> Callable[..., Path]:
    """`small_file(outputs, batch=2, input_type="float32")` -> ONNX file, with its sidecar; batch -1 is dynamic."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return lambda outputs, *options, **named: write_small_detector(
        tmp_path / f"{outputs}.onnx", outputs, *options, **named
    )


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch, fake_cuda: Any) -> Callable[[str], Any]:
    """`fake_tensorrt("11.4.0.106")` puts the stand-in of that version in place of the module tensorrt."""

    def install(version: str) -> Any:
        trt: Any = tensorrt_stand_in(version)
        trt.test.cuda = fake_cuda
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return install


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the stand-in in place of `cuda.bindings.runtime`."""
    runtime = cuda_python_stand_in()
    for name, module in cuda_modules(runtime).items():
        monkeypatch.setitem(sys.modules, name, module)
    return runtime
