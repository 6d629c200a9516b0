"""The columns of the report's tables of models, and of the table of what changed."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Sequence, Tuple

from benchmarks.measuring.coco import METRICS
from benchmarks.measuring.result import STATISTICS
from benchmarks.reporting.verdict import ReportRow, latency_ms
from benchmarks.reporting.wording import (
    UNKNOWN,
    count,
    decimals,
    mib,
    millions,
    ms,
    part,
    points,
    signed_points,
    signed_score,
    times,
)

CHANGED = (
    ("AP", "AP", points),
    ("median_ms", "median, ms", ms),
    ("p99_ms", "p99, ms", ms),
    ("memory_mib", "memory, MiB", lambda value: decimals(value, 0)),
    ("energy_mj", "energy, mJ", lambda value: decimals(value, 1)),
)
"""(estimate, heading, its text) of what is told of two rollouts."""


class Column(NamedTuple):
    """A column of a table of models."""

    heading: str
    text: Callable[[ReportRow], str]
    value: Callable[[ReportRow], Optional[float]]
    """What the table is sorted by."""
    between: Callable[[ReportRow], str] = lambda row: ""
    """The bounds, shown smaller."""


def _metric(heading: str, name: str) -> Column:
    return Column(heading, lambda row: points(row[name]), lambda row: row[name])


def _stage(heading: str, stage: str, statistic: str) -> Column:
    return Column(
        heading, lambda row: ms(latency_ms(row, stage, statistic)), lambda row: latency_ms(row, stage, statistic)
    )


def _bounds(row: ReportRow, name: str, words: Callable[[float], str]) -> str:
    found = row["estimates"][name]
    return "" if found is None or found["low"] == found["high"] else f"{words(found['low'])} to {words(found['high'])}"


def _speedup_bounds(row: ReportRow) -> str:
    bounds = _bounds(row, "speedup", times)
    return f"{bounds}, against {row['speedup_against']}" if bounds else ""


def _pace(row: ReportRow) -> str:
    paced = row["paced"]
    return "" if paced is None else f"{paced['fps']:g} frames/s, {paced['late']} of {paced['runs']} late"


def _estimate(row: ReportRow, name: str) -> Optional[float]:
    found = row["estimates"][name]
    return found["value"] if found else None


_GAIN = Column(
    "vs teacher", lambda row: signed_points(row["AP_gain"]), lambda row: row["AP_gain"],
    lambda row: _bounds(row, "AP_gain", signed_points),
)  # fmt: skip
_AP = Column("AP", lambda row: points(row["AP"]), lambda row: row["AP"], lambda row: _bounds(row, "AP", points))
_MEDIAN = Column(
    "median, ms", lambda row: ms(_estimate(row, "median_ms")), lambda row: _estimate(row, "median_ms"),
    lambda row: _bounds(row, "median_ms", ms),
)  # fmt: skip
_P99 = Column(
    "p99, ms", lambda row: ms(_estimate(row, "p99_ms")), lambda row: _estimate(row, "p99_ms"),
    lambda row: _bounds(row, "p99_ms", ms),
)  # fmt: skip
_PACED = Column(
    "paced p99", lambda row: ms(row["paced"] and row["paced"]["p99_ms"]),
    lambda row: row["paced"] and row["paced"]["p99_ms"], _pace,
)  # fmt: skip
_SPEEDUP = Column("speed-up", lambda row: times(row["speedup"]), lambda row: row["speedup"], _speedup_bounds)
_MEMORY = Column(
    "memory, MiB", lambda row: decimals(_estimate(row, "memory_mib"), 0), lambda row: _estimate(row, "memory_mib")
)
_ENERGY = Column(
    "energy, mJ", lambda row: decimals(_estimate(row, "energy_mj"), 1), lambda row: _estimate(row, "energy_mj")
)
FLEET_COLUMNS = (_AP, _GAIN, _MEDIAN, _P99, _PACED, _SPEEDUP, _MEMORY, _ENERGY)
_SIZE = Column("disk, MiB", lambda row: mib(row["bytes"]), lambda row: row["bytes"])
TABLES: Tuple[Tuple[str, str, str, Tuple[Column, ...]], ...] = (
    ("models", "All models", "rows", (
        _AP,
        _GAIN,
        Column("gain kept", lambda row: part(row["gain_kept"]), lambda row: row["gain_kept"]),
        _MEDIAN,
        _P99,
        _SPEEDUP,
        _SIZE,
    )),
    ("accuracy", "Accuracy in detail", "measured", (
        *(_metric(name.replace("AP_", ""), name) for name in METRICS[:6]),
        Column("best F1", lambda row: decimals(_best(row, "f1")), lambda row: _best(row, "f1")),
        Column("at score", lambda row: decimals(_best(row, "score")), lambda row: _best(row, "score")),
        Column("shift", lambda row: signed_score(row["score_shift"]), lambda row: row["score_shift"]),
        Column("precision", lambda row: decimals(_best(row, "precision")), lambda row: _best(row, "precision")),
        Column("recall", lambda row: decimals(_best(row, "recall")), lambda row: _best(row, "recall")),
        Column("lost", lambda row: count(row["lost"]), lambda row: row["lost"]),
        Column("gained", lambda row: count(row["gained"]), lambda row: row["gained"]),
    )),
    ("latency", "Latency and cost in detail", "timed", (
        *(_stage(name, "total", name) for name in STATISTICS),
        _stage("inference median", "inference", "median"),
        _PACED,
        Column("by image", lambda row: _range_ms(row["by_image_ms"]), lambda row: (row["by_image_ms"] or [None])[-1]),
        _MEMORY,
        _ENERGY,
        Column("params, M", lambda row: millions(row["parameters"]), lambda row: row["parameters"]),
    )),
)  # fmt: skip
"""(id, title, which rows, columns) of each table of models."""


def _range_ms(values_ms: Optional[Sequence[float]]) -> str:
    return UNKNOWN if values_ms is None else f"{ms(values_ms[0])} to {ms(values_ms[-1])}"


def _best(row: ReportRow, name: str) -> Optional[float]:
    return row["best_f1"][name] if row["best_f1"] else None
