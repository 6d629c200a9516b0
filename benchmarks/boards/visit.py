"""
What `benchmarks.fleet` does with one board: the steps, one after the other, and what came of them.

Nothing that a board sends is believed: its documents are checked, and compared with the model that they have to be of.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from benchmarks.boards.list import Board
from benchmarks.boards.ssh import BoardError, CommandError, Remote, connected
from benchmarks.measuring.result import check_written_result
from deploy.board.commands import Bundle
from deploy.board.run import MANIFEST
from deploy.errors import MeasurementError, one_line
from deploy.files import replacing

MOST_JSON = 16 << 20
"""Bytes of a JSON file from a board; an ordinary result has some 20 KiB."""


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
    runtime: Optional[str] = None
    """What ran the model there, with its version."""
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

    def model_file(self, board: Board, precision: str) -> str:
        """What runs on the board, in the bundle's folder: the engine that is built there, or an ONNX file."""
        if board.runtime == "tensorrt":
            return f"{self.bundle.folder.name}.{precision}.engine"
        return str(self.bundle.source(precision, board.runtime)["file"])


async def visit(board: Board, job: Job, outcomes: Sequence[Outcome]) -> None:
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
    for name in ("run.py", MANIFEST):  # all else run.py compares with the manifest
        content = (job.bundle.folder / name).read_bytes()
        if await remote.read(f"{folder}/{name}", len(content) + 1) != content:
            raise BoardError(
                f"{folder}/{name} is not that of the bundle: it was changed on the board. Remove {folder} there, and "
                "run this command again"
            )
    _tell(remote.board, f"upload: {_seconds(start)}" if sent else "upload: done before")
    return "done" if sent else "done before"


class Visit:
    """The steps for one precision on one board; `outcome` tells how far they came."""

    def __init__(self, remote: Remote, job: Job, outcome: Outcome) -> None:
        self._remote, self._job, self._outcome = remote, job, outcome
        self._folder = f"{remote.path(remote.board.folder)}/{job.name}"
        self._model = job.model_file(remote.board, outcome.precision)
        self._result = f"{outcome.precision}.latency.result.json"

    async def run(self) -> None:
        """
        Builds, checks and measures, as far as the board has not done so before.

        Raises:
            CommandError: a step failed.
            BoardError: the board answers no more, or not as run.py does.
        """
        if self._remote.board.runtime == "tensorrt":
            await self._build()
            sha256 = await self._read_engine()
        else:
            await self._step("check", "--engine", self._model)
            sha256 = self._job.bundle.manifest["files"][self._model]["sha256"]
        result = await self._read_result(sha256)
        if result is not None:
            self._done_before("bench")
        else:
            await self._step("bench", "--engine", self._model, "-o", self._result)
            result = await self._read_result(sha256)
        if result is None:
            raise CommandError(f"{self._result} is no result of {self._model}, though bench said that all was well")
        self._keep(result)

    async def _build(self) -> None:
        """Builds and checks an engine; only checks the one that is there, if it is still good."""
        if await self._has_good_engine():
            self._done_before("build")
        else:
            await self._step("build", f"--{self._outcome.precision}", "-o", self._model)
            await self._step("check", "--engine", self._model)

    async def _has_good_engine(self) -> bool:
        if await self._remote.read(f"{self._folder}/{self._model}.json", 1) is None:
            return False
        try:
            await self._step("check", "--engine", self._model)
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
        path = f"{self._folder}/{self._model}.json"
        sidecar = _document(await self._remote.read(path, MOST_JSON + 1) or b"", path)
        try:
            details = sidecar["details"]
            self._outcome.device = one_line(details["device"])
            self._outcome.runtime = f"TensorRT {one_line(details['tensorrt'])}"
            return str(sidecar["artefact"]["sha256"])
        except (KeyError, TypeError) as error:
            raise CommandError(f"{path} is not the sidecar of an engine: it has no {error}") from error

    async def _read_result(self, sha256: str) -> Optional[bytes]:
        """The result file, if it is one, and of the model with that hash; else None."""
        path = f"{self._folder}/{self._result}"
        content = await self._remote.read(path, MOST_JSON + 1)
        if content is None:
            return None
        try:
            document = _document(content, path)
            check_written_result(document, path)
        except MeasurementError as error:
            _tell(self._remote.board, f"not used: {one_line(error)}")
            return None
        return content if document["kind"] == "latency" and document["model"]["sha256"] == sha256 else None

    def _keep(self, content: bytes) -> None:
        path = self._job.output / self._outcome.board / self._result
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        document = json.loads(content)
        numbers, environment = document["numbers"], document["environment"]
        self._outcome.device = self._outcome.device or _line(environment.get("machine") or environment["cpu"])
        self._outcome.runtime = self._outcome.runtime or _line(numbers["description"].split(",")[0])
        self._outcome.median_ms = numbers["summary_ms"]["total"]["median"]
        self._outcome.p99_ms = numbers["summary_ms"]["total"]["p99"]
        self._outcome.stable = numbers["stable"]
        self._outcome.result = f"{self._outcome.board}/{self._result}"
        self._outcome.state = "ok"


def _line(text: Optional[str]) -> Optional[str]:
    return None if text is None else one_line(text)


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


def _tell(board: Board, words: str) -> None:
    print(f"{board.name}: {words}", file=sys.stderr, flush=True)


def _seconds(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"
