"""
Command: what a model file sees in pictures, videos, cameras or streams, drawn and as COCO results.

    python -m deploy.detect student.engine photo.jpg -o seen
    python -m deploy.detect student.int8.onnx folder video.mp4 --score 0.5 -o seen
    python -m deploy.detect student.engine 0        # camera 0, or /dev/video0, until Ctrl-C
    python -m deploy.detect student.engine rtsp://user:password@10.0.0.7/live -o seen
    python -m deploy.detect student.engine "nvarguscamerasrc ! ... ! video/x-raw,format=BGR ! appsink"

Each picture or annotated video lands in the output folder under its own name (`name_2` where two are the same). The
results are COCO's list of `image_id`, `category_id`, `bbox` (x, y, width, height in pixels) and `score`, with
`file_name` and, of a video, `frame`, counted from 0, and `time_s`; image ids count pictures and frames from 1. `time_s`
is the frame's own time stamp, of cameras and streams counted from the first frame; an annotated video shows each frame
at its time. Results are written as they come: Ctrl-C, SIGTERM, a lost stream and a disk that fills up keep what was
seen. A source that cannot be read, or not to its end, is named at the end, with status 2; everything else is kept.

Needs numpy, OpenCV and what runs the file: ONNX Runtime for `.onnx`, TensorRT for `.engine`. Class names beyond ASCII
are drawn by Pillow, where it is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from deploy.detector import Detector
from deploy.errors import command
from deploy.runtime.pictures import detect_in_pictures
from deploy.runtime.sources import add_picture_arguments, picture_options_from_arguments
from deploy.targets import add_runtime_argument


@command
def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.detect", description="Draw what a detector sees in images, videos, cameras or streams."
    )
    parser.add_argument("model", type=Path, help="ONNX or engine file with its sidecar")
    add_runtime_argument(parser)
    add_picture_arguments(parser)
    arguments = parser.parse_args(argv)
    options = picture_options_from_arguments(arguments, arguments.model)
    with Detector(arguments.model, options.score_threshold, runtime=arguments.runtime) as detector:
        print(f"{arguments.model} on {detector.description}")
        detect_in_pictures(detector, detector.contract, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
