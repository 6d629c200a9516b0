"""
Command: where the time of an inference goes, operator by operator, in FP32 and in INT8; so, what bounds the speed-up.

    python -m benchmarks.studies.operators nanodet=nanodet.onnx:nanodet.int8.onnx --data ../shared/data/coco_open

The two files take turns for their latencies; then ONNX Runtime's own profile, of RUNS inferences, gives the median of
each node. One thread, one image. Needs onnxruntime.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.environment import read_environment
from benchmarks.reporting.wording import times
from benchmarks.studies.tables import check_tables, disturbed, table, write_tables
from benchmarks.studies.turns import feed_of, latencies, ratio
from deploy.commands import shell_line
from deploy.contract import load_contract, provenance
from deploy.dataset import load_coco
from deploy.errors import ConfigError, MeasurementError, MissingDependencyError, command
from deploy.layouts import split_paths
from deploy.runtime.session import open_session

RUNS = 30
SPLIT = "test"
SHOWN = 12
"""Operators of a model that have a row of their own: those that take most time in either file."""
PRODUCTS = {
    "Conv": "convolutions in FP32",
    "FusedConv": "convolutions in FP32",
    "QLinearConv": "convolutions in INT8",
    "ConvInteger": "convolutions in INT8",
}
"""ONNX Runtime's name of an operator -> the row that it is counted in; others have their own name."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model in FP32 and in INT8."""

    name: str
    fp32: Path
    int8: Path

    @classmethod
    def from_argument(cls, text: str) -> Pair:
        """
        Of NAME=FP32.onnx:INT8.onnx.

        Raises:
            ConfigError: it is not of that form. ContractError: a file or its sidecar is missing or damaged.
        """
        name, _, files = text.partition("=")
        fp32, _, int8 = files.partition(":")
        if not (name and fp32 and int8):
            raise ConfigError(f"the model is {text!r}; expected NAME=FP32.onnx:INT8.onnx")
        load_contract(fp32)
        load_contract(int8)
        return cls(name, Path(fp32), Path(int8))


def milliseconds_by_operator(model: Path, image: Path) -> Dict[str, Tuple[int, float]]:
    """
    Operator, as in PRODUCTS -> (number of nodes, milliseconds of all of them in one inference, by medians), in ONNX
    Runtime's optimised graph on one thread.

    Raises:
        MissingDependencyError: onnxruntime is not installed. MeasurementError: it wrote no times.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "profiling", "pip install onnxruntime") from error
    contract = load_contract(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, 1, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        feed = feed_of(contract, image)
        for _ in range(RUNS):
            session.run(list(contract.output_names), feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken_us: Dict[Tuple[str, str], List[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken_us[event["args"]["op_name"], event["name"]].append(event["dur"])
    if not taken_us:
        raise MeasurementError(f"ONNX Runtime's profile of {model} has no times of nodes")
    found: Dict[str, Tuple[int, float]] = {}
    for (operator, _), values in taken_us.items():
        kind = PRODUCTS.get(operator, operator)
        count, before_ms = found.get(kind, (0, 0.0))
        found[kind] = (count + 1, before_ms + statistics.median(values) / 1e3)
    return found


def row_of(pair: Pair, image: Path) -> Dict[str, Any]:
    """What the result file says of a model."""
    sessions = {"fp32": open_session(pair.fp32, threads=1), "int8": open_session(pair.int8, threads=1)}
    measured = latencies(sessions, image)
    return {
        "name": pair.name,
        "ms": measured["ms"],
        "times": ratio(measured, "fp32", "int8"),
        "description": measured["description"]["int8"],
        "others_cores": measured["others_cores"],
        "operators": {
            key: {operator: {"nodes": nodes, "ms": taken_ms} for operator, (nodes, taken_ms) in own.items()}
            for key, own in (
                ("fp32", milliseconds_by_operator(pair.fp32, image)),
                ("int8", milliseconds_by_operator(pair.int8, image)),
            )
        },
    }


def markdown_of(document: Mapping[str, Any]) -> str:
    """The tables of a result file."""
    rows, environment = document["rows"], document["environment"]
    lines = [
        "# Where the time goes, in FP32 and in INT8",
        "",
        f"Made by `{shell_line(document['command'])}` on {environment['cpu']}, {rows[0]['description']}: milliseconds "
        f"of one image; of operators, sums of the medians of {RUNS} inferences. The graphs are those that ONNX Runtime "
        "makes of the files. QLinear: in INT8.",
    ]
    for row in rows:
        speed = row["times"]
        lines += [
            "",
            f"## {row['name']}",
            "",
            f"{row['ms']['fp32']:.2f} ms in FP32, {row['ms']['int8']:.2f} ms in INT8, {times(speed['median'])} "
            f"({speed['lowest']:.2f} to {speed['highest']:.2f}){disturbed(row['others_cores'])}.",
            "",
            *table(("operator", "FP32: nodes", "ms", "INT8: nodes", "ms"), _cells(row["operators"])),
        ]
    return "\n".join([*lines, ""])


def _cells(operators: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> List[List[str]]:
    nothing = {"nodes": 0, "ms": 0.0}
    pairs = {
        name: [operators[key].get(name, nothing) for key in ("fp32", "int8")]
        for name in dict.fromkeys([*operators["fp32"], *operators["int8"]])
    }
    order = sorted(pairs, key=lambda name: -max(one["ms"] for one in pairs[name]))
    kept = {name: pairs[name] for name in order[:SHOWN]}
    if order[SHOWN:]:
        kept["all others"] = [
            {key: sum(pairs[name][side][key] for name in order[SHOWN:]) for key in nothing} for side in range(2)
        ]
    return [[name, *(text for one in both for text in _numbers(one))] for name, both in kept.items()]


def _numbers(one: Mapping[str, Any]) -> Tuple[str, str]:
    return (str(one["nodes"]), f"{one['ms']:.2f}") if one["nodes"] else ("", "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.operators",
        description="Show where the time of an inference goes on ONNX Runtime, by operator, in FP32 and INT8.",
    )
    parser.add_argument("models", nargs="+", metavar="NAME=FP32.onnx:INT8.onnx", help="files, with their sidecars")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with annotations/instances_test.json, images/"
    )
    parser.add_argument("-o", "--output", metavar="STEM", default="benchmarks/results/calibration/operators",
                        help="of the files to write, STEM.json and STEM.md (default: %(default)s)")  # fmt: skip
    return parser


@command
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measures, writes the tables and prints the ratios."""
    arguments = _parser().parse_args(argv)
    check_tables(arguments.output)
    pairs = [Pair.from_argument(text) for text in arguments.models]
    environment = read_environment()
    image = load_coco(*split_paths(arguments.data, SPLIT), check_files=False).images[0].path
    rows = []
    for pair in pairs:
        rows.append(row_of(pair, image))
        print(f"{pair.name}: {times(rows[-1]['times']['median'])}", flush=True)
    files = {f"{pair.name} {key}": getattr(pair, key) for pair in pairs for key in ("fp32", "int8")}
    document = {**provenance(files), "kind": "operators", "environment": environment, "rows": rows}
    write_tables(arguments.output, document, markdown_of(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
