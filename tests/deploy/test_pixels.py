"""What takes OpenCV's place on a board without it gives the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deploy import pixels
from deploy.errors import MissingDependencyError
from deploy.images import read_image

image_module = pytest.importorskip("PIL.Image")


def photo(height: int, width: int) -> np.ndarray:
    """Smooth shapes with noise, so that every value occurs."""
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + random.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (37, 53), (64, 64), (120, 201), (300, 480)])
@pytest.mark.parametrize("to_wh", [(1, 1), (32, 32), (64, 37), (240, 150), (333, 7), (320, 320)])
def test_numpy_resizes_as_opencv_does(size: tuple[int, int], to_wh: tuple[int, int]) -> None:
    image = photo(*size)
    assert np.array_equal(pixels.resized_by_numpy(image, to_wh), cv2.resize(image, to_wh))


def test_half_and_double() -> None:
    image = photo(60, 84)
    for to_wh in ((42, 30), (84, 60), (168, 120), (42, 60), (84, 30)):
        assert np.array_equal(pixels.resized_by_numpy(image, to_wh), cv2.resize(image, to_wh)), to_wh


def encoded(kind: str) -> bytes:
    image = photo(47, 61)
    if kind == "turned.jpg":
        stream = io.BytesIO()
        exif = image_module.Exif()
        exif[0x112] = 6
        image_module.fromarray(image).save(stream, "JPEG", exif=exif, quality=90)
        return stream.getvalue()
    if kind == "palette.png":
        stream = io.BytesIO()
        image_module.fromarray(image).quantize(17).save(stream, "PNG")
        return stream.getvalue()
    content: Any = {
        "grey.jpg": image[..., 0], "grey.png": image[..., 0], "grey16.png": image[..., 0].astype(np.uint16) * 257,
        "colour16.png": image.astype(np.uint16) * 255 + 200, "alpha.png": np.dstack([image, image[..., 0]]),
    }.get(kind, image)  # fmt: skip
    options = {"smooth.jpg": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420],
               "progressive.jpg": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]}  # fmt: skip
    good, array = cv2.imencode(Path(kind).suffix, content, options.get(kind, []))
    assert good
    return array.tobytes()


@pytest.mark.parametrize(
    "kind",
    [
        "colour.jpg", "smooth.jpg", "progressive.jpg", "grey.jpg", "turned.jpg", "colour.png", "grey.png", "grey16.png",
        "colour16.png", "alpha.png", "palette.png", "colour.bmp", "colour.tiff", "colour.webp",
    ],
)  # fmt: skip
def test_pillow_decodes_as_opencv_does(kind: str) -> None:
    content = np.frombuffer(encoded(kind), np.uint8)
    assert np.array_equal(pixels.decoded_by_pillow(content), cv2.imdecode(content, cv2.IMREAD_COLOR))


def test_a_board_without_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("turned.jpg"))
    expected = read_image(tmp_path / "a.jpg")
    for module in ("deploy.pixels", "deploy.images"):
        monkeypatch.setattr(f"{module}.cv2", None)
    assert pixels.library().startswith("Pillow ")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)
    with pytest.raises(ValueError, match=r"Pillow [\d.]+ cannot decode the image: UnidentifiedImageError"):
        pixels.decoded(np.zeros(64, np.uint8))
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match="reading images, or Pillow in its place"):
        pixels.decoded(np.zeros(64, np.uint8))
