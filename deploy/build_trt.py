"""
ONNX -> TensorRT engine, for this machine's GPU, checked against ONNX Runtime before it is kept.

    python -m deploy.build_trt student.onnx --fp16 -o student.fp16.engine
    python -m deploy.build_trt student.int8.onnx --int8 -o student.int8.engine
    python -m deploy.build_trt student.onnx --int8 --data DIR -o student.int8.engine

Needs TensorRT 10 or 11, onnx and one of cuda-python and pycuda, on the machine that will run the engine. Networks are
strongly typed: the graph says which tensor has which precision (`deploy.precision`), so TensorRT 10, which also has
builder flags for it, and TensorRT 11, which has none, build the same thing. Nothing falls back to another precision.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from deploy.contract import ModelContract, load_contract, write_sidecar
from deploy.errors import ConfigError, EngineBuildError, MissingDependencyError, command
from deploy.files import check_writable, replacing
from deploy.golden import TOLERANCES, check_agreement
from deploy.session import OrtSession
from deploy.trt import PlanSession, describe_machine, load_cuda, load_tensorrt, logger

if TYPE_CHECKING:
    import onnx


@command
def main(argv: Optional[List[str]] = None) -> int:
    options = _parse(argv)
    needed_for = f"building {options.output}"
    trt = load_tensorrt(needed_for)
    cuda = load_cuda(needed_for)
    try:
        here = describe_machine(trt, cuda)
    finally:
        cuda.close()
    check_strong_typing(trt)

    from deploy.graph import count_parameters

    for path in filter(None, (options.output, options.timing_cache)):
        check_writable(path)
    source, model = typed_model(options.model, options.precision, options.data)
    contract = load_contract(source)
    print(
        f"building {options.output}: {options.precision}, TensorRT {here['tensorrt']}, {here['device']}",
        file=sys.stderr,
    )
    start = time.monotonic()
    plan = build_plan(
        trt, model.SerializeToString(), options.workspace_mib, options.opt_level, options.timing_cache, options.verbose
    )
    build_s = round(time.monotonic() - start, 1)
    golden = check_plan(trt, plan, source, contract, options.precision)
    with replacing(options.output) as temporary:
        temporary.write_bytes(plan)
    details = {
        "precision": options.precision,
        "parameters": count_parameters(model),
        **here,
        "workspace_mib": options.workspace_mib,
        "opt_level": options.opt_level,
        "build_s": build_s,
        "golden": golden,
    }
    write_sidecar(options.output, {"onnx": source}, contract, details)
    checked = (
        f"{golden['matched']:.1%} of the best candidates as in ONNX Runtime"
        if golden
        else "NOT compared with ONNX Runtime"
    )
    print(f"{options.output}: {len(plan) / 2**20:.1f} MiB, built in {build_s:.0f} s, {checked}")
    return 0


def _parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.build_trt", description="Build a TensorRT engine for this machine's GPU."
    )
    parser.add_argument("model", type=Path, help="ONNX file with its sidecar")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--fp16", dest="precision", action="store_const", const="fp16", help="FP16 (default: FP32, without TF32)"
    )
    precision.add_argument(
        "--int8", dest="precision", action="store_const", const="int8",
        help="INT8 where the graph has Q/DQ, FP16 elsewhere; a float graph is quantised first, which needs --data",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data folder to calibrate on, for --int8 on a float graph"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="engine file to write, *.engine")
    parser.add_argument(
        "--workspace-mib", type=int, metavar="N", help="most scratch memory of a layer (default: all of the GPU's)"
    )
    parser.add_argument(
        "--opt-level",
        type=int,
        choices=range(6),
        metavar="0-5",
        help="time to spend on search (default: TensorRT's, 3)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="measured kernels, read and updated: makes the next build quick",
    )
    parser.add_argument("--verbose", action="store_true", help="print all that TensorRT logs")
    parser.set_defaults(precision="fp32")
    options = parser.parse_args(argv)
    if options.output.suffix != ".engine":
        raise ConfigError(f"--output is {options.output}; expected a name that ends in .engine")
    if options.workspace_mib is not None and options.workspace_mib <= 0:
        raise ConfigError(f"--workspace-mib is {options.workspace_mib}; expected a positive number of MiB")
    if options.data and options.precision != "int8":
        raise ConfigError(f"--data is given with {options.precision}; it serves --int8 alone: leave it out")
    return options


def typed_model(path: Path, precision: str, data: Optional[Path]) -> Tuple[Path, onnx.ModelProto]:
    """
    The ONNX file that the engine is built from, and its graph with every tensor in the type that `precision` wants.

    The file is `path`, or for "int8" on a float graph what `calibration.quantize` makes of it.

    Raises:
        ContractError: the file does not match its sidecar or cannot be read.
        ExportError: the graph is not valid, or its shapes are not fixed.
        ConfigError: `data` is given for a graph that is quantised already.
        EngineBuildError: the graph and the precision do not go together.
    """
    from deploy.graph import check_graph, check_static, load_onnx
    from deploy.precision import check_symmetric_int8, half_from_float, is_quantised

    load_contract(path)
    model = load_onnx(path)
    check_graph(model)
    check_static(model)
    quantised = is_quantised(model)
    if precision != "int8":
        if quantised:
            raise EngineBuildError(
                f"{path} has Q/DQ nodes; {precision} needs the float graph it was made from, or choose --int8"
            )
        return path, half_from_float(model) if precision == "fp16" else model
    if quantised and data:
        raise ConfigError(f"{path} is quantised already, --data {data} would not be used: leave it out")
    if not quantised:
        path = quantised_file(path, data)
        model = load_onnx(path)
    check_symmetric_int8(model)
    return path, half_from_float(model)


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
    words = ["-m", "calibration.quantize", str(path), "--data", str(data), "-o", str(quantised), "--target", "tensorrt"]
    print(" ".join(["python", *words]), file=sys.stderr)
    status = subprocess.run([sys.executable, *words], check=False).returncode
    if status:
        raise EngineBuildError(
            f"{path} could not be quantised: calibration.quantize ended with status {status}, see its message above"
        )
    return quantised


def check_strong_typing(trt: ModuleType) -> None:
    """Raises EngineBuildError if this TensorRT cannot take precision from the graph, as 8.x cannot."""
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise EngineBuildError(
            f"TensorRT {trt.__version__} has no strongly typed networks; expected TensorRT 10.0 or newer: install that"
        )


def build_plan(
    trt: ModuleType,
    model: bytes,
    workspace_mib: Optional[int] = None,
    opt_level: Optional[int] = None,
    timing_cache: Optional[Path] = None,
    verbose: bool = False,
) -> bytes:
    """
    A serialised engine of the typed ONNX graph `model`.

    TF32, which TensorRT has on by default, is off: what the graph calls FP32 is computed in FP32.

    Raises:
        EngineBuildError: TensorRT refuses the graph or cannot build it; its own messages are passed on.
    """
    log = logger(trt)
    log.verbose = verbose
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        lines = [f"\n  {error.node_operator()} {error.node_name()!r}: {error.desc()}" for error in errors]
        raise EngineBuildError(f"TensorRT {trt.__version__} cannot parse the graph:{''.join(lines)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if opt_level is not None:
        config.builder_optimization_level = opt_level
    if timing_cache is not None:
        _read_timing_cache(config, timing_cache)
    monitor = config.progress_monitor = _progress_monitor(trt)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineBuildError(f"TensorRT {trt.__version__} built no engine: {log.reasons()}")
    if timing_cache is not None:
        with replacing(timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _read_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineBuildError(
            f"--timing-cache {path} is broken or of another GPU, TensorRT or CUDA: remove it, or keep one per machine"
        )


def _progress_monitor(trt: ModuleType) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Prints the steps of the outermost phase; Ctrl-C ends the build at the next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: Dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self.steps:
                    print(f"{phase_name}: {step + 1}/{self.steps[phase_name]}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:  # must not cross TensorRT's C++; its threads call this
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def check_plan(
    trt: ModuleType, plan: bytes, source: Path, contract: ModelContract, precision: str
) -> Optional[Dict[str, float]]:
    """
    How well the engine agrees with ONNX Runtime on `source`, as `check_agreement` says; None where that is missing.

    Raises:
        EngineBuildError: the engine's detections are not those of the ONNX file.
    """
    try:
        reference = OrtSession(source)
    except MissingDependencyError as error:
        print(f"the engine is not compared with ONNX Runtime: {error}", file=sys.stderr)
        return None
    with PlanSession(plan, contract, trt, load_cuda("checking the engine")) as engine:
        return check_agreement(reference, engine, TOLERANCES[precision])


if __name__ == "__main__":
    sys.exit(main())
