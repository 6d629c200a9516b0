"""What a detector sees in images and videos: drawn, and as COCO results. numpy and OpenCV."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import cv2
import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ContractError, DataError, PipelineError
from deploy.files import replacing
from deploy.images import read_image
from deploy.progress import progress
from deploy.runtime.draw import draw
from deploy.runtime.postprocess import Detections
from deploy.runtime.sources import IMAGE_SUFFIXES, PictureOptions, PictureSource

Detect = Callable[[np.ndarray], Detections]
"""(height, width, 3) uint8, blue-green-red -> what is in it."""
CODEC = int.from_bytes(b"mp4v", "little")
"""MPEG-4, which OpenCV's own FFmpeg can always write; its H.264 is not in the wheels of PyPI."""
FRAMES_PER_S = 30.0
"""Of the video that is written, where a camera or a file does not say its own."""
COUNT_TOLERANCE = 0.02
"""Containers without an index estimate their number of frames: so much less is no fault."""
NAMED = 5
"""Sources named in the message at the end."""


@dataclasses.dataclass
class Seen:
    """What came out so far."""

    results: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: int = 0
    faults: List[str] = dataclasses.field(default_factory=list)
    """One sentence for each source that could not be read, or not to its end."""


def detect_in_pictures(detect: Detect, contract: ModelContract, options: PictureOptions) -> None:
    """
    Draws what is seen in each source, writes the results, and prints how many there are.

    Args:
        detect: already drops what is below the score threshold.

    Raises:
        DataError: a source cannot be read, or not to its end; everything else is kept.
        PipelineError: a file cannot be written.
    """
    images = [source for source in options.sources if source.is_image]
    seen = Seen()
    for source in progress(images, len(images), "images"):
        _detect_image(detect, contract, source, seen)
    for source in options.sources:
        if not source.is_image:
            _detect_video(detect, contract, source, seen)
    if seen.pictures:
        with replacing(options.results_path) as temporary:
            temporary.write_text(json.dumps(seen.results, allow_nan=False), encoding="utf-8")
        print(
            f"{len(seen.results)} detections in {seen.pictures} pictures, drawn in {options.output}; results in "
            f"{options.results_path}"
        )
    if seen.faults:
        more = f"; and {len(seen.faults) - NAMED} more" if len(seen.faults) > NAMED else ""
        raise DataError(
            f"of {len(options.sources)} sources {len(seen.faults)} could not be read to the end: "
            f"{'; '.join(seen.faults[:NAMED])}{more}"
        )


def _detect_image(detect: Detect, contract: ModelContract, source: PictureSource, seen: Seen) -> None:
    try:
        image = read_image(str(source.opened_as))
    except DataError as error:
        seen.faults.append(str(error))
        return
    encoded, content = cv2.imencode(source.target.suffix, _drawn(detect, contract, image, seen, file_name=source.name))
    if not encoded:
        raise PipelineError(f"OpenCV cannot write {source.target}")
    with replacing(source.target) as temporary:
        temporary.write_bytes(content.tobytes())


def _detect_video(detect: Detect, contract: ModelContract, source: PictureSource, seen: Seen) -> None:
    is_camera = isinstance(source.opened_as, int)
    capture = cv2.VideoCapture(source.opened_as if isinstance(source.opened_as, int) else str(source.opened_as))
    try:
        there, first = capture.read()
        if not there:
            expected = "a camera, see /dev/video*" if is_camera else f"a video, or {', '.join(IMAGE_SUFFIXES)}"
            seen.faults.append(f"{source.name}: OpenCV reads no frame from it; expected {expected}")
            return
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less where it is not known
        frames: Iterable[np.ndarray] = _frames(capture, first)
        if is_camera:
            print(f"{source.name}: Ctrl-C ends it", file=sys.stderr)
        elif total > 0:
            frames = progress(frames, total, source.name)
        drawn = (
            _drawn(detect, contract, frame, seen, file_name=source.name, frame=index)
            for index, frame in enumerate(frames)
        )
        with replacing(source.target) as temporary:
            count, stopped = _write_video(temporary, drawn, capture.get(cv2.CAP_PROP_FPS), may_be_stopped=is_camera)
            _check_frames(temporary, count, source.target)
    finally:
        capture.release()
    if is_camera and not stopped:
        seen.faults.append(f"{source.name} gave no more after {count} frames; is it still plugged in?")
    elif count < total * (1 - COUNT_TOLERANCE):
        seen.faults.append(f"{source.name} ends after {count} of {total} frames: bring the file again")


def _write_video(path: Path, pictures: Iterator[np.ndarray], rate: float, may_be_stopped: bool) -> Tuple[int, bool]:
    """How many pictures it took, of which there is one at least, and whether Ctrl-C ended it."""
    first = next(pictures)
    rate = rate if 1 <= rate <= 1000 else FRAMES_PER_S  # where it is not known it is 0 or not a number
    size = first.shape[1], first.shape[0]
    writer = cv2.VideoWriter(str(path), CODEC, rate, size)
    count = 0
    try:
        for picture in itertools.chain([first], pictures):
            writer.write(picture)
            count += 1
    except KeyboardInterrupt:
        if not may_be_stopped:
            raise
        return count, True
    finally:
        writer.release()
    return count, False


def _frames(capture: cv2.VideoCapture, first: np.ndarray) -> Iterator[np.ndarray]:
    there, frame = True, first
    while there:
        yield frame
        there, frame = capture.read()


def _drawn(detect: Detect, contract: ModelContract, image: np.ndarray, seen: Seen, **where: Any) -> np.ndarray:
    """The image with what is in it, which is also noted in `seen` under `where`."""
    try:
        found = detect(image)
    except ContractError as error:
        raise ContractError(f"{', '.join(f'{name} {value}' for name, value in where.items())}: {error}") from error
    seen.pictures += 1
    boxes_xywh = found.boxes_xyxy.astype(float)
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    for box, score, label in zip(boxes_xywh.tolist(), found.scores.tolist(), found.labels.tolist()):
        category = contract.category_ids[label]
        seen.results.append({"image_id": seen.pictures, **where, "category_id": category, "bbox": box, "score": score})
    return draw(image, found, contract.class_names)


def _check_frames(path: Path, count: int, target: Path) -> None:
    """Raises PipelineError unless the video at `path` has `count` frames: OpenCV's writer says nothing of failures."""
    capture = cv2.VideoCapture(str(path))
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if found != count:
        raise PipelineError(
            f"cannot write {target}: {found} of its {count} frames are there. Is the disk full? (Sides below 2 pixels "
            "cannot be written at all.)"
        )
