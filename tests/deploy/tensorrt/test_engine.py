from __future__ import annotations

from pathlib import Path

import pytest

from deploy.tensorrt.engine import default_timing_cache


def test_the_timing_cache_is_of_one_device_tensorrt_and_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = {
        "device": "NVIDIA A10/24 GB",
        "tensorrt": "10.3.0",
        "cuda_runtime": "12.6",
        "cuda_driver": "12.8",
        "multiprocessors": "72",
        "board": None,
        "power_mode": None,
    }
    path = default_timing_cache(machine)
    assert path.parent == tmp_path / "crosskd" / "timing"
    assert path.name == "NVIDIA-A10-24-GB-72sm-tensorrt10.3.0-cuda12.6.cache"
    for key in ("device", "tensorrt", "cuda_runtime", "multiprocessors", "board", "power_mode"):
        assert default_timing_cache({**machine, key: "other"}) != path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_timing_cache(machine).parent == tmp_path / "home" / ".cache" / "crosskd" / "timing"
