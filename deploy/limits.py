"""
How large what a file claims may be: compared before memory is taken, since a file of few bytes can claim any size.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from deploy.files import AnyPath

LARGEST_IMAGE_PX = 1 << 28
"""
Larger images are not decoded: 768 MiB of pixels of 8 bits, and as much again while OpenCV decodes them; more than
cameras take (2026: 200 megapixels). Of 16 bits it is half as many.
"""
FURTHEST_PX = 1e9
"""Of a side of a box from the edge of its image: boxes of an untrained detector are far out, but not there."""
MOST_SEGMENTS = 10_000
"""Of an image file, looked at for its size and orientation; photos have a few dozen."""
LARGEST_ARRAYS_BYTES = 1 << 30
"""Of all arrays of an .npz file: statistics of a thousand tensors over 512 images have 80 MiB."""
LARGEST_INPUT_VALUES = 1 << 28
"""Of a network's input: 1 GiB as float32, 16 images of 2000 x 2000 pixels and more."""
LARGEST_EXPANDED_BYTES = 1 << 26
"""Of a tensor in a checkpoint that repeats its numbers: torch allows any shape for a single one."""
MOST_DETECTIONS = 1_000_000
"""Kept of an image, by its contract."""


def check_zip_claims(path: AnyPath) -> None:
    """
    Raises ValueError if the entries of a zip archive claim more bytes than the file has, as none does that torch.save
    wrote: it does not compress. Other files pass.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > path.stat().st_size:
        raise ValueError(f"it claims {claimed:,} bytes and has {path.stat().st_size:,}: it was compressed, or forged")
