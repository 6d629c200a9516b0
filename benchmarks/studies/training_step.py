"""
Command: how long a training step takes, with and without distillation, in plain float32 and in the fast form.

    python -m benchmarks.studies.training_step configs/crosskd_gfl_r18_r50_1x_coco.py --threads 2 -o training_step.json

Each variant runs in a process of its own (`crosskd.workers.time_training`, which needs the training packages), so that
its peak memory is its own. One round runs them all, and there are several rounds, so that what slows the machine for a
while slows all of them. A ratio is that of two medians of one round; its spread is that over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from benchmarks.measuring.environment import read_environment
from benchmarks.measuring.result import UNSTABLE_SPREAD, relative_spread
from deploy.commands import run_relayed
from deploy.contract import RESULT_VERSION, provenance
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import check_writable, read_json, write_json
from deploy.progress import progress

DEFAULT_CONFIG = "configs/crosskd_gfl_r18_r50_1x_coco.py"
VARIANTS = {
    "student": "student alone, float32",
    "student-fast": "student alone, fast form, bf16",
    "student-fast-fp32": "student alone, fast form, float32",
    "distill": "distillation, float32",
    "distill-fast": "distillation, fast form, bf16",
    "distill-fast-fp32": "distillation, fast form, float32",
    "teacher-forward": "teacher's forward pass, bf16",
    "teacher-forward-fp32": "teacher's forward pass, float32",
}
"""Variant of `crosskd.workers.time_training` -> title, in the order of the table. It says there what each is."""
RATIOS = (
    ("distill-fast", "student"),
    ("distill-fast", "student-fast"),
    ("distill-fast", "distill"),
    ("distill-fast-fp32", "distill"),
    ("distill-fast-fp32", "student-fast-fp32"),
    ("distill", "student"),
    ("teacher-forward", "student-fast"),
    ("teacher-forward-fp32", "student-fast-fp32"),
)

Times = Mapping[str, Any]
"""What one process measured: the JSON of `crosskd.workers.time_training`."""


@dataclasses.dataclass(frozen=True)
class TrainingStepOptions:
    """What a step is measured with."""

    config: str
    """Config of a distillation."""
    size: Sequence[int] = (320, 320)
    """Width and height of the images, pixels."""
    batch: int = 4
    """Images in a step."""
    steps: int = 20
    """Timed steps in a round."""
    rounds: int = 3
    """Rounds of all variants."""
    threads: Optional[int] = None
    """CPU threads; None: torch's choice."""
    output: Optional[str] = None
    """JSON to write; None: the table is only printed."""


def times_of_variant(variant: str, options: TrainingStepOptions) -> Times:
    """
    The times of one process, and the machine's load average over a minute before it as `load_average`.

    Raises:
        MeasurementError: the command failed, or wrote something else.
    """
    load_average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    words = [options.config, "--variant", variant, "--size", *map(str, options.size)]
    words += ["--batch", str(options.batch), "--steps", str(options.steps)]
    words += ["--threads", str(options.threads)] if options.threads is not None else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        run_relayed("crosskd.workers.time_training", *words, "-o", output)
        times = read_json(output, MeasurementError, "the times of crosskd.workers.time_training")
    count = len(times.get("samples_s", ())) if isinstance(times, dict) else 0
    if count != options.steps:
        raise MeasurementError(
            f"crosskd.workers.time_training wrote {count} samples of {variant}; expected {options.steps}"
        )
    return {**times, "load_average": load_average}


def numbers_from_rounds(rounds: Sequence[Mapping[str, Times]]) -> Dict[str, Any]:
    """
    The `numbers` of the result file: `variants` (variant -> statistics over all rounds) and `ratios`.

    Args:
        rounds: variant -> times, for each round.
    """
    return {
        "variants": {variant: _summary(title, [times[variant] for times in rounds])
                     for variant, title in VARIANTS.items()},
        "ratios": [_ratio(rounds, over, under) for over, under in RATIOS],
    }  # fmt: skip


def _summary(title: str, runs: Sequence[Times]) -> Dict[str, Any]:
    samples_s = [value for run in runs for value in run["samples_s"]]
    low_s, median_s, high_s = np.percentile(samples_s, [25, 50, 75]).tolist()
    return {
        "title": title,
        "median_s": median_s,
        "quartiles_s": [low_s, high_s],
        "stable": relative_spread(samples_s) <= UNSTABLE_SPREAD,
        "peak_mib": max(run["peak_mib"] for run in runs),
        "precision": runs[0]["precision"],
        "device": runs[0]["device"],
        "threads": runs[0]["threads"],
        "rounds": list(runs),
    }


def _ratio(rounds: Sequence[Mapping[str, Times]], over: str, under: str) -> Dict[str, Any]:
    values = [_median_s(times[over]) / _median_s(times[under]) for times in rounds]
    return {
        "over": over,
        "under": under,
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
    }


def _median_s(times: Times) -> float:
    return statistics.median(times["samples_s"])


def lines_from_numbers(numbers: Mapping[str, Any]) -> List[str]:
    """The table of the variants and that of the ratios, as lines of text."""
    variants = numbers["variants"]
    lines = [f"{'':<36} {'median s':>9} {'quartiles s':>17} {'peak MiB':>9}  precision"]
    for row in variants.values():
        quartiles = " to ".join(f"{value:.3f}" for value in row["quartiles_s"])
        lines.append(f"{row['title']:<36} {row['median_s']:>9.3f} {quartiles:>17} {row['peak_mib']:>9.0f}  "
                     f"{row['precision']}")  # fmt: skip
    lines += ["", f"{'ratio':<70} {'median':>6}  over the rounds"]
    for row in numbers["ratios"]:
        title = f"{variants[row['over']]['title']} / {variants[row['under']]['title']}"
        lines.append(f"{title:<70} {row['median']:>6.2f}  {row['lowest']:.2f} to {row['highest']:.2f}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.training_step",
        description="Measure a training step with and without distillation, on random images.",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", default=DEFAULT_CONFIG,
                        help=f"config of a distillation (default: {DEFAULT_CONFIG})")  # fmt: skip
    parser.add_argument(
        "--size", type=int, nargs=2, default=[320, 320], metavar=("WIDTH", "HEIGHT"), help="pixels (default: 320 320)"
    )
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images in a step (default: 4)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps in a round (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of all variants (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("-o", "--output", metavar="FILE", help="JSON to write (default: the table is only printed)")
    return parser


def _check_options(options: TrainingStepOptions) -> None:
    if options.output is not None:
        check_writable(options.output)
    for flag in ("batch", "steps", "rounds", "threads"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} is {value}; expected at least 1")
    if not Path(options.config).is_file():
        raise ConfigError(f"no such config: {options.config}; expected the config of a distillation")


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, prints the tables, writes the result file, and says so if a variant was not stable."""
    options = TrainingStepOptions(**vars(_parser().parse_args(argv)))
    _check_options(options)
    environment = read_environment()  # before anything is measured: the load is that which others cause
    rounds: List[Dict[str, Times]] = [{} for _ in range(options.rounds)]
    order = [(times, variant) for times in rounds for variant in VARIANTS]
    for times, variant in progress(order, len(order), "runs"):
        times[variant] = times_of_variant(variant, options)
    numbers = numbers_from_rounds(rounds)
    fast = numbers["variants"]["distill-fast"]
    width, height = options.size
    print(f"{options.config}, {options.batch} images of {width} x {height}, {fast['device']}, "
          f"{fast['threads']} threads, {options.rounds} rounds of {options.steps} steps")  # fmt: skip
    print("\n".join(lines_from_numbers(numbers)))
    if options.output is not None:
        settings = {key: getattr(options, key) for key in ("size", "batch", "steps", "rounds", "threads")}
        write_json(
            options.output,
            {
                "result_version": RESULT_VERSION,
                **provenance({"config": options.config}),
                "kind": "training_step",
                "environment": environment,
                "settings": settings,
                "numbers": numbers,
            },
        )
    unstable = [row["title"] for row in numbers["variants"].values() if not row["stable"]]
    if unstable:
        print(
            f"UNSTABLE: {'; '.join(unstable)}: the interquartile range is above {100 * UNSTABLE_SPREAD:.0f} % of the "
            f"median; load average before the first run {environment['load_average']}. Stop other programs, fix the "
            "clocks or raise --steps, and repeat."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
