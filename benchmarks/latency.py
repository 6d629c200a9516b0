"""
Command: latency of a model file, one image at a time, stage by stage.

    python -m benchmarks.latency student.int8.onnx --data DIR --role onnx-int8 --threads 2 -o int8.latency.result.json

The clock runs from the decoded image in memory to the detections in its pixels: pre-processing, inference and
post-processing. Warm-up runs are excluded and every sample is kept. An ONNX file needs onnx and onnxruntime, an engine
TensorRT, a run directory the training side (in a process of its own).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import cv2
import numpy as np

from benchmarks.result import STAGES, STATISTICS, write_result
from benchmarks.subject import (
    Subject,
    add_arguments,
    begin_result,
    check_arguments,
    check_fits,
    load_data,
    load_subject,
    run_crosskd,
    spread,
)
from deploy.dataset import CocoSet, read_image
from deploy.errors import ConfigError, MeasurementError, command
from deploy.files import read_json
from deploy.postprocess import postprocess
from deploy.preprocess import preprocess
from deploy.progress import progress
from deploy.session import Session, open_session

IMAGES = 8
UNSTABLE_SPREAD = 0.1
"""Interquartile range over median above which a run is called unstable (as torch.utils.benchmark does)."""

Samples = Dict[str, List[float]]
MEASURED_STAGES = STAGES[:-1]


def summarize(samples_ms: Sequence[float]) -> Dict[str, float]:
    """Median, mean, 90th and 99th percentile (linear between samples, numpy's default), in ms."""
    median, p90, p99 = np.percentile(samples_ms, [50, 90, 99]).tolist()
    return dict(zip(STATISTICS, (median, float(np.mean(samples_ms)), p90, p99)))


def relative_spread(samples_ms: Sequence[float]) -> float:
    """Interquartile range over median: a fraction."""
    low, median, high = np.percentile(samples_ms, [25, 50, 75])
    return float((high - low) / median)


def samples_from_session(session: Session, images: Sequence[np.ndarray], runs: int, warmup: int) -> Samples:
    """
    Stage -> milliseconds of each run, warm-up excluded.

    Args:
        images: each (height, width, 3), uint8, blue-green-red; used in turn.
    """
    samples: Samples = {stage: [] for stage in MEASURED_STAGES}
    contract = session.contract
    for run in progress(range(warmup + runs), warmup + runs, "runs"):
        image = images[run % len(images)]
        start = time.perf_counter()
        prepared = preprocess(image, contract)
        prepared_at = time.perf_counter()
        outputs = session.infer({contract.input_name: prepared.input})
        inferred_at = time.perf_counter()
        postprocess(outputs, contract, prepared)
        end = time.perf_counter()
        if run >= warmup:
            for stage, elapsed_s in zip(
                MEASURED_STAGES, (prepared_at - start, inferred_at - prepared_at, end - inferred_at)
            ):
                samples[stage].append(1e3 * elapsed_s)
    return samples


def samples_from_run_dir(run_dir: Path, data: CocoSet, arguments: argparse.Namespace) -> Mapping[str, Any]:
    """
    `samples_ms` and `description` of a run directory, by the training side's own command.

    Raises:
        MeasurementError: the command failed, or wrote something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        words = [str(run_dir), "--annotations", str(data.annotations_path), "--images-dir", str(data.images_dir)]
        words += ["--runs", str(arguments.runs), "--warmup", str(arguments.warmup), "-o", str(output)]
        words += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
        run_crosskd("crosskd.time_detector", words)
        times = read_json(output, MeasurementError, "the times of crosskd.time_detector")
    samples = times.get("samples_ms") if isinstance(times, dict) else None
    counts = [len(samples.get(stage, ())) for stage in MEASURED_STAGES] if isinstance(samples, dict) else []
    if counts != [arguments.runs] * len(MEASURED_STAGES):
        raise MeasurementError(f"crosskd.time_detector wrote {counts} samples; expected {arguments.runs} of each stage")
    return times


def numbers_from_samples(
    samples: Mapping[str, Sequence[float]], description: str, threads: Optional[int]
) -> Dict[str, Any]:
    """The `numbers` of a result file: summaries per stage and in total, whether the run was stable, the raw samples."""
    samples_ms = {stage: [round(value, 4) for value in samples[stage]] for stage in MEASURED_STAGES}
    samples_ms["total"] = [round(sum(run), 4) for run in zip(*(samples_ms[stage] for stage in MEASURED_STAGES))]
    spread_of_total = relative_spread(samples_ms["total"])
    return {
        "summary_ms": {stage: summarize(samples_ms[stage]) for stage in STAGES},
        "stable": spread_of_total <= UNSTABLE_SPREAD,
        "spread": spread_of_total,
        "threads": threads,
        "description": description,
        "samples_ms": samples_ms,
    }


def _time(subject: Subject, data: CocoSet, arguments: argparse.Namespace) -> Dict[str, Any]:
    if subject.is_run_dir:
        times = samples_from_run_dir(subject.path, data, arguments)
        return numbers_from_samples(times["samples_ms"], str(times.get("description", "torch")), arguments.threads)
    if arguments.threads is not None:
        cv2.setNumThreads(arguments.threads)  # OpenCV resizes with threads of its own
    images = [read_image(image.path) for image in spread(data.images, IMAGES)]
    with open_session(subject.path, threads=arguments.threads) as session:
        check_fits(session.contract, data, subject)
        samples = samples_from_session(session, images, arguments.runs, arguments.warmup)
        return numbers_from_samples(samples, session.description, arguments.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description="Measure the latency of a model file."
    )
    add_arguments(parser)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="runs that count (default: 200)")
    parser.add_argument("--warmup", type=int, default=20, metavar="N", help="runs before these (default: 20)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)")
    return parser


def _check_numbers(arguments: argparse.Namespace, subject: Subject) -> None:
    for flag, least in (("runs", 2), ("warmup", 0), ("threads", 1)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag} is {value}; expected at least {least}")
    if arguments.threads is not None and subject.format == "engine":
        raise ConfigError("--threads has no effect on a TensorRT engine; leave it out")


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, writes the result file, prints the summary, and says so if the run was not stable."""
    arguments = _parser().parse_args(argv)
    role = check_arguments(arguments)
    subject = load_subject(arguments.model)
    _check_numbers(arguments, subject)
    data = load_data(arguments, check_files=False)
    result = begin_result("latency", subject, data, role, min(IMAGES, len(data.images)))
    result["numbers"] = numbers = _time(subject, data, arguments)
    write_result(arguments.output, result, subject.inputs(data))
    print(f"{role}, {numbers['description']}, {arguments.runs} runs")
    for stage in STAGES:
        summary = numbers["summary_ms"][stage]
        print(f"{stage:>12}: " + ", ".join(f"{name} {summary[name]:.2f} ms" for name in STATISTICS))
    if not numbers["stable"]:
        load = f"; load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        print(
            f"UNSTABLE: the interquartile range is {100 * numbers['spread']:.0f} % of the median, above "
            f"{100 * UNSTABLE_SPREAD:.0f} %{load}. Stop other programs, fix the clocks or raise --runs, and repeat."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
