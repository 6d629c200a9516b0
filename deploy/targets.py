"""
What a model runs on: the one list of runtimes that flags, sidecars, result files, the doctor and the report go by.

A further runtime takes its entry here, a folder of its own under `deploy/` and in it its session.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Optional, Tuple

from deploy.errors import ConfigError, ContractError
from deploy.files import AnyPath


@dataclasses.dataclass(frozen=True)
class Role:
    """What a model of one precision on one runtime is in the report."""

    name: str
    title: str
    precision: str
    """'fp32', 'fp16' or 'int8'."""
    made_from: str
    """The role of what it was made from, or of the same file on another runtime: what it is compared with."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime."""

    name: str
    """As flags and files write it."""
    title: str
    suffix: str
    """Of the files that it runs. Several runtimes may take one suffix: the first of TARGETS does unless told."""
    session: str
    """Its `deploy.runtime.session.Session`: module and class, imported when a file is opened."""
    session_options: Tuple[str, ...]
    """What the session takes beside the file: 'threads', 'provider'."""
    on_gpu: bool
    """Whether it needs a GPU, and runs the network there."""
    needs: Tuple[str, ...]
    """What has to be installed, by the names of `deploy.doctor`."""
    signed: Optional[bool]
    """Whether activations are quantised to int8 around 0 (True) or to uint8 (False) in a graph that is meant for it.

    None: `calibration` makes no graphs for it, it runs those of the others.
    """
    integer_constants: Optional[bool]
    """Whether such a graph holds weights and biases as integers (True), or in float with pairs for the weights (False).

    None: as for `signed`.
    """
    roles: Tuple[Role, ...]

    @property
    def model_arguments(self) -> str:
        """How a command is told to run a model on it: "MODEL.onnx --runtime openvino"."""
        told = "" if target_from_path(f"MODEL{self.suffix}") is self else f" --runtime {self.name}"
        return f"MODEL{self.suffix}{told}"


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="onnxruntime",
            title="ONNX Runtime",
            suffix=".onnx",
            session="deploy.runtime.session.OrtSession",
            session_options=("threads", "provider"),
            on_gpu=False,
            needs=("onnxruntime",),
            signed=False,
            integer_constants=True,
            roles=(
                Role("onnx-fp32", "ONNX FP32", "fp32", "student"),
                Role("onnx-int8", "ONNX INT8", "int8", "onnx-fp32"),
            ),
        ),
        Target(
            name="openvino",
            title="OpenVINO",
            suffix=".onnx",
            session="deploy.openvino.session.OpenVinoSession",
            session_options=("threads",),
            on_gpu=False,
            needs=("openvino",),
            signed=None,
            integer_constants=None,
            roles=(
                Role("openvino-fp32", "OpenVINO FP32", "fp32", "onnx-fp32"),
                Role("openvino-int8", "OpenVINO INT8", "int8", "onnx-int8"),
            ),
        ),
        Target(
            name="tensorrt",
            title="TensorRT",
            suffix=".engine",
            session="deploy.tensorrt.session.TrtSession",
            session_options=(),
            on_gpu=True,
            needs=("tensorrt", "cuda binding", "gpu"),
            signed=True,
            integer_constants=False,
            roles=(
                Role("engine-fp16", "TensorRT FP16", "fp16", "onnx-fp32"),
                Role("engine-int8", "TensorRT INT8", "int8", "onnx-int8"),
            ),
        ),
    )
}
QUANTISED_FOR = tuple(name for name, target in TARGETS.items() if target.signed is not None)
"""Those that an INT8 graph can be made for."""
SUFFIXES = tuple(dict.fromkeys(target.suffix for target in TARGETS.values()))


def target_from_path(path: AnyPath, runtime: Optional[str] = None) -> Target:
    """
    What runs the model file at `path`.

    Args:
        runtime: a name of TARGETS; None: the first that takes files of this suffix.

    Raises:
        ConfigError: there is no such runtime, or it does not take such files.
        ContractError: no runtime takes files of this suffix.
    """
    suffix = Path(path).suffix
    takers = [target for target in TARGETS.values() if target.suffix == suffix]
    if not takers:
        raise ContractError(f"cannot run {path}: its suffix is {suffix!r}; expected {' or '.join(SUFFIXES)}")
    if runtime is None:
        return takers[0]
    if runtime not in TARGETS:
        raise ConfigError(f"the runtime is {runtime!r}; expected one of {', '.join(TARGETS)}")
    if TARGETS[runtime] not in takers:
        raise ConfigError(
            f"{TARGETS[runtime].title} does not run {path}; expected a file that ends in {TARGETS[runtime].suffix}, or "
            f"the runtime {' or '.join(target.name for target in takers)}"
        )
    return TARGETS[runtime]


def add_runtime_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --runtime, for `target_from_path`."""
    parser.add_argument(
        "--runtime",
        choices=list(TARGETS),
        help="what runs the model (default: "
        + ", ".join(f"{target_from_path(f'x{suffix}').name} for {suffix}" for suffix in SUFFIXES)
        + ")",
    )


def version_numbers(version: str) -> Tuple[int, ...]:
    """(10, 13, 3, 9) for "10.13.3.9.post1"."""
    return tuple(int(part) for part in itertools.takewhile(str.isdigit, version.split(".")))
