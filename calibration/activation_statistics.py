"""
Statistics of a float model's activations over the calibration images, and the file that keeps them.

Of each tensor: its smallest and largest value, taken over all values; and a histogram, the number of zeros and two
moments, taken over a fixed lattice of at most SAMPLE values per image, since counting each of millions of values would
take longer than the network itself. All of them are sums or extremes of what single images give, and are kept such
that no rounding depends on what came before: the same images give the same statistics in any order, in one go or in
several.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np

from deploy.arrays import arrays_from_npz
from deploy.contract import ModelContract
from deploy.errors import CalibrationError
from deploy.files import AnyPath, replacing, sha256_of
from deploy.schema import check_content

SAMPLE = 4096
"""The most values of one tensor and image that are counted: 2 million over 512 images."""
BINS_LOG2 = 12
BINS = 2**BINS_LOG2
"""Bins on each side of 0; at least half of them lie below the largest absolute value."""
SMALLEST_EXPONENT = -148 - BINS_LOG2
"""log2 of the narrowest width of a bin: that which the smallest positive float32, 2**-149, needs."""
SCHEMA_VERSION = 1
PREPROCESSING = (
    "input_name", "input_shape", "input_type", "channel_order", "mean", "std", "pad_value", "resize",
    "resize_wh_px",
)  # fmt: skip
"""Fields of a contract that change the input of the network, and so the statistics."""
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
LARGEST_EXPONENT = 128 - BINS_LOG2
"""log2 of the width of a bin that the largest float32 needs."""
MOST_COUNTED = 2**53
HEADER = {"model_sha256": str, "preprocessing": dict, "images": {str: int}, "tensors": [str]}
"""Table of the file's header, but for its version."""
ARRAYS: Dict[str, Tuple[str, Tuple[Any, ...]]] = {
    "has_histogram": ("b", ("tensors",)),
    "minimum": ("f", ("tensors",)),
    "maximum": ("f", ("tensors",)),
    "exponent": ("i", ("counted",)),
    "zeros": ("i", ("counted",)),
    "counts": ("i", ("counted", 2 * BINS)),
    "sums": ("f", ("counted", "images")),
    "squares": ("f", ("counted", "images")),
}
"""Table of the file's arrays: name -> kinds of numpy's types, shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """The values of one tensor that one image, or several, give: extremes and a sample."""

    smallest: float
    largest: float
    sample: np.ndarray
    """(images, at most SAMPLE), float32 or integer: the values that are counted; (images, 0) where none are."""

    @classmethod
    def of(cls, values: np.ndarray, counted: bool = True) -> Seen:
        """
        What the values of a tensor for one image show: NaN as smallest and largest if one is NaN.

        Args:
            values: of any shape, float32 or integer, at least one.
            counted: whether a sample is wanted, which costs about as much as the extremes.
        """
        flat = values.reshape(-1)
        sample = flat[:: sample_stride(values.size)] if counted else flat[:0]
        smallest, largest = float(np.minimum.reduce(flat)), float(np.maximum.reduce(flat))
        return cls(smallest, largest, sample[None].copy())  # so that the values themselves can go

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """The extremes and samples of several images together."""
        return cls(
            min(part.smallest for part in parts),
            max(part.largest for part in parts),
            np.concatenate([part.sample for part in parts]),
        )

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite, those outside the sample too."""
        return math.isfinite(self.smallest) and math.isfinite(self.largest)

    def rectified(self, slope: float) -> Seen:
        """
        What a ReLU or LeakyReLU makes of it, in float32 as there.

        Args:
            slope: of negative values, 0 to 1.
        """
        extremes = np.array([self.smallest, self.largest], np.float32)
        # + 0 since a slope of 0 makes -0 of negative values
        (smallest, largest), sample = (np.maximum(x, np.float32(slope) * x) + 0 for x in (extremes, self.sample))
        return Seen(float(smallest), float(largest), sample)


@dataclasses.dataclass(eq=False)
class Statistics:
    """Extremes, histogram and moments of one tensor so far; made empty, then updated image by image."""

    minimum: float = float("inf")
    maximum: float = float("-inf")
    exponent: int = SMALLEST_EXPONENT
    """A bin is 2**exponent wide. It grows with the largest value; being a power of two, bins merge pair by pair."""
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    """(2 * BINS,) int64: non-zero values from edges[i] up to, not including, edges[i + 1]; (0,) where minimum and
    maximum are all that is wanted of the tensor."""
    zeros: int = 0
    """Values that are 0, which every INT8 format here holds exactly."""
    sums: List[float] = dataclasses.field(default_factory=list)
    """Sum of the counted values, for each image. Not added up, since that would round differently in another order."""
    squares: List[float] = dataclasses.field(default_factory=list)
    """Sum of their squares, for each image."""

    @classmethod
    def minmax_only(cls) -> Statistics:
        """Statistics without a histogram, which cost less."""
        return cls(counts=np.zeros(0, np.int64))

    @property
    def has_histogram(self) -> bool:
        return self.counts.size > 0

    @property
    def edges(self) -> np.ndarray:
        """(2 * BINS + 1,) float64: the edges of the bins, in increasing order, 0 in the middle."""
        return np.arange(-BINS, BINS + 1) * 2.0**self.exponent

    @property
    def count(self) -> int:
        """Number of values counted, zeros included."""
        return int(self.counts.sum()) + self.zeros

    @property
    def zero_share(self) -> float:
        """Share of zeros among the values counted; NaN if there are none."""
        return self.zeros / self.count if self.count else float("nan")

    def share_outside(self, lowest: float, highest: float) -> float:
        """
        Share of the values counted that lie outside a range, widened to hold 0; NaN if there are none.

        Those of a bin that the range cuts are taken to be spread evenly over it.
        """
        ends = [
            -math.inf if lowest <= self.minimum else min(lowest, 0.0),
            math.inf if highest >= self.maximum else max(highest, 0.0),
        ]
        below, not_above = np.interp(ends, self.edges, np.append(0, np.cumsum(self.counts)))
        return (int(self.counts.sum()) - (not_above - below)) / self.count if self.count else float("nan")

    @property
    def mean(self) -> float:
        """Mean of the values counted; NaN if there are none."""
        return math.fsum(self.sums) / self.count if self.count else float("nan")

    @property
    def std(self) -> float:
        """Standard deviation of the values counted; NaN if there are none."""
        return math.sqrt(max(0.0, math.fsum(self.squares) / self.count - self.mean**2)) if self.count else float("nan")

    def update(self, seen: Seen) -> None:
        """Takes in what further images show of the tensor, all of it finite."""
        self.minimum, self.maximum = min(self.minimum, seen.smallest), max(self.maximum, seen.largest)
        if self.has_histogram:
            absolute_largest = max(-seen.smallest, seen.largest)
            if absolute_largest > 0:
                self._widen(math.frexp(absolute_largest)[1] - BINS_LOG2)
            self._count(seen.sample)

    def _widen(self, exponent: int) -> None:
        """Makes bins at least 2**exponent wide."""
        steps, self.exponent = exponent - self.exponent, max(exponent, self.exponent)
        if steps <= 0 or not self.counts.any():
            return
        for _ in range(min(steps, BINS_LOG2)):  # then all is in the two bins at 0, where it remains
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([np.zeros(BINS // 2, np.int64), pairs, np.zeros(BINS // 2, np.int64)])

    def _count(self, values: np.ndarray) -> None:
        """
        Counts (images, values), where dividing by a power of two is exact, so that merged bins are, too: in float32
        where it neither overflows nor shrinks a number, which takes half as long, else in float64.
        """
        zeros = int(np.count_nonzero(values == 0))
        bins = (values if self._divides_exactly(values) else values.astype(np.float64)) * 2.0**-self.exponent
        squares = values.astype(np.float64)
        self.sums += squares.sum(axis=1).tolist()
        np.square(squares, out=squares)
        self.squares += squares.sum(axis=1).tolist()
        indices = np.floor(bins, out=bins).astype(np.int16).ravel()  # the quickest to convert to
        indices += BINS
        self.counts += np.bincount(indices, minlength=2 * BINS)
        self.counts[BINS] -= zeros
        self.zeros += zeros

    def _divides_exactly(self, values: np.ndarray) -> bool:
        return values.dtype == np.float32 and -LARGEST_EXPONENT <= self.exponent <= 0


def sample_stride(size: int) -> int:
    """
    Every how many of `size` values, in memory order, one is counted.

    The stride has no factor in common with `size`, hence none with a feature map's channels, rows and columns: the
    sample runs through all of them evenly, where a stride of 8 on 40 columns would see five columns only.
    """
    stride = -(-size // SAMPLE)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


@dataclasses.dataclass
class Collected:
    """Statistics, and the images that they are of."""

    statistics: Dict[str, Statistics]
    """Name of a tensor in the float graph, which is the same for every target -> its statistics."""
    image_ids: Dict[str, int] = dataclasses.field(default_factory=dict)
    """SHA-256 of an image file -> its id in the annotation file that it was chosen from."""

    def check_tensors(self, tensors: Iterable[str], minmax_only: Iterable[str], source: AnyPath) -> None:
        """
        Raises CalibrationError if a tensor is not there, or has no histogram and is not in `minmax_only`.

        Args:
            source: where the statistics come from, for the message.
        """
        missing = sorted(set(minmax_only) - set(self.statistics))
        missing += [
            name for name in tensors if name not in self.statistics or not self.statistics[name].has_histogram
        ]  # fmt: skip
        if missing:
            raise CalibrationError(
                f"{source} has no statistics of {len(missing)} tensors: {missing[:5]}; expected those of every tensor "
                "that gets a range. It was probably collected for another target, or without --max-ap-drop: delete it, "
                "or name another file, and they are collected anew."
            )


def save_statistics(path: AnyPath, collected: Collected, model: AnyPath, contract: ModelContract) -> None:
    """
    Writes the statistics as one .npz file, atomically.

    Args:
        model: the ONNX file that they are of.
        contract: how its images were pre-processed.
    """
    names = list(collected.statistics)
    values = list(collected.statistics.values())
    counted = [entry for entry in values if entry.has_histogram]
    header = {
        "schema_version": SCHEMA_VERSION,
        "model_sha256": sha256_of(model),
        "preprocessing": _preprocessing(contract),
        "images": collected.image_ids,
        "tensors": names,
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            header=np.array(json.dumps(header)),
            minimum=np.array([entry.minimum for entry in values]),
            maximum=np.array([entry.maximum for entry in values]),
            has_histogram=np.array([entry.has_histogram for entry in values]),
            exponent=np.array([entry.exponent for entry in counted]),
            zeros=np.array([entry.zeros for entry in counted]),
            counts=np.array([entry.counts for entry in counted]),
            sums=np.array([entry.sums for entry in counted]),
            squares=np.array([entry.squares for entry in counted]),
        )


def load_statistics(path: AnyPath, model: AnyPath, contract: ModelContract) -> Collected:
    """
    The statistics in a file of `save_statistics`.

    Args:
        model: the ONNX file that they must be of.
        contract: how its images are pre-processed.

    Raises:
        CalibrationError: the file is missing, damaged or of another version; or the statistics are of another model
            or of other pre-processing.
    """
    header, arrays = _read(path)
    _check_same_network(header, path, model, contract)
    return _collected_from_arrays(header, arrays)


def read_statistics(path: AnyPath) -> Collected:
    """
    The statistics in a file of `save_statistics`, whatever model they are of.

    Raises:
        CalibrationError: the file is missing, damaged or of another version.
    """
    return _collected_from_arrays(*_read(path))


def _read(path: AnyPath) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
    """(header, arrays) of a file; raises CalibrationError if it is missing, damaged or of another version."""
    again = "Delete it, and the statistics are collected anew."
    try:
        arrays = arrays_from_npz(path)
        header = json.loads(str(arrays.pop("header")))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CalibrationError(
            f"cannot read the statistics in {path} ({error}); expected a file of calibration.quantize --statistics. "
            f"{again}"
        ) from error
    check_content(header, {"schema_version": int}, path, CalibrationError, again)
    if header["schema_version"] != SCHEMA_VERSION:
        raise CalibrationError(
            f"{path}: schema_version is {header['schema_version']!r}; expected {SCHEMA_VERSION}. {again}"
        )
    check_content(header, HEADER, path, CalibrationError, again)
    fault = _fault_of_arrays(header["tensors"], arrays)
    if fault:
        raise CalibrationError(f"{path}: {fault}. The file is damaged. {again}")
    return header, arrays


def _fault_of_arrays(tensors: List[str], arrays: Dict[str, np.ndarray]) -> str:
    """What of the arrays of a file is missing, of another type or shape, or cannot be; '' if nothing is."""
    if len(set(tensors)) != len(tensors):
        return "it names a tensor twice"
    counted = int(np.count_nonzero(arrays["has_histogram"])) if "has_histogram" in arrays else 0
    rows = {"tensors": len(tensors), "counted": counted, "images": -1}
    for name, (kinds, shape) in ARRAYS.items():
        if name not in arrays:
            return f"the array {name} is missing"
        values = arrays[name]
        if counted == 0 and shape[0] == "counted" and values.size == 0:
            continue  # as numpy makes an array of nothing
        if name == "sums" and values.ndim == 2:
            rows["images"] = values.shape[1]
        expected = tuple(rows.get(size, size) for size in shape)
        if values.dtype.kind not in kinds or values.shape != expected:
            return f"{name} is of {values.dtype} and the shape {values.shape}; expected {expected}"
        if not np.isfinite(values).all():
            return f"{name} has values that are not finite"
    low, high = arrays["minimum"], arrays["maximum"]
    if (low > high).any() or max(np.abs(low).max(initial=0), np.abs(high).max(initial=0)) > LARGEST_FLOAT32:
        return "minimum and maximum are not the two ends of a range of float32 numbers"
    if not counted:
        return ""
    if min(arrays[name].min(initial=0) for name in ("zeros", "counts", "squares")) < 0:
        return "zeros, counts or squares has numbers below 0"
    counts, zeros, exponent = arrays["counts"], arrays["zeros"], arrays["exponent"]
    if counts.max() > MOST_COUNTED or zeros.max() > MOST_COUNTED:
        return f"counts or zeros has numbers above {MOST_COUNTED}"
    if exponent.min() < SMALLEST_EXPONENT or exponent.max() > LARGEST_EXPONENT:
        return f"exponent goes from {exponent.min()} to {exponent.max()}; expected that of float32 numbers"
    # The outermost bins that hold something must reach no further than the extremes, or the file has two stories.
    row = np.flatnonzero(arrays["has_histogram"])
    edges = np.arange(-BINS, BINS + 1)[None] * 2.0 ** exponent[:, None].astype(np.float64)
    seen = counts > 0
    outside = (seen & ((edges[:, 1:] <= low[row, None]) | (edges[:, :-1] > high[row, None]))).any(axis=1)
    beyond = np.maximum(-low[row], high[row]) > BINS * 2.0 ** exponent.astype(np.float64)
    if (outside | beyond).any():
        return f"counts and extremes of {tensors[row[int(np.flatnonzero(outside | beyond)[0])]]!r} do not go together"
    return ""


def _check_same_network(header: Dict[str, Any], path: AnyPath, model: AnyPath, contract: ModelContract) -> None:
    held, expected = header["model_sha256"], sha256_of(model)
    if held != expected:
        raise CalibrationError(
            f"{path} holds statistics of another model (SHA-256 {held[:12]}...); expected those of {model} "
            f"({expected[:12]}...). Name another file with --statistics, and they are collected for this model."
        )
    wanted = json.loads(json.dumps(_preprocessing(contract)))  # tuples become lists, as in the file
    changed = [f"{key} {header['preprocessing'].get(key)} (now {wanted[key]})" for key in PREPROCESSING
               if header["preprocessing"].get(key) != wanted[key]]  # fmt: skip
    if changed:
        raise CalibrationError(
            f"{path} holds statistics of images pre-processed otherwise: {', '.join(changed)}; expected what the "
            f"contract of {model} says. Name another file with --statistics, and they are collected anew."
        )


def _collected_from_arrays(header: Dict[str, Any], arrays: Dict[str, np.ndarray]) -> Collected:
    tensors: Dict[str, Statistics] = {}
    row = 0  # of the arrays that only tensors with a histogram are in
    for index, name in enumerate(header["tensors"]):
        has_histogram = arrays["has_histogram"][index]
        statistics = Statistics() if has_histogram else Statistics.minmax_only()
        statistics.minimum, statistics.maximum = float(arrays["minimum"][index]), float(arrays["maximum"][index])
        if has_histogram:
            statistics.exponent = int(arrays["exponent"][row])
            statistics.counts = arrays["counts"][row].copy()
            statistics.zeros = int(arrays["zeros"][row])
            statistics.sums = arrays["sums"][row].tolist()
            statistics.squares = arrays["squares"][row].tolist()
            row += 1
        tensors[name] = statistics
    return Collected(tensors, header["images"])


def _preprocessing(contract: ModelContract) -> Dict[str, Any]:
    document = contract.to_json()
    return {key: document[key] for key in PREPROCESSING}
