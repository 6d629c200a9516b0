"""
Trains a plain mmdet detector, a teacher or a baseline: `python -m crosskd.train CONFIG --data DIR -o RUN_DIR`.

Given the config of a distillation, it trains the student alone. Writes `RUN_DIR/detector.pth`, plain mmdet weights.
Trains in several processes as `crosskd.distill` does. Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import sys

from crosskd.config import data_from_arguments, load_config, set_classes
from crosskd.loop.distributed import is_first_process, joined_processes
from crosskd.training import add_training_arguments, overrides_of, run_dir_of, run_training, seed_everything
from deploy.errors import command
from deploy.files import check_writable


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosskd.train", description="Train a teacher or a baseline.")
    add_training_arguments(parser)
    arguments = parser.parse_args(argv)
    with joined_processes():
        train(arguments)
    return 0


def train(arguments: argparse.Namespace) -> None:
    """Writes the run directory that `arguments` of `main` ask for."""
    run_dir = run_dir_of(arguments)
    if is_first_process():
        check_writable(run_dir / "detector.pth")
    data = data_from_arguments(arguments)
    config = load_config(arguments.config, overrides_of(arguments))
    if "student" in config.model:
        config.model = config.model.student
    set_classes(config, data.class_names)

    from crosskd.models.detector import detector_from_config

    seed_everything(arguments.seed)
    run_training(config, detector_from_config(config), data, run_dir, arguments, "detector.pth", inputs={})


if __name__ == "__main__":
    sys.exit(main())
