"""
Makes a run directory of a detector that was trained elsewhere: `python -m crosskd.adopt CONFIG --checkpoint X --data
DIR -o RUN_DIR`.

For a teacher from mmdet's model zoo, or one that you have: nothing is trained, and every later stage takes it like a
run of ours. Of a detector that knows more classes, those of the data are taken, by name. Needs the training packages
(torch, mmdet).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crosskd.config import add_override_argument, load_config, overrides_from_arguments, published_name, set_classes
from crosskd.data import add_data_arguments, data_from_arguments
from crosskd.download import local_weights
from crosskd.run_dir import save_run
from deploy.errors import command
from deploy.files import check_writable
from deploy.folder_lock import locked


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.adopt", description="Take in a detector that was trained elsewhere."
    )
    parser.add_argument("config", metavar="CONFIG", help="its mmdet config: a file, or mmdet::FAMILY/NAME.py")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="its weights: a file, an address, or 'published' for those of mmdet",
    )
    parser.add_argument("-o", "--output", required=True, metavar="RUN_DIR", help="folder to make")
    add_data_arguments(parser)
    add_override_argument(parser)
    arguments = parser.parse_args(argv)
    run_dir = Path(arguments.output)
    with locked(run_dir):
        check_writable(run_dir / "detector.pth")
        data = data_from_arguments(arguments)
        config = load_config(arguments.config, overrides_from_arguments(arguments))
        checkpoint = local_weights(arguments.checkpoint, published_name(config, arguments.config))
        set_classes(config, data.class_names)

        from crosskd.models.checkpoint import load_detector_weights
        from crosskd.models.detector import detector_from_config

        detector = detector_from_config(config, load_weights=False)
        load_detector_weights(detector, checkpoint, data.class_names)
        inputs = {"checkpoint": checkpoint}
        save_run(config, detector, data, run_dir / "detector.pth", inputs, {"checkpoint": arguments.checkpoint})
    return 0


if __name__ == "__main__":
    sys.exit(main())
