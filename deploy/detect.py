"""
Command: what a model file sees in pictures, videos or a camera, drawn and as COCO results.

    python -m deploy.detect student.engine photo.jpg -o seen
    python -m deploy.detect student.int8.onnx folder video.mp4 --score 0.5 -o seen
    python -m deploy.detect student.engine 0        # camera 0, until Ctrl-C

Each picture or annotated video lands in the output folder under its own name (`name_2` where two are the same). The
results are COCO's list of `image_id`, `category_id`, `bbox` (x, y, width, height in pixels) and `score`, with
`file_name` and, of a video, `frame`, counted from 0; image ids count pictures and frames from 1. A source that cannot
be read, or not to its end, is named at the end, with status 2; everything else is kept.

Needs numpy, OpenCV and what runs the file: ONNX Runtime for `.onnx`, TensorRT for `.engine`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

from deploy.contract import sidecar_path
from deploy.dataset import read_image
from deploy.detector import Detector
from deploy.errors import ConfigError, DataError, PipelineError, command
from deploy.files import check_writable, replacing
from deploy.progress import progress
from deploy.runtime.draw import draw

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
CODEC = int.from_bytes(b"mp4v", "little")
"""MPEG-4, which OpenCV's own FFmpeg can always write; its H.264 is not in the wheels of PyPI."""
FRAMES_PER_S = 30.0
"""Of the video that is written, where a camera or a file does not say its own."""
COUNT_TOLERANCE = 0.02
"""Containers without an index estimate their number of frames: so much less is no fault."""
NAMED = 5
"""Sources named in the message at the end."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to look at, and where what is seen in it goes."""

    name: str
    opened_as: Union[Path, int]
    """A file, or the index of a camera."""
    target: Path
    is_image: bool


@dataclasses.dataclass
class Seen:
    """What came out so far."""

    results: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: int = 0
    faults: List[str] = dataclasses.field(default_factory=list)
    """One sentence for each source that could not be read, or not to its end."""


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parse(argv)
    results_path: Path = arguments.json or arguments.output / "results.json"
    check_writable(results_path)
    sources = sources_from_words(arguments.sources, arguments.output)
    _check_nothing_is_lost(sources, arguments.model, results_path)
    images = [source for source in sources if source.is_image]
    seen = Seen()
    with Detector(arguments.model, arguments.score) as detector:
        print(f"{arguments.model} on {detector.description}")
        for source in progress(images, len(images), "images"):
            _detect_image(detector, source, seen)
        for source in sources:
            if not source.is_image:
                _detect_video(detector, source, seen)
    if seen.pictures:
        with replacing(results_path) as temporary:
            temporary.write_text(json.dumps(seen.results, allow_nan=False), encoding="utf-8")
        print(
            f"{len(seen.results)} detections in {seen.pictures} pictures, drawn in {arguments.output}; results in "
            f"{results_path}"
        )
    if seen.faults:
        more = f"; and {len(seen.faults) - NAMED} more" if len(seen.faults) > NAMED else ""
        raise DataError(
            f"of {len(sources)} sources {len(seen.faults)} could not be read to the end: "
            f"{'; '.join(seen.faults[:NAMED])}{more}"
        )
    return 0


def _parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.detect", description="Draw what a detector sees in images, videos or a camera."
    )
    parser.add_argument("model", type=Path, help="ONNX or engine file with its sidecar")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="an image, a folder of images, a video, or the index of a camera"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("detections"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--score", type=float, default=0.3, help="least score of a detection (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="COCO results (default: results.json in DIR)")
    return parser.parse_args(argv)


def sources_from_words(words: Sequence[str], output: Path) -> List[Source]:
    """
    What the words of the command stand for; of a folder, the images that lie in it itself.

    Raises:
        DataError: a word is no file, folder or number, or a folder has no images.
    """
    sources: List[Source] = []
    taken: Dict[str, int] = {}

    def add(name: str, opened_as: Union[Path, int], stem: str, suffix: str) -> None:
        number = taken[(stem + suffix).lower()] = taken.get((stem + suffix).lower(), 0) + 1
        if number > 1:
            add(name, opened_as, f"{stem}_{number}", suffix)
        else:
            sources.append(Source(name, opened_as, output / (stem + suffix), suffix.lower() in IMAGE_SUFFIXES))

    for word in words:
        path = Path(word)
        if not path.exists() and word.isdecimal():
            add(f"camera {word}", int(word), f"camera{word}", ".mp4")
            continue
        if not path.exists():
            raise DataError(
                f"no such file or folder: {word}; expected an image, a folder of images, a video, or the number of a "
                "camera"
            )
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise DataError(
                f"the folder {word} has no images; expected files that end in {', '.join(IMAGE_SUFFIXES)} in it, not "
                "in folders below it"
            )
        for file in files:
            add(str(file), file, file.stem, file.suffix if file.suffix.lower() in IMAGE_SUFFIXES else ".mp4")
    return sources


def _check_nothing_is_lost(sources: Sequence[Source], model: Path, results_path: Path) -> None:
    """Raises ConfigError if a file that is read would be written over."""
    read = {source.opened_as.resolve() for source in sources if isinstance(source.opened_as, Path)}
    read |= {model.resolve(), sidecar_path(model).resolve()}
    for target in [results_path, *(source.target for source in sources)]:
        if target.resolve() in read:
            raise ConfigError(f"{target} would be written over, and is read here: give another -o DIR or --json FILE")


def _detect_image(detector: Detector, source: Source, seen: Seen) -> None:
    try:
        image = read_image(str(source.opened_as))
    except DataError as error:
        seen.faults.append(str(error))
        return
    encoded, content = cv2.imencode(source.target.suffix, _drawn(detector, image, seen, file_name=source.name))
    if not encoded:
        raise PipelineError(f"OpenCV cannot write {source.target}")
    with replacing(source.target) as temporary:
        temporary.write_bytes(content.tobytes())


def _detect_video(detector: Detector, source: Source, seen: Seen) -> None:
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
            _drawn(detector, frame, seen, file_name=source.name, frame=index) for index, frame in enumerate(frames)
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


def _drawn(detector: Detector, image: np.ndarray, seen: Seen, **where: Any) -> np.ndarray:
    """The image with what is in it, which is also noted in `seen` under `where`."""
    found = detector(image)
    seen.pictures += 1
    boxes_xywh = found.boxes_xyxy.astype(float)
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    for box, score, label in zip(boxes_xywh.tolist(), found.scores.tolist(), found.labels.tolist()):
        category = detector.contract.category_ids[label]
        seen.results.append({"image_id": seen.pictures, **where, "category_id": category, "bbox": box, "score": score})
    return draw(image, found, detector.class_names)


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


if __name__ == "__main__":
    sys.exit(main())
