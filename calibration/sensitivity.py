"""
Command: what each block of a detector costs in INT8, ranked.

    python -m calibration.sensitivity student.onnx --data DIR -o sensitivity.json
    python -m calibration.sensitivity student.onnx --data DIR --metric error --blocks each -o sensitivity.json

Each block of convolutions and matrix products (`calibration.blocks`) is quantised alone, all else in float, calibrated
on the training split and measured on another: AP, AP of small, medium and large objects, the score at the best F1, and
how far the detections move on a few images. With `--metric error` only the last, which needs no annotated boxes and
takes seconds a block. Beside the JSON file a bar chart is written (.svg).

The file is written after each block; run again, an interrupted command goes on from there.

Needs onnx and onnxruntime; for AP also what benchmarks.accuracy needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from calibration.blocks import BLOCK_KINDS, Block, blocks_from_graph, count_multiplications
from calibration.collect import statistics_of_images
from calibration.float_model import read_model
from calibration.images import calibration_images, choose_images
from calibration.measure import ERROR_IMAGES, OutputError, accuracy_numbers, saved, total_error
from calibration.placement import DEFAULT_TARGET, PLACEMENTS, FloatGraph
from calibration.quantizer import Quantizer, key_of_measurements, tensors_of_any_choice
from calibration.ranges import PERCENTILE, RANGE_METHODS
from deploy.ap_drop import Drop, points
from deploy.contract import ModelContract, provenance
from deploy.data_arguments import add_data_argument, add_strict_argument
from deploy.dataset import CocoSet, load_coco, load_split
from deploy.errors import CalibrationError, ConfigError, command
from deploy.files import check_writable, read_json, replacing, write_json
from deploy.freshness import changed_keys
from deploy.layouts import SPLITS, split_paths
from deploy.schema import Number, Whole, read_checked

METRICS = ("ap", "error")
SIZES = ("AP_small", "AP_medium", "AP_large")
ALL = "all blocks"
"""The name of the row that is no block: all of them in INT8."""

BlockRow = Dict[str, Any]
_ROW: Dict[Any, Any] = {
    "name": str,
    "products": [str],
    "multiplications": Whole(1),
    "error": {"boxes": Number(0), "scores": Number(0)},
}
_ROW_WITH_AP: Dict[Any, Any] = {
    **_ROW,
    **dict.fromkeys(("AP_drop", "low", "high"), float),
    **dict.fromkeys((*(f"{name}_drop" for name in SIZES), "score_shift"), (float, None)),
}
SENSITIVITY = (
    {"key": dict, "blocks": [_ROW_WITH_AP], "all": (_ROW_WITH_AP, None)},
    {"key": dict, "blocks": [_ROW], "all": (_ROW, None)},
)
"""Table of the file that the command writes, with AP and without."""


@dataclasses.dataclass(frozen=True)
class SensitivityOptions:
    """
    What is measured, and how.

    Raises:
        ConfigError: the output has another suffix than .json.
    """

    model: Path
    """The float model."""
    output: Path
    """The file of the rows, which goes on with one that is there; the chart stands beside it."""
    data: str
    """The data folder; calibrated on its train split."""
    strict: bool = False
    """Refuse annotations with any box of no use."""
    target: str = DEFAULT_TARGET
    """The runtime that is to run INT8."""
    split: str = "val"
    """The split that is measured on."""
    limit: Optional[int] = None
    """Only so many images of it; None: all."""
    metric: str = "ap"
    """One of METRICS."""
    block_kind: str = "grouped"
    """One of `calibration.blocks.BLOCK_KINDS`."""
    method: str = "max"
    """How a range is taken from what was seen."""
    keep_float: Tuple[str, ...] = ()
    """What is in float in any case, as `FloatGraph` takes it."""
    num_images: int = 512
    """How many images to calibrate on, at most."""
    seed: int = 0
    """Of the choice of these images."""
    statistics: Optional[Path] = None
    """File that keeps what was seen of the activations; None: it is not kept."""

    def __post_init__(self) -> None:
        if self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}; expected a file with the suffix .json")

    @property
    def settings(self) -> Dict[str, str]:
        """What the rows depend on besides model and data; the names are for people."""
        return {
            "target": self.target,
            "method": self.method,
            "metric": self.metric,
            "block kind": self.block_kind,
        }


def measured_block(
    quantizer: Quantizer,
    block: Block,
    contract: ModelContract,
    errors: OutputError,
    against: Optional[Tuple[Path, CocoSet]],
) -> BlockRow:
    """
    What the block costs: `error` of the output and, but for `--metric error`, `AP_drop` with `low` and `high`, those of
    SIZES (null where there are no such objects) and `score_shift` of the best F1; all as fractions.

    Args:
        against: the accuracy result of the float model, and the images that it is of.
    """
    row: BlockRow = {
        "name": block.name,
        "products": list(block.products),
        "multiplications": block.multiplications,
    }
    with saved(quantizer.quantize(quantizer.graph_of(block.products)), contract) as path:
        row["error"] = errors.of(path)
        if against is not None:
            result, data = against
            numbers = accuracy_numbers(path, data.annotations_path, data.images_dir, len(data.images), result)
            float_numbers = read_json(result, CalibrationError, "a result of benchmarks.accuracy")["numbers"]
            drop = Drop.from_numbers(numbers)
            row.update(AP_drop=drop.drop, low=drop.low, high=drop.high)
            for name in SIZES:
                here, there = numbers[name], float_numbers[name]
                row[f"{name}_drop"] = None if here is None or there is None else there - here
            row["score_shift"] = numbers["against"]["score_shift"]
    return row


def cost(row: BlockRow) -> float:
    """The cost that rows are ranked by: the drop of AP where it was measured, else the error of the output."""
    return float(row["AP_drop"]) if "AP_drop" in row else total_error(row["error"])


def resumed_rows(path: Path, key: Dict[str, Any]) -> List[BlockRow]:
    """
    The rows that an earlier run has left; none where there is no file.

    Raises:
        CalibrationError: the file is of another model, other data or other settings, or something else.
    """
    if not path.is_file():
        return []
    what = "the sensitivity of an earlier run; delete it to begin anew, or name another --output"
    document = read_checked(path, SENSITIVITY, CalibrationError, what)
    changed = changed_keys(document["key"], key)
    if changed:
        raise CalibrationError(
            f"{path} holds the sensitivity of other {', '.join(changed)}; expected those of now, to go on. Delete it, "
            "or name another --output."
        )
    rows: List[BlockRow] = document["blocks"]
    return rows + ([document["all"]] if document["all"] is not None else [])


def table_from_rows(rows: Sequence[BlockRow]) -> str:
    """The rows as text, for people: AP in points, errors in percent."""
    width = max(len(row["name"]) for row in rows)
    with_ap = "AP_drop" in rows[0]
    head = f"{'block':{width}}  "
    head += "AP drop  (95 % interval)   small  medium   large  score shift  " if with_ap else ""
    lines = [f"{head}boxes %  scores %  share of products"]
    total = max(row["multiplications"] for row in rows)
    for row in rows:
        line = f"{row['name']:{width}}  "
        if with_ap:
            interval = f"({points(row['low'])} to {points(row['high'])})"
            drops = (row[f"{name}_drop"] for name in SIZES)
            sizes = "".join(f"{'-' if drop is None else points(drop):>8}" for drop in drops)
            shift = "-" if row["score_shift"] is None else f"{row['score_shift']:+.3f}"
            line += f"{points(row['AP_drop']):>7}  {interval:>16} {sizes}  {shift:>11}  "
        error = row["error"]
        share = row["multiplications"] / total
        lines.append(f"{line}{100 * error['boxes']:7.2f}  {100 * error['scores']:8.2f}  {share:17.1%}")
    return "\n".join(lines)


def chart_from_rows(rows: Sequence[BlockRow]) -> str:
    """An SVG: a bar for each row, as long as its cost; with AP, a line over its interval."""
    with_ap = "AP_drop" in rows[0]
    title = "AP points lost in INT8 (line: 95 % interval)" if with_ap else "Error of boxes + scores in INT8, percent"
    ends = [
        100 * value for row in rows for value in ((cost(row), row["low"], row["high"]) if with_ap else (cost(row),))
    ]
    least, most = min(0.0, *ends), max(0.0, *ends)
    left, bar_width, row_height, top = 8 * max(len(row["name"]) for row in rows) + 20, 420, 22, 40
    scale = bar_width / ((most - least) or 1.0)

    def x(value: float) -> float:
        return round(left + (value - least) * scale, 1)

    parts = [f'<text x="{left}" y="22" font-weight="bold">{title}</text>']
    for index, row in enumerate(rows):
        y, value = top + index * row_height, 100 * cost(row)
        start, end = sorted((x(0.0), x(value)))
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{html.escape(row["name"])}</text>')
        parts.append(
            f'<rect x="{start}" y="{y + 3}" width="{end - start:.1f}" height="{row_height - 8}" fill="#4477aa"/>'
        )
        if with_ap:
            parts.append(
                f'<path d="M{x(100 * row["low"])} {y + 10}H{x(100 * row["high"])}" stroke="#222" stroke-width="2"/>'
            )
        parts.append(f'<text x="{left + bar_width + 8}" y="{y + 14}">{value:.2f}</text>')
    bottom = top + len(rows) * row_height
    parts.append(f'<path d="M{x(0.0)} {top}V{bottom}" stroke="#222"/>')
    size = f'width="{left + bar_width + 80}" height="{bottom + 16}"'
    style = 'font-family="sans-serif" font-size="13" fill="#222"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.sensitivity", description="What each block of a detector costs in INT8, ranked."
    )
    parser.add_argument("model", help="float ONNX file, with its sidecar")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="JSON file to write; goes on with one")
    add_data_argument(parser, required=True, use=", calibrated on its train split")
    add_strict_argument(parser)
    parser.add_argument(
        "--target", choices=sorted(PLACEMENTS), default=DEFAULT_TARGET, help="runtime that will run it (%(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="split to measure on (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only its first N images (default: all)")
    parser.add_argument(
        "--metric", choices=METRICS, default="ap",
        help=f"ap: AP and the error of the output; error: this alone, on up to {ERROR_IMAGES} images "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", choices=BLOCK_KINDS, default="grouped",
        help="grouped: residual blocks, levels, tower layers; each: every convolution and matrix product "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=RANGE_METHODS, default="max", help="how a range is taken from what was seen (default: max)"
    )
    parser.add_argument(
        "--keep-float", nargs="+", default=[], metavar="NAME", help="what is in float in any case, not measured"
    )
    parser.add_argument(
        "--num-images", type=int, default=512, metavar="N", help="images to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images (default: %(default)s)")
    parser.add_argument(
        "--statistics", metavar="FILE", help="keep what was seen of the activations in FILE, or take it from there"
    )
    return parser


def options_from_arguments(arguments: argparse.Namespace) -> SensitivityOptions:
    """The options that the flags give. Raises ConfigError for an output of another suffix."""
    return SensitivityOptions(
        model=Path(arguments.model),
        output=Path(arguments.output),
        data=arguments.data,
        strict=arguments.strict,
        target=arguments.target,
        split=arguments.split,
        limit=arguments.limit,
        metric=arguments.metric,
        block_kind=arguments.blocks,
        method=arguments.method,
        keep_float=tuple(arguments.keep_float),
        num_images=arguments.num_images,
        seed=arguments.seed,
        statistics=Path(arguments.statistics) if arguments.statistics else None,
    )


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures every block of one model; see the module's docstring."""
    options = options_from_arguments(_parser().parse_args(argv))
    for path in (options.output, options.statistics):
        if path and not path.is_file():
            check_writable(path)
    graph, contract = read_model(options.model, options.keep_float)
    calibration = load_coco(*split_paths(options.data, "train"), check_files=False, strict=options.strict)
    measured = load_split(options.data, options.split, options.limit, options.strict)
    images = calibration_images(calibration, options.num_images, options.seed, [measured])
    key = key_of_measurements(options.model, contract, graph, options.settings, images, measured)
    rows = resumed_rows(options.output, key)
    blocks = blocks_to_measure(graph, contract, options.block_kind)
    tensors = tensors_of_any_choice(graph, options.target)
    statistics = statistics_of_images(
        graph.model, tensors, images, contract, options.statistics, options.model, [options.method]
    )
    quantizer = Quantizer(graph.model, options.target, options.method, PERCENTILE, options.keep_float, statistics)
    measure_blocks(options, blocks, rows, key, quantizer, contract, measured)
    ranked = sorted(rows, key=cost, reverse=True)
    with replacing(options.output.with_suffix(".svg")) as temporary:
        temporary.write_text(chart_from_rows(ranked), encoding="utf-8")
    print(table_from_rows(ranked))
    return 0


def blocks_to_measure(graph: FloatGraph, contract: ModelContract, kind: str) -> List[Block]:
    """The blocks of a graph, and behind them all of them as one, called ALL."""
    blocks = blocks_from_graph(graph, kind, count_multiplications(graph, contract))
    everything = tuple(name for block in blocks for name in block.products)
    return [*blocks, Block(ALL, everything, sum(block.multiplications for block in blocks))]


def measure_blocks(
    options: SensitivityOptions,
    blocks: Sequence[Block],
    rows: List[BlockRow],
    key: Dict[str, Any],
    quantizer: Quantizer,
    contract: ModelContract,
    measured: CocoSet,
) -> None:
    """Measures the blocks that `rows` lack, adds their rows, and writes the file after each."""
    known = {row["name"] for row in rows}
    if known:
        print(f"{options.output}: {len(known)} of {len(blocks)} are known from an earlier run", file=sys.stderr)
    if len(known) == len(blocks):
        return
    errors = OutputError(options.model, choose_images(measured.images, ERROR_IMAGES, seed=0))
    inputs = {"model": options.model, "annotations": measured.annotations_path}
    with tempfile.TemporaryDirectory() as folder:
        against = _float_result(options.model, measured, Path(folder)) if options.metric == "ap" else None
        for number, block in enumerate(blocks, start=1):
            if block.name in known:
                continue
            row = measured_block(quantizer, block, contract, errors, against)
            rows.append(row)
            _write(options.output, key, rows, inputs)
            lost = f"{points(row['AP_drop'])} points of AP, " if "AP_drop" in row else ""
            print(f"{number}/{len(blocks)} {block.name}: {lost}error {100 * total_error(row['error']):.2f} %",
                  file=sys.stderr, flush=True)  # fmt: skip


def _float_result(model_path: Path, data: CocoSet, folder: Path) -> Tuple[Path, CocoSet]:
    """The accuracy result of the float model, kept in the folder, and the images that it is of."""
    result = folder / "float.result.json"
    accuracy_numbers(model_path, data.annotations_path, data.images_dir, len(data.images), output=result)
    return result, data


def _write(output: Path, key: Dict[str, Any], rows: Sequence[BlockRow], inputs: Dict[str, Any]) -> None:
    """Ranked, so that the file can be read at any time."""
    ranked = sorted((row for row in rows if row["name"] != ALL), key=cost, reverse=True)
    together = next((row for row in rows if row["name"] == ALL), None)
    write_json(output, {**provenance(inputs), "key": key, "all": together, "blocks": ranked})


if __name__ == "__main__":
    sys.exit(main())
