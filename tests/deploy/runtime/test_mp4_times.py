"""The times of frames in an MP4 file that OpenCV wrote."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from deploy.runtime.mp4_times import write_frame_times


def _written(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (64, 48))
    for index in range(frames):
        writer.write(np.full((48, 64, 3), 20 * index, np.uint8))
    writer.release()
    return path


def _read(path: Path) -> list[tuple[float, int]]:
    """(time in s, grey) of each frame."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = capture.read()
        if not there:
            return frames
        frames.append((round(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, 4), round(float(frame.mean()) / 20)))


@pytest.mark.parametrize(
    "times_s",
    [[0.0], [0.0, 0.001], [0.0, 0.0334, 0.5, 0.5333, 7.0], [0.0, 3600.0, 86400.5]],
    ids=["one", "two", "variable", "a day"],
)
def test_frames_are_shown_at_the_times_that_are_written(tmp_path: Path, times_s: list[float]) -> None:
    path = _written(tmp_path / "x.mp4", len(times_s))
    before = path.stat().st_size
    assert write_frame_times(path, [5.0 + time for time in times_s])
    assert _read(path) == [(time, index) for index, time in enumerate(times_s)]
    assert abs(path.stat().st_size - before) < 200


def test_a_file_of_another_layout_is_left_as_it_is(tmp_path: Path) -> None:
    path = _written(tmp_path / "x.mp4", 3)
    content = path.read_bytes()
    others = [content + b"\0\0\0\x08free", content[:-9], b"RIFF" + bytes(40), content.replace(b"stsz", b"ctts")]
    for other in others:
        path.write_bytes(other)
        assert not write_frame_times(path, [0.0, 1.0, 1.5])
        assert path.read_bytes() == other
