"""
Image files: what their first bytes say, whether they end where they should, and their pixels. numpy and OpenCV only,
or Pillow in place of OpenCV (`deploy.pixels`).

JPEG, PNG, BMP, WebP, TIFF, JPEG 2000 and GIF (its first frame) are known here; whatever else OpenCV reads is decoded to
learn its size.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Tuple

import numpy as np

from deploy.errors import DataError
from deploy.files import AnyPath, check_regular, stands_in_for
from deploy.limits import LARGEST_IMAGE_PX, MOST_SEGMENTS
from deploy.pixels import cv2, decoded

HEAD_BYTES = 4096
"""Read at once from the beginning of a file: in most files all that is looked at, but for the end."""
TAIL_BYTES = 4096
"""The end of an image file is looked for in this many last bytes, so that checking a file costs two small reads."""
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the JPEG markers that a picture's size follows."""
EXIF_ORIENTATION, TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_COLOURS, TIFF_NUMBERS = (
    0x112, 0x100, 0x101, 0x102, 0x106, 0x153
)  # fmt: skip
"""Tags of a TIFF directory, which EXIF is too (TIFF 6.0; CIPA DC-008, 4.6.4)."""
TIFF_LOGARITHMS = (32844, 32845)
"""Of floating-point values, as OpenCV, too, writes those in colour (SGI LogLuv)."""
NO_SCALE = "of which nothing says which value is white; expected 8 or 16 bits. Write them anew as PNG"
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
ALWAYS_TURNED = ("JPEG", "TIFF")
"""Formats whose orientation every OpenCV applies; that of others depends on its version."""
KNOWN = "a JPEG, PNG, BMP, WebP, TIFF, JPEG 2000 or GIF, or another file that OpenCV reads"


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What an image file says of its picture."""

    format: str
    """'JPEG', 'PNG', ...; empty: none of those known here."""
    width_px: int = 0
    """As stored, before any turning by EXIF; 0: not found."""
    height_px: int = 0
    bits: int = 8
    """Of a channel."""
    orientation: int = 1
    """EXIF's, 1 to 8; 1: the picture is shown as it is stored."""
    fault: str = ""
    """What is wrong with the file, as far as can be told without decoding it."""


class _Bytes:
    """Random access to a file of which the first bytes are at hand."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.head = file.read(HEAD_BYTES)
        self.size = os.fstat(file.fileno()).st_size

    def at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, fewer at the end."""
        if offset + count <= len(self.head):
            return self.head[offset : offset + count]
        self._file.seek(offset)
        return self._file.read(count)

    def number(self, offset: int, count: int, order: str = "big") -> int:
        return _number(self.at(offset, count), order)

    def tail(self) -> bytes:
        return self.at(max(0, self.size - TAIL_BYTES), TAIL_BYTES)


def read_header(path: AnyPath) -> ImageHeader:
    """
    Format, size, depth and orientation of an image file, by two or a few small reads.

    Raises:
        OSError: it cannot be read.
    """
    check_regular(path)
    with Path(path).open("rb", buffering=0) as file:
        content = _Bytes(file)
        parse = next((parse for magic, parse in PARSERS.items() if content.head.startswith(magic)), None)
        if parse is None:
            return _other_header(path, content)
        header = parse(content)
    if not header.fault and not header.width_px * header.height_px:
        fault = f"not an image: OpenCV cannot decode it, a {header.format} without a size ({content.head[:8]!r}...)"
        return dataclasses.replace(header, fault=fault)
    most_px = LARGEST_IMAGE_PX * 8 // max(8, header.bits)
    if header.width_px * header.height_px > most_px:
        deep = f" of {header.bits} bits" if header.bits > 8 else ""
        fault = (
            f"the file says that it has {header.width_px} x {header.height_px} pixels; expected at most "
            f"{most_px / 1e6:.0f} megapixels{deep}. Scale it down or cut it into tiles"
        )
        return dataclasses.replace(header, fault=fault)
    if not header.fault and header.format not in ("JPEG", "PNG", "BMP") and not _is_built_in(header.format, path):
        return dataclasses.replace(header, fault=f"OpenCV {cv2.__version__} was built without {header.format}")
    return header


def shown_size_px(path: AnyPath, header: ImageHeader) -> Tuple[int, int]:
    """
    Width and height of the picture as `read_image` gives it: turned as its EXIF orientation says.

    Raises:
        DataError: the picture must be decoded to tell, and cannot be.
    """
    if header.orientation not in QUARTER_TURNS:
        return header.width_px, header.height_px
    if header.format in ALWAYS_TURNED:
        return header.height_px, header.width_px
    height, width = read_image(path).shape[:2]
    return width, height


def read_image(path: AnyPath) -> np.ndarray:
    """
    (height, width, 3), uint8, blue-green-red, EXIF orientation applied.

    As mmcv's `imread` gives it: grey is repeated, alpha is dropped, of 16 bits the upper 8 are left. The first picture
    of 16 bits whose upper ones are empty, and which is almost black by that, is named on stderr.

    Raises:
        DataError: the file is missing, truncated, not an image, or too large (LARGEST_IMAGE_PX).
    """
    try:
        header = read_header(path)
        content = np.fromfile(str(path), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read the image {path} ({error.strerror})") from error
    if header.fault:
        raise DataError(f"{path}: {header.fault}")
    if header.bits == 16 and cv2 is not None and not _told_of_empty_bits:
        _tell_of_empty_bits(str(path), used_bits(path))  # before there are other pixels in memory
    return _decoded(path, content)


def moves(path: AnyPath) -> bool:
    """Whether a picture, such as a GIF, has several frames, or this OpenCV cannot tell."""
    return not hasattr(cv2, "imcount") or cv2.imcount(str(path)) != 1


def used_bits(path: AnyPath) -> int:
    """
    How many bits the largest value of a picture needs: 12 where a camera's 12 bits lie in a file of 16.

    Raises:
        DataError: as `read_image`.
    """
    return int(_decoded(path, np.fromfile(str(path), np.uint8), any_depth=True).max()).bit_length()


_told_of_empty_bits = False


def _tell_of_empty_bits(path: str, bits: int) -> None:
    global _told_of_empty_bits
    if bits < 16:
        _told_of_empty_bits = True
        print(f"warning: {path} {words_of_empty_bits(bits)}. Others of the kind are not named", file=sys.stderr)


def words_of_empty_bits(bits: int) -> str:
    """What to know and to do of pictures of 16 bits that use only the lower `bits`."""
    return (
        f"uses {bits} of its 16 bits, and of 16 the upper 8 are taken: it is at most {100 * 2**bits // 2**16} % as "
        f"bright as it can be. Multiply the values by {2 ** (16 - bits)}, or write images of 8 bits"
    )


def _decoded(path: AnyPath, content: np.ndarray, any_depth: bool = False) -> np.ndarray:
    try:
        return decoded(content, any_depth)
    except ValueError as error:
        known = "" if ": " in str(error) else f": it is damaged, or not {KNOWN}"
        raise DataError(f"{path}: {error}{known}") from error


def _number(content: bytes, order: str = "big") -> int:
    return int.from_bytes(content, "big" if order == "big" else "little")


def _jpeg(content: _Bytes) -> ImageHeader:
    """Markers and segments: ITU-T T.81, annex B."""
    width, height, bits, orientation = 0, 0, 8, 1
    position, marker = 2, 0
    for _ in range(MOST_SEGMENTS):
        if marker == 0xDA:  # start of scan: image data from here on
            break
        segment = content.at(position, 10)
        if len(segment) < 4 or segment[0] != 0xFF:
            break
        marker = segment[1]
        if marker == 0xFF:  # any number of these may stand before a marker
            position += 1
            continue
        if marker == 0xE1 and segment[4:] == b"Exif\0\0":
            orientation = _directory(content, position + 10).get(EXIF_ORIENTATION, 1)
        if marker in FRAME_MARKERS:
            bits, height, width = segment[4], _number(segment[5:7]), _number(segment[7:9])
            break
        position += 2 + _number(segment[2:4])
    fault = ""
    # Phones append previews and films of any length to a JPEG: then the end is further ahead than the last bytes.
    if b"\xff\xd9" not in content.tail() and not _has_jpeg_end(content.at(0, content.size)):
        fault = "a truncated JPEG (it has no end-of-image marker)"
    return ImageHeader("JPEG", width, height, bits, _orientation(orientation), fault)


def _has_jpeg_end(content: bytes) -> bool:
    """Whether an end-of-image marker follows the image data. Those of thumbnails stand before it, in segments."""
    position, marker = 2, 0
    while marker != 0xDA:  # image data from here on, where 0xFF is followed by 0 or a restart marker
        if position + 4 > len(content) or content[position] != 0xFF:
            return False
        marker = content[position + 1]
        position += 2 + _number(content[position + 2 : position + 4])
    return b"\xff\xd9" in content[position:]


def _png(content: _Bytes) -> ImageHeader:
    """PNG specification, third edition: 11.2.1 IHDR, 11.3.3.5 eXIf."""
    fault = "" if b"IEND" in content.tail() else "a truncated PNG (it has no IEND chunk)"
    orientation, position = 1, 8
    for _ in range(100):  # chunks before the image data: a dozen at most in sound files
        kind = content.at(position + 4, 4)
        if kind == b"eXIf":
            orientation = _directory(content, position + 8).get(EXIF_ORIENTATION, 1)
        if len(kind) < 4 or kind in (b"eXIf", b"IDAT"):
            break
        position += 12 + content.number(position, 4)
    width, height = content.number(16, 4), content.number(20, 4)
    return ImageHeader("PNG", width, height, content.number(24, 1), _orientation(orientation), fault)


def _bmp(content: _Bytes) -> ImageHeader:
    """BITMAPINFOHEADER, and BITMAPCOREHEADER of 12 bytes. Negative heights stand for rows from top to bottom."""
    fault = "" if content.size >= content.number(2, 4, "little") else "a truncated BMP (its header says more)"
    side = 2 if content.at(14, 4) == b"\x0c\0\0\0" else 4
    width, height = (abs(int.from_bytes(content.at(offset, side), "little", signed=True)) for offset in (18, 18 + side))
    return ImageHeader("BMP", width, height, fault=fault)


def _webp(content: _Bytes) -> ImageHeader:
    """RFC 9649: RIFF header, then VP8 (RFC 6386, 9.1), VP8L or VP8X, whose other chunks follow it."""
    if content.at(8, 4) != b"WEBP":
        return ImageHeader("", fault=_not_an_image(content))
    fault = "" if content.size >= 8 + content.number(4, 4, "little") else "a truncated WebP (its header says more)"
    kind, orientation = content.at(12, 4), 1
    if kind == b"VP8X":
        width, height = 1 + content.number(24, 3, "little"), 1 + content.number(27, 3, "little")
        position = 30
        for _ in range(MOST_SEGMENTS):
            if not content.number(20, 1) & 0x08 or position + 8 > content.size:  # the flag that EXIF is there
                break
            length = content.number(position + 4, 4, "little")
            if content.at(position, 4) == b"EXIF":
                orientation = _directory(content, position + 8).get(EXIF_ORIENTATION, 1)
            position += 8 + length + length % 2
    elif kind == b"VP8L":
        packed = content.number(21, 4, "little")
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    else:
        width, height = content.number(26, 2, "little") & 0x3FFF, content.number(28, 2, "little") & 0x3FFF
    return ImageHeader("WebP", width, height, orientation=_orientation(orientation), fault=fault)


def _tiff(content: _Bytes) -> ImageHeader:
    """TIFF 6.0, section 2; the directory that is missing shows a file that was cut."""
    directory = _directory(content, 0)
    fault = "" if directory else "a truncated TIFF (its directory is missing)"
    width, height = directory.get(TIFF_WIDTH, 0), directory.get(TIFF_HEIGHT, 0)
    bits = directory.get(TIFF_BITS, 8)
    if bits > 16 or directory.get(TIFF_NUMBERS) == 3 or directory.get(TIFF_COLOURS) in TIFF_LOGARITHMS:
        fault = f"a TIFF of floating-point values or more than 16 bits, {NO_SCALE}"
    return ImageHeader("TIFF", width, height, bits, _orientation(directory.get(EXIF_ORIENTATION, 1)), fault)


def _jpeg2000(content: _Bytes) -> ImageHeader:
    """ISO/IEC 15444-1: boxes, annex I (jp2h > ihdr); a codestream alone begins with SIZ, A.5.1. Its end is EOC."""
    fault = "" if b"\xff\xd9" in content.tail() else "a truncated JPEG 2000 (it has no end-of-codestream marker)"
    if content.head.startswith(b"\xff\x4f"):
        x1, y1, x0, y0 = (content.number(8 + 4 * index, 4) for index in range(4))
        return ImageHeader("JPEG 2000", x1 - x0, y1 - y0, 1 + (content.number(42, 1) & 0x7F), fault=fault)
    position = 0
    for _ in range(MOST_SEGMENTS):
        if position + 8 > content.size:
            break
        length, kind = content.number(position, 4), content.at(position + 4, 4)
        if kind == b"ihdr":
            height, width, bits = (content.number(position + at, count) for at, count in ((8, 4), (12, 4), (18, 1)))
            return ImageHeader("JPEG 2000", width, height, 1 + (bits & 0x7F), fault=fault)
        if kind != b"jp2h" and length < 8:
            break
        position += 8 if kind == b"jp2h" else length  # a box of boxes is entered
    return ImageHeader("JPEG 2000", fault=fault)


def _gif(content: _Bytes) -> ImageHeader:
    """GIF89a, 18: the logical screen. The trailer is its last byte, but for what others append."""
    width, height = content.number(6, 2, "little"), content.number(8, 2, "little")
    fault = "" if b";" in content.tail() or not width else "a truncated GIF (it has no trailer)"
    return ImageHeader("GIF", width, height, fault=fault)


PARSERS: Dict[bytes, Callable[[_Bytes], ImageHeader]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"BM": _bmp,
    b"RIFF": _webp,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
    b"\0\0\0\x0cjP  \r\n\x87\n": _jpeg2000,
    b"\xff\x4f\xff\x51": _jpeg2000,
    b"GIF87a": _gif,
    b"GIF89a": _gif,
}
"""First bytes -> what reads the rest of the header."""


def _other_header(path: AnyPath, content: _Bytes) -> ImageHeader:
    """Of a format that is not known here: by decoding it, as it is shown."""
    if content.head[:3] in (b"PF\n", b"Pf\n"):
        return ImageHeader("", fault=f"a PFM of floating-point values, {NO_SCALE}")
    if not getattr(cv2, "haveImageReader", bool)(str(path)):  # asks OpenCV's decoders for their first bytes
        return ImageHeader("", fault=_not_an_image(content))
    try:
        image = _decoded(path, np.fromfile(str(path), np.uint8))
    except DataError as error:
        return ImageHeader("", fault=str(error).replace(f"{path}: ", "", 1))
    return ImageHeader("", image.shape[1], image.shape[0])


def _not_an_image(content: _Bytes) -> str:
    found = stands_in_for(content.head) or (f"it begins with {content.head[:8]!r}" if content.head else "it is empty")
    return f"not an image: {found}; expected {KNOWN}"


_built_in: Dict[str, bool] = {}


def _is_built_in(format: str, path: AnyPath) -> bool:
    """Whether this OpenCV has a decoder of the format, found by asking it of one file: GIF, for one, came with 4.11."""
    if format not in _built_in:
        _built_in[format] = cv2.haveImageReader(str(path)) if hasattr(cv2, "haveImageReader") else True
    return _built_in[format]


def _directory(content: _Bytes, start: int) -> Dict[int, int]:
    """
    Tag -> first value of the first directory of a TIFF structure; of short and long integers only.

    Args:
        start: of the structure in the file: 0 in a TIFF, behind the mark in a block of EXIF.
    """
    order = {b"II": "little", b"MM": "big"}.get(content.at(start, 2))
    if order is None:
        return {}
    position = start + content.number(start + 4, 4, order)
    found = {}
    for index in range(content.number(position, 2, order)):
        entry = content.at(position + 2 + 12 * index, 12)
        if len(entry) < 12:
            return {}
        tag, kind, count = (_number(entry[at:end], order) for at, end in ((0, 2), (2, 4), (4, 8)))
        size = {3: 2, 4: 4}.get(kind)
        if size is None:
            continue
        if count * size <= 4:
            found[tag] = _number(entry[8 : 8 + size], order)
        else:  # several values stand elsewhere
            found[tag] = content.number(start + _number(entry[8:12], order), size, order)
    return found


def _orientation(value: int) -> int:
    return value if 1 <= value <= 8 else 1
