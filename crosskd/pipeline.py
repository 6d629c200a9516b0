"""
Runs the whole job: `python -m crosskd.pipeline CONFIG --data DIR -o DIR`, from images to a verdict.

Prints each stage's command and runs it as a process of its own. A stage whose command, inputs and artefact are those
that its sidecar records is skipped, so the same line goes on after an interruption. Needs the training and the edge
packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from crosskd.config import load_config, path_beside
from crosskd.data import add_training_data_arguments, load_splits
from crosskd.settings import check_settings
from deploy.commands import command_line, run_status
from deploy.data_arguments import add_data_argument
from deploy.errors import ConfigError, PipelineError, command
from deploy.files import check_writable
from deploy.freshness import is_made, read_start, start_from, write_start
from deploy.layouts import SPLITS, annotations_path, has_split, split_paths
from deploy.targets import QUANTISED_FOR
from deploy.tensorrt.bindings import load_tensorrt
from deploy.tensorrt.cuda import load_cuda


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """What the whole job is run with."""

    config: str
    """File of the distillation's config."""
    data: str
    """Data folder."""
    output: Path
    """Folder for everything that is made."""
    teacher_checkpoint: str | None = None
    """Weights of a teacher that is already trained; None: the config's, or it is trained."""
    target: str = "onnxruntime"
    """What the model shall run on: one of `deploy.targets.QUANTISED_FOR`."""
    limits: str | None = None
    """TOML file of limits for the verdict; None: the config's report_limits."""
    seed: int = 0
    """Of the trainings."""
    strict: bool = False
    """Refuse annotations with any box of no use."""
    drop_empty_classes: bool = False
    """Leave out the classes that have no box in any split."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of the pipeline and the file that it leaves."""

    name: str
    words: list[str]
    """The module and its arguments, without `python -m`."""
    artefact: Path

    @property
    def makes_run(self) -> bool:
        """Whether it makes a run directory, from the config that is its first argument."""
        return self.words[0].startswith("crosskd.")

    @property
    def is_training(self) -> bool:
        return self.words[0] in ("crosskd.train", "crosskd.distill")

    @property
    def command(self) -> list[str]:
        return ["python", "-m", *self.words]


@command
def main(argv: list[str] | None = None) -> int:
    options = PipelineOptions(**vars(command_parser().parse_args(argv)))
    check_writable(options.output / "report.html")
    if options.target == "tensorrt":  # asked for before hours of training
        load_tensorrt("--target tensorrt")
        load_cuda("--target tensorrt").close()
    if options.limits and not Path(options.limits).is_file():
        raise ConfigError(f"--limits is {options.limits}; expected a TOML file of limits")
    config = load_config(options.config)
    stages = planned_stages(options, config)
    check_settings(config, str(options.config))  # before the teacher's training, not after it
    splits = SPLITS if has_split(options.data, "test") else SPLITS[:2]
    load_splits(
        {split: split_paths(options.data, split) for split in splits}, options.strict, options.drop_empty_classes
    )
    if len(splits) < len(SPLITS):
        print(f"{options.data} has no test split: measured on val, which the trainings are watched on, too")
    status = run_stages(stages)
    print(f"report: {options.output / 'report.html'}")
    return status


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.pipeline", description="Train, distil, export, quantise, measure, report."
    )
    parser.add_argument("config", metavar="CONFIG", help="a config whose model is a CrossKDDetector")
    add_data_argument(parser, required=True)
    add_training_data_arguments(parser)
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="folder for everything that is made"
    )
    parser.add_argument("--teacher-checkpoint", metavar="FILE", help="weights of a teacher that is already trained")
    parser.add_argument(
        "--target",
        choices=QUANTISED_FOR,
        default="onnxruntime",
        help="what the model shall run on (default: onnxruntime)",
    )
    parser.add_argument("--limits", metavar="FILE", help="TOML file of limits for the verdict, see benchmarks.report "
                        "(default: the config's report_limits)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the trainings (%(default)s)")
    return parser


def planned_stages(options: PipelineOptions, config: Any) -> list[Stage]:
    """
    The stages in order.

    Raises:
        ConfigError: the config is no distillation, or its student cannot be exported.
    """
    import crosskd.models.families  # noqa: F401  registers them
    from crosskd.models.heads import heads_with_decoder

    if config.model.type != "CrossKDDetector":
        raise ConfigError(f"{options.config}: model.type is {config.model.type}; expected CrossKDDetector")
    head = config.model.student.bbox_head.type
    if head not in heads_with_decoder():  # said before hours of training
        raise ConfigError(
            f"{options.config}: the student's head is a {head}, which cannot be exported; expected "
            f"one of {', '.join(heads_with_decoder())}. To train it, run crosskd.distill."
        )
    out, data, seed = options.output, options.data, str(options.seed)
    strict = ["--strict"] if options.strict else []
    measured = ["--data", data, *strict]
    if not has_split(data, "test"):
        measured += ["--split", "val"]
    teacher, baseline, student = out / "teacher", out / "baseline", out / "student"
    stages = [teacher_stage(options, config, teacher)]

    def add(name: str, artefact: Path, *words: str | Path) -> Path:
        stages.append(Stage(name, [str(word) for word in words], artefact))
        return artefact

    training = (*data_words(options), "--seed", seed)
    add("baseline", baseline / "detector.pth", "crosskd.train", options.config, *training, "-o", baseline)
    add(
        "student", student / "student.pth", "crosskd.distill", options.config, *training,
        "--teacher-checkpoint", stages[0].artefact, "-o", student,
    )  # fmt: skip
    onnx = add("export", out / "student.onnx", "deploy.export", student, "-o", out / "student.onnx")
    int8 = add(
        "quantise", out / "student.int8.onnx", "calibration.quantize", onnx, "--data", data,
        *strict, "--target", options.target, "-o", out / "student.int8.onnx",
    )  # fmt: skip
    models = {"teacher": teacher, "baseline": baseline, "student": student, "onnx-fp32": onnx, "onnx-int8": int8}
    if options.target == "tensorrt":
        for role, source, flag in (("engine-fp16", onnx, "--fp16"), ("engine-int8", int8, "--int8")):
            models[role] = add(
                f"build {role}", out / f"{role}.engine", "deploy.build_trt", source, flag, "-o", out / f"{role}.engine"
            )
    results = []
    for role, model in models.items():
        for what in ("accuracy", "latency"):
            if (role, what, options.target) == ("onnx-int8", "latency", "tensorrt"):
                continue  # quantised for the engine: how slow ONNX Runtime is with it says nothing
            result = out / "results" / f"{role}.{what}.result.json"
            results.append(
                add(f"{what} {role}", result, f"benchmarks.{what}", model, *measured, "--role", role, "-o", result)
            )
    limits = (
        ["--limits", options.limits]
        if options.limits
        else [f"--{name.replace('_', '-')}={value}" for name, value in config.get("report_limits", {}).items()]
    )
    add("report", out / "report.json", "benchmarks.report", *results, *limits, "-o", out / "report.html")
    return stages


def data_words(options: PipelineOptions) -> list[str]:
    """The flags by which a training is told its data."""
    flags = {"--strict": options.strict, "--drop-empty-classes": options.drop_empty_classes}
    return ["--data", options.data, *(flag for flag, given in flags.items() if given)]


def teacher_stage(options: PipelineOptions, config: Any, run_dir: Path) -> Stage:
    """The stage that makes the teacher's run directory: trained, or taken in."""
    given = config.model.teacher.get("config")
    if given is None:
        raise ConfigError(f"{options.config}: model.teacher.config is missing; expected the teacher's config file")
    words = [path_beside(given, options.config), *data_words(options), "-o", str(run_dir)]
    checkpoint = options.teacher_checkpoint or config.model.teacher.get("checkpoint")
    if checkpoint:
        return Stage("teacher", ["crosskd.adopt", *words, "--checkpoint", checkpoint], run_dir / "detector.pth")
    return Stage("teacher", ["crosskd.train", *words, "--seed", str(options.seed)], run_dir / "detector.pth")


def run_stages(stages: list[Stage]) -> int:
    """
    Runs what is not up to date and returns the status of the last stage, the report's: 0 roll out, 1 do not.

    Raises:
        PipelineError: a stage failed. Its own message is on stderr.
    """
    started = time.monotonic()
    status = 0
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        is_report = stage is stages[-1]
        if not is_report and is_up_to_date(stage):
            print(f"{head}: up to date, {stage.artefact}", flush=True)
            continue
        words = [*stage.words, "--resume"] if can_resume(stage) else stage.words
        if stage.makes_run and words == stage.words:
            note_start(stage)
        print(f"{head}: {command_line(*words)}", flush=True)
        began = time.monotonic()
        status = run_status(*words)
        if status != 0 and not (is_report and status == 1):
            raise PipelineError(
                f"stage {stage.name!r} ended with status {status}; its message is above. Put that right and run the "
                "same command again: what is finished is kept"
            )
        now = time.monotonic()
        print(f"{head}: done in {now - began:.0f} s, {now - started:.0f} s in all", flush=True)
    return status


def note_start(stage: Stage) -> None:
    """Notes in the run directory what it is made from; what another command or config left there no longer counts."""
    run_dir = stage.artefact.parent
    for stale in (stage.artefact, run_dir / "last_checkpoint"):
        stale.unlink(missing_ok=True)
    write_start(run_dir, start_of(stage))


def start_of(stage: Stage) -> dict[str, Any]:
    """What a run directory is made from: command, files with their hashes, the values of the config."""
    data = Path(stage.words[stage.words.index("--data") + 1])
    annotations = [str(annotations_path(data, split)) for split in ("train", "val")]
    return start_from(stage.words, [*stage.words[2:], *annotations], config_sha256=config_sha256(stage))


def config_sha256(stage: Stage) -> str:
    """The hash of the config's values: with all that it inherits, and its teacher's."""
    return hashlib.sha256(repr(load_config(stage.words[1]).to_dict()).encode()).hexdigest()


def can_resume(stage: Stage) -> bool:
    """Whether an interrupted training of the very same command and files left a checkpoint to go on from."""
    left_one = not stage.artefact.exists() and (stage.artefact.parent / "last_checkpoint").exists()
    return stage.is_training and left_one and read_start(stage.artefact.parent) == start_of(stage)


def is_up_to_date(stage: Stage) -> bool:
    """Whether the artefact is there, as recorded, made by this very command from inputs that are still the same."""
    if not is_made(stage.artefact, stage.words):
        return False
    noted = read_start(stage.artefact.parent).get("config_sha256") if stage.makes_run else None
    return noted is None or noted == config_sha256(stage)


if __name__ == "__main__":
    sys.exit(main())
