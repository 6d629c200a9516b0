"""
What INT8-aware training wins back: `python -m benchmarks.studies.calibration int8-aware`.

The student is quantised as it is; trained further by crosskd.distill --quantize int8; and, so that what longer training
alone gains is known, trained further without rounding and then quantised.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from benchmarks.measuring.bootstrap import bounds_of_draws
from benchmarks.measuring.environment import read_environment
from benchmarks.measuring.result import read_result
from benchmarks.reporting.wording import UNKNOWN
from benchmarks.studies.calibration_methods import accuracy_words, images_to_calibrate_on, measured
from benchmarks.studies.jobs import Make, is_current, make
from benchmarks.studies.tables import interval, points, table, write_tables
from deploy.commands import shell_line
from deploy.contract import provenance, read_sidecar, sidecar_path, weights_of_run
from deploy.errors import ConfigError, MeasurementError
from deploy.folder_lock import locked
from deploy.layouts import split_paths
from deploy.trials import Processes, work_through

INT8_AWARE, FINE_TUNED = "INT8-aware", "fine-tuned, then INT8"
STILL_NORMS = "custom_hooks=[{'type':'FreezeHeadNormsHook','begin':0.0,'whole_detector':True}]"
"""As in INT8-aware training."""

FineTuningRecord = Dict[str, Any]
"""What the result file says of a training."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A student that is trained on, and becomes an INT8 model: with the rounding before its eyes, or without."""

    kind: str
    """INT8_AWARE or FINE_TUNED."""
    seed: int
    folder: Path
    words: Tuple[str, ...]
    """The command that trains it."""

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def weights(self) -> Path:
        return self.folder / "student.pth"

    @property
    def model(self) -> Path:
        return self.folder / "student.onnx"

    @property
    def int8(self) -> Path:
        return self.folder / "student.int8.onnx"


@dataclasses.dataclass(frozen=True)
class Int8AwareOptions:
    """Which student is fine-tuned, how."""

    config: str
    """Of crosskd.distill."""
    student: str
    """A finished run of the student."""
    teacher: str
    """File of the teacher's weights."""
    data: str
    """Data folder."""
    epochs: int
    """Of each fine-tuning."""
    learning_rate: float
    """Of each fine-tuning."""
    output: str
    """Stem of the result files."""
    runs_dir: Optional[str] = None
    """Folder of what is made on the way; None: runs/bench/calibration/int8_aware."""
    seeds: Sequence[int] = (0, 1, 2)
    """One fine-tuning with and one without INT8 for each."""
    target: str = "tensorrt"
    """What to quantise for."""
    method: str = "max"
    """Of calibration."""
    jobs: int = 2
    """Trainings at a time."""
    ray: Optional[str] = None
    """Address of the Ray that they run on; None: this machine."""

    def __post_init__(self) -> None:
        for flag, least, values in (
            ("--jobs", 1, [self.jobs]), ("--epochs", 1, [self.epochs]), ("--seeds", 0, self.seeds)
        ):  # fmt: skip
            if min(values) < least:
                raise ConfigError(f"{flag} is {min(values)}; expected at least {least}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"--learning-rate is {self.learning_rate}; expected a number above 0")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds are {list(self.seeds)}; expected each once")
        for file in (self.config, self.teacher):
            if not Path(file).is_file():
                raise ConfigError(f"no such file: {file}; expected the config and the teacher's weights")


def planned_fine_tunings(options: Int8AwareOptions, folder: Path, calibrated: Path) -> List[FineTuning]:
    """
    Both kinds of a seed before the next seed, so that any part is balanced.

    Args:
        calibrated: the student's INT8 model, whose placement and ranges INT8-aware training begins with.
    """
    quantize = ("--quantize", "int8", "--calibrated", str(calibrated))
    rate = f"optim_wrapper.optimizer.lr={options.learning_rate:g}"
    found = []
    for seed in options.seeds:
        for kind, flags, name in ((INT8_AWARE, quantize, "int8-aware"), (FINE_TUNED, (STILL_NORMS,), "float")):
            run = folder / f"{name}-{seed}"
            words = (
                "crosskd.distill", options.config, "--data", options.data, "--teacher-checkpoint",
                options.teacher, "--from", str(weights_of_run(options.student)), "--seed", str(seed),
                "--epochs", str(options.epochs), "--precision", "fp32", "--set", rate, *flags, "-o", str(run),
            )  # fmt: skip
            found.append(FineTuning(kind, seed, run, words))
    return found


def complete_fine_tuning(run: FineTuning, options: Int8AwareOptions, against: Path, made: Make) -> FineTuningRecord:
    """
    What the result file says of the run, after all that is not yet done.

    Args:
        against: the accuracy result of the student in float.

    Raises:
        PipelineError: it cannot be trained or measured.
    """
    if run.kind == INT8_AWARE and not (is_current(run.model) and is_current(run.int8)):
        sidecar_path(run.weights).unlink(missing_ok=True)  # cut off between its files: these are none, or older ones
    made(run.weights, run.words)
    if run.kind == FINE_TUNED:
        export_and_quantize(run.folder, run.model, run.int8, options, made)
    results = measure_pair(run.model, run.int8, options, against, made)
    sidecar = read_sidecar(run.weights)
    return {
        "kind": run.kind,
        "seed": run.seed,
        "folder": str(run.folder),
        "command": sidecar["command"],
        "weights_sha256": sidecar["artefact"]["sha256"],
        "versions": sidecar["versions"],
        "created_utc": sidecar["created_utc"],
        **{precision: measured(result) for precision, result in results.items()},
        "draws": results["int8"]["numbers"]["bootstrap"]["ap"],
    }


def export_and_quantize(run_dir: Path, model: Path, int8: Path, options: Int8AwareOptions, made: Make) -> None:
    """Writes a run's float and INT8 model, the latter with ranges over images."""
    made(model, ["deploy.export", str(run_dir), "-o", str(model)])
    words = [
        "calibration.quantize", str(model), "--data", options.data, "--target", options.target,
        "--method", options.method, "--num-images", str(images_to_calibrate_on(Path(options.data))),
        "-o", str(int8),
    ]  # fmt: skip
    made(int8, words)


def measure_pair(
    model: Path, int8: Path, options: Int8AwareOptions, against: Optional[Path], made: Make
) -> Dict[str, Mapping[str, Any]]:
    """The accuracy results on the test split, `float` and `int8`; without `against` the one against the other."""
    found: Dict[str, Mapping[str, Any]] = {}
    for precision, file in (("float", model), ("int8", int8)):
        result = file.with_suffix(".accuracy.result.json")
        made(result, accuracy_words(file, Path(options.data), "test", result, against))
        found[precision] = read_result(result)
        against = against or result
    return found


def run_int8_aware(options: Int8AwareOptions, processes: Processes) -> None:
    """
    Makes and measures what is not yet done, and writes the result files after each training.

    Raises:
        PipelineError: the student cannot be exported, quantised or measured.
        MeasurementError: trainings failed; each was told of when it did, and the others were done all the same.
    """
    folder = Path(options.runs_dir or "runs/bench/calibration/int8_aware")
    with locked(folder, MeasurementError):
        made = functools.partial(make, processes=processes)
        model, int8 = folder / "student.onnx", folder / "student.int8.onnx"
        export_and_quantize(Path(options.student), model, int8, options, made)
        student = measure_pair(model, int8, options, None, made)
        against = model.with_suffix(".accuracy.result.json")
        runs = planned_fine_tunings(options, folder, int8)
        records: Dict[FineTuning, FineTuningRecord] = {}

        def done(run: FineTuning, record: FineTuningRecord) -> None:
            records[run] = record
            print(f"{run}: AP {points(record['int8']['AP'])} in INT8", flush=True)
            write_int8_aware(options, student, [records[one] for one in runs if one in records], len(runs))

        def work(run: FineTuning) -> FineTuningRecord:
            return complete_fine_tuning(run, options, against, made)

        failed = work_through(runs, work, done, processes, options.jobs)
    if failed:
        raise MeasurementError(
            f"{len(failed)} of {len(runs)} trainings failed: {', '.join(map(str, failed))}; why is above. Put that "
            "right and run the same command again: what is finished is kept"
        )


def write_int8_aware(
    options: Int8AwareOptions,
    student: Mapping[str, Mapping[str, Any]],
    records: Sequence[FineTuningRecord],
    planned: int,
) -> None:
    """Writes the result files: JSON with all numbers, and the table."""
    plain, rounded = (np.array(student[name]["numbers"]["bootstrap"]["ap"], np.float64) for name in ("float", "int8"))
    kinds = {}
    for kind in (INT8_AWARE, FINE_TUNED):
        draws = [np.array(one["draws"], np.float64) for one in records if one["kind"] == kind]
        if draws:
            kinds[kind] = recovery(np.mean(draws, axis=0), plain, rounded)
    runs = []
    for one in records:
        entry = {key: value for key, value in one.items() if key != "draws"}
        runs.append({**entry, "recovered": recovery(np.array(one["draws"], np.float64), plain, rounded)["recovered"]})
    document = {
        **provenance({"test_annotations": split_paths(options.data, "test")[0]}),
        "environment": read_environment(),
        **{key: getattr(options, key) for key in ("config", "target", "method", "epochs", "learning_rate", "seeds")},
        "images": student["float"]["data"]["images"],
        "float": measured(student["float"]),
        "int8": measured(student["int8"]),
        "kinds": kinds,
        "runs_planned": planned,
        "runs": runs,
    }
    write_tables(options.output, document, int8_aware_markdown(document))


def recovery(aps: np.ndarray, plain: np.ndarray, rounded: np.ndarray) -> Dict[str, Any]:
    """
    `AP`; its difference to the float student, `to_float`, and to the quantised one, `to_int8`; and `recovered`, the
    part of what quantisation lost that it has back, None where that loss may be none. All but `AP` have `value`, `low`
    and `high` (95 %).

    Args:
        aps, plain, rounded: (1 + draws,): AP of the model, of the float student and of the quantised one, of the images
            as they are and of each draw of them, the same draws for all.
    """
    found: Dict[str, Any] = {"AP": float(aps[0])}
    for name, values in (("to_float", aps - plain), ("to_int8", aps - rounded)):
        found[name] = dict(zip(("value", "low", "high"), bounds_of_draws(values)))
    lost = plain - rounded
    sure = bounds_of_draws(lost)[1] > 0
    share = bounds_of_draws((aps - rounded) / np.where(lost > 0, lost, np.nan)) if sure else None
    return {**found, "recovered": dict(zip(("value", "low", "high"), share)) if share else None}


def int8_aware_markdown(document: Mapping[str, Any]) -> str:
    """The table of `int8-aware`; AP in points."""
    plain, rounded = document["float"], document["int8"]
    rows = [["the student", "", points(plain["AP"]), "", "", "", ""]]
    lost = rounded["against"]
    rows.append(
        [f"quantised ({document['method']})", "", points(plain["AP"]), points(rounded["AP"]),
         points(lost["AP_difference"], "+"), interval(lost), ""]
    )  # fmt: skip
    for kind, mean in document["kinds"].items():
        runs = [run for run in document["runs"] if run["kind"] == kind]
        for run in runs:
            against, share = run["int8"]["against"], run["recovered"]
            rows.append(
                [kind, str(run["seed"]), points(run["float"]["AP"]), points(run["int8"]["AP"]),
                 points(against["AP_difference"], "+"), interval(against), _recovered(share)]
            )  # fmt: skip
        average = statistics.mean(run["float"]["AP"] for run in runs)
        rows.append(
            [kind, "mean", points(average), points(mean["AP"]), points(mean["to_float"]["value"], "+"),
             interval(mean["to_float"]), _recovered(mean["recovered"])]
        )  # fmt: skip
    columns = ["model", "seed", "AP in FP32", "AP in INT8", "against the student", "95 % interval",
               "of the loss recovered (95 %)"]  # fmt: skip
    return "\n".join(
        [
            "# INT8-aware CrossKD",
            "",
            f"{len(document['runs'])} of {document['runs_planned']} trainings, made by "
            f"`{shell_line(document['command'])}` on {document['environment']['cpu']}; INT8 for {document['target']}, "
            f"{document['images']} test images.",
            "",
            *table(columns, rows),
            "",
            f"Both kinds start from the student and train for {document['epochs']} epochs, at a learning rate of "
            f"{document['learning_rate']:g}, with the same seeds, and hold the statistics of all norms still; "
            f"`{FINE_TUNED}` without rounding, quantised afterwards as the student was: what longer training alone "
            "gains. Intervals are a paired bootstrap over the images, of means over the seeds where they are of means; "
            "no share where the loss itself may be none.",
            "",
        ]
    )


def _recovered(share: Optional[Mapping[str, float]]) -> str:
    if share is None:
        return UNKNOWN
    value, low, high = (f"{100 * share[name]:.0f}" for name in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"
