"""
TensorRT's Python bindings: loaded, with the process's one logger, and whether an engine fits what is here.

TensorRT 8.5 to 11.4. The module is imported by `load_tensorrt` alone; everybody else is handed it as `trt`.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any, List

from deploy.errors import MissingDependencyError

INSTALL_TENSORRT = (
    "pip install tensorrt-cu13 (on a Jetson JetPack brings it: make the environment with --system-site-packages)"
)


def load_tensorrt(needed_for: str) -> ModuleType:
    """
    The module tensorrt, its plugins registered.

    TensorRT 8 makes of some norms plugins (InstanceNormalization_TRT), which a process that loads an engine has to
    register itself: for the one that builds it the ONNX parser does (release/8.5, plugin/api/InferPlugin.cpp).

    Raises:
        MissingDependencyError: it is not installed, or its libraries are not.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise MissingDependencyError("tensorrt", needed_for, f"{INSTALL_TENSORRT}. Python says: {error}") from error
    tensorrt.init_libnvinfer_plugins(logger(tensorrt), "")
    return tensorrt


@functools.lru_cache(maxsize=None)
def logger(trt: ModuleType) -> Any:
    """
    The one logger of this process, which every builder and runtime shares: TensorRT holds on to the first it is given.

    Its list `errors` keeps the messages of severity ERROR and worse, the only place where TensorRT gives reasons;
    `verbose` prints everything on stderr. `reasons()` is the errors as one text.
    """
    severity_type = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: List[str] = []
            self.verbose = False

        def reasons(self) -> str:
            return "; ".join(self.errors) or "no reason given"

        def log(self, severity: Any, msg: str) -> None:
            if severity in (severity_type.INTERNAL_ERROR, severity_type.ERROR):
                self.errors.append(msg)
            if self.verbose:
                print(f"tensorrt {severity.name.lower()}: {msg}", file=sys.stderr)

    return Log()
