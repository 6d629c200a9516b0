"""
Serialised ONNX graph -> TensorRT engine, for TensorRT 8.5 to 11.4.

Needs TensorRT and numpy, and no onnx: it runs on a board that has no more. `deploy.tensorrt.engine` makes a checked
file of what is built here.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from deploy.errors import Ended, EngineBuildError
from deploy.files import replacing
from deploy.graphs.calibration_cache import text_from_amax
from deploy.jetpack import gpu_check
from deploy.progress import progress
from deploy.tensorrt.bindings import logger
from deploy.tensorrt.options import BuildOptions, Recipe, recipe_for, typing_of


def build_plan(
    trt: ModuleType,
    model: bytes,
    options: BuildOptions,
    float_tensors: Iterable[str] = (),
    amax: Optional[Mapping[str, float]] = None,
    timing_cache: Optional[Path] = None,
    verbose: bool = False,
) -> bytes:
    """
    A serialised engine of the graph `model`.

    TF32, which TensorRT has on by default, is off: what is FP32 is computed in FP32. Profiling is detailed, for
    `coverage` to read.

    Args:
        model: serialised ONNX, in the form that `recipe_for` asks for.
        float_tensors: of that form, as `deploy.graphs.precision.TypedGraph`.
        amax: tensor -> largest absolute value, where the recipe is `calibrated`.
        timing_cache: measured kernels, read and updated.

    Raises:
        EngineBuildError: TensorRT refuses the graph or cannot build it; its own messages are passed on.
    """
    recipe = recipe_for(options, typing_of(trt))
    log = logger(trt)
    log.verbose = verbose
    log.errors.clear()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # pybind11's word for a null pointer
        raise EngineBuildError(
            f"TensorRT {trt.__version__} does not start: {log.reasons()} ({error}). Check with {gpu_check()} that "
            "there is a GPU, and that its driver is new enough for this TensorRT's CUDA."
        ) from error
    network = builder.create_network(_creation_flags(trt, recipe))
    parser = trt.OnnxParser(network, log)  # to be kept until the build is done: it owns the weights
    _parse(trt, parser, model, options)
    config = builder.create_builder_config()
    _configure(trt, builder, config, options)
    profile = _add_profile(builder, network, config, options.shapes) if options.shapes else None
    for name in recipe.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    calibrator = None
    if recipe.calibrated:
        calibrator = config.int8_calibrator = _calibrator(trt, text_from_amax(amax or {}, trt.__version__))
        if profile is not None:
            config.set_calibration_profile(profile)
    if recipe.flags:
        _constrain(trt, network, config, set(float_tensors))
    if timing_cache is not None:
        _read_timing_cache(config, timing_cache)
    monitor = None
    if hasattr(config, "progress_monitor"):
        monitor = config.progress_monitor = _progress_monitor(trt)
    else:
        print(f"TensorRT {trt.__version__} does not tell its progress; a build takes minutes", file=sys.stderr)
    with _noted_interrupt() as interrupted:
        if monitor is not None:
            monitor.interrupted = interrupted
        plan = builder.build_serialized_network(network, config)
    if interrupted.is_set():
        raise Ended(interrupted.number)
    if calibrator is not None and calibrator.asked_for_images:
        raise EngineBuildError(
            f"TensorRT {trt.__version__} did not take the ranges from the calibration cache: {log.reasons()}"
        )
    if plan is None:
        raise EngineBuildError(
            f"TensorRT {trt.__version__} built no engine: {log.reasons()}\nIf that says memory: give less "
            "with --workspace-mib, or free the device's."
        )
    if timing_cache is not None:
        with replacing(timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _creation_flags(trt: ModuleType, recipe: Recipe) -> int:
    creation = trt.NetworkDefinitionCreationFlag
    if recipe.strongly_typed:
        return 1 << int(creation.STRONGLY_TYPED)
    if not hasattr(creation, "STRONGLY_TYPED"):
        return 1 << int(creation.EXPLICIT_BATCH)  # which TensorRT 8 wants for ONNX, and 10 ignores
    return 0


def _parse(trt: ModuleType, parser: Any, model: bytes, options: BuildOptions) -> None:
    if options.hardware_compatible or options.version_compatible:
        # Both need it, and it is off by default in 8.6.
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # trt-ok: from 8.6 on
    if parser.parse(model):
        return
    lines = []
    for error in (parser.get_error(index) for index in range(parser.num_errors)):
        has_name = hasattr(error, "node_name")  # from TensorRT 10.0 on
        where = f"{error.node_operator()} {error.node_name()!r}" if has_name else f"node number {error.node()}"
        lines.append(f"\n  {where}: {error.desc()}")
    raise EngineBuildError(f"TensorRT {trt.__version__} cannot parse the graph:{''.join(lines)}")


def _configure(trt: ModuleType, builder: Any, config: Any, options: BuildOptions) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS  # trt-ok: from 8.6 on
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)  # trt-ok: from 8.6 on
    if options.dla_core is not None:
        if options.dla_core >= builder.num_DLA_cores:
            raise EngineBuildError(
                f"--dla-core is {options.dla_core}; TensorRT {trt.__version__} finds {builder.num_DLA_cores} DLA cores "
                "on this device, numbered from 0 (TensorRT 11.0 to 11.3 serves none): leave it out, or use another"
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla_core
    if options.gpu_fallback:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _add_profile(builder: Any, network: Any, config: Any, shapes: Tuple[int, int, int]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((batch, *sizes) for batch in shapes))
    if config.add_optimization_profile(profile) < 0:
        raise EngineBuildError(f"TensorRT refuses the batches {shapes} of --shapes; expected least <= usual <= largest")
    return profile


def _constrain(trt: ModuleType, network: Any, config: Any, float_tensors: Any) -> None:
    """
    Ties the layers that make these tensors to FP32.

    The parser makes several layers of some nodes. Only the last one's result has the name of the ONNX tensor; the
    others' have no name but TensorRT's "(Unnamed Layer* 7) [Reduce]_output", and are FP32 where what they serve is.
    """
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)  # trt-ok: where there are flags
    wanted = set(float_tensors)
    for layer in (network.get_layer(index) for index in range(network.num_layers - 1, -1, -1)):
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        if not wanted.intersection(output.name for output in outputs):
            continue
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        wanted.update(tensor.name for tensor in inputs if tensor is not None and tensor.name.startswith("(Unnamed"))
        floating = [index for index, output in enumerate(outputs) if output.dtype == trt.DataType.FLOAT]
        if floating:
            layer.precision = trt.DataType.FLOAT
        for index in floating:
            layer.set_output_type(index, trt.DataType.FLOAT)


def _read_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineBuildError(
            f"the timing cache {path} is broken or of another GPU, TensorRT or CUDA: remove it, or build with "
            "--no-timing-cache"
        )


def _calibrator(trt: ModuleType, cache: str) -> Any:
    class Ranges(trt.IInt8EntropyCalibrator2):  # type: ignore[name-defined]  # trt-ok: up to 10.16
        """Serves ranges from a text. Asked for images instead, it has none, and says that it was asked."""

        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)  # trt-ok
            self.asked_for_images = False

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: List[str]) -> None:
            self.asked_for_images = True

        def read_calibration_cache(self) -> bytes:
            return cache.encode()

        def write_calibration_cache(self, cache: bytes) -> None:
            """Not kept: it would be what was read."""

    return Ranges()


class _Interrupt(threading.Event):
    """Set by a signal that is to end this process."""

    number = 0

    def note(self, number: int, _frame: Any) -> None:
        self.number = number
        self.set()


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[_Interrupt]:
    """Ctrl-C and the like set the event: an exception in one of TensorRT's callbacks would be swallowed by its C++."""
    noted = _Interrupt()
    if threading.current_thread() is not threading.main_thread():  # which alone sees signals
        yield noted
        return
    numbers = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, noted.note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress_monitor(trt: ModuleType) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]  # trt-ok: from 10.0
        """Shows the steps of the outermost phases; Ctrl-C ends the build at the next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # trt-ok
            self.bars: Dict[str, Iterator[int]] = {}
            self.lock = threading.Lock()  # several of TensorRT's threads call
            self.interrupted = threading.Event()

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            if not parent_phase:
                with self.lock:
                    self.bars[phase_name] = progress(range(num_steps), num_steps, phase_name)
                    next(self.bars[phase_name], None)  # starts its clock

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                if phase_name in self.bars:
                    next(self.bars[phase_name], None)
            return not self.interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                bar = self.bars.pop(phase_name, None)
                if bar is not None and not self.interrupted.is_set():
                    for _ in bar:  # TensorRT may skip steps
                        pass

    return Monitor()
