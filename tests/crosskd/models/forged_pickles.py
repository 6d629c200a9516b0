"""
Reads random pickles, made of all that a checkpoint may ask for, while Python's audit hook watches: `FILE COUNT`.

Prints how many were read, how many were refused, and what was run, opened or imported; that must be nothing.
"""

from __future__ import annotations

import pickle
import random
import struct
import sys
from pathlib import Path
from typing import Any

import torch

from crosskd.models.allowed_globals import allowed_globals
from crosskd.models.checkpoint import read_checkpoint
from deploy.errors import CheckpointError

path = Path(sys.argv[1])
torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
read_checkpoint(path)
names = [name for _, name in allowed_globals()] + [
    "collections.OrderedDict",
    "collections.Counter",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "builtins.set",
    "builtins.bytearray",
    "builtins.complex",
    "_codecs.encode",
    "torch.Tensor",
]
refused = ["posix.system", "builtins.eval", "builtins.exec", "builtins.type", "subprocess.Popen", "os.system"]
draw = random.Random(0)


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def glob(name: str) -> bytes:
    return b"c%b\n%b\n" % tuple(part.encode() for part in name.rpartition(".")[::2])


def value(depth: int = 0) -> bytes:
    """The pickle of something, deep in a tree."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return text(draw.choice([f"touch {path}.ran", "f8", "O", "U3", "i4", "<", "latin1", "__class__", "min"]))
    if kind == 1:
        return b"K" + bytes([draw.randrange(256)])
    if kind == 2:
        return b"J" + struct.pack("<i", -draw.randrange(5))
    if kind in (3, 4):
        return glob(draw.choice(names))
    if kind == 5:
        return draw.choice([b"N", b")", b"]", b"}"])
    if kind == 6:
        return b"(" + b"".join(value(depth + 1) for _ in range(draw.randrange(6))) + b"t"
    if kind == 7:
        keys = draw.choice(["__class__", "__dict__", "__setstate__", "__reduce__", "dtype", "_statistics_methods", "a"])
        return b"}" + text(keys) + value(depth + 1) + b"s"
    return built(depth + 1)


def built(depth: int = 0) -> bytes:
    """The pickle of a call or an object, with a state or without."""
    arguments = b"(" + b"".join(value(depth) for _ in range(draw.randrange(4))) + b"t"
    made = glob(draw.choice(names)) + arguments + draw.choice([b"R", b"\x81"])
    if draw.random() < 0.6:
        made += draw.choice([value(depth), b"N" + value(depth) + b"\x86"]) + b"b"
    return made


events: list[tuple[str, str]] = []
watching = False
ran = ("os.", "subprocess.", "exec", "compile", "socket.", "ctypes.", "shutil.", "pty.", "import", "open", "code.")


def watch(event: str, arguments: Any) -> None:
    if watching and event.startswith(ran):
        if event == "open" and str(arguments[0]) == str(path):
            return
        if event in ("open", "os.listdir", "import") and "encodings" in repr(arguments) + repr(sys._getframe(1).f_code):
            return
        events.append((event, repr(arguments)[:200]))


sys.addaudithook(watch)
read = errors = 0
for number in range(int(sys.argv[2])):
    content = b"\x80\x02" + (built() if number % 10 else glob(draw.choice(refused)) + text("1") + b"\x85R") + b"."
    header = b"".join(
        pickle.dumps(part, 2)
        for part in (
            torch.serialization.MAGIC_NUMBER,
            torch.serialization.PROTOCOL_VERSION,
            {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
        )
    )
    path.write_bytes(header + b"\x80\x02}" + text("x") + content[2:-1] + b"s." + pickle.dumps([], 2))
    watching = True
    try:
        read_checkpoint(path)
        read += 1
        assert number % 10
    except CheckpointError:
        errors += 1
    finally:
        watching = False
print(read, errors, events[:3])
assert not events
