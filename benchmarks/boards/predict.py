"""
The command `predict` of a bundle's `run.py`: what a model detects on this board in a set of images, into one file.

No AP is computed here: `benchmarks.fleet` takes the file and does that. It is written image by image, so that a run
that was cut off, by a power failure say, goes on where it ended. Needs what runs the model, and OpenCV or Pillow.

`prepare` writes what some images become as the network's input, for those that become another on another machine.

The file has a JSON document in each line: first the header, which says of what the detections are, then one for each
image, and at the end the environment and how many images there were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Optional

import numpy as np

from benchmarks.boards.board_result import BoardWatch, model_of_result
from benchmarks.boards.image_set import ImageSet, add_image_arguments, read_image_set, read_set_image
from deploy.board.commands import Bundle, add_engine_argument
from deploy.contract import package_versions
from deploy.errors import MeasurementError
from deploy.files import check_writable, lock, replacing, unlock
from deploy.machine import usable_cores
from deploy.pixels import library
from deploy.progress import progress
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import Prepared, preprocess
from deploy.runtime.session import Session

PREDICTIONS_VERSION = 1
PART = ".part"
"""Suffix of a file that is not whole."""


def predict(folder: Path, words: Optional[List[str]] = None) -> int:
    """Detects in each image of the set and writes the file; goes on with one that an earlier run left unfinished."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py predict",
        description="Detect in a set of images of benchmarks.fleet, which computes AP from the detections. Needs "
        "OpenCV or Pillow.",
    )
    add_engine_argument(parser)
    add_image_arguments(parser, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write, a JSON line "
                        "for each image")  # fmt: skip
    arguments = parser.parse_args(words)
    output: Path = arguments.output
    check_writable(output)
    image_set = read_image_set(arguments.set)
    model = Bundle(folder).model(arguments.engine)
    watch = BoardWatch(arguments.board)
    with model.open(usable_cores() if "threads" in model.target.session_options else None) as session:
        header = {
            "predictions_version": PREDICTIONS_VERSION,
            "role": model.role,
            "model": model_of_result(model),
            "images_sha256": image_set.images_sha256,
            "description": session.description,
            "library": library(),
            "versions": package_versions(),
        }
        part = output.with_name(output.name + PART)
        with _held(part), part.open("a+b") as file:
            done = _start(file, header)
            _detect(session, image_set, arguments.images_dir, done, file)
            _write(file, {"images": len(image_set.images), "environment": watch.environment()})
            os.fsync(file.fileno())
            part.replace(output)
    print(f"{output}: detections of {session.description} in {len(image_set.images)} images, read by {library()}")
    return 0


def images(folder: Path, words: Optional[List[str]] = None) -> int:
    """Says what reads images on this board; asked before any are sent to it."""
    argparse.ArgumentParser(
        prog="python3 run.py images", description="Say what reads images here: OpenCV, or Pillow in its place."
    ).parse_args(words)
    print(library())
    return 0


def prepare(folder: Path, words: Optional[List[str]] = None) -> int:
    """Writes the network's inputs of some images, as arrays named by the images' ids."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py prepare", description="Write what images become as the network's input."
    )
    add_image_arguments(parser, required=True)
    parser.add_argument("--ids", type=int, nargs="+", required=True, metavar="ID", help="ids of the images")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write, *.npz")
    arguments = parser.parse_args(words)
    contract = Bundle(folder).contract
    images = [image for image in read_image_set(arguments.set).images if image.image_id in arguments.ids]
    inputs = {
        str(image.image_id): preprocess(read_set_image(arguments.images_dir, image), contract).input for image in images
    }
    with replacing(arguments.output) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **inputs)  # type: ignore[arg-type]  # its stubs know no names
    return 0


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keeps a file from another process that writes it: one whose connection was lost may still run."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock(handle)
        except BlockingIOError as error:
            raise MeasurementError(
                f"{path} is being written by another run.py predict, of a connection that was lost; wait for its end"
            ) from error
        yield
    finally:
        unlock(handle)


def _start(file: IO[bytes], header: Dict[str, Any]) -> int:
    """How many images an earlier run with the same header has left in the file; what is not whole there is cut off."""
    first = _line(header)
    file.seek(0)
    done, end = -1, 0
    for line in file:
        if not line.endswith(b"\n") or (done < 0 and line != first):
            break
        if done >= 0 and not line.startswith(b'{"image_id"'):
            break
        done, end = done + 1, end + len(line)
    file.truncate(end)
    file.seek(0, 2)
    if done < 0:
        _write(file, header)
    return max(done, 0)


def _detect(session: Session, image_set: ImageSet, images_dir: Path, done: int, file: IO[bytes]) -> None:
    contract = session.contract
    fewest = session.batch_limits[0]
    rest = image_set.images[done:]
    for image in progress(rest, len(rest), "images"):
        prepared = preprocess(read_set_image(images_dir, image), contract)
        batch = prepared.input if fewest == 1 else np.repeat(prepared.input, fewest, axis=0)
        outputs = session.infer({contract.input_name: batch})
        found = postprocess(outputs, contract, prepared, image=image.name)
        rows = [[contract.category_ids[label], score, *box] for box, score, label in found.rows()]
        _write(file, {"image_id": image.image_id, "input_crc32": crc32_of_input(prepared), "boxes": rows})


def crc32_of_input(prepared: Prepared) -> int:
    """By which the network's input on a board is compared with that of the same image elsewhere."""
    return zlib.crc32(prepared.input.tobytes())


def _write(file: IO[bytes], document: Dict[str, Any]) -> None:
    file.write(_line(document))
    file.flush()


def _line(document: Dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"
