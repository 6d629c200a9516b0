"""The search finds what measuring all would find, by few measurements; every limit counts; the choice is confirmed."""

from __future__ import annotations

import random

import pytest

from crosskd.choice.search import (
    Candidate,
    Limits,
    Measured,
    best_within,
    confirmed_best,
    confirmed_first,
    most_promising,
)
from deploy.errors import MeasurementError


def _families(count: int = 4, members: int = 16) -> list[list[Candidate]]:
    drawn = random.Random(count)
    return [
        [Candidate(f"b{backbone}", 64, 2, 32 * n, drawn.randrange(10**8, 10**10)) for n in range(members)]
        for backbone in range(count)
    ]


class Clock:
    """A machine on which each backbone has a speed of its own."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def __call__(self, candidate: Candidate) -> Measured:
        if candidate.name not in self.measured:
            self.measured.append(candidate.name)
        ms = candidate.macs / 1e8 * (1 + int(candidate.backbone[1:]) / 3)
        return Measured(ms, candidate.macs / 1e9, candidate.macs / 1e7)


@pytest.mark.parametrize("budget_ms", [3.0, 10.0, 30.0, 60.0, 1000.0])
def test_the_best_is_found_by_few_measurements(budget_ms: float) -> None:
    families, clock, limits = _families(), Clock(), Limits(budget_ms)
    best = best_within(families, limits, clock)
    assert len(clock.measured) <= 15
    everything = [one for family in families for one in family if not limits.broken_by(Clock()(one))]
    assert best == max(everything, key=lambda one: one.macs, default=None)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Limits(50.0, size_mib=2.0), "MiB of file, of 2"),
        (Limits(50.0, memory_mib=150.0), "MiB of memory, of 150"),
        (Limits(5.0), "ms at p99, of 5"),
    ],
)
def test_every_limit_counts(limits: Limits, named: str) -> None:
    families, clock = _families(), Clock()
    best = best_within(families, limits, clock)
    assert best is not None
    assert limits.broken_by(clock(best)) == []
    larger = min((one for one in families[0] if one.macs > best.macs), key=lambda one: one.macs)
    assert limits.broken_by(clock(larger))[0].endswith(named)
    assert Limits(50.0, memory_mib=1.0).broken_by(Measured(1.0, 1.0, None)) == []  # not known on boards


def test_a_choice_that_is_slower_when_repeated_is_given_up_for_the_next() -> None:
    families, clock, limits = _families(), Clock(), Limits(30.0)
    first = best_within(families, limits, clock)
    again: list[str] = []

    def repeated(candidate: Candidate) -> Measured:
        again.append(candidate.name)
        return Measured(31.0, 1.0, None) if len(again) == 1 else clock(candidate)

    chosen, measured = confirmed_best(families, limits, clock, repeated)
    assert again == [first.name, chosen.name]
    assert chosen.macs < first.macs
    assert measured.p99_ms <= 30.0


def test_a_budget_that_none_meets_names_the_fastest_and_what_it_takes() -> None:
    families, clock = _families(), Clock()
    fastest = min((one for family in families for one in family), key=lambda one: clock(one).p99_ms)
    with pytest.raises(MeasurementError, match=rf"no student keeps the limits: the fastest, {fastest.name}, takes "):
        confirmed_best(families, Limits(0.1), clock, clock)


def test_what_cannot_be_measured_is_left_out_and_the_others_are_looked_at() -> None:
    families, clock, limits = _families(), Clock(), Limits(30.0)
    for _ in range(3):
        best = confirmed_best(families, limits, clock, clock)[0]
        broken = best.name
        found = confirmed_best(
            families, limits, lambda one, broken=broken: None if one.name == broken else clock(one), clock
        )
        kept = [one for family in families for one in family if one != best and not limits.broken_by(clock(one))]
        assert found[0] == max(kept, key=lambda one: one.macs)
        families = [[one for one in family if one != best] for family in families]
    with pytest.raises(MeasurementError, match="no student could be measured; why is above"):
        confirmed_best(families, limits, lambda _: None, clock)


@pytest.mark.parametrize("count", [1, 2, 5, 200])
def test_the_most_promising_have_the_most_multiplications_of_those_that_keep_the_limits(count: int) -> None:
    families, clock, limits = _families(), Clock(), Limits(30.0)
    found = most_promising(families, limits, clock, count)
    measured = len(clock.measured)
    kept = [one for family in families for one in family if not limits.broken_by(clock(one))]
    assert found == sorted(kept, key=lambda one: -one.macs)[:count]
    assert len(found) < 200
    assert count > 5 or measured <= 25


def test_of_those_that_were_trained_the_first_that_keeps_the_limits_again_is_taken() -> None:
    ranking = _families()[0][:3]
    times = {ranking[0]: Measured(31.0, 1.0, None), ranking[1]: None, ranking[2]: Measured(29.0, 1.0, None)}
    assert confirmed_first(ranking, Limits(30.0), times.__getitem__) == (ranking[2], times[ranking[2]])
    with pytest.raises(MeasurementError, match="none of the 2 students that were trained keeps"):
        confirmed_first(ranking[:2], Limits(30.0), times.__getitem__)
