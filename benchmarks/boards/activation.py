"""Which model is in use on a board: that of a bundle whose verdict is to roll out, or the one before it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, Mapping, Sequence

from benchmarks.boards.list import Board
from benchmarks.boards.ssh import BoardError, connected
from benchmarks.boards.visit import Job, Outcome
from benchmarks.measuring.result import read_result
from benchmarks.reporting.document import ReadResult
from benchmarks.reporting.fleet import fleet_report
from deploy.board.release import CURRENT
from deploy.errors import MeasurementError

JUDGED = ("accuracy", "latency")
"""Kinds of a board's results that its verdict is of; those at a camera's pace are not."""


def judge_board(job: Job, outcome: Outcome, allowed: Mapping[str, float], references: Sequence[Path]) -> bool:
    """
    Whether the results of one precision on one board are within the limits; notes the verdict, and why not.

    Args:
        allowed: as `benchmarks.reporting.verdict.judge`.
        references: result files of the teacher, or of others, that every board is compared with.
    """
    folder = job.output / outcome.board
    results = [
        path for path in (folder / f"{outcome.precision}.{kind}.result.json" for kind in JUDGED) if path.is_file()
    ]
    read: List[ReadResult] = [(path, read_result(path)) for path in (*results, *references)]
    role = str(read[0][1]["role"])
    try:
        report = fleet_report([path for path, _ in read], {outcome.board: read}, {}, role, allowed)
    except MeasurementError as error:
        outcome.roll_out, outcome.reason = False, f"not activated, since there is no verdict: {error}"
        return False
    verdict = report["boards"][0]["verdict"]
    outcome.verdict, outcome.roll_out = str(verdict["label"]), bool(verdict["roll_out"])
    if not outcome.roll_out:
        outcome.reason = f"not activated: {verdict['sentence']}"
    return outcome.roll_out


async def activate(board: Board, job: Job, outcome: Outcome) -> None:
    """Makes the model that was judged the current one of the board; notes why not. Does not raise for a board."""
    result = json.loads(
        (job.output / board.name / f"{outcome.precision}.latency.result.json").read_text(encoding="utf-8")
    )
    words = ["activate", "--engine", job.model_file(board, outcome.precision), "--sha256", result["model"]["sha256"]]
    outcome.steps["activate"] = "failed"
    try:
        await _run(board, job.name, words)
    except BoardError as error:
        outcome.state, outcome.reason = "failed", f"activate: {error}"
        return
    outcome.steps["activate"], outcome.current = "done", True


async def roll_back(board: Board) -> str:
    """Makes the former model of the board current again; '' if all is well, else why not."""
    try:
        await _run(board, CURRENT, ["rollback"])
    except BoardError as error:
        return str(error)
    return ""


async def _run(board: Board, folder: str, words: List[str]) -> None:
    async with connected(board) as remote, remote.held(board.timeout_s):
        await remote.run(f"{remote.path(board.folder)}/{folder}", words, bytearray())
