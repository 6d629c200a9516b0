"""
One interface to run a model: `infer(feed) -> outputs`, as a context manager. `OrtSession` is that of ONNX Runtime.

The sessions of other runtimes stand in their own rooms; `open_session` chooses among them.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

import numpy as np

from deploy.contract import ModelContract, load_contract
from deploy.errors import ConfigError, ContractError, MissingDependencyError, PipelineError
from deploy.files import AnyPath
from deploy.machine import thread_limit
from deploy.targets import TARGETS, target_from_path

Arrays = Dict[str, np.ndarray]
TensorInfo = Tuple[str, str, Tuple[int, ...]]
"""Name, numpy's name of the type, sizes with -1 for what is open."""
Opened = TypeVar("Opened", bound="Session")

ORT_TYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8",
    "tensor(int32)": "int32", "tensor(int64)": "int64",
}  # fmt: skip
"""ONNX Runtime's name of a type -> numpy's, for those that a detector's inputs and outputs have."""


class Session:
    """
    A model that is ready to run.

    Attributes:
        contract: how to feed and read it.
        description: what runs it where, in words: "ONNX Runtime 1.31.1, CPUExecutionProvider, 2 threads".
        batch_limits: the fewest and the most images of one inference.
    """

    contract: ModelContract
    description: str
    batch_limits: Tuple[int, int]

    def infer(self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None) -> Arrays:
        """
        Output name -> array, in the layout of the contract. Valid until the next call, which overwrites it.

        Args:
            feed: input name -> array, of the contract's type and shape.
            times_ms: where given, it gets `inference` and, where the session itself copies to a device and back,
                `host_to_device` and `device_to_host`: milliseconds, on the device's own clock.

        Raises:
            ContractError: the feed is not what the contract asks for.
            PipelineError: the runtime failed.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what the session holds. A second time it does nothing."""

    def _input_of(self, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        """The one array of `feed`. Raises ContractError if it is not what the model takes."""
        name, expected = self.contract.input_name, self.contract.input_shape
        if list(feed) != [name]:
            raise ContractError(f"the model was fed {sorted(feed)}; expected its one input, {name!r}")
        array = feed[name]
        if not isinstance(array, np.ndarray) or array.dtype != self.contract.input_type:
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise ContractError(
                f"input {name!r} is {found}; expected a numpy array of {self.contract.input_type}: prepare images with "
                "deploy.runtime.preprocess"
            )
        fewest, most = self.batch_limits
        if array.ndim != 4 or array.shape[1:] != expected[1:] or not fewest <= array.shape[0] <= most:
            batch = str(fewest) if fewest == most else f"{fewest} to {most}" if most < sys.maxsize else "any number"
            sizes = ", ".join(str(size) for size in expected[1:])
            raise ContractError(
                f"input {name!r} has the shape {array.shape}; expected ({batch}, {sizes}): prepare images with "
                "deploy.runtime.preprocess, and more of them in several calls"
            )
        return array

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.close()


def open_session(
    path: AnyPath, threads: Optional[int] = None, provider: Optional[str] = None, runtime: Optional[str] = None
) -> Session:
    """
    The session for a model file.

    Args:
        threads: of the CPU; None leaves the choice to the runtime.
        provider: as `OrtSession`; None: its default.
        runtime: as `target_from_path`.

    Raises:
        ConfigError: threads or a provider for a runtime that does not know them, or as `target_from_path`.
        Otherwise as `target_from_path` and the session itself.
    """
    target = target_from_path(path, runtime)
    options = {name: value for name, value in (("threads", threads), ("provider", provider)) if value is not None}
    for name in options:
        if name not in target.session_options:
            able = " and ".join(other.title for other in TARGETS.values() if name in other.session_options)
            raise ConfigError(f"{name} is given for {path}, and is for {able} alone: leave it out with {target.title}")
    module, _, name = target.session.rpartition(".")
    session: Session = getattr(importlib.import_module(module), name)(path, **options)
    return session


def candidates(
    outputs: Mapping[str, np.ndarray], contract: ModelContract, index: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4), scores (n,) and labels (n,) of the image at `index` of the batch, whatever the layout."""
    values = [outputs[name] for name in contract.output_names]
    if contract.outputs == "nms":
        boxes, scores, labels = (part[values[3] == index] for part in values[:3])
        return boxes, scores, labels
    if contract.outputs == "rows":
        rows = values[0][index]
        return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)
    boxes, scores, labels = (part[index] for part in values)
    return boxes, scores, labels


class OrtSession(Session):
    """
    An ONNX file on ONNX Runtime.

    Outputs of known shape lie in arrays that are allocated once (again only when the batch size changes), inputs are
    read where they are. Outputs of `nms` are ONNX Runtime's own arrays: it alone knows their size. Copies to a device
    and back are ONNX Runtime's too, so that they are part of the time of `inference`.

    Args:
        path: the ONNX file, with its sidecar.
        provider: the execution provider, by ONNX Runtime's name: "CPUExecutionProvider", "CUDAExecutionProvider",
            "TensorrtExecutionProvider". It must take the whole graph.
        threads: for operators; None leaves the choice to ONNX Runtime (one per core), but for what a container may use.

    Attributes:
        runtime: ONNX Runtime's own session.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ContractError: the file does not match its sidecar or cannot be read.
        ConfigError: the provider is not there, or leaves part of the graph to another.
    """

    def __init__(self, path: AnyPath, provider: str = "CPUExecutionProvider", threads: Optional[int] = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime", f"running {Path(path).name}", "pip install onnxruntime"
            ) from error
        self.contract = load_contract(path)
        threads = thread_limit() if threads is None else threads
        words = f"{threads} threads" if threads is not None else "default threads"
        self.description = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {words}"
        self.runtime: Any = _runtime_session(onnxruntime, path, provider, threads)
        batch = self.contract.input_shape[0]
        self.batch_limits = (batch, batch) if batch > 0 else (1, sys.maxsize)
        outputs = _tensors(self.runtime.get_outputs())
        check_tensors(_tensors(self.runtime.get_inputs()), outputs, self.contract, path)
        wanted = self.contract.output_names
        self._shapes = {name: (dtype, sizes[1:]) for name, dtype, sizes in outputs if name in wanted}
        self._binding: Any = None
        self._bound: Arrays = {}

    def infer(self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None) -> Arrays:
        array = self._input_of(feed)
        names = self.contract.output_names
        try:
            if self.contract.outputs == "nms":
                start = time.perf_counter()
                outputs = dict(zip(names, self.runtime.run(names, {self.contract.input_name: array})))
            else:
                self._bind_outputs(array.shape[0])
                start = time.perf_counter()
                self._binding.bind_cpu_input(self.contract.input_name, array)
                self.runtime.run_with_iobinding(self._binding)
                outputs = dict(self._bound)
        except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
            raise PipelineError(f"{self.description} could not run the model: {error}") from error
        if times_ms is not None:
            times_ms["inference"] = 1e3 * (time.perf_counter() - start)
        return outputs

    def _bind_outputs(self, batch: int) -> None:
        if self._bound and len(self._bound[self.contract.output_names[0]]) == batch:
            return
        self._binding = self.runtime.io_binding()
        bound = {name: np.empty((batch, *rest), dtype) for name, (dtype, rest) in self._shapes.items()}
        for name, array in bound.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._bound = bound

    def close(self) -> None:
        self._binding = None  # before the session that it belongs to
        self.runtime = None
        self._bound = {}  # what a caller still has of it lives on


def _runtime_session(onnxruntime: Any, path: AnyPath, provider: str, threads: Optional[int]) -> Any:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ConfigError(
            f"ONNX Runtime {onnxruntime.__version__} has no {provider}; expected one of {available}. Install the "
            "package that brings it (onnxruntime-gpu for CUDA and TensorRT), or choose another."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings about unused initialisers tell a user nothing
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider != "CPUExecutionProvider":
        # Else it would run on the CPU what the provider does not take, and not say so.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        if "fallback to CPU EP" in str(error):
            raise ConfigError(
                f"{provider} does not take the whole graph of {path}, or cannot be loaded: the rest would fall back to "
                "the CPU. Install that provider's libraries (ONNX Runtime's messages name them), or choose another."
            ) from error
        raise ContractError(f"ONNX Runtime cannot open {path}: {error}. Export the model again.") from error
    if provider not in session.get_providers():  # its libraries could not be loaded
        raise ConfigError(
            f"ONNX Runtime fell back to {session.get_providers()} for {path}; asked for {provider}. "
            "Install the libraries of that provider (ONNX Runtime's messages name them), or choose another."
        )
    return session


def check_tensors(
    inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], contract: ModelContract, path: AnyPath
) -> None:
    """
    Raises ContractError if the graph at `path` is not that of the contract.

    Args:
        inputs, outputs: name, numpy's name of the type, sizes with -1 for what the graph leaves open.
    """
    expected = [(contract.input_name, contract.input_type, tuple(contract.input_shape))]
    if list(inputs) != expected:
        raise ContractError(f"{path} has the inputs {list(inputs)}; its contract expects {expected}. Export it again.")
    found = {name: (dtype, sizes[1:]) for name, dtype, sizes in outputs}
    for name in contract.output_names:
        if name not in found or (contract.outputs != "nms" and -1 in found[name][1]):
            raise ContractError(
                f"{path} has the outputs {found}; its contract expects {list(contract.output_names)}, of fixed sizes "
                "after the first. Export it again."
            )


def _tensors(items: Sequence[Any]) -> List[TensorInfo]:
    """Of ONNX Runtime's inputs or outputs."""
    return [(item.name, ORT_TYPES.get(item.type, item.type), _sizes(item.shape)) for item in items]


def _sizes(shape: Any) -> Tuple[int, ...]:
    """With -1 for what the graph leaves open, where ONNX Runtime has a name or None."""
    return tuple(size if isinstance(size, int) else -1 for size in shape)
