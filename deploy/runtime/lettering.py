"""
Letters beyond ASCII, which OpenCV's own letters lack, by Pillow and a font of this machine.

Where there is no Pillow or no font with a letter, a question mark stands for it, and that is said once.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Set, Tuple

import numpy as np

FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/System/Library/Fonts",
    "/Library/Fonts",
)  # fmt: skip
FONT_SUFFIXES = (".ttf", ".otf", ".ttc")
ORNATE = ("bold", "italic", "oblique", "mono", "serif", "condensed", "narrow", "light", "thin", "black", "symbol")
"""Words in the names of fonts that are taken last."""
CAPITAL = 0.7
"""Height of a capital letter, of that of the line of a font."""
UNASSIGNED = "\U0010fffe"
"""No font has it: it is drawn as the sign for what a font lacks."""
SAMPLE_PX = 24

Font = Any
"""Pillow's FreeTypeFont."""
FontOfSize = Callable[[int], Font]


def letters_mask(text: str, class_names: Tuple[str, ...], letter_px: float) -> Optional[np.ndarray]:
    """
    (height, width), uint8: how much ink is where; None where nothing here can draw letters beyond ASCII.

    Args:
        class_names: all that may be drawn, for which the font is chosen once.
        letter_px: height of a capital letter.
    """
    font_of_size, lacking = _font_for(class_names)
    if font_of_size is None:
        return None
    font = _sized(font_of_size, max(1, round(letter_px / CAPITAL)))
    return _ink(font, "".join("?" if letter in lacking else letter for letter in text))


@functools.lru_cache(maxsize=4)
def _sized(font_of_size: FontOfSize, size_px: int) -> Font:
    return font_of_size(size_px)


def _ink(font: Font, text: str) -> np.ndarray:
    from PIL import Image, ImageDraw

    height = sum(font.getmetrics())
    width = font.getmask(text).size[0]
    picture = Image.new("L", (width + height // 4, height))
    ImageDraw.Draw(picture).text((height // 8, 0), text, fill=255, font=font)
    return np.asarray(picture)


@functools.lru_cache(maxsize=4)
def _font_for(class_names: Tuple[str, ...]) -> Tuple[Optional[FontOfSize], Set[str]]:
    """The font that has most letters of the names, and those that it lacks; says so where any are lacking."""
    letters = {letter for name in class_names for letter in name if not letter.isascii()}
    try:
        import PIL  # noqa: F401
    except ImportError:
        _tell("to draw them Pillow is needed: pip install pillow")
        return None, letters
    best: Optional[FontOfSize] = None
    lacking = set(letters)
    for font_of_size in _fonts():
        missing = _missing(font_of_size, letters)
        if len(missing) < len(lacking):
            best, lacking = font_of_size, missing
        if not lacking:
            return best, lacking
    some = " ".join(sorted(lacking)[:10])
    _tell(f"no font here has {some}: install one (apt install fonts-noto-core fonts-noto-cjk)")
    return best, lacking


def _tell(reason: str) -> None:
    print(f"note: letters of class names are drawn as question marks; {reason}", file=sys.stderr)


def _fonts() -> Iterator[FontOfSize]:
    """The fonts of this machine, plain ones first."""
    from PIL import ImageFont

    files = [
        Path(folder, name)
        for top in FONT_FOLDERS
        for folder, _, names in os.walk(os.path.expanduser(top))
        for name in names
        if name.lower().endswith(FONT_SUFFIXES)
    ]
    for file in sorted(files, key=lambda file: (any(word in file.name.lower() for word in ORNATE), file.name)):
        yield functools.partial(ImageFont.truetype, str(file))


def _missing(font_of_size: FontOfSize, letters: Set[str]) -> Set[str]:
    try:
        font = font_of_size(SAMPLE_PX)
        lacking = _ink(font, UNASSIGNED)
        return {letter for letter in letters if not letter.isspace() and _same(_ink(font, letter), lacking)}
    except (OSError, ValueError):  # a damaged font
        return letters


def _same(ink: np.ndarray, other: np.ndarray) -> bool:
    return not ink.any() or (ink.shape == other.shape and bool((ink == other).all()))
