"""
Runs the whole job: `python -m crosskd.pipeline CONFIG --data DIR -o DIR`, from images to a verdict.

Prints each stage's command and runs it as a process of its own. A stage whose command, inputs and artefact are those
that its sidecar records is skipped, so the same line goes on after an interruption. Needs the training and the edge
packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from crosskd.config import load_config, path_beside, published_name, set_classes
from crosskd.data import add_training_data_arguments, load_splits
from crosskd.disk_space import bytes_of_models, bytes_of_training, check_disk_space
from crosskd.download import local_weights
from crosskd.recipes import RecipeOptions, add_recipe_arguments, recipe_options_from_arguments, write_recipe
from crosskd.settings import check_settings
from crosskd.stages import BOARD_FAILED, VERDICT, Stage, run_stages
from deploy.ap_drop import FEWEST_IMAGES, INT8_PREDICTORS, checked_budget
from deploy.board.commands import SOURCE_OF
from deploy.commands import run_captured
from deploy.data_arguments import add_data_argument
from deploy.dataset import CocoSet
from deploy.errors import CheckpointError, ConfigError, DataError, PipelineError, command
from deploy.files import check_writable, read_json
from deploy.folder_lock import locked
from deploy.layouts import SPLITS, has_split, split_paths
from deploy.targets import QUANTISED_FOR, SUFFIXES, TARGETS
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
    max_int8_drop: float | None = None
    """How many points of AP INT8 may cost on the validation split; None: the config's max_int8_drop, if it has one."""
    without_int8: str | None = None
    """What ships where INT8 costs more: 'fp16' or 'fp32'; None: fp16 where the target has it."""
    int8_training: bool = True
    """Whether INT8-aware CrossKD is one of the ways to INT8."""
    seed: int = 0
    """Of the trainings."""
    strict: bool = False
    """Refuse annotations with any box of no use."""
    drop_empty_classes: bool = False
    """Leave out the classes that have no box in any split."""
    no_teacher_export: bool = False
    """Measure the teacher in torch alone: then no speed-up can be told."""
    boards: str | None = None
    """TOML file of the boards that measure and decide; None: this machine does."""

    @property
    def engines_here(self) -> bool:
        """Whether engines are built and measured on this machine; with boards they are built there."""
        return self.target == "tensorrt" and self.boards is None


@command
def main(argv: list[str] | None = None) -> int:
    arguments = command_parser().parse_args(argv)
    options, recipe = options_from_arguments(arguments)
    with locked(options.output):
        if recipe is not None:
            write_recipe(Path(options.config).parent, recipe, number_of_images(options.data))
        config = load_config(options.config)
        stages = planned_stages(options, config)
        class_names = check_before_work(options, config, stages)
        stages[0] = with_classes_taught(stages[0], config, class_names, options.seed)
        status = run_stages(stages)
    print(f"report: {stages[-1].artefact.with_suffix('.html')}")
    return status


def options_from_arguments(arguments: argparse.Namespace) -> tuple[PipelineOptions, RecipeOptions | None]:
    """
    The options that the arguments of `command_parser` ask for, and those of the recipes, if no config is given.

    Raises:
        ConfigError: recipes are chosen, and a config is given; or an image size of no use.
    """
    values = vars(arguments)
    chosen = {name: values[name] for name in ("student", "teacher", "input_size", "flips")}
    rest = {name: value for name, value in values.items() if name not in chosen}
    given = [f"--{name.replace('_', '-')}" for name, value in chosen.items() if value is not None]
    if arguments.config is not None:
        if given:
            raise ConfigError(
                f"{given[0]} chooses a recipe, and {arguments.config} is given; expected one of the two: change the "
                "config, or leave it out"
            )
        return PipelineOptions(**rest), None
    recipe = recipe_options_from_arguments(arguments)
    return PipelineOptions(**{**rest, "config": str(arguments.output / "recipe" / "crosskd.py")}), recipe


def number_of_images(data: str) -> int:
    """
    Of the training set, as its annotations list them; they are checked later.

    Raises:
        DataError: they cannot be read, or are no annotations.
    """
    annotations, _ = split_paths(data, "train")
    document = read_json(annotations, DataError, "annotations in COCO format")
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{annotations} has no list of images; expected annotations in COCO format")
    return len(images)


def fetch_weights(config: Any, stages: list[Stage], detector: Any) -> None:
    """
    Fetches all weights that the trainings start from, so that none of them is missing after hours.

    Args:
        config: of the distillation. detector: of that config.

    Raises:
        ConfigError, CheckpointError: they cannot be had.
    """
    from crosskd.models.starting_weights import pretrained_parts

    trained = [(config, "", detector.student)]
    if stages[0].is_training:
        trained.append((load_config(stages[0].words[1]), stages[0].words[1], detector.teacher))
    missing = []
    for given, name, part in trained:
        try:
            if given.get("load_from"):
                local_weights(given.load_from, name)
            elif part is not None:
                pretrained_parts(part)
        except CheckpointError as error:  # all of them at once: a person may have to carry them here
            missing.append(str(error))
    if missing:
        raise CheckpointError(" Also: ".join(missing))


def check_before_work(options: PipelineOptions, config: Any, stages: list[Stage]) -> tuple[str, ...]:
    """
    Asks now for all that would else come out in a later stage, after hours of training. Returns the data's classes.

    Raises:
        PipelineError: an output cannot be written, a package is missing, the data, the model or the limits will not
            do, or the disk is too small.
    """
    for stage in stages:
        check_output(options.output, stage.artefact)
    check_packages("tensorrt" if options.engines_here else "onnxruntime", options.boards is not None)
    if options.engines_here:
        load_tensorrt("--target tensorrt")
        load_cuda("--target tensorrt").close()
    # Judged as they will be: by the command of the last stage, with its very arguments.
    run_captured(*stages[-1].words, "--check", error_type=ConfigError)
    for stage in stages:
        if stage.words[0] == "benchmarks.fleet":
            kinds = ["float"] if "--teacher" in stage.words else ["float", SOURCE_OF[options.target]["int8"]]
            plan = run_captured(*stage.words, "--check", *kinds, error_type=ConfigError)
            print(*(f"{stage.name}: {line}" for line in plan.splitlines()), sep="\n")
    check_settings(config, str(options.config))
    splits = SPLITS if has_split(options.data, "test") else SPLITS[:2]
    sets = load_splits(
        {split: split_paths(options.data, split) for split in splits}, options.strict, options.drop_empty_classes
    )
    if len(splits) < len(SPLITS):
        print(f"{options.data} has no test split: measured on val, which the trainings are watched on, too")
    budget = budget_of(options, config)
    if budget is not None:
        check_validation_set(sets["val"], budget)
    fetch_weights(config, stages, check_space(options, config, stages, list(sets.values())))
    return next(iter(sets.values())).class_names


def with_classes_taught(stage: Stage, config: Any, class_names: tuple[str, ...], seed: int) -> Stage:
    """
    The teacher's stage; where it takes in weights that do not know all the classes, they are fine-tuned on the data in
    its place: a teacher of other classes is never distilled from.

    Args:
        config: of the distillation, with the number of these classes.

    Raises:
        ConfigError, CheckpointError: the weights cannot be had, or are of another detector.
    """
    if stage.words[0] != "crosskd.adopt":
        return stage
    from mmdet.registry import MODELS

    from crosskd.models.checkpoint import OtherClassesError, load_detector_weights

    *words, flag, checkpoint = stage.words[1:]
    assert flag == "--checkpoint", "as teacher_stage writes it"
    path = local_weights(checkpoint, published_name(load_config(words[0]), words[0]))
    try:
        load_detector_weights(MODELS.build(config.model.teacher.model), path, class_names)
    except OtherClassesError as error:
        print(f"the teacher is fine-tuned on the data first: {str(error).split('. ')[0]}")
        return Stage(stage.name, ["crosskd.train", *words, "--from", checkpoint, "--seed", str(seed)], stage.artefact)
    return stage


def check_validation_set(data: CocoSet, budget: float) -> None:
    """
    Says where a budget of AP is to be kept on few images.

    Raises:
        DataError: it has no box, and so no AP.
    """
    if not any(len(image.labels) for image in data.images):
        raise DataError(f"{data.annotations_path} has no box; expected some, to see what INT8 costs of AP")
    if len(data.images) < FEWEST_IMAGES:
        print(
            f"warning: INT8 may cost {budget:g} points of AP on the {len(data.images)} images of "
            f"{data.annotations_path}: on so few the interval is wide, and single boxes decide; expected "
            f"{FEWEST_IMAGES} or more, better some hundreds"
        )


def check_output(output: Path, artefact: Path) -> None:
    """Raises PipelineError if a file is where a folder is to be made, or the artefact cannot be written."""
    for folder in [one for one in artefact.parents if output in one.parents]:
        if folder.exists() and not folder.is_dir():
            raise PipelineError(f"cannot write {artefact}: {folder} is a file. Move it, or give another -o.")
    if artefact.parent.is_dir():
        check_writable(artefact)


def check_packages(target: str, boards: bool = False) -> None:
    """Raises PipelineError if a package is missing that some stage needs."""
    commands = json.loads(run_captured("deploy.doctor", "--json"))["commands"]
    labels = ["crosskd.pipeline", f"benchmarks.latency {TARGETS[target].model_arguments}"]
    labels += ["benchmarks.fleet"] if boards else []
    to_do = list(dict.fromkeys(step for label in labels for step in commands[label]["to_do"]))
    if to_do:
        raise PipelineError(f"some of its stages need what is not here. Do: {'; '.join(to_do)}")


def check_space(options: PipelineOptions, config: Any, stages: list[Stage], sets: list[CocoSet]) -> Any:
    """
    The detector of a config, built to see how much room all that is made of it takes.

    Args:
        config: of the distillation; its classes are set here.
        sets: the data of train, val and, if there is one, test.

    Raises:
        PipelineError: the models cannot be built, do not fit each other, or are too large for the disk.
    """
    from crosskd.models.detector import detector_from_config

    set_classes(config, sets[0].class_names)
    detector = detector_from_config(config, load_weights=False)
    student, teacher = (
        sum(one.numel() for one in part.parameters())
        for part in (detector.student, detector.teacher or detector.student)
    )
    annotation_bytes = sum(Path(one.annotations_path).stat().st_size for one in sets[:2])
    measured = sum(stage.words[0] == "benchmarks.accuracy" for stage in stages)
    files = sum(stage.artefact.suffix in SUFFIXES for stage in stages)
    needed = [bytes_of_models(student, files, measured, len(sets[-1].images))]
    if not options.no_teacher_export:
        needed.append(bytes_of_models(teacher, 2, 0, 0))
    for stage in stages:
        if stage.is_training:
            is_teacher = stage.name == "teacher"
            trained = load_config(stage.words[1]) if is_teacher else config
            needed.append(bytes_of_training(trained, teacher if is_teacher else student, annotation_bytes))
    check_disk_space(options.output, needed)
    return detector


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.pipeline", description="Train, distil, export, quantise, measure, report."
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a config whose model is a CrossKDDetector (default: recipes)"
    )
    add_recipe_arguments(parser)
    add_data_argument(parser, required=True)
    add_training_data_arguments(parser)
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="folder for everything that is made"
    )
    parser.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="weights of a teacher that is already trained: a "
        "file, an address, or 'published' for those of mmdet; fine-tuned first if they do not know all the classes",
    )
    parser.add_argument(
        "--target",
        choices=QUANTISED_FOR,
        default="onnxruntime",
        help="what the model shall run on (default: onnxruntime)",
    )
    parser.add_argument("--limits", metavar="FILE", help="TOML file of limits for the verdict, see benchmarks.report "
                        "(default: the config's report_limits)")  # fmt: skip
    parser.add_argument(
        "--max-int8-drop", type=float, metavar="POINTS",
        help="how much AP, of 100, INT8 may cost on the validation split: the first way to it that keeps this ships "
        "(default: the config's max_int8_drop, or INT8 by `max`, whatever it costs)",
    )  # fmt: skip
    parser.add_argument(
        "--without-int8", choices=("fp16", "fp32"),
        help="what ships where no way to INT8 keeps it (default: fp16 for tensorrt, fp32 for onnxruntime)",
    )  # fmt: skip
    parser.add_argument(
        "--no-int8-training", dest="int8_training", action="store_false",
        help="do without INT8-aware CrossKD, the longest of these ways",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the trainings (%(default)s)")
    parser.add_argument("--boards", metavar="FILE", help="TOML file of boards, as benchmarks.fleet takes it: they "
                        "measure student and teacher over SSH, and their report decides; those of another runtime than "
                        "--target's, without INT8")  # fmt: skip
    parser.add_argument("--no-teacher-export", action="store_true", help="for a teacher that cannot be exported: "
                        "measure it in torch alone, so that no speed-up is told")  # fmt: skip
    return parser


def planned_stages(options: PipelineOptions, config: Any) -> list[Stage]:
    """
    The stages in order.

    Raises:
        ConfigError: the config is no distillation, or its student or its teacher cannot be exported.
    """
    if config.model.type != "CrossKDDetector":
        raise ConfigError(f"{options.config}: model.type is {config.model.type}; expected CrossKDDetector")
    check_head(options.config, "student", config.model.student.bbox_head.type, "To train it, run crosskd.distill")
    teacher_model = config.model.teacher.get("model", {})
    if teacher_model and not options.no_teacher_export:
        head = teacher_model.get("bbox_head", {}).get("type", "two-stage one")
        check_head(options.config, "teacher", head, "Without it, and without a speed-up: --no-teacher-export")
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

    teacher_forms: dict[str, Path] = {}
    if not options.no_teacher_export:  # before hours of training, since it may fail
        teacher_onnx = add("export teacher", out / "teacher.onnx", "deploy.export", teacher, "-o", out / "teacher.onnx")
        if options.engines_here:
            engine = out / "teacher-engine-fp16.engine"
            words = ("deploy.build_trt", teacher_onnx, "--fp16", "-o", engine)
            teacher_forms["teacher-engine-fp16"] = add("build teacher-engine-fp16", engine, *words)
        else:
            teacher_forms["teacher-onnx-fp32"] = teacher_onnx
    training = (*data_words(options), "--seed", seed)
    add("baseline", baseline / "detector.pth", "crosskd.train", options.config, *training, "-o", baseline)
    add(
        "student", student / "student.pth", "crosskd.distill", options.config, *training,
        "--teacher-checkpoint", stages[0].artefact, "-o", student,
    )  # fmt: skip
    onnx = add("export", out / "student.onnx", "deploy.export", student, "-o", out / "student.onnx")
    distil = stages[-2].words
    int8, budget = out / "student.int8.onnx", budget_of(options, config)
    models = {"teacher": teacher, **teacher_forms, "baseline": baseline, "student": student}
    models.update({"onnx-fp32": onnx, "onnx-int8": int8})
    quantise: list[str | Path] = ["calibration.quantize", onnx, "--data", data, *strict, "--target", options.target]
    if budget is None:
        add("quantise", int8, *quantise, "-o", int8)
    if budget is not None:
        stages += stages_to_int8(options, config, quantise, distil, budget)
    if options.engines_here:
        if budget is None:  # else they are among the ways to INT8
            stages += float_engine_stages(options)
        models.update({role: out / f"{role}.engine" for role in float_engines(options)})
        engine = out / "engine-int8.engine"
        models["engine-int8"] = add("build engine-int8", engine, "deploy.build_trt", int8, "--int8", "-o", engine)
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
        else [f"--{name.replace('_', '-')}={value}" for name, value in limits_of(options, config).items()]
    )
    reached: list[str | Path] = [] if budget is None else ["--int8-budget", int8]
    report = [*results, *([] if options.boards else limits), *reached, "-o", out / "report.html"]
    stages.append(Stage("report", ["benchmarks.report", *map(str, report)], out / "report.json", answers=(VERDICT,)))
    if options.boards is not None:
        stages += stages_on_boards(options, measured, limits)
    return stages


def stages_on_boards(options: PipelineOptions, measured: list[str], limits: list[str]) -> list[Stage]:
    """
    Student and teacher on the boards, and the report of the fleet, whose limits decide.

    Args:
        measured: words of the images. limits: words of the limits.
    """
    out, folder = options.output, options.output / "boards"
    stages: list[Stage] = []
    teacher: list[str | Path] = [out / "results" / "teacher.accuracy.result.json"]

    def add(name: str, artefact: Path, *words: str | Path, answers: tuple[int, ...] = ()) -> None:
        stages.append(Stage(name, [str(word) for word in words], artefact, answers=answers))

    def add_fleet(name: str, models: list[Path], *flags: str) -> None:
        bundle, fleet = out / f"{name}.tar.gz", folder / name
        add(f"bundle {name}", bundle, "deploy.bundle", *models, "-o", bundle)
        words: list[str | Path] = ["benchmarks.fleet", str(options.boards), bundle, *measured, *flags, "-o", fleet]
        add(f"{name} on boards", fleet / "fleet.json", *words, answers=(BOARD_FAILED,))

    if not options.no_teacher_export:
        add_fleet("teacher", [out / "teacher.onnx"], "--teacher")
        teacher.append(folder / "teacher")
    add_fleet("student", [out / "student.int8.onnx", out / "student.onnx"])
    compared = [folder / "student", "--teacher", *teacher, *limits]
    add("report of boards", out / "boards.json", "benchmarks.report", *compared, "-o", out / "boards.html")
    return stages


def check_head(config: str, role: str, head: str, remedy: str) -> None:
    """Raises ConfigError, before hours of training, for a detector that cannot be exported."""
    import crosskd.models.families  # noqa: F401  registers them
    from crosskd.models.heads import heads_with_decoder

    if head not in heads_with_decoder():
        raise ConfigError(
            f"{config}: the {role}'s head is a {head}, which cannot be exported; expected one of "
            f"{', '.join(heads_with_decoder())}. {remedy}"
        )


def float_engines(options: PipelineOptions) -> list[str]:
    """The roles of the engines of the student that are not INT8."""
    return ["engine-fp32", "engine-fp16"] if otherwise(options) == "engine-fp32" else ["engine-fp16"]


def float_engine_stages(options: PipelineOptions, ranges_from: Path | None = None) -> list[Stage]:
    """
    The builds of these engines, to come after a calibration: FP16 is told of the ranges that it has seen.

    Args:
        ranges_from: the INT8 file that has them, where it does not lie beside student.onnx.
    """
    out, stages = options.output, []
    for role in float_engines(options):
        flag = f"--{role.split('-')[1]}"
        ranges = ["--ranges-from", str(ranges_from)] if ranges_from and flag == "--fp16" else []
        words = ["deploy.build_trt", str(out / "student.onnx"), flag, *ranges, "-o", str(out / f"{role}.engine")]
        stages.append(Stage(f"build {role}", words, out / f"{role}.engine"))
    return stages


def stages_to_int8(
    options: PipelineOptions, config: Any, quantise: list[str | Path], distil: list[str], budget: float
) -> list[Stage]:
    """
    The ways to INT8 in the order of what they cost, each of which is tried only where those before it lose more AP than
    the budget on the validation split; and the choice among them, which writes student.int8.onnx. The first is the
    fastest model, whose predictions are products of integers, too; it must leave scores where they are.

    Args:
        quantise: words of the quantisation of student.onnx, without method and output.
        distil: words of the student's distillation.

    Raises:
        ConfigError: the training with INT8 would be refused.
    """
    out, onnx = options.output / "int8", options.output / "student.onnx"
    on_val = ["--data", options.data, *(["--strict"] if options.strict else []), "--split", "val"]
    float_result = out / "float.accuracy.result.json"
    stages: list[Stage] = []
    rungs: list[tuple[Path, Path]] = []

    def add(name: str, artefact: Path, *words: str | Path, **more: Any) -> Path:
        before = tuple(accuracy for accuracy, _ in rungs)
        stages.append(Stage(name, [str(word) for word in words], artefact, unless=before, max_int8_drop=budget, **more))
        return artefact

    def file_of(role: str, suffix: str) -> Path:
        return out / f"{role.replace(' ', '_')}{suffix}"

    def measure(role: str, model: Path) -> tuple[Path, Path]:
        accuracy, latency = (file_of(role, f".{what}.result.json") for what in ("accuracy", "latency"))
        add(f"accuracy {role}", accuracy, "benchmarks.accuracy", model, *on_val, "--role", role,
            "--against", float_result, "-o", accuracy)  # fmt: skip
        add(f"latency {role}", latency, "benchmarks.latency", model, *on_val, "--role", role, "-o", latency)
        return accuracy, latency

    def measure_rung(role: str, int8: Path) -> None:
        model = int8
        if options.target == "tensorrt":
            model = add(f"build {role}", file_of(role, ".engine"), "deploy.build_trt", int8, "--int8",
                        "-o", file_of(role, ".engine"))  # fmt: skip
        rungs.append(measure(role, model))

    add("accuracy float on val", float_result, "benchmarks.accuracy", onnx, *on_val, "--role", "onnx-fp32",
        "-o", float_result)  # fmt: skip
    auto = ["--method", "auto"]
    for role, flags in {
        INT8_PREDICTORS: ["--method", "max", "--int8-predictors"],
        "max": ["--method", "max"],
        "auto": auto,
        "bias correction": [*auto, "--bias-correction"],
        "blocks in float": [*auto, "--max-ap-drop", f"{budget:g}", "--nearest"],
    }.items():
        int8 = file_of(role, ".onnx")
        add(f"quantise by {role}", int8, *quantise, *flags, "-o", int8,
            advice=f"; where nothing of it can be INT8, measure and ship {onnx} as it is")  # fmt: skip
        measure_rung(role, int8)
    if options.int8_training:
        run, start = options.output / "int8_aware", options.output / "student" / "student.pth"
        int8 = add(
            "INT8-aware CrossKD", run / "student.int8.onnx", *distil[:-2], "--quantize", "int8", "--from", start,
            "--calibrated", file_of("auto", ".onnx"), "-o", run, record=run / "student.pth",
            advice="; or do without this training: --no-int8-training",
        )  # fmt: skip
        measure_rung("INT8-aware CrossKD", int8)
    fp16: list[str | Path] = []
    if options.target == "tensorrt":
        stages += float_engine_stages(options, file_of(INT8_PREDICTORS, ".onnx"))
        fp16 = ["--fp16", *measure("engine-fp16", options.output / "engine-fp16.engine")]
    int8 = options.output / "student.int8.onnx"
    words = ["calibration.choose", *(str(word) for pair in rungs for word in ("--rung", *pair)), *map(str, fp16)]
    words += ["--max-int8-drop", f"{budget:g}", "--otherwise", otherwise(options), "-o", str(int8)]
    return [*stages, Stage("choose INT8", words, int8)]


def budget_of(options: PipelineOptions, config: Any) -> float | None:
    """
    The AP that INT8 may cost, in points: of the flag, else of the config; None: nobody set one.

    Raises:
        ConfigError: it is no number from 0 to 100, or what goes with it is given without it.
    """
    if options.boards and options.target == "tensorrt" and (options.max_int8_drop or config.get("max_int8_drop")):
        raise ConfigError(
            "a budget of INT8 with --target tensorrt is measured with engines on this machine, but with --boards they "
            "are built on the boards; expected one of both"
        )
    if options.max_int8_drop is not None:
        return checked_budget(options.max_int8_drop, "--max-int8-drop")
    if config.get("max_int8_drop") is not None:
        return checked_budget(config.max_int8_drop, f"{options.config}: max_int8_drop")
    for flag, given in (("--without-int8", options.without_int8), ("--no-int8-training", not options.int8_training)):
        if given:
            raise ConfigError(f"{flag} is given without --max-int8-drop, the budget that it is about; expected both")
    return None


def otherwise(options: PipelineOptions) -> str:
    """
    The role of what ships where no way to INT8 keeps the budget.

    Raises:
        ConfigError: the target has none of that precision.
    """
    if options.target == "tensorrt":
        return f"engine-{options.without_int8 or 'fp16'}"
    if options.without_int8 == "fp16":
        raise ConfigError(
            f"--without-int8 is fp16; expected fp32 with --target {options.target}: on a CPU it computes FP16 in FP32"
        )
    return "onnx-fp32"


def data_words(options: PipelineOptions) -> list[str]:
    """The flags by which a training is told its data."""
    flags = {"--strict": options.strict, "--drop-empty-classes": options.drop_empty_classes}
    return ["--data", options.data, *(flag for flag, given in flags.items() if given)]


def limits_of(options: PipelineOptions, config: Any) -> dict[str, Any]:
    """The config's report_limits."""
    limits = config.get("report_limits", {})
    if not isinstance(limits, dict):
        raise ConfigError(f"{options.config}: report_limits is {limits!r:.80}; expected dict(max_ap_drop=1.5, ...)")
    return limits


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


if __name__ == "__main__":
    sys.exit(main())
