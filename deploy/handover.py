"""
Command: hands a model over to a server of NVIDIA's.

    python -m deploy.handover student.onnx --to triton -o repository
    python -m deploy.handover student.onnx --to deepstream --precision fp16 -o deepstream

Takes an ONNX file, float or quantised, or an engine whose ONNX file is still there. For Triton Inference Server it
writes a model repository, for DeepStream the configuration of Gst-nvinfer, the labels and the source of the box parser,
which `make` compiles where DeepStream is. What the server does otherwise than the training is said. Needs numpy and
onnx.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import List, Optional

from deploy.errors import ConfigError, command
from deploy.files import check_writable
from deploy.serving.deepstream import write_deepstream
from deploy.serving.model import read_served_model
from deploy.serving.triton import write_repository

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,60}")


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parser().parse_args(argv)
    name = arguments.name if arguments.name is not None else arguments.model.name.partition(".")[0]
    _check_arguments(arguments, name)
    output: Path = arguments.output
    if not output.is_dir():  # as a model repository that has other models is
        check_writable(output)
    model = read_served_model(arguments.model)
    if arguments.to == "triton":
        version = arguments.model_version or 1
        notes = write_repository(model, name, version, arguments.max_batch, output)
        done = f"{output / name}: version {version}. Serve it with: tritonserver --model-repository {output.resolve()}"
    else:
        notes = write_deepstream(model, name, arguments.precision, arguments.max_batch, output)
        done = (
            f"{output}: compile the box parser where DeepStream is (make), and name config_infer_{name}.txt in nvinfer"
        )
    for note in notes:
        print(f"note: {note}")
    print(done)
    return 0


def _check_arguments(arguments: argparse.Namespace, name: str) -> None:
    """Raises ConfigError for a value that cannot be, or a flag that the chosen server has no use for."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"the model is called {name!r}; expected letters, digits, '_' and '-': give another --name")
    if arguments.max_batch < 1:
        raise ConfigError(f"--max-batch is {arguments.max_batch}; expected at least 1")
    if arguments.model_version is not None and arguments.model_version < 1:
        raise ConfigError(f"--model-version is {arguments.model_version}; expected 1 or more")
    if arguments.to == "triton" and arguments.precision is not None:
        raise ConfigError("--precision is given with --to triton, which runs the file as it is: leave it out")
    if arguments.to == "deepstream" and arguments.model_version is not None:
        raise ConfigError("--model-version is given with --to deepstream, which has none: leave it out")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.handover", description="Hand a model over to Triton Inference Server or DeepStream."
    )
    parser.add_argument("model", type=Path, help="ONNX file or engine, with its sidecar")
    parser.add_argument("--to", choices=("triton", "deepstream"), required=True, help="the server")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR",
        help="triton: model repository, which may have other models; deepstream: new folder",
    )  # fmt: skip
    parser.add_argument(
        "--name", help="what the model is called there (default: the name of the file up to its first dot)"
    )
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N",
        help="images of one inference, where the model takes any number (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--precision",
        choices=("fp16", "fp32"),
        help="deepstream: of the engine that nvinfer builds of a float graph, for which it must be given",
    )
    parser.add_argument("--model-version", type=int, metavar="N", help="triton: folder of the model (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
