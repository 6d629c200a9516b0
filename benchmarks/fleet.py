"""
Command: build, check and measure a bundle on many boards over SSH, and bring the results back.

    python -m benchmarks.fleet boards.toml student.tar.gz --data DIR -o student.fleet
    python -m benchmarks.fleet boards.toml student.tar.gz --data DIR -o student.fleet --activate --limits limits.toml
    python -m benchmarks.fleet boards.toml --rollback

Each board gets the files of the bundle and the test images, and runs its `run.py build`, `check`, `predict` and
`bench`; nothing else is executed there but a lock on its folder, by Python, which keeps a second fleet from it. For a
board of ONNX Runtime (`runtime = "onnxruntime"`) nothing is built. AP is computed here from what the board detected;
latency is that of all stages, back to back and at --fps. Without images it is that of the network alone.

A board that fails or hangs does not hold up the others. What a board has already for this very bundle (its hash) and
these images is not done again: an engine that still passes `check` there, its detections, and its measurements. An
image is sent once, whatever bundle is measured.

In the output folder: BOARD/PRECISION.accuracy.result.json, .latency. and .paced. for `benchmarks.report`, which are of
this run alone, BOARD/STEP.PRECISION.log, and fleet.json.

With --activate each board's results are judged as `benchmarks.report` does, and where the verdict is to roll out, the
model becomes current there (`deploy.board.release`); of several precisions the first of the board's list. --rollback
makes the former one current again.

Exit status: 0 if all went well on every board, 1 if with --activate a verdict is not to roll out, 2 for bad input or a
board that failed: what the others gave is kept, and the same command goes on. Needs asyncssh, for images also OpenCV
and faster-coco-eval; the boards need what run.py does, an SSH server with SFTP, and `timeout` of coreutils or busybox.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Awaitable, Callable, Collection, Dict, List, Optional, Sequence, Tuple, TypeVar

from benchmarks.boards.activation import activate, judge_board, roll_back
from benchmarks.boards.list import Board, boards_from_file, build_options
from benchmarks.boards.sending import TestImages, images_from_coco
from benchmarks.boards.ssh import check_asyncssh
from benchmarks.boards.visit import Job, Outcome, visit
from benchmarks.measuring.coco import check_evaluator
from benchmarks.measuring.result import LEAST_RUNS, read_result
from benchmarks.measuring.subject import SPLIT, load_test_set
from benchmarks.measuring.timing import LatencyOptions
from benchmarks.reporting.verdict import check_limits, limits_from_file
from benchmarks.reporting.wording import UNKNOWN, decimals, ms, points
from deploy.board.archive import SUFFIX, unpack
from deploy.board.commands import KINDS, SOURCE_OF, Bundle, best_precision, source_kind
from deploy.board.signature import signer
from deploy.contract import ModelContract, provenance
from deploy.data_arguments import SetOptions, add_set_arguments, set_options
from deploy.dataset import with_classes
from deploy.errors import ConfigError, MeasurementError, command, one_line
from deploy.files import check_writable, sha256_of, write_json
from deploy.folder_lock import locked
from deploy.targets import TARGETS
from deploy.tensorrt.options import check_shapes

FLEET_VERSION = 2
T = TypeVar("T")
FPS = 30.0
COLUMNS = ("board", "device", "runtime", "precision", "state", "AP", "median ms", "p99 ms", "mJ", "why")


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parser().parse_args(argv)
    _check_arguments(arguments)
    if arguments.rollback:
        _roll_back(boards_from_file(arguments.boards), arguments.jobs)
        return 0
    if arguments.check:
        check_asyncssh()
        for board in _planned(arguments, arguments.check):
            print(_plan_of(board, arguments.check))
        return 0
    output: Path = arguments.output or Path(arguments.bundle.name.replace(SUFFIX, "") + ".fleet")
    with locked(output, MeasurementError), tempfile.TemporaryDirectory(prefix="fleet.") as temporary:
        check_writable(output / "fleet.json")
        bundle = Bundle(unpack(arguments.bundle, temporary))
        boards = _planned(arguments, bundle.manifest["sources"], bundle.contract)
        signature = signer(bundle.folder, arguments.allowed_signers)
        check_asyncssh()
        print(f"{arguments.bundle}: {signature}", file=sys.stderr)
        sha256 = sha256_of(arguments.bundle)
        images = _test_images(arguments, bundle)
        job = Job(bundle, f"{bundle.folder.name}-{sha256[:16]}", output, arguments.runs, images, arguments.fps or FPS)
        outcomes, faults = asyncio.run(_visit_all(boards, job, arguments.jobs))
        if arguments.activate:
            _activate(boards, job, outcomes, arguments)
        document = {
            "fleet_version": FLEET_VERSION,
            **provenance({"boards": arguments.boards, "bundle": arguments.bundle}),
            "signature": signature,
            "data": None if images is None else images.image_set.data,
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }
        write_json(output / "fleet.json", document)
    print(table(outcomes))
    print(f"details: {output / 'fleet.json'}")
    _tell_of_others(output, boards, arguments.boards)
    for fault in faults:  # bugs of ours, which the other boards are not to suffer from
        raise fault
    _check_all_well(boards, [outcome.board for outcome in outcomes if not outcome.is_well])
    return 1 if any(outcome.roll_out is False for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet", description="Build, check and measure a bundle on many boards over SSH."
    )
    parser.add_argument("boards", type=Path, metavar="BOARDS", help="TOML file, as docs/boards.example.toml")
    parser.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help=f"archive of deploy.bundle, NAME{SUFFIX}"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for results and logs (default: NAME.fleet)"
    )
    parser.add_argument(
        "--allowed-signers",
        type=Path,
        metavar="FILE",
        help="refuse a bundle that none of these signed: a line each, a name and a public SSH key (default: any)",
    )
    add_set_arguments(parser, SPLIT, "that boards detect in")
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images (default: all)")
    parser.add_argument(
        "--fps", type=float, metavar="N",
        help=f"rate at which latency is also measured, as of a camera's images (default: {FPS:g})",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=int, default=200, metavar="N", help="runs of a measurement that count (default: 200)"
    )
    parser.add_argument(
        "--activate",
        action="store_true",
        help="make the model current on each board whose verdict is to roll out; needs --limits",
    )
    parser.add_argument("--limits", type=Path, metavar="FILE", help="TOML file of limits, as of benchmarks.report")
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULT",
        help="results of the teacher, for limits against it",
    )
    parser.add_argument(
        "--rollback", action="store_true", help="only make the former model of each board current again"
    )
    parser.add_argument("--teacher", action="store_true", help="the bundle is the teacher's: its best precision alone, "
                        "whatever boards.toml says, for benchmarks.report --teacher")  # fmt: skip
    parser.add_argument("--check", nargs="+", choices=list(KINDS), help="only say what will run on each board, and "
                        "whether BOARDS will do, for a bundle of these ONNX files; there need be none yet")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="boards at a time (default: 4)")
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together, or a value that cannot be."""
    for flag, least in (("jobs", 1), ("images", 1), ("runs", LEAST_RUNS)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag} is {value}; expected at least {least}")
    LatencyOptions(fps=arguments.fps)  # which checks it
    alone = _parser().parse_args([str(arguments.boards), "--rollback", "--jobs", str(arguments.jobs)])
    if arguments.rollback and arguments != alone:
        raise ConfigError("--rollback is given with a bundle or options; expected the boards, and --jobs, alone")
    if not arguments.rollback and not arguments.check and arguments.bundle is None:
        raise ConfigError(f"no bundle is given; expected an archive of deploy.bundle, NAME{SUFFIX}, or --rollback")
    if arguments.activate != (arguments.limits is not None) or (arguments.reference and not arguments.activate):
        raise ConfigError("expected --activate and --limits together: the verdict of a board is by the limits")
    if arguments.limits is not None:
        allowed = limits_from_file(arguments.limits)
        check_limits(allowed)
        if not allowed:
            raise ConfigError(f"{arguments.limits} has no limits; expected one at least: by none there is no verdict")
    for path in arguments.reference:
        read_result(path)


def _test_images(arguments: argparse.Namespace, bundle: Bundle) -> Optional[TestImages]:
    """
    The images that are sent; None where none are given.

    Raises:
        ConfigError: an option is given that only images have a use for, or as `SetOptions.paths`.
        DataError: the images are no good, or of other classes than the bundle's model.
    """
    options = set_options(arguments, SPLIT)
    if options == SetOptions(None, options.split, None, None, False):
        for flag in ("split", "images", "fps"):
            if getattr(arguments, flag) is not None:
                raise ConfigError(f"--{flag} is given without --data; expected both, or neither")
        return None
    check_evaluator()
    coco = load_test_set(options, arguments.images)
    with_classes(coco, bundle.contract.class_names, bundle.contract.category_ids, str(arguments.bundle))
    return images_from_coco(coco)


def _planned(
    arguments: argparse.Namespace, kinds: Collection[str], contract: Optional[ModelContract] = None
) -> List[Board]:
    """
    The boards, each with what is to run there.

    Args:
        kinds: of the ONNX files in the bundle. contract: the bundle's; None where there is none yet.

    Raises:
        ConfigError: the list of boards is no good, or names what the bundle does not have, or cannot be.
    """
    boards = boards_from_file(arguments.boards)
    if arguments.teacher:
        boards = [dataclasses.replace(board, precisions=()) for board in boards]
    return [_with_precisions(board, kinds, contract) for board in boards]


def _with_precisions(board: Board, kinds: Collection[str], contract: Optional[ModelContract]) -> Board:
    try:
        for precision in board.precisions:
            source_kind(kinds, precision, board.runtime)
        precisions = board.precisions or (best_precision(kinds, board.runtime),)
        for precision in precisions if board.runtime == "tensorrt" else ():
            options = build_options(board, precision)
            if contract is not None:
                check_shapes(options, contract)
    except ConfigError as error:
        raise ConfigError(f"[[board]] {board.name!r}: {error}") from error
    return dataclasses.replace(board, precisions=precisions)


# What is done


async def _visit_all(boards: Sequence[Board], job: Job, jobs: int) -> Tuple[List[Outcome], List[Exception]]:
    """What came of each precision on each board, and the exceptions that nobody expected."""

    async def visit_one(board: Board) -> List[Outcome]:
        outcomes = [Outcome(board.name, board.host, precision) for precision in board.precisions]
        try:
            await visit(board, job, outcomes)
        except Exception as error:
            faults.append(error)
            for outcome in outcomes:
                if outcome.state != "ok":
                    outcome.reason = f"a fault of this program: {type(error).__name__}: {one_line(error)}"
        return outcomes

    faults: List[Exception] = []
    of_boards = await _in_turn(visit_one, boards, jobs)
    return [outcome for outcomes in of_boards for outcome in outcomes], faults


def _activate(boards: Sequence[Board], job: Job, outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> None:
    """Judges the results of each board and makes the first model that is to roll out its current one."""
    allowed = limits_from_file(arguments.limits)
    chosen: Dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.state == "ok" and judge_board(job, outcome, allowed, arguments.reference):
            chosen.setdefault(outcome.board, outcome)

    async def work(board: Board) -> None:
        if board.name in chosen:
            await activate(board, job, chosen[board.name])

    asyncio.run(_in_turn(work, boards, arguments.jobs))


def _roll_back(boards: Sequence[Board], jobs: int) -> None:
    """Makes the former models current again and says what came of it. Raises MeasurementError if a board failed."""
    check_asyncssh()
    reasons = asyncio.run(_in_turn(roll_back, boards, jobs))
    for board, reason in zip(boards, reasons):
        print(f"{board.name}: {reason or 'the former model is current again'}")
    _check_all_well(boards, [board.name for board, reason in zip(boards, reasons) if reason])


async def _in_turn(work: Callable[[Board], Awaitable[T]], boards: Sequence[Board], jobs: int) -> List[T]:
    """What `work` gives for each board, so many at a time."""
    free = asyncio.Semaphore(jobs)

    async def one(board: Board) -> T:
        async with free:
            return await work(board)

    return list(await asyncio.gather(*map(one, boards)))


# What is said


def _check_all_well(boards: Sequence[Board], failed: Sequence[str]) -> None:
    """Raises MeasurementError if any board, by its name in `failed`, did not do all that it was to do."""
    names = list(dict.fromkeys(failed))
    if names:
        raise MeasurementError(
            f"{len(names)} of {len(boards)} boards failed: {', '.join(names)}; what is above says why. Put that right "
            "and run the same command again: what is done is kept"
        )


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each precision of each board, under a line of headings."""
    lines = [COLUMNS, *map(_cells, outcomes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _plan_of(board: Board, kinds: Collection[str]) -> str:
    """What will run on a board, in a line."""
    others = [KINDS[kind] for kind in kinds if kind not in SOURCE_OF[board.runtime].values()]
    without = f"; not INT8, since the bundle has the {others[0]}" if others and "int8" not in board.precisions else ""
    return f"{board.name}: {', '.join(board.precisions)} with {TARGETS[board.runtime].title}{without}"


def _tell_of_others(output: Path, boards: Sequence[Board], boards_file: Path) -> None:
    """Names folders with results of boards that were not visited, which a report of all folders would take in."""
    others = {path.parent.name for path in output.glob("*/*.result.json")} - {board.name for board in boards}
    for name in sorted(others):
        print(
            f"{output / name} is of an earlier run, of a board that is not in {boards_file}: remove it, or leave it "
            "out of the report"
        )


def _cells(outcome: Outcome) -> Sequence[str]:
    state = outcome.state
    if state == "ok":
        before = {state for step, state in outcome.steps.items() if step not in ("check", "activate")} == {
            "done before"
        }
        state = ("done before" if before else "ok") + ("" if outcome.stable else ", unstable")
        state += ", current" if outcome.current else ""
    return (
        outcome.board,
        outcome.device or UNKNOWN,
        outcome.runtime or UNKNOWN,
        outcome.precision,
        state,
        points(outcome.AP),
        ms(outcome.median_ms),
        ms(outcome.p99_ms),
        decimals(outcome.energy_mj, 1),
        "; ".join(filter(None, [outcome.reason, *outcome.notes])),
    )


if __name__ == "__main__":
    sys.exit(main())
