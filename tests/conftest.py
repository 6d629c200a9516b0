"""What all tests share: seeds, the folder of data beside the checkout, and what is skipped where."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import sys
from pathlib import Path
from typing import List

import numpy as np
import pytest


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for marker, is_there, reason in (
        ("gpu", _has_gpu, "no NVIDIA GPU here"),
        ("tensorrt", _has_tensorrt, "TensorRT is not installed"),
    ):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    """Asks the driver itself, which the edge side has without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _has_tensorrt() -> bool:
    return importlib.util.find_spec("tensorrt") is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: data sets and recorded reference values."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared is not here")
    return folder
