"""
What a user may ask of an engine, and how a TensorRT from 8.5 to 11.4 gives it.

What a version can do is asked of its bindings, never read from its number. Two ways lead to FP16 and INT8:

- strong typing (TensorRT 10 and 11): the graph says the type of every tensor;
- flags (TensorRT 8, and 10): the graph is FP32, flags allow FP16 and INT8, and TensorRT chooses. The tensors that must
  stay FP32 are told to it as constraints, which it has to obey.

`recipe_for` says which of them is used, and for which form of the graph (`deploy.graphs.precision.GRAPHS`).
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Optional, Tuple

from deploy.contract import ModelContract
from deploy.errors import ConfigError, EngineBuildError

SCALES = ("fp16", "fp32")


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What a user may ask for. The sidecar of an engine has these keys."""

    precision: str = "fp32"
    scales: Optional[str] = None
    """Type of the scales of Q/DQ: 'fp16', 'fp32', or None for 'fp16' where there is strong typing, else 'fp32'."""
    workspace_mib: Optional[int] = None
    """None: all of the device's memory."""
    shapes: Optional[Tuple[int, int, int]] = None
    """Least, most usual and largest batch, for a graph that takes any."""
    opt_level: Optional[int] = None
    """0 to 5; None: TensorRT's own, 3."""
    dla_core: Optional[int] = None
    """None: the GPU."""
    gpu_fallback: bool = False
    """Whether the GPU may run what the DLA cannot."""
    hardware_compatible: bool = False
    """For each GPU from Ampere on, not this one alone."""
    version_compatible: bool = False
    """For later versions of the same major version too."""
    keep_differing: bool = False
    """Whether an engine is kept whose answers are not those of ONNX Runtime."""


class Typing(NamedTuple):
    """What a TensorRT takes precision from."""

    version: str
    strong: bool
    """From the graph."""
    flags: bool
    """From builder flags."""


class Recipe(NamedTuple):
    """How a network is made."""

    graph: str
    """One of `deploy.graphs.precision.GRAPHS`."""
    strongly_typed: bool
    flags: Tuple[str, ...] = ()
    """Names of builder flags that allow types."""
    calibrated: bool = False
    """Whether the ranges for INT8 come from a calibration cache."""

    @property
    def has_half(self) -> bool:
        """Whether FP16 is used."""
        return self.graph in ("fp16", "int8") or "FP16" in self.flags


def typing_of(trt: ModuleType) -> Typing:
    """What this TensorRT takes precision from."""
    return Typing(
        trt.__version__,
        hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"),
        hasattr(trt.BuilderFlag, "FP16"),
    )


def typing_of_version(version: str) -> Typing:
    """The same of a version that is not here: strong typing came with 10.0, the flags went with 11.0."""
    found = re.match(r"\d+", version)
    if not found:
        raise ConfigError(f"{version!r} is no version of TensorRT; expected numbers, as 10.3")
    major = int(found[0])
    return Typing(version, major >= 10, major < 11)


def recipe_for(options: BuildOptions, typing: Typing) -> Recipe:
    """
    How an engine of these options is made.

    INT8 with scales in FP32 is for devices whose compiler refuses FP16 scales (SM 8.7 with TensorRT 10.16.2). Where
    there are flags, they still let the rest be FP16. TensorRT 11 has none: the rest then is FP32, and slower. On the
    DLA INT8 comes from a calibration cache where there are flags: it knows no Q/DQ before TensorRT 11.

    Raises:
        EngineBuildError: this TensorRT, or the DLA, does not have what is asked for.
    """
    if options.precision == "fp32":
        if options.dla_core is not None:
            raise EngineBuildError("--dla-core is given for FP32; a DLA runs FP16 and INT8 only: add --fp16 or --int8")
        return Recipe("fp32", typing.strong)
    if options.scales == "fp16" and not typing.strong:
        raise EngineBuildError(_lacks(typing.version, "--scales fp16", "10.0"))
    on_dla_by_flags = options.dla_core is not None and typing.flags
    if options.precision == "fp16":
        return Recipe("fp16", True) if typing.strong and not on_dla_by_flags else Recipe("fp32", False, ("FP16",))
    flags = ("FP16", "INT8") if typing.flags else ()
    if on_dla_by_flags:
        if options.scales is not None:
            raise EngineBuildError(
                f"--scales {options.scales} is given for a DLA of TensorRT {typing.version}, which takes ranges, no "
                "Q/DQ: leave it out"
            )
        return Recipe("fp32", False, flags, calibrated=True)
    if typing.strong and options.scales != "fp32":
        return Recipe("int8", True)
    return Recipe("int8_fp32_scales" if typing.strong else "int8_tensorrt8", not typing.flags, flags)


def check_options(trt: ModuleType, options: BuildOptions, contract: ModelContract) -> None:
    """
    Raises EngineBuildError if this TensorRT lacks an option, ConfigError if options and model do not go together.
    """
    recipe_for(options, typing_of(trt))
    config = trt.IBuilderConfig
    for asked, here, name, since in (
        (options.opt_level is not None, hasattr(config, "builder_optimization_level"), "--opt-level", "8.6"),
        (options.hardware_compatible, hasattr(config, "hardware_compatibility_level"), "--hardware-compatible", "8.6"),
        (options.version_compatible, hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"), "--version-compatible", "8.6"),
    ):
        if asked and not here:
            raise EngineBuildError(_lacks(trt.__version__, name, since))
    check_shapes(options, contract)


def check_shapes(options: BuildOptions, contract: ModelContract) -> None:
    """Raises ConfigError if --shapes is missing for a model that takes any number of images, or given for another."""
    batch = contract.input_shape[0]
    if batch == -1 and options.shapes is None:
        raise ConfigError(
            "the model takes any number of images, --shapes is missing; expected the least, usual and largest batch: "
            "--shapes 1 4 8"
        )
    if batch != -1 and options.shapes is not None:
        raise ConfigError(
            f"--shapes is given for a model that takes {batch} image(s) at a time: leave it out, or export with "
            "--batch dynamic"
        )


def _lacks(version: str, option: str, since: str) -> str:
    return f"TensorRT {version} does not have {option}; expected TensorRT {since} or newer: leave it out"


def describe_recipe(recipe: Recipe, options: BuildOptions) -> str:
    """The precision and where TensorRT takes it from: "int8, types in the graph"."""
    way = "types in the graph" if recipe.strongly_typed else f"FP32 graph, flags {'+'.join(recipe.flags) or 'none'}"
    if recipe.calibrated:
        way += ", ranges from a calibration cache"
    elif recipe.graph in ("int8_fp32_scales", "int8_tensorrt8"):
        way += ", Q/DQ of FP32 scales" + ("" if recipe.has_half else ", FP32 around the INT8 layers")
    return f"{options.precision}, {way}"


def add_build_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the arguments that `options_from_arguments` reads, and --no-timing-cache, --timing-cache and --verbose."""
    precision = parser.add_mutually_exclusive_group()
    for name, what in (
        ("int8", "INT8 where the graph has Q/DQ, FP16 elsewhere"), ("fp16", "FP16"), ("fp32", "FP32, without TF32")
    ):  # fmt: skip
        note = "; the default" if name == default else ""
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=what + note)
    parser.set_defaults(precision=default)
    parser.add_argument(
        "--scales", choices=SCALES,
        help="type of the scales of Q/DQ (default: fp16, with TensorRT 8 fp32). fp32 is for devices that refuse fp16 "
        "ones, as Orin with TensorRT 10.16: with TensorRT 10 the rest stays FP16, with 11 it becomes FP32 and slower",
    )  # fmt: skip
    parser.add_argument(
        "--workspace-mib", type=int, metavar="N", help="most scratch memory of a layer (default: all of the device's)"
    )
    parser.add_argument(
        "--shapes", type=int, nargs=3, metavar=("MIN", "OPT", "MAX"),
        help="least, usual and largest batch, for a model that takes any number of images",
    )  # fmt: skip
    parser.add_argument(
        "--opt-level",
        type=int,
        choices=range(6),
        metavar="0-5",
        help="time to spend on search (default: TensorRT's, 3)",
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--timing-cache", type=Path, metavar="FILE",
        help="measured kernels, read and updated: makes the next build quick (default: one in the user's cache folder "
        "for each device, power mode, TensorRT and CUDA)",
    )  # fmt: skip
    cache.add_argument("--no-timing-cache", action="store_true", help="measure every kernel anew, keep nothing")
    parser.add_argument("--dla-core", type=int, metavar="N", help="run on this DLA core of a Jetson")
    parser.add_argument(
        "--gpu-fallback", action="store_true", help="let the GPU run what the DLA cannot, which else is an error"
    )
    parser.add_argument(
        "--hardware-compatible", action="store_true", help="for each GPU from Ampere on; slower than for this one alone"
    )
    parser.add_argument(
        "--version-compatible", action="store_true", help="for later TensorRT of the same major version too; slower"
    )
    parser.add_argument(
        "--keep-differing", action="store_true",
        help="keep an engine whose answers differ from ONNX Runtime's by more than its precision explains; its sidecar "
        "and results say so. Measure its AP before it ships",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="print all that TensorRT logs")


def options_from_arguments(arguments: argparse.Namespace) -> BuildOptions:
    """Raises ConfigError if the flags do not go together."""
    if arguments.workspace_mib is not None and arguments.workspace_mib <= 0:
        raise ConfigError(f"--workspace-mib is {arguments.workspace_mib}; expected a positive number of MiB")
    if arguments.scales and arguments.precision != "int8":
        raise ConfigError(f"--scales is given with {arguments.precision}; it serves --int8 alone: leave it out")
    if arguments.gpu_fallback and arguments.dla_core is None:
        raise ConfigError("--gpu-fallback is given without --dla-core; expected both, or neither for the GPU alone")
    if arguments.dla_core is not None and arguments.dla_core < 0:
        raise ConfigError(f"--dla-core is {arguments.dla_core}; expected 0 or more")
    shapes = tuple(arguments.shapes) if arguments.shapes else None
    if shapes and not 0 < shapes[0] <= shapes[1] <= shapes[2]:
        raise ConfigError(f"--shapes is {shapes}; expected positive batches, MIN <= OPT <= MAX")
    same = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(BuildOptions)}
    return BuildOptions(**{**same, "shapes": shapes})
