"""
Trains a plain mmdet detector, a teacher or a baseline: `python -m crosskd.train CONFIG --data DIR -o RUN_DIR`.

Given the config of a distillation, it trains the student alone. Writes `RUN_DIR/detector.pth`, plain mmdet weights.
Trains in several processes as `crosskd.distill` does. Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import sys

from crosskd.config import load_config, set_classes
from crosskd.data import TrainingData, data_from_arguments
from crosskd.loop.distributed import first_of_each_machine_first, is_first_process, joined_processes
from crosskd.settings import check_settings
from crosskd.training import (
    TrainingOptions,
    add_training_arguments,
    run_training,
    seed_everything,
    set_starting_weights,
    start_detector,
    training_options_from_arguments,
)
from deploy.errors import ConfigError, command
from deploy.files import check_writable
from deploy.folder_lock import locked


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crosskd.train", description="Train a teacher or a baseline.")
    add_training_arguments(parser)
    arguments = parser.parse_args(argv)
    options = training_options_from_arguments(arguments)
    with joined_processes(), locked(options.run_dir):
        if is_first_process():
            check_writable(options.run_dir / "detector.pth")
        train(arguments.config, data_from_arguments(arguments), options)
    return 0


def train(config_path: str, data: TrainingData, options: TrainingOptions) -> None:
    """
    Writes the run directory of the plain detector, or of the student, of a config.

    Raises:
        ConfigError: as `load_config` and `check_settings`, or an override is of what only a distillation reads.
    """
    config = load_config(config_path, options.overrides)
    if "student" in config.model:
        unread = [key for key in options.overrides if key.startswith("model.") and key.split(".")[1] != "student"]
        if unread:
            raise ConfigError(
                f"cannot set {', '.join(unread)}: crosskd.train trains the student of {config_path} alone, and reads "
                "only model.student of its model. Leave it out, or train under the teacher with crosskd.distill"
            )
        config.model = config.model.student
    check_settings(config, config_path)
    set_classes(config, data.class_names)

    from crosskd.models.detector import detector_from_config

    seed_everything(options.seed)
    detector = detector_from_config(config)
    with first_of_each_machine_first():  # weights may have to be downloaded
        set_starting_weights(config, config_path, options)
        inputs = start_detector(config, detector, data, options)
    run_training(config, detector, data, options, "detector.pth", inputs)


if __name__ == "__main__":
    sys.exit(main())
