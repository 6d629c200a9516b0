"""
Command: one archive with all that a board needs to build, check, measure and use an engine.

    python -m deploy.bundle student.int8.onnx student.onnx -o student.tar.gz --sign ~/.ssh/id_ed25519
    python -m deploy.bundle student.int8.onnx student.onnx student.int8-onnxruntime.onnx -o student.tar.gz

    tar xzf student.tar.gz && cd student && python3 run.py build     (on the board)

Needs onnx and onnxruntime, for --sign also ssh-keygen. What is in it: `deploy.board.archive`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, List, Mapping, Optional

from deploy.board.archive import SUFFIX, files_of_bundle, name_of_bundle, pack, sources_from_paths
from deploy.board.run import MANIFEST
from deploy.board.signature import SIGNATURE, UNSIGNED, check_key, sign
from deploy.errors import command
from deploy.files import check_writable, sha256_of

if TYPE_CHECKING:
    from deploy.graphs.onnx_file import OnnxFile


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parser().parse_args(argv)
    name = name_of_bundle(arguments.output)
    check_writable(arguments.output)
    if arguments.sign is not None:
        check_key(arguments.sign)
    sources = sources_from_paths(arguments.models)
    files = files_of_bundle(sources)
    if arguments.sign is not None:
        files[SIGNATURE] = sign(files[MANIFEST], arguments.sign)
    pack(name, files, arguments.output)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size / 2**20:.1f} MiB, {len(files)} files, SHA-256 {sha256_of(arguments.output)}")
    print(f"signed with {arguments.sign}" if arguments.sign is not None else f"{UNSIGNED}; --sign KEY signs it")
    print(f"on the board: tar xzf {arguments.output.name} && cd {name} && python3 run.py {_first_command(sources)}")
    return 0


def _first_command(sources: Mapping[str, OnnxFile]) -> str:
    """What run.py is to do first: for ONNX Runtime alone there is nothing to build."""
    alone = list(sources) == ["int8_onnxruntime"]
    return f"check --engine {sources['int8_onnxruntime'].path.name}" if alone else "build"


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
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="private SSH key that signs it, or a public one whose private key is in the agent (default: unsigned)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
