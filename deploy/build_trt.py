"""
ONNX -> TensorRT engine, for this machine's device, checked against ONNX Runtime before it is kept.

    python -m deploy.build_trt student.onnx --fp16 -o student.fp16.engine
    python -m deploy.build_trt student.int8.onnx --int8 -o student.int8.engine
    python -m deploy.build_trt student.onnx --int8 --data DIR -o student.int8.engine
    python -m deploy.build_trt student.int8.onnx --int8 --target 10.3       (only whether that version takes the graph)

Needs TensorRT 8.5 to 11.4, onnx and one of cuda-python and pycuda, on the machine that will run the engine; a check
with --target needs onnx alone. The one ONNX file gives each TensorRT what it wants
(`deploy.tensorrt.builder.recipe_for`): a graph whose types say everything to TensorRT 10 and 11, an FP32 graph and
flags to TensorRT 8. Nothing falls back to another precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from deploy.commands import run_command
from deploy.contract import ModelContract, load_contract, read_sidecar
from deploy.errors import ConfigError, EngineBuildError, MissingDependencyError, command
from deploy.files import check_writable
from deploy.runtime.golden import TOLERANCES, check_agreement, words_of_agreement
from deploy.runtime.session import OrtSession, Session
from deploy.tensorrt.builder import (
    SCALES,
    BuildOptions,
    Recipe,
    build_plan,
    check_options,
    check_precision,
    coverage,
    default_timing_cache,
    recipe_for,
    typing_of,
    typing_of_version,
    write_engine,
)
from deploy.tensorrt.session import PlanSession, describe_machine, load_cuda, load_tensorrt

if TYPE_CHECKING:
    import onnx

    from deploy.graphs.precision import TypedGraph


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parse(argv)
    _check_arguments(arguments)
    options = options_from_arguments(arguments)
    if arguments.target:
        return _check_target(arguments, options)
    machine = open_machine(arguments, options, arguments.output)
    check_options(machine.trt, options, load_contract(arguments.model))
    source = read_source(arguments.model, options.precision, arguments.data)
    graph = _checked_graph(source, machine.recipe, machine.trt.__version__)
    reference = _onnx_runtime(source.path)
    try:
        make_engine(
            machine,
            options,
            arguments.output,
            Graph(graph.model.SerializeToString(), graph.float_tensors, graph.kept, source.amax),
            source.contract,
            {"onnx": source.path},
            _count_parameters(source.model),
            reference,
        )
    finally:
        if reference is not None:
            reference.close()
    return 0


def _onnx_runtime(source: Path) -> Optional[Session]:
    try:
        return OrtSession(source)
    except MissingDependencyError as error:
        print(f"the engine is not compared with ONNX Runtime: {error}", file=sys.stderr)
        return None


class Machine(NamedTuple):
    """What builds."""

    trt: ModuleType
    here: Dict[str, str]
    """Of `deploy.tensorrt.session.describe_machine`."""
    recipe: Recipe
    timing_cache: Optional[Path]
    verbose: bool


class Graph(NamedTuple):
    """What is built from: a graph in the form of a recipe."""

    model: bytes
    float_tensors: Sequence[str]
    kept: Mapping[str, Sequence[str]]
    """As `deploy.graphs.precision.TypedGraph`."""
    amax: Mapping[str, float]
    """Of activations that have Q/DQ."""


def open_machine(arguments: argparse.Namespace, options: BuildOptions, output: Path) -> Machine:
    """
    The TensorRT and the device here; both and the disk are asked for what is wanted before anything is done.

    Args:
        arguments: of `add_build_arguments`.

    Raises:
        MissingDependencyError, PipelineError: there is no TensorRT, no CUDA or no device.
        EngineBuildError: as `recipe_for`.
    """
    needed_for = f"building {output}"
    trt = load_tensorrt(needed_for)
    cuda = load_cuda(needed_for)
    try:
        here = describe_machine(trt, cuda)
    finally:
        cuda.close()
    timing_cache = None if arguments.no_timing_cache else arguments.timing_cache or default_timing_cache(here)
    for path in filter(None, (output, timing_cache)):
        check_writable(path)
    return Machine(trt, here, recipe_for(options, typing_of(trt)), timing_cache, arguments.verbose)


def make_engine(
    machine: Machine,
    options: BuildOptions,
    output: Path,
    graph: Graph,
    contract: ModelContract,
    inputs: Mapping[str, Path],
    parameters: int,
    reference: Optional[Session],
) -> None:
    """
    Builds an engine, checks it, writes it with its sidecar and says what it is.

    Args:
        inputs: name -> file, for the sidecar.
        reference: what the engine is compared with; None where there is nothing.

    Raises:
        EngineBuildError: it cannot be built, or is not right: nothing is kept.
    """
    trt, here, recipe, timing_cache, verbose = machine
    print(
        f"building {output}: {_words(recipe, options)}, TensorRT {here['tensorrt']}, {here['device']}", file=sys.stderr
    )
    start = time.monotonic()
    plan = build_plan(trt, graph.model, options, graph.float_tensors, graph.amax, timing_cache, verbose)
    build_s = round(time.monotonic() - start, 1)
    found = coverage(trt, plan, options)
    check_precision(found, options.precision)
    golden = check_plan(trt, plan, reference, options) if reference is not None else None
    details = {
        **dataclasses.asdict(options),
        **here,
        **recipe._asdict(),
        "timing_cache": None if timing_cache is None else str(timing_cache),
        "kept_in_fp32": graph.kept if recipe.has_half else {},
        "coverage": found,
        "parameters": parameters,
        "build_s": build_s,
        "golden": golden,
    }
    write_engine(output, plan, inputs, contract, details)
    checked = words_of_agreement(golden) if golden else "NOT compared with ONNX Runtime"
    print(f"{output}: {len(plan) / 2**20:.1f} MiB, built in {build_s:.0f} s, {checked}; {_layers(found)}")


def _parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.build_trt", description="Build a TensorRT engine for this machine's device."
    )
    parser.add_argument("model", type=Path, help="ONNX file with its sidecar")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="data folder to calibrate on, for --int8 on a float graph, which is quantised first",
    )
    parser.add_argument("-o", "--output", type=Path, help="engine file to write, *.engine")
    parser.add_argument(
        "--target", metavar="VERSION",
        help="write nothing: only check that this TensorRT (as 10.3) takes the graph; needs no TensorRT",
    )  # fmt: skip
    add_build_arguments(parser, "fp32")
    return parser.parse_args(argv)


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
        "for each device, TensorRT and CUDA)",
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
    parser.add_argument("--verbose", action="store_true", help="print all that TensorRT logs")


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if the flags do not go together."""
    output = arguments.output
    if arguments.target and output:
        raise ConfigError(f"--output is {output}, --target {arguments.target} writes none: leave one of them out")
    if arguments.target and arguments.data:
        raise ConfigError("--data is given with --target, which writes nothing: run calibration.quantize first")
    if not arguments.target and (output is None or output.suffix != ".engine"):
        raise ConfigError(f"--output is {output}; expected a name that ends in .engine")
    if arguments.data and arguments.precision != "int8":
        raise ConfigError(f"--data is given with {arguments.precision}; it serves --int8 alone: leave it out")


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


class Source(NamedTuple):
    """The ONNX file that an engine is built from."""

    path: Path
    model: onnx.ModelProto
    contract: ModelContract
    details: Dict[str, Any]
    """Of its sidecar."""

    @property
    def amax(self) -> Dict[str, float]:
        """Activation that has Q/DQ -> the largest absolute value that it holds."""
        from deploy.graphs.calibration_cache import amax_from_quantised

        return amax_from_quantised(self.model)


def read_source(path: Path, precision: str, data: Optional[Path]) -> Source:
    """
    `path`, or for "int8" on a float graph what `calibration.quantize` makes of it; checked.

    Raises:
        ContractError: the file does not match its sidecar or cannot be read.
        ExportError: the graph is not valid, or sizes other than the batch are not fixed.
        ConfigError: `data` is given for a graph that is quantised already.
        EngineBuildError: the graph and the precision do not go together.
    """
    from deploy.graphs.precision import is_quantised

    source = _read(path)
    quantised = is_quantised(source.model)
    if precision != "int8" and quantised:
        raise EngineBuildError(
            f"{path} has Q/DQ nodes; {precision} needs the float graph it was made from, or choose --int8"
        )
    if quantised and data:
        raise ConfigError(f"{path} is quantised already, --data {data} would not be used: leave it out")
    return _read(quantised_file(path, data)) if precision == "int8" and not quantised else source


def _read(path: Path) -> Source:
    from deploy.graphs.graph import check_graph, check_static, load_onnx

    contract = load_contract(path)
    model = load_onnx(path)
    check_graph(model)
    check_static(model, contract.input_shape[0] == -1, contract.outputs == "nms")
    return Source(path, model, contract, read_sidecar(path)["details"])


def quantised_file(path: Path, data: Optional[Path]) -> Path:
    """
    The INT8 ONNX file that the command `calibration.quantize` makes of the float file `path`, beside it.

    Raises:
        EngineBuildError: there is no data, the file is there already, or the command fails.
    """
    if data is None:
        raise EngineBuildError(
            f"{path} has no Q/DQ nodes, so --int8 has to quantise it first: add --data DIR with calibration images, "
            "or give a file of calibration.quantize --target tensorrt"
        )
    quantised = path.with_suffix(".int8.onnx")
    if quantised.exists():
        raise EngineBuildError(
            f"{quantised} is there already: build from it, without --data, or remove it to calibrate again"
        )
    words = [path, "--data", data, "-o", quantised, "--target", "tensorrt"]
    run_command("calibration.quantize", *words, error_type=EngineBuildError, tell=sys.stderr)
    return quantised


def _checked_graph(source: Source, recipe: Recipe, version: str) -> TypedGraph:
    """The graph in the form of the recipe, of which TensorRT `version` takes every node; prints what stays FP32."""
    from deploy.graphs.operators import check_operators
    from deploy.graphs.precision import typed_graph

    graph = typed_graph(source.model, recipe.graph, source.details)
    check_operators(graph.model, version)
    if recipe.has_half:
        for reason, names in graph.kept.items():
            print(f"FP32, not FP16: {_some(names)} ({reason})", file=sys.stderr)
    return graph


def _some(names: List[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _check_target(arguments: argparse.Namespace, options: BuildOptions) -> int:
    recipe = recipe_for(options, typing_of_version(arguments.target))
    source = read_source(arguments.model, options.precision, None)
    graph = _checked_graph(source, recipe, arguments.target)
    print(
        f"{source.path}: TensorRT {arguments.target} takes its {len(graph.model.graph.node)} nodes as "
        f"{_words(recipe, options)}, by its operator table; nothing was built"
    )
    return 0


def _words(recipe: Recipe, options: BuildOptions) -> str:
    """The precision and where TensorRT takes it from: "int8, types in the graph"."""
    way = "types in the graph" if recipe.strongly_typed else f"FP32 graph, flags {'+'.join(recipe.flags) or 'none'}"
    if recipe.calibrated:
        way += ", ranges from a calibration cache"
    elif recipe.graph == "int8_fp32_scales":
        way += ", Q/DQ of FP32 scales" + ("" if recipe.has_half else ", FP32 around the INT8 layers")
    return f"{options.precision}, {way}"


def _layers(found: Dict[str, Any]) -> str:
    if found["layers"] is None:
        return f"precision of its layers not known: {found['reason']}"
    counts = [f"{entry['count']} {precision}" for precision, entry in found["layers"].items() if entry["count"]]
    return f"layers: {', '.join(counts)}"


def _count_parameters(model: onnx.ModelProto) -> int:
    from deploy.graphs.graph import count_parameters

    return count_parameters(model)


def check_plan(trt: ModuleType, plan: bytes, reference: Session, options: BuildOptions) -> Dict[str, float]:
    """
    How well the engine agrees with the reference, as `check_agreement` says.

    Raises:
        EngineBuildError: the engine's detections are not those of the reference.
    """
    cuda = load_cuda("checking the engine")
    with PlanSession(plan, reference.contract, trt, cuda, options.dla_core, options.version_compatible) as engine:
        return check_agreement(reference, engine, TOLERANCES[options.precision])


if __name__ == "__main__":
    sys.exit(main())
