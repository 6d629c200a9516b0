"""
Command: whether distillation helps. Trains students with and without it, and writes the table.

    python -m benchmarks.studies.distillation shapes      # five methods, three seeds, on drawn shapes
    python -m benchmarks.studies.distillation bccd        # with and without CrossKD, three seeds, on blood cells
    python -m benchmarks.studies.distillation ablations   # split, tap and norm of the head, one seed, on the shapes
    python -m benchmarks.studies.distillation transfer-bccd    # from scratch and pretrained, each alone and distilled
    python -m benchmarks.studies.distillation transfer-coco    # the same, on few photos of COCO's 80 classes
    python -m benchmarks.studies.distillation easy        # the students of `make demo`, three seeds

To be run from the folder of the checkout. Everything is trained by the training side's own commands, in processes of
their own. The result files are written again after each run, and what is finished is kept: cut it off at any time, and
the same line goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from benchmarks.measuring.bootstrap import interval_from_aps, resampled_ap
from benchmarks.measuring.coco import evaluate
from benchmarks.measuring.environment import read_environment
from benchmarks.studies.tables import check_tables, table, write_tables
from deploy.commands import command_line, shell_line
from deploy.contract import provenance, read_sidecar, sidecar_path
from deploy.dataset import coco_document, load_coco
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import read_json, sha256_of, write_json
from deploy.folder_lock import locked
from deploy.freshness import changed_inputs, made_by, read_start, start_from, write_start
from deploy.layouts import SPLITS, check_splits, split_paths
from deploy.trials import Processes, RayProcesses, add_ray_argument, failure_of, tail_of, trial_processes, work_through

METRICS = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75",
    "AP_small": "small", "AP_medium": "medium", "AP_large": "large",
}  # fmt: skip
"""Number of a result -> its column."""
SHAPES = {
    "shapes": ("--images", "4000", "--size", "128", "--seed", "0", "--held-out", "0.25"),
    "easy": ("--images", "1000", "--size", "128", "--held-out", "0.2", "--difficulty", "easy"),
}
"""Data set that is drawn -> the options of crosskd.shapes; the easy ones are those of `make demo`."""
DATA = {"bccd": "../shared/data/bccd", "coco": "../shared/data/coco_open"}
BACKBONE = "../shared/data/weights/shufflenetv2_x0_5.pth"
"""Pretrained, of the students of `transfer`."""
RESAMPLES = 1000
GROUP_NORM = "model.student.bbox_head.norm_cfg={'type':'GN','num_groups':32,'requires_grad':True}"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train the student: a row of the table."""

    name: str
    baseline: Optional[str]
    """The method that the row is compared with."""
    runs: str
    """Where its runs lie, without the seed: `shapes/none` for `RUNS/shapes/none-0`."""
    overrides: Tuple[str, ...]
    """What differs from the config of the data set, as `--set` of crosskd.distill wants it."""
    options: Tuple[str, ...] = ()
    """Of crosskd.distill, besides."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    name: str
    data_set: str
    """One of SHAPES, which are drawn, or of DATA."""
    seeds: Tuple[int, ...]
    methods: Tuple[Method, ...]
    configs: str = ""
    """Its configs are `<configs>teacher.py` and `<configs>crosskd.py`; none: `configs/studies/<data set>_`."""
    teacher: str = ""
    """Folder of the teacher's run in that of the runs; none: `<data set>_teacher`."""
    teacher_words: Tuple[str, ...] = ("crosskd.train",)
    """The command that makes the teacher, and its options besides config, data and output."""
    comparisons: Tuple[Tuple[str, str], ...] = ()
    """Pairs of methods that are compared besides each with its baseline."""


def _method(name: str, runs: str, method: str, *overrides: str, baseline: Optional[str] = "none") -> Method:
    return Method(name, baseline, runs, (f"model.distill.method={method}", *overrides))


def _methods(folder: str, *names: str) -> Tuple[Method, ...]:
    return tuple(_method(name, f"{folder}/{name}", name, baseline=None if name == "none" else "none") for name in names)


def _transfer(data_set: str) -> Experiment:
    """From scratch against pretrained, alone and distilled, under a teacher that starts from COCO."""
    trained = ("--precision", "fp32")  # what is faster is not measured again in each run
    from_backbone = ("--from", BACKBONE)
    with_head = f"model.student.backbone.init_cfg={{'type':'Pretrained','checkpoint':'{BACKBONE}'}}"

    def cell(name: str, baseline: Optional[str], method: str, options: Tuple[str, ...], *overrides: str) -> Method:
        return Method(
            name, baseline, f"transfer-{data_set}/{name}", (f"model.distill.method={method}", *overrides),
            (*trained, "--teacher-images", "0", *options),
        )  # fmt: skip

    return Experiment(
        f"transfer-{data_set}",
        data_set,
        (0, 1, 2),
        (
            cell("scratch", None, "none", ()),
            cell("scratch-crosskd", "scratch", "crosskd", ()),
            cell("pretrained", "scratch", "none", from_backbone),
            cell("pretrained-crosskd", "pretrained", "crosskd", from_backbone),
            cell("teacher-head-crosskd", "pretrained-crosskd", "crosskd", ("--from", "teacher"), with_head),
        ),
        configs=f"configs/studies/transfer_{data_set}_",
        teacher=f"transfer-{data_set}/teacher",
        teacher_words=("crosskd.train", *trained),
        comparisons=(("pretrained-crosskd", "scratch-crosskd"), ("teacher-head-crosskd", "scratch-crosskd")),
    )


EXPERIMENTS = {
    "shapes": Experiment(
        "shapes", "shapes", (0, 1, 2), _methods("shapes", "none", "mimic", "pkd", "crosskd", "crosskd+pkd")
    ),
    "bccd": Experiment("bccd", "bccd", (0, 1, 2), _methods("bccd", "none", "crosskd")),
    "ablations": Experiment(
        "ablations",
        "shapes",
        (0,),
        (
            *_methods("shapes", "none"),
            *(
                _method(f"split-{split}", f"ablations/split-{split}", "crosskd", f"model.distill.split={split}")
                for split in (0, 1, 2)
            ),
            _method("split-3", "shapes/crosskd", "crosskd"),  # as its config has it
            _method("split-4", "ablations/split-4", "crosskd", "model.distill.split=4"),
            _method("before-activation", "ablations/before-activation", "crosskd",
                    "model.distill.tap=before_activation"),
            Method("float32", "none", "ablations/float32", ("model.distill.method=crosskd",), ("--precision", "fp32")),
            _method("group-norm-none", "ablations/group-norm-none", "none", GROUP_NORM, baseline=None),
            _method("group-norm-crosskd", "ablations/group-norm-crosskd", "crosskd", GROUP_NORM,
                    baseline="group-norm-none"),
        ),
    ),
    "transfer-bccd": _transfer("bccd"),
    "transfer-coco": _transfer("coco"),
    "easy": Experiment(
        "easy", "easy", (0, 1, 2), _methods("easy", "none", "crosskd"), configs="configs/demo/",
        teacher_words=("crosskd.adopt", "--checkpoint", "configs/demo/teacher.pth"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: of the teacher, or of a student by a method and a seed."""

    method: str
    seed: int
    folder: Path
    words: Tuple[str, ...]
    """The module and its options, without `python -m`."""
    weights: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def command(self) -> List[str]:
        return ["python", "-m", *self.words]

    @property
    def files(self) -> List[str]:
        """What its command names that may be files, config and teacher, and the annotations."""
        data = Path(self.words[self.words.index("--data") + 1])
        annotations = [str(data / "annotations" / f"instances_{split}.json") for split in SPLITS]
        return [*self.words[1:], *annotations]


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """How an experiment is run."""

    experiment: str
    """Its name in EXPERIMENTS."""
    data: Optional[str] = None
    """Data folder; None: shapes are drawn, others are in DATA."""
    runs_dir: str = "runs/bench"
    """Folder of the runs."""
    output: str = "benchmarks/results/distillation"
    """Folder of the result files."""
    jobs: int = 2
    """Trainings at a time."""
    ray: Optional[str] = None
    """Address of the Ray that they run on; None: this machine."""
    epochs: Optional[int] = None
    """Of every training, the teacher's too; None: the configs'."""
    seeds: Optional[Sequence[int]] = None
    """None: the experiment's."""
    only: Optional[Sequence[str]] = None
    """Methods to train; None: all."""


RunRecord = Dict[str, Any]
"""What the result file says of a finished run."""


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Trains what is not yet trained and writes the result files; status 2 if a run failed."""
    options = DistillationOptions(**vars(_parser().parse_args(argv)))
    experiment = EXPERIMENTS[options.experiment]
    check_tables(Path(options.output) / experiment.name)
    _check_options(options, experiment)
    with trial_processes(options.ray, options.jobs) as processes:
        run_experiment(experiment, dataclasses.replace(options, jobs=processes.jobs), processes)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.distillation",
        description="Train students with and without distillation; compare.",
    )
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--data", metavar="DIR", help="data folder (default: shapes are drawn below "
                        f"RUNS, {', '.join(f'{name} is {folder}' for name, folder in DATA.items())})")  # fmt: skip
    parser.add_argument("--runs-dir", metavar="RUNS", default="runs/bench", help="folder of the runs (%(default)s)")
    parser.add_argument("-o", "--output", metavar="DIR", default="benchmarks/results/distillation",
                        help="folder of the result files (%(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each; 1: one, with all the "
                        "threads (%(default)s)")  # fmt: skip
    add_ray_argument(parser)
    parser.add_argument("--epochs", type=int, help="of every training, the teacher's too (default: the configs')")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="(default: 0 1 2; of ablations 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train only these methods (default: all)")
    return parser


def _check_options(options: DistillationOptions, experiment: Experiment) -> None:
    names = [method.name for method in experiment.methods]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        raise ConfigError(f"--only {' '.join(unknown)}: no such method in {experiment.name}; expected some of {names}")
    for flag, least, values in (
        ("--jobs", 1, [options.jobs]),
        ("--epochs", 1, [options.epochs] if options.epochs is not None else []),
        ("--seeds", 0, options.seeds or []),
    ):
        if any(value < least for value in values):
            raise ConfigError(f"{flag} is {min(values)}; expected at least {least}")
    config = Path(config_of(experiment, "crosskd"))
    if not config.is_file():
        raise ConfigError(f"there is no {config} here; run this command in the folder of the checkout")


def config_of(experiment: Experiment, what: str) -> str:
    return f"{experiment.configs or f'configs/studies/{experiment.data_set}_'}{what}.py"


def run_experiment(experiment: Experiment, options: DistillationOptions, processes: Processes) -> None:
    """
    Trains and measures what is not yet done, teacher first, and writes the result files after each run.

    Raises:
        PipelineError: the data or the teacher cannot be had, or a finished run is of another command or other files.
        MeasurementError: runs failed; each was told of when it did, and the others were done all the same.
    """
    data = data_of(experiment, options, processes)
    teacher = teacher_run(experiment, options, data)
    complete = functools.partial(complete_run, data=data, processes=processes, jobs=options.jobs)
    teacher_record = complete(teacher, alone=True)
    runs = planned_runs(experiment, options, data, teacher.weights)
    records = {run: record for run, record in ((run, finished_run(run, data)) for run in runs) if record is not None}
    todo = [run for run in runs if run not in records and run.method in (options.only or [run.method])]
    print(f"{experiment.name}: {len(records)} of {len(runs)} runs are done, {len(todo)} to do", flush=True)

    def write() -> None:
        done = [records[run] for run in runs if run in records]
        write_results(experiment, Path(options.output), data, teacher_record, done, len(runs))

    write()

    def done(run: Run, record: RunRecord) -> None:
        records[run] = record
        write()

    failed = [str(run) for run in work_through(todo, complete, done, processes, options.jobs)]
    if failed:
        raise MeasurementError(
            f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}; why is above and in their log.txt. Put "
            "that right and run the same command again: what is finished is kept"
        )


def data_of(experiment: Experiment, options: DistillationOptions, processes: Processes) -> Path:
    """
    The data folder; shapes are drawn if they are not there.

    Raises:
        PipelineError: a split is missing, or the folder holds something else.
    """
    name = experiment.data_set
    if name in SHAPES:
        folder = Path(options.data or f"{options.runs_dir}/{name}_data")
        log = Path(options.runs_dir) / f"{name}_data.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        if processes.run(["crosskd.shapes", str(folder), *SHAPES[name]], log, alone=True):
            raise MeasurementError(f"the shapes cannot be drawn:\n{tail_of(log)}")
    else:
        folder = Path(options.data or DATA[name])
    check_splits(folder)
    return folder


def teacher_run(experiment: Experiment, options: DistillationOptions, data: Path) -> Run:
    folder = Path(options.runs_dir) / (experiment.teacher or f"{experiment.data_set}_teacher")
    module, *flags = experiment.teacher_words
    epochs = _epochs(options) if module == "crosskd.train" else []
    words = (module, config_of(experiment, "teacher"), "--data", str(data), *epochs, *flags, "-o", str(folder))
    return Run("teacher", 0, folder, words, folder / "detector.pth")


def planned_runs(experiment: Experiment, options: DistillationOptions, data: Path, teacher: Path) -> List[Run]:
    """Every student of the experiment; all methods of a seed before the next seed, so that any part is balanced."""
    runs = []
    for seed in options.seeds or experiment.seeds:
        for method in experiment.methods:
            folder = Path(options.runs_dir) / f"{method.runs}-{seed}"
            words = (
                "crosskd.distill", config_of(experiment, "crosskd"), "--data", str(data),
                "--teacher-checkpoint", str(teacher), "--seed", str(seed), *_epochs(options),
                "--set", *method.overrides, "-o", str(folder), *method.options,
            )  # fmt: skip
            runs.append(Run(method.name, seed, folder, words, folder / "student.pth"))
    return runs


def _epochs(options: DistillationOptions) -> List[str]:
    return [] if options.epochs is None else ["--epochs", str(options.epochs)]


def finished_run(run: Run, data: Path) -> Optional[RunRecord]:
    """
    What the result file says of the run, or None if it is not yet trained and measured.

    Raises:
        ConfigError: it is trained, but by another command or from other files. ContractError: its weights were changed.
    """
    if not sidecar_path(run.weights).is_file():
        return None
    sidecar = read_sidecar(run.weights)
    if run.method != "teacher":  # which is taken as it is: it may have been trained elsewhere, or for longer
        _check_made_by(run, sidecar)
    measured = _json_or_empty(run.folder / "test.json")
    if measured.get("of") != _measured_of(run, data):
        return None
    details, timing = sidecar["details"], _json_or_empty(run.folder / "timing.json")
    seconds = timing.get("train_s") if "iterations" in details else None
    return {
        "method": run.method,
        "seed": run.seed,
        "folder": str(run.folder),
        "command": sidecar["command"],
        "weights_sha256": sidecar["artefact"]["sha256"],
        "versions": sidecar["versions"],
        "created_utc": sidecar["created_utc"],
        **{key: details.get(key) for key in ("parameters", "epochs", "iterations", "precision", "device")},
        "train_s": seconds,
        "cpu_s": timing.get("cpu_s"),
        "train_ms_per_step": None if seconds is None else round(1000 * seconds / details["iterations"], 1),
        "jobs": timing.get("jobs"),
        "numbers": measured["numbers"],
    }


def _check_made_by(run: Run, sidecar: Mapping[str, Any]) -> None:
    if made_by(sidecar) != run.command:
        raise ConfigError(
            f"{run.folder} was made by `{shell_line(made_by(sidecar))}`; expected `{shell_line(run.command)}`. Give "
            "another --runs-dir, or delete the folder"
        )
    for name in changed_inputs(sidecar):
        raise ConfigError(
            f"{name} is not what {run.folder} was made from, or is gone. Bring it back, or delete the folder"
        )


def complete_run(run: Run, data: Path, processes: Processes, jobs: int, alone: bool = False) -> RunRecord:
    """
    Trains and measures the run as far as that is not done.

    Raises:
        PipelineError: it failed, with the end of its log; or another process is at it.
    """
    with locked(run.folder, MeasurementError):
        began = time.monotonic()
        if not sidecar_path(run.weights).is_file():
            _train(run, processes, 1 if alone else jobs, alone)
        record = finished_run(run, data)
        if record is None:
            _measure(run, data, processes, alone)
            record = finished_run(run, data)
        assert record is not None
    ap = record["numbers"]["AP"]
    print(f"{run.folder}: AP {100 * ap:.1f}, {time.monotonic() - began:.0f} s", flush=True)
    return record


def _train(run: Run, processes: Processes, jobs: int, alone: bool) -> None:
    started = start_from(run.words, run.files)
    left = run.folder / "last_checkpoint"
    resume = left.is_file() and read_start(run.folder) == started
    if left.is_file() and not resume:
        print(f"{run.folder}: begun by another command or from other files; it starts anew", flush=True)
        left.unlink()
    (run.folder / "timing.json").unlink(missing_ok=True)
    write_start(run.folder, started)
    words = [*run.words, "--resume"] if resume else run.words
    print(command_line(*words), flush=True)
    began, cpu_began = time.monotonic(), _cpu_s_of_children()
    _run(words, run, processes, alone)
    timing: Dict[str, Any] = {"train_s": None, "cpu_s": None, "jobs": jobs}
    if not resume:
        timing["train_s"] = round(time.monotonic() - began, 1)
        if jobs == 1 and not isinstance(processes, RayProcesses):  # else of all jobs, or elsewhere
            timing["cpu_s"] = round(_cpu_s_of_children() - cpu_began, 1)
    write_json(run.folder / "timing.json", timing)


def _cpu_s_of_children() -> float:
    """Processor seconds of all processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _measure(run: Run, data: Path, processes: Processes, alone: bool) -> None:
    annotations_path, images_dir = split_paths(data, "test")
    detections_path = run.folder / "test.bbox.json"
    words = [
        "crosskd.predict", str(run.folder), "--annotations", str(annotations_path), "--images-dir", str(images_dir),
        "-o", str(detections_path),
    ]  # fmt: skip
    _run(words, run, processes, alone)
    annotations = _annotations(annotations_path)
    detections = read_json(detections_path, MeasurementError, "the COCO results of crosskd.predict")
    numbers = evaluate(annotations, detections, [image["id"] for image in annotations["images"]])
    write_json(run.folder / "test.json", {"of": _measured_of(run, data), "numbers": numbers})


def _run(words: Sequence[str], run: Run, processes: Processes, alone: bool) -> None:
    log = run.folder / "log.txt"
    status = processes.run(words, log, alone)
    if status:
        raise failure_of(status)(f"{words[0]} ended with status {status}; the end of {log}:\n{tail_of(log)}")


def _measured_of(run: Run, data: Path) -> Dict[str, str]:
    """Hashes of what a measurement depends on."""
    return {"weights_sha256": sha256_of(run.weights), "annotations_sha256": sha256_of(split_paths(data, "test")[0])}


def _json_or_empty(path: Path) -> Dict[str, Any]:
    return dict(read_json(path, MeasurementError, "what an earlier run left")) if path.is_file() else {}


def write_results(
    experiment: Experiment, output: Path, data: Path, teacher: RunRecord, records: Sequence[RunRecord], planned: int
) -> None:
    """Writes `<experiment>.json`, with every run's numbers, and `<experiment>.md`, the table."""
    annotations = split_paths(data, "test")[0]
    document = {
        **provenance({"test_annotations": annotations}),
        "experiment": experiment.name,
        "environment": read_environment(),
        "runs_planned": planned,
        "teacher": teacher,
        "methods": [row_of(method, records, annotations) for method in experiment.methods],
        "comparisons": [
            {"name": name, "baseline": baseline, "difference": difference_of(name, baseline, records, annotations)}
            for name, baseline in experiment.comparisons
        ],
        "runs": list(records),
    }
    write_tables(output / experiment.name, document, markdown_of(document))


def row_of(method: Method, records: Sequence[RunRecord], annotations: Path) -> Dict[str, Any]:
    """Mean and spread over the seeds of a method, and the difference to the same seeds of its baseline."""
    own = {record["seed"]: record for record in records if record["method"] == method.name}
    return {
        "name": method.name,
        "baseline": method.baseline,
        "overrides": list(method.overrides),
        "seeds": list(own),
        "numbers": {name: _mean_and_std([one["numbers"][name] for one in own.values()]) for name in METRICS},
        "difference": difference_of(method.name, method.baseline, records, annotations),
        "train_s": _mean_and_std([one["train_s"] for one in own.values()])["mean"],
        "cpu_s": _mean_and_std([one["cpu_s"] for one in own.values()])["mean"],
        "train_ms_per_step": _mean_and_std([one["train_ms_per_step"] for one in own.values()])["mean"],
    }


def difference_of(
    name: str, baseline: Optional[str], records: Sequence[RunRecord], annotations: Path
) -> Dict[str, Any]:
    """AP of a method less that of another, of the seeds that both have."""
    first, second = ({one["seed"]: one for one in records if one["method"] == method} for method in (name, baseline))
    pairs = {seed: (first[seed], second[seed]) for seed in first if seed in second}
    differences = {seed: one["numbers"]["AP"] - other["numbers"]["AP"] for seed, (one, other) in pairs.items()}
    return {
        "mean": statistics.mean(differences.values()) if differences else None,
        "by_seed": {str(seed): value for seed, value in differences.items()},
        "interval": _interval(list(pairs.values()), annotations) if pairs else None,
    }


def _mean_and_std(values: Sequence[Optional[float]]) -> Dict[str, Optional[float]]:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
    }


def _interval(pairs: Sequence[Tuple[RunRecord, RunRecord]], annotations: Path) -> Dict[str, Any]:
    aps = [(_aps_of(first, annotations), _aps_of(second, annotations)) for first, second in pairs]
    images = _annotations(annotations)["images"]
    return dataclasses.asdict(interval_from_aps(aps, len(images)))


def _aps_of(record: RunRecord, annotations_path: Path) -> np.ndarray:
    return _resampled_ap(Path(record["folder"]) / "test.bbox.json", annotations_path)


@functools.lru_cache(maxsize=None)
def _annotations(path: Path) -> Dict[str, Any]:
    """The checked annotations of a file, as they are measured with."""
    return coco_document(load_coco(path, path.parent, check_files=False), as_annotated=True)


@functools.lru_cache(maxsize=None)
def _resampled_ap(detections_path: Path, annotations_path: Path) -> np.ndarray:
    """Of a finished run, so that neither file changes: seconds of work that each writing of the table asks for."""
    annotations = _annotations(annotations_path)
    detections = read_json(detections_path, MeasurementError, "the COCO results of crosskd.predict")
    return resampled_ap(annotations, detections, [image["id"] for image in annotations["images"]], RESAMPLES)


def markdown_of(document: Mapping[str, Any]) -> str:
    """The table of a result file, in points: percent of AP."""
    teacher, environment = document["teacher"], document["environment"]
    columns = [
        "method", *METRICS.values(), "AP against", "difference (by seed)", "95 % interval", "seeds", "s per run",
        "CPU s per run", "ms per step",
    ]  # fmt: skip
    lines = [
        f"# Distillation: {document['experiment']}",
        "",
        f"{len(document['runs'])} of {document['runs_planned']} runs, made by `{shell_line(document['command'])}` on "
        f"{environment['cpu']}, {environment['cores_usable']} cores. COCO metrics of the test split in percent: mean ± "
        "standard deviation over the seeds.",
        "",
        "Teacher: " + ", ".join(f"{title} {_points(teacher['numbers'][name])}" for name, title in METRICS.items())
        + f" ({teacher['parameters'] / 1e6:.2f} M parameters"
        + (f", {teacher['epochs']} epochs)." if teacher["epochs"] is not None else ")."),
        "",
        *table(columns, [_cells(row) for row in document["methods"]]),
        "",
        *_comparisons(document["comparisons"]),
        "The interval is a paired bootstrap over the test images, averaged over the seeds: it says how much of the "
        "difference may be due to the choice of images, not of seeds. Times are those of whole processes, start-up and "
        "data included, and with several jobs at a time only rough; resumed runs have none. CPU s: processor time, "
        "which other work on the machine hardly lengthens; of one job at a time.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> List[str]:
    cells = [row["name"]]
    for name in METRICS:
        number = row["numbers"][name]
        cells.append(_points(number["mean"]) + (f" ± {_points(number['std'])}" if number["std"] is not None else ""))
    return [
        *cells,
        row["baseline"] or "",
        *_difference_cells(row["difference"]),
        str(len(row["seeds"])),
        "" if row["train_s"] is None else f"{row['train_s']:.0f}",
        "" if row["cpu_s"] is None else f"{row['cpu_s']:.0f}",
        "" if row["train_ms_per_step"] is None else f"{row['train_ms_per_step']:.0f}",
    ]


def _comparisons(comparisons: Sequence[Mapping[str, Any]]) -> List[str]:
    rows = [[one["name"], one["baseline"], *_difference_cells(one["difference"])] for one in comparisons]
    return [*table(["method", "AP against", "difference (by seed)", "95 % interval"], rows), ""] if rows else []


def _difference_cells(difference: Mapping[str, Any]) -> List[str]:
    """The mean with each seed's, and the interval."""
    bounds = difference["interval"]
    by_seed = ", ".join(_points(value, "+") for value in difference["by_seed"].values())
    return [
        f"{_points(difference['mean'], '+')} ({by_seed})" if by_seed else "",
        f"{_points(bounds['low'], '+')} to {_points(bounds['high'], '+')}" if bounds else "",
    ]


def _points(fraction: Optional[float], sign: str = "") -> str:
    return "" if fraction is None else f"{100 * fraction:{sign}.1f}"


if __name__ == "__main__":
    sys.exit(main())
