"""
The names that a checkpoint may ask for besides tensors, and what each of them gets. Nothing of it runs code.

torch's restricted unpickler looks a name up, and then the file may call it (REDUCE), make an object of it (NEWOBJ) and
give that a state (BUILD), all with arguments of its own choice. So an entry has to be harmless whatever it is given:
where the real type is not, a smaller one stands in for it. Each entry has its reason beside it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import math
import pathlib
import pickle
import re
from typing import Any

import numpy as np

PLAIN_DTYPE = re.compile(r"[biufc]\d{1,2}|[SU][1-9]\d{0,5}")
"""Numbers and texts as numpy writes them: kind and bytes, or kind and letters. No objects, no records."""


class StoredDtype:
    """Stands in for numpy.dtype, whose state, if forged, gives an array that reaches beyond its memory."""

    def __init__(self, name: Any, *_arguments: Any) -> None:
        if not isinstance(name, str) or not PLAIN_DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"it asks for the numpy dtype {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):  # the byte order; all else follows from the name
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray(np.ndarray):
    """Stands in for numpy.ndarray: empty until it gets its state, which has to fit."""

    def __new__(cls, *_arguments: Any) -> StoredArray:
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if (
            type(dtype) is not StoredDtype
            or math.prod(shape) * dtype.dtype.itemsize != len(data)
            or min(shape, default=0) < 0
        ):
            raise pickle.UnpicklingError("it asks for a numpy array that its bytes do not fit")
        written: Any = (1, shape, dtype.dtype, bool(fortran), bytes(data))
        super().__setstate__(written)


def stored_scalar(dtype: Any, data: Any) -> Any:
    """A numpy scalar of its bytes, in place of numpy's own, which also takes objects."""
    if type(dtype) is not StoredDtype:
        raise pickle.UnpicklingError(f"it asks for a numpy scalar of the dtype {dtype!r}")
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def empty_dict(*_factory: Any) -> dict[Any, Any]:
    """In place of a defaultdict, which would call its factory whenever a key is missing."""
    return {}


def empty_list(*_arguments: Any) -> list[Any]:
    """In place of a deque, to which torch's unpickler does not append."""
    return []


def empty_array(*_arguments: Any) -> StoredArray:
    """In place of numpy's `_reconstruct`, which makes arrays of any subtype and size."""
    return StoredArray()


def empty_bytes() -> bytes:
    """Of `bytes` pickle calls only this; with a number it would take that much memory."""
    return b""


def method_of_history(owner: Any, name: Any) -> Any:
    """In place of `getattr`, by which pickle writes a message buffer's methods and a forger would reach anything."""
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name} of {owner}")
    return getattr(HistoryBuffer, name)


@functools.lru_cache(maxsize=1)
def allowed_globals() -> list[Any]:
    """For `torch.serialization.safe_globals`: what stands in, and the name in the file."""
    from mmengine.logging.history_buffer import HistoryBuffer

    allowed: dict[str, Any] = {
        # mmengine's message buffers: lists of numbers, and methods of their own
        "mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer,
        "builtins.getattr": method_of_history,
        # numbers and arrays that were not turned into Python's before they were saved
        "numpy.dtype": StoredDtype,
        "numpy.ndarray": StoredArray,
        # what trainers count in
        "collections.defaultdict": empty_dict,
        "collections.deque": empty_list,
        # factories of a defaultdict, and values in configs; made of anything, they hold it and no more
        **{f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, list, tuple, dict, frozenset)},
        "builtins.bytes": empty_bytes,
        # when it was saved
        **{f"datetime.{kind.__name__}": kind for kind in (
            datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)},
        # the arguments of the training; attributes and no more
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": argparse.Namespace,
        # a part of mmengine's config: becomes a dict, without its attributes
        "mmengine.config.config.ConfigDict": dict,
        # a version in `meta`: becomes a text
        "torch.torch_version.TorchVersion": str,
    }  # fmt: skip
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1, numpy 2
        allowed.update({f"{module}.scalar": stored_scalar, f"{module}._reconstruct": empty_array})
    for module in ("pathlib", "pathlib._local"):  # up to Python 3.12, and 3.13; paths that cannot touch a file
        for system in ("Posix", "Windows"):
            pure = getattr(pathlib, f"Pure{system}Path")
            allowed.update({f"{module}.{system}Path": pure, f"{module}.Pure{system}Path": pure})
    return [(entry, name) for name, entry in allowed.items()]
