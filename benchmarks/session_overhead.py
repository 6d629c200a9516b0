"""
Command: what `deploy.runtime.session.OrtSession` costs on top of ONNX Runtime's own call, for one model.

    python -m benchmarks.session_overhead student.onnx --threads 1 -o student.overhead.json

The bare call is `InferenceSession.run(names, feed)`, ours `infer(feed)` of an OrtSession on that same InferenceSession,
so that both have the same threads and memory. They take turns, in an order that changes from pair to pair, so that what
slows the machine for a while slows both. One round gives one ratio, that of the two medians; its spread is that over
the rounds. Needs onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.environment import read_environment
from deploy.contract import RESULT_VERSION, provenance
from deploy.errors import ConfigError, command
from deploy.files import check_writable, write_json
from deploy.progress import progress
from deploy.runtime.golden import noise_input
from deploy.runtime.session import OrtSession

WARMUP = 5
Pair = Tuple[float, float]
"""Milliseconds of the bare call and of ours."""


def time_pairs(bare: Callable[[], Any], ours: Callable[[], Any], pairs: int) -> List[Pair]:
    """The times of `pairs` turns, every other one in reverse order."""
    times = []
    for index in range(pairs):
        first, second = (bare, ours) if index % 2 == 0 else (ours, bare)
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        end = time.perf_counter()
        elapsed = 1e3 * (middle - start), 1e3 * (end - middle)
        times.append(elapsed if index % 2 == 0 else (elapsed[1], elapsed[0]))
    return times


def numbers_from_rounds(rounds: Sequence[Sequence[Pair]]) -> Dict[str, Any]:
    """`bare_ms` and `ours_ms`, medians of all pairs, and `ratio`: ours over bare, median, lowest and highest round."""
    ratios = [statistics.median(ours for _, ours in pairs) / statistics.median(bare for bare, _ in pairs)
              for pairs in rounds]  # fmt: skip
    every = [pair for pairs in rounds for pair in pairs]
    return {
        "bare_ms": statistics.median(bare for bare, _ in every),
        "ours_ms": statistics.median(ours for _, ours in every),
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "rounds_ms": [[[round(value, 4) for value in pair] for pair in pairs] for pairs in rounds],
    }


def measure(session: OrtSession, pairs: int, rounds: int) -> Dict[str, Any]:
    """As `numbers_from_rounds`, on a noise image, after a warm-up of both."""
    feed = {session.contract.input_name: noise_input(session.contract, seed=0)}
    names, runtime = list(session.contract.output_names), session.runtime

    def bare() -> None:
        runtime.run(names, feed)

    def ours() -> None:
        session.infer(feed)

    time_pairs(bare, ours, WARMUP)
    return numbers_from_rounds([time_pairs(bare, ours, pairs) for _ in progress(range(rounds), rounds, "rounds")])


def line_from_numbers(numbers: Mapping[str, Any]) -> str:
    ratio = {name: 100 * (value - 1) for name, value in numbers["ratio"].items()}
    return (
        f"bare {numbers['bare_ms']:.3f} ms, ours {numbers['ours_ms']:.3f} ms: {ratio['median']:+.2f} % "
        f"({ratio['lowest']:+.2f} to {ratio['highest']:+.2f} over the rounds)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.session_overhead",
        description="Measure what our session costs on top of ONNX Runtime's own call.",
    )
    parser.add_argument("model", metavar="MODEL.onnx", help="a detector of deploy.export, with its sidecar")
    parser.add_argument("--pairs", type=int, default=100, metavar="N", help="calls of each in a round (default: 100)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds (default: 9)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: ONNX Runtime's choice)")
    parser.add_argument("-o", "--output", metavar="FILE", help="JSON to write (default: the result is only printed)")
    return parser


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, prints the result and writes it."""
    arguments = _parser().parse_args(argv)
    for flag in ("pairs", "rounds", "threads"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} is {value}; expected at least 1")
    if arguments.output is not None:
        check_writable(arguments.output)
    environment = read_environment()  # before anything is measured: the load is that which others cause
    with OrtSession(arguments.model, threads=arguments.threads) as session:
        numbers = measure(session, arguments.pairs, arguments.rounds)
        description = session.description
    print(f"{description}, {arguments.rounds} rounds of {arguments.pairs} pairs\n{line_from_numbers(numbers)}")
    if arguments.output is not None:
        write_json(
            arguments.output,
            {
                "result_version": RESULT_VERSION,
                **provenance({"model": arguments.model}),
                "kind": "session_overhead",
                "environment": environment,
                "settings": {key: getattr(arguments, key) for key in ("pairs", "rounds", "threads")},
                "description": description,
                "numbers": numbers,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
