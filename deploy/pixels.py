"""
Pixels: decoded, resized and taken apart by OpenCV or, on a board without it, by Pillow and numpy.

`resized_by_numpy` gives the pixels of OpenCV's own `resize`, to the bit. What Pillow decodes is the same as with
OpenCV for most files, but depends on the versions of the decoders in both: whoever measures compares the two
(`benchmarks.boards.preparation`).
"""

from __future__ import annotations

import functools
import io
from typing import Any, Tuple

import numpy as np

from deploy.errors import MissingDependencyError

try:
    import cv2 as _cv2

    cv2: Any = _cv2
except ImportError:
    cv2 = None

WEIGHT_BITS = 11
"""Of the weights with which OpenCV mixes neighbouring pixels (INTER_RESIZE_COEF_BITS of its resize.cpp)."""


def library() -> str:
    """
    What decodes and resizes here, with its version: "OpenCV 4.11.0", "Pillow 10.2.0 and numpy 1.26.4".

    Raises:
        MissingDependencyError: there is neither.
    """
    return (
        f"OpenCV {cv2.__version__}" if cv2 is not None else f"Pillow {_pillow().__version__} and numpy {np.__version__}"
    )


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            "opencv-python-headless",
            "reading images, or Pillow in its place,",
            "pip install opencv-python-headless (apt install python3-opencv), or pip install Pillow",
        ) from error
    PIL.Image.MAX_IMAGE_PIXELS = None  # the size was compared before: LARGEST_IMAGE_PX
    return PIL


def decoded(content: np.ndarray, any_depth: bool = False) -> np.ndarray:
    """
    The picture of an image file: (height, width, 3), uint8, blue-green-red, turned as its EXIF orientation says.

    Args:
        content: the bytes of the file, as an array of uint8.
        any_depth: leave 16 bits as they are, which OpenCV alone can.

    Raises:
        ValueError: it cannot be decoded; the message says by what, and why where that is known.
        MissingDependencyError: there is neither OpenCV nor Pillow.
    """
    if cv2 is None:
        return decoded_by_pillow(content)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR | (cv2.IMREAD_ANYDEPTH if any_depth else 0))
    except cv2.error as error:  # a size beyond OpenCV's limits, for one
        raise ValueError(f"OpenCV cannot decode the image: {' '.join(str(error).split())}") from error
    if image is None:
        raise ValueError("OpenCV cannot decode the image")
    return image


def decoded_by_pillow(content: np.ndarray) -> np.ndarray:
    """As `decoded`: grey is repeated, alpha is dropped, of 16 bits the upper 8 are left."""
    pillow = _pillow()
    try:
        with pillow.Image.open(io.BytesIO(content.tobytes())) as image:
            shown = pillow.ImageOps.exif_transpose(image)
            if shown.mode.startswith("I"):  # grey of 16 bits
                grey = (np.asarray(shown) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.ascontiguousarray(np.asarray(shown.convert("RGB"))[..., ::-1])
    except Exception as error:  # Pillow raises a dozen types, and its decoders others
        what = f"Pillow {pillow.__version__} cannot decode the image"
        raise ValueError(f"{what}: {type(error).__name__}") from error


def resized(image: np.ndarray, wh_px: Tuple[int, int]) -> np.ndarray:
    """The image (height, width, 3), uint8, in another size, bilinear, as OpenCV does it."""
    if cv2 is None:
        return resized_by_numpy(image, wh_px)
    return cv2.resize(image, wh_px, interpolation=cv2.INTER_LINEAR)


def resized_by_numpy(image: np.ndarray, wh_px: Tuple[int, int]) -> np.ndarray:
    """
    What `cv2.resize(image, wh_px, interpolation=cv2.INTER_LINEAR)` gives of uint8, to the bit.

    In integers, as OpenCV's resize.cpp: weights of WEIGHT_BITS bits along x; along y sums are cut to 16 bits before
    they are mixed. Half the size, along both, is the mean of four pixels.
    """
    height, width = image.shape[:2]
    if (width, height) == wh_px:
        return image.copy()
    if (width, height) == (2 * wh_px[0], 2 * wh_px[1]):
        four = image.astype(np.uint16)
        return ((four[::2, ::2] + four[1::2, ::2] + four[::2, 1::2] + four[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    left, right, weights_x = _neighbours(width, wh_px[0], clip_weights=True)
    above, below, weights_y = _neighbours(height, wh_px[1], clip_weights=False)
    rows, places = np.unique(np.concatenate([above, below]), return_inverse=True)
    lines = image[rows].astype(np.int32)
    mixed = lines[:, left] * weights_x[0][:, None] + lines[:, right] * weights_x[1][:, None]
    mixed >>= 4
    upper, lower = mixed[places[: len(above)]], mixed[places[len(above) :]]
    upper *= weights_y[0][:, None, None]
    lower *= weights_y[1][:, None, None]
    upper >>= 16
    lower >>= 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _neighbours(size: int, to_size: int, clip_weights: bool) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Of each new place along one side: the indices of the two old pixels beside it, and (2, to_size) their weights.

    Args:
        clip_weights: beyond the edge give all weight to the pixel there, as OpenCV does along x.
    """
    scale = 1.0 / (to_size / size)
    places = ((np.arange(to_size) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(places).astype(np.int64)
    part = places - first.astype(np.float32)
    if clip_weights:
        part[(first < 0) | (first >= size - 1)] = 0
        first = np.clip(first, 0, size - 1)
    weights = np.stack([np.float32(1) - part, part]) * np.float32(1 << WEIGHT_BITS)
    inside = np.clip(np.stack([first, first + 1]), 0, size - 1)
    return inside[0], inside[1], np.rint(weights).astype(np.int32)


def rgb_from_bgr(image: np.ndarray) -> np.ndarray:
    """An image (height, width, 3) with its first and last channel exchanged."""
    return image[..., ::-1] if cv2 is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def channel(image: np.ndarray, index: int) -> np.ndarray:
    """One of the channels of an image (height, width, 3)."""
    return image[..., index] if cv2 is None else cv2.extractChannel(image, index)
