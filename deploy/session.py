"""
One interface to run a model: `infer(feed) -> outputs`, as a context manager.

`OrtSession` runs ONNX files, `deploy.trt.TrtSession` TensorRT engines; `open_session` chooses by the file's suffix.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Dict, Mapping, Optional, Type

import numpy as np

from deploy.contract import ModelContract, load_contract
from deploy.errors import ContractError, MissingDependencyError
from deploy.files import AnyPath

Arrays = Dict[str, np.ndarray]


class Session:
    """
    A model that is ready to run.

    Attributes:
        contract: how to feed and read it.
        description: what runs it where, in words: "ONNX Runtime 1.31.1, CPUExecutionProvider, 2 threads".
    """

    contract: ModelContract
    description: str

    def infer(self, feed: Mapping[str, np.ndarray]) -> Arrays:
        """
        Output name -> array, in the layout of the contract. Valid until the next call.

        Args:
            feed: input name -> array, float32, of the contract's shape.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what the session holds."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.close()


class OrtSession(Session):
    """
    An ONNX file on ONNX Runtime.

    Args:
        path: the ONNX file, with its sidecar.
        provider: the execution provider, by ONNX Runtime's name.
        threads: for operators; None leaves the choice to ONNX Runtime (one per core).

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ContractError: the file does not match its sidecar or cannot be read, or the provider is not there.
    """

    def __init__(self, path: AnyPath, provider: str = "CPUExecutionProvider", threads: Optional[int] = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime", f"running {Path(path).name}", "pip install onnxruntime"
            ) from error
        self.contract = load_contract(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings about unused initialisers tell a user nothing
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
            raise ContractError(f"ONNX Runtime cannot open {path}: {error}. Export the model again.") from error
        if provider not in self._session.get_providers():
            raise ContractError(
                f"ONNX Runtime fell back to {self._session.get_providers()} for {path}; asked for {provider}. "
                "Install the package and libraries of that provider, or choose another."
            )
        words = f"{threads} threads" if threads is not None else "default threads"
        self.description = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {words}"

    def infer(self, feed: Mapping[str, np.ndarray]) -> Arrays:
        names = list(self.contract.output_names)
        return dict(zip(names, self._session.run(names, dict(feed))))


def open_session(path: AnyPath, threads: Optional[int] = None) -> Session:
    """
    The session for a model file, chosen by its suffix: `.onnx` or `.engine`.

    Raises:
        ContractError: another suffix, or as the session itself.
    """
    suffix = Path(path).suffix
    if suffix == ".onnx":
        return OrtSession(path, threads=threads)
    if suffix == ".engine":
        from deploy.trt import TrtSession  # which itself builds on this module

        return TrtSession(path)
    raise ContractError(f"cannot run {path}: its suffix is {suffix!r}; expected .onnx or .engine")
