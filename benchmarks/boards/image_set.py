"""
The test images of a fleet as a board has them: files named by their hash, and a list that says which they are.

Written by `benchmarks.boards.sending`, read on the board by the commands `predict` and `bench` of a bundle's `run.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

from deploy.errors import DataError, MeasurementError
from deploy.files import AnyPath, sha256_of
from deploy.images import read_image
from deploy.pixels import library
from deploy.schema import Whole, check_content, read_checked

SET_VERSION = 1
_KINDS: Dict[Any, Any] = {
    "data": {
        "annotations": str, "annotations_sha256": str, "images_dir": str, "images": Whole(1), "class_names": [str],
    },
    "images": [{"image_id": int, "sha256": str, "name": str}],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SetImage:
    """One image."""

    image_id: int
    """In the annotations."""
    sha256: str
    """Of its file, which has this name on a board."""
    name: str
    """Of its file where it came from, for messages."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images that are detected in."""

    data: Dict[str, Any]
    """The `data` of a result file that is measured on them."""
    images: Tuple[SetImage, ...]

    @property
    def images_sha256(self) -> str:
        """What the detections of a model depend on: which images, under which ids."""
        pairs = [[image.image_id, image.sha256] for image in self.images]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def to_json(self) -> Dict[str, Any]:
        """The list, for a file."""
        return {"set_version": SET_VERSION, **dataclasses.asdict(self)}


def read_image_set(path: AnyPath) -> ImageSet:
    """
    The list at `path`.

    Raises:
        MeasurementError: it is missing, cut, or of another version.
    """
    document = read_checked(path, {"set_version": int}, MeasurementError, "a list of images of benchmarks.fleet")
    if document["set_version"] != SET_VERSION:
        raise MeasurementError(
            f"{path}: set_version is {document['set_version']!r}; expected {SET_VERSION}. Run benchmarks.fleet again, "
            "with a bundle of the same version of this project."
        )
    check_content(document, _KINDS, path, MeasurementError, "Run benchmarks.fleet again.")
    images = [SetImage(one["image_id"], one["sha256"], one["name"]) for one in document["images"]]
    return ImageSet(document["data"], tuple(images))


def checked_file(images_dir: Path, image: SetImage) -> Path:
    """
    The file of an image on the board, compared with its hash.

    Raises:
        DataError: it is missing, or another than was sent; it is removed, so that it is sent again.
    """
    path = images_dir / image.sha256
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(
            f"{image.name} is not there as {path} ({error.strerror}); run benchmarks.fleet again, which sends it"
        ) from error
    if found != image.sha256:
        path.unlink()
        raise DataError(
            f"{image.name} was damaged on the board and is removed: the SHA-256 of {path} was {found[:12]}...; run "
            "benchmarks.fleet again, which sends it anew"
        )
    return path


def read_set_image(images_dir: Path, image: SetImage) -> np.ndarray:
    """
    The picture, as `deploy.images.read_image` gives it.

    Raises:
        DataError: as `checked_file`, or this board cannot decode it.
    """
    path = checked_file(images_dir, image)
    try:
        return read_image(path)
    except DataError as error:
        raise DataError(f"{image.name}, here {error}. This board's {library()} does not read what others do") from error


def add_image_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the arguments that name a set of images on a board, and the board."""
    parser.add_argument(
        "--set", type=Path, required=required, metavar="FILE", help="list of images of benchmarks.fleet"
    )
    parser.add_argument(
        "--images-dir", type=Path, required=required, metavar="DIR", help="folder of these images, by their hashes"
    )
    parser.add_argument("--board", metavar="NAME", help="what this board is called, for the result")
