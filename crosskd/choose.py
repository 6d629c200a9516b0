"""
Chooses a student before anything is trained: `python -m crosskd.choose --budget-ms 15 -o runs/choice`.

Of the students over backbone, width and depth of the head, and image size (GFL, as in configs/recipes) it finds the one
with the most multiplications an image that keeps the budget on the target: the multiplications are the strongest sign
of accuracy that can be had without a training (YOLOBench, arXiv 2307.13901). Each that is looked at is exported with
random weights, quantised and measured, all stages: time does not depend on the values of weights. For each backbone the
budget is bracketed, so that some fifteen of 64 are measured. The choice is measured once more: its 99th percentile must
lie within the budget then, too.

With `--train-top K` the K students of the most multiplications within the budget are distilled for a short time, and
the best by AP on the validation images is chosen: by successive halving, each round with the better half for twice as
long. `--ray ADDRESS` trains on the GPUs and machines of Ray, else one is trained after the other. A training that is
killed is told and repeated once; what fails for good is left out, and the command ends with status 2 after its choice.

What was measured is kept in DIR/measured.json: an interrupted run goes on, another budget measures only what is new.
Writes DIR/student.py, which `crosskd.pipeline --student` takes, DIR/choice.json, and DIR/choice.svg, latency against
multiplications; trainings lie below DIR/trials. Needs the training and the edge packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from crosskd.choice.halving import Halving, TrialOptions, halve
from crosskd.choice.measure import Bench, Target, split_to_measure_on
from crosskd.choice.picture import plot
from crosskd.choice.search import Candidate, Limits, Measured, confirmed_best, confirmed_first, most_promising
from crosskd.choice.space import config_text, families
from crosskd.recipes import TEACHERS, recipe_path
from deploy.commands import command_line, run_captured
from deploy.contract import provenance
from deploy.dataset import load_split
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import check_writable, replacing, write_json
from deploy.folder_lock import locked
from deploy.layouts import SPLITS
from deploy.targets import QUANTISED_FOR
from deploy.trials import RAY_HERE, add_ray_argument, check_ray, trial_processes

CHOICE_VERSION = 1


@command
def main(argv: list[str] | None = None) -> int:
    arguments = command_parser().parse_args(argv)
    limits = limits_from_arguments(arguments)
    trials = trial_options_from_arguments(arguments)
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
        halving = Halving({}, [], [])
        if trials is None:
            chosen, again = confirmed_best(space, limits, bench.measure, bench.measure_again)
        else:
            promising = most_promising(space, limits, bench.measure, trials.count)
            print(f"to be trained: {', '.join(one.name for one in promising)}", flush=True)
            if arguments.ray is None:
                tell_of_gpus()
            with trial_processes(arguments.ray, len(promising) if arguments.ray else 1) as processes:
                halving = halve(promising, trials, output, processes)
            chosen, again = confirmed_first(halving.ranking, limits, bench.measure_again)
        known = bench.known()
        rows = [(one, known[one.name]) for family in space for one in family if one.name in known]
        write_choice(output, chosen, again, rows, limits, halving)
    print(table(rows, limits, chosen))
    words = ["--student", output / "student.py", "--data", arguments.data or "DIR"]
    if trials is not None:
        print(table_of_trials(halving))
        words += ["--teacher", trials.teacher, "--teacher-checkpoint", trials.checkpoint_in(output)]
    print(
        f"chosen: {chosen.name}, measured again: p99 {again.p99_ms:.2f} ms; {len(rows)} of {sum(map(len, space))} "
        "students were measured\n"
        f"To train it: {command_line('crosskd.pipeline', *words)} -o DIR"
    )
    if halving.failed:
        raise MeasurementError(
            f"{len(halving.failed)} trials failed: {', '.join(map(str, halving.failed))}; why is above. {chosen.name} "
            "was chosen among the others. To try them again, run the same command: what was measured is kept"
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
    group = parser.add_argument_group("short trainings")
    group.add_argument(
        "--train-top",
        type=int,
        metavar="K",
        help="distil the K most promising for a short time, and take the best by AP",
    )
    group.add_argument(
        "--trial-epochs", type=int, metavar="N", help="of the first round (default: a twelfth of the recipe's length)"
    )
    group.add_argument("--teacher", metavar="RECIPE", help=f"{', '.join(TEACHERS)} (default: base)")
    group.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="weights of that teacher on the same classes (default: it is trained)",
    )
    group.add_argument("--seed", type=int, metavar="SEED", help="of the trainings (default: 0)")
    add_ray_argument(group)
    return parser


TRAINING_FLAGS = ("--trial-epochs", "--teacher", "--teacher-checkpoint", "--seed", "--ray")
"""That go with --train-top alone."""


def trial_options_from_arguments(arguments: argparse.Namespace) -> TrialOptions | None:
    """
    How the most promising students are trained; None: they are not.

    Raises:
        ConfigError: flags do not go together, or a number is of no use. DataError: there are no data to train on.
        MeasurementError, MissingDependencyError: Ray cannot be reached.
    """
    values = {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in TRAINING_FLAGS}
    given = [flag for flag, value in values.items() if value is not None]
    if arguments.train_top is None:
        if given:
            raise ConfigError(f"{given[0]} is given without --train-top, the trainings that it is about; give both")
        return None
    for flag, value, least in (
        ("--train-top", arguments.train_top, 2), ("--trial-epochs", arguments.trial_epochs, 1),
        ("--seed", arguments.seed, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ConfigError(f"{flag} is {value}; expected at least {least}")
    if arguments.data is None:
        raise ConfigError("--train-top is given without --data; expected the images to train on")
    checkpoint = arguments.teacher_checkpoint
    if checkpoint is not None and "://" not in checkpoint and not Path(checkpoint).is_file():
        raise ConfigError(f"no such file: {checkpoint}; expected weights of the teacher, such as RUN/detector.pth")
    recipe_path(arguments.teacher or "base", TEACHERS)
    if arguments.ray is not None:
        check_ray(arguments.ray)
    load_split(arguments.data, SPLITS[1])
    return TrialOptions(
        arguments.train_top,
        arguments.data,
        len(load_split(arguments.data, SPLITS[0]).images),
        arguments.teacher or "base",
        checkpoint,
        arguments.trial_epochs,
        arguments.seed or 0,
    )


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


def tell_of_gpus() -> None:
    """Says so where there are GPUs that trials without Ray leave idle."""
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        print(f"{count} GPUs are here, and one training runs after the other; --ray {RAY_HERE} uses all", flush=True)


def write_choice(
    output: Path,
    chosen: Candidate,
    again: Measured,
    rows: list[tuple[Candidate, Measured]],
    limits: Limits,
    halving: Halving,
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
    document["trials"] = [
        {"name": trial.candidate.name, "round": trial.round, "epochs": trial.epochs, "ap": ap}
        for trial, ap in halving.ap.items()
    ]
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


def table_of_trials(halving: Halving) -> str:
    """A line for each student that was trained, the best first: its AP after each round, in percent."""
    rounds = sorted({(trial.round, trial.epochs) for trial in halving.ap})
    lines = [f"{'student':<34}" + "".join(f" {f'AP, {epochs} ep.':>12}" for _, epochs in rounds)]
    for one in halving.ranking:
        reached = {trial.round: ap for trial, ap in halving.ap.items() if trial.candidate == one}
        lines.append(f"{one.name:<34}" + "".join(f" {100 * reached[n]:12.1f}" for n, _ in rounds if n in reached))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
