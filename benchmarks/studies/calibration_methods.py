"""
INT8 by each method of calibration: `python -m benchmarks.studies.calibration methods`.

Each row is made by calibration.quantize and measured by benchmarks.accuracy and calibration.audit; latency is taken
here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.environment import read_environment
from benchmarks.measuring.result import read_result
from benchmarks.measuring.timing import OTHERS_CORES
from benchmarks.reporting.wording import UNKNOWN, ms, times
from benchmarks.studies.jobs import Make, Processes, is_current, is_made, make, printed_json
from benchmarks.studies.tables import disturbed, interval, points, table, write_tables
from benchmarks.studies.turns import ROUNDS, latencies, ratio
from deploy.commands import shell_line
from deploy.contract import provenance, read_sidecar
from deploy.dataset import load_coco
from deploy.errors import ConfigError, MeasurementError, PipelineError
from deploy.files import read_json, sha256_of, write_json
from deploy.folder_lock import locked
from deploy.layouts import SPLITS, check_splits, split_paths
from deploy.runtime.session import open_session
from deploy.targets import QUANTISED_FOR, TARGETS

COMPARED_METHODS = ("max", "percentile", "entropy", "mse", "auto")
MOST_IMAGES = 512
"""To calibrate on; of a small split two thirds, since `auto` compares methods on the others."""

MethodRecord = Dict[str, Any]
"""What the result file says of a row."""


def accuracy_words(model: Path, data: Path, split: str, result: Path, against: Optional[Path] = None) -> List[str]:
    """The command that measures a model."""
    words = ["benchmarks.accuracy", str(model), "--data", str(data), "--split", split, "-o", str(result)]
    return words if against is None else [*words, "--against", str(against)]


def images_to_calibrate_on(data: Path) -> int:
    """See MOST_IMAGES."""
    images = load_coco(*split_paths(data, "train"), check_files=False).images
    return min(MOST_IMAGES, 2 * len(images) // 3)


@dataclasses.dataclass(frozen=True)
class Model:
    """A float detector and the data that it is calibrated and measured on."""

    name: str
    file: Path
    data: Path
    split: str
    """That AP is measured on."""
    folder: Path
    """Of what is made of it."""

    @classmethod
    def from_argument(cls, text: str, runs_dir: Path) -> Model:
        """
        Of `NAME=MODEL.onnx:DATA_DIR[:SPLIT]`.

        Raises:
            ConfigError: it is not of that form, or names what is not there. DataError: a split is missing.
        """
        found = re.fullmatch(r"([\w.-]+)=([^:]+\.onnx):([^:]+)(?::([^:]+))?", text)
        if found is None:
            raise ConfigError(f"{text} names no model; expected NAME=MODEL.onnx:DATA_DIR, or with :SPLIT behind it")
        name, file, data, split = found.groups()
        if split not in (None, *SPLITS[1:]):  # not the first, on which it is calibrated
            raise ConfigError(f"{text}: the split is {split}; expected one of {', '.join(SPLITS[1:])}")
        check_splits(data)
        read_sidecar(file)
        return cls(name, Path(file), Path(data), split or "test", runs_dir / name)

    @property
    def result(self) -> Path:
        return self.folder / "float.accuracy.result.json"

    @property
    def words(self) -> List[str]:
        """The command that measures it."""
        return accuracy_words(self.file, self.data, self.split, self.result)

    def statistics(self, target: str) -> Path:
        """Where the statistics lie that all methods share: another file for another model or other images."""
        of = sha256_of(self.file) + sha256_of(split_paths(self.data, "train")[0])
        return self.folder / f"{target}-{hashlib.sha256(of.encode()).hexdigest()[:8]}.statistics.npz"


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One INT8 model of the table."""

    model: Model
    target: str
    name: str
    file: Path
    words: Tuple[str, ...]
    """The command that makes the file; none where it is given."""
    seeks_budget: bool
    """Then its statistics serve all other rows, but not the other way round."""

    def __str__(self) -> str:
        return f"{self.model.name}, {self.target}, {self.name}"

    def beside(self, suffix: str) -> Path:
        """A file of the row, of another suffix."""
        return self.model.folder / f"{self.target}-{_file_name(self.name)}{suffix}"

    @property
    def result(self) -> Path:
        return self.beside(".accuracy.result.json")

    @property
    def accuracy_words(self) -> List[str]:
        return accuracy_words(self.file, self.model.data, self.model.split, self.result, self.model.result)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


@dataclasses.dataclass(frozen=True)
class MethodsOptions:
    """Which models are quantised, how."""

    models: Sequence[str]
    """NAME=MODEL.onnx:DATA_DIR[:SPLIT] of each."""
    output: str
    """Stem of the result files."""
    runs_dir: Optional[str] = None
    """Folder of what is made on the way; None: runs/bench/calibration/methods."""
    int8_aware: Sequence[str] = ()
    """NAME=FILE.int8.onnx of models that were trained for INT8."""
    targets: Sequence[str] = QUANTISED_FOR
    """What to quantise for."""
    max_ap_drop: float = 0.3
    """Points that the row with a budget may lose on the val split."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_ap_drop) and self.max_ap_drop >= 0):
            raise ConfigError(f"--max-ap-drop is {self.max_ap_drop}; expected points of AP, 0 or more")
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"--targets are {' '.join(self.targets)}; expected each once")


def rows_of(model: Model, options: MethodsOptions, trained: Sequence[Tuple[str, Path]]) -> List[MethodRow]:
    """
    The rows of a model, in the order of the table.

    Args:
        trained: target -> INT8 file that was made by INT8-aware training.
    """
    flags_of: Dict[str, Tuple[str, ...]] = {method: ("--method", method) for method in COMPARED_METHODS}
    budget = f"auto, at most {options.max_ap_drop:g} points lost"
    flags_of[budget] = ("--method", "auto", "--max-ap-drop", f"{options.max_ap_drop:g}")
    rows = []
    for target in options.targets:
        rows += [method_row(model, target, name, flags, name == budget) for name, flags in flags_of.items()]
        rows += [MethodRow(model, target, "INT8-aware", file, (), False) for of, file in trained if of == target]
    return rows


def method_row(model: Model, target: str, name: str, flags: Sequence[str], seeks_budget: bool = False) -> MethodRow:
    """The row of a model that calibration.quantize makes with `flags`; its statistics are those of all its rows."""
    file = model.folder / f"{target}-{_file_name(name)}.int8.onnx"
    words = (
        "calibration.quantize", str(model.file), "--data", str(model.data), "--target", target, *flags,
        "--num-images", str(images_to_calibrate_on(model.data)), "--statistics", str(model.statistics(target)),
        "-o", str(file),
    )  # fmt: skip
    return MethodRow(model, target, name, file, words, seeks_budget)


def trained_files(texts: Sequence[str], models: Sequence[Model]) -> Dict[str, List[Tuple[str, Path]]]:
    """
    Name of a model -> (target, file) of each `--int8-aware NAME=FILE`.

    Raises:
        ConfigError: it is not of that form, or of no model. ContractError: the file and its sidecar do not match.
    """
    found: Dict[str, List[Tuple[str, Path]]] = {model.name: [] for model in models}
    for text in texts:
        name, _, file = text.partition("=")
        if name not in found or not file:
            raise ConfigError(f"--int8-aware {text}; expected NAME=FILE.int8.onnx, NAME one of {', '.join(found)}")
        target = read_sidecar(file)["details"].get("target")
        if target not in QUANTISED_FOR:
            raise ConfigError(
                f"--int8-aware {text}: its sidecar has the target {target!r}; expected a file of crosskd.distill "
                "--quantize int8 or of calibration.quantize"
            )
        if target in dict(found[name]):
            raise ConfigError(
                f"--int8-aware {text}: a second file of {name} for {target}; expected one for each target"
            )
        found[name].append((target, Path(file)))
    return found


def is_finished(row: MethodRow) -> bool:
    """Whether all that the row says is there and up to date."""
    if row.words and not is_made(row.file, row.words):
        return False
    records = [row.beside(".audit.json"), *([row.beside(".latency.json")] if row.target == "onnxruntime" else [])]
    return is_made(row.result, row.accuracy_words) and all(map(is_current, records))


def complete(row: MethodRow, made: Make) -> None:
    """
    Makes and measures the row's model as far as that is not done.

    Raises:
        PipelineError: it cannot be had; its files are as far as it went.
    """
    if row.words:
        made(row.file, row.words)
    made(row.result, row.accuracy_words)
    audit = row.beside(".audit.json")
    if not is_current(audit):
        write_json(audit, {**provenance({"model": row.file}), "audit": audit_of(row.file)})
    latency = row.beside(".latency.json")
    if row.target == "onnxruntime" and not is_current(latency):
        environment = read_environment()  # before it is measured: the load is that which others cause
        numbers = latency_of(row.model, row.file)
        inputs = {"float": row.model.file, "int8": row.file}
        write_json(latency, {**provenance(inputs), "environment": environment, "numbers": numbers})


def audit_of(model: Path) -> Dict[str, Any]:
    """What `calibration.audit --json` prints."""
    return printed_json(["calibration.audit", str(model), "--json"])


def latency_of(model: Model, int8: Path) -> Dict[str, Any]:
    """
    `float_ms` and `int8_ms`, medians of an inference; `times`: float over INT8, median, lowest and highest round; and
    `others_cores`, as `latencies`.
    """
    image = load_coco(*split_paths(model.data, model.split), check_files=False).images[0]
    sessions = {"float": open_session(model.file, threads=1), "int8": open_session(int8, threads=1)}
    measured = latencies(sessions, image.path)
    return {
        "float_ms": measured["ms"]["float"],
        "int8_ms": measured["ms"]["int8"],
        "times": ratio(measured, "float", "int8"),
        "description": measured["description"]["int8"],
        "others_cores": measured["others_cores"],
    }


def record_of(row: MethodRow) -> MethodRecord:
    """What the result file says of a finished row."""
    sidecar, result = read_sidecar(row.file), read_result(row.result)
    audit = read_json(row.beside(".audit.json"), MeasurementError, "an audit")["audit"]
    latency = None
    if row.target == "onnxruntime":
        latency = read_json(row.beside(".latency.json"), MeasurementError, "a latency")
        latency = {**latency["numbers"], **{key: latency[key] for key in ("created_utc", "environment")}}
    details = sidecar["details"]
    return {
        "target": row.target,
        "name": row.name,
        "error": None,
        "command": sidecar["command"],
        "sha256": sidecar["artefact"]["sha256"],
        "versions": sidecar["versions"],
        "created_utc": sidecar["created_utc"],
        "method": details.get("method"),
        "num_images": details.get("num_images"),
        "kept_blocks": details.get("budget", {}).get("kept_blocks", []),
        "convolutions": dict(collections.Counter(entry["state"] for entry in audit["products"])),
        "int8_share": audit["int8_share"],
        "faults": audit["faults"],
        **measured(result),
        "latency": latency,
    }


def measured(result: Mapping[str, Any]) -> Dict[str, Any]:
    numbers = result["numbers"]
    return {name: numbers[name] for name in ("AP", "AP50", "best_f1", "against")}


def run_methods(options: MethodsOptions, processes: Processes) -> None:
    """
    Makes and measures what is not yet done, and writes the result files after each row.

    Raises:
        PipelineError: a model cannot be read or measured in float. A row that fails says why in the table instead.
    """
    runs_dir = Path(options.runs_dir or "runs/bench/calibration/methods")
    models = [Model.from_argument(text, runs_dir) for text in options.models]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"the models are named {', '.join(names)}; expected a name of its own for each")
    trained = trained_files(options.int8_aware, models)
    with locked(runs_dir, MeasurementError):
        made = functools.partial(make, processes=processes)
        for model in models:
            made(model.result, model.words)
        rows = [row for model in models for row in rows_of(model, options, trained[model.name])]
        records = {row: record_of(row) for row in rows if is_finished(row)}
        todo = sorted((row for row in rows if row not in records), key=lambda row: not row.seeks_budget)
        print(f"{len(records)} of {len(rows)} rows are done, {len(todo)} to do", flush=True)
        write_methods(options.output, models, rows, records)
        for row in todo:
            try:
                complete(row, made)
                records[row] = record_of(row)
            except PipelineError as error:
                print(f"error: {row}: {error}", file=sys.stderr, flush=True)
                why = str(error).splitlines()[0]
                records[row] = {"target": row.target, "name": row.name, "command": list(row.words), "error": why}
            write_methods(options.output, models, rows, records)


def write_methods(
    output: str, models: Sequence[Model], rows: Sequence[MethodRow], records: Mapping[MethodRow, MethodRecord]
) -> None:
    """Writes `<output>.json`, with all numbers, and `<output>.md`, a table for each model."""
    entries = []
    for model in models:
        result = read_result(model.result)
        entries.append(
            {
                "name": model.name,
                "file": str(model.file),
                "sha256": sha256_of(model.file),
                "data": str(model.data),
                "split": model.split,
                "images": result["data"]["images"],
                **measured(result),
                "rows": [records[row] for row in rows if row.model == model and row in records],
            }
        )
    inputs = {f"{model.name}_annotations": split_paths(model.data, model.split)[0] for model in models}
    document = {
        **provenance(inputs), "environment": read_environment(), "rows_planned": len(rows), "models": entries
    }  # fmt: skip
    write_tables(output, document, methods_markdown(document))


COLUMNS = (
    "method", "AP", "AP50", "against FP32 (95 %)", "best F1 (at score)", "convolutions in INT8 (multiplications)",
)  # fmt: skip
LATENCY_COLUMNS = ("ms, FP32 and INT8", "times faster (rounds)")


def methods_markdown(document: Mapping[str, Any]) -> str:
    """The tables of `methods`, one for each model and target; AP in points."""
    done = sum(len(model["rows"]) for model in document["models"])
    lines = [
        "# INT8 by each method of calibration",
        "",
        f"{done} of {document['rows_planned']} rows, made by `{shell_line(document['command'])}` on "
        f"{document['environment']['cpu']}.",
        "",
    ]
    for model in document["models"]:
        numbers = sorted({row["num_images"] for row in model["rows"] if row.get("num_images") is not None})
        lines += [
            f"## {model['name']}",
            "",
            f"`{model['file']}`, measured on {model['images']} images, the {model['split']} split of `{model['data']}`"
            + (f"; calibrated on {' or '.join(map(str, numbers))} of its train split." if numbers else "."),
            "",
        ]
        for target in dict.fromkeys(row["target"] for row in model["rows"]):
            rows = [row for row in model["rows"] if row["target"] == target]
            timed = any(row.get("latency") for row in rows)
            lines += [
                f"### {model['name']}, {TARGETS[target].title}",
                "",
                *table(
                    (*COLUMNS, *(LATENCY_COLUMNS if timed else ())),
                    [_cells(row, timed) for row in ({**model, "name": "FP32"}, *rows)],
                ),
                "",
                *_notes(rows),
            ]
    lines += [
        "Intervals are a paired bootstrap over the images. Milliseconds: processor time of an inference on ONNX "
        f"Runtime, one thread, median; FP32 and INT8 took turns, {ROUNDS} rounds, and in brackets are the "
        f"lowest and the highest round; disturbed: other programs kept more than {OTHERS_CORES} processors busy. A "
        "file for TensorRT has none here, and its AP is that of ONNX Runtime, which computes between its pairs in "
        "float or in INT8 as it can. The method in brackets is that which `auto` chose; the budget is met on the val "
        "split.",
        "",
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], timed: bool) -> List[str]:
    width = len(COLUMNS) + (len(LATENCY_COLUMNS) if timed else 0)
    if row.get("error"):
        return [row["name"], "failed", *[""] * (width - 2)]
    against, best, latency = row["against"], row["best_f1"], row.get("latency")
    states = row.get("convolutions", {})  # none of the float model
    cells = [
        f"{row['name']} ({row['method']})" if row["name"].startswith("auto") else row["name"],
        points(row["AP"]),
        points(row["AP50"]),
        "" if against is None else f"{points(against['AP_difference'], '+')} ({interval(against)})",
        "" if best is None else f"{best['f1']:.3f} ({best['score']:.3f})",
        f"{states.get('INT8', 0)} of {sum(states.values())} ({_percent(row['int8_share'])})" if states else "",
        *([f"{ms(latency['float_ms'])}, {ms(latency['int8_ms'])}", _ratio(latency)] if latency else []),
    ]
    return [*cells, *[""] * (width - len(cells))]


def _notes(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Why rows failed, and what their budget keeps in float: too long for the table."""
    notes = [f"- {row['name']}: failed: {row['error']}" for row in rows if row["error"]]
    notes += [f"- {row['name']}: in float {', '.join(row['kept_blocks'])}" for row in rows if row.get("kept_blocks")]
    return [*notes, ""] if notes else []


def _percent(share: Optional[float]) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def _ratio(latency: Mapping[str, Any]) -> str:
    ratio, others = latency["times"], latency["others_cores"]
    return f"{times(ratio['median'])} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}){disturbed(others)}"
