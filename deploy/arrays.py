"""
Arrays in numpy's formats, read such that no more memory is taken than their files say and have. numpy only.
"""

from __future__ import annotations

import io
import math
import zipfile
from typing import Collection, Dict, Optional

import numpy as np

from deploy.files import AnyPath, check_regular
from deploy.limits import LARGEST_ARRAYS_BYTES


def arrays_from_npz(path: AnyPath, names: Optional[Collection[str]] = None) -> Dict[str, np.ndarray]:
    """
    Name -> array of an .npz file. numpy's own reader takes as much memory as an entry claims, and runs pickles if told.

    Args:
        names: those that are wanted, as far as they are there; None: all.

    Raises:
        OSError: it cannot be read. ValueError: it is no .npz, damaged, or too large unpacked.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            entries = [
                entry for entry in archive.infolist() if names is None or entry.filename[: -len(".npy")] in names
            ]
            total = sum(entry.file_size for entry in entries)
            if total > LARGEST_ARRAYS_BYTES:
                raise ValueError(f"unpacked it has {total >> 20} MiB, above {LARGEST_ARRAYS_BYTES >> 20} MiB")
            return {
                entry.filename[: -len(".npy")]: array_from_npy(archive.read(entry))
                for entry in entries if entry.filename.endswith(".npy")
            }  # fmt: skip
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged archive can raise anything: BadZipFile, zlib.error, NotImplementedError ...
        raise ValueError(f"it is no .npz archive, or damaged: {error}") from error


def array_from_npy(content: bytes) -> np.ndarray:
    """
    The array in the bytes of an .npy file, read-only.

    Raises:
        ValueError: it is none, of objects, or its header claims another size than it has.
    """
    stream = io.BytesIO(content)
    try:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(stream)]
        shape, columns_first, dtype = read_header(stream)
        if dtype.hasobject or (dtype.itemsize == 0 and dtype.kind not in "US") or min(shape, default=0) < 0:
            raise ValueError(f"of the type {dtype} and the shape {shape}")
        if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
            raise ValueError(f"its header says {shape} of {dtype}, it has {len(content) - stream.tell()} bytes")
        values = np.frombuffer(content, dtype, offset=stream.tell()) if math.prod(shape) else np.zeros(0, dtype)
        return values.reshape(shape, order="F" if columns_first else "C")
    except Exception as error:  # the header is Python text, and a damaged one can raise anything
        raise ValueError(f"it is no array in numpy's format, or damaged: {error}") from error
