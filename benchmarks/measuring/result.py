"""
Versioned result files: what was measured, of which file, on which images, where, and the numbers.

`accuracy` and `latency` write them, `report` reads them. The versions of the format:

1: the first.
2: every file has the hash of its own content (`content_sha256`). Accuracy: `detections` names the file beside the
   result that holds them, in place of `samples`; `numbers` also has `best_f1`, `best_f1_per_class`, `found_scores`,
   `pr_curves`, `bootstrap` and `against`. Latency: the stages `read`, `host_to_device` and `device_to_host`, null where
   a runtime has none; the statistics `p95` and `max`; whether runs compare, memory, power, throughput.
   Later files of it have `comparable_codes` beside `comparable_reasons`; their `spread` is that of the repetitions of
   each image, where it was that of all runs.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from benchmarks.measuring.coco import METRICS
from deploy.contract import INPUTS, RESULT_VERSION, check_seal, provenance, sealed
from deploy.errors import MeasurementError
from deploy.files import AnyPath, read_json, write_json
from deploy.schema import Choice, FileName, Items, Maybe, Number, Whole, check_content, short

STAGES = ("read", "preprocess", "host_to_device", "inference", "device_to_host", "postprocess", "total")
"""Of a detection. `total` is all of it but for `read`, from the decoded image to the detections."""
STATISTICS = ("median", "mean", "p90", "p95", "p99", "max")
LEAST_RUNS = 10
LEAST_REPETITIONS = 5
"""Runs of an image for it to be looked at by itself."""
UNSTABLE = "unstable"
"""Code of a reason: runs that scatter, which the bounds of a number say already."""
UNSTABLE_SPREAD = 0.1
"""Interquartile range over median above which a run is called unstable (as torch.utils.benchmark does).

Of repetitions: that one image has more candidates than another, and takes longer, says nothing against the machine."""


class Reason(NamedTuple):
    """Why a latency does not compare with others: for programs and for people."""

    code: str
    text: str


MOST = 2**53
"""No number of a result is larger."""
_NUMBER = Number(-MOST, MOST)
_NUMBER_OR_NULL = (_NUMBER, None)
_STRING_OR_NULL = (str, None)
_SHARE = Number(0, 1 + 1e-9)  # a mean may round up
_SHARES = [_SHARE]
_TIMES_MS = Items(Number(0, 1e9))
_COMMON: Dict[str, Any] = {
    "kind": Choice(("accuracy", "latency")),
    "role": str,
    "model": {
        "file": str, "sha256": str, "bytes": Whole(0), "format": str, "runtime": Maybe(_STRING_OR_NULL),
        "parameters": (Whole(0), None), "inputs": INPUTS, "command": [str],
    },
    "data": {
        "annotations": str, "annotations_sha256": str, "images_dir": str, "images": Whole(0), "class_names": [str],
    },
    "environment": {
        "cpu": _STRING_OR_NULL, "cores": (Whole(0), None), "os": _STRING_OR_NULL,
        "machine": Maybe(_STRING_OR_NULL), "gpu": Maybe(_STRING_OR_NULL), "nvpmodel": Maybe(_STRING_OR_NULL),
        str: object,
    },
    "inputs": INPUTS,
    "command": [str],
    "versions": {str: str},
    "created_utc": str,
}  # fmt: skip
_POINT = {
    "score": _NUMBER, "f1": _SHARE, "precision": _SHARE, "recall": _SHARE,
    "true": Whole(0), "false": Whole(0), "missed": Whole(0),
}  # fmt: skip
_CURVES = {"mean": (_SHARES, None), "per_class": {str: (_SHARES, None)}}
_SUMMARY = dict.fromkeys(STATISTICS, Number(0, 1e9))
_KINDS: Dict[str, Dict[str, Any]] = {
    "accuracy": {
        "numbers": {
            **dict.fromkeys(METRICS, (_SHARE, None)),
            "per_class": {str: (_SHARE, None)},
            "best_f1": (_POINT, None),
            "best_f1_per_class": {str: (_POINT, None)},
            "found_scores": {str: [(_NUMBER, None)]},
            "pr_curves": {"AP50": _CURVES, "AP": _CURVES},
            "bootstrap": {"seed": int, "ap": Items((_SHARE, None))},
            "against": (dict, None),
        },
        "detections": {"file": FileName(), "sha256": str, "count": Whole(0)},
    },
    "latency": {
        "numbers": {
            "summary_ms": {**dict.fromkeys(STAGES, (_SUMMARY, None)), "total": _SUMMARY},
            "samples_ms": {**dict.fromkeys(STAGES, (_TIMES_MS, None)), "total": _TIMES_MS},
            "stable": bool,
            "spread": _NUMBER,
            "comparable": bool,
            "comparable_reasons": [str],
            "comparable_codes": Maybe([str]),
            "threads": (Whole(0), None),
            "description": str,
            "warmup_runs": Whole(0),
            "mode": str,
            "fps": _NUMBER_OR_NULL,
            "late_frames": (Whole(0), None),
            "memory_mib": {"host_peak": _NUMBER_OR_NULL, "device_peak": _NUMBER_OR_NULL},
            "power": (
                {
                    "idle_w": _NUMBER,
                    "load_w": _NUMBER,
                    "energy_mj_per_inference": _NUMBER,
                    "energy_above_idle_mj_per_inference": _NUMBER,
                    "source": str,
                },
                None,
            ),
            "power_reason": _STRING_OR_NULL,
            "sweep": ([{"batch": Whole(1), "streams": Whole(1), "images_per_s": _NUMBER}], None),
        },
    },
}


def write_result(path: AnyPath, result: Mapping[str, Any], inputs: Mapping[str, AnyPath]) -> None:
    """
    Writes a result file atomically, with its version and provenance. What `read_result` would refuse is refused here.

    Args:
        inputs: name -> file that was measured or measured with; recorded with its hash.
    """
    document = {"result_version": RESULT_VERSION, **provenance(inputs), **result}
    check_result(document, path)
    write_json(path, sealed(document))


def read_result(path: AnyPath) -> Dict[str, Any]:
    """
    The checked content of a result file.

    Raises:
        MeasurementError: it is missing, truncated, edited, of another version or kind, or lacks a key.
    """
    document = read_json(
        path, MeasurementError, "a result file of benchmarks.accuracy or benchmarks.latency; measure again"
    )
    check_written_result(document, path)
    return document


def check_written_result(document: Any, path: AnyPath) -> None:
    """Raises MeasurementError if `document` is not what `write_result` wrote."""
    check_result(document, path)
    check_seal(document, path)
    if document["kind"] == "accuracy":
        _check_classes(document, path)


def check_result(document: Any, path: AnyPath) -> None:
    """Raises MeasurementError, with the file and the key, if `document` is not a result of a known version and kind."""
    if not isinstance(document, dict) or "result_version" not in document:
        raise MeasurementError(
            f"{path} is not a result file: it has no result_version. Give files that benchmarks wrote."
        )
    if document["result_version"] != RESULT_VERSION:
        raise MeasurementError(
            f"{path}: result_version is {document['result_version']!r}; expected {RESULT_VERSION}. Measure again."
        )
    check_content(document, _COMMON, path, MeasurementError, "Measure again.")
    check_content(document, _KINDS[document["kind"]], path, MeasurementError, "Measure again.")
    numbers = document["numbers"]
    codes = numbers.get("comparable_codes")
    if codes is not None and len(codes) != len(numbers["comparable_reasons"]):
        raise MeasurementError(
            f"{path}: numbers.comparable_codes is {codes!r:.80}; expected one for each of comparable_reasons. "
            "Measure again."
        )


def numbers_from_samples(
    samples: Mapping[str, Sequence[float]], description: str, threads: Optional[int], images: int
) -> Dict[str, Any]:
    """
    What the `numbers` of a latency result say of its samples; a stage that has none is None.

    Args:
        samples: stage -> milliseconds of each run. threads: of the CPU; None for what runs on a GPU.
        images: how many took turns in the runs.
    """
    samples_ms = {
        stage: [round(value, 4) for value in samples[stage]] if stage in samples else None for stage in STAGES
    }
    spread_of_total = repetition_spread(samples["total"], images)
    return {
        "summary_ms": {stage: summarize(values) if values else None for stage, values in samples_ms.items()},
        "stable": spread_of_total <= UNSTABLE_SPREAD,
        "spread": spread_of_total,
        "threads": threads,
        "description": description,
        "samples_ms": samples_ms,
    }


def reasons_from_spread(spread: float) -> List[Reason]:
    """The reason against comparing runs of this `repetition_spread`, if they scatter too much."""
    if spread <= UNSTABLE_SPREAD:
        return []
    wide = f"the interquartile range is {100 * spread:.0f} % of the median, above {100 * UNSTABLE_SPREAD:.0f} %"
    return [Reason(UNSTABLE, f"it is unstable: {wide}, in runs of the same image")]


def numbers_from_reasons(reasons: Sequence[Reason]) -> Dict[str, Any]:
    """What the `numbers` of a latency result say of whether it compares with others."""
    return {
        "comparable": not reasons,
        "comparable_reasons": [reason.text for reason in reasons],
        "comparable_codes": [reason.code for reason in reasons],
    }


def reasons_from_numbers(numbers: Mapping[str, Any]) -> List[Reason]:
    """Why a latency does not compare with others, from the `numbers` of its result."""
    texts = numbers["comparable_reasons"]
    codes = numbers.get("comparable_codes")
    if codes is None:  # a file from before there were codes, when all reasons of this kind began with these words
        codes = [UNSTABLE if text.startswith("it is unstable") else "other" for text in texts]
    return [Reason(code, text) for code, text in zip(codes, texts)]


def check_same_data(read: Sequence[Tuple[AnyPath, Mapping[str, Any]]]) -> None:
    """Raises MeasurementError if the results are of different annotations, classes or numbers of evaluated images."""
    for key in ("annotations_sha256", "class_names", "images"):
        of_kind = [pair for pair in read if key != "images" or pair[1]["kind"] == "accuracy"]
        for path, result in of_kind[1:]:
            first_path, first = of_kind[0]
            if result["data"][key] != first["data"][key]:
                raise MeasurementError(
                    f"{path} and {first_path} differ in data.{key}: "
                    f"{result['data'][key]!r:.80} and {first['data'][key]!r:.80}. "
                    "Numbers from different data do not compare: measure all models on the same images."
                )


def _check_classes(document: Mapping[str, Any], path: AnyPath) -> None:
    """Raises MeasurementError unless each number by class is there for every class, and no other."""
    names, numbers = set(document["data"]["class_names"]), document["numbers"]
    by_class = {key: numbers[key] for key in ("per_class", "best_f1_per_class", "found_scores")}
    by_class.update({f"pr_curves.{kind}.per_class": one["per_class"] for kind, one in numbers["pr_curves"].items()})
    for key, values in by_class.items():
        if set(values) != names:
            wrong = sorted(set(values) ^ names)[0]
            raise MeasurementError(
                f"{path}: numbers.{key} and data.class_names do not name the same classes, {short(wrong)} for one; "
                "expected one entry for each. Measure again."
            )


def summarize(samples_ms: Sequence[float]) -> Dict[str, float]:
    """Median, mean, 90th, 95th and 99th percentile (linear between samples, numpy's default) and maximum, in ms."""
    median, p90, p95, p99 = np.percentile(samples_ms, [50, 90, 95, 99]).tolist()
    return dict(zip(STATISTICS, (median, float(np.mean(samples_ms)), p90, p95, p99, float(max(samples_ms)))))


def samples_by_image(samples_ms: Sequence[float], images: int) -> List[np.ndarray]:
    """
    The samples of each image, where `images` took turns.

    With fewer than LEAST_REPETITIONS of each, nothing can be said of an image alone, and all count as one.
    """
    values_ms = np.asarray(samples_ms, np.float64)
    groups = images if 0 < LEAST_REPETITIONS * images <= len(values_ms) else 1
    return [values_ms[first::groups] for first in range(groups)]


def repetition_spread(samples_ms: Sequence[float], images: int) -> float:
    """`relative_spread` of the repetitions of the same image: of each sample over the median of its image."""
    return relative_spread(np.concatenate([own / np.median(own) for own in samples_by_image(samples_ms, images)]))


def relative_spread(samples_ms: Sequence[float]) -> float:
    """Interquartile range over median: a fraction."""
    low, median, high = np.percentile(samples_ms, [25, 50, 75])
    return float((high - low) / median)
