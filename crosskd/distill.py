"""
Trains a student under a teacher with CrossKD: `python -m crosskd.distill CONFIG --data DIR --teacher-checkpoint X -o
RUN_DIR`.

Writes `RUN_DIR/student.pth`, plain mmdet weights of the student alone. Needs the training packages (torch, mmdet).

INT8-aware, for a trained student that loses too much AP by `calibration.quantize`:

    python -m crosskd.distill CONFIG --data DIR --teacher-checkpoint X --quantize int8 --from RUN/student.pth -o RUN_DIR

trains it further while it computes with the rounding of its INT8 graph, and its rounded tower features go through the
float teacher's head: see `crosskd.int8.fake_quantization`. Placement and first ranges are those of the student's INT8
file, `--calibrated`, or of one that is made for `--target` on the way. Writes also `RUN_DIR/student.onnx` and
`RUN_DIR/student.int8.onnx`, and `RUN_DIR/int8.json`, the trained ranges: `calibration.quantize --ranges` takes them for
another export of the same run. A quarter of the config's epochs at a tenth of its learning rate, in float32, unless
--epochs, `--set optim_wrapper.optimizer.lr=...` and --precision say otherwise.

In several processes, each with batches of its own: `torchrun --nproc-per-node 2 -m crosskd.distill ...`, by NCCL on
GPUs and gloo on CPUs; on several nodes by torchrun's rendezvous, with data and RUN_DIR under the same paths on all.
Only the first process prints and writes. The learning rate stays that of the config unless --auto-scale-lr is given.
Gradients are those of one process with all the batches, up to rounding, except for what a process pools over its own:

- the means and deviations by which CrossKD and PKD align features;
- BatchNorm's; its running statistics are the first process's (SyncBatchNorm pools over all, on GPUs);
- the sum of confidences that normalises GFL's distilled boxes, as published;
- RetinaNet's averaging factor, in mmdet's own losses as in the distilled ones;
- averaging factors below 1 (hardly any box, or hardly any score), which mmdet raises to 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from crosskd.config import load_config, path_beside, published_name, set_classes
from crosskd.data import TrainingData, data_from_arguments
from crosskd.int8 import int8_aware
from crosskd.loop.distributed import first_of_each_machine_first, is_first_process, joined_processes, wait_for_all
from crosskd.schedule import set_epochs
from crosskd.settings import check_settings
from crosskd.training import (
    TeacherCheck,
    TrainingOptions,
    add_training_arguments,
    run_training,
    seed_everything,
    set_starting_weights,
    start_detector,
    training_options_from_arguments,
)
from deploy.contract import read_sidecar
from deploy.errors import CheckpointError, ConfigError, command
from deploy.files import check_writable
from deploy.folder_lock import locked
from deploy.targets import QUANTISED_FOR

LEARNING_RATE = "optim_wrapper.optimizer.lr"
FROM_TEACHER = "teacher"
"""The value of --from that takes what fits of the teacher's neck and head."""


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """What a user may ask of a distillation, besides what every training takes."""

    teacher_checkpoint: str | None = None
    """A file, an address, or 'published'; None: the config's, else 'published'."""
    teacher_check: TeacherCheck | None = None
    """The measurement of the teacher before the first step, if any."""
    int8: bool = False
    """Whether the student learns to live with the rounding of INT8."""
    target: str | None = None
    """The runtime that INT8 is for, one of `deploy.targets.QUANTISED_FOR`; None: tensorrt, or that of `calibrated`."""
    calibrated: Path | None = None
    """INT8 file of the weights of --from, whose placement and ranges to start with; None: made on the way."""


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosskd.distill", description="Distil a student under a teacher.")
    add_training_arguments(parser)
    parser.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="the teacher's weights: a file, an address, or 'published' for those of mmdet (default: "
        "model.teacher.checkpoint of the config, else 'published')",
    )
    parser.add_argument(
        "--min-teacher-ap",
        type=float,
        metavar="AP",
        help="refuse a teacher that has less on validation images, in points",
    )
    parser.add_argument(
        "--teacher-images",
        type=int,
        default=100,
        metavar="N",
        help="validation images on which the teacher's AP is measured before the first step (default: 100; 0: none)",
    )
    group = parser.add_argument_group("INT8-aware fine-tuning")
    group.add_argument(
        "--quantize", choices=("int8",), help="train for INT8; with --from, student.pth in the folder of a finished run"
    )
    group.add_argument("--target", choices=QUANTISED_FOR, help="runtime that INT8 is for (default: tensorrt)")
    group.add_argument(
        "--calibrated",
        metavar="FILE",
        help="INT8 file of the weights --from, by calibration.quantize, whose placement and ranges to start with "
        "(default: made for --target)",
    )
    arguments = parser.parse_args(argv)
    training = training_options_from_arguments(arguments)
    distillation = distillation_options_from_arguments(arguments)
    if distillation.int8 and training.ema is not None:
        raise ConfigError("--ema is given with --quantize int8, whose ranges it would not average; leave it out")
    with joined_processes(), locked(training.run_dir):
        if is_first_process():
            check_writable(training.run_dir / "student.pth")
        distil(arguments.config, data_from_arguments(arguments), training, distillation)
    return 0


def distillation_options_from_arguments(arguments: argparse.Namespace) -> DistillationOptions:
    """
    The options that the arguments of `main` ask for, besides those of every training.

    Raises:
        ConfigError: some of them do not go together, or a number is out of its range.
    """
    if arguments.teacher_images < 0:
        raise ConfigError(f"--teacher-images is {arguments.teacher_images}; expected 0 or more")
    if arguments.min_teacher_ap is not None and not arguments.teacher_images:
        raise ConfigError("--min-teacher-ap was given with --teacher-images 0; expected some images to measure it on")
    given = [flag for flag in ("target", "calibrated") if getattr(arguments, flag)]
    if given and not arguments.quantize:
        raise ConfigError(f"--{given[0]} is given without --quantize int8; expected both or neither")
    if arguments.quantize and arguments.start in (None, FROM_TEACHER):
        raise ConfigError("--quantize int8 is given without --from; expected student.pth of a trained student with it")
    if len(given) == 2:
        raise ConfigError("--target is given with --calibrated, which is for one target already; expected one of them")
    images, min_ap = arguments.teacher_images, arguments.min_teacher_ap
    return DistillationOptions(
        teacher_checkpoint=arguments.teacher_checkpoint,
        teacher_check=TeacherCheck(images, min_ap) if images else None,
        int8=arguments.quantize == "int8",
        target=arguments.target,
        calibrated=Path(arguments.calibrated) if arguments.calibrated else None,
    )


def distil(config_path: str, data: TrainingData, training: TrainingOptions, distillation: DistillationOptions) -> None:
    """Writes the run directory of the student of a config."""
    config = load_config(config_path, training.overrides)
    if config.model.type != "CrossKDDetector":
        raise ConfigError(
            f"{config_path}: model.type is {config.model.type}; expected CrossKDDetector. Train others with "
            f"crosskd.train."
        )
    check_settings(config, config_path)
    if distillation.teacher_checkpoint:
        config.model.teacher.checkpoint = distillation.teacher_checkpoint
    set_classes(config, data.class_names)
    if distillation.int8:
        int8_aware.check_start(Path(training.start or ""))
        training = fine_tuning_options(config, config_path, training)

    from crosskd.models.detector import detector_from_config
    from crosskd.models.methods import methods_of_settings

    seed_everything(training.seed)
    with first_of_each_machine_first():  # weights may have to be downloaded
        if methods_of_settings(config.model.distill):
            config.model.teacher.checkpoint = local_checkpoint(config.model.teacher, config_path)
        detector = detector_from_config(config, class_names=data.class_names)
        inputs = start_student(config, config_path, detector, data, training, distillation.int8)
    teacher = config.model.teacher.get("checkpoint") if detector.teacher is not None else None
    if teacher and Path(teacher).is_file():
        inputs["teacher_checkpoint"] = teacher
    check = distillation.teacher_check if detector.teacher is not None else None
    if not distillation.int8:
        run_training(config, detector, data, training, "student.pth", inputs, check)
        return
    int8 = int8_to_start_with(training, distillation, data)
    inputs["calibrated"] = str(int8)
    detector.quantization = int8_aware.fake_quantization_of(detector.student, int8, Path(config.load_from))
    run_training(config, detector, data, training, "student.pth", inputs, check)
    if is_first_process():
        int8_aware.write_int8(training.run_dir, int8, detector.quantization)


def fine_tuning_options(config: Any, config_path: str, training: TrainingOptions) -> TrainingOptions:
    """
    Sets length and learning rate of INT8-aware training in `config`, and its precision in the options that it returns,
    where nobody did; says so.

    A moving average of the weights is left out: it would not average the ranges.
    """
    hooks = config.get("custom_hooks", [])
    config.custom_hooks = [hook for hook in hooks if hook["type"] != "EMAHook"]
    if len(config.custom_hooks) < len(hooks):
        print(f"the EMAHook of {config_path} is left out: it would not average the ranges of --quantize int8")
    if not any(key.endswith("max_epochs") for key in training.overrides):
        set_epochs(config, max(1, round(config.train_cfg.max_epochs / 4)))
    if not any(LEARNING_RATE.startswith(key) for key in training.overrides):  # a whole optimiser may have been given
        config.optim_wrapper.optimizer.lr /= 10
    training = dataclasses.replace(training, precision=training.precision or "fp32")  # bf16 is as coarse as INT8
    print(
        f"INT8-aware training: {config.train_cfg.max_epochs} epochs, learning rate "
        f"{config.optim_wrapper.optimizer.lr:g}, {training.precision}; --epochs, --set {LEARNING_RATE}=... and "
        "--precision to choose"
    )
    return training


def int8_to_start_with(training: TrainingOptions, distillation: DistillationOptions, data: TrainingData) -> Path:
    """
    The INT8 file whose placement and ranges the training takes: --calibrated, or made here by the first process. A run
    that is resumed goes on with the one that it has.

    Raises:
        CheckpointError: --resume, and there is nothing to go on from.
        ConfigError: --resume, and the file is not there, or for another target.
        PipelineError: the student cannot be exported or quantised.
    """
    from crosskd.models.checkpoint import latest_checkpoint

    run_dir, target = training.run_dir, distillation.target
    int8 = distillation.calibrated or run_dir / int8_aware.START
    if training.resume:
        latest_checkpoint(run_dir)
        if not int8.is_file():
            raise ConfigError(f"no such file: {int8}; resume with the --calibrated that the run was started with")
        started_for = read_sidecar(int8, details=("target",))["details"]["target"] if target else None
        if started_for != target:
            raise ConfigError(
                f"the run was started for the target {started_for}, --target is {target}; resume with the same"
            )
    elif not distillation.calibrated and is_first_process():
        assert training.start is not None, "--quantize int8 is refused without --from"
        int8_aware.quantize_start(Path(training.start), data, target or "tensorrt", training.seed, run_dir)
    wait_for_all()
    return int8


def start_student(
    config: Any, config_path: str, detector: Any, data: TrainingData, training: TrainingOptions, int8: bool
) -> dict[str, str]:
    """
    Gives the student the weights that it starts from, as `start_detector` or, for --from teacher, its teacher's.

    Returns:
        Name -> file of the weights, for the sidecar.

    Raises:
        ConfigError: --from teacher, and there is no teacher.
        CheckpointError: they do not fit; for `int8`, not all of them.
    """
    from crosskd.models.starting_weights import (
        pretrained_inputs,
        start_from_checkpoint,
        start_from_teacher,
        tensors_of_teacher,
    )

    if training.start == FROM_TEACHER:
        if detector.teacher is None:
            raise ConfigError("--from teacher is given with model.distill.method=none, which has no teacher")
        config.load_from = None
        taken = tensors_of_teacher(detector.student, detector.teacher)
        if not training.resume:
            start_from_teacher(detector.student, taken)
            detector.has_weights = True
        return pretrained_inputs(detector.student, taken)
    set_starting_weights(config, config_path, training)
    if not int8:
        return start_detector(config, detector, data, training)
    # Also when a run is resumed: the ranges are those of these weights.
    start = start_from_checkpoint(detector.student, config.load_from, data.class_names)
    detector.has_weights = True
    if not start.is_whole(detector.student):
        raise CheckpointError(
            f"--from is {config.load_from}, of which not all fits the student and its classes (see the lines above); "
            "expected all of it with --quantize int8: the student of the same config, trained on the same classes"
        )
    return {"load_from": config.load_from}


def local_checkpoint(teacher: Any, config_path: str) -> str:
    """The path of the teacher's weights, which are fetched if the config names an address or none at all."""
    from crosskd.download import local_weights

    named, given = teacher.get("checkpoint") or "published", teacher.get("config", "")
    if named == "published" and given:
        given = published_name(load_config(path_beside(given, config_path)), given)
    # Here, and not as it is read, so that the sidecar has the hash of a file.
    return local_weights(named, given)


if __name__ == "__main__":
    sys.exit(main())
