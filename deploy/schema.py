"""
The structure that data of a file must have: one table of types for each kind of file, compared as the file is read.

Our own, not jsonschema: a board has numpy alone, and a table says in a line what takes JSON Schema five. Its kinds:

- `str`, `bool`, `int` (of 64 bits), `float` (a finite number, whole or not), `dict`, `list`, `object` (anything); None.
- `[kind]`: a list of such. `{"name": kind}`: an object with these keys; others may be there. `{str: kind}`: an object
  with any names; both together: what the others are. `(kind, other)`: one of them, most often `(kind, None)`.
- `Maybe`, `Number`, `Whole`, `Choice`, `Items`, `FileName`, `Matching`: as below.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional, Tuple, Type

from deploy.errors import PipelineError
from deploy.files import AnyPath, read_json

DEEPEST = 50
"""Levels of lists and objects in what has no table of its own; our files have five."""
_WORDS = {
    str: "a string", bool: "true or false", int: "a whole number", float: "a number", dict: "an object",
    list: "a list", object: "a value of few levels and finite numbers", None: "null",
}  # fmt: skip


class Maybe(NamedTuple):
    """Of a key: it may be missing."""

    kind: Any


class Number(NamedTuple):
    """A finite number between two, both included."""

    least: float = -sys.float_info.max
    most: float = sys.float_info.max


class Whole(NamedTuple):
    """A whole number between two, both included."""

    least: int = -(2**63)
    most: int = 2**63 - 1


class Choice(NamedTuple):
    """One of these strings."""

    names: Tuple[str, ...]


class Items(NamedTuple):
    """A list of so many entries of a kind."""

    kind: Any
    least: int = 1
    most: int = sys.maxsize


class FileName(NamedTuple):
    """The name of a file in the folder of the one that says it: not a path."""


class Matching(NamedTuple):
    """A string all of which a regular expression matches."""

    pattern: str
    what: str
    """Such a string, in words for a message."""


LINE = Matching(r"[^\x00-\x1f\x7f-\x9f]+", "a line of text")
"""Some text without line breaks and control characters."""


class Fault(NamedTuple):
    """What is not as its table says."""

    name: str
    """The keys that lead there, such as numbers.samples_ms.total[3]; empty for all of the file."""
    value: str
    expected: str


def check_content(value: Any, kind: Any, path: AnyPath, error_type: Type[PipelineError], advice: str = "") -> None:
    """
    Compares the content of `path` with its table.

    Args:
        advice: what to do about a file that does not fit, as a sentence.

    Raises:
        error_type: something is missing, or of another type or size; with file, key, what is there and was expected.
    """
    fault = fault_of(value, kind)
    if fault is not None:
        name = f"{fault.name} is {fault.value}" if fault.name else f"it holds {fault.value}"
        raise error_type(f"{path}: {name}; expected {fault.expected}. {advice}".rstrip())


def read_checked(path: AnyPath, kind: Any, error_type: Type[PipelineError], what: str, advice: str = "") -> Any:
    """
    The content of a JSON file, as its table says.

    Raises:
        error_type: it cannot be read, is not JSON (`what` says what it should have been) or not as the table says.
    """
    document = read_json(path, error_type, what)
    check_content(document, kind, path, error_type, advice or f"It should be {what}.")
    return document


def fault_of(value: Any, kind: Any, name: str = "") -> Optional[Fault]:
    """The first part of a value that is not of its kind, or None."""
    if isinstance(kind, tuple) and type(kind) is tuple:
        return _fault_of_choices(value, kind, name)
    if isinstance(kind, dict):
        return _fault_of_object(value, kind, name)
    if isinstance(kind, list):
        kind = Items(kind[0], 0)
    if isinstance(kind, Items):
        if not isinstance(value, list) or not kind.least <= len(value) <= kind.most:
            return Fault(name, short(value), words_of(kind))
        found = (fault_of(item, kind.kind, f"{name}[{index}]") for index, item in enumerate(value))
        return next((fault for fault in found if fault is not None), None)
    return None if _is_a(value, kind) else Fault(name, short(value), words_of(kind))


def _fault_of_choices(value: Any, kinds: Tuple[Any, ...], name: str) -> Optional[Fault]:
    faults = [fault_of(value, kind, name) for kind in kinds]
    if None in faults:
        return None
    inner = [fault for fault in faults if fault is not None and fault.name != name]  # of a list or object that is meant
    return inner[0] if inner else Fault(name, short(value), words_of(kinds))


def _fault_of_object(value: Any, kinds: Any, name: str) -> Optional[Fault]:
    if not isinstance(value, dict):
        return Fault(name, short(value), words_of(kinds))
    named = {key: kind for key, kind in kinds.items() if key is not str}
    others = dict.fromkeys(value, kinds[str]) if str in kinds else {}
    for key, kind in {**others, **named}.items():
        inner = f"{name}.{_shown(key)}" if name else _shown(key)
        if key not in value:
            if not isinstance(kind, Maybe):
                return Fault(inner, "missing", words_of(kind))
            continue
        if str in kinds and not _is_a(key, str):
            return Fault(name, f"an object with the key {short(key)}", "names that can be written")
        fault = fault_of(value[key], kind.kind if isinstance(kind, Maybe) else kind, inner)
        if fault is not None:
            return fault
    return None


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else short(key)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind in (int, float):
        kind = Whole() if kind is int else Number()
    if isinstance(kind, (Whole, Number)):
        numeric = type(value) is int or (isinstance(kind, Number) and type(value) is float and math.isfinite(value))
        return numeric and kind.least <= value <= kind.most
    if isinstance(kind, FileName):
        return _is_a(value, str) and value not in ("", ".", "..") and Path(value).name == value and "\0" not in value
    if isinstance(kind, Choice):
        return isinstance(value, str) and value in kind.names
    if isinstance(kind, Matching):
        return _is_a(value, str) and re.fullmatch(kind.pattern, value) is not None
    if kind is str:  # half of a surrogate pair, which JSON can hold, cannot be written again
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, kind) and _is_flat(value)


def _is_flat(value: Any) -> bool:
    """Whether a value has at most DEEPEST levels, numbers that are finite and text that can be written, throughout."""
    level = [value]
    for _ in range(DEEPEST):
        inner = []
        for part in level:
            if isinstance(part, dict):
                inner += [*part, *part.values()]
            elif isinstance(part, (list, tuple)):  # a document that never was a file has tuples
                inner += part
            elif not (part is None or isinstance(part, bool) or any(_is_a(part, kind) for kind in (str, float))):
                return False
        if not inner:
            return True
        level = inner
    return False


def words_of(kind: Any) -> str:
    """A kind, in words for a message."""
    kind = kind.kind if isinstance(kind, Maybe) else Items(kind[0], 0) if isinstance(kind, list) else kind
    if isinstance(kind, (Number, Whole)):
        what = "a number" if isinstance(kind, Number) else "a whole number"
        bounds = [
            f"{word} {bound:.6g}"
            for word, bound, default in zip(("at least", "at most"), kind, type(kind)())
            if bound != default
        ]
        return " ".join([what, " and ".join(bounds)]).rstrip()
    if isinstance(kind, Choice):
        return f"one of {', '.join(kind.names)}"
    if isinstance(kind, FileName):
        return "the name of a file beside it"
    if isinstance(kind, Matching):
        return kind.what
    if isinstance(kind, Items):
        most = " or more" if kind.most == sys.maxsize else f" to {kind.most}" if kind.most > kind.least else ""
        count = f" of {kind.least}{most}" if kind.least else ""
        return f"a list{count}, each {words_of(kind.kind)}"
    if isinstance(kind, dict):
        return f"an object, each {words_of(kind[str])}" if str in kind else f"an object with {', '.join(kind)}"
    if isinstance(kind, tuple):
        return " or ".join(map(words_of, kind))
    return _WORDS[kind]


def short(value: Any) -> str:
    """A value of a file as a message shows it: a line of at most 80 characters, whatever it holds."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
