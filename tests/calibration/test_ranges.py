from __future__ import annotations

import math

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector

from calibration.activation_statistics import SAMPLE, Seen, Statistics
from calibration.ranges import (
    CLIPS,
    RANGE_METHODS,
    range_from_statistics,
)
from deploy.errors import CalibrationError, ConfigError
from deploy.int8_format import signed_from_range, unsigned_from_range


def statistics_of(values):
    """In parts of fewer values than are sampled of one image."""
    statistics = Statistics()
    for start in range(0, len(values), SAMPLE):
        statistics.update(Seen.of(values[start : start + SAMPLE].astype(np.float32)))
    assert statistics.count == len(values)
    return statistics


def distribution(kind):
    """(40000,) values, but for 'single'."""
    random = np.random.default_rng(0)
    normal, laplace = random.normal(0, 1.3, 40000), random.laplace(0, 0.4, 40000)
    values = {
        "normal": normal,
        "laplace": laplace,
        "relu": np.maximum(laplace - 0.2, 0),
        "leaky": np.where(laplace < 0, 0.1 * laplace, laplace),
        "negative": -np.abs(laplace) - 0.5,
        "outlier": np.append(normal[1:], 300.0),
        "constant": np.full(40000, 5.0),
        "negative constant": np.full(40000, -0.3),
        "zero": np.zeros(40000),
        "sparse": np.append(np.zeros(39999), 2.0),
        "single": np.array([0.7]),
    }[kind]
    return values.astype(np.float32)


KINDS = (
    "normal", "laplace", "relu", "leaky", "negative", "outlier",
    "constant", "negative constant", "zero", "sparse", "single",
)  # fmt: skip
SPREAD = ("normal", "laplace", "relu", "leaky", "negative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_a_range_lies_within_what_was_seen_and_is_not_empty(method, signed, kind):
    values = distribution(kind)
    minimum, maximum = range_from_statistics(statistics_of(values), method, signed)
    assert values.min() <= minimum <= maximum <= values.max()
    assert type(minimum) is type(maximum) is float
    assert max(-minimum, maximum) > 0 or kind == "zero"


@pytest.mark.parametrize("kind", ["constant", "negative constant", "single", "sparse"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_what_has_no_tail_is_not_clipped(method, signed, kind):
    values = distribution(kind)
    minimum, maximum = range_from_statistics(statistics_of(values), method, signed)
    assert max(-minimum, maximum) == np.abs(values).max()


@pytest.mark.parametrize("kind", KINDS)
def test_max_is_what_was_seen(kind):
    values = distribution(kind)
    for signed in (True, False):
        assert range_from_statistics(statistics_of(values), "max", signed) == (values.min(), values.max())


@pytest.mark.parametrize("signed", [True, False])
def test_a_lone_outlier_is_clipped_by_percentile_and_entropy(signed):
    statistics = statistics_of(distribution("outlier"))
    for method in ("percentile", "entropy"):
        _, maximum = range_from_statistics(statistics, method, signed)
        assert 3 < maximum < 300 / 5


@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("percentile", [95.0, 99.0])
def test_percentile_is_that_of_the_sorted_values(kind, percentile):
    values = distribution(kind)
    statistics = statistics_of(values)
    width, outside = 2.0**statistics.exponent, (100 - percentile) / 200
    minimum, maximum = range_from_statistics(statistics, "percentile", True, percentile)
    assert max(-minimum, maximum) == pytest.approx(np.percentile(np.abs(values), percentile), abs=2 * width)
    minimum, maximum = range_from_statistics(statistics, "percentile", False, percentile)
    expected = np.quantile(values, [outside, 1 - outside])
    np.testing.assert_allclose([minimum, maximum], expected, atol=2 * width)


@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("signed", [True, False])
def test_percentile_is_that_of_onnx_runtime(kind, signed, capsys):
    """Which returns an edge of a bin of its own, 1/4096 of the range wide."""
    values = distribution(kind)
    collector = HistogramCollector("percentile", signed, 4096, 128, 97.5, "same")
    collector.collect({"x": values})
    lowest, highest = collector.compute_collection_result()["x"][:2]
    capsys.readouterr()
    statistics = statistics_of(values)
    tolerance = 2 * (2.0**statistics.exponent + np.abs(values).max() / 2048)
    minimum, maximum = range_from_statistics(statistics, "percentile", signed, 97.5)
    np.testing.assert_allclose([minimum, maximum], [lowest, highest], atol=tolerance)


def slow_divergence(histogram, start, end, levels):
    """As in the slides, with loops; the histogram is a list of whole numbers."""
    clipped = list(histogram[start:end])
    clipped[0] += sum(histogram[:start])
    clipped[-1] += sum(histogram[end:])
    size = end - start
    stepped = []
    for level in range(levels):
        first, last = level * size // levels, (level + 1) * size // levels
        total, held = sum(histogram[start + first : start + last]), sum(value > 0 for value in clipped[first:last])
        stepped += [max(total / held, 1e-4) if value > 0 else 0 for value in clipped[first:last]]
    scale_p, scale_q = 1 / sum(clipped), 1 / sum(stepped)
    return sum(p * scale_p * math.log(p * scale_p / (q * scale_q)) for p, q in zip(clipped, stepped, strict=True) if p)


@pytest.mark.parametrize(
    ("kind", "signed"),
    [("normal", True), ("laplace", True), ("relu", True), ("negative", True), ("relu", False), ("leaky", False)],
)
def test_entropy_is_least_by_a_slow_implementation(kind, signed):
    values, levels = distribution(kind), 128 if signed else 256
    statistics = statistics_of(values)
    width = 2.0**statistics.exponent
    values = np.abs(values[values != 0]) if signed else values[values != 0]
    below, above = math.ceil(max(0, -values.min() / width)), math.ceil(max(0, values.max() / width))
    histogram = np.histogram(values, np.arange(-below, above + 1) * width)[0].tolist()

    def slow(start, end):
        too_many = sum(histogram[start:end]) < 0.99 * len(values)
        return math.inf if end - start < levels or too_many else slow_divergence(histogram, start, end, levels)

    minimum, maximum = range_from_statistics(statistics, "entropy", signed)
    found = math.ceil((max(-minimum, maximum) if signed else max(maximum, 0)) / width)
    assert slow(0, below + found) <= min(slow(0, below + math.ceil(clip * above)) for clip in CLIPS[::3]) + 1e-9
    if not signed and below:
        first = below - math.ceil(-minimum / width)
        others = [slow(below - math.ceil(clip * below), below + found) for clip in CLIPS[::3]]
        assert slow(first, below + found) <= min(others) + 1e-9


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_entropy_is_near_that_of_onnx_runtime(kind, capsys):
    """With 255 steps for both signs, theirs is ours but for how clips are tried and thin tails are rounded."""
    random = np.random.default_rng(3)
    values = getattr(random, kind)(0, 1, 400_000).astype(np.float32)
    statistics = statistics_of(values)
    collector = HistogramCollector("entropy", True, 2049, 255, None, "same")
    collector.collect({"x": values})
    _, expected = collector.compute_collection_result()["x"][:2]
    capsys.readouterr()
    _, maximum = range_from_statistics(statistics, "entropy", True)
    assert maximum == pytest.approx(expected, rel=0.15)


def squared_error(values, quantization):
    smallest, largest = quantization.multiples
    restored = np.clip(np.rint(values / quantization.scale), smallest, largest) * quantization.scale
    return np.mean((values.astype(np.float64) - restored) ** 2)


@pytest.mark.parametrize("kind", [*SPREAD, "outlier"])
def test_mse_is_least_by_a_slow_implementation(kind):
    """Which quantises the values themselves, and for uint8 tries all pairs of ends."""
    values = distribution(kind)
    statistics, largest = statistics_of(values), np.abs(values).max()
    least = min(squared_error(values, signed_from_range(0, clip * largest)) for clip in CLIPS)
    found = squared_error(values, signed_from_range(*range_from_statistics(statistics, "mse", True)))
    assert found <= 1.02 * least

    lower, upper = min(values.min(), 0), max(values.max(), 0)
    pairs = [(a * lower, b * upper) for a in CLIPS[:48:4] for b in CLIPS[:48:4]]
    least = min(squared_error(values, unsigned_from_range(*pair)) for pair in pairs)
    found = squared_error(values, unsigned_from_range(*range_from_statistics(statistics, "mse", False)))
    assert found <= 1.02 * least


def test_mse_clips_where_rounding_costs_more():
    """One value is twice as large as all others: to be held, unless they are very many."""
    random = np.random.default_rng(0)
    for number, clips in ((1000, False), (2_000_000, True)):
        values = np.append(random.uniform(-1, 1, number), [2.0])
        _, maximum = range_from_statistics(statistics_of(values), "mse", True)
        assert maximum < 1.2 if clips else maximum == 2


def test_bad_arguments_are_one_message():
    statistics = statistics_of(distribution("normal"))
    with pytest.raises(ConfigError, match=r"'minmax'; expected one of \['max', 'percentile', 'entropy', 'mse'\]"):
        range_from_statistics(statistics, "minmax", True)
    for percentile in (0, 50, 100.1, float("nan")):
        with pytest.raises(ConfigError, match="--percentile is"):
            range_from_statistics(statistics, "percentile", True, percentile)


def test_a_method_that_needs_a_histogram_says_so():
    statistics = Statistics.minmax_only()
    statistics.update(Seen.of(np.float32([-1, 2])))
    assert range_from_statistics(statistics, "max", True) == (-1, 2)
    with pytest.raises(CalibrationError, match="mse needs a histogram"):
        range_from_statistics(statistics, "mse", True)
