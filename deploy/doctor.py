"""
Command: what is installed here, which commands will work, and what to install for the others.

    python -m deploy.doctor [--json]

Needs nothing but Python, and never fails. What runs networks is really loaded, ONNX Runtime's providers each with a
network of one node; of the training packages, which take long to load, only the installed version is read.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from deploy.commands import NEEDS, TORCH
from deploy.errors import MissingDependencyError, command
from deploy.jetpack import JetPack, install_cuda_binding, jetpack_here, unknown_jetpack
from deploy.machine import (
    VENV,
    board_model,
    driver_cuda_version,
    is_externally_managed,
    l4t_release,
    output_of,
    power_mode,
)

TO_DO = {
    **dict.fromkeys(TORCH, "pip install 'crosskd[train]'"),
    "opencv": "pip install opencv-python-headless",
    "asyncssh": "pip install 'crosskd[fleet]'",
    "ray": "pip install 'crosskd[ray]'",
    "tensorrt": "pip install tensorrt-cu13",
    "gpu": "an NVIDIA GPU and its driver: see what nvidia-smi says",
}
"""What brings what is missing; of what is not named here, `pip install` of its own name."""
TO_DO_ON_JETSON = {
    "tensorrt": f"sudo apt install nvidia-jetpack, and an environment that sees it: {VENV}",
    "gpu": "the driver, a part of Jetson Linux: flash the board anew; in a container docker run --runtime nvidia",
}
DISTRIBUTIONS = {
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-lite"),
    "mmengine": ("onedl-mmengine", "mmengine"),
}
"""Module -> the packages that may bring it; of the others that of the same name."""
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX file, made with onnx.helper: y = Identity(x), one float, opset 17, so that onnx itself is not needed."""

Found = Tuple[str, str]
"""Version, and what else there is to say."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    version: Optional[str]
    """None where it is not here, or does not work."""
    note: str


@command
def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.doctor", description="Say what is installed, and which commands will work here."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    found = {name: _finding(probe) for name, probe in probes().items()}
    jetpack = jetpack_here()
    missing = {
        label: [name for name in needs if found[name].version is None]
        for label, needs in NEEDS.items()
        if needs and _is_here(label.split()[0])
    }
    if arguments.json:
        commands = {label: {"works": not names, "to_do": to_do(names)} for label, names in missing.items()}
        document = {
            "found": {name: dataclasses.asdict(one) for name, one in found.items()},
            "jetpack": None if jetpack is None else jetpack._asdict(),
            "commands": commands,
        }
        print(json.dumps(document, indent=1))
        return 0
    print("Found here:")
    for name, one in found.items():
        print(f"  {name:<18} {', '.join(filter(None, (one.version or '-', one.note)))}")
    known = unknown_jetpack() if jetpack is None else words_of_jetpack(jetpack)
    if known is not None:
        print(f"\n{known}")
    print("\nCommands, each python -m ...:")
    for label, names in missing.items():
        verdict = f"no, {', '.join(names)} missing. Do: {'; '.join(to_do(names))}" if names else "works"
        print(f"  {label:<34} {verdict}")
    return 0


def probes() -> Dict[str, Callable[[], Found]]:
    """Name -> a function that looks for it, and raises where it is not here or does not work."""
    installed = {
        name: _installed_probe(name) for name in (*TORCH, "onnxslim", "faster-coco-eval", "jinja2", "asyncssh", "ray")
    }
    return {
        "python": lambda: (platform.python_version(), platform.platform()),
        "jetson": _jetson,
        "driver": _driver,
        "cuda binding": _cuda_binding,
        "gpu": _gpu,
        "tensorrt": _tensorrt,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "onnx": lambda: _imported("onnx"),
        "numpy": lambda: _imported("numpy"),
        "opencv": lambda: _imported("cv2"),
        **installed,
    }


def to_do(names: List[str]) -> List[str]:
    """What to do for what is missing, each once."""
    advice = {
        **TO_DO,
        **(TO_DO_ON_JETSON if l4t_release() else {}),
        "cuda binding": install_cuda_binding(driver_cuda_version()),
    }
    if "cuda binding" in names:  # without which nothing is known of the GPU
        names = [name for name in names if name != "gpu"]
    steps = list(dict.fromkeys(advice.get(name, f"pip install {name}") for name in names))
    return [VENV, *steps] if is_externally_managed() and any("pip install" in step for step in steps) else steps


def words_of_jetpack(jetpack: JetPack) -> str:
    """What is known of it."""
    lines = {
        "install for CUDA": " or ".join(jetpack.install) or "-",
        "should work": jetpack.works,
        "known not to": jetpack.known_not,
        "sources": ", ".join(jetpack.sources),
    }
    head = f"JetPack {jetpack.name}: Python {jetpack.python}, CUDA {jetpack.cuda}, TensorRT {jetpack.tensorrt}"
    return "\n".join([head, *(f"  {name:<18} {text}" for name, text in lines.items())])


def _finding(probe: Callable[[], Found]) -> Finding:
    try:
        version, note = probe()
    except Exception as error:  # a broken installation raises anything, and is what this command is run for
        return Finding(None, " ".join(str(error).split()) or type(error).__name__)
    return Finding(version, note)


def _is_here(module: str) -> bool:
    """Whether this copy of the project has the command: a board may have a part of it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _imported(module: str) -> Found:
    return str(importlib.import_module(module).__version__), ""


def _installed_probe(name: str) -> Callable[[], Found]:
    def probe() -> Found:
        version = _installed_version(DISTRIBUTIONS.get(name, (name,)))
        if version is None:
            raise ImportError("not installed")
        return version, ""

    return probe


def _installed_version(packages: Tuple[str, ...]) -> Optional[str]:
    """Of the first of the packages that is installed; nothing is imported."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _jetson() -> Found:
    release = l4t_release()
    if release is None:
        raise RuntimeError("not a Jetson")
    package = output_of("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack")
    jetpack = f"JetPack {package}" if package else "JetPack not installed as a package"
    return f"L4T {release}", ", ".join(filter(None, (jetpack, board_model(), power_mode())))


def _driver() -> Found:
    """The NVIDIA driver, asked itself, without any package."""
    status, version = ctypes.CDLL("libcuda.so.1").cuInit(0), driver_cuda_version()
    if status or version is None:
        raise RuntimeError(f"libcuda.so.1 is here, and answers with error {status} (CUresult in CUDA's cuda.h)")
    return f"CUDA {version[0]}.{version[1]}", _kernel_driver()


def _kernel_driver() -> str:
    """Of a PC; a Jetson's is part of L4T."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return ""


def _cuda_binding() -> Found:
    from deploy.tensorrt.cuda import DriverTooOldError, load_cuda

    try:
        load_cuda("running engines").close()
    except (MissingDependencyError, DriverTooOldError):
        raise
    except Exception:  # the binding is here; what is wrong with the GPU has a line of its own
        pass
    return _installed_version(("cuda-python", "cuda-bindings", "pycuda")) or "of unknown version", ""


def _gpu() -> Found:
    from deploy.tensorrt.cuda import load_cuda

    cuda = load_cuda("running engines")
    try:
        found = cuda.describe()
    finally:
        cuda.close()
    return (
        found["device"],
        f"compute capability {found['compute_capability']}, CUDA {found['cuda_runtime']}, driver for CUDA "
        f"{found['cuda_driver']}",
    )


def _tensorrt() -> Found:
    from deploy.tensorrt.bindings import load_tensorrt

    trt: Any = load_tensorrt("building and running engines")
    if not hasattr(trt.IExecutionContext, "execute_async_v3"):
        raise RuntimeError(f"TensorRT {trt.__version__} is here; expected 8.5 or newer")
    return trt.__version__, ""


def _onnxruntime() -> Found:
    """Of each provider that this build has, whether it runs a network: its libraries may be missing."""
    onnxruntime = importlib.import_module("onnxruntime")
    onnxruntime.set_default_logger_severity(4)  # what does not load is said below
    words = []
    for provider in onnxruntime.get_available_providers():
        try:
            loads = provider in onnxruntime.InferenceSession(IDENTITY, providers=[provider]).get_providers()
        except Exception:
            loads = False
        words.append(f"{provider} {'loads' if loads else 'does NOT load'}")
    return onnxruntime.__version__, "; ".join(words)


def _openvino() -> Found:
    openvino: Any = importlib.import_module("openvino")
    return openvino.__version__.partition("-")[0], f"devices {', '.join(openvino.Core().available_devices)}"


if __name__ == "__main__":
    sys.exit(main())
