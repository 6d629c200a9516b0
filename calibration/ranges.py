"""
Statistics -> ranges: the values of each activation that INT8 is to hold.

The methods that choose a range, within the smallest and the largest value that were seen:

- `max`: these two. Nothing is clipped; the safe one behind a ReLU.
- `percentile`: clips 0.01 % of the values: the largest by absolute value (signed), or half of them at each end
  (unsigned), as ONNX Runtime does (onnxruntime.quantization.calibrate, 1.31; it returns the lower edge of a bin where
  this interpolates within it).
- `entropy`: the clip whose histogram, in 8 bits, tells most of the whole one: least Kullback-Leibler divergence.
  S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310), with three differences: values that are 0, exact in
  INT8, are left out, since a ReLU's would outweigh all others; the clips tried are STEPS_PER_OCTAVE in each octave, not
  every bin; and they clip at most MOST_CLIPPED of the values. ONNX Runtime's, symmetric always, counts zeros, has 128
  steps for both signs together, and rounds to whole numbers the values that a step spreads over its bins.
- `mse`: the clip of least expected squared error of rounding and clipping, of the same clips.

Those of a histogram see no finer than a bin, at most 1/2048 of the largest absolute value: an outlier thousands of
times larger than all else leaves them little to choose from.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, Sequence, Tuple

import numpy as np

from calibration.activation_statistics import BINS, Statistics
from deploy.errors import CalibrationError, ConfigError
from deploy.int8_format import LARGEST_INT8, LARGEST_UINT8, Quantization, signed_from_range, unsigned_from_range

Ranges = Dict[str, Tuple[float, float]]
"""Tensor -> (smallest, largest) value that INT8 is to hold."""

PERCENTILE = 99.99
STEPS_PER_OCTAVE = 16
OCTAVES = 10
"""Clips down to 1/1024 of the largest value are tried: half a bin there is a quarter of the clip."""
CLIPS = [2 ** (-step / STEPS_PER_OCTAVE) for step in range(STEPS_PER_OCTAVE * OCTAVES + 1)]
"""Clips that are tried, as shares of the largest value: 1, 0.958, ... 1/1024."""
MOST_CLIPPED = 0.01
"""The largest share of values that the method entropy clips: the divergence does not see how far clipping moves them;
for a tensor without small values it is 0 where all are clipped."""
SMALLEST_SHARE = 1e-4
"""The least share of a value in a bin that quantisation leaves empty, so that the divergence is finite."""


def range_from_statistics(
    statistics: Statistics, method: str, signed: bool, percentile: float = PERCENTILE
) -> Tuple[float, float]:
    """
    (minimum, maximum) of the values that INT8 is to hold; what lies outside is clipped.

    Args:
        signed: for `signed_from_range`, which takes the larger of |minimum| and |maximum|; else `unsigned_from_range`.
        percentile: of the method `percentile`: how many values in a hundred are not clipped.

    Raises:
        ConfigError: the method is unknown, or the percentile not above 50 and at most 100.
        CalibrationError: the method needs a histogram, and the statistics have none.
    """
    if method not in RANGE_METHODS:
        raise ConfigError(f"the method is {method!r}; expected one of {list(RANGE_METHODS)}")
    if not 50 < percentile <= 100:
        raise ConfigError(f"--percentile is {percentile}; expected above 50, at most 100")
    if method != "max" and not statistics.has_histogram:
        raise CalibrationError(f"the method {method} needs a histogram; the statistics hold minimum and maximum only")
    if not statistics.counts.any():  # all zeros, as far as counted: any clip would do, and be wrong for the rest
        return statistics.minimum, statistics.maximum
    lowest, highest = RANGE_METHODS[method](statistics, signed, percentile)
    smallest, largest = statistics.minimum, statistics.maximum
    return min(max(lowest, smallest), largest), min(max(highest, smallest), largest)


def _max_range(statistics: Statistics, signed: bool, percentile: float) -> Tuple[float, float]:
    return statistics.minimum, statistics.maximum


def _absolute_counts(statistics: Statistics) -> np.ndarray:
    """(BINS,) int64: the non-zero values by their absolute value."""
    return statistics.counts[BINS:] + statistics.counts[BINS - 1 :: -1]


def _percentile_range(statistics: Statistics, signed: bool, percentile: float) -> Tuple[float, float]:
    edges, total = statistics.edges, statistics.count
    if signed:
        counts = np.concatenate([[statistics.zeros], _absolute_counts(statistics)])
        edges = np.concatenate([[0.0], edges[BINS:]])  # the zeros are in a bin of no width
        highest = float(np.interp(total * percentile / 100, _cumulative(counts), edges))
        lowest = -highest
    else:
        counts = np.insert(statistics.counts, BINS, statistics.zeros)
        edges = np.insert(edges, BINS, 0.0)
        outside = (100 - percentile) / 200
        ranks = [total * outside, total * (1 - outside)]
        lowest, highest = np.interp(ranks, _cumulative(counts), edges).tolist()
    if lowest == highest == 0:  # so sparse that the percentile is 0: clipping there would leave nothing
        return statistics.minimum, statistics.maximum
    return lowest, highest


def _cumulative(counts: np.ndarray) -> np.ndarray:
    """(len(counts) + 1,): how many values lie below each edge."""
    return np.concatenate([[0], np.cumsum(counts)])


def _entropy_range(statistics: Statistics, signed: bool, percentile: float) -> Tuple[float, float]:
    """Unsigned: first the upper end is clipped, then the lower one."""
    if signed:
        counts, zero, levels = _absolute_counts(statistics), 0, LARGEST_INT8 + 1
    else:
        counts, zero, levels = statistics.counts, BINS, LARGEST_UINT8 + 1
    occupied = np.flatnonzero(counts)
    below, above = max(0, zero - int(occupied[0])), max(0, int(occupied[-1]) + 1 - zero)
    start = zero - below
    _, end = _best_window(counts, [(start, zero + math.ceil(clip * above)) for clip in CLIPS], levels)
    start, end = _best_window(counts, [(zero - math.ceil(clip * below), end) for clip in CLIPS], levels)
    width = 2.0**statistics.exponent
    highest = (end - zero) * width
    return -highest if signed else (start - zero) * width, highest


def _best_window(counts: np.ndarray, windows: Sequence[Tuple[int, int]], levels: int) -> Tuple[int, int]:
    """Of the windows (first bin, bin after the last), each within the one before, that of least divergence."""
    best, least = windows[0], math.inf
    for start, end in dict.fromkeys(windows):  # each once
        clipped = counts[:start].sum() + counts[end:].sum()
        if end - start < levels or clipped > MOST_CLIPPED * counts.sum():
            break
        divergence = _divergence(counts, start, end, levels)
        if divergence < least:
            best, least = (start, end), divergence
    return best


def _divergence(counts: np.ndarray, start: int, end: int, levels: int) -> float:
    """
    Kullback-Leibler divergence of the histogram clipped to the bins `start` to `end` from the same in `levels` steps.

    Migacz 2017, the slides "Calibration: KL divergence" and "Example": what is clipped counts in the end bins of the
    clipped histogram only; each step's values are spread over those of its bins that hold any.
    """
    inside = counts[start:end].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    first_bins = np.arange(levels) * len(inside) // levels
    lengths = np.diff(np.append(first_bins, len(inside)))
    held = clipped > 0
    shares = np.add.reduceat(inside, first_bins) / np.maximum(np.add.reduceat(held.astype(np.float64), first_bins), 1)
    clipped, stepped = clipped[held], np.maximum(np.repeat(shares, lengths)[held], SMALLEST_SHARE)
    clipped, stepped = clipped / clipped.sum(), stepped / stepped.sum()
    return float(np.sum(clipped * np.log(clipped / stepped)))


def _mse_range(statistics: Statistics, signed: bool, percentile: float) -> Tuple[float, float]:
    """Unsigned: first the upper end is clipped, then the lower one."""
    minimum, maximum = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if signed:
        counts, edges = _absolute_counts(statistics), statistics.edges[BINS:]
        largest = max(-minimum, maximum)
        highest = _best_clip(counts, edges, lambda clip: signed_from_range(0.0, clip * largest)) * largest
        return -highest, highest
    counts, edges = statistics.counts, statistics.edges
    highest = _best_clip(counts, edges, lambda clip: unsigned_from_range(minimum, clip * maximum)) * maximum
    if minimum == 0:
        return minimum, highest
    lowest = _best_clip(counts, edges, lambda clip: unsigned_from_range(clip * minimum, highest)) * minimum
    return lowest, highest


def _best_clip(counts: np.ndarray, edges: np.ndarray, quantization_from_clip: Callable[[float], Quantization]) -> float:
    """Of CLIPS, the one of least squared error."""
    best, least = 1.0, math.inf
    for clip in CLIPS:
        error = _squared_error(counts, edges, quantization_from_clip(clip))
        if error < least:
            best, least = clip, error
        elif error > 2 * least:  # a tighter clip rounds less and clips more: past the valley it only gets worse
            break
    return best


def _squared_error(counts: np.ndarray, edges: np.ndarray, quantization: Quantization) -> float:
    """
    Expected (value - quantised value)^2, times a constant, if values are spread evenly over the width of each bin.

    With scale s, the error's square has the integral n s^3 / 12 + r^3 / 3 from 0 to x, where n is the integer that x is
    rounded and clipped to, and r = x - n s: each full step adds s^3 / 12, and beyond the clip n stays and r grows.
    """
    smallest, largest = quantization.multiples
    integers = np.clip(np.rint(edges / quantization.scale), smallest, largest)
    rests = edges - integers * quantization.scale
    integrals = integers * quantization.scale**3 / 12 + rests**3 / 3
    return float(np.dot(counts, np.diff(integrals)))


RANGE_METHODS: Dict[str, Callable[[Statistics, bool, float], Tuple[float, float]]] = {
    "max": _max_range,
    "percentile": _percentile_range,
    "entropy": _entropy_range,
    "mse": _mse_range,
}
"""Name, as --method takes it -> (statistics, whether it is for a signed format, percentile) -> (smallest, largest)."""
