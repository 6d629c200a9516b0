"""Videos and streams: opened, read frame by frame with the frames' times, and written. numpy and OpenCV."""

from __future__ import annotations

import array
import shutil
import sys
import time
from pathlib import Path
from typing import Iterator, Optional

import cv2
import numpy as np

from deploy.errors import PipelineError
from deploy.runtime.mp4_times import write_frame_times
from deploy.runtime.sources import EXPECTED, PictureSource

CODEC = int.from_bytes(b"mp4v", "little")
"""MPEG-4, which OpenCV's own FFmpeg can always write; its H.264 is not in the wheels of PyPI."""
FRAMES_PER_S = 30.0
"""Of the video that is written, where a camera or a file does not say its own."""
TIME_TOLERANCE_S = 0.002
"""Containers round the times of frames: those of a constant rate are so close to it."""
LATEST_S = 1e10
"""Of time stamps: those of some cameras are seconds since 1970."""
RESERVE_BYTES, INDEX_BYTES = 16 * 2**20, 32
"""Kept free on the disk so that a video can be ended, and so much more for each of its frames."""
FRAMES_BETWEEN_LOOKS = 50
"""At the room on the disk."""


def open_capture(source: PictureSource) -> cv2.VideoCapture:
    """What OpenCV makes of a video, camera or stream; it may be one that gives nothing."""
    if isinstance(source.opened_as, int):
        return cv2.VideoCapture(source.opened_as)
    if source.kind == "pipeline":
        return cv2.VideoCapture(str(source.opened_as), cv2.CAP_GSTREAMER)
    if source.kind == "stream" and _has_backend(cv2.CAP_FFMPEG):  # others would print the address, password and all
        return cv2.VideoCapture(str(source.opened_as), cv2.CAP_FFMPEG)
    return cv2.VideoCapture(str(source.opened_as))


def read_frame(capture: cv2.VideoCapture) -> Optional[np.ndarray]:
    """The next frame, or None: there is no more, or the stream is lost."""
    try:
        there, frame = capture.read()
    except cv2.error:
        return None
    return frame if there else None


def frames_from(capture: cv2.VideoCapture, first: np.ndarray) -> Iterator[np.ndarray]:
    """The first frame, which has been read, and all others."""
    frame: Optional[np.ndarray] = first
    while frame is not None:
        yield frame
        frame = read_frame(capture)


def fault_of_silence(source: PictureSource) -> str:
    """Why a source gives no frame at all, and what to do."""
    if source.kind == "pipeline" and not _has_backend(cv2.CAP_GSTREAMER):
        return (
            f"this OpenCV ({cv2.__version__}) was built without GStreamer, as those of PyPI are; use the system's "
            "(python3-opencv; that of JetPack has it), or an address such as rtsp://"
        )
    cure = {
        "camera": "a camera that no other program uses, see ls /dev/video*",
        "stream": "the address, with name and password if it asks for them, of a stream that runs",
        "pipeline": "one that runs in gst-launch-1.0, and ends in 'videoconvert ! video/x-raw,format=BGR ! appsink'",
    }.get(source.kind, EXPECTED)
    return f"OpenCV reads no frame from it; expected {cure}"


def fault_of_frame(frame: np.ndarray, first: np.ndarray) -> str:
    """Why a frame cannot be looked at after the first one of its source, and what to do; empty if it can."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        return (
            f"its frames are {frame.dtype}, {frame.shape}; expected uint8, (height, width, 3), blue-green-red. Let a "
            "pipeline end in 'videoconvert ! video/x-raw,format=BGR ! appsink'"
        )
    if frame.shape != first.shape:
        sizes = [f"{width} x {height}" for height, width in (first.shape[:2], frame.shape[:2])]
        return f"its frames change from {sizes[0]} to {sizes[1]} pixels; start again for those that follow"
    return ""


class FrameClock:
    """
    When the frames of a source were taken: by their own time stamps, where they have them.

    Args:
        is_endless: counted from the first frame, and by the time of arrival where there are no stamps. Else as the
            file says, and by its rate where it says nothing.
    """

    def __init__(self, capture: cv2.VideoCapture, is_endless: bool) -> None:
        self._capture, self._is_endless = capture, is_endless
        rate = capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 1 <= rate <= 1000 else FRAMES_PER_S  # where it is not known it is 0 or not a number
        self._frames = self._unstamped = 0
        self._start_s = self._arrived_s = 0.0
        self.last_s = 0.0
        """Of the last frame that `time_s` was asked for."""

    def time_s(self) -> float:
        """Of the frame that was just read."""
        stamp_s = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not abs(stamp_s) < LATEST_S:  # what OpenCV makes of none in some files
            stamp_s = 0.0
        if self._frames == 0:
            self._arrived_s = time.monotonic()
            self._start_s = stamp_s if self._is_endless else 0.0
            self.last_s = stamp_s - self._start_s
        elif stamp_s - self._start_s > self.last_s:
            self.last_s = stamp_s - self._start_s
        else:  # all are 0 where there are none
            self._unstamped += 1
            arrived_s = time.monotonic() - self._arrived_s
            self.last_s = max(self.last_s + 0.001, arrived_s) if self._is_endless else self.last_s + 1 / self.rate
        self._frames += 1
        return self.last_s

    def note(self) -> str:
        """What is to be known of the times; empty if all are the frames' own."""
        if not self._unstamped:
            return ""
        which = "no" if self._unstamped == self._frames - 1 else f"{self._frames - self._unstamped} of {self._frames}"
        stamps = "the times at which frames came" if self._is_endless else f"counted by {self.rate:g} frames per s"
        return f"{which} frames have a time stamp of their own: time_s is {stamps}"


class VideoFile:
    """
    A video that is written frame by frame.

    Args:
        path: what is written: MP4.
        target: what it is called in messages.
        rate: frames per second, if their times do not say otherwise.
    """

    def __init__(self, path: Path, target: Path, width_px: int, height_px: int, rate: float) -> None:
        self._path, self._target, self._rate = path, target, rate
        self._writer = cv2.VideoWriter(str(path), CODEC, rate, (width_px, height_px))
        self._times_s = array.array("d")

    @property
    def frames(self) -> int:
        """How many have been written."""
        return len(self._times_s)

    def write(self, picture: np.ndarray, time_s: float) -> None:
        """
        Adds a frame that is shown at `time_s`, which increases.

        Raises:
            PipelineError: the disk is almost full. What was written before can be closed.
        """
        if self.frames % FRAMES_BETWEEN_LOOKS == 0:
            free = shutil.disk_usage(self._path.parent).free
            if free < RESERVE_BYTES + INDEX_BYTES * self.frames:
                raise PipelineError(
                    f"cannot write {self._target} beyond {self.frames} frames: only {free / 2**20:.0f} MiB are free on "
                    "its disk. Free some space, or give another -o DIR"
                )
        self._writer.write(picture)
        self._times_s.append(time_s)

    def close(self) -> None:
        """Raises PipelineError unless all frames are there: OpenCV's writer says nothing of failures."""
        self._writer.release()
        times_s = np.frombuffer(self._times_s)
        regular_s = times_s[:1] + np.arange(len(times_s)) / self._rate
        is_regular = len(times_s) == 0 or np.abs(times_s - regular_s).max() <= TIME_TOLERANCE_S
        kept = is_regular or _frame_count(self._path) != len(times_s) or write_frame_times(self._path, times_s.tolist())
        found = _frame_count(self._path)
        if found != len(times_s):
            raise PipelineError(
                f"cannot write {self._target}: {found} of its {len(times_s)} frames are there. Is the disk full? "
                "(Sides below 2 pixels cannot be written at all.)"
            )
        if not kept:
            print(
                f"note: {self._target} plays at {self._rate:g} frames per s: this OpenCV writes files in which the "
                "times of frames cannot be set. They are in the results",
                file=sys.stderr,
            )


def _frame_count(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return found


def _has_backend(backend: int) -> bool:
    registry = getattr(cv2, "videoio_registry", None)
    return registry is None or not hasattr(registry, "hasBackend") or bool(registry.hasBackend(backend))
