"""
Command: latency of a model file, one image at a time, stage by stage.

    python -m benchmarks.latency student.int8.onnx --data DIR --role onnx-int8 --threads 2 -o int8.latency.result.json
    python -m benchmarks.latency student.engine --data DIR --fps 30 --sweep-streams 1 2 4 -o paced.latency.result.json

The clock of `total` runs from the decoded image in memory to the detections in its pixels: pre-processing, copies to
the device and back, inference, post-processing. Reading the image file is timed apart, since a camera has none. Warm-up
runs are excluded and every sample is kept. torch, ONNX Runtime, OpenVINO and TensorRT go through one loop with the same
images.

What speaks against comparing a result with others is said in it: runs of one image that scatter, clocks that move, a
device that throttled, a machine that others kept busy before it began.

An ONNX file needs onnx and onnxruntime, or openvino with --runtime openvino; an engine TensorRT; a run directory the
training side (in a process of its own). GPU clocks, memory and watts need nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from typing import Any, Dict, List, Mapping, Optional

import cv2

from benchmarks.measuring.result import STAGES, STATISTICS, samples_by_image, write_result
from benchmarks.measuring.subject import (
    SPLIT,
    Subject,
    add_arguments,
    begin_result,
    check_role,
    checked_role,
    load_subject,
)
from benchmarks.measuring.subject_detection import open_detection
from benchmarks.measuring.throughput import sweep
from benchmarks.measuring.timing import (
    IMAGES,
    LatencyOptions,
    add_read,
    device_memory_used_mib,
    measure,
    read_samples,
    spread,
)
from deploy.data_arguments import set_options
from deploy.dataset import CocoSet
from deploy.errors import MeasurementError, command
from deploy.images import read_image
from deploy.machine import usable_cores


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description="Measure the latency of a model file."
    )
    add_arguments(parser)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="runs that count (default: 200)")
    parser.add_argument("--max-warmup-s", type=float, default=30.0, metavar="SECONDS",
                        help="the longest warm-up; it ends when the runs are stable (default: 30)")  # fmt: skip
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: one per usable processor, for every runtime on the CPU)",
    )
    parser.add_argument("--fps", type=float, metavar="N",
                        help="start runs on schedule, as a camera does (default: one after the other)")  # fmt: skip
    parser.add_argument("--sweep-batches", type=int, nargs="+", metavar="N",
                        help="also take the throughput at these batch sizes (a graph of any batch size)")  # fmt: skip
    parser.add_argument("--sweep-streams", type=int, nargs="+", metavar="N",
                        help="also take the throughput with so many sessions at once")  # fmt: skip
    return parser


def options_from_arguments(arguments: argparse.Namespace) -> LatencyOptions:
    """The options that the flags give. Raises ConfigError for what is out of range."""
    return LatencyOptions(
        runs=arguments.runs,
        max_warmup_s=arguments.max_warmup_s,
        threads=arguments.threads,
        fps=arguments.fps,
        sweep_batches=tuple(arguments.sweep_batches or ()),
        sweep_streams=tuple(arguments.sweep_streams or ()),
    )


def _measure(subject: Subject, data: CocoSet, options: LatencyOptions) -> Dict[str, Any]:
    """The `numbers` of the result file."""
    if options.threads is not None:
        cv2.setNumThreads(options.threads)  # OpenCV resizes with threads of its own
    images = [image.path for image in spread(data.images, IMAGES)]
    pixels = [read_image(path) for path in images]
    read_ms = read_samples(images, options.runs)
    gpu_before_mib = device_memory_used_mib()
    with open_detection(subject, data, images, pixels, options.threads, options.sweep_batches) as detection:
        numbers = measure(detection, options, gpu_before_mib)
    add_read(numbers, read_ms)
    numbers["sweep"] = sweep(subject, pixels, options)
    return numbers


def _print(role: str, numbers: Mapping[str, Any], images: int) -> None:
    totals = numbers["samples_ms"]["total"]
    pace = "" if numbers["fps"] is None else f" at {numbers['fps']:g} frames/s, {numbers['late_frames']} late"
    print(f"{role}, {numbers['description']}, {len(totals)} runs{pace} after {numbers['warmup_runs']} of warm-up")
    for stage in STAGES:
        summary = numbers["summary_ms"][stage]
        if summary is not None:
            print(f"{stage:>14}: " + ", ".join(f"{name} {summary[name]:.2f}" for name in STATISTICS) + " ms")
    medians = [statistics.median(own) for own in samples_by_image(totals, images)]
    print(
        f"{'by image':>14}: median {min(medians):.2f} to {max(medians):.2f} ms; runs of the same image scatter by "
        f"{100 * numbers['spread']:.0f} %"
    )
    memory = [f"{part[:-5]} {mib:.0f} MiB" for part, mib in numbers["memory_mib"].items() if mib is not None]
    if memory:
        print(f"{'peak memory':>14}: " + ", ".join(memory))
    power = numbers["power"]
    if power is not None:
        print(
            f"{'power':>14}: idle {power['idle_w']:.1f} W, load {power['load_w']:.1f} W, "
            f"{power['energy_mj_per_inference']:.1f} mJ per inference ({power['source']})"
        )
    else:
        print(f"{'power':>14}: unknown: {numbers['power_reason']}")
    for entry in numbers["sweep"] or []:
        print(f"{entry['images_per_s']:>14.1f} images/s with batch {entry['batch']}, streams {entry['streams']}")
    for reason in numbers["comparable_reasons"]:
        print(f"NOT COMPARABLE: {reason}")


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Measures, writes the result file, prints the summary and what speaks against comparing it."""
    arguments = _parser().parse_args(argv)
    role = checked_role(arguments.model, arguments.role, arguments.output, [arguments.annotations])
    options = options_from_arguments(arguments)
    subject = load_subject(arguments.model, arguments.runtime)
    check_role(role, subject)
    options.check_fit(subject)
    if options.threads is None and subject.takes_threads:
        options = dataclasses.replace(options, threads=usable_cores())  # else each runtime would choose for itself
    data = set_options(arguments, SPLIT).load(check_files=False)
    if not data.images:
        raise MeasurementError(f"{data.annotations_path} names no images; expected at least one to measure on")
    result = begin_result("latency", subject, data, role, min(IMAGES, len(data.images)))
    result["numbers"] = numbers = _measure(subject, data, options)
    write_result(arguments.output, result, subject.inputs(data))
    _print(role, numbers, result["data"]["images"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
