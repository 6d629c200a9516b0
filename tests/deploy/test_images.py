"""Headers and pixels of image files, of every format that OpenCV writes here."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from deploy import images
from deploy.errors import DataError
from deploy.images import read_header, read_image, shown_size_px, used_bits

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
FORMATS = {
    "jpg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WebP", "tif": "TIFF", "jp2": "JPEG 2000", "gif": "GIF",
    "ppm": "",
}  # fmt: skip
"""Suffix -> the format that a header names; empty: one that only OpenCV knows."""


def _written(path: Path, pixels: np.ndarray = PIXELS) -> Path:
    if not cv2.haveImageWriter(str(path)):
        pytest.skip(f"this OpenCV writes no {path.suffix}")
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_and_its_header_has_the_size(tmp_path: Path, suffix: str) -> None:
    path = _written(tmp_path / f"a.{suffix}")
    header = read_header(path)
    assert (header.format, header.width_px, header.height_px, header.fault) == (FORMATS[suffix], 60, 40, "")
    assert read_image(path).shape == (40, 60, 3)
    assert shown_size_px(path, header) == (60, 40)


@pytest.mark.parametrize("suffix", [suffix for suffix, name in FORMATS.items() if name])
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_a_file_that_was_cut_is_told_by_its_header(tmp_path: Path, suffix: str, left: float) -> None:
    path = _written(tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    fault = read_header(path).fault
    assert fault.startswith(f"a truncated {FORMATS[suffix]}") or suffix == "gif"  # any byte may be its trailer
    if suffix != "gif":
        with pytest.raises(DataError, match="truncated"):
            read_image(path)


def _exif(orientation: int) -> bytes:
    """A TIFF header and one entry: tag 0x112, type SHORT, count 1."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)


def _with_orientation(path: Path, orientation: int) -> None:
    content, exif = path.read_bytes(), _exif(orientation)
    if path.suffix == ".jpg":
        block = b"Exif\0\0" + exif
        content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]
    else:  # PNG: a chunk after IHDR
        chunk = b"eXIf" + exif
        content = (
            content[:33] + struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
        )
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_shown_size_is_that_of_the_pixels(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = _written(tmp_path / f"a.{suffix}")
    _with_orientation(path, orientation)
    header = read_header(path)
    assert (header.orientation, header.width_px, header.height_px) == (orientation, 60, 40)
    height, width = read_image(path).shape[:2]
    assert shown_size_px(path, header) == (width, height)
    if suffix == "jpg":
        assert (width, height) == ((40, 60) if orientation > 4 else (60, 40))


def test_a_header_behind_a_long_preview_is_found(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.jpg")
    content = path.read_bytes()
    filler = b"\xff\xe2" + struct.pack(">H", 65_000) + bytes(64_998)
    path.write_bytes(content[:2] + 3 * filler + content[2:])
    assert (read_header(path).width_px, read_header(path).height_px) == (60, 40)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_twelve_bits_in_sixteen_are_counted_and_told_once(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_told_of_empty_bits", False)
    path = _written(tmp_path / f"a.{suffix}", PIXELS.astype(np.uint16) * 16)
    assert (read_header(path).bits, used_bits(path)) == (16, 12)
    assert read_image(path).max() <= 16
    read_image(path)
    told = capsys.readouterr().err
    assert told.count("uses 12 of its 16 bits") == 1
    assert str(path) in told
    assert "Multiply the values by 16" in told


def test_sixteen_full_bits_are_read_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path / "a.png", PIXELS.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), PIXELS)
    assert capsys.readouterr().err == ""


def test_a_format_that_this_opencv_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _written(tmp_path / "a.webp")
    monkeypatch.setattr(images, "_built_in", {"WebP": False})
    with pytest.raises(DataError, match=r"a\.webp: OpenCV .* was built without WebP"):
        read_image(path)


def test_a_file_of_no_pixels_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff\xd9")
    assert "without a size" in read_header(path).fault
    path.write_bytes(b"RIFF" + bytes(40))
    assert "not an image" in read_header(path).fault
