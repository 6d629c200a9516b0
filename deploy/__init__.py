"""
From a checkpoint to a running engine. Imports neither torch nor mmdet.

    from deploy import Detector

`Detector` is fetched when it is first asked for: a board may have no OpenCV, which it needs and other modules do not.
"""

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime reports to Microsoft from 1.29 on: a database and a device's id in the user's cache, written as it is
# imported. Every process of ours imports this package first, and its children inherit the variable.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from deploy.detector import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    if name == "Detector":
        from deploy.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
