"""
What a model loses in AP against the one that it was made from, and whether that is within a budget.

As `benchmarks.accuracy --against` measures it: `calibration` searches and chooses by it, the pipeline goes on by it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping

from deploy.errors import ConfigError, MeasurementError
from deploy.files import AnyPath
from deploy.freshness import read_record
from deploy.schema import Number, check_content

FEWEST_IMAGES = 50
"""With fewer the interval of a drop is so wide that a budget means little."""
ROUNDING = 1e-9
"""In points: 48.0 - 47.5 is not 0.5 in binary."""
_FRACTION = Number(-1.001, 1.001)
NUMBERS = {"numbers": {"AP": _FRACTION, "against": dict.fromkeys(("AP_difference", "low", "high"), _FRACTION)}}
"""Table of what an accuracy result must say, beside the rest."""


@dataclasses.dataclass(frozen=True)
class Drop:
    """The AP of a model, and how much lower it is than that of the float model; fractions of 1."""

    ap: float
    """AP of the model itself."""
    drop: float
    """AP of the float model less that of this one; negative where it is higher."""
    low: float
    high: float
    """The 95 % interval of the drop: paired bootstrap over images."""

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Drop:
        """The drop that the `numbers` of an accuracy result tell, measured against the float model's."""
        against = numbers["against"]
        return cls(numbers["AP"], -against["AP_difference"], -against["high"], -against["low"])

    def keeps(self, budget_points: float) -> bool:
        """Whether the drop, as measured, is no more than so many points of AP, of 100."""
        return 100 * self.drop <= budget_points + ROUNDING

    def __str__(self) -> str:
        drop, low, high = (points(value) for value in (self.drop, self.low, self.high))
        return f"AP {points(self.ap)}, a drop of {drop} points against float (95 % interval {low} to {high})"


def drop_from_result(path: AnyPath) -> Drop:
    """
    The drop that an accuracy result tells.

    Raises:
        MeasurementError: it cannot be read, was edited, or was measured against no other.
    """
    record = read_record(path)
    check_content(record, NUMBERS, path, MeasurementError, "Measure again, with --against the float model's result.")
    return Drop.from_numbers(record["numbers"])


def checked_budget(budget_points: Any, name: str) -> float:
    """
    A budget of AP, in points of 100, as a flag or a config gives it.

    Raises:
        ConfigError: it is no number from 0 to 100.
    """
    is_number = isinstance(budget_points, (int, float)) and not isinstance(budget_points, bool)
    if not (is_number and math.isfinite(budget_points) and 0 <= budget_points <= 100):
        raise ConfigError(
            f"{name} is {budget_points!r:.80}; expected points of AP, 0 or more and at most 100, such as 0.5"
        )
    return float(budget_points)


def points(fraction: float) -> str:
    """A fraction as points of AP, in words; never "-0.00"."""
    return f"{round(100 * fraction, 2) + 0.0:.2f}"
