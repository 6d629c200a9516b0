"""
Chooses a student before anything is trained: `python -m crosskd.choose --budget-ms 15 -o runs/choice`.

Of the students over backbone, width and depth of the head, and image size (GFL, as in configs/recipes) it finds the one
with the most multiplications an image that keeps the budget on the target: the multiplications are the strongest sign
of accuracy that can be had without a training (YOLOBench, arXiv 2307.13901). Each that is looked at is exported with
random weights, quantised and measured, all stages: time does not depend on the values of weights. For each backbone the
budget is bracketed, so that some fifteen of 64 are measured. The choice is measured once more: its 99th percentile must
lie within the budget then, too.

What was measured is kept in DIR/measured.json: an interrupted run goes on, another budget measures only what is new.
Writes DIR/student.py, which `crosskd.pipeline --student` takes, DIR/choice.json, and DIR/choice.svg, latency against
multiplications. Needs the training and the edge packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from crosskd.choice.measure import Bench, Target, split_to_measure_on
from crosskd.choice.picture import plot
from crosskd.choice.search import Candidate, Limits, Measured, confirmed_best
from crosskd.choice.space import config_text, families
from deploy.commands import run_captured
from deploy.contract import provenance
from deploy.dataset import load_split
from deploy.errors import ConfigError, command
from deploy.files import check_writable, replacing, write_json
from deploy.folder_lock import locked
from deploy.targets import QUANTISED_FOR

CHOICE_VERSION = 1


@command
def main(argv: list[str] | None = None) -> int:
    arguments = command_parser().parse_args(argv)
    limits = limits_from_arguments(arguments)
    output: Path = arguments.output
    with locked(output):
        for name in ("student.py", "choice.json", "choice.svg"):
            check_writable(output / name)
        data = arguments.data or str(output / "images")
        if arguments.data is None:
            run_captured("crosskd.shapes", data, "--images", 12, "--size", 640)
        target = Target(
            data, arguments.runtime, arguments.precision, arguments.boards, arguments.threads, arguments.fps
        )
        bench = Bench(output, target, load_split(data, split_to_measure_on(data)))
        space = families()
        print(f"{sum(map(len, space))} students; looking for the most multiplications within {limits.budget_ms:g} ms")
        chosen, again = confirmed_best(space, limits, bench.measure, bench.measure_again)
        known = bench.known()
        rows = [(one, known[one.name]) for family in space for one in family if one.name in known]
        write_choice(output, chosen, again, rows, limits)
    print(table(rows, limits, chosen))
    print(
        f"chosen: {chosen.name}, measured again: p99 {again.p99_ms:.2f} ms; {len(rows)} of {sum(map(len, space))} "
        "students were measured\n"
        f"To train it: python -m crosskd.pipeline --student {output / 'student.py'} --data DIR -o DIR"
    )
    return 0


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.choose", description="Choose a student by what it takes on the target."
    )
    parser.add_argument(
        "--budget-ms", type=float, metavar="MS", help="of all stages, 99th percentile (default: 1000 / --fps)"
    )
    parser.add_argument("--fps", type=float, metavar="N", help="images come at this rate while it is measured")
    parser.add_argument("--max-memory-mib", type=float, metavar="MIB", help="peak of the process, on this machine")
    parser.add_argument("--max-size-mib", type=float, metavar="MIB", help="of the file that ships")
    parser.add_argument("--runtime", choices=QUANTISED_FOR, default="onnxruntime", help="(default: onnxruntime)")
    parser.add_argument(
        "--precision",
        choices=("int8", "float"),
        default="int8",
        help="float: FP32 with ONNX Runtime, FP16 with TensorRT (default: int8)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: one for each usable processor)")
    parser.add_argument(
        "--boards", type=Path, metavar="FILE", help="measure on these, by benchmarks.fleet (default: this machine)"
    )
    parser.add_argument("--data", metavar="DIR", help="images to measure on, and their classes (default: drawn ones)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the choice")
    return parser


def limits_from_arguments(arguments: argparse.Namespace) -> Limits:
    """
    What the student may take.

    Raises:
        ConfigError: neither a budget nor a rate, a number is not above 0, or a limit is not measured on boards.
    """
    given = {
        "--budget-ms": arguments.budget_ms,
        "--fps": arguments.fps,
        "--max-memory-mib": arguments.max_memory_mib,
        "--max-size-mib": arguments.max_size_mib,
        "--threads": arguments.threads,
    }
    for flag, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{flag} is {value:g}; expected a number above 0")
    for flag in ("--max-memory-mib", "--fps", "--threads"):
        if arguments.boards is not None and given[flag] is not None:
            raise ConfigError(f"{flag} is given with --boards, where it is not measured; leave it out")
    if arguments.boards is not None and not arguments.boards.is_file():
        raise ConfigError(f"no such file: {arguments.boards}; expected a list of boards, as docs/boards.example.toml")
    if arguments.budget_ms is None and arguments.fps is None:
        raise ConfigError("there is no budget; expected --budget-ms, or --fps")
    budget_ms = arguments.budget_ms if arguments.budget_ms is not None else 1000 / arguments.fps
    return Limits(budget_ms, arguments.max_size_mib, arguments.max_memory_mib)


def write_choice(
    output: Path, chosen: Candidate, again: Measured, rows: list[tuple[Candidate, Measured]], limits: Limits
) -> None:
    """Writes student.py, choice.svg and, last, choice.json."""
    head = (
        f"Chosen by crosskd.choose: p99 {again.p99_ms:.2f} ms, of {limits.budget_ms:g}, {chosen.macs / 1e9:.2f} GMAC."
    )
    for name, text in (("student.py", config_text(chosen, head)), ("choice.svg", plot(rows, limits, chosen))):
        with replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    document = {
        "choice_version": CHOICE_VERSION,
        **provenance({"measured": output / "measured.json"}),
        "limits": dataclasses.asdict(limits),
        "chosen": {**dataclasses.asdict(chosen), "name": chosen.name, **dataclasses.asdict(again)},
        "measured": [{"name": one.name, "macs": one.macs, **dataclasses.asdict(found)} for one, found in rows],
    }
    write_json(output / "choice.json", document)


def table(rows: list[tuple[Candidate, Measured]], limits: Limits, chosen: Candidate) -> str:
    """A line for each student that was measured, the fewest multiplications first."""
    lines = [f"{'student':<34} {'GMAC':>7} {'p99 ms':>8} {'MiB':>6} {'memory':>7}"]
    for one, found in sorted(rows, key=lambda row: row[0].macs):
        memory = "-" if found.memory_mib is None else f"{found.memory_mib:.0f}"
        mark = "  chosen" if one == chosen else "" if not limits.broken_by(found) else "  too much"
        lines.append(
            f"{one.name:<34} {one.macs / 1e9:7.2f} {found.p99_ms:8.2f} {found.size_mib:6.1f} {memory:>7}{mark}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
