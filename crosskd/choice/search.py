"""The search for the student with the most multiplications within limits, by few measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from deploy.errors import MeasurementError


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A student that could be trained."""

    backbone: str
    """timm's name of it."""
    width: int
    """Channels of neck and head."""
    tower_layers: int
    """Convolutions of each tower of the head."""
    side_px: int
    """Of the square input."""
    macs: int
    """Multiplications of all convolutions, for one image."""

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.width}x{self.tower_layers}-{self.side_px}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a candidate takes on the target."""

    p99_ms: float
    """Of all stages, from the decoded image to the detections; of several boards the slowest."""
    size_mib: float
    """Of the file that ships."""
    memory_mib: float | None
    """Peak of the process on the host; None: not known."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a student may take."""

    budget_ms: float
    """Of all stages, 99th percentile."""
    size_mib: float | None = None
    memory_mib: float | None = None

    def __str__(self) -> str:
        found = [(self.budget_ms, "ms at p99"), (self.size_mib, "MiB of file"), (self.memory_mib, "MiB of memory")]
        return ", ".join(f"{limit:g} {unit}" for limit, unit in found if limit is not None)

    def broken_by(self, measured: Measured) -> list[str]:
        """What of it a measured student breaks, in words."""
        found = [
            (measured.p99_ms, self.budget_ms, "ms at p99"),
            (measured.size_mib, self.size_mib, "MiB of file"),
            (measured.memory_mib, self.memory_mib, "MiB of memory"),
        ]
        return [
            f"{value:.1f} {unit}, of {limit:g}"
            for value, limit, unit in found
            if value is not None and limit is not None and value > limit
        ]


Measure = Callable[[Candidate], "Measured | None"]
"""What a candidate takes; None of one that cannot be measured, which was told."""


def best_within(families: Sequence[Sequence[Candidate]], limits: Limits, measure: Measure) -> Candidate | None:
    """
    The candidate with the most multiplications that keeps the limits; None if none does.

    Takes it that in a family what is larger is slower, and halves each family between what keeps the limits and what
    does not. Of a later family only what would be better than the best so far is looked at, the smallest first: often
    that is too much already.

    Args:
        families: candidates of one backbone each. measure: None of one that cannot be measured, which is left out.
    """
    best: Candidate | None = None
    for number, family in enumerate(families):
        better = sorted((one for one in family if best is None or one.macs > best.macs), key=lambda one: one.macs)
        low, high = 0, len(better)  # those before `low` keep the limits, those from `high` on do not
        middle = high // 2 if number == 0 else 0
        while low < high:
            found = measure(better[middle])
            if found is None:
                del better[middle]
                high -= 1
            elif limits.broken_by(found):
                high = middle
            else:
                low, best = middle + 1, better[middle]
            middle = (low + high) // 2
    return best


def confirmed_best(
    families: Sequence[Sequence[Candidate]], limits: Limits, measure: Measure, measure_again: Measure
) -> tuple[Candidate, Measured]:
    """
    The best candidate that keeps the limits in a second measurement, too, and that measurement.

    Raises:
        MeasurementError: none keeps them; the fastest that was measured is named.
    """
    left = [list(family) for family in families]
    while True:
        best = most_promising(left, limits, measure, 1)[0]
        again = measure_again(best)
        if again is not None and not limits.broken_by(again):
            return best, again
        if again is not None:
            print(_broken_again(best, limits, again), flush=True)
        left = [
            [one for one in family if not (one.backbone == best.backbone and one.macs >= best.macs)] for family in left
        ]


def most_promising(
    families: Sequence[Sequence[Candidate]], limits: Limits, measure: Measure, count: int
) -> list[Candidate]:
    """
    Up to `count` candidates that keep the limits, those with the most multiplications, which come first.

    Raises:
        MeasurementError: none keeps them; the fastest that was measured is named.
    """
    measured: dict[Candidate, Measured | None] = {}

    def noted(candidate: Candidate) -> Measured | None:
        if candidate not in measured:
            measured[candidate] = measure(candidate)
        return measured[candidate]

    best = best_within(families, limits, noted)
    if best is None:
        raise _nothing_keeps(limits, {one: found for one, found in measured.items() if found is not None})
    slow: dict[str, int] = {}  # backbone -> multiplications of its smallest member that was too much
    for one, found in measured.items():
        if found is not None and limits.broken_by(found):
            slow[one.backbone] = min(one.macs, slow.get(one.backbone, one.macs))
    promising = [best]
    rest = (one for family in families for one in family if one.macs < best.macs)
    for one in sorted(rest, key=lambda one: one.macs, reverse=True):
        if len(promising) == count:
            break
        if one.macs >= slow.get(one.backbone, one.macs + 1):
            continue
        found = noted(one)
        if found is not None and not limits.broken_by(found):
            promising.append(one)
        elif found is not None:
            slow[one.backbone] = one.macs
    return promising


def confirmed_first(ranking: Sequence[Candidate], limits: Limits, measure_again: Measure) -> tuple[Candidate, Measured]:
    """
    The first of the candidates that keeps the limits when it is measured again, and that measurement.

    Raises:
        MeasurementError: none does.
    """
    for candidate in ranking:
        again = measure_again(candidate)
        if again is not None and not limits.broken_by(again):
            return candidate, again
        if again is not None:
            print(_broken_again(candidate, limits, again), flush=True)
    raise MeasurementError(
        f"none of the {len(ranking)} students that were trained keeps the limits when it is measured again: {limits}. "
        "Is the machine busy? Run the same command on a quiet one: what was trained is kept"
    )


def _broken_again(candidate: Candidate, limits: Limits, again: Measured) -> str:
    return f"{candidate.name} breaks it when it is measured again: {'; '.join(limits.broken_by(again))}"


def _nothing_keeps(limits: Limits, measured: Mapping[Candidate, Measured]) -> MeasurementError:
    if not measured:
        return MeasurementError("no student could be measured; why is above")
    fastest, takes = min(measured.items(), key=lambda item: item[1].p99_ms)
    return MeasurementError(
        f"no student keeps the limits: the fastest, {fastest.name}, takes {takes.p99_ms:.1f} ms at p99, "
        f"{takes.size_mib:.1f} MiB of file"
        + ("" if takes.memory_mib is None else f", {takes.memory_mib:.0f} MiB of memory")
        + f"; asked for: {limits}. Raise the limit, or take a faster machine, runtime or precision"
    )
