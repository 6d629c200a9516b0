"""The latency of several model files in one run: they take turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping

import numpy as np

from benchmarks.measuring.environment import busy_cores
from benchmarks.measuring.timing import REST_S
from deploy.contract import ModelContract
from deploy.images import read_image
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Session

WARMUP, ROUNDS = 3, 7
"""Turns that do not count, and rounds that do."""
FEWEST_TURNS, MOST_TURNS = 2, 10
"""Inferences of each model in a round."""
ROUND_MS = 1000.0
"""About as long is a round, within these."""


def latencies(sessions: Mapping[str, Session], image: Path) -> Dict[str, Any]:
    """
    `ms`, the median of an inference of each session; `rounds_ms`, the medians of its rounds; `description` of each, in
    words; and `others_cores`, the processors that other programs kept busy before it began.

    Milliseconds of processor time on one thread: on an idle machine the latency, and on a busy one without the time
    that others had.

    Args:
        sessions: by name, of one thread each; they are closed at the end.
        image: is fed to all of them, as many times as the batch is large.
    """
    with contextlib.ExitStack() as opened:
        for session in sessions.values():
            opened.enter_context(session)
        feeds = {name: feed_of(session.contract, image) for name, session in sessions.items()}
        others = busy_cores(REST_S)
        warm = take_turns(sessions, feeds, WARMUP)
        turn_ms = sum(statistics.median(times_ms) for times_ms in warm.values())
        turns = max(FEWEST_TURNS, min(MOST_TURNS, round(ROUND_MS / turn_ms)))
        rounds = [take_turns(sessions, feeds, turns) for _ in range(ROUNDS)]
        descriptions = {name: session.description for name, session in sessions.items()}
    return {
        "ms": {name: statistics.median(value for one in rounds for value in one[name]) for name in sessions},
        "rounds_ms": {name: [statistics.median(one[name]) for one in rounds] for name in sessions},
        "description": descriptions,
        "others_cores": others,
    }


def ratio(measured: Mapping[str, Any], over: str, under: str) -> Dict[str, float]:
    """How many times as long one took as another: `median`, `lowest` and `highest` of the rounds."""
    ratios = [one / other for one, other in zip(measured["rounds_ms"][over], measured["rounds_ms"][under])]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def take_turns(
    sessions: Mapping[str, Session], feeds: Mapping[str, Mapping[str, np.ndarray]], turns: int
) -> Dict[str, List[float]]:
    """Milliseconds of processor time of each inference of each session, every other turn in reverse order."""
    taken: Dict[str, List[float]] = {name: [] for name in sessions}
    for turn in range(turns):
        for name in list(sessions)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time()
            sessions[name].infer(feeds[name])
            taken[name].append(1e3 * (time.process_time() - start))
    return taken


def feed_of(contract: ModelContract, image: Path) -> Dict[str, np.ndarray]:
    """What a model is fed for an image, as many times as its batch is large."""
    prepared = preprocess(read_image(image), contract)
    return {contract.input_name: np.repeat(prepared.input, max(1, contract.input_shape[0]), axis=0)}
