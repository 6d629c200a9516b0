"""
Trains a student under a teacher with CrossKD: `python -m crosskd.distill CONFIG --data DIR --teacher-checkpoint X -o
RUN_DIR`.

Writes `RUN_DIR/student.pth`, plain mmdet weights of the student alone. Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crosskd.config import data_from_arguments, load_config, set_classes
from crosskd.training import add_training_arguments, overrides_of, run_dir_of, run_training, seed_everything
from deploy.errors import ConfigError, command
from deploy.files import check_writable


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosskd.distill", description="Distil a student under a teacher.")
    add_training_arguments(parser)
    parser.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="the teacher's weights (default: model.teacher.checkpoint of the config)",
    )
    arguments = parser.parse_args(argv)
    run_dir = run_dir_of(arguments)
    check_writable(run_dir / "student.pth")
    data = data_from_arguments(arguments)
    config = load_config(arguments.config, overrides_of(arguments))
    if config.model.type != "CrossKDDetector":
        raise ConfigError(
            f"{arguments.config}: model.type is {config.model.type}; expected CrossKDDetector. Train others with "
            f"crosskd.train."
        )
    if arguments.teacher_checkpoint:
        config.model.teacher.checkpoint = arguments.teacher_checkpoint
    set_classes(config, data.class_names)

    from crosskd.detector import detector_from_config

    seed_everything(arguments.seed)
    detector = detector_from_config(config, class_names=data.class_names)
    teacher = config.model.teacher.get("checkpoint") if detector.teacher is not None else None
    inputs = {"teacher_checkpoint": teacher} if teacher and Path(teacher).is_file() else {}
    run_training(config, detector, data, run_dir, arguments, "student.pth", inputs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
