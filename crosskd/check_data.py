"""
Everything that is wrong with a set of data, at once: `python -m crosskd.check_data DIR`.

Prints for each split every fault with its number and the first examples; a table of classes and box sizes; and the
images that stand in several splits, found by their content. `--write CLEAN_DIR` writes corrected annotations, to be
used with `--data CLEAN_DIR`: boxes of turned or scaled images are turned and scaled, ids and flags of wrong types are
made numbers, what cannot be used is dropped, and each change is counted. Images stay where they are: CLEAN_DIR links to
their folders. Nothing is written where a fault is left that only a person can mend.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from crosskd.corrections import ImageFiles, correct_entries, correct_sizes, image_entries
from deploy.coco_file import ERROR, NOTE, Fault, coco_file_from_document, read_document
from deploy.dataset import coco_document, coco_set_from_file, fault_of_pictures, faults_of_files, undecodable
from deploy.errors import ConfigError, DataError, command
from deploy.files import new_folder, sha256_of, write_json
from deploy.layouts import LAYOUT, known_splits, split_paths
from deploy.progress import progress

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}
"""COCO's sizes of objects -> square pixels, from and below."""
EXAMPLES = 3
PICTURES_DECODED = 1000
"""Of each split, unless all are asked for: a picture takes milliseconds, its header microseconds."""


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What was found in one split."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    boxes_by_class: list[int]
    boxes_by_size: list[int]
    image_paths: list[Path]
    faults: list[Fault]
    changes: collections.Counter[str]
    """What --write corrected -> how often."""
    corrected: dict[str, Any] | None
    """The document to write; None: without --write, or a fault is left."""


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.check_data", description="Tell everything that is wrong with a set of data."
    )
    parser.add_argument("data", metavar="DIR", help=f"data folder: {LAYOUT}")
    parser.add_argument("--write", metavar="CLEAN_DIR", help="folder to make, with corrected annotations")
    parser.add_argument(
        "--decode-all", action="store_true", help=f"decode every picture, not only {PICTURES_DECODED} of each split"
    )
    arguments = parser.parse_args(argv)
    clean_dir = Path(arguments.write) if arguments.write else None
    if clean_dir is not None and clean_dir.exists():
        raise ConfigError(f"--write is {clean_dir}, which is there already; expected a folder to be made")
    splits = known_splits(arguments.data) or ["train"]  # an export of CVAT is one split, of any name
    paths = {split: split_paths(arguments.data, split) for split in splits}
    reports = {}
    for split, (path, images_dir) in paths.items():
        reports[split] = report_of_split(path, images_dir, clean_dir is not None, arguments.decode_all)
        print(words_of_split(split, path, reports[split]))
    print(table_of_classes(reports))
    twice = same_images({split: report.image_paths for split, report in reports.items()})
    print(words_of_same_images(twice))
    differing = [split for split in splits if not same_classes(reports[split], reports[splits[0]])]
    if differing:
        print(f"error: the classes of {', '.join(differing)} differ from those of {splits[0]}")
    left = sum(fault.severity == ERROR for report in reports.values() for fault in report.faults) + len(differing)
    if clean_dir is None:
        if left:
            raise DataError(
                f"{arguments.data} cannot be used: {left} kinds of faults, above; --write CLEAN_DIR corrects "
                "what needs no person"
            )
        return 0
    uncorrected = [split for split, report in reports.items() if report.corrected is None]
    if uncorrected or differing:
        raise DataError(
            f"{clean_dir} is not written: the faults of {', '.join(uncorrected or differing)} above need a person"
        )
    write_clean(clean_dir, {split: (reports[split].corrected, paths[split][1]) for split in splits})
    print(f"wrote {clean_dir}: use it as --data {clean_dir}")
    return 0


def report_of_split(
    annotations: Path, images_dir: Path, correct: bool = False, decode_all: bool = False
) -> SplitReport:
    """
    What is wrong with a split, and, if asked for, its corrected annotations.

    Args:
        decode_all: decode every picture; else PICTURES_DECODED of them, spread over the split.

    Raises:
        DataError: the file is missing or is no COCO detection file.
    """
    document = read_document(annotations)
    file = coco_file_from_document(document, annotations, images_dir)
    images = image_entries(document, images_dir)
    known = ImageFiles()
    files = [known.of_image(image) for image in progress(images, len(images), f"images of {annotations.name}")]
    faults = [*file.faults, *faults_of_files(images, files)]
    whole = [image for image, one in zip(images, files, strict=True) if not one.missing and not one.header.fault]
    tried = whole if decode_all else whole[:: max(1, -(-len(whole) // PICTURES_DECODED))]
    known.damaged = undecodable(tried)
    if known.damaged:
        faults.append(fault_of_pictures(known.damaged, len(tried)))
    if len(tried) < len(whole):
        text = f"{len(tried)} of {len(whole)} pictures were decoded; --decode-all tries all"
        faults.append(Fault("not_decoded", NOTE, len(whole) - len(tried), text))
    changes: collections.Counter[str] = collections.Counter()
    corrected = None
    if correct:
        corrected = corrected_document(document, annotations, images_dir, known, changes)
    areas = file.areas[file.usable]
    return SplitReport(
        file.class_names, file.category_ids, file.boxes_by_class().tolist(),
        [int(((areas >= low) & (areas < high)).sum()) for low, high in SIZES.values()],
        [image.path for image, one in zip(images, files, strict=True) if not one.missing], faults, changes, corrected,
    )  # fmt: skip


def corrected_document(
    document: dict[str, Any],
    annotations: Path,
    images_dir: Path,
    files: ImageFiles,
    changes: collections.Counter[str],
) -> dict[str, Any] | None:
    """
    The corrected annotations of a split, or None if a fault is left. `document` is changed.

    Args:
        files: what is known of the image files. changes: counts what was corrected.
    """
    correct_entries(document, images_dir, files, changes)
    if not document["images"] or not document["categories"]:
        return None
    correct_sizes(document, images_dir, files, changes)
    file = coco_file_from_document(document, annotations, images_dir)
    # Boxes without a size are dropped, however many they are; many that lie elsewhere are in other units, or of other
    # images, as are those whose pattern shows a mistake.
    codes = {fault.code for fault in file.faults if fault.severity == ERROR}
    elsewhere = codes & {"box_pattern", "outside"}
    if elsewhere or not len(file.rows):
        return None
    dropped = len(document["annotations"]) - len(file.rows)
    if dropped:
        changes["boxes of no use, dropped"] += dropped
        document["annotations"] = [document["annotations"][row] for row in file.rows.tolist()]
        file = coco_file_from_document(document, annotations, images_dir)
    images = image_entries(document, images_dir)
    left = [*file.faults, *faults_of_files(images, files.of(images))]
    if any(fault.severity == ERROR for fault in left):
        return None
    return coco_document(coco_set_from_file(file, images_dir), as_annotated=True)


def same_classes(report: SplitReport, first: SplitReport) -> bool:
    """Whether two splits have the same names with the same ids, but for further classes that have no box."""
    wanted = dict(zip(first.class_names, first.category_ids, strict=True))
    rows = zip(report.class_names, report.category_ids, report.boxes_by_class, strict=True)
    return {name: category_id for name, category_id, count in rows if count or name in wanted} == wanted


def words_of_split(split: str, annotations: Path, report: SplitReport) -> str:
    """Every fault of a split, and every correction, a line each."""
    number = sum(report.boxes_by_class)
    lines = [f"{split}: {annotations}, {len(report.image_paths)} images, {number} boxes to learn from"]
    lines += [f"  {fault.severity}: {fault.text}" for fault in report.faults]
    lines += [f"  corrected: {count} {what}" for what, count in report.changes.items()]
    return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing is wrong"])


def table_of_classes(reports: dict[str, SplitReport]) -> str:
    """Boxes to learn from by class and by size, a column a split."""
    names = list(dict.fromkeys(name for report in reports.values() for name in report.class_names))
    rows = [["class", *reports]]
    for name in names:
        by_split = [dict(zip(report.class_names, report.boxes_by_class, strict=True)) for report in reports.values()]
        rows.append([name, *(str(counts.get(name, "-")) for counts in by_split)])
    rows.append(["size, by area", *("" for _ in reports)])
    for index, (size, (low, high)) in enumerate(SIZES.items()):
        limit = f"from {low**0.5:.0f} px squared" if high == np.inf else f"below {high**0.5:.0f} px squared"
        rows.append([f"{size}, {limit}", *(str(report.boxes_by_size[index]) for report in reports.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *numbers in rows:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def same_images(paths_of_split: dict[str, list[Path]]) -> list[tuple[str, Path, str, Path]]:
    """
    (split, image, another split, image) of files with the same content; a file is named once.

    Only files of one size are read, so that large sets take little longer than their headers.
    """
    by_size: dict[int, list[tuple[str, Path]]] = collections.defaultdict(list)
    for split, paths in paths_of_split.items():
        for path in paths:
            by_size[path.stat().st_size].append((split, path))
    found = []
    suspects = [group for group in by_size.values() if len({split for split, _ in group}) > 1]
    for group in progress(suspects, len(suspects), "images of one size") if suspects else ():
        by_end: dict[bytes, list[tuple[str, Path]]] = collections.defaultdict(list)
        for split, path in group:
            by_end[_last_bytes(path)].append((split, path))
        for same in by_end.values():
            first_of: dict[str, tuple[str, Path]] = {}
            for split, path in same if len({split for split, _ in same}) > 1 else ():
                first_split, first = first_of.setdefault(sha256_of(path), (split, path))
                if first_split != split:
                    found.append((first_split, first, split, path))
    return found


def _last_bytes(path: Path, count: int = 4096) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read(count)


def words_of_same_images(twice: list[tuple[str, Path, str, Path]]) -> str:
    if not twice:
        return "no image stands in two splits"
    examples = "; ".join(f"{path} ({split}) and {other} ({second})" for split, path, second, other in twice[:EXAMPLES])
    return f"note: {len(twice)} images stand in two splits, so that what is measured was learned: {examples}"


def write_clean(clean_dir: Path, splits: dict[str, tuple[Any, Path]]) -> None:
    """
    Makes a data folder: annotations, and links to the folders of the images.

    Raises:
        DataError: this file system has no links.
        PipelineError: the folder cannot be written.
    """
    with new_folder(clean_dir) as temporary:
        try:
            (temporary / "images").mkdir()
            for split, (document, images_dir) in splits.items():
                write_json(temporary / "annotations" / f"instances_{split}.json", document)
                (temporary / "images" / split).symlink_to(images_dir.resolve(), target_is_directory=True)
        except OSError as error:
            raise DataError(
                f"cannot write {clean_dir} with links to {images_dir}: {error}; choose another disk"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
