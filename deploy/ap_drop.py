"""
What a model loses in AP against the one that it was made from, and whether that is within a budget.

Of a model whose predictions are products of integers the scores are judged, too: rounding can leave their order, and so
AP, as it was, and move all of them, and with them the threshold that an application needs.

As `benchmarks.accuracy --against` measures it: `calibration` searches and chooses by it, the pipeline goes on by it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping, Optional

from deploy.errors import ConfigError, MeasurementError
from deploy.files import AnyPath
from deploy.freshness import read_record
from deploy.schema import Maybe, Number, check_content

FEWEST_IMAGES = 50
"""With fewer the interval of a drop is so wide that a budget means little."""
ROUNDING = 1e-9
"""In points: 48.0 - 47.5 is not 0.5 in binary."""
INT8_PREDICTORS = "INT8 predictors"
"""Role of the results of a model whose final predictions are products of integers."""
LARGEST_SCORE_SHIFT = 0.1
"""How far the score at the best F1 may move where scores are judged: beyond it a threshold has to be chosen anew."""
_FRACTION = Number(-1.001, 1.001)
_AGAINST = {
    **dict.fromkeys(("AP_difference", "low", "high"), _FRACTION),
    "score_shift": Maybe((Number(-1, 1), None)),
}
NUMBERS = {"numbers": {"AP": _FRACTION, "against": _AGAINST}}
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
    score_shift: Optional[float] = None
    """How far the score at the best F1 moved, where scores are judged; None: they are not."""

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any], judge_scores: bool = False) -> Drop:
        """The drop that the `numbers` of an accuracy result tell, measured against the float model's."""
        against = numbers["against"]
        shift = None
        if judge_scores:  # without any detection there is no best F1, and no shift that could be small
            shift = 1.0 if against.get("score_shift") is None else float(against["score_shift"])
        return cls(numbers["AP"], -against["AP_difference"], -against["high"], -against["low"], shift)

    @property
    def keeps_scores(self) -> bool:
        """Whether scores, if they are judged, are where they were."""
        return self.score_shift is None or abs(self.score_shift) <= LARGEST_SCORE_SHIFT

    def keeps(self, budget_points: float) -> bool:
        """Whether the drop, as measured, is no more than so many points of AP, of 100, and scores are kept."""
        return 100 * self.drop <= budget_points + ROUNDING and self.keeps_scores

    def __str__(self) -> str:
        drop, low, high = (points(value) for value in (self.drop, self.low, self.high))
        text = f"AP {points(self.ap)}, a drop of {drop} points against float (95 % interval {low} to {high})"
        if self.score_shift is None:
            return text
        beyond = "" if self.keeps_scores else f", more than {LARGEST_SCORE_SHIFT:g}"
        return f"{text}, the score at the best F1 moved by {self.score_shift:+.3f}{beyond}"


def drop_from_result(path: AnyPath) -> Drop:
    """
    The drop that an accuracy result tells.

    Raises:
        MeasurementError: it cannot be read, was edited, or was measured against no other.
    """
    record = read_record(path)
    check_content(record, NUMBERS, path, MeasurementError, "Measure again, with --against the float model's result.")
    return drop_from_record(record)


def drop_from_record(record: Mapping[str, Any]) -> Drop:
    """The drop of an accuracy result that was read and checked."""
    return Drop.from_numbers(record["numbers"], record.get("role") == INT8_PREDICTORS)


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
