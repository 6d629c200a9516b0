"""
A float ONNX detector -> an INT8 one, with Q/DQ pairs (QuantizeLinear, DequantizeLinear) where its runtime wants them.

    python -m calibration.quantize student.onnx --data DIR -o student.int8.onnx
    python -m calibration.quantize student.onnx --annotations train.json --images-dir train/ \\
        --evaluation-annotations val.json --evaluation-images-dir val/ -o student.int8.onnx

    python -m calibration.quantize student.onnx --data DIR --max-ap-drop 0.3 -o student.int8.onnx

Needs onnx, onnxruntime, OpenCV, and the sidecar that `deploy.export`, or `deploy.adopt_onnx` for a detector from
elsewhere, wrote beside the model; `--method auto` and `--max-ap-drop` also what `benchmarks.accuracy` needs.

What is quantised and where the pairs go, for each target: see `calibration.placement`. On x86 CPUs without VNNI ONNX
Runtime's integer kernels add pairs of products in 16 bits, which can saturate: measure AP there.

The ranges of activations come from calibration images, by a method of `calibration.ranges`; `--method auto` quantises
with each and takes the one of the best AP on images of the same split that were not calibrated on. Or they come from a
calibration cache of TensorRT, or from a training with INT8 in the loop (`--ranges`), and no images are needed.
`--bias-correction`: see `calibration.correction`.

With `--max-ap-drop` blocks of products are kept in float until INT8 costs no more AP than that, measured on the
images of `--budget-split`: see `calibration.search`. Final predictions are in float, but with `--int8-predictors`, or
where that budget allows it, their products are integers, and what comes of them is float.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
from pathlib import Path
from typing import List, Optional, Tuple

from calibration.float_model import read_model
from calibration.from_images import AUTO, NUM_IMAGES, CalibrationData, QuantizeOptions, int8_from_images
from calibration.given_ranges import int8_from_cache, int8_from_training, read_trained_ranges
from calibration.images import CHOICES
from calibration.placement import DEFAULT_TARGET, PLACEMENTS, node_name
from calibration.quantizer import Quantized
from calibration.ranges import PERCENTILE, RANGE_METHODS
from calibration.search import journal_path
from deploy.ap_drop import checked_budget
from deploy.contract import ModelContract, write_sidecar
from deploy.data_arguments import SetOptions, add_set_arguments, set_options
from deploy.dataset import load_coco, load_split
from deploy.errors import ConfigError, command
from deploy.files import AnyPath, check_writable
from deploy.graphs.calibration_cache import amax_from_quantised, write_cache
from deploy.graphs.graph import check_graph, save_onnx
from deploy.layouts import SPLITS, has_split, split_paths


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """
    What names the images to calibrate on, and those to keep apart from them.

    Raises:
        ConfigError: a folder of evaluation images without annotations.
    """

    calibration: SetOptions
    """The set that calibration images are chosen from."""
    evaluation_annotations: Tuple[str, ...] = ()
    """Files with none of whose images to calibrate; none: val and test of the data folder, where it has them."""
    evaluation_images_dir: Optional[str] = None
    """The folder of their images; None: that of the calibration images."""
    budget_split: Optional[str] = None
    """The split of the data folder that the drop of AP is measured on; None without a budget."""

    def __post_init__(self) -> None:
        if self.evaluation_images_dir and not self.evaluation_annotations:
            raise ConfigError(
                "--evaluation-images-dir is given without --evaluation-annotations; expected both or neither"
            )

    def load(self) -> CalibrationData:
        """
        The sets.

        Raises:
            ConfigError: not exactly one set to calibrate on is named.
            DataError: the data is missing or not COCO.
        """
        data, strict = self.calibration.data, self.calibration.strict
        calibration = self.calibration.load(check_files=False)
        images_dir = self.evaluation_images_dir or calibration.images_dir
        paths: List[Tuple[AnyPath, AnyPath]] = [(path, images_dir) for path in self.evaluation_annotations]
        if data and not paths:
            paths = [split_paths(data, split) for split in SPLITS[1:] if has_split(data, split)]
        evaluations = [load_coco(*files, check_files=False, strict=strict) for files in paths]
        budget = None
        if data and self.budget_split is not None:
            budget = load_split(data, self.budget_split, strict=strict)
            if budget.annotations_path not in [evaluation.annotations_path for evaluation in evaluations]:
                evaluations.append(budget)
        return CalibrationData(calibration, tuple(evaluations), budget)


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.quantize", description="Quantise an ONNX detector to INT8, with Q/DQ nodes."
    )
    parser.add_argument("model", help="float ONNX file, with its sidecar")
    parser.add_argument("-o", "--output", required=True, help="INT8 ONNX file to write")
    source = parser.add_mutually_exclusive_group(required=True)
    add_set_arguments(parser, SPLITS[0], "to calibrate on", source)
    source.add_argument(
        "--calibration-cache", metavar="FILE", help="ranges from a calibration cache of TensorRT instead of images"
    )
    source.add_argument(
        "--ranges", metavar="FILE",
        help="target, what is kept in float and ranges, of a student that was trained with INT8: its int8.json",
    )  # fmt: skip
    parser.add_argument(
        "--target",
        choices=sorted(PLACEMENTS),
        help=f"runtime that will run it (default: {DEFAULT_TARGET}, or that of --ranges)",
    )
    parser.add_argument(
        "--method", choices=(*RANGE_METHODS, AUTO), default="max",
        help="how a range is taken from what was seen; auto: the best of them by AP (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--percentile", type=float, metavar="P",
        help=f"how many values in a hundred the method of that name does not clip (default: {PERCENTILE})",
    )  # fmt: skip
    parser.add_argument(
        "--bias-correction", action="store_true",
        help="take off biases what rounding adds to the mean of each channel; its effect is measured",
    )  # fmt: skip
    parser.add_argument(
        "--keep-float", nargs="+", default=[], metavar="NAME",
        help="what to keep in float: names of nodes, or what the names of a block's nodes begin with",
    )  # fmt: skip
    parser.add_argument(
        "--int8-predictors", action="store_true",
        help="quantise the products of the final predictions, too, their results in float "
        "(default: only where --max-ap-drop allows it)",
    )  # fmt: skip
    parser.add_argument(
        "--max-ap-drop", type=float, metavar="POINTS",
        help="keep in float what must be so that AP drops by no more than this, of 100, such as 0.3; with --data",
    )  # fmt: skip
    parser.add_argument(
        "--nearest", action="store_true",
        help="where --max-ap-drop cannot be met, write the model that comes nearest to it (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--budget-split", choices=SPLITS, help="split of --data that --max-ap-drop is measured on (default: val)"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N",
        help=f"images to calibrate on (default: {NUM_IMAGES}; where models are compared, at most four fifths of all)",
    )  # fmt: skip
    parser.add_argument(
        "--choose", choices=CHOICES, default="random",
        help="which images: covering: such as show every class in every size (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")
    parser.add_argument(
        "--statistics", metavar="FILE",
        help="keep what was seen of the activations in FILE; if it is there, take it from there (.npz)",
    )  # fmt: skip
    parser.add_argument(
        "--write-calibration-cache", metavar="FILE", help="write the ranges as a calibration cache of TensorRT, too"
    )
    parser.add_argument(
        "--tensorrt-version", metavar="VERSION", help="for which that cache is, such as 8.5.3: others do not take it"
    )
    parser.add_argument(
        "--evaluation-annotations", nargs="+", default=[], metavar="FILE",
        help="COCO files with none of whose images to calibrate (default: val and test of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation-images-dir",
        metavar="DIR",
        help="folder of their images (default: that of the calibration images)",
    )
    return parser.parse_args(argv)


def check_target(target: str, calibration_cache: Optional[str]) -> None:
    """Raises ConfigError if a calibration cache is to be read or written, and is not for the target."""
    if calibration_cache and target != "tensorrt":
        raise ConfigError(
            f"the target is {target}; expected tensorrt with a calibration cache, which has symmetric ranges"
        )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if flags do not go together, PipelineError if a file could not be written."""
    output = Path(arguments.output)
    if output.suffix != ".onnx":
        raise ConfigError(f"--output is {output}; expected a file with the suffix .onnx")
    files = {
        flag: Path(path).resolve()
        for flag, path in (
            ("the model", arguments.model), ("--output", output), ("--statistics", arguments.statistics),
            ("--calibration-cache", arguments.calibration_cache), ("--ranges", arguments.ranges),
            ("--write-calibration-cache", arguments.write_calibration_cache),
        )
        if path
    }  # fmt: skip
    if len(set(files.values())) < len(files):
        named = ", ".join(f"{flag}: {path}" for flag, path in files.items())
        raise ConfigError(f"two of the files to read and write are one ({named}); expected a file for each")
    if arguments.percentile is not None:
        if arguments.method not in ("percentile", AUTO):
            raise ConfigError(
                f"--percentile is given; expected none with --method {arguments.method}, which has no use"
            )
        if not 50 < arguments.percentile <= 100:
            raise ConfigError(f"--percentile is {arguments.percentile}; expected above 50, at most 100, such as 99.99")
    if arguments.max_ap_drop is not None:
        checked_budget(arguments.max_ap_drop, "--max-ap-drop")
    if arguments.max_ap_drop is not None and not arguments.data:
        raise ConfigError("--max-ap-drop is given without --data; expected the folder that --budget-split is a part of")
    if arguments.nearest and arguments.max_ap_drop is None:
        raise ConfigError("--nearest is given without --max-ap-drop, the budget that it is about; give both or neither")
    if arguments.budget_split and arguments.max_ap_drop is None:
        raise ConfigError(f"--budget-split is {arguments.budget_split}; expected none without --max-ap-drop")
    if bool(arguments.write_calibration_cache) != bool(arguments.tensorrt_version):
        raise ConfigError("expected both --write-calibration-cache and --tensorrt-version, or neither; one is given")
    if arguments.tensorrt_version and not re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", arguments.tensorrt_version):
        raise ConfigError(f"--tensorrt-version is {arguments.tensorrt_version!r}; expected one such as 8.5.3")
    if arguments.calibration_cache or arguments.ranges:
        given = [
            flag
            for flag, value in (
                ("--images-dir", arguments.images_dir), ("--split", arguments.split),
                ("--statistics", arguments.statistics), ("--method", arguments.method != "max"),
                ("--bias-correction", arguments.bias_correction),
                ("--num-images", arguments.num_images is not None), ("--seed", arguments.seed),
                ("--choose", arguments.choose != "random"),
                ("--evaluation-annotations", arguments.evaluation_annotations),
                ("--evaluation-images-dir", arguments.evaluation_images_dir),
            )
            if value
        ]  # fmt: skip
        if given:
            source = "--ranges" if arguments.ranges else "--calibration-cache"
            raise ConfigError(f"{', '.join(given)}: expected none with {source}, which needs no images")
    of_training = {"--target": arguments.target, "--keep-float": arguments.keep_float,
                   "--int8-predictors": arguments.int8_predictors}  # fmt: skip
    given = [flag for flag, value in of_training.items() if value]
    if arguments.ranges and given:
        raise ConfigError(f"{', '.join(given)}: expected none with --ranges, whose file says it as it was trained")
    for path in (arguments.output, arguments.statistics, arguments.write_calibration_cache):
        if path and not (path == arguments.statistics and Path(path).is_file()):
            check_writable(path)


def options_from_arguments(arguments: argparse.Namespace) -> QuantizeOptions:
    """The options that the flags give, which `check_arguments` has seen."""
    return QuantizeOptions(
        model=Path(arguments.model),
        output=Path(arguments.output),
        target=arguments.target or DEFAULT_TARGET,
        method=arguments.method,
        percentile=PERCENTILE if arguments.percentile is None else arguments.percentile,
        bias_correction=arguments.bias_correction,
        keep_float=tuple(arguments.keep_float),
        max_ap_drop=arguments.max_ap_drop,
        nearest=arguments.nearest,
        int8_predictors=arguments.int8_predictors,
        num_images=arguments.num_images,
        choice=arguments.choose,
        seed=arguments.seed,
        statistics=Path(arguments.statistics) if arguments.statistics else None,
    )


def data_options_from_arguments(arguments: argparse.Namespace) -> DataOptions:
    """What the flags say of the data. Raises ConfigError if they do not go together."""
    return DataOptions(
        calibration=set_options(arguments, SPLITS[0]),
        evaluation_annotations=tuple(arguments.evaluation_annotations),
        evaluation_images_dir=arguments.evaluation_images_dir,
        budget_split=None if arguments.max_ap_drop is None else arguments.budget_split or "val",
    )


def write_quantized(quantized: Quantized, model_path: AnyPath, contract: ModelContract, output: AnyPath) -> None:
    """
    Writes the INT8 file with its sidecar.

    Args:
        model_path: of the float model.
        contract: of both models.

    Raises:
        ExportError: the graph is not valid, or does not fit in one file.
        PipelineError: a file cannot be written.
    """
    check_graph(quantized.model)
    save_onnx(quantized.model, output)
    reasons = quantized.graph.reasons
    write_sidecar(
        output,
        {"model": model_path, **quantized.inputs},
        contract,
        {
            "target": quantized.target,
            **quantized.details,
            "keep_float": list(quantized.keep_float),
            "int8_predictors": quantized.graph.int8_predictors and bool(quantized.graph.predictors),
            "quantized_convolutions": [node_name(node) for node in quantized.graph.quantized],
            "float_convolutions": {name: reason.text for name, reason in reasons.items()},
            "float_convolution_codes": {name: reason.code for name, reason in reasons.items()},
            "op_counts": dict(sorted(collections.Counter(node.op_type for node in quantized.model.graph.node).items())),
        },
    )


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Quantises one model; see the module's docstring."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    trained = read_trained_ranges(arguments.ranges) if arguments.ranges else None
    options, data_options = options_from_arguments(arguments), data_options_from_arguments(arguments)
    target = trained.target if trained else options.target
    check_target(target, arguments.calibration_cache or arguments.write_calibration_cache)
    graph, contract = read_model(options.model, options.keep_float, options.int8_predictors)
    if trained:
        quantized = int8_from_training(trained, options.model, graph)
    elif arguments.calibration_cache:
        quantized = int8_from_cache(arguments.calibration_cache, target, options.keep_float, graph)
    else:
        quantized = int8_from_images(options, data_options.load(), graph, contract)
    write_quantized(quantized, options.model, contract, options.output)
    if arguments.write_calibration_cache:
        write_cache(arguments.write_calibration_cache, amax_from_quantised(quantized.model), arguments.tensorrt_version)
    if options.max_ap_drop is not None:
        journal_path(options.output).unlink(missing_ok=True)  # the sidecar has it now
    counts = collections.Counter(quantized.graph.reasons.values())
    reasons = ", ".join(f"{number} {reason.text}" for reason, number in counts.items())
    graph = quantized.graph
    print(
        f"{options.output}: {len(graph.quantized)} of {len(graph.products)} convolutions and matrix products in "
        f"INT8 for {target}, the others in float ({reasons}); {quantized.summary}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
