"""
Command: build, check and measure a bundle on many boards over SSH, and bring the results back.

    python -m benchmarks.fleet boards.toml student.tar.gz -o student.fleet

Each board gets the files of the bundle and runs its `run.py build`, `check` and `bench`; nothing else is executed
there but a lock on its folder, by Python, which keeps a second fleet from it. One that fails or hangs does not hold up
the others. What a board has already for this very bundle (its hash) is not done again: an engine that still passes
`check` there, and its measurement. In the output folder, that this run writes anew:
BOARD/PRECISION.latency.result.json for `benchmarks.report`, BOARD/STEP.PRECISION.log, and fleet.json.

Exit status: 0 if all went well on every board, 1 if not, 2 for bad input. Needs asyncssh; the boards need what run.py
does, an SSH server with SFTP, and `timeout` of coreutils or busybox.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from benchmarks.boards.list import Board, boards_from_file
from benchmarks.boards.ssh import BoardError, CommandError, Remote, check_asyncssh, connected, printable
from benchmarks.measuring.result import check_written_result
from benchmarks.reporting.wording import UNKNOWN, ms
from deploy.board.archive import SUFFIX, unpack
from deploy.board.commands import Bundle
from deploy.contract import provenance
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import check_writable, replacing, sha256_of, write_json
from deploy.folder_lock import locked

FLEET_VERSION = 1
MOST_JSON = 16 << 20
"""Bytes of a JSON file from a board; an ordinary result has some 20 KiB."""
COLUMNS = ("board", "device", "TensorRT", "precision", "state", "median ms", "p99 ms", "why")


@dataclasses.dataclass
class Outcome:
    """What came of one precision on one board; None where it did not get so far."""

    board: str
    host: str
    precision: str
    state: str = "failed"
    """"ok" or "failed"."""
    steps: Dict[str, str] = dataclasses.field(default_factory=dict)
    """Step -> "done", "done before" or "failed"."""
    reason: Optional[str] = None
    """Why it failed."""
    device: Optional[str] = None
    tensorrt: Optional[str] = None
    median_ms: Optional[float] = None
    p99_ms: Optional[float] = None
    stable: Optional[bool] = None
    result: Optional[str] = None
    """The result file, in the output folder."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is done with every board, and where its results go."""

    bundle: Bundle
    """Unpacked here, and compared with its manifest."""
    name: str
    """Of its folder on the boards: that of the bundle, and its hash."""
    output: Path


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
        check_asyncssh()
        sha256 = sha256_of(arguments.bundle)
        job = Job(bundle, f"{bundle.folder.name}-{sha256[:16]}", output)
        outcomes, faults = asyncio.run(_visit_all(boards, job, arguments.jobs))
        document = {
            "fleet_version": FLEET_VERSION,
            **provenance({"boards": arguments.boards, "bundle": arguments.bundle}),
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
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="boards at a time (default: 4)")
    return parser


def _with_precisions(board: Board, bundle: Bundle) -> Board:
    """`board` with what is to be built there. Raises ConfigError for what the bundle does not have."""
    for precision in board.precisions:
        bundle.source(precision)
    return dataclasses.replace(board, precisions=board.precisions or (bundle.precisions[0],))


# What is done


async def _visit_all(boards: Sequence[Board], job: Job, jobs: int) -> Tuple[List[Outcome], List[Exception]]:
    """What came of each precision on each board, and the exceptions that nobody expected."""
    free = asyncio.Semaphore(jobs)

    async def visit(board: Board) -> List[Outcome]:
        async with free:
            outcomes = [Outcome(board.name, board.host, precision) for precision in board.precisions]
            try:
                await _visit(board, job, outcomes)
            except Exception as error:
                faults.append(error)
                for outcome in outcomes:
                    if outcome.state != "ok":
                        outcome.reason = f"a fault of this program: {type(error).__name__}: {printable(str(error))}"
            return outcomes

    faults: List[Exception] = []
    of_boards = await asyncio.gather(*map(visit, boards))
    return [outcome for outcomes in of_boards for outcome in outcomes], faults


async def _visit(board: Board, job: Job, outcomes: Sequence[Outcome]) -> None:
    """Notes in `outcomes`, one for each precision, what came of it. Does not raise for what a board does."""
    for pattern in ("*.result.json", "*.log"):  # of an earlier run
        for path in (job.output / board.name).glob(pattern):
            path.unlink()
    try:
        async with connected(board) as remote, remote.held((1 + 4 * len(outcomes)) * board.timeout_s):
            sent = await _upload(remote, job)
            for outcome in outcomes:
                outcome.steps["upload"] = sent
                try:
                    await Visit(remote, job, outcome).run()
                except CommandError as error:
                    outcome.reason = str(error)
    except BoardError as error:
        _tell(board, f"failed: {error}")
        for outcome in outcomes:
            if outcome.state != "ok" and outcome.reason is None:
                outcome.reason = str(error)


async def _upload(remote: Remote, job: Job) -> str:
    start = time.monotonic()
    _tell(remote.board, "upload ...")
    folder = f"{remote.path(remote.board.folder)}/{job.name}"
    sent = await remote.upload(job.bundle.folder, folder)
    _tell(remote.board, f"upload: {_seconds(start)}" if sent else "upload: done before")
    return "done" if sent else "done before"


class Visit:
    """The steps for one precision on one board; `outcome` tells how far they came."""

    def __init__(self, remote: Remote, job: Job, outcome: Outcome) -> None:
        self._remote, self._job, self._outcome = remote, job, outcome
        self._folder = f"{remote.path(remote.board.folder)}/{job.name}"
        self._engine = f"{job.bundle.folder.name}.{outcome.precision}.engine"
        self._result = f"{outcome.precision}.latency.result.json"

    async def run(self) -> None:
        """
        Builds, checks and measures, as far as the board has not done so before.

        Raises:
            CommandError: a step failed.
            BoardError: the board answers no more, or not as run.py does.
        """
        if await self._has_good_engine():
            self._done_before("build")
        else:
            await self._step("build", f"--{self._outcome.precision}", "-o", self._engine)
            await self._step("check", "--engine", self._engine)
        sha256 = await self._read_engine()
        result = await self._read_result(sha256)
        if result is not None:
            self._done_before("bench")
        else:
            await self._step("bench", "--engine", self._engine, "-o", self._result)
            result = await self._read_result(sha256)
        if result is None:
            raise CommandError(f"{self._result} is no result of {self._engine}, though bench said that all was well")
        self._keep(result)

    async def _has_good_engine(self) -> bool:
        if await self._remote.read(f"{self._folder}/{self._engine}.json", 1) is None:
            return False
        try:
            await self._step("check", "--engine", self._engine)
        except CommandError:  # of another TensorRT, say, than there is now
            return False
        return True

    def _done_before(self, step: str) -> None:
        self._outcome.steps[step] = "done before"
        _tell(self._remote.board, f"{step} {self._outcome.precision}: done before")

    async def _step(self, step: str, *words: str) -> None:
        """Runs a command of run.py and keeps its output as BOARD/STEP.PRECISION.log."""
        board, label = self._remote.board, f"{step} {self._outcome.precision}"
        _tell(board, f"{label} ...")
        start, log = time.monotonic(), bytearray()
        self._outcome.steps[step] = "failed"
        try:
            await self._remote.run(self._folder, [step, *words], log)
        except CommandError as error:
            _tell(board, f"{label}: failed after {_seconds(start)}: {error}")
            raise CommandError(f"{step}: {error}") from error
        except BoardError as error:
            raise BoardError(f"{label}: {error}") from error
        finally:
            with replacing(self._job.output / board.name / f"{step}.{self._outcome.precision}.log") as temporary:
                temporary.write_bytes(log)
        self._outcome.steps[step] = "done"
        _tell(board, f"{label}: {_seconds(start)}")

    async def _read_engine(self) -> str:
        """The engine's SHA-256, by its sidecar, which `check` has just compared; device and TensorRT are kept."""
        path = f"{self._folder}/{self._engine}.json"
        sidecar = _document(await self._remote.read(path, MOST_JSON + 1) or b"", path)
        try:
            details = sidecar["details"]
            self._outcome.device = printable(str(details["device"]))
            self._outcome.tensorrt = printable(str(details["tensorrt"]))
            return str(sidecar["artefact"]["sha256"])
        except (KeyError, TypeError) as error:
            raise CommandError(f"{path} is not the sidecar of an engine: it has no {error}") from error

    async def _read_result(self, sha256: str) -> Optional[bytes]:
        """The result file, if it is one, and of the engine with that hash; else None."""
        path = f"{self._folder}/{self._result}"
        content = await self._remote.read(path, MOST_JSON + 1)
        if content is None:
            return None
        try:
            document = _document(content, path)
            check_written_result(document, path)
        except MeasurementError as error:
            _tell(self._remote.board, f"not used: {printable(str(error))}")
            return None
        return content if document["kind"] == "latency" and document["model"]["sha256"] == sha256 else None

    def _keep(self, content: bytes) -> None:
        path = self._job.output / self._outcome.board / self._result
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        numbers = json.loads(content)["numbers"]
        self._outcome.median_ms = numbers["summary_ms"]["total"]["median"]
        self._outcome.p99_ms = numbers["summary_ms"]["total"]["p99"]
        self._outcome.stable = numbers["stable"]
        self._outcome.result = f"{self._outcome.board}/{self._result}"
        self._outcome.state = "ok"


def _document(content: bytes, path: str) -> Dict[str, Any]:
    """The JSON object that a board sent. Raises CommandError if it is none, or too large."""
    if len(content) > MOST_JSON:
        raise CommandError(f"{path} has over {MOST_JSON >> 20} MiB; expected a small file")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CommandError(f"{path} is not a JSON object")
    return document


# What is said


def _tell(board: Board, words: str) -> None:
    print(f"{board.name}: {words}", file=sys.stderr, flush=True)


def _seconds(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each precision of each board, under a line of headings."""
    lines = [COLUMNS, *map(_cells, outcomes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cells(outcome: Outcome) -> Sequence[str]:
    state = outcome.state
    if state == "ok":
        before = {outcome.steps[step] for step in ("upload", "build", "bench")} == {"done before"}
        state = ("done before" if before else "ok") + ("" if outcome.stable else ", unstable")
    return (
        outcome.board,
        outcome.device or UNKNOWN,
        outcome.tensorrt or UNKNOWN,
        outcome.precision,
        state,
        ms(outcome.median_ms),
        ms(outcome.p99_ms),
        outcome.reason or "",
    )


if __name__ == "__main__":
    sys.exit(main())
