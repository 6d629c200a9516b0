"""
Command: build, check and measure a bundle on many boards over SSH, and bring the results back.

    python -m benchmarks.fleet boards.toml student.tar.gz -o student.fleet

Each board gets the files of the bundle and runs its `run.py build`, `check` and `bench`; nothing else is executed
there but a lock on its folder, by Python, which keeps a second fleet from it. For a board of ONNX Runtime
(`runtime = "onnxruntime"`) nothing is built. One that fails or hangs does not hold up the others. What a board has
already for this very bundle (its hash) is not done again: an engine that still passes `check` there, and its
measurement. In the output folder, that this run writes anew:
BOARD/PRECISION.latency.result.json for `benchmarks.report`, BOARD/STEP.PRECISION.log, and fleet.json.

Exit status: 0 if all went well on every board, 1 if not, 2 for bad input. Needs asyncssh; the boards need what run.py
does, an SSH server with SFTP, and `timeout` of coreutils or busybox.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from benchmarks.boards.list import Board, boards_from_file
from benchmarks.boards.ssh import check_asyncssh
from benchmarks.boards.visit import Job, Outcome, visit
from benchmarks.reporting.wording import UNKNOWN, ms
from deploy.board.archive import SUFFIX, unpack
from deploy.board.commands import Bundle
from deploy.board.signature import signer
from deploy.contract import provenance
from deploy.errors import ConfigError, MeasurementError, command, one_line
from deploy.files import check_writable, sha256_of, write_json
from deploy.folder_lock import locked

FLEET_VERSION = 2
COLUMNS = ("board", "device", "runtime", "precision", "state", "median ms", "p99 ms", "why")


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs is {arguments.jobs}; expected at least 1")
    output: Path = arguments.output or Path(arguments.bundle.name.replace(SUFFIX, "") + ".fleet")
    with locked(output, MeasurementError), tempfile.TemporaryDirectory(prefix="fleet.") as temporary:
        check_writable(output / "fleet.json")
        boards = boards_from_file(arguments.boards)
        bundle = Bundle(unpack(arguments.bundle, temporary))
        boards = [_with_precisions(board, bundle) for board in boards]
        signature = signer(bundle.folder, arguments.allowed_signers)
        check_asyncssh()
        print(f"{arguments.bundle}: {signature}", file=sys.stderr)
        sha256 = sha256_of(arguments.bundle)
        job = Job(bundle, f"{bundle.folder.name}-{sha256[:16]}", output)
        outcomes, faults = asyncio.run(_visit_all(boards, job, arguments.jobs))
        document = {
            "fleet_version": FLEET_VERSION,
            **provenance({"boards": arguments.boards, "bundle": arguments.bundle}),
            "signature": signature,
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }
        write_json(output / "fleet.json", document)
    print(table(outcomes))
    print(f"details: {output / 'fleet.json'}")
    for fault in faults:  # bugs of ours, which the other boards are not to suffer from
        raise fault
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet", description="Build, check and measure a bundle on many boards over SSH."
    )
    parser.add_argument("boards", type=Path, metavar="BOARDS", help="TOML file, as docs/boards.example.toml")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help=f"archive of deploy.bundle, NAME{SUFFIX}")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for results and logs (default: NAME.fleet)"
    )
    parser.add_argument(
        "--allowed-signers",
        type=Path,
        metavar="FILE",
        help="refuse a bundle that none of these signed: a line each, a name and a public SSH key (default: any)",
    )
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="boards at a time (default: 4)")
    return parser


def _with_precisions(board: Board, bundle: Bundle) -> Board:
    """`board` with what is to be built there. Raises ConfigError for what the bundle does not have."""
    try:
        for precision in board.precisions:
            bundle.source(precision, board.runtime)
        return dataclasses.replace(board, precisions=board.precisions or (bundle.best_precision(board.runtime),))
    except ConfigError as error:
        raise ConfigError(f"[[board]] {board.name!r}: {error}") from error


# What is done


async def _visit_all(boards: Sequence[Board], job: Job, jobs: int) -> Tuple[List[Outcome], List[Exception]]:
    """What came of each precision on each board, and the exceptions that nobody expected."""
    free = asyncio.Semaphore(jobs)

    async def visit_in_turn(board: Board) -> List[Outcome]:
        async with free:
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
    of_boards = await asyncio.gather(*map(visit_in_turn, boards))
    return [outcome for outcomes in of_boards for outcome in outcomes], faults


# What is said


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each precision of each board, under a line of headings."""
    lines = [COLUMNS, *map(_cells, outcomes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cells(outcome: Outcome) -> Sequence[str]:
    state = outcome.state
    if state == "ok":
        before = {state for step, state in outcome.steps.items() if step != "check"} == {"done before"}
        state = ("done before" if before else "ok") + ("" if outcome.stable else ", unstable")
    return (
        outcome.board,
        outcome.device or UNKNOWN,
        outcome.runtime or UNKNOWN,
        outcome.precision,
        state,
        ms(outcome.median_ms),
        ms(outcome.p99_ms),
        outcome.reason or "",
    )


if __name__ == "__main__":
    sys.exit(main())
