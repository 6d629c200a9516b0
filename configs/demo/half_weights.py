"""
Writes a detector's weights with float16 in place of float32, half the size: `python -m configs.demo.half_weights
RUN_DIR/detector.pth -o teacher.pth`. What is read from them computes in float32 again.
"""

from __future__ import annotations

import argparse
import sys

import torch

from crosskd.models.checkpoint import check_finite, classes_of_checkpoint, read_checkpoint
from deploy.errors import command
from deploy.files import replacing


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m configs.demo.half_weights", description=__doc__)
    parser.add_argument("weights", metavar="FILE", help="weights of a finished run")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write")
    arguments = parser.parse_args(argv)
    checkpoint = read_checkpoint(arguments.weights)
    state = checkpoint["state_dict"]
    # Norms and biases stay: they are few, and running variances have a wide range.
    half = {name: value.half() if value.dim() > 1 else value for name, value in state.items()}
    check_finite(arguments.weights, half)
    classes = classes_of_checkpoint(arguments.weights, checkpoint)
    with replacing(arguments.output) as temporary, temporary.open("wb") as file:
        torch.save({"state_dict": half, "meta": {"dataset_meta": {"classes": classes}}}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
