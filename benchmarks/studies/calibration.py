"""
Command: what INT8 costs in AP and gains in time, and what INT8-aware training wins back.

    python -m benchmarks.studies.calibration methods nanodet=nanodet.onnx:../shared/data/coco_open \\
        --int8-aware nanodet=trained.int8.onnx -o benchmarks/results/calibration/methods
    python -m benchmarks.studies.calibration int8-aware CONFIG --student RUN_DIR --teacher teacher.pth --data DIR \\
        -o benchmarks/results/calibration/int8_aware
    python -m benchmarks.studies.calibration distilled CONFIG --alone RUN_DIR ... --distilled RUN_DIR ... \\
        --teacher teacher.pth --data DIR -o benchmarks/results/calibration/distilled

`methods` quantises ready ONNX files, with their sidecars, by each method of calibration.quantize and measures what
comes of it. `int8-aware` fine-tunes a student with crosskd.distill --quantize int8, and once more without, so that what
longer training alone gains is known. `distilled` compares what students that were trained alone and distilled lose.

Everything is made by the project's own commands, in processes of their own, below --runs-dir; only latency is taken
here. What is there from the very same command and files is kept, and what was measured on the same processor: cut it
off at any time, and the same line goes on; a command that was cut off, be it a training, begins anew. (A config or
images that were changed, or a newer version of the commands, are not noticed: delete what is to be made again.) Needs
what those commands need.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import List, Optional

from benchmarks.studies.calibration_distilled import SINGLE_METHODS, DistilledOptions, run_distilled
from benchmarks.studies.calibration_methods import COMPARED_METHODS, MethodsOptions, run_methods
from benchmarks.studies.calibration_training import Int8AwareOptions, run_int8_aware
from benchmarks.studies.tables import check_tables
from deploy.contract import read_sidecar, weights_of_run
from deploy.errors import command
from deploy.layouts import check_splits
from deploy.targets import QUANTISED_FOR
from deploy.trials import Processes, add_ray_argument, trial_processes


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Makes and measures what is not yet done. A row of `methods` may fail, and says why in the table."""
    values = vars(_parser().parse_args(argv))
    chosen = values.pop("table")
    if chosen == "distilled":
        distilled = DistilledOptions(**values)
        for run_dir in (*distilled.alone, *distilled.distilled):
            read_sidecar(weights_of_run(run_dir))
        check_splits(distilled.data)
        check_tables(distilled.output)
        run_distilled(distilled, Processes(1))
        return 0
    if chosen == "methods":
        methods = MethodsOptions(**values)
        check_tables(methods.output)
        run_methods(methods, Processes(1))
        return 0
    aware = Int8AwareOptions(**values)
    read_sidecar(weights_of_run(aware.student))
    check_splits(aware.data)
    check_tables(aware.output)
    with trial_processes(aware.ray, aware.jobs) as processes:
        run_int8_aware(dataclasses.replace(aware, jobs=processes.jobs), processes)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.calibration",
        description="Measure INT8: each method of calibration, and training.",
    )
    tables = parser.add_subparsers(dest="table", required=True, metavar="methods | int8-aware | distilled")
    methods = tables.add_parser("methods", help="INT8 by each method of calibration")
    methods.add_argument("models", nargs="+", metavar="NAME=MODEL.onnx:DATA_DIR[:SPLIT]",
                         help="a float detector with its sidecar, and the data to calibrate (train split) and measure "
                         "on (split val or test, the default)")  # fmt: skip
    methods.add_argument("--int8-aware", nargs="+", default=[], metavar="NAME=FILE.int8.onnx",
                         help="of crosskd.distill --quantize int8: a row for the target that it is for")  # fmt: skip
    methods.add_argument(
        "--targets", nargs="+", choices=QUANTISED_FOR, default=list(QUANTISED_FOR), help="(default: both)"
    )
    methods.add_argument("--max-ap-drop", type=float, default=0.3, metavar="POINTS",
                         help="of the row with a budget, met on the val split (default: %(default)s)")  # fmt: skip
    aware = tables.add_parser("int8-aware", help="what INT8-aware training wins back")
    aware.add_argument("config", metavar="CONFIG", help="of crosskd.distill")
    aware.add_argument("--student", required=True, metavar="RUN_DIR", help="a finished run of the student")
    aware.add_argument("--teacher", required=True, metavar="FILE.pth", help="the teacher's weights")
    aware.add_argument("--data", required=True, metavar="DIR", help="data folder")
    aware.add_argument("--epochs", type=int, required=True, help="of each fine-tuning")
    aware.add_argument("--learning-rate", type=float, required=True, metavar="RATE", help="of each fine-tuning")
    aware.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    aware.add_argument("--target", choices=QUANTISED_FOR, default="tensorrt", help="(default: %(default)s)")
    aware.add_argument(
        "--method", choices=COMPARED_METHODS, default="max", help="of calibration (default: %(default)s)"
    )
    aware.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each; 1: one, with all the "
                       "threads (default: %(default)s)")  # fmt: skip
    add_ray_argument(aware)
    pairs = tables.add_parser("distilled", help="whether distilled students lose more by INT8")
    pairs.add_argument("config", metavar="CONFIG", help="of crosskd.distill, for INT8-aware training")
    pairs.add_argument("--alone", required=True, nargs="+", metavar="RUN_DIR", help="students that were trained alone")
    pairs.add_argument("--distilled", required=True, nargs="+", metavar="RUN_DIR",
                       help="distilled students of the same seeds, in the same order")  # fmt: skip
    pairs.add_argument("--teacher", required=True, metavar="FILE.pth", help="the teacher's weights")
    pairs.add_argument("--data", required=True, metavar="DIR", help="data folder")
    pairs.add_argument("--targets", nargs="+", choices=QUANTISED_FOR, default=list(QUANTISED_FOR), metavar="TARGET",
                       help=f"{', '.join(QUANTISED_FOR)} (default: both); INT8-aware training: the first")  # fmt: skip
    pairs.add_argument("--methods", nargs="+", choices=SINGLE_METHODS, default=list(SINGLE_METHODS), metavar="METHOD",
                       help=f"of calibration: {', '.join(SINGLE_METHODS)} (default: all)")  # fmt: skip
    pairs.add_argument("--epochs", type=int, help="of INT8-aware training (default: there is none)")
    pairs.add_argument("--learning-rate", type=float, default=1.5e-4, metavar="RATE", help="of it (%(default)s)")
    for table, folder in ((methods, "methods"), (aware, "int8_aware"), (pairs, "distilled")):
        table.add_argument("--runs-dir", metavar="DIR", help="folder of what is made on the way (default: "
                           f"runs/bench/calibration/{folder})")  # fmt: skip
        table.add_argument("-o", "--output", required=True, metavar="PATH", help="result files: PATH.json, PATH.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
