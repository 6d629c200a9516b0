"""
Command: latency of a model file, one image at a time, stage by stage.

    python -m benchmarks.latency student.int8.onnx --data DIR --role onnx-int8 --threads 2 -o int8.latency.result.json
    python -m benchmarks.latency student.engine --data DIR --fps 30 --sweep-streams 1 2 4 -o paced.latency.result.json

The clock of `total` runs from the decoded image in memory to the detections in its pixels: pre-processing, copies to
the device and back, inference, post-processing. Reading the image file is timed apart, since a camera has none. Warm-up
runs are excluded and every sample is kept. torch, ONNX Runtime and TensorRT go through one loop with the same images.

What speaks against comparing a result with others is said in it: runs that scatter, clocks that move, a device that
throttled, a machine that others kept busy before it began.

An ONNX file needs onnx and onnxruntime, an engine TensorRT, a run directory the training side (in a process of its
own). GPU clocks, memory and watts need nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import cv2
import numpy as np

from benchmarks.measuring.environment import (
    GPU_SLOWDOWNS,
    Gpu,
    NotHere,
    busy_cores,
    clock_reasons,
    jetson_gpus,
    open_gpu,
    process_memory_mib,
    reset_peak_memory,
    thermal_limits,
    throttle_count,
    usable_cores,
)
from benchmarks.measuring.power import Monitor, PowerSource, open_power, power_from_readings
from benchmarks.measuring.result import (
    LEAST_RUNS,
    STAGES,
    STATISTICS,
    UNSTABLE,
    UNSTABLE_SPREAD,
    relative_spread,
    summarize,
    write_result,
)
from benchmarks.measuring.subject import (
    Subject,
    add_arguments,
    begin_result,
    check_arguments,
    check_fits,
    load_data,
    load_subject,
    spread,
)
from deploy.commands import process_words, relay
from deploy.dataset import CocoSet, read_image
from deploy.errors import ConfigError, MeasurementError, command
from deploy.progress import progress
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Session, open_session

IMAGES = 8
WARMUP_WINDOW = 5
WARMUP_AGREEMENT = 0.05
"""Warm-up ends when the medians of its last two windows of runs differ by no more than this part."""
LEAST_WARMUP_S = 1.0
"""A GPU takes this long to raise its clocks, whatever the number of runs; NVML averages its power over as long."""
REST_S = 1.0
IDLE_S = 2.0
"""At rest before the warm-up: how long it settles and the load of others is taken; then, how long idle power is."""
OTHERS_CORES = 0.25
"""Processors that others may keep busy before a run is called disturbed."""
MOVING_CLOCK = 0.02
"""Part by which the GPU's clock may differ between readings and still count as locked."""
SWEEP_WARMUP = 3

Times = Dict[str, float]
"""Stage -> milliseconds, of one run."""
Samples = Dict[str, List[float]]


# Statistics


def numbers_from_samples(
    samples: Mapping[str, Sequence[float]], description: str, threads: Optional[int]
) -> Dict[str, Any]:
    """The part of a result's `numbers` that follows from the samples; a stage that has none is None."""
    samples_ms = {
        stage: [round(value, 4) for value in samples[stage]] if stage in samples else None for stage in STAGES
    }
    spread_of_total = relative_spread(samples["total"])
    return {
        "summary_ms": {stage: summarize(values) if values else None for stage, values in samples_ms.items()},
        "stable": spread_of_total <= UNSTABLE_SPREAD,
        "spread": spread_of_total,
        "threads": threads,
        "description": description,
        "samples_ms": samples_ms,
    }


# What is run


class Detection:
    """
    A model that detects in one of a few images per call and times its stages.

    Attributes:
        description: what runs it where, in words.
        on_gpu: whether the network runs on a GPU.
    """

    description: str
    on_gpu: bool

    def run(self, number: int) -> Times:
        """The milliseconds of each stage, and in `total` from the decoded image to its detections."""
        raise NotImplementedError

    def memory_mib(self) -> Optional[float]:
        """The most host memory so far beyond what there was before the model was opened; None but on Linux."""
        raise NotImplementedError


class SessionDetection(Detection):
    """An ONNX file or an engine, in this process. To be opened by `open_detection`, before which memory is taken."""

    def __init__(
        self, session: Session, pixels: Sequence[np.ndarray], on_gpu: bool, before_mib: Optional[float]
    ) -> None:
        self.description, self.on_gpu = session.description, on_gpu
        self._session, self._pixels, self._before_mib = session, pixels, before_mib

    def run(self, number: int) -> Times:
        contract, image = self._session.contract, self._pixels[number % len(self._pixels)]
        times_ms: Times = {}
        start = time.perf_counter()
        prepared = preprocess(image, contract)
        prepared_at = time.perf_counter()
        outputs = self._session.infer({contract.input_name: prepared.input}, times_ms)
        inferred_at = time.perf_counter()
        postprocess(outputs, contract, prepared)
        end = time.perf_counter()
        return {
            "preprocess": 1e3 * (prepared_at - start),
            **times_ms,
            "postprocess": 1e3 * (end - inferred_at),
            "total": 1e3 * (end - start),
        }

    def memory_mib(self) -> Optional[float]:
        now = process_memory_mib(os.getpid())
        return None if now is None or self._before_mib is None else now[1] - self._before_mib


class TorchDetection(Detection):
    """
    A run directory, in a process of `crosskd.workers.time_detector`, which may import torch: it detects when told to.

    Raises:
        MeasurementError: that process failed; the message is its own.
    """

    def __init__(self, run_dir: Path, images: Sequence[Path], threads: Optional[int]) -> None:
        words = [str(run_dir), *map(str, images)] + (["--threads", str(threads)] if threads is not None else [])
        self._message = ""
        self._process: Any = subprocess.Popen(
            process_words("crosskd.workers.time_detector", *words),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        self._relay = threading.Thread(target=self._follow, daemon=True)
        self._relay.start()
        try:
            self._answer("starting")
            memory = process_memory_mib(self._process.pid)
            self._before_mib = memory[0] if memory else None
            ready = self._answer("description", "on_gpu")
        except BaseException:
            self.close()
            raise
        self.description, self.on_gpu = str(ready["description"]), bool(ready["on_gpu"])

    def _follow(self) -> None:
        self._message = relay(self._process.stderr)

    def _answer(self, *keys: str) -> Dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._relay.join()
            raise MeasurementError(
                self._message or f"crosskd.workers.time_detector ended with status {status}: its output is above"
            )
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or any(key not in answer for key in keys):
            raise MeasurementError(
                f"crosskd.workers.time_detector wrote {line.strip()[:80]!r}; expected JSON with {list(keys)}"
            )
        return answer

    def run(self, number: int) -> Times:
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and `_answer` says why
        return self._answer("preprocess", "inference", "postprocess", "total")

    def memory_mib(self) -> Optional[float]:
        now = process_memory_mib(self._process.pid)
        return None if now is None or self._before_mib is None else now[1] - self._before_mib

    def close(self) -> None:
        """Ends the process: it stops by itself when its input does."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def open_detection(
    subject: Subject,
    data: CocoSet,
    images: Sequence[Path],
    pixels: Sequence[np.ndarray],
    arguments: argparse.Namespace,
) -> Iterator[Detection]:
    """The detection of whatever `subject` is, in these images; `pixels` are the same, decoded."""
    if subject.is_run_dir:
        with contextlib.closing(TorchDetection(subject.path, images, arguments.threads)) as detection:
            yield detection
        return
    memory = process_memory_mib(os.getpid()) if reset_peak_memory() else None
    with open_session(subject.path, threads=arguments.threads) as session:
        check_fits(session.contract, data, subject)
        fewest, most = session.batch_limits
        if not all(fewest <= batch <= most for batch in arguments.sweep_batches or []):
            takes = str(most) if fewest == most else f"{fewest} to {most}"
            raise ConfigError(
                f"--sweep-batches is {arguments.sweep_batches}, but {subject.path} takes {takes} images at once; leave "
                "the others out, or export and build it for them"
            )
        yield SessionDetection(session, pixels, subject.format == "engine", memory[0] if memory else None)


# How it is run


class Pace:
    """When the runs start: one after the other, or on a schedule of so many frames per second."""

    def __init__(self, fps: Optional[float]) -> None:
        self._fps = fps
        self._due_s: Optional[float] = None

    def wait(self) -> bool:
        """Sleeps until the next frame is due. True if it was due before: it is late, and none is left out."""
        if self._fps is None:
            return False
        now_s = time.perf_counter()
        due_s = now_s if self._due_s is None else self._due_s
        self._due_s = due_s + 1 / self._fps
        if now_s < due_s:
            time.sleep(due_s - now_s)
        return now_s > due_s


def warm_up(run: Callable[[int], Times], pace: Pace, most_s: float) -> Tuple[int, bool]:
    """(runs made, whether they became stable), after `most_s` seconds at most; see WARMUP_AGREEMENT."""
    start = time.perf_counter()
    totals: List[float] = []
    while time.perf_counter() - start < most_s:
        pace.wait()
        totals.append(run(len(totals))["total"])
        if len(totals) < 2 * WARMUP_WINDOW or time.perf_counter() - start < LEAST_WARMUP_S:
            continue
        older = statistics.median(totals[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
        newer = statistics.median(totals[-WARMUP_WINDOW:])
        if abs(newer - older) <= WARMUP_AGREEMENT * older:
            return len(totals), True
    return len(totals), False


def take_samples(run: Callable[[int], Times], pace: Pace, runs: int) -> Tuple[Samples, int]:
    """(stage -> milliseconds of each run, how many started late)."""
    samples: Samples = {}
    late = 0
    for number in progress(range(runs), runs, "runs"):
        late += pace.wait()
        for stage, value_ms in run(number).items():
            samples.setdefault(stage, []).append(value_ms)
    return samples, late


def read_samples(images: Sequence[Path], runs: int) -> List[float]:
    """Milliseconds to read and decode an image file, of `runs` files in turn."""
    samples = []
    for number in range(runs):
        start = time.perf_counter()
        read_image(images[number % len(images)])
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


# The sweep


def throughput(
    opener: Callable[[], ContextManager[Session]], pixels: Sequence[np.ndarray], batch: int, streams: int, images: int
) -> float:
    """
    Images per second, from decoded images to detections, with `streams` threads that each hold a session.

    Args:
        opener: opens a session.
        batch: images per inference.
        images: how many in all; more, where they do not share out evenly.
    """
    rounds = max(1, math.ceil(images / (batch * streams)))
    together = threading.Barrier(streams)

    def stream() -> Tuple[float, float]:
        try:
            with opener() as session:  # in the thread that uses it, as CUDA's contexts want it
                for number in range(SWEEP_WARMUP):
                    _detect_batch(session, pixels, batch, number)
                together.wait()
                start = time.perf_counter()
                for number in range(rounds):
                    _detect_batch(session, pixels, batch, number)
                return start, time.perf_counter()
        except BaseException:
            together.abort()  # or the others would wait for ever
            raise

    with ThreadPoolExecutor(streams) as pool:
        futures = [pool.submit(stream) for _ in range(streams)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    spans = [future.result() for future in futures]
    return rounds * batch * streams / (max(end for _, end in spans) - min(start for start, _ in spans))


def _detect_batch(session: Session, pixels: Sequence[np.ndarray], batch: int, number: int) -> None:
    contract = session.contract
    prepared = [preprocess(pixels[(number * batch + index) % len(pixels)], contract) for index in range(batch)]
    outputs = session.infer({contract.input_name: np.concatenate([one.input for one in prepared])})
    for index, one in enumerate(prepared):
        postprocess(outputs, contract, one, index)


def sweep(
    subject: Subject, pixels: Sequence[np.ndarray], arguments: argparse.Namespace
) -> Optional[List[Dict[str, Any]]]:
    """`batch`, `streams` and `images_per_s` of each combination that was asked for; None if none was."""
    if arguments.sweep_batches is None and arguments.sweep_streams is None:
        return None
    opener = functools.partial(open_session, subject.path, threads=arguments.threads)
    pairs = [(batch, streams) for batch in arguments.sweep_batches or [1] for streams in arguments.sweep_streams or [1]]
    return [
        {
            "batch": batch,
            "streams": streams,
            "images_per_s": round(throughput(opener, pixels, batch, streams, arguments.runs), 3),
        }
        for batch, streams in progress(pairs, len(pairs), "sweep")
    ]


# The measurement


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is read of the device while it is measured; None what cannot be."""

    gpu: Optional[Gpu]
    power: Optional[PowerSource]
    power_reason: Optional[str]
    """Why there is no power."""

    def readers(self) -> Dict[str, Callable[[], Optional[float]]]:
        readers: Dict[str, Callable[[], Optional[float]]] = {}
        if self.gpu is not None:
            readers.update(clock_mhz=self.gpu.clock_mhz, slowdowns=self.gpu.slowdowns, used_mib=self.gpu.used_mib)
        if self.power is not None:
            readers["watts"] = self.power.watts
        return readers


@contextlib.contextmanager
def open_watch(on_gpu: bool) -> Iterator[Watch]:
    """What can be read on this machine of a model that runs on its GPU, or does not."""
    gpu, power, reason = None, None, None
    if on_gpu:
        with contextlib.suppress(NotHere):
            gpu = open_gpu()
    try:
        power = open_power(on_gpu)
    except NotHere as error:
        reason = str(error)
    try:
        yield Watch(gpu, power, reason)
    finally:
        if power is not None:
            power.close()


def gpu_reasons(clocks_mhz: Sequence[float], slowdowns: Sequence[float]) -> List[str]:
    """What the readings of a GPU say against comparing the run."""
    reasons = []
    seen = functools.reduce(lambda bits, more: bits | int(more), slowdowns, 0)
    held = [words for bit, words in GPU_SLOWDOWNS.items() if seen & bit]
    if held:
        reasons.append(f"the GPU was slowed down by {' and '.join(held)}")
    if clocks_mhz and min(clocks_mhz) < (1 - MOVING_CLOCK) * max(clocks_mhz):
        reasons.append(
            f"the GPU's clock moved between {min(clocks_mhz):.0f} and {max(clocks_mhz):.0f} MHz: lock it with "
            "nvidia-smi --lock-gpu-clocks"
        )
    return reasons


def measure(detection: Detection, arguments: argparse.Namespace, gpu_before_mib: Optional[float]) -> Dict[str, Any]:
    """The `numbers` of a result file but for `read` and `sweep`."""
    with open_watch(detection.on_gpu) as watch, Monitor(watch.readers()) as monitor:
        others = busy_cores(REST_S)
        rested_s = time.perf_counter()
        if watch.power is not None:
            time.sleep(IDLE_S)
        throttled, warm_up_s = throttle_count(), time.perf_counter()
        warmup_runs, warm = warm_up(detection.run, Pace(arguments.fps), arguments.max_warmup_s)
        start_s = time.perf_counter()
        samples, late = take_samples(detection.run, Pace(arguments.fps), arguments.runs)
        end_s = time.perf_counter()
        monitor.read_once()
        throttled, hot = throttle_count() - throttled, thermal_limits()
        host_peak = detection.memory_mib()
        idle_w = monitor.between("watts", rested_s, warm_up_s)
        load_w = monitor.between("watts", start_s, end_s)
        # With the reading behind the last run, since a short one has none of its own.
        clocks, slowdowns = (monitor.between(name, start_s, math.inf) for name in ("clock_mhz", "slowdowns"))
        used_mib = monitor.between("used_mib", warm_up_s, math.inf)
    numbers = numbers_from_samples(samples, detection.description, arguments.threads)
    reasons = clock_reasons(detection.on_gpu) + gpu_reasons(clocks, slowdowns)
    if detection.on_gpu and not (clocks and slowdowns) and not jetson_gpus():
        reasons.append(
            "the GPU's clocks and slow-downs could not be read: install nvidia-ml-py; with several GPUs set "
            "CUDA_VISIBLE_DEVICES to a UUID"
        )
    if not numbers["stable"]:
        reasons.append(
            f"{UNSTABLE}: the interquartile range is {100 * numbers['spread']:.0f} % of the median, above "
            f"{100 * UNSTABLE_SPREAD:.0f} %"
        )
    if not warm:
        reasons.append(f"the warm-up of {warmup_runs} runs did not become stable; raise --max-warmup-s")
    if others is not None and others > OTHERS_CORES:
        reasons.append(f"other programs kept {others:.1f} processors busy before it began")
    if throttled:
        reasons.append("the device throttled")  # each of its events is counted for every core
    if hot:
        reasons.append(f"the device was too hot at the end: {' and '.join(hot)} held its clocks down")
    power, power_reason = None, watch.power_reason
    if watch.power is not None:
        try:
            seconds = (end_s - start_s) / arguments.runs
            power = power_from_readings(idle_w, load_w, seconds, watch.power.description)
        except NotHere as error:
            power_reason = str(error)
    device_peak = max(used_mib) - gpu_before_mib if used_mib and gpu_before_mib is not None else None
    return {
        **numbers,
        "comparable": not reasons,
        "comparable_reasons": reasons,
        "warmup_runs": warmup_runs,
        "mode": "back-to-back" if arguments.fps is None else "paced",
        "fps": arguments.fps,
        "late_frames": None if arguments.fps is None else late,
        "memory_mib": {"host_peak": _rounded(host_peak), "device_peak": _rounded(device_peak)},
        "power": power,
        "power_reason": power_reason,
    }


def _rounded(value: Optional[float]) -> Optional[float]:
    return None if value is None else round(value, 1)


def _used_by_others_mib() -> Optional[float]:
    try:
        return open_gpu().used_mib()
    except NotHere:
        return None


def _time(subject: Subject, data: CocoSet, arguments: argparse.Namespace) -> Dict[str, Any]:
    if arguments.threads is not None:
        cv2.setNumThreads(arguments.threads)  # OpenCV resizes with threads of its own
    images = [image.path for image in spread(data.images, IMAGES)]
    pixels = [read_image(path) for path in images]
    read_ms = read_samples(images, arguments.runs)
    gpu_before_mib = _used_by_others_mib()
    with open_detection(subject, data, images, pixels, arguments) as detection:
        numbers = measure(detection, arguments, gpu_before_mib)
    numbers["samples_ms"]["read"] = [round(value, 4) for value in read_ms]
    numbers["summary_ms"]["read"] = summarize(read_ms)
    numbers["sweep"] = sweep(subject, pixels, arguments)
    return numbers


# The command


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
        help="CPU threads (default: one per usable processor, for ONNX Runtime and torch alike)",
    )
    parser.add_argument("--fps", type=float, metavar="N",
                        help="start runs on schedule, as a camera does (default: one after the other)")  # fmt: skip
    parser.add_argument("--sweep-batches", type=int, nargs="+", metavar="N",
                        help="also take the throughput at these batch sizes (a graph of any batch size)")  # fmt: skip
    parser.add_argument("--sweep-streams", type=int, nargs="+", metavar="N",
                        help="also take the throughput with so many sessions at once")  # fmt: skip
    return parser


def _check_numbers(arguments: argparse.Namespace, subject: Subject) -> None:
    for flag, least in (("runs", LEAST_RUNS), ("max_warmup_s", 0), ("threads", 1)):
        value = getattr(arguments, flag)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; expected at least {least}")
    if arguments.fps is not None and not 0 < arguments.fps < math.inf:
        raise ConfigError(f"--fps is {arguments.fps}; expected a positive number of frames per second")
    if arguments.threads is not None and subject.format == "engine":
        raise ConfigError("--threads has no effect on a TensorRT engine; leave it out")
    for flag in ("sweep_batches", "sweep_streams"):
        words, values = "--" + flag.replace("_", "-"), getattr(arguments, flag)
        if values is None:
            continue
        if min(values) < 1:
            raise ConfigError(f"{words} is {values}; expected at least 1 each")
        if subject.is_run_dir:
            raise ConfigError(f"{words} is for .onnx and .engine files; {subject.path} is a run directory")


def _print(role: str, numbers: Mapping[str, Any], runs: int) -> None:
    pace = "" if numbers["fps"] is None else f" at {numbers['fps']:g} frames/s, {numbers['late_frames']} late"
    print(f"{role}, {numbers['description']}, {runs} runs{pace} after {numbers['warmup_runs']} of warm-up")
    for stage in STAGES:
        summary = numbers["summary_ms"][stage]
        if summary is not None:
            print(f"{stage:>14}: " + ", ".join(f"{name} {summary[name]:.2f}" for name in STATISTICS) + " ms")
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
    role = check_arguments(arguments)
    subject = load_subject(arguments.model)
    _check_numbers(arguments, subject)
    if arguments.threads is None and subject.format != "engine":
        arguments.threads = usable_cores()  # else each runtime would choose for itself
    data = load_data(arguments, check_files=False)
    if not data.images:
        raise MeasurementError(f"{data.annotations_path} names no images; expected at least one to measure on")
    result = begin_result("latency", subject, data, role, min(IMAGES, len(data.images)))
    result["numbers"] = numbers = _time(subject, data, arguments)
    write_result(arguments.output, result, subject.inputs(data))
    _print(role, numbers, arguments.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
