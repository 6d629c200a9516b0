from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from calibration.activation_statistics import (
    BINS,
    SAMPLE,
    Collected,
    Seen,
    Statistics,
    load_statistics,
    read_statistics,
    sample_stride,
    save_statistics,
)
from deploy.contract import load_contract
from deploy.errors import CalibrationError
from tests.calibration.activations import statistics_of


def fields(statistics):
    values = dataclasses.asdict(statistics)
    return {**values, "counts": values["counts"].tolist(), "sums": None, "squares": None}


def test_they_are_those_of_all_values(arrays):
    """Independent values: all images kept, and reduced at the end."""
    statistics, values = statistics_of(arrays), np.stack(arrays).astype(np.float64)
    assert (statistics.minimum, statistics.maximum) == (values.min(), values.max())
    assert statistics.count == values.size
    assert statistics.zeros == np.count_nonzero(values == 0) > 140
    assert statistics.mean == pytest.approx(values.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(values.std(), rel=1e-12)
    np.testing.assert_array_equal(statistics.counts, np.histogram(values[values != 0], statistics.edges)[0])
    assert values.max() < statistics.edges[-1] <= 2 * values.max()


def test_they_do_not_depend_on_the_order(arrays):
    expected = statistics_of(arrays)
    for order in itertools.permutations(arrays):
        found = statistics_of(order)
        assert fields(found) == fields(expected)
        assert (found.mean, found.std) == (expected.mean, expected.std)


@pytest.mark.parametrize(
    "value",
    [1.0, -1.0, 0.1, 4096.0, -4096.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.nextafter(np.float32(1), np.float32(0))],
)
def test_one_value_lies_in_its_bin(value):
    statistics = statistics_of([np.zeros(3, np.float32), np.float32([value]), np.float32([value / 3])])
    (bins,) = np.nonzero(statistics.counts)
    below = statistics.edges[bins]
    found = np.unique(np.float64(np.float32([value, value / 3])))
    found = found[found != 0]
    np.testing.assert_array_equal(below <= found, True)
    np.testing.assert_array_equal(found < below + 2.0**statistics.exponent, True)


def test_a_huge_value_after_small_ones():
    small = np.linspace(-1, 1, 500, dtype=np.float32)
    statistics = statistics_of([small, np.float32([1e30])])
    assert statistics.maximum == np.float32(1e30)
    assert statistics.counts[BINS - 1 : BINS + 1].tolist() == [250, 250]
    assert statistics.count == 501


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 1, SAMPLE, -1])
def test_what_is_not_finite_is_seen_wherever_it_is(wrong, index):
    values = np.random.default_rng(0).normal(size=3 * SAMPLE).astype(np.float32)
    assert Seen.of(values).is_finite
    values[index] = wrong
    assert not Seen.of(values).is_finite


@pytest.mark.parametrize("size", [1, 50, SAMPLE, 3 * SAMPLE])
def test_images_counted_together_or_one_by_one_are_the_same(size):
    random = np.random.default_rng(0)
    arrays = [random.normal(0, scale, size).astype(np.float32) for scale in (1, 30, 0.2, 5, 1e-3)]
    expected, found = statistics_of(arrays), Statistics()
    for part in (arrays[:3], arrays[3:]):
        found.update(Seen.joined([Seen.of(values) for values in part]))
    assert fields(found) == fields(expected)
    assert (found.sums, found.squares) == (expected.sums, expected.squares)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
def test_rectified_is_what_the_rectified_values_show(slope):
    values = np.random.default_rng(0).normal(size=2 * SAMPLE).astype(np.float32)
    found = Seen.of(values).rectified(slope)
    expected = Seen.of(np.where(values < 0, np.float32(slope) * values, values))
    assert (found.smallest, found.largest) == (expected.smallest, expected.largest)
    np.testing.assert_array_equal(found.sample, expected.sample)


def test_share_outside_a_range():
    """Independent values: the values themselves, 64 to a bin or thereabouts, a quarter of them 0."""
    values = np.random.default_rng(0).normal(size=(100, SAMPLE)).astype(np.float32)
    values[:, ::4] = 0
    statistics = statistics_of(values)
    assert statistics.zero_share == pytest.approx(0.25)
    for lowest, highest in [(-1, 1), (-0.5, 2), (-1.0, 0.0), (-3, 3)]:
        share = np.mean((values < lowest) | (values > highest))
        assert statistics.share_outside(lowest, highest) == pytest.approx(share, abs=3e-4)
        assert share > 1e-3
    assert statistics.share_outside(statistics.minimum, statistics.maximum) == 0
    assert statistics.share_outside(0.7, 1) == statistics.share_outside(0, 1)  # widened


def test_shares_of_no_values():
    assert math.isnan(Statistics().zero_share)
    assert math.isnan(Statistics().share_outside(-1, 1))


def test_a_large_tensor_is_sampled_evenly_but_its_extremes_are_exact():
    values = np.zeros((1, 32, 40, 40), np.float32)
    values[0, :, :, 7] = 1  # one column of forty
    values[0, 3, 2, 1], values[0, 31, 39, 39] = -9, 9
    statistics = statistics_of([values])
    assert (statistics.minimum, statistics.maximum) == (-9, 9)
    assert SAMPLE / 2 < statistics.count <= SAMPLE
    assert statistics.mean == pytest.approx(1 / 40, rel=0.05)


@pytest.mark.parametrize("size", [1, SAMPLE, SAMPLE + 1, 2 * SAMPLE, 64 * 160 * 160, 58 * 40 * 40, 7919 * 11])
def test_stride_has_no_factor_in_common_with_the_size(size):
    stride = sample_stride(size)
    assert math.gcd(stride, size) == 1
    assert len(range(0, size, stride)) <= SAMPLE
    assert size > SAMPLE or stride == 1


def test_without_a_histogram_only_extremes_are_kept(arrays):
    statistics = Statistics.minmax_only()
    statistics.update(Seen.joined([Seen.of(values) for values in arrays]))
    assert not statistics.has_histogram
    assert (statistics.minimum, statistics.maximum) == (min(map(np.min, arrays)), max(map(np.max, arrays)))
    assert statistics.count == 0
    assert math.isnan(statistics.mean)
    assert math.isnan(statistics.std)


def test_a_file_gives_them_back(tmp_path, model_path, contract, collected):
    path = tmp_path / "statistics"
    save_statistics(path, collected, model_path, contract)
    other_thresholds = dataclasses.replace(contract, score_threshold=0.3, class_names=("a", "b"))
    found = load_statistics(path, model_path, other_thresholds)
    assert found.image_ids == collected.image_ids
    assert list(found.statistics) == list(collected.statistics)
    for name, expected in collected.statistics.items():
        assert fields(found.statistics[name]) == fields(expected)
        assert (found.statistics[name].sums, found.statistics[name].squares) == (expected.sums, expected.squares)
        assert found.statistics[name].counts.dtype == np.int64
        found.statistics[name].update(Seen.of(np.float32([1])))


def test_a_file_without_histograms(tmp_path, model_path, contract, collected):
    del collected.statistics["late"], collected.statistics["early"]
    save_statistics(tmp_path / "s.npz", collected, model_path, contract)
    found = load_statistics(tmp_path / "s.npz", model_path, contract)
    assert fields(found.statistics["flat"]) == fields(collected.statistics["flat"])


def test_statistics_of_another_model_are_refused(tmp_path, model_path, contract, collected):
    save_statistics(tmp_path / "s.npz", collected, model_path, contract)
    other = tmp_path / "other.onnx"
    other.write_bytes(model_path.read_bytes() + b"\0")
    with pytest.raises(CalibrationError, match=r"s\.npz holds statistics of another model .*other\.onnx"):
        load_statistics(tmp_path / "s.npz", other, contract)


@pytest.mark.parametrize(
    ("field", "value"),
    [("channel_order", "bgr"), ("mean", (0.0, 0.0, 0.0)), ("resize", "stretch"), ("pad_value", (1.0, 2.0, 3.0))],
)
def test_statistics_of_other_preprocessing_are_refused(tmp_path, model_path, contract, collected, field, value):
    save_statistics(tmp_path / "s.npz", collected, model_path, contract)
    with pytest.raises(CalibrationError, match=rf"pre-processed otherwise: {field}"):
        load_statistics(tmp_path / "s.npz", model_path, dataclasses.replace(contract, **{field: value}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def write_text(path):
    path.write_text("not statistics")


def write_other_arrays(path):
    with path.open("wb") as file:
        np.savez(file, other=np.zeros(3))


def write_one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def lose(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, write_text, write_other_arrays, write_one_array, lose])
def test_a_damaged_file_is_one_message(tmp_path, model_path, contract, collected, damage):
    save_statistics(tmp_path / "s.npz", collected, model_path, contract)
    damage(tmp_path / "s.npz")
    with pytest.raises(CalibrationError, match=r"cannot read the statistics in .*s\.npz .* Delete it"):
        load_statistics(tmp_path / "s.npz", model_path, contract)


def test_a_file_of_another_version_is_refused(tmp_path, model_path, contract, collected, monkeypatch):
    monkeypatch.setattr("calibration.activation_statistics.SCHEMA_VERSION", 2)
    save_statistics(tmp_path / "s.npz", collected, model_path, contract)
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="schema_version is 2; expected 1"):
        load_statistics(tmp_path / "s.npz", model_path, contract)


def test_missing_tensors_are_named(collected):
    collected.check_tensors(["late"], ["flat", "early"], "s.npz")
    with pytest.raises(CalibrationError, match=r"s\.npz has no statistics of 1 tensors: \['flat'\]"):
        collected.check_tensors(["late", "flat"], [], "s.npz")
    with pytest.raises(CalibrationError, match=r"2 tensors: \['gone', 'lost'\]"):
        collected.check_tensors(["lost"], ["gone"], "s.npz")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("maximum", lambda values: np.full_like(values, 1e300), "float32 numbers"),
        ("maximum", lambda values: np.full_like(values, -5e30), "the two ends of a range"),
        ("maximum", lambda values: values * 2.0**40, "do not go together"),
        ("minimum", lambda values: values * np.nan, "not finite"),
        ("minimum", lambda values: values.astype("U9"), "minimum is of"),
        ("counts", lambda values: values - 1, "below 0"),
        ("counts", lambda values: values[:, :-1], "expected"),
        ("counts", lambda values: np.roll(values, 2000, axis=1), "do not go together"),
        ("zeros", lambda values: values + 2**60, "above"),
        ("exponent", lambda values: values + 5000, "exponent goes from"),
        ("squares", lambda values: None, "squares is missing"),
    ],
)
def test_arrays_that_cannot_be_are_refused(tmp_path, model_path, name, change, message):
    path, contract = tmp_path / "x.statistics.npz", load_contract(model_path)
    seen = Statistics()
    seen.update(Seen.of(np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)))
    save_statistics(path, Collected({"a": seen}, {"0" * 64: 1}), model_path, contract)
    read_statistics(path)
    arrays = dict(np.load(path))
    changed = change(arrays.pop(name))
    np.savez(path, **arrays, **({} if changed is None else {name: changed}))
    with pytest.raises(CalibrationError, match=message):
        read_statistics(path)


def test_where_nothing_is_counted_extremes_alone_are_seen():
    seen = Seen.of(np.array([[-2.0, 0.5], [3.0, 1.0]], np.float32), counted=False)
    assert (seen.smallest, seen.largest, seen.sample.shape) == (-2.0, 3.0, (1, 0))
    joined = Seen.joined([seen, seen.rectified(0.0)])
    assert (joined.smallest, joined.largest, joined.sample.shape) == (-2.0, 3.0, (2, 0))
    statistics = Statistics.minmax_only()
    statistics.update(joined)
    assert (statistics.minimum, statistics.maximum, statistics.count) == (-2.0, 3.0, 0)
