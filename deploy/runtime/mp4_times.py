"""
When each frame of an MP4 file is shown, written into its index: OpenCV's writer knows one rate for all.

The index (the box `moov`, ISO/IEC 14496-12) is the last part of a file as FFmpeg and GStreamer write it. It is written
anew; the frames before it stay where they are.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Sequence, Tuple

TICKS_PER_S = 10_000
"""Of the times that are written: a tenth of a millisecond. 32 bits of them are 119 hours."""
MOST_TICKS = 2**32 - 1
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
DURATION_AT = {b"mvhd": (16, 24), b"tkhd": (20, 28), b"mdhd": (16, 24)}
"""Box -> offset of its duration in version 0, where it has 4 bytes, and in version 1, where it has 8 (8.2.2, 8.3.2,
8.4.2). In two of them the time scale stands in the 4 bytes before it."""


def write_frame_times(path: Path, times_s: Sequence[float]) -> bool:
    """
    Has the frames of a file shown at these times, counted from the first; whether the file is one that allows it.

    Args:
        path: an MP4 file with one track, of video, without frames in an order other than that of their times.
        times_s: of each frame, increasing. The last one is shown as long as the one before it.
    """
    with path.open("r+b") as file:
        found = _last_box(file)
        if found is None or found[1][:4] != b"moov" or found[1].count(b"trak") != 1 or b"ctts" in found[1]:
            return False
        start, box = found
        ticks = [round((time - times_s[0]) * TICKS_PER_S) for time in times_s]
        steps = [after - before for before, after in zip(ticks, ticks[1:])]
        steps.append(steps[-1] if steps else TICKS_PER_S)
        scale = int.from_bytes(next(content for kind, content in _boxes(box[4:]) if kind == b"mvhd")[12:16], "big")
        file.seek(start)
        file.write(_rewritten(b"moov", box[4:], steps, scale))
        file.truncate()
    return True


def _last_box(file: BinaryIO) -> Optional[Tuple[int, bytes]]:
    """Where the last box starts, and its type and content; None where the boxes do not end with the file."""
    end = file.seek(0, 2)
    start, size = 0, 0
    while start + size < end:
        start += size
        file.seek(start)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:  # too large for 32 bits
            size = int.from_bytes(head[8:16], "big")
        if size < 8:
            return None
    if start + size != end:
        return None
    file.seek(start + 4)
    return start, file.read(size - 4)


def _boxes(content: bytes) -> Iterator[Tuple[bytes, bytes]]:
    """(type, content) of each box in a box."""
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position + 8 : position + size]
        position += max(8, size)


def _rewritten(kind: bytes, content: bytes, steps: Sequence[int], movie_scale: int) -> bytes:
    """A box with the durations of the frames, in ticks, wherever they play a part in it."""
    if kind in CONTAINERS:
        # edts says which part of a track is shown from when on: without it, all from the start
        content = b"".join(
            _rewritten(inner, its, steps, movie_scale) for inner, its in _boxes(content) if inner != b"edts"
        )
    elif kind in DURATION_AT:
        version = content[0]
        at, size = DURATION_AT[kind][version], 4 + 4 * version
        scale = TICKS_PER_S if kind == b"mdhd" else movie_scale
        duration = min(MOST_TICKS, sum(steps) * scale // TICKS_PER_S)
        before = content[:at] if kind == b"tkhd" else content[: at - 4] + scale.to_bytes(4, "big")
        content = before + duration.to_bytes(size, "big") + content[at + size :]
    elif kind == b"stts":  # time to sample, 8.6.1.2: runs of frames that are shown equally long
        runs = [(len(list(run)), step) for step, run in itertools.groupby(steps)]
        content = content[:4] + len(runs).to_bytes(4, "big")
        content += b"".join(count.to_bytes(4, "big") + min(MOST_TICKS, step).to_bytes(4, "big") for count, step in runs)
    return (8 + len(content)).to_bytes(4, "big") + kind + content
