"""
Trains a student under a teacher with CrossKD: `python -m crosskd.distill CONFIG --data DIR --teacher-checkpoint X -o
RUN_DIR`.

Writes `RUN_DIR/student.pth`, plain mmdet weights of the student alone. Needs the training packages (torch, mmdet).

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
import sys
from pathlib import Path
from typing import Any

from crosskd.config import data_from_arguments, load_config, set_classes
from crosskd.distributed import first_of_each_machine_first, is_first_process, joined_processes
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
    arguments = parser.parse_args(argv)
    with joined_processes():
        distil(arguments)
    return 0


def distil(arguments: argparse.Namespace) -> None:
    """Writes the run directory that `arguments` of `main` ask for."""
    run_dir = run_dir_of(arguments)
    if is_first_process():
        check_writable(run_dir / "student.pth")
    data = data_from_arguments(arguments)
    config = load_config(arguments.config, overrides_of(arguments))
    if config.model.type != "CrossKDDetector":
        raise ConfigError(
            f"{arguments.config}: model.type is {config.model.type}; expected CrossKDDetector. Train others with "
            f"crosskd.train."
        )
    if arguments.min_teacher_ap is not None and not arguments.teacher_images:
        raise ConfigError("--min-teacher-ap was given with --teacher-images 0; expected some images to measure it on")
    if arguments.teacher_images < 0:
        raise ConfigError(f"--teacher-images is {arguments.teacher_images}; expected 0 or more")
    if arguments.teacher_checkpoint:
        config.model.teacher.checkpoint = arguments.teacher_checkpoint
    set_classes(config, data.class_names)

    from crosskd.detector import detector_from_config

    seed_everything(arguments.seed)
    with first_of_each_machine_first():  # a teacher may have to be downloaded
        if config.model.distill.get("method") != "none":
            config.model.teacher.checkpoint = local_checkpoint(config.model.teacher)
        detector = detector_from_config(config, class_names=data.class_names)
    teacher = config.model.teacher.get("checkpoint") if detector.teacher is not None else None
    inputs = {"teacher_checkpoint": teacher} if teacher and Path(teacher).is_file() else {}
    run_training(config, detector, data, run_dir, arguments, "student.pth", inputs)


def local_checkpoint(teacher: Any) -> str:
    """The path of the teacher's weights, which are fetched if the config names an address or none at all."""
    from crosskd.download import fetched_checkpoint, published_checkpoint

    named = teacher.get("checkpoint") or "published"
    if named == "published":
        return str(published_checkpoint(teacher.get("config", "")))
    # Here, and not as it is read, so that the sidecar has the hash of a file.
    return str(fetched_checkpoint(named)) if named.startswith(("http://", "https://")) else named


if __name__ == "__main__":
    sys.exit(main())
