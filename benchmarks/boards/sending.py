"""
The test images of `benchmarks.fleet`, sent to boards: each once, by its hash, whatever bundle or set it is in.

What a cut leaves behind is gone on from, image by image: `benchmarks.boards.ssh.Remote.send_files`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from pathlib import Path
from typing import Dict, Mapping

from benchmarks.boards.image_set import ImageSet, SetImage
from benchmarks.boards.predict import crc32_of_input
from benchmarks.measuring.subject import data_of_result
from deploy.contract import ModelContract
from deploy.dataset import CocoSet
from deploy.files import sha256_of
from deploy.images import read_image
from deploy.runtime.preprocess import preprocess

IMAGES_FOLDER = "images"
"""In a board's folder, beside those of the bundles."""
_making_inputs = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class TestImages:
    """The images that all boards detect in."""

    __test__ = False  # to pytest its name is that of a test

    coco: CocoSet
    image_set: ImageSet
    files: Mapping[str, Path]
    """SHA-256 -> file here."""

    @property
    def content(self) -> bytes:
        """Of the list that boards get."""
        return json.dumps(self.image_set.to_json(), ensure_ascii=False).encode()

    @property
    def paths(self) -> Dict[int, Path]:
        """Image id -> file here."""
        return {image.image_id: image.path for image in self.coco.images}


def images_from_coco(coco: CocoSet) -> TestImages:
    """What is sent of a checked set."""
    files: Dict[str, Path] = {}
    images = []
    for image in coco.images:
        sha256 = sha256_of(image.path)
        files.setdefault(sha256, image.path)
        images.append(SetImage(image.image_id, sha256, image.path.relative_to(coco.images_dir).as_posix()))
    return TestImages(coco, ImageSet(data_of_result(coco, len(images)), tuple(images)), files)


def inputs_here(images: TestImages, contract: ModelContract) -> Dict[int, int]:
    """
    Image id -> `crc32_of_input` of it here; made once for all boards.

    Raises:
        DataError: an image cannot be decoded here.
    """
    with _making_inputs:
        return _inputs_here(images, contract)


@functools.lru_cache(maxsize=1)
def _inputs_here(images: TestImages, contract: ModelContract) -> Dict[int, int]:
    return {image_id: crc32_of_input(preprocess(read_image(path), contract)) for image_id, path in images.paths.items()}
