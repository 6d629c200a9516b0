"""Images, folders of them, videos and cameras that a user names, and where what is seen in each goes. No OpenCV."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

from deploy.contract import sidecar_path
from deploy.errors import ConfigError, DataError
from deploy.files import AnyPath, check_writable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """One thing to look at, and where what is seen in it goes."""

    name: str
    opened_as: Union[Path, int]
    """A file, or the index of a camera."""
    target: Path
    is_image: bool


@dataclasses.dataclass(frozen=True)
class PictureOptions:
    """What to look at with which scores, and where the results go."""

    sources: Tuple[PictureSource, ...]
    score_threshold: float
    """The least score of a detection that is shown."""
    output: Path
    """The folder of what is drawn."""
    results_path: Path
    """The file of all detections, as COCO results."""


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `picture_options_from_arguments` reads."""
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="an image, a folder of images, a video, or the index of a camera"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("detections"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--score", type=float, default=0.3, help="least score of a detection (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="COCO results (default: results.json in DIR)")


def picture_options_from_arguments(arguments: argparse.Namespace, model: AnyPath) -> PictureOptions:
    """
    The options, checked before long work.

    Args:
        model: the file that detects, which is not to be written over.

    Raises:
        DataError: a source is no file, folder or number, or a folder has no images.
        ConfigError: a file that is read would be written over.
        PipelineError: the results cannot be written.
    """
    results_path = arguments.json or arguments.output / "results.json"
    check_writable(results_path)
    sources = sources_from_words(arguments.sources, arguments.output)
    _check_nothing_is_lost(sources, Path(model), results_path)
    return PictureOptions(tuple(sources), arguments.score, arguments.output, results_path)


def sources_from_words(words: Sequence[str], output: Path) -> List[PictureSource]:
    """
    What the words of the command stand for; of a folder, the images that lie in it itself.

    Raises:
        DataError: a word is no file, folder or number, or a folder has no images.
    """
    sources: List[PictureSource] = []
    taken: Dict[str, int] = {}

    def add(name: str, opened_as: Union[Path, int], stem: str, suffix: str) -> None:
        number = taken[(stem + suffix).lower()] = taken.get((stem + suffix).lower(), 0) + 1
        if number > 1:
            add(name, opened_as, f"{stem}_{number}", suffix)
        else:
            sources.append(PictureSource(name, opened_as, output / (stem + suffix), suffix.lower() in IMAGE_SUFFIXES))

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


def _check_nothing_is_lost(sources: Sequence[PictureSource], model: Path, results_path: Path) -> None:
    """Raises ConfigError if a file that is read would be written over."""
    read = {source.opened_as.resolve() for source in sources if isinstance(source.opened_as, Path)}
    read |= {model.resolve(), sidecar_path(model).resolve()}
    for target in [results_path, *(source.target for source in sources)]:
        if target.resolve() in read:
            raise ConfigError(f"{target} would be written over, and is read here: give another -o DIR or --json FILE")
