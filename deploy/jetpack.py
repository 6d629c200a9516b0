"""
What each JetPack brings, what to install on it, and what is known of it: `deploy.doctor` prints the row of its board,
docs/ship-to-a-jetson.md has them all. Needs nothing but Python.

Read from public sources, each named; none of it was tried on a board.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

from deploy.machine import L4tRelease, l4t_release

LAST = 99


class JetPack(NamedTuple):
    """A JetPack, or several that do not differ here."""

    name: str
    l4t: Tuple[Tuple[int, int], Tuple[int, int]]
    """The first release of Jetson Linux, major and minor, and the last; with LAST all that follow of its major."""
    python: str
    cuda: str
    tensorrt: str
    install: Tuple[str, ...]
    """What brings a binding for CUDA, the surest first; nothing where the project cannot run."""
    works: str
    known_not: str
    sources: Tuple[str, ...]


ARCHIVE = "https://developer.nvidia.com/embedded/jetpack-archive"
ISSUES = "https://github.com/%s/issues/%d"
JETPACKS = (
    JetPack(
        "4", ((32, 0), (32, LAST)), "3.6", "10.2", "8.2 or older", (),
        "nothing: Python and TensorRT are too old",
        "Python 3.8 and TensorRT 8.5 are the oldest that serve",
        (ARCHIVE,),
    ),
    JetPack(
        "5.0", ((34, 0), (35, 1)), "3.8", "11.4", "8.4", (),
        "nothing: TensorRT is too old",
        "TensorRT before 8.5; JetPack 5.1 runs on the same boards",
        (ARCHIVE,),
    ),
    JetPack(
        "5.1", ((35, 2), (35, LAST)), "3.8", "11.4", "8.5.2",
        ("pip install 'cuda-python==11.8.1'", "pip install 'cuda-python==12.3.0'", "pip install pycuda"),
        "FP32, FP16, INT8; a DLA by the calibration cache",
        "none of the cuda-python pins is proven on this driver; INT8 depthwise convolutions without a ReLU behind them "
        "find no implementation; LayerNormalization and GroupNormalization are not read",
        (ARCHIVE, ISSUES % ("NVIDIA/TensorRT", 3385)),
    ),
    JetPack(
        "6.0", ((36, 0), (36, 3)), "3.10", "12.2", "8.6.2",
        ("pip install 'cuda-python==12.6.*'", "pip install pycuda"),
        "FP32, FP16, INT8; a DLA by the calibration cache",
        "cuda-python 13, which pip takes without a pin, needs a driver of 580: cudaErrorInsufficientDriver; INT8 "
        "depthwise convolutions without a ReLU behind them find no implementation",
        (ARCHIVE, ISSUES % ("NVlabs/FoundationStereo", 209), ISSUES % ("NVIDIA/TensorRT", 4060)),
    ),
    JetPack(
        "6.1, 6.2", ((36, 4), (36, LAST)), "3.10", "12.6", "10.3",
        ("pip install 'cuda-python==12.6.*'", "pip install pycuda"),
        "FP32, FP16, INT8 in a strongly typed graph; a DLA by the calibration cache",
        "cuda-python 13, which pip takes without a pin, needs a driver of 580 (here it is 540): "
        "cudaErrorInsufficientDriver; a CUDA runtime of 12.8 was refused, too; onnxruntime-gpu has no wheel for this "
        "Python; TensorRT 11 does not support this JetPack",
        (ARCHIVE, ISSUES % ("NVlabs/FoundationStereo", 209), ISSUES % ("anduril/jetpack-nixos", 328)),
    ),
    JetPack(
        "7.0, 7.1", ((38, 0), (38, LAST)), "3.12", "13.0", "10.13",
        ("pip install cuda-python", "pip install pycuda"),
        "Thor: FP32, FP16, INT8 in a strongly typed graph",
        "Orin (from 7.2 on); pip outside an environment (PEP 668); FP8 and FP4, asked for by flags, become FP32",
        (ISSUES % ("NVIDIA/TensorRT", 4590), "https://peps.python.org/pep-0668/"),
    ),
    JetPack(
        "7.2", ((39, 0), (39, LAST)), "3.12", "13.2", "10.16",
        ("pip install cuda-python", "pip install pycuda"),
        "Orin and Thor: FP32, FP16, INT8 in a strongly typed graph",
        "INT8 with FP16 scales on Orin (build with --scales fp32); pip outside an environment (PEP 668); a DLA before "
        "TensorRT 11.4.1",
        (ISSUES % ("NVIDIA/TensorRT", 4832), "https://peps.python.org/pep-0668/"),
    ),
)  # fmt: skip


def jetpack_of(release: L4tRelease) -> Optional[JetPack]:
    """The JetPack of a release of Jetson Linux, None if it is not known here."""
    found = (jetpack for jetpack in JETPACKS if jetpack.l4t[0] <= release[:2] <= jetpack.l4t[1])
    return next(found, None)


def jetpack_here() -> Optional[JetPack]:
    """Of this board; None where it is not known, and on all that is no Jetson."""
    release = l4t_release()
    return None if release is None else jetpack_of(release)


def unknown_jetpack() -> Optional[str]:
    """What is to be said of a Jetson whose release is not known here; None elsewhere."""
    release = l4t_release()
    if release is None or jetpack_of(release) is not None:
        return None
    known = "; ".join(row.name for row in JETPACKS)
    return (
        f"Jetson Linux {release} belongs to no JetPack that is known here ({known}). It is tried as any machine, and "
        "an engine is compared with ONNX Runtime before it is kept"
    )


def install_cuda_binding(driver_cuda: Optional[Tuple[int, int]] = None) -> str:
    """
    What to do for a binding for CUDA that works here.

    Args:
        driver_cuda: the CUDA that the driver is for, (12, 6); None if it is not known.
    """
    jetpack = jetpack_here()
    if jetpack is not None and jetpack.install:
        first, *others = jetpack.install
        return f"{first} (or {' or '.join(line.replace('pip install ', '') for line in others)})"
    if driver_cuda is not None and driver_cuda < (13, 0):
        return f"pip install '{cuda_python_for(driver_cuda)}' (or pycuda)"
    return "pip install cuda-python (or pycuda)"


def cuda_python_for(driver_cuda: Tuple[int, int]) -> str:
    """
    The requirement of a cuda-python that a driver for this CUDA runs.

    From 12.8 on it brings NVIDIA's own runtime, which wants a driver as new as itself; before, it calls the driver.
    There was no 12.7; of 11 the last is the one for Python 3.8 and newer, and runs on every driver for 11.
    """
    major, minor = driver_cuda
    if major < 12:
        return "cuda-python==11.8.*"
    return f"cuda-python==12.{6 if minor == 7 else minor}.*" if major == 12 else f"cuda-python=={major}.*"


def gpu_check() -> str:
    """The tool that shows the GPU here: not every JetPack has nvidia-smi."""
    return "nvidia-smi" if l4t_release() is None else "sudo tegrastats"


def table() -> str:
    """All rows, in Markdown."""
    head = (
        "JetPack",
        "Jetson Linux",
        "Python",
        "CUDA",
        "TensorRT",
        "for CUDA",
        "should work",
        "known not to",
        "source",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in JETPACKS:
        install = " or ".join(f"`{line}`" for line in row.install) or "-"
        sources = ", ".join(f"[{_label(address)}]({address})" for address in row.sources)
        cells = (row.name, _releases(row), row.python, row.cuda, row.tensorrt, install, row.works, row.known_not)
        lines.append(f"| {' | '.join((*cells, sources))} |")
    return "\n".join(lines) + "\n"


def _releases(row: JetPack) -> str:
    (major, minor), (_, last) = row.l4t
    if last != LAST:
        return f"{major}.{minor} to {row.l4t[1][0]}.{last}"
    return f"{major}" if minor == 0 else f"{major}.{minor} and later"


def _label(address: str) -> str:
    """Of an issue's address its project and number, else the site."""
    parts = address.split("/")
    return f"{'/'.join(parts[3:5])} #{parts[-1]}" if "/issues/" in address else parts[2]
