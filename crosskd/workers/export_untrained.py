"""
Exports the detector of a config with random weights: `python -m crosskd.workers.export_untrained CONFIG -o FILE`.

It detects nothing, but takes as long on a machine as it will when it is trained. `benchmarks.studies.recipes` runs this
command for each recipe. Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crosskd.choice.measure import export_untrained
from crosskd.config import load_config, set_classes
from deploy.errors import ConfigError, command
from deploy.files import check_writable


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.workers.export_untrained", description="Export a detector with random weights."
    )
    parser.add_argument("config", metavar="CONFIG", help="config of a detector, such as a recipe")
    parser.add_argument(
        "--side", type=int, required=True, metavar="PX", help="of the input, a multiple of 32: its `input_size`"
    )
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="that it tells apart (default: 10)")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="ONNX file to write")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Writes the file and its sidecar."""
    arguments = _parser().parse_args(argv)
    check_writable(arguments.output)
    if arguments.side < 32 or arguments.side % 32:
        raise ConfigError(f"--side is {arguments.side}; expected a multiple of 32")
    if arguments.classes < 1:
        raise ConfigError(f"--classes is {arguments.classes}; expected at least 1")
    config = load_config(arguments.config, {"input_size": (arguments.side, arguments.side)})
    ids = tuple(range(1, arguments.classes + 1))
    names = tuple(f"class {number}" for number in ids)
    set_classes(config, names)
    export_untrained(config, names, ids, arguments.output, as_started=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
