"""
From a checkpoint to a running engine. Imports neither torch nor mmdet.

    from deploy import Detector

In the folder itself stand the commands and the ground that every room may use. The rooms, from the lowest, each of
which imports only those above it in this list:

- graphs: ONNX graphs read, checked, cleaned and typed; TensorRT's operators and calibration caches
- runtime: running a model: image to input, the interface to every session, outputs to detections, drawing
- openvino: ONNX files on OpenVINO
- tensorrt: engines built, checked and run
- board: what runs on a board out of a bundle, and the bundle's archive

Between them and the commands stands `deploy.detector`, which opens a file with the session that `deploy.targets` names
for it. A further runtime is a room like openvino and an entry in `deploy.targets`.

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
