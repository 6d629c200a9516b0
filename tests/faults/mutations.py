"""Damage to files, given by a `random.Random`: the same seed gives the same damage."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import struct
import zipfile
import zlib
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np

HOSTILE_TEXTS = (
    "", " ", "a\nb", "a\r\n\tb", "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\u202egpj", "\0", "é名🙂", "'\"`$(id)",
    "{{$HOME:x}}", "<script>alert(1)</script>", "]]>", "| a | b |", "../../x", "/dev/zero", "/dev/stdin",
    "~nobody-here/x", "-o", "%s%n{0}", "nan", "1e999", "A" * 5000, "\ud800", "CON", "x/../../y", "=1+1",
    "__import__('os')",
)  # fmt: skip
HOSTILE_NUMBERS = (
    0, -1, 1, 2, -5, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e38, 3.5e38, 1e300, -1e300, float("nan"), float("inf"),
    -float("inf"),
)  # fmt: skip
WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 2**64 - 1)
TOKENS = re.compile(r"\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'|[\w.+-]+|\s+|.", re.DOTALL)


def bytes_damaged(rng: random.Random, content: bytes) -> bytes:
    """One to six changes: bits, bytes, numbers, parts cut, doubled or moved, an end cut off."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not damaged:
            return rng.randbytes(rng.randrange(64))
        at, length = rng.randrange(len(damaged)), min(len(damaged), 1 << rng.randrange(12))
        kind = rng.randrange(8)
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
        elif kind == 2:
            size, order = rng.choice("BHIQ"), rng.choice("<>")
            number = struct.pack(order + size, rng.choice(WORDS) % (1 << 8 * struct.calcsize(size)))
            damaged[at : at + len(number)] = number
        elif kind == 3:
            del damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + length]
        elif kind == 5:
            other = rng.randrange(len(damaged))
            damaged[at : at + length] = damaged[other : other + length]
        elif kind == 6:
            damaged[at:at] = rng.randbytes(length)
        else:
            del damaged[at:]
    return bytes(damaged)


def text_damaged(rng: random.Random, text: str) -> str:
    """Words, strings and signs of a text replaced, cut, doubled or exchanged; at times its bytes."""
    if rng.random() < 0.15:
        return bytes_damaged(rng, text.encode()).decode("utf-8", "surrogateescape")
    parts = TOKENS.findall(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not parts:
            break
        at, kind = rng.randrange(len(parts)), rng.randrange(6)
        if kind <= 1:
            value = hostile_value(rng)
            shown = json.dumps(value) if rng.random() < 0.7 else str(value)
            parts[at] = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(shown, shown)
        elif kind == 2:
            del parts[at]
        elif kind == 3:
            parts[at:at] = parts[at : at + rng.randrange(1, 20)]
        elif kind == 4:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts.insert(at, rng.choice(("[", "]", "{", "}", "=", ",", "\n", '"', "'", "#", "[" * 2000, "9" * 5000)))
    return "".join(parts)


def hostile_value(rng: random.Random) -> Any:
    """A value that a JSON file can hold and that nobody expects."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(HOSTILE_TEXTS)
    if kind < 6:
        return rng.choice(HOSTILE_NUMBERS)
    if kind == 6:
        return rng.choice((None, True, False, [], {}, [None], {"": {}}))
    if kind == 7:
        value: Any = rng.choice((1, "x", None))
        for _ in range(rng.choice((2, 60, 400))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if kind == 8:
        return [rng.choice(HOSTILE_NUMBERS) for _ in range(rng.choice((1, 2, 4, 5, 1000)))]
    return {rng.choice(HOSTILE_TEXTS): rng.choice(HOSTILE_NUMBERS) for _ in range(3)}


def _places(value: Any, found: List[Tuple[Any, Any]], most: int = 4000) -> List[Tuple[Any, Any]]:
    """(container, key) of every value in nested lists and objects, the first `most` of them."""
    todo = [value]
    while todo and len(found) < most:
        part = todo.pop(0)
        keys: Sequence[Any] = list(part) if isinstance(part, dict) else range(len(part))
        for key in keys:
            found.append((part, key))
            if isinstance(part[key], (dict, list)):
                todo.append(part[key])
    return found


def value_damaged(rng: random.Random, document: Any) -> Any:
    """A copy of a JSON document in which one to three values are others, missing, doubled, renamed or exchanged."""
    damaged = [copy.deepcopy(document)]  # so that all of it has a place, too
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(damaged, [])
        # Each level alike: else the deepest, of which there are most, would be hit alone.
        container, key = rng.choice(places[: rng.choice((1, 12, 60, len(places)))] or places)
        value, kind = container[key], rng.randrange(9)
        if kind <= 3:
            container[key] = hostile_value(rng)
        elif kind == 4 and len(damaged) < len(places):
            del container[key]
        elif kind == 5:
            container[key] = [value] if rng.random() < 0.5 else {"a": value}
        elif kind == 6 and isinstance(value, list):
            container[key] = (
                value * rng.choice((0, 2, 50)) if rng.random() < 0.7 else value[: rng.randrange(len(value) + 1)]
            )
        elif kind == 7 and isinstance(container, dict):
            container[rng.choice(HOSTILE_TEXTS)] = container.pop(key)
        else:
            other_container, other = rng.choice(places)
            container[key] = copy.deepcopy(other_container[other]) if other_container is not container else value
        if not damaged:
            return None
    return damaged[0]


def json_text(rng: random.Random, document: Any) -> bytes:
    """A document as a file: at times in another encoding, cut, or of brackets and digits without an end."""
    kind = rng.randrange(60)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.8)
    encoded = text.encode("utf-8", "surrogatepass")
    if kind == 0:
        return ("[" * 100_000).encode()
    if kind == 1:
        return ('{"a":' * 20_000).encode()
    if kind == 2:
        return b"9" * 50_000
    if kind == 3:
        return text.encode("utf-16", "surrogatepass")
    if kind == 4:
        return b"\xef\xbb\xbf" + encoded
    if kind <= 7:
        return bytes_damaged(rng, encoded)
    return encoded


def json_damaged(rng: random.Random, content: bytes) -> bytes:
    """A JSON file whose values, or whose bytes, are damaged."""
    if rng.random() < 0.08:
        return bytes_damaged(rng, content)
    return json_text(rng, value_damaged(rng, json.loads(content)))


# Archives


def entries_of_zip(content: bytes) -> Dict[str, bytes]:
    """Name -> bytes of each entry."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of_entries(entries: Dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, entry in entries.items():
            archive.writestr(zipfile.ZipInfo(name or "x"), entry, method)
    return stream.getvalue()


def zip_damaged(rng: random.Random, content: bytes, of_entry: Callable[[random.Random, str, bytes], bytes]) -> bytes:
    """An archive with an entry damaged behind a right checksum, or missing, or under another name; or its own bytes."""
    if rng.random() < 0.25:
        return bytes_damaged(rng, content)
    entries = entries_of_zip(content)
    name = rng.choice(list(entries))
    kind = rng.random()
    if kind < 0.05:
        del entries[name]
    elif kind < 0.1:
        entries[rng.choice(("x.npy", "../x", "a/../b", name.upper()))] = entries.pop(name)
    else:
        entries[name] = of_entry(rng, name, entries[name])
    return zip_of_entries(entries, zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED)


def npy_damaged(rng: random.Random, name: str, content: bytes) -> bytes:
    """An array with other values, another type or shape; its header, where it is a text of JSON; or its bytes."""
    if rng.random() < 0.2:
        return bytes_damaged(rng, content)
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.dtype.kind == "U":
        array = np.array(json_damaged(rng, str(array).encode()).decode("utf-8", "replace"))
    else:
        array = _array_damaged(rng, array)
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _array_damaged(rng: random.Random, array: np.ndarray) -> np.ndarray:
    kind = rng.randrange(6)
    if kind <= 2 and array.size:
        array = array.copy()
        number = rng.choice([n for n in HOSTILE_NUMBERS if abs(n) < 2**63 or n != n or abs(n) in (1e300, float("inf"))])
        with np.errstate(all="ignore"):
            array.flat[rng.randrange(array.size)] = np.array(number, object).astype(np.float64).astype(array.dtype)
        return array
    if kind == 3:
        with np.errstate(all="ignore"):
            return array.astype(rng.choice("?bBhHiIqQefdFSU"))
    if kind == 4 and array.ndim:
        return array[: rng.randrange(len(array) + 1)] if rng.random() < 0.5 else np.concatenate([array, array])
    return array.reshape(-1) if rng.random() < 0.5 else array[None]


# Images


def image_damaged(rng: random.Random, content: bytes) -> bytes:
    """An image file whose bytes, most often those of its header, are damaged; a PNG with right checksums."""
    if content.startswith(b"\x89PNG") and rng.random() < 0.5:
        header = bytearray(content[16:29])
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.5:
                at = rng.choice((0, 4))
                header[at : at + 4] = struct.pack(
                    ">I", rng.choice((0, 1, 64, 16384, 40000, 65535, 2**24, 2**31 - 1, 2**31))
                )
            else:
                header[rng.randrange(8, 13)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunk = b"IHDR" + bytes(header)
        return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    if rng.random() < 0.6:
        return bytes_damaged(rng, content[:256]) + content[256:]
    return bytes_damaged(rng, content)


# ONNX


def onnx_damaged(rng: random.Random, content: bytes) -> bytes:
    """A model with one to three fields of its messages changed, doubled or missing; at times its bytes."""
    import onnx

    if rng.random() < 0.15:
        return bytes_damaged(rng, content)
    model = onnx.load_from_string(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _damage_message(rng, model)
    return bytes(model.SerializeToString())


def _damage_message(rng: random.Random, message: Any) -> None:
    """Changes one field of the message or of one inside it, in place."""
    while True:
        fields = message.ListFields()
        inner = [(field, value) for field, value in fields if field.message_type is not None and len(fields)]
        if not inner or rng.random() < 0.3:
            break
        field, value = rng.choice(inner)
        if _is_repeated(field) and rng.random() < 0.15:
            _damage_list(rng, value)
            return
        message = rng.choice(list(value)) if _is_repeated(field) else value
    plain = [field for field in message.DESCRIPTOR.fields if field.message_type is None]
    there = [field for field, _ in message.ListFields() if field.message_type is None]
    if not plain:
        return
    field = rng.choice(there if there and rng.random() < 0.8 else plain)
    value = _value_of_field(rng, field)
    if _is_repeated(field):
        values = getattr(message, field.name)
        if len(values) and rng.random() < 0.7:
            values[rng.randrange(len(values))] = value
        else:
            values.append(value)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, value)


def _is_repeated(field: Any) -> bool:
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def _damage_list(rng: random.Random, values: Any) -> None:
    at, kind = rng.randrange(len(values)), rng.randrange(3)
    if kind == 0:
        del values[at]
    elif kind == 1:
        values.add().CopyFrom(values[at])
    else:
        kept = copy.deepcopy(values[rng.randrange(len(values))])
        values[at].CopyFrom(kept)


def _value_of_field(rng: random.Random, field: Any) -> Any:
    if field.type in (field.TYPE_STRING,):
        texts = [text for text in HOSTILE_TEXTS if text != "\ud800"]
        return rng.choice([*texts, "Conv", "Identity", "QuantizeLinear", "Loop", "images", "boxes"])
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\0", b"x" * 4096, rng.randbytes(rng.randrange(1, 256)), b"reflect", b"\xff\xfe"))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e38, 1e-40, float("nan"), float("inf"), -float("inf"), 0.5))
    if field.type == field.TYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    most = 2**31 - 1 if field.type == field.TYPE_INT32 else 2**63 - 1
    return rng.choice((0, 1, 2, 3, 7, 16, 255, 65536, 2**31 - 1, most, -1, -2, -most - 1))
