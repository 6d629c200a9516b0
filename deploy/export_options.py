"""What is exported, and how: the arguments of `deploy.export`, which `crosskd.export` takes as well."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import List, Optional, Tuple

from deploy.contract import DYNAMIC, LAYOUTS, OUTPUTS
from deploy.errors import ConfigError
from deploy.files import check_writable

INPUT_NAME = "image"
"""Of the network input of an exported detector."""
OUTPUT_NAME = re.compile(r"(?!nms_|rows_|candidate_)[A-Za-z_][A-Za-z0-9_]{0,62}")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a run is exported to ONNX."""

    run_dir: Path
    """The folder of a finished run."""
    output: Path
    """The ONNX file to write; it can be written."""
    size_px: Optional[Tuple[int, int]]
    """Width and height of the network input; None: what the test pipeline pads to."""
    batch: int
    """Images per inference; DYNAMIC for any number."""
    input_type: str
    """As ModelContract.input_type."""
    outputs: str
    """As ModelContract.outputs."""
    output_names: Tuple[str, ...]
    """As ModelContract.output_names."""


def read_export_options(command_name: str, argv: Optional[List[str]]) -> ExportOptions:
    """
    The options in a command's arguments; `--help` ends the process, as argparse has it.

    Args:
        command_name: as in `python -m <command_name>`.
        argv: the arguments; by default those of this process.

    Raises:
        ConfigError: the output is no .onnx file.
        PipelineError: the output cannot be written.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {command_name}", description="Export a trained detector to ONNX.")
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of a finished run: student.pth or detector.pth, config.py"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.onnx")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="of the network input (default: that of the test pipeline)",
    )
    parser.add_argument(
        "--batch",
        type=batch_from_text,
        default=1,
        metavar="N",
        help="images per inference, or 'dynamic' for any number (default: 1)",
    )
    parser.add_argument(
        "--input-type",
        choices=sorted(LAYOUTS),
        default="float32",
        help="float32: normalised, (N, 3, height, width). uint8: pixels, (N, height, width, 3), normalised by the "
        "graph, a quarter of the bytes (default: float32)",
    )
    parser.add_argument(
        "--outputs",
        choices=sorted(OUTPUTS),
        default="topk",
        help="topk: boxes, scores and labels of the best candidates before NMS. rows: the same in one tensor, x1 y1 x2 "
        "y2 score label. nms: detections, NMS in the graph (default: topk)",
    )
    parser.add_argument(
        "--output-names",
        nargs="+",
        metavar="NAME",
        help="what the outputs are called, in the order "
        + "; ".join(f"{kind}: {' '.join(names)}" for kind, names in sorted(OUTPUTS.items()))
        + " (default: so)",
    )
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix != ".onnx":
        raise ConfigError(f"the output is {output}; expected a name that ends in .onnx")
    output_names = tuple(arguments.output_names or OUTPUTS[arguments.outputs])
    _check_output_names(output_names, arguments.outputs)
    check_writable(output)
    return ExportOptions(
        run_dir=Path(arguments.run_dir),
        output=output,
        size_px=tuple(arguments.size) if arguments.size else None,
        batch=arguments.batch,
        input_type=arguments.input_type,
        outputs=arguments.outputs,
        output_names=output_names,
    )


def _check_output_names(names: Tuple[str, ...], outputs: str) -> None:
    """Raises ConfigError."""
    expected = OUTPUTS[outputs]
    wrong = [name for name in names if not OUTPUT_NAME.fullmatch(name) or name == INPUT_NAME]
    if len(names) != len(expected) or len(set(names)) != len(names) or wrong:
        raise ConfigError(
            f"--output-names is {' '.join(names)}; expected {len(expected)} names that differ, for "
            f"{', '.join(expected)}, each of letters, digits and _, and neither {INPUT_NAME!r}, which the input has, "
            "nor with nms_, rows_ or candidate_ at the beginning"
        )


def batch_from_text(text: str) -> int:
    """The number of images, or DYNAMIC; for argparse, which names the flag."""
    if text == "dynamic":
        return DYNAMIC
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images; expected 1 or more, or 'dynamic'")
    return int(text)
