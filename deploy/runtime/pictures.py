"""What a detector sees in images, videos and streams: drawn, and as COCO results. numpy and OpenCV."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional

import cv2
import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ContractError, DataError, Ended, Interruption, PipelineError, fault_of_storage
from deploy.files import replacing
from deploy.images import read_image
from deploy.progress import progress
from deploy.runtime.draw import draw
from deploy.runtime.postprocess import Detections
from deploy.runtime.sources import PictureOptions, PictureSource
from deploy.runtime.video import (
    FrameClock,
    VideoFile,
    fault_of_frame,
    fault_of_silence,
    frames_from,
    open_capture,
    read_frame,
)

Detect = Callable[[np.ndarray], Detections]
"""(height, width, 3) uint8, blue-green-red -> what is in it."""
COUNT_TOLERANCE = 0.02
"""Containers without an index estimate their number of frames: so much less is no fault."""
NAMED = 5
"""Sources named in the message at the end."""
PRESENT = {"camera": "plugged in", "stream": "sent", "pipeline": "running"}
"""Kind of a source that has no end -> what it may be no longer."""


class ResultsFile:
    """
    COCO results in a file that is whole JSON after each picture, so that none of them is kept in memory.

    A context manager.

    Args:
        path: what is written.
        target: what it is called in messages.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self._target = target
        self._file = path.open("wb", buffering=0)
        self._file.write(b"[]\n")
        self._length = 1
        self.pictures = self.count = 0
        """How many pictures and detections there are so far."""

    def add(self, rows: List[Dict[str, Any]]) -> None:
        """
        Adds the rows of one picture.

        Raises:
            PipelineError: the disk is full. The file is as it was before.
        """
        if rows:
            text = f"{',' if self.count else ''}\n{json.dumps(rows, allow_nan=False)[1:-1]}".encode()
            try:
                self._end_with(text)
            except OSError as error:
                self._file.truncate(self._length)
                self._end_with(b"")
                raise PipelineError(f"cannot write {self._target}: {fault_of_storage(error) or error}") from error
            self._length += len(text)
        self.pictures += 1
        self.count += len(rows)

    def _end_with(self, content: bytes) -> None:
        self._file.seek(self._length)
        content += b"\n]\n"
        while content:
            content = content[self._file.write(content) :]

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_error: Any) -> None:
        self._file.close()


class _NothingSeen(Exception):
    pass


def detect_in_pictures(detect: Detect, contract: ModelContract, options: PictureOptions) -> None:
    """
    Draws what is seen in each source, writes the results, and prints how many there are.

    Ctrl-C ends a camera or a stream; elsewhere, and with SIGTERM, it ends all. What was seen up to then is kept.

    Args:
        detect: already drops what is below the score threshold.

    Raises:
        DataError: a source cannot be read, or not to its end; everything else is kept.
        ContractError: what the model gave for a picture cannot be detections; what came before is kept.
        PipelineError: a file cannot be written.
        Ended: by a signal.
    """
    ended: Optional[BaseException] = None
    faults: List[str] = []
    with contextlib.suppress(_NothingSeen), Interruption() as interruption:
        with replacing(options.results_path) as temporary, ResultsFile(temporary, options.results_path) as results:
            try:
                _Work(detect, contract, results, interruption, faults).look_at(options.sources)
            except (PipelineError, Ended) as error:
                ended = error
            if not results.pictures:
                raise _NothingSeen
        print(
            f"{results.count} detections in {results.pictures} pictures, drawn in {options.output}; results in "
            f"{options.results_path}{'' if ended is None else ', of what was seen before the end'}"
        )
    more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    unread = (
        f"of {len(options.sources)} sources {len(faults)} could not be read to the end: "
        f"{'; '.join(faults[:NAMED])}{more}"
    )
    if faults and ended is None:
        raise DataError(unread)
    if faults:
        print(f"warning: {unread}", file=sys.stderr)
    if ended is not None:
        raise ended


@dataclasses.dataclass
class _Work:
    """One run over all sources."""

    detect: Detect
    contract: ModelContract
    results: ResultsFile
    interruption: Interruption
    faults: List[str]
    """One sentence for each source that could not be read, or not to its end."""

    def look_at(self, sources: Iterable[PictureSource]) -> None:
        """Images first. Raises PipelineError and Ended when it ends before the last."""
        images = [source for source in sources if source.kind == "image"]
        for source in progress(images, len(images), "images"):
            self._look_at_image(source)
            self.interruption.check()
        for source in sources:
            if source.kind != "image":
                self._look_at_video(source)
                self.interruption.check()

    def _look_at_image(self, source: PictureSource) -> None:
        try:
            image = read_image(str(source.opened_as))
        except DataError as error:
            self.faults.append(str(error))
            return
        drawn = self._drawn(image, file_name=source.name)
        try:
            encoded, content = cv2.imencode(source.target.suffix, drawn)
        except cv2.error:
            encoded = False
        if not encoded:
            height, width = image.shape[:2]
            raise PipelineError(f"OpenCV cannot write {source.target} of {width} x {height} pixels; give it as PNG")
        with replacing(source.target) as temporary:
            temporary.write_bytes(content.tobytes())

    def _look_at_video(self, source: PictureSource) -> None:
        capture = open_capture(source)
        try:
            first = read_frame(capture)
            fault = fault_of_silence(source) if first is None else fault_of_frame(first, first)
            if first is None or fault:
                self.faults.append(f"{source.name}: {fault}")
            else:
                self._look_at_frames(source, capture, first)
        finally:
            capture.release()

    def _look_at_frames(self, source: PictureSource, capture: cv2.VideoCapture, first: np.ndarray) -> None:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less where it is not known
        is_endless = source.kind != "video" and total <= 0
        clock = FrameClock(capture, is_endless)
        frames: Iterable[np.ndarray] = frames_from(capture, first)
        if is_endless:
            print(f"{source.name}: Ctrl-C ends it", file=sys.stderr)
        elif total > 0:
            frames = progress(frames, total, source.name)
        started, fault, ended = datetime.now(timezone.utc), "", None
        with replacing(source.target) as temporary:
            video = VideoFile(temporary, source.target, first.shape[1], first.shape[0], clock.rate)
            try:
                for index, frame in enumerate(frames):
                    fault = fault_of_frame(frame, first)
                    if fault:
                        break
                    time_s = clock.time_s()
                    drawn = self._drawn(frame, file_name=source.name, frame=index, time_s=round(time_s, 4))
                    video.write(drawn, time_s)
                    if self.interruption.number is not None:
                        break
            except PipelineError as error:
                ended = error
            if not video.frames and ended is not None:
                raise ended
            video.close()
        if is_endless:
            print(f"{source.name}: {video.frames} frames in {clock.last_s:.1f} s, from {started:%Y-%m-%dT%H:%M:%SZ} on")
        if clock.note():
            print(f"note: {source.name}: {clock.note()}", file=sys.stderr)
        if ended is not None:
            raise ended
        if fault:
            self.faults.append(f"{source.name} ends after {video.frames} frames: {fault}")
        elif self.interruption.number is not None:
            if is_endless and self.interruption.number == signal.SIGINT:
                self.interruption.number = None
        elif is_endless:
            self.faults.append(
                f"{source.name} gave no more after {video.frames} frames: is it still {PRESENT[source.kind]}?"
            )
        elif video.frames < total * (1 - COUNT_TOLERANCE):
            self.faults.append(f"{source.name} ends after {video.frames} of {total} frames: bring the file again")

    def _drawn(self, image: np.ndarray, **where: Any) -> np.ndarray:
        """The image with what is in it, which is also noted in the results under `where`."""
        try:
            found = self.detect(image)
        except ContractError as error:
            raise ContractError(f"{', '.join(f'{name} {value}' for name, value in where.items())}: {error}") from error
        image_id = self.results.pictures + 1
        self.results.add(
            [
                {
                    "image_id": image_id,
                    **where,
                    "category_id": self.contract.category_ids[label],
                    "bbox": box,
                    "score": score,
                }
                for box, score, label in found.rows()
            ]
        )
        return draw(image, found, self.contract.class_names)
