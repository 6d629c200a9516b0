"""
ONNX -> TensorRT engine, for this machine's device, checked against ONNX Runtime before it is kept.

    python -m deploy.build_trt student.onnx --fp16 -o student.fp16.engine
    python -m deploy.build_trt student.int8.onnx --int8 -o student.int8.engine
    python -m deploy.build_trt student.onnx --int8 --data DIR -o student.int8.engine
    python -m deploy.build_trt student.int8.onnx --int8 --target 10.3       (only whether that version takes the graph)

Needs TensorRT 8.5 to 11.4, onnx and one of cuda-python and pycuda, on the machine that will run the engine; a check
with --target needs onnx alone. The one ONNX file gives each TensorRT what it wants
(`deploy.tensorrt.options.recipe_for`): a graph whose types say everything to TensorRT 10 and 11, an FP32 graph and
flags to TensorRT 8. Nothing falls back to another precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional

from deploy.commands import run_command
from deploy.contract import load_contract
from deploy.errors import ConfigError, EngineBuildError, MissingDependencyError, command
from deploy.graphs.known_ranges import KnownRanges, known_ranges, words_of_ranges
from deploy.runtime.golden import TOLERANCES, tolerance_of_integer_kernels
from deploy.runtime.session import OrtSession, Session
from deploy.tensorrt.engine import NetworkSource, make_engine, open_machine, some_names, tell_float_convolutions
from deploy.tensorrt.options import (
    BuildOptions,
    Recipe,
    add_build_arguments,
    check_options,
    describe_recipe,
    options_from_arguments,
    recipe_for,
    typing_of_version,
)

if TYPE_CHECKING:
    from deploy.graphs.onnx_file import OnnxFile
    from deploy.graphs.precision import TypedGraph


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parse(argv)
    _check_arguments(arguments)
    options = options_from_arguments(arguments)
    if arguments.target:
        return _check_target(arguments.model, arguments.target, options, arguments.ranges_from)
    machine = open_machine(
        options, arguments.output, arguments.timing_cache, arguments.no_timing_cache, arguments.verbose
    )
    check_options(machine.trt, options, load_contract(arguments.model))
    source = read_source(arguments.model, options.precision, arguments.data)
    beside = _known_ranges(source, machine.recipe, arguments.ranges_from)
    graph = _checked_graph(source, machine.recipe, machine.trt.__version__, beside)
    reference = _onnx_runtime(source.path)
    tolerance = TOLERANCES[options.precision]
    if source.is_quantised and reference is not None and options.dla_core is None:  # it is INT8 elsewhere, too
        tolerance = tolerance_of_integer_kernels(reference, source.model)
    try:
        make_engine(
            machine,
            options,
            arguments.output,
            NetworkSource(
                graph.model.SerializeToString(),
                graph.float_tensors,
                graph.kept,
                *source.dla_ranges,
                graph.float_convolutions,
            ),
            source.contract,
            {"onnx": source.path, **{f"ranges_{number}": file for number, file in enumerate(beside.files)}},
            source.parameters,
            reference,
            tolerance,
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
    parser.add_argument(
        "--ranges-from",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="statistics or INT8 files made of this model, besides those in its folder: what overflows FP16 by their "
        "ranges stays FP32",
    )
    parser.add_argument("-o", "--output", type=Path, help="engine file to write, *.engine")
    parser.add_argument(
        "--target", metavar="VERSION",
        help="write nothing: only check that this TensorRT (as 10.3) takes the graph; needs no TensorRT",
    )  # fmt: skip
    add_build_arguments(parser, "fp32")
    return parser.parse_args(argv)


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


def read_source(path: Path, precision: str, data: Optional[Path]) -> OnnxFile:
    """
    `path`, or for "int8" on a float graph what `calibration.quantize` makes of it; checked.

    Raises:
        ContractError: the file does not match its sidecar or cannot be read.
        ExportError: the graph is not valid, or sizes other than the batch are not fixed.
        ConfigError: `data` is given for a graph that is quantised already.
        EngineBuildError: the graph and the precision do not go together.
    """
    from deploy.graphs.onnx_file import read_onnx_file

    source = read_onnx_file(path)
    if precision != "int8" and source.is_quantised:
        raise EngineBuildError(
            f"{path} has Q/DQ nodes; {precision} needs the float graph it was made from, or choose --int8"
        )
    if source.is_quantised and data:
        raise ConfigError(f"{path} is quantised already, --data {data} would not be used: leave it out")
    if precision != "int8" or source.is_quantised:
        return source
    return read_onnx_file(quantised_file(path, data))


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


def _known_ranges(source: OnnxFile, recipe: Recipe, ranges_from: List[Path]) -> KnownRanges:
    """What is known of the graph's activations; raises ConfigError for files named where nothing is FP16."""
    if recipe.has_half:
        return known_ranges(source, ranges_from)
    if ranges_from:
        raise ConfigError(f"--ranges-from is {ranges_from[0]}, but nothing of this engine is FP16: leave it out")
    return KnownRanges({}, ())


def _checked_graph(source: OnnxFile, recipe: Recipe, version: str, beside: KnownRanges) -> TypedGraph:
    """The graph in the form of the recipe, of which TensorRT `version` takes every node; prints what stays FP32."""
    from deploy.graphs.operators import check_operators
    from deploy.graphs.precision import typed_graph

    graph = typed_graph(source.model, recipe.graph, source.sidecar["details"], beside.ranges)
    for note in check_operators(graph.model, version):
        print(f"TensorRT {version}: {note}", file=sys.stderr)
    if recipe.has_half:
        for reason, names in graph.kept.items():
            print(f"FP32, not FP16: {some_names(names)} ({reason})", file=sys.stderr)
        own = [source.path] if source.is_quantised else []
        print(words_of_ranges(graph, [file.name for file in (*own, *beside.files)]), file=sys.stderr)
    return graph


def _check_target(model: Path, version: str, options: BuildOptions, ranges_from: List[Path]) -> int:
    """Whether TensorRT `version` takes the graph, by its operator table; writes nothing."""
    recipe = recipe_for(options, typing_of_version(version))
    source = read_source(model, options.precision, None)
    beside = _known_ranges(source, recipe, ranges_from)
    graph = _checked_graph(source, recipe, version, beside)
    tell_float_convolutions(graph.float_convolutions)
    print(
        f"{source.path}: TensorRT {version} takes its {len(graph.model.graph.node)} nodes as "
        f"{describe_recipe(recipe, options)}, by its operator table; nothing was built"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
