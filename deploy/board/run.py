"""
The runner of a bundle of deploy.bundle, for a board without anything of ours installed:

    python3 run.py build [--fp32 | --fp16 | --int8]   an engine for this board, checked before it is kept
    python3 run.py check                              whether it still answers as ONNX Runtime did
    python3 run.py bench                              its latency, as a result file
    python3 run.py images                             what reads images here: OpenCV or Pillow
    python3 run.py predict --set FILE ...             detections in the images of benchmarks.fleet, for AP
    python3 run.py detect IMAGE...                    pictures with boxes, and detections as JSON; needs OpenCV
    python3 run.py activate, python3 run.py rollback  which model is in use on the board: ../current
    python3 run.py verify --allowed-signers FILE      who signed the bundle; needs ssh-keygen

Each has --help. Needs Python 3.8, numpy, TensorRT 8.5 or newer, and cuda-python or pycuda. With ONNX Runtime in place
of TensorRT nothing is built: the others take --engine NAME.onnx, one of the bundle's files.
"""

import functools
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path
from typing import List

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Of a file in the manifest: a path inside the folder. What else it could be, a device for one, may have no end."""
COMMANDS = {
    "build": ("deploy.board.commands", "build"),
    "check": ("deploy.board.commands", "check"),
    "bench": ("benchmarks.boards.bench", "bench"),
    "predict": ("benchmarks.boards.predict", "predict"),
    "prepare": ("benchmarks.boards.predict", "prepare"),
    "images": ("benchmarks.boards.predict", "images"),
    "detect": ("deploy.board.commands", "detect"),
    "activate": ("deploy.board.release", "activate"),
    "rollback": ("deploy.board.release", "rollback"),
    "verify": ("deploy.board.signature", "verify"),
}
"""Word -> module and function, called with the bundle's folder and the words that follow."""


def main(words: List[str], folder: Path) -> int:
    """The exit status of the command `words`, after each file in `folder` was compared with the manifest."""
    if sys.version_info < (3, 8):  # noqa: UP036  # a board's python3 may be older
        return _refuse("this is Python {}.{}; expected 3.8 or newer".format(*sys.version_info[:2]))
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if words[0] not in COMMANDS:
        return _refuse(f"unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}")
    fault = fault_of_files(folder)
    if fault:
        return _refuse(f"{fault}. Unpack the bundle again.")
    try:
        import numpy  # noqa: F401  # asked here, since each module of ours needs it
    except ImportError as error:
        return _refuse(f"run.py needs numpy. Do: pip install numpy (or apt install python3-numpy). {error}")
    module, name = COMMANDS[words[0]]
    function = functools.partial(getattr(importlib.import_module(module), name), folder)
    return importlib.import_module("deploy.errors").command(function)(words[1:])


def fault_of_files(folder: Path) -> str:
    """What is wrong with the manifest, or the first of its files that is missing or changed; '' if all is well."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: str(entry["sha256"]) for name, entry in files.items()}
    except OSError as error:
        return f"cannot read {folder / MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{folder / MANIFEST} is not the manifest of a bundle: it was changed or cut"
    for name, sha256 in expected.items():
        if not NAME.fullmatch(name) or ((folder / name).exists() and not (folder / name).is_file()):
            return f"{MANIFEST} lists {name!r:.80}, which is no file of a bundle"
        try:
            found = _sha256_of(folder / name)
        except OSError as error:
            return f"cannot read {folder / name}, which belongs to the bundle: {error.strerror}"
        if found != sha256:
            return f"{folder / name} was changed: its SHA-256 is {found[:12]}..., {MANIFEST} says {sha256[:12]}..."
    return ""


def _sha256_of(path: Path) -> str:  # not deploy.files': nothing of the bundle is imported before it was compared
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
