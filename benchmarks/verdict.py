"""Roll out or not: limits on the model that ships, judged on the rows of the report's table."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from benchmarks.wording import amount, ms, points, signed_points
from deploy.errors import MeasurementError

Row = Dict[str, Any]
"""One model of the report: see `benchmarks.report.rows_from_groups`."""


def latency_ms(row: Row, stage: str, statistic: str) -> Optional[float]:
    """A statistic of a stage's latency in ms; None if it was not measured."""
    return row["latency_ms"][stage][statistic] if row["latency_ms"] else None


def _points(fraction: Optional[float], sign: int) -> Optional[float]:
    return None if fraction is None else sign * 100 * fraction


@dataclasses.dataclass(frozen=True)
class LimitKind:
    """A limit that a flag can set on the model that ships."""

    key: str
    title: str
    unit: str
    at_most: bool
    measure: Callable[[Row], Optional[float]]
    """The row of the model that ships -> the number compared; None where results are missing."""
    compares: bool = False
    """Whether it compares with the teacher."""

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def bound(self) -> str:
        return "at most" if self.at_most else "at least"


LIMITS = (
    LimitKind(
        "max_ap_drop", "AP drop against the teacher", "points", True, lambda row: _points(row["AP_gain"], -1), True
    ),
    LimitKind("min_ap", "AP", "points", False, lambda row: _points(row["AP"], 1)),
    LimitKind("max_latency_ms", "Median latency", "ms", True, lambda row: latency_ms(row, "total", "median")),
    LimitKind("max_p99_ms", "p99 latency", "ms", True, lambda row: latency_ms(row, "total", "p99")),
    LimitKind("min_speedup", "Speed-up against the teacher", "times", False, lambda row: row["speedup"], True),
)


_DEMAND = {"at most": "allowed", "at least": "required"}


def judge(ship: Row, allowed: Mapping[str, float]) -> List[Dict[str, Any]]:
    """
    Each limit with what was measured and whether it holds.

    Args:
        allowed: key of LIMITS -> number.

    Raises:
        MeasurementError: a number that a limit needs was not measured.
    """
    judged = []
    for kind in LIMITS:
        if kind.key not in allowed:
            continue
        measured = kind.measure(ship)
        if measured is None:
            kinds = "accuracy" if kind.unit == "points" else "latency"
            teacher = " and of a teacher to compare it with" if kind.compares else ""
            raise MeasurementError(
                f"{kind.flag} cannot be judged: it needs the {kinds} of {ship['role']!r}, which is to ship{teacher}. "
                "Give these result files too."
            )
        limit = allowed[kind.key]
        over = measured - limit if kind.at_most else limit - measured
        judged.append(
            {
                "flag": kind.flag,
                "title": kind.title,
                "unit": kind.unit,
                "bound": kind.bound,
                "allowed": limit,
                "measured": measured,
                "passed": over <= 1e-9,  # 48.0 - 47.0 points is 1 + 1e-15 in binary
            }
        )
    return judged


def verdict_from_limits(ship: Row, limits: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """`ship`, `roll_out` (None without limits), `label` and the verdict in one `sentence`."""
    failed = [limit for limit in limits if not limit["passed"]]
    facts = []
    if ship["AP"] is not None:
        against = f" ({signed_points(ship['AP_gain'])} against the teacher)" if ship["AP_gain"] is not None else ""
        facts.append(f"AP {points(ship['AP'])}{against}")
    if ship["latency_ms"]:
        times = f", {ship['speedup']:.1f} times the teacher's speed" if ship["speedup"] is not None else ""
        facts.append(f"median {ms(latency_ms(ship, 'total', 'median'))} ms{times}")
    known = "; ".join(facts)
    if not limits:
        roll_out, label = None, "No limits given"
        sentence = f"No limits were given, so there is no verdict on {ship['title']}: {known}."
    elif failed:
        roll_out, label = False, "Do not roll out"
        reasons = [f"{one['title']} is {amount(one['measured'], one['unit'])}, {one['bound']} "
                   f"{amount(one['allowed'], one['unit'])} is {_DEMAND[one['bound']]}" for one in failed]  # fmt: skip
        sentence = f"Do not roll out {ship['title']}: {'; '.join(reasons)}."
    else:
        roll_out, label = True, "Roll out"
        hold = "the limit holds" if len(limits) == 1 else f"all {len(limits)} limits hold"
        sentence = f"Roll out {ship['title']}: {known}; {hold}."
    return {"ship": ship["role"], "roll_out": roll_out, "label": label, "sentence": sentence}
