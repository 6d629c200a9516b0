"""The flags by which every command is told its images and annotations: `--data` and what goes with it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Optional, Tuple

from deploy.dataset import CocoSet, load_coco
from deploy.errors import ConfigError
from deploy.layouts import LAYOUT, SPLITS, split_paths

STRICT = "refuse annotations with any box of no use; else up to 1 in 100 are left out and counted"


@dataclasses.dataclass(frozen=True)
class SetOptions:
    """What names one set of images with their annotations."""

    data: Optional[str]
    """A data folder."""
    split: Optional[str]
    """The part of it."""
    annotations: Optional[str]
    """A COCO file, in place of a data folder."""
    images_dir: Optional[str]
    """The folder of its images."""
    strict: bool
    """Refuse a file with any box of no use."""

    def paths(self) -> Tuple[Path, Path]:
        """
        (annotation file, image folder).

        Raises:
            ConfigError: not exactly one of a data folder with a split, and a file with its images.
            DataError: the data folder does not have them.
        """
        if self.data is not None and self.split and self.annotations is None and self.images_dir is None:
            return split_paths(self.data, self.split)
        if self.data is None and self.split is None and self.annotations is not None and self.images_dir is not None:
            return Path(self.annotations), Path(self.images_dir)
        given = {
            "--data": self.data, "--split": self.split, "--annotations": self.annotations,
            "--images-dir": self.images_dir,
        }  # fmt: skip
        words = ", ".join(f"{flag} is {value}" for flag, value in given.items() if value is not None)
        hint = " (--annotations without --images-dir)" if self.annotations and not self.images_dir else ""
        raise ConfigError(
            "give either --data DIR [--split SPLIT], or --annotations FILE with --images-dir DIR; "
            f"{words or 'none is given'}{hint}"
        )

    def load(self, check_files: bool = True, by_class: bool = False) -> CocoSet:
        """
        The set, checked: see `deploy.dataset.load_coco`.

        Raises:
            ConfigError, DataError: as `paths` and `load_coco`.
        """
        return load_coco(*self.paths(), check_files=check_files, strict=self.strict, by_class=by_class)


def add_data_argument(parser: Any, required: bool = False, use: str = "") -> None:
    """Adds `--data` to a parser or a group of one; `use` says what for."""
    parser.add_argument(
        "--data", required=required, metavar="DIR", help=f"data folder{use}: {LAYOUT}".replace("%", "%%")
    )


def add_strict_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help=STRICT)


def add_set_arguments(parser: argparse.ArgumentParser, default_split: str, use: str = "", source: Any = None) -> None:
    """
    Adds the flags of `set_options`.

    Args:
        use: what the images are for, such as 'to calibrate on'.
        source: a group of flags of which one is to be given, where there are more than these.
    """
    add_data_argument(source or parser)
    (source or parser).add_argument(
        "--annotations", metavar="FILE", help="COCO annotation file, in place of --data; with --images-dir"
    )
    parser.add_argument("--images-dir", metavar="DIR", help="folder of the images of --annotations")
    parser.add_argument(
        "--split", choices=SPLITS, help=f"split of --data{' ' + use if use else ''} (default: {default_split})"
    )
    add_strict_argument(parser)


def set_options(arguments: argparse.Namespace, default_split: str) -> SetOptions:
    """The options that the flags of `add_set_arguments` give."""
    split = arguments.split or (default_split if arguments.data is not None else None)
    return SetOptions(arguments.data, split, arguments.annotations, arguments.images_dir, arguments.strict)
