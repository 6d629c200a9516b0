from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest

from deploy.contract import write_sidecar
from deploy.runtime.session import OrtSession
from deploy.tensorrt.cuda import load_cuda
from deploy.tensorrt.session import describe_machine

File = Callable[..., Path]


@pytest.fixture
def engine_file(detector_file: File, fake_tensorrt: Callable[[str], Any]) -> Path:
    """An engine of the stand-in, with the sidecar that the builder writes, and the ONNX file beside it."""
    trt = fake_tensorrt("11.4.0.106")
    source = detector_file("mini.onnx")
    engine = source.with_suffix(".engine")
    engine.write_bytes(source.read_bytes())
    contract = OrtSession(source).contract
    write_sidecar(
        engine, {"onnx": source}, contract, {"precision": "fp32", **describe_machine(trt, load_cuda("a test"))}
    )
    return engine
