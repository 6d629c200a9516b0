"""
Checkpoint -> ONNX: `python -m deploy.export RUN_DIR -o student.onnx`.

One file, one static graph: points and strides are constants, boxes are decoded and the best candidates of each level
chosen in the graph. Non-maximum suppression stays outside (deploy/runtime/postprocess.py) or, with `--outputs nms`,
follows in the graph. Only the number of images may be left open (`--batch dynamic`). The sidecar carries the model
contract.

The work needs torch and mmdet, so `crosskd.export` does it, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import List, Optional

from deploy.commands import run_status
from deploy.errors import MissingDependencyError, command
from deploy.export_options import read_export_options

TRAINING_PACKAGES = ("crosskd", "torch", "mmdet")


@command
def main(argv: Optional[List[str]] = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    read_export_options("deploy.export", words)
    for package in TRAINING_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "exporting a checkpoint", "pip install 'crosskd[train]'")
    return run_status("crosskd.export", *words)


if __name__ == "__main__":
    sys.exit(main())
