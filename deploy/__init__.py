"""
From a checkpoint to a running engine. Imports neither torch nor mmdet.

    from deploy import Detector

Commands: export, adopt_onnx, build_trt, bundle, handover, detect, doctor. Then the rooms, each of which imports only
those that follow it:

- board: what runs on a board out of a bundle, and the bundle's archive.
- serving: models as other servers want them, Triton and DeepStream.
- tensorrt: engines built, checked and run.
- openvino: ONNX files on OpenVINO.
- runtime: running a model: image to input, the interface to every session, outputs to detections, drawing.
- graphs: ONNX graphs read, checked, cleaned and typed; TensorRT's operators and calibration caches.

Between board and the sessions stands detector; sessions are opened by the names that targets gives for them. A further
runtime is a room like openvino and an entry in targets.

Ground, below all: data_arguments, ap_drop, trials; commands, freshness, dataset, export_options; processes;
folder_lock; contract, targets, int8_format, images, layouts, coco_file; arrays; schema, limits; files, pixels,
progress; jetpack, errors; machine.

`Detector` is fetched when it is first asked for: a board may have no OpenCV, which it needs and other modules do not.
"""

import os
from typing import TYPE_CHECKING, Any

from deploy.limits import LARGEST_IMAGE_PX
from deploy.machine import thread_limit

# ONNX Runtime reports to Microsoft from 1.29 on: a database and a device's id in the user's cache, written as it is
# imported. Every process of ours imports this package first, and its children inherit the variable.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# torch and numpy start a thread for each processor of the machine, whatever a container may use of it; they ask this
# variable first.
if thread_limit() is not None:
    os.environ.setdefault("OMP_NUM_THREADS", str(thread_limit()))
# OpenCV, mmdet's reader too, allocates what an image's header claims, up to this; read once, as it is imported.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(LARGEST_IMAGE_PX))

if TYPE_CHECKING:
    from deploy.detector import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    if name == "Detector":
        from deploy.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
