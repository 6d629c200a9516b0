"""
Command: one archive with all that a board needs to build, check, measure and use an engine.

    python -m deploy.bundle student.int8.onnx student.onnx -o student.tar.gz
    python -m deploy.bundle student.int8.onnx student.onnx student.int8-onnxruntime.onnx -o student.tar.gz

    tar xzf student.tar.gz && cd student && python3 run.py build     (on the board)

Needs onnx and onnxruntime. What is in it: `deploy.board.archive`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from deploy.board.archive import SUFFIX, files_of_bundle, name_of_bundle, pack, sources_from_paths
from deploy.errors import command
from deploy.files import check_writable, sha256_of


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parser().parse_args(argv)
    name = name_of_bundle(arguments.output)
    check_writable(arguments.output)
    files = files_of_bundle(sources_from_paths(arguments.models))
    pack(name, files, arguments.output)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size / 2**20:.1f} MiB, {len(files)} files, SHA-256 {sha256_of(arguments.output)}")
    print(f"on the board: tar xzf {arguments.output.name} && cd {name} && python3 run.py build")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bundle", description="Pack all that a board needs into one archive."
    )
    parser.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="ONNX files with their sidecars, one or more of these: quantised for TensorRT, for --int8 on the board; "
        "quantised for ONNX Runtime; the float one that they were made of, for --fp16 and --fp32",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=f"archive to write, NAME{SUFFIX}, with one "
        "folder NAME"
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
