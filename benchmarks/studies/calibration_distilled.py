"""
Whether distillation makes a student harder to quantise: `python -m benchmarks.studies.calibration distilled`.

Students that were trained alone and distilled, of the same seeds, are quantised by each method of calibration and for
each target; and, where asked, trained further by crosskd.distill --quantize int8. Compared is what each loses in AP
against itself in float.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from benchmarks.measuring.bootstrap import bounds_of_draws
from benchmarks.measuring.environment import read_environment
from benchmarks.measuring.result import read_result
from benchmarks.studies.calibration_methods import COMPARED_METHODS, MethodRow, Model, measured, method_row
from benchmarks.studies.calibration_training import (
    INT8_AWARE,
    Int8AwareOptions,
    complete_fine_tuning,
    planned_fine_tunings,
)
from benchmarks.studies.jobs import Make, make
from benchmarks.studies.tables import interval, points, table, write_tables
from deploy.commands import shell_line
from deploy.contract import provenance, read_sidecar, weights_of_run
from deploy.errors import ConfigError, MeasurementError
from deploy.folder_lock import locked
from deploy.layouts import split_paths
from deploy.targets import QUANTISED_FOR, TARGETS
from deploy.trials import Processes, work_through

ALONE, DISTILLED = KINDS = ("alone", "distilled")
SINGLE_METHODS = tuple(method for method in COMPARED_METHODS if method != "auto")
"""`auto` is one of them, and which one hangs on few images."""

CellRecord = Dict[str, Any]
"""What the result file says of a cell."""


@dataclasses.dataclass(frozen=True)
class DistilledOptions:
    """Which students are compared, and how they are quantised."""

    config: str
    """Of crosskd.distill, which INT8-aware training takes."""
    alone: Sequence[str]
    """Finished runs of students that were trained alone."""
    distilled: Sequence[str]
    """Those of the same seeds, in the same order, that were distilled."""
    teacher: str
    """File of the teacher's weights."""
    data: str
    """Data folder."""
    output: str
    """Stem of the result files."""
    runs_dir: Optional[str] = None
    """Folder of what is made on the way; None: runs/bench/calibration/distilled."""
    targets: Sequence[str] = QUANTISED_FOR
    """What to quantise for; INT8-aware training is for the first."""
    methods: Sequence[str] = SINGLE_METHODS
    """Of calibration."""
    epochs: Optional[int] = None
    """Of INT8-aware training; None: there is none."""
    learning_rate: float = 1.5e-4
    """Of INT8-aware training."""

    def __post_init__(self) -> None:
        if len(self.alone) != len(self.distilled):
            raise ConfigError(
                f"--alone names {len(self.alone)} runs and --distilled {len(self.distilled)}; expected as many, of the "
                "same seeds in the same order"
            )
        runs = [*self.alone, *self.distilled]
        if len(set(runs)) < len(runs):
            raise ConfigError(f"--alone and --distilled are {' '.join(runs)}; expected each run once")
        for flag, values in (("--targets", self.targets), ("--methods", self.methods)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{flag} are {' '.join(values)}; expected each once")
        if self.epochs is not None:
            self.training("")  # whose numbers and files are checked

    def training(self, student: str, seed: int = 0) -> Int8AwareOptions:
        """The INT8-aware training of a student."""
        return Int8AwareOptions(
            self.config, student, self.teacher, self.data, epochs=self.epochs or 0, learning_rate=self.learning_rate,
            output=self.output, seeds=(seed,), target=self.targets[0], jobs=1,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Student:
    """One of a pair of trainings."""

    kind: str
    """ALONE or DISTILLED."""
    pair: int
    """The place of its run among those of its kind."""
    run_dir: str
    model: Model
    """Its float ONNX file, and the data."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A student that becomes an INT8 model: a cell of the table."""

    student: Student
    target: str
    name: str
    """A method of calibration, or INT8_AWARE."""

    def __str__(self) -> str:
        return f"{self.student.run_dir}, {self.target}, {self.name}"

    def row(self, method: str) -> MethodRow:
        return method_row(self.student.model, self.target, method, ("--method", method))


def planned_cells(options: DistilledOptions, folder: Path) -> List[Cell]:
    """
    All pairs by all methods, then INT8-aware training; a pair is done before the next, so that any part is balanced.
    """
    data = Path(options.data)
    pairs = []
    for pair, runs in enumerate(zip(options.alone, options.distilled)):
        students = []
        for kind, run_dir in zip(KINDS, runs):
            place = folder / f"{kind}-{pair}"
            students.append(
                Student(kind, pair, run_dir, Model(place.name, place / "student.onnx", data, "test", place))
            )
        pairs.append(students)
    rows = [(target, method) for target in options.targets for method in options.methods]
    cells = [Cell(student, *row) for students in pairs for row in rows for student in students]
    if options.epochs is not None:
        cells += [Cell(student, options.targets[0], INT8_AWARE) for students in pairs for student in students]
    return cells


def complete_cell(cell: Cell, options: DistilledOptions, made: Make) -> CellRecord:
    """
    What the result file says of the cell, after all that is not yet done.

    Raises:
        PipelineError: the student cannot be exported, quantised, trained or measured.
    """
    student, model = cell.student, cell.student.model
    made(model.file, ["deploy.export", student.run_dir, "-o", str(model.file)])
    made(model.result, model.words)
    row = cell.row("max" if cell.name == INT8_AWARE else cell.name)
    made(row.file, row.words)
    if cell.name == INT8_AWARE:
        training = options.training(student.run_dir, student.pair)
        (run,) = [
            one for one in planned_fine_tunings(training, model.folder, row.file) if one.kind == INT8_AWARE
        ]  # fmt: skip
        trained = complete_fine_tuning(run, training, model.result, made)
        numbers, draws, words = trained["int8"], trained["draws"], trained["command"]
    else:
        made(row.result, row.accuracy_words)
        result = read_result(row.result)
        numbers, draws, words = (
            measured(result),
            result["numbers"]["bootstrap"]["ap"],
            read_sidecar(row.file)["command"],
        )
    plain = read_result(model.result)
    return {
        "kind": student.kind,
        "pair": student.pair,
        "run": student.run_dir,
        "weights_sha256": read_sidecar(weights_of_run(student.run_dir))["artefact"]["sha256"],
        "target": cell.target,
        "name": cell.name,
        "command": words,
        "float": measured(plain),
        "int8": numbers,
        "changes": np.subtract(_floats(draws), _floats(plain["numbers"]["bootstrap"]["ap"])),
    }


def _floats(draws: Sequence[Optional[float]]) -> np.ndarray:
    return np.array(draws, np.float64)


def run_distilled(options: DistilledOptions, processes: Processes) -> None:
    """
    Makes and measures what is not yet done, and writes the result files after each cell.

    Raises:
        MeasurementError: cells failed; each was told of when it did, and the others were done all the same.
    """
    folder = Path(options.runs_dir or "runs/bench/calibration/distilled")
    with locked(folder, MeasurementError):
        made = functools.partial(make, processes=processes)
        cells = planned_cells(options, folder)
        records: Dict[Cell, CellRecord] = {}

        def done(cell: Cell, record: CellRecord) -> None:
            records[cell] = record
            print(f"{cell}: AP {points(record['float']['AP'])}, {points(record['int8']['AP'])} in INT8", flush=True)
            write_distilled(options, [records[one] for one in cells if one in records], len(cells))

        failed = work_through(cells, lambda cell: complete_cell(cell, options, made), done, processes, 1)
    if failed:
        raise MeasurementError(
            f"{len(failed)} of {len(cells)} cells failed: {'; '.join(map(str, failed))}; why is above. Put that right "
            "and run the same command again: what is finished is kept"
        )


def write_distilled(options: DistilledOptions, records: Sequence[CellRecord], planned: int) -> None:
    """Writes the result files: JSON with all numbers, and the tables."""
    names = dict.fromkeys((record["target"], record["name"]) for record in records)
    rows = [
        row_of([one for one in records if (one["target"], one["name"]) == name], *name) for name in names
    ]  # fmt: skip
    document = {
        **provenance({"test_annotations": split_paths(options.data, "test")[0]}),
        "environment": read_environment(),
        **{key: getattr(options, key) for key in ("config", "data", "epochs", "learning_rate")},
        "cells_planned": planned,
        "rows": [row for row in rows if row is not None],
        "cells": [{key: value for key, value in record.items() if key != "changes"} for record in records],
    }
    write_tables(options.output, document, distilled_markdown(document))


def row_of(records: Sequence[CellRecord], target: str, name: str) -> Optional[Dict[str, Any]]:
    """
    What a method changes in the AP of students, of the pairs of which both are done; None without such a pair.

    Of each kind, and `difference`, of the distilled less that of those alone: means over the pairs, with `low` and
    `high` (95 %, a paired bootstrap over the images).
    """
    by_kind = {kind: {one["pair"]: one for one in records if one["kind"] == kind} for kind in KINDS}
    pairs = sorted(set(by_kind[ALONE]) & set(by_kind[DISTILLED]))
    if not pairs:
        return None
    kinds, changes = {}, {}
    for kind, cells in by_kind.items():
        changes[kind] = np.array([cells[pair]["changes"] for pair in pairs])  # (pairs, 1 + draws)
        kinds[kind] = {
            "float_AP": float(np.mean([cells[pair]["float"]["AP"] for pair in pairs])),
            "int8_AP": float(np.mean([cells[pair]["int8"]["AP"] for pair in pairs])),
            **_bounds(changes[kind]),
        }
    difference = _bounds(changes[DISTILLED] - changes[ALONE])
    return {"target": target, "name": name, "pairs": pairs, **kinds, "difference": difference}


def _bounds(changes: np.ndarray) -> Dict[str, Any]:
    """The mean over the pairs, its bounds, and each pair's; of (pairs, 1 + draws)."""
    bounds = dict(zip(("value", "low", "high"), bounds_of_draws(changes.mean(axis=0))))
    return {**bounds, "by_pair": changes[:, 0].tolist()}


def distilled_markdown(document: Mapping[str, Any]) -> str:
    """The tables of `distilled`, one for each target; AP in points."""
    lines = [
        "# What INT8 costs students that were trained alone and distilled",
        "",
        f"{len(document['cells'])} of {document['cells_planned']} cells, made by `{shell_line(document['command'])}` "
        f"on {document['environment']['cpu']}.",
        "",
    ]
    columns = [
        "method", *(f"{kind}: {text}" for kind in KINDS for text in ("AP in FP32", "INT8 against it", "95 %")),
        "distilled against alone", "95 %",
    ]  # fmt: skip
    for target in dict.fromkeys(row["target"] for row in document["rows"]):
        rows = [_cells(row) for row in document["rows"] if row["target"] == target]
        lines += [f"## {TARGETS[target].title}", "", *table(columns, rows), ""]
    lines += [
        "AP in points, of the test split: means over pairs of students of the same seed, and in brackets each pair. "
        "Intervals are a paired bootstrap over the images: what the choice of images may do, not that of seeds. AP for "
        "TensorRT is that of ONNX Runtime with the same pairs of Q/DQ."
        + (
            f" {INT8_AWARE}: the student trained further, by crosskd.distill --quantize int8, for {document['epochs']} "
            f"epochs at a learning rate of {document['learning_rate']:g}; against itself in float before that."
            if document["epochs"] is not None
            else ""
        ),
        "",
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> List[str]:
    cells = [row["name"]]
    for kind in KINDS:
        cells += [points(row[kind]["float_AP"]), _with_pairs(row[kind]), interval(row[kind])]
    return [*cells, _with_pairs(row["difference"]), interval(row["difference"])]


def _with_pairs(bounds: Mapping[str, Any]) -> str:
    return f"{points(bounds['value'], '+')} ({', '.join(points(value, '+') for value in bounds['by_pair'])})"
