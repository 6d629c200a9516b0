"""The edge side runs on a board that has none of the training packages and, for most of it, no runtime either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("deploy", "calibration", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.stem != "__init__"
]
BLOCKED = (
    "torch", "torchvision", "mmdet", "mmengine", "mmcv", "crosskd",
    "onnx", "onnxruntime", "tensorrt", "cuda", "pycuda", "faster_coco_eval",
)  # fmt: skip
IMPORTS = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = sys.argv[1].split(",")
sys.meta_path.insert(0, Blocked())
for name in sys.argv[2:]:
    importlib.import_module(name)
print(len(sys.argv) - 2)
"""


def _import(*modules: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", IMPORTS, ",".join(BLOCKED), *modules]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)


def test_every_edge_module_imports_without_training_packages_and_runtimes() -> None:
    done = _import(*MODULES)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(MODULES) > 20


def test_the_block_is_one() -> None:
    assert "torch is blocked" in _import("torch").stderr
    assert "onnx is blocked" in _import("deploy.runtime.session", "onnx.numpy_helper").stderr
