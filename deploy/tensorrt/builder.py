"""
Serialised ONNX graph -> TensorRT engine, for TensorRT 8.5 to 11.4.

Needs TensorRT and numpy, and no onnx: it runs on a board that has no more. The command is `deploy.build_trt`.

What a version can do is asked of its bindings, never read from its number. Two ways lead to FP16 and INT8:

- strong typing (TensorRT 10 and 11): the graph says the type of every tensor;
- flags (TensorRT 8, and 10): the graph is FP32, flags allow FP16 and INT8, and TensorRT chooses. The tensors that must
  stay FP32 are told to it as constraints, which it has to obey.

`recipe_for` says which of them is used, and for which form of the graph (`deploy.graphs.precision.GRAPHS`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from deploy.contract import ModelContract, sidecar_path, write_sidecar
from deploy.errors import ConfigError, EngineBuildError
from deploy.files import AnyPath, replacing
from deploy.graphs.calibration_cache import text_from_amax
from deploy.progress import progress
from deploy.tensorrt.session import logger

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
    return Recipe("int8_fp32_scales", not typing.flags, flags)


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


def default_timing_cache(machine: Mapping[str, str]) -> Path:
    """
    The file in the user's cache folder for this device, TensorRT and CUDA, to which such a cache is tied.

    Args:
        machine: of `deploy.tensorrt.session.describe_machine`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosskd" / "timing"
    words = [machine["device"], f"tensorrt{machine['tensorrt']}", f"cuda{machine['cuda_runtime']}"]
    return folder / (re.sub(r"[^\w.]+", "-", "-".join(words)) + ".cache")


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
            f"TensorRT {trt.__version__} does not start: {log.reasons()} ({error}). Check with nvidia-smi that there "
            "is a GPU, and that its driver is new enough for this TensorRT's CUDA."
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
        raise KeyboardInterrupt
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


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event: an exception in one of TensorRT's callbacks would be swallowed by its C++."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone sees signals
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


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


# What was built


TYPE_WORDS = (("int8", r"int8"), ("fp16", r"fp16|half"), ("fp32", r"fp32|float(?!\d)|float32"))
"""Precision -> how the inspector writes it: "Row major linear FP32", "... vectorized row major Int8 format", "Half"."""


def coverage(trt: ModuleType, plan: bytes, options: BuildOptions) -> Dict[str, Any]:
    """
    What TensorRT's inspector says about the engine's layers, as `coverage_from_json`.

    Raises:
        EngineBuildError: the engine cannot be read back.
    """
    log = logger(trt)
    log.errors.clear()
    runtime = trt.Runtime(log)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # such an engine holds code of the host's; it was built just now
    if options.dla_core is not None:
        runtime.DLA_core = options.dla_core
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError(f"TensorRT {trt.__version__} cannot read its own engine: {log.reasons()}")
    return coverage_from_json(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def coverage_from_json(text: str) -> Dict[str, Any]:
    """
    Count and share of layers by the type that they work on (that of their first floating-point or INT8 input).

    Keys: `layers` and `convolutions`, each {"int8" | "fp16" | "fp32" | "other": {"count", "share"}}; `reformats`:
    layers that only copy and convert, which are not counted in `layers`; `compiled`: blocks that TensorRT compiled as
    one, whose inside it does not tell; `reason`: None, or why the others are None, where the text's form is not known.

    Args:
        text: of EngineInspector.get_engine_information, JSON. Each layer is an object if the engine was built with
            detailed profiling, else a name. Its inputs have a "Format/Datatype" up to TensorRT 10, and these two apart
            in 11.
    """
    try:
        document = json.loads(text)
        layers = document["Layers"]
        if not layers or not all(isinstance(layer, dict) for layer in layers):
            return _unknown("the inspector gives names of layers and no types")
        kinds = [_kind_of(layer) for layer in layers]
        precisions = [_precision_of(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _unknown(f"the inspector's text has an unknown form: {error!r}")
    if all(precision == "other" for precision in precisions):
        return _unknown("the inspector gives no types that are known")
    pairs = list(zip(kinds, precisions))
    return {
        "layers": _shares([precision for kind, precision in pairs if kind != "reformat"]),
        "convolutions": _shares([precision for kind, precision in pairs if kind == "convolution"]),
        "reformats": kinds.count("reformat"),
        "compiled": kinds.count("compiled"),
        "reason": None,
    }


def _unknown(reason: str) -> Dict[str, Any]:
    return {"layers": None, "convolutions": None, "reformats": None, "compiled": None, "reason": reason}


def _kind_of(layer: Mapping[str, Any]) -> str:
    words = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
    if "reformat" in words or "noop" in words:
        return "reformat"
    if "ForeignNode" in str(layer["Name"]) or "myelin" in words:
        return "compiled"
    return "convolution" if "conv" in words else "other"


def _precision_of(layer: Mapping[str, Any]) -> str:
    for tensor in layer["Inputs"] or layer["Outputs"]:
        text = " ".join(str(value) for key, value in tensor.items() if "datatype" in key.lower()).lower()
        for precision, words in TYPE_WORDS:
            if re.search(rf"\b(?:{words})\b", text):
                return precision
    return "other"


def _shares(precisions: List[str]) -> Dict[str, Dict[str, float]]:
    return {
        precision: {
            "count": precisions.count(precision),
            "share": round(precisions.count(precision) / len(precisions), 4) if precisions else 0.0,
        }
        for precision in ("int8", "fp16", "fp32", "other")
    }


def check_precision(found: Mapping[str, Any], precision: str) -> None:
    """
    Raises EngineBuildError if an engine that shall have INT8 has none.

    Args:
        found: of `coverage`.
    """
    if precision != "int8":
        return
    if found["layers"] is None:
        print(f"warning: nothing tells whether the engine has INT8 layers: {found['reason']}", file=sys.stderr)
    elif found["layers"]["int8"]["count"] == 0:
        if found["compiled"] == 0:
            raise EngineBuildError(
                "the engine has no INT8 layer, so it was not kept: TensorRT found FP16 faster everywhere, or the "
                "device has no INT8. Build with --fp16, or try another --scales or --opt-level."
            )
        print(
            f"warning: no INT8 layer is seen in the engine; {found['compiled']} blocks were compiled as one, and may "
            "have some inside: compare its latency with that of --fp16",
            file=sys.stderr,
        )
