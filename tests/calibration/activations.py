"""Statistics of arrays that stand for an activation's values of some images."""

from __future__ import annotations

from calibration.activation_statistics import Seen, Statistics


def statistics_of(arrays):
    statistics = Statistics()
    for values in arrays:
        statistics.update(Seen.of(values))
    return statistics
