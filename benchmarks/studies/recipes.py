"""
Command: what the students of configs/recipes take on this machine, in FP32 and INT8, before anything is trained.

    python -m benchmarks.studies.recipes --data ../shared/data/bccd --sides 416 512 640

Each is exported with random weights (`crosskd.workers.export_untrained`), which takes as long as a trained one, and
quantised with ranges of two images. The two files take turns on ONNX Runtime, one image at a time, on one thread. What
was measured is kept below --runs-dir: cut it off at any time, and the same line goes on. Needs onnxruntime, and the
training packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from benchmarks.measuring.environment import read_environment
from benchmarks.reporting.wording import UNKNOWN, ms, times
from benchmarks.studies.jobs import Processes, is_current, make
from benchmarks.studies.tables import check_tables, disturbed, table, write_tables
from benchmarks.studies.turns import ROUNDS, latencies, ratio
from deploy.commands import shell_line
from deploy.contract import package_versions, provenance, read_sidecar
from deploy.dataset import load_coco
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import read_json, write_json
from deploy.layouts import split_paths
from deploy.runtime.session import open_session

FOLDER = Path("configs/recipes")
TEACHERS = ("base", "large")
CLASSES = 10
SPLIT = "test"
"""Of the data, of which an image is fed to them; they are quantised on the training split."""


@dataclasses.dataclass(frozen=True)
class RecipesOptions:
    """What is measured, on what."""

    data: str
    """Folder with annotations/instances_{train,test}.json and images/."""
    output: str
    """Stem of the files to write: STEM.json and STEM.md."""
    sides: Sequence[int] = (416, 512, 640)
    """Sides of the square inputs, pixels."""
    runs_dir: str = "runs/bench/recipes"
    """Where models and measurements are kept."""


@dataclasses.dataclass(frozen=True)
class Student:
    """A recipe at an input size, and the files of it."""

    recipe: Path
    side_px: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.recipe.stem}_{self.side_px}"

    def beside(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"


def students(options: RecipesOptions) -> List[Student]:
    """
    The students of configs/recipes, family by family, the smallest first, at each size.

    Raises:
        ConfigError: there are none: this is not the folder of the checkout.
    """
    recipes = [path for path in FOLDER.glob("*.py") if not path.stem.endswith(TEACHERS)]
    if not recipes:
        raise ConfigError(f"there is no recipe in {FOLDER}; run this command in the folder of the checkout")
    order = ("nano", "tiny", "small", "medium")
    recipes.sort(key=lambda path: (path.stem.partition("_")[0], order.index(path.stem.partition("_")[2])))
    return [Student(recipe, side, Path(options.runs_dir)) for recipe in recipes for side in options.sides]


def make_models(student: Student, data: str, processes: Processes) -> None:
    """
    The float and the INT8 file of a student.

    Raises:
        MeasurementError: one cannot be made.
    """
    plain, int8 = student.beside(".onnx"), student.beside(".int8.onnx")
    exported = [str(student.recipe), "--side", str(student.side_px), "--classes", str(CLASSES), "-o", str(plain)]
    make(plain, ["crosskd.workers.export_untrained", *exported], processes)
    quantised = [str(plain), "--data", data, "--num-images", "2", "--target", "onnxruntime", "-o", str(int8)]
    make(int8, ["calibration.quantize", *quantised], processes)


def row_of(student: Student, image: Path) -> Dict[str, Any]:
    """What the result file says of a student: measured now, unless it is known."""
    plain, int8 = student.beside(".onnx"), student.beside(".int8.onnx")
    record = student.beside(".latency.json")
    if not is_current(record):
        environment = read_environment()  # before anything is measured: the load is that which others cause
        measured = latencies({"fp32": open_session(plain, threads=1), "int8": open_session(int8, threads=1)}, image)
        write_json(record, {**provenance({"model": plain, "int8": int8}), "environment": environment, **measured})
    measured = read_json(record, MeasurementError, "a latency")
    return {
        "recipe": student.recipe.stem,
        "side_px": student.side_px,
        "parameters": read_sidecar(plain)["details"]["parameters"],
        "fp32_ms": measured["ms"]["fp32"],
        "int8_ms": measured["ms"]["int8"],
        "times": ratio(measured, "fp32", "int8"),
        "description": measured["description"]["fp32"],
        "others_cores": measured["others_cores"],
    }


COLUMNS = ("recipe", "input", "parameters", "FP32 ms", "INT8 ms", "times faster (rounds)")


def markdown_of(document: Mapping[str, Any]) -> str:
    """The table of a result file."""
    rows, environment = document["rows"], document["environment"]
    lines = [
        "# What the students of configs/recipes take",
        "",
        f"Made by `{shell_line(document['command'])}` on {environment['cpu']}, {rows[0]['description']}: milliseconds "
        "of processor time of one image, without pre- and post-processing, medians. Random weights, "
        f"{CLASSES} classes. FP32 and INT8 took turns, {ROUNDS} rounds.",
        "",
        *table(COLUMNS, [_cells(row) for row in rows]),
        "",
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> List[str]:
    speed = row["times"]
    side = row["side_px"]
    parameters = UNKNOWN if row["parameters"] is None else f"{row['parameters'] / 1e6:.1f} M"
    return [
        row["recipe"],
        f"{side} x {side}",
        parameters,
        ms(row["fp32_ms"]),
        ms(row["int8_ms"]) + disturbed(row["others_cores"]),
        f"{times(speed['median'])} ({speed['lowest']:.2f} to {speed['highest']:.2f})",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.recipes",
        description="Measure the students of configs/recipes on ONNX Runtime, in FP32 and INT8, with random weights.",
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with annotations/instances_{train,test}.json, images/"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[416, 512, 640], metavar="PX",
        help="of the square inputs (default: 416 512 640)",
    )  # fmt: skip
    parser.add_argument("--runs-dir", default="runs/bench/recipes", metavar="DIR",
                        help="where models and measurements are kept (default: %(default)s)")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="STEM", default="benchmarks/results/recipes/cpu",
                        help="of the files to write, STEM.json and STEM.md (default: %(default)s)")  # fmt: skip
    return parser


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Makes all models, measures what is not yet measured, writes the tables and prints them."""
    options = RecipesOptions(**vars(_parser().parse_args(argv)))
    check_tables(options.output)
    planned = students(options)
    image = load_coco(*split_paths(options.data, SPLIT), check_files=False).images[0].path
    processes = Processes(1)
    for student in planned:
        make_models(student, options.data, processes)
    environment = read_environment()
    rows = []
    for student in planned:  # after all models, so that nothing else is at work
        rows.append(row_of(student, image))
        print(f"{student.name}: FP32 {rows[-1]['fp32_ms']:.1f} ms, INT8 {rows[-1]['int8_ms']:.1f} ms", flush=True)
    document = {
        **provenance({"annotations": split_paths(options.data, SPLIT)[0]}),
        "kind": "recipes",
        "environment": environment,
        "packages": package_versions(),
        "classes": CLASSES,
        "rows": rows,
    }
    write_tables(options.output, document, markdown_of(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
