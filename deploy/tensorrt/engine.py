"""
A TensorRT engine for this machine's device: built, compared with a reference, and kept with its sidecar if it is right.

Needs TensorRT, numpy and one of cuda-python and pycuda: it runs on a board that has no more. The commands are
`deploy.build_trt` and `run.py build` of a bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence

from deploy.contract import ModelContract, sidecar_path, write_sidecar
from deploy.errors import ConfigError
from deploy.files import AnyPath, check_writable, replacing, user_cache, write_json
from deploy.int8_format import FloatReason
from deploy.jetpack import unknown_jetpack
from deploy.runtime.golden import Tolerance, check_agreement, measure_agreement, words_of_agreement
from deploy.runtime.session import Session
from deploy.schema import read_checked, short
from deploy.tensorrt.bindings import load_tensorrt
from deploy.tensorrt.builder import build_plan
from deploy.tensorrt.coverage import check_precision, coverage
from deploy.tensorrt.cuda import load_cuda
from deploy.tensorrt.options import BuildOptions, Recipe, describe_recipe, recipe_for, typing_of
from deploy.tensorrt.session import PlanSession, describe_machine

TIMED_ON = ("device", "compute_capability", "multiprocessors", "board", "power_mode", "tensorrt", "cuda_runtime")
"""Of `describe_machine`, what the times of kernels hold for."""


class Machine(NamedTuple):
    """The TensorRT and the device that build, and how."""

    trt: ModuleType
    here: Dict[str, Optional[str]]
    """Of `deploy.tensorrt.session.describe_machine`."""
    recipe: Recipe
    timing_cache: Optional[Path]
    verbose: bool


class NetworkSource(NamedTuple):
    """What an engine is built from: a graph in the form that a recipe wants."""

    model: bytes
    float_tensors: Sequence[str]
    kept: Mapping[str, Sequence[str]]
    """As `deploy.graphs.precision.TypedGraph`."""
    amax: Mapping[str, float]
    """As `deploy.graphs.dla_ranges.DlaRanges`."""
    dla_half: Sequence[str]
    """Nodes that are FP16 on a DLA whose ranges come from `amax`."""
    float_convolutions: Sequence[str] = ()
    """As `deploy.graphs.precision.TypedGraph`."""


def open_machine(
    options: BuildOptions, output: Path, timing_cache: Optional[Path], no_timing_cache: bool, verbose: bool
) -> Machine:
    """
    The TensorRT and the device here; both and the disk are asked for what is wanted before anything is done.

    Args:
        timing_cache: the file of measured kernels; None: one in the user's cache folder.
        no_timing_cache: use and keep none.
        verbose: print all that TensorRT logs.

    Raises:
        MissingDependencyError, PipelineError: there is no TensorRT, no CUDA or no device.
        ConfigError: the timing cache was measured elsewhere.
        EngineBuildError: as `recipe_for`.
    """
    needed_for = f"building {output}"
    unknown = unknown_jetpack()
    if unknown is not None:
        print(unknown, file=sys.stderr)
    trt = load_tensorrt(needed_for)
    cuda = load_cuda(needed_for)
    try:
        here = describe_machine(trt, cuda)
    finally:
        cuda.close()
    cache = None if no_timing_cache else timing_cache or default_timing_cache(here)
    if cache is not None:
        _check_timing_cache(cache, here)
    for path in filter(None, (output, cache)):
        check_writable(path)
    return Machine(trt, here, recipe_for(options, typing_of(trt)), cache, verbose)


def make_engine(
    machine: Machine,
    options: BuildOptions,
    output: Path,
    source: NetworkSource,
    contract: ModelContract,
    inputs: Mapping[str, Path],
    parameters: int,
    reference: Optional[Session],
    tolerance: Tolerance,
) -> None:
    """
    Builds an engine, checks it, writes it with its sidecar and says what it is.

    Args:
        inputs: name -> file, for the sidecar.
        reference: what the engine is compared with; None where there is nothing.
        tolerance: how far it may differ from that.

    Raises:
        EngineBuildError: it cannot be built, or is not right: nothing is kept.
    """
    trt, here, recipe, timing_cache, verbose = machine
    print(
        f"building {output}: {describe_recipe(recipe, options)}, TensorRT {here['tensorrt']}, {here['device']}",
        file=sys.stderr,
    )
    tell_float_convolutions(source.float_convolutions)
    if recipe.calibrated and source.dla_half:
        print(f"FP16 on the DLA, for want of a range: {some_names(source.dla_half)}", file=sys.stderr)
    start = time.monotonic()
    plan = build_plan(trt, source.model, options, source.float_tensors, source.amax, timing_cache, verbose)
    build_s = round(time.monotonic() - start, 1)
    if timing_cache is not None:
        write_json(_measured_on(timing_cache), {key: here[key] for key in TIMED_ON})
    found = coverage(trt, plan, options)
    check_precision(found, options.precision)
    golden = check_plan(trt, plan, reference, options, tolerance) if reference is not None else None
    details = {
        **dataclasses.asdict(options),
        **here,
        **recipe._asdict(),
        "timing_cache": None if timing_cache is None else str(timing_cache),
        "float_convolution_codes": dict.fromkeys(source.float_convolutions, FloatReason.DEPTHWISE.code),
        "dla_half": list(source.dla_half) if recipe.calibrated else [],
        "kept_in_fp32": source.kept if recipe.has_half else {},
        "coverage": found,
        "parameters": parameters,
        "build_s": build_s,
        "golden": golden,
    }
    write_engine(output, plan, inputs, contract, details)
    checked = words_of_agreement(golden) if golden else "NOT compared with ONNX Runtime"
    if golden and not golden["agrees"]:
        print(
            f"warning: {output} is kept since --keep-differing is given: {checked}, where {tolerance.matched:.0%} were "
            f"expected within {tolerance.box} of the box size and {tolerance.logit} in logit. Measure its AP.",
            file=sys.stderr,
        )
    print(f"{output}: {len(plan) / 2**20:.1f} MiB, built in {build_s:.0f} s, {checked}; {_layers(found)}")


def tell_float_convolutions(names: Sequence[str]) -> None:
    """Says which convolutions have Q/DQ in the file, and none in the form that this TensorRT takes."""
    if names:
        print(f"not INT8: {some_names(names)} ({FloatReason.DEPTHWISE.text})", file=sys.stderr)


def some_names(names: Sequence[str]) -> str:
    """All of a few, the first of many."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def check_plan(
    trt: ModuleType, plan: bytes, reference: Session, options: BuildOptions, tolerance: Tolerance
) -> Dict[str, Any]:
    """
    How well the engine agrees with the reference, as `measure_agreement` says; `agrees`, whether that is well enough;
    `tolerance`, the fields of that.

    Raises:
        EngineBuildError: the engine's detections are not those of the reference, and `options` do not keep it.
    """
    cuda = load_cuda("checking the engine")
    with PlanSession(plan, reference.contract, trt, cuda, options.dla_core, options.version_compatible) as engine:
        found = (measure_agreement if options.keep_differing else check_agreement)(reference, engine, tolerance)
    agrees = found["matched"] >= tolerance.matched
    return {**found, "agrees": agrees, "tolerance": dataclasses.asdict(tolerance)}


def default_timing_cache(machine: Mapping[str, Optional[str]]) -> Path:
    """
    The file in the user's cache folder for this device, TensorRT, CUDA and power mode, to which times are tied.

    Args:
        machine: of `deploy.tensorrt.session.describe_machine`.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(given) / "crosskd" if given else user_cache("build with --no-timing-cache")) / "timing"
    words = [machine["device"], f"{machine['multiprocessors']}sm", machine["board"], machine["power_mode"]]
    words += [f"tensorrt{machine['tensorrt']}", f"cuda{machine['cuda_runtime']}"]
    return folder / (re.sub(r"[^\w.]+", "-", "-".join(filter(None, words))) + ".cache")


def _measured_on(timing_cache: Path) -> Path:
    """The file beside a timing cache that says where its times were measured, which TensorRT's format does not."""
    return timing_cache.with_name(f"{timing_cache.name}.json")


def _check_timing_cache(path: Path, here: Mapping[str, Optional[str]]) -> None:
    """
    Raises ConfigError if the times were measured elsewhere. Of a file that another tool wrote only TensorRT can tell.
    """
    if not (path.is_file() and _measured_on(path).is_file()):
        return
    what = "what a build writes beside its timing cache: remove both"
    measured_on = read_checked(_measured_on(path), dict.fromkeys(TIMED_ON, (str, None)), ConfigError, what)
    for key in TIMED_ON:
        if measured_on[key] != here[key]:
            raise ConfigError(
                f"the timing cache {path} was measured with {key} {short(measured_on[key])}; here it is {here[key]!r}. "
                "Give another file, leave --timing-cache out for the one of this machine, or measure anew with "
                "--no-timing-cache."
            )


def write_engine(
    path: Path, plan: bytes, inputs: Mapping[str, AnyPath], contract: ModelContract, details: Mapping[str, Any]
) -> None:
    """
    Writes an engine with its sidecar: both, or none.

    Raises:
        PipelineError: one of them cannot be written, say since the disk is full.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(plan)
    try:
        write_sidecar(path, inputs, contract, details)
    except BaseException:
        path.unlink()  # without its sidecar it is of no use
        with contextlib.suppress(FileNotFoundError):
            sidecar_path(path).unlink()  # of an engine that was here before
        raise


def _layers(found: Dict[str, Any]) -> str:
    if found["layers"] is None:
        return f"precision of its layers not known: {found['reason']}"
    counts = [f"{entry['count']} {precision}" for precision, entry in found["layers"].items() if entry["count"]]
    return f"layers: {', '.join(counts)}"
