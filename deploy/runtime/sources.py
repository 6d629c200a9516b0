"""Images, folders of them, videos, cameras and streams that a user names, and where what is seen in each goes."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import re
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

from deploy.contract import sidecar_path
from deploy.errors import ConfigError, DataError
from deploy.files import AnyPath, check_writable

WRITTEN_AS = {
    ".jpg": ".jpg", ".jpeg": ".jpeg", ".jpe": ".jpe", ".png": ".png", ".bmp": ".bmp", ".dib": ".dib", ".webp": ".webp",
    ".tif": ".tif", ".tiff": ".tiff", ".jp2": ".jp2", ".ppm": ".ppm", ".avif": ".png", ".gif": ".png", ".pgm": ".png",
    ".pbm": ".png", ".pnm": ".png", ".pam": ".png", ".pxm": ".png", ".pfm": ".png", ".sr": ".png", ".ras": ".png",
    ".hdr": ".png", ".pic": ".png", ".exr": ".png",
}  # fmt: skip
"""Endings of all pictures that OpenCV reads -> that of what is drawn in them: what every OpenCV writes in colour."""
JPEGS_IN_A_ROW = (".mjpg", ".mjpeg")
"""Endings of videos that begin as a picture does."""
IMAGES = "a picture (.jpg, .png, .bmp, .webp, .tif, .jp2, ... or what else OpenCV reads)"
EXPECTED = (
    f"{IMAGES}, a folder of pictures, a video, the number of a camera or its /dev/video0, the address of a stream "
    "(rtsp://, http://, ...), or a GStreamer pipeline ('... ! appsink')"
)
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
PASSWORD = re.compile(r"(://[^/@\s:]*):[^/@\s]*@")


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """One thing to look at, and where what is seen in it goes."""

    name: str
    """As messages and results call it: without the password of an address."""
    opened_as: Union[Path, int, str]
    """A file or a device, the index of a camera, or what OpenCV opens: an address or a pipeline."""
    target: Path
    kind: str
    """"image", "video", or what runs until it is stopped: "camera", "stream" or "pipeline"."""


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
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="an image, a folder of images, a video, a camera (its number or device), a stream's address, or a "
        "GStreamer pipeline",
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
        DataError: a source is nothing that can be looked at, or a folder has no images.
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
        DataError: a word is nothing of EXPECTED, or a folder has no images.
    """
    sources: List[PictureSource] = []
    taken: Dict[str, int] = {}

    def add(name: str, opened_as: Union[Path, int, str], kind: str, stem: str, suffix: str = ".mp4") -> None:
        number = taken[(stem + suffix).lower()] = taken.get((stem + suffix).lower(), 0) + 1
        if number > 1:
            add(name, opened_as, kind, f"{stem}_{number}", suffix)
        else:
            sources.append(PictureSource(name, opened_as, output / (stem + suffix), kind))

    for word in words:
        path = Path(word)
        if _is_there(path) and path.is_char_device():
            add(word, path, "camera", path.name)
        elif _is_there(path):
            for file in _images_of_folder(path) if path.is_dir() else [path]:
                if _is_image(file):
                    add(str(file), file, "image", file.stem, _written_as(file))
                else:
                    add(str(file), file, "video", file.stem)
        elif word.isdecimal():
            add(f"camera {word}", int(word), "camera", f"camera{word}")
        elif "!" in word:
            add(word, word, "pipeline", "pipeline")
        elif ADDRESS.match(word):
            add(PASSWORD.sub(r"\1:***@", word), word, "stream", _stem_of_address(word))
        else:
            raise DataError(f"no such file or folder: {word}; expected {EXPECTED}")
    return sources


def _stem_of_address(address: str) -> str:
    """A file's name of an address: host and path, without name and password, without what a file name may not have."""
    host_and_path = address.partition("://")[2].partition("?")[0].rpartition("@")[2]
    host, slash, path = host_and_path.partition("/")
    without_suffix = re.sub(r"\.[A-Za-z0-9]{2,5}$", "", path)
    return re.sub(r"[^\w.-]+", "_", host + slash + without_suffix).strip("._")[-100:] or "stream"


def _images_of_folder(folder: Path) -> List[Path]:
    """The files with an image's ending, by name; what else lies there is counted on stderr."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    images = [file for file in files if file.suffix.lower() in WRITTEN_AS]
    if not images:
        raise DataError(
            f"the folder {folder} has no images; expected files that end in {', '.join(list(WRITTEN_AS)[:10])} or "
            "another ending of pictures in it, not in folders below it"
        )
    if len(images) < len(files):
        others = sorted({file.suffix or "no ending" for file in files if file not in set(images)})
        print(
            f"note: {len(files) - len(images)} of the {len(files)} files in {folder} are no pictures by their names "
            f"({', '.join(others[:5])}) and are left out",
            file=sys.stderr,
        )
    return images


def _written_as(file: Path) -> str:
    """The ending of what is drawn in an image file: its own, in its own letters, where that can be written."""
    written = WRITTEN_AS.get(file.suffix.lower(), ".png")
    return file.suffix if written == file.suffix.lower() else written


def _is_there(path: Path) -> bool:
    """Whether something is at `path`, which may be a long pipeline."""
    try:
        return path.exists()
    except ValueError:
        return False
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _is_image(path: Path) -> bool:
    """Whether a file is one picture: by its ending or its first bytes. A GIF that moves is a video."""
    from deploy.images import moves, read_header

    suffix = path.suffix.lower()
    if not path.is_file() or suffix in JPEGS_IN_A_ROW:
        return False
    if suffix in WRITTEN_AS and suffix != ".gif":
        return True
    try:
        return not read_header(path).fault and not moves(path)
    except OSError:
        return False


def _check_nothing_is_lost(sources: Sequence[PictureSource], model: Path, results_path: Path) -> None:
    """Raises ConfigError if a file that is read would be written over."""
    read = {source.opened_as.resolve() for source in sources if isinstance(source.opened_as, Path)}
    read |= {model.resolve(), sidecar_path(model).resolve()}
    for target in [results_path, *(source.target for source in sources)]:
        if target.resolve() in read:
            raise ConfigError(f"{target} would be written over, and is read here: give another -o DIR or --json FILE")
