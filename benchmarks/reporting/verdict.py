"""Roll out or not: limits on the model that ships, judged on what was measured and how sure that is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from benchmarks.measuring.result import UNSTABLE, Reason
from benchmarks.reporting.wording import amount, amount_between, ms, points, signed_points
from benchmarks.toml_file import read_toml
from deploy.errors import ConfigError, MeasurementError
from deploy.files import AnyPath
from deploy.schema import check_content

ReportRow = Dict[str, Any]
"""One model of the report: see `document.rows_from_groups`."""
ROUNDING = 1e-9
"""48.0 - 47.0 points is 1 + 1e-15 in binary."""
LEAST_TEACHER_AP = 0.01
"""Nothing can be judged by a teacher below it: a model that finds nothing would lose nothing against it."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with the bounds between which it lies with 95 % confidence; both are the number where none are known."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        bounds = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.value, *bounds)


def latency_ms(row: ReportRow, stage: str, statistic: str) -> Optional[float]:
    """A statistic of a stage's latency in ms; None if it was not measured or the runtime has no such stage."""
    summary = row["latency_ms"][stage] if row["latency_ms"] else None
    return summary[statistic] if summary else None


Reasons = Sequence[Reason]
"""What speaks against comparing the latency of the model that ships."""


def _is_comparable(ship: ReportRow, reasons: Reasons) -> Optional[str]:
    """Runs that scatter are no doubt: the bounds of a number say that already."""
    biased = [reason.text for reason in reasons if reason.code != UNSTABLE]
    return f"its latency is not comparable: {biased[0]}" if biased else None


def _has_a_teacher_that_finds_something(ship: ReportRow, reasons: Reasons) -> Optional[str]:
    teacher_ap = ship["AP"] - ship["AP_gain"]
    if teacher_ap < LEAST_TEACHER_AP:
        return f"the teacher's own AP is {points(teacher_ap)}: give one that has learnt"
    return None


def _positive(value: float) -> Optional[str]:
    return None if value > 0 else "a positive number"


def _points_of_ap(value: float) -> Optional[str]:
    if value > 100:
        return "points, 1 to 100"
    fraction = None if value >= 1 else f"points, 1 to 100: {100 * value:g} for that fraction"
    return _positive(value) or fraction


@dataclasses.dataclass(frozen=True)
class LimitKind:
    """A limit that a flag can set on the model that ships, with all that is special to it."""

    key: str
    """Its name in a file of limits; the flag is the same with hyphens."""
    title: str
    unit: str
    at_most: bool
    estimate: str
    """Which of the row's estimates is compared."""
    needs: str
    """What has to be measured for it."""
    factor: float = 1.0
    """From the estimate to the limit's unit."""
    expected: Callable[[float], Optional[str]] = _positive
    """What was expected in place of a number that this limit cannot have; None for one that it can."""
    doubt: Callable[[ReportRow, Reasons], Optional[str]] = lambda ship, reasons: None
    """Why it cannot be told whether the limit holds, whatever the number; None if it can."""
    most_ms: Optional[Callable[[float, ReportRow], Optional[float]]] = None
    """The slowest median that it allows, from the limit and the row that ships, for the chart of speed and AP."""
    least_ap_points: Optional[Callable[[float, ReportRow], float]] = None
    """The lowest AP that it allows, from the limit and the teacher's row."""

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def bound(self) -> str:
        return "at most" if self.at_most else "at least"


_NEEDS_TEACHER = "the {}{{}} and of a teacher to compare it with"
LIMITS = (
    LimitKind(
        "max_ap_drop", "AP drop against the teacher", "points", True, "AP_gain", _NEEDS_TEACHER.format("accuracy"),
        factor=-100,
        expected=lambda value: None,  # a negative drop demands a gain
        doubt=_has_a_teacher_that_finds_something,
        least_ap_points=lambda limit, teacher: 100 * teacher["AP"] - limit,
    ),
    LimitKind(
        "min_ap", "AP", "points", False, "AP", "the accuracy{}",
        factor=100,
        expected=_points_of_ap,
        least_ap_points=lambda limit, teacher: limit,
    ),
    LimitKind(
        "max_latency_ms", "Median latency", "ms", True, "median_ms", "the latency{}",
        doubt=_is_comparable,
        most_ms=lambda limit, ship: limit,
    ),
    LimitKind("max_p99_ms", "p99 latency", "ms", True, "p99_ms", "the latency{}", doubt=_is_comparable),
    LimitKind(
        "min_speedup", "Speed-up against the teacher", "times", False, "speedup", _NEEDS_TEACHER.format("latency"),
        doubt=_is_comparable,
        most_ms=lambda limit, ship: ship["speedup"] and ship["speedup"] * latency_ms(ship, "total", "median") / limit,
    ),
    LimitKind("max_memory_mib", "Peak memory", "MiB", True, "memory_mib", "the latency{}, with its peak memory"),
    LimitKind(
        "max_energy_mj", "Energy per inference", "mJ", True, "energy_mj",
        "the latency{}, on a device that tells its power",
    ),
)  # fmt: skip
_DEMAND = {"at most": "allowed", "at least": "required"}


def limits_from_file(path: AnyPath) -> Dict[str, float]:
    """
    Key of LIMITS -> number, from a TOML file of lines such as `max_ap_drop = 1.5`.

    Raises:
        ConfigError: it cannot be read, or has a key or value that is no limit.
        MissingDependencyError: Python before 3.11 needs tomli.
    """
    document = read_toml(path, "a file of limits, lines such as: max_ap_drop = 1.5")
    keys = [kind.key for kind in LIMITS]
    for key in document:
        if key not in keys:
            raise ConfigError(f"{path}: {key} is no limit; expected some of {', '.join(keys)}")
    check_content(document, {str: float}, path, ConfigError)
    return {key: float(value) for key, value in document.items()}


def check_limits(allowed: Mapping[str, float]) -> None:
    """Raises ConfigError for a number that no limit can have."""
    for kind in LIMITS:
        if kind.key not in allowed:
            continue
        value = allowed[kind.key]
        expected = kind.expected(value) if math.isfinite(value) else "a number"
        if expected is not None:
            raise ConfigError(f"{kind.flag} is {value}; expected {expected}")


def say_what_is_missing(ship: ReportRow) -> None:
    """Adds to the row's doubts each estimate that was not measured: a limit on it cannot be told, and is no error."""
    for kind in LIMITS:
        if ship["estimates"][kind.estimate] is None:
            needs = kind.needs.format(f" of {ship['role']}")
            ship["doubts"].setdefault(kind.estimate, f"it needs {needs}, which was not measured")


def judge(ship: ReportRow, allowed: Mapping[str, float], reasons: Reasons = ()) -> List[Dict[str, Any]]:
    """
    Each limit with what was measured (None: it may not be told), its bounds, and the outcome: 'pass', 'fail' or, where
    the limit lies between the bounds or there is another reason `why`, 'cannot tell'.

    Args:
        allowed: key of LIMITS -> number.
        reasons: what speaks against comparing its latency.

    Raises:
        MeasurementError: a number that a limit needs was not measured.
    """
    judged = []
    for kind in LIMITS:
        if kind.key not in allowed:
            continue
        known, why = ship["estimates"][kind.estimate], ship["doubts"].get(kind.estimate)
        if known is None and why is None:
            needs = kind.needs.format(f" of {ship['role']!r}, which is to ship")
            raise MeasurementError(f"{kind.flag} cannot be judged: it needs {needs}. Give these result files too.")
        measured = Estimate(**known).times(kind.factor) if known is not None else None
        why = why or kind.doubt(ship, reasons)
        told = "cannot tell" if measured is None or why else outcome(measured, allowed[kind.key], kind.at_most)
        judged.append(
            {
                "flag": kind.flag,
                "title": kind.title,
                "unit": kind.unit,
                "bound": kind.bound,
                "allowed": allowed[kind.key],
                "measured": measured and measured.value,
                "low": measured and measured.low,
                "high": measured and measured.high,
                "outcome": told,
                "why": why,
            }
        )
    return judged


def outcome(measured: Estimate, limit: float, at_most: bool) -> str:
    """'pass' or 'fail' where both bounds are on one side of the limit, else 'cannot tell'."""
    best, worst = (measured.low, measured.high) if at_most else (-measured.high, -measured.low)
    most = (limit if at_most else -limit) + ROUNDING
    return "pass" if worst <= most else "fail" if best > most else "cannot tell"


def words_of_limit(limit: Mapping[str, Any]) -> str:
    """One limit as a clause: what was measured, between which bounds, and what is allowed."""
    if limit["measured"] is None:
        return f"{limit['title']} is unknown: {limit['why']}"
    return (
        f"{limit['title']} is {amount(limit['measured'], limit['unit'])}{amount_between(limit)}, {limit['bound']} "
        f"{amount(limit['allowed'], limit['unit'])} is {_DEMAND[limit['bound']]}"
        + (f", but {limit['why']}" if limit["why"] else "")
    )


def verdict_from_limits(ship: ReportRow, limits: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """`ship`, `outcome`, `roll_out` (None without limits), `label` and the verdict in one `sentence`."""
    facts = []
    if ship["AP"] is not None:
        against = f" ({signed_points(ship['AP_gain'])} against the teacher)" if ship["AP_gain"] is not None else ""
        facts.append(f"AP {points(ship['AP'])}{against}")
    if ship["latency_ms"]:
        times = f", {ship['speedup']:.1f} times the teacher's speed" if ship["speedup"] is not None else ""
        facts.append(f"median {ms(latency_ms(ship, 'total', 'median'))} ms{times}")
    known = "; ".join(facts)
    failed, unsure = ([one for one in limits if one["outcome"] == what] for what in ("fail", "cannot tell"))
    if not limits:
        found, label = "no limits", "No limits given"
        sentence = f"No limits were given, so there is no verdict on {ship['title']}: {known}."
    elif failed:
        found, label = "fail", "Do not roll out"
        sentence = f"Do not roll out {ship['title']}: {'; '.join(map(words_of_limit, failed))}."
    elif unsure:
        found, label = "cannot tell", "Cannot tell"
        sentence = f"It cannot be told whether to roll out {ship['title']}: {'; '.join(map(words_of_limit, unsure))}."
        if not all(limit["why"] for limit in unsure):
            sentence += " More test images, or more runs, narrow the bounds."
    else:
        found, label = "pass", "Roll out"
        hold = "the limit holds" if len(limits) == 1 else f"all {len(limits)} limits hold"
        sentence = f"Roll out {ship['title']}: {known}; {hold}."
    roll_out = None if found == "no limits" else found == "pass"
    return {"ship": ship["role"], "outcome": found, "roll_out": roll_out, "label": label, "sentence": sentence}
