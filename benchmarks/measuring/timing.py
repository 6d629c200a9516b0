"""
Latency: how runs are warmed up, paced and sampled, and what is read of the device meanwhile.

Warm-up runs are excluded and every sample is kept. What speaks against comparing a result with others is said in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

from benchmarks.measuring.detection import Detection, Times
from benchmarks.measuring.environment import (
    GPU_SLOWDOWNS,
    Gpu,
    NotHere,
    busy_cores,
    clock_reasons,
    gpu_clock_mhz,
    jetson_gpus,
    open_gpu,
    thermal_limits,
    throttle_count,
)
from benchmarks.measuring.power import Monitor, PowerSource, open_power, power_from_readings
from benchmarks.measuring.result import (
    LEAST_RUNS,
    Reason,
    numbers_from_reasons,
    numbers_from_samples,
    reasons_from_spread,
    summarize,
)
from deploy.errors import ConfigError
from deploy.images import read_image
from deploy.progress import progress

if TYPE_CHECKING:
    from benchmarks.measuring.subject import Subject

T = TypeVar("T")
IMAGES = 8
"""Images of the data that are detected in, in turn."""
WARMUP_WINDOW = 5
WARMUP_AGREEMENT = 0.05
"""Warm-up ends when the medians of its last two windows of runs, each of the same images, differ by no more."""
LEAST_WARMUP_S = 1.0
"""A GPU takes this long to raise its clocks, whatever the number of runs; NVML averages its power over as long."""
REST_S = 1.0
IDLE_S = 2.0
"""At rest before the warm-up: how long it settles and the load of others is taken; then, how long idle power is."""
OTHERS_CORES = 0.25
"""Processors that others may keep busy before a run is called disturbed."""
MOVING_CLOCK = 0.02
"""Part by which the GPU's clock may differ between readings and still count as locked."""

Samples = Dict[str, List[float]]
"""Stage -> milliseconds, of each run."""


@dataclasses.dataclass(frozen=True)
class LatencyOptions:
    """
    How latency is measured.

    Raises:
        ConfigError: a number is out of range.
    """

    runs: int = 200
    """Runs that count."""
    max_warmup_s: float = 30.0
    """The longest warm-up, in seconds; it ends before when the runs are stable."""
    threads: Optional[int] = None
    """CPU threads; None for what runs on a GPU."""
    fps: Optional[float] = None
    """Frames per second at which runs start, as a camera does; None: one after the other."""
    sweep_batches: Tuple[int, ...] = ()
    """Batch sizes at which the throughput is taken as well."""
    sweep_streams: Tuple[int, ...] = ()
    """Numbers of sessions at once at which the throughput is taken as well."""

    def __post_init__(self) -> None:
        for flag, least in (("runs", LEAST_RUNS), ("max_warmup_s", 0), ("threads", 1)):
            value = getattr(self, flag)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"--{flag.replace('_', '-')} is {value}; expected at least {least}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"--fps is {self.fps}; expected a positive number of frames per second")
        for flag, values in self._sweeps():
            if min(values) < 1:
                raise ConfigError(f"{flag} is {list(values)}; expected at least 1 each")

    def check_fit(self, subject: Subject) -> None:
        """Raises ConfigError for an option that has no meaning for this model."""
        if self.threads is not None and not subject.takes_threads:
            raise ConfigError(f"--threads has no effect on {subject.path}, which runs on a GPU; leave it out")
        for flag, _ in self._sweeps():
            if subject.is_run_dir:
                raise ConfigError(f"{flag} is for .onnx and .engine files; {subject.path} is a run directory")

    def _sweeps(self) -> List[Tuple[str, Tuple[int, ...]]]:
        given = (("--sweep-batches", self.sweep_batches), ("--sweep-streams", self.sweep_streams))
        return [(flag, values) for flag, values in given if values]


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


def warm_up(run: Callable[[int], Times], pace: Pace, most_s: float, images: int) -> Tuple[int, bool]:
    """(runs made, whether they became stable), after `most_s` seconds at most; `images` take turns."""
    window = images * math.ceil(WARMUP_WINDOW / images)
    start = time.perf_counter()
    totals: List[float] = []
    while time.perf_counter() - start < most_s:
        pace.wait()
        totals.append(run(len(totals))["total"])
        if len(totals) < 2 * window or time.perf_counter() - start < LEAST_WARMUP_S:
            continue
        older = statistics.median(totals[-2 * window : -window])
        newer = statistics.median(totals[-window:])
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


def spread(items: Sequence[T], count: int) -> List[T]:
    """At most `count` of `items`, evenly spread from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def add_read(numbers: Dict[str, Any], read_ms: Sequence[float]) -> None:
    """Adds what `read_samples` gave to the `numbers` of a result file."""
    numbers["samples_ms"]["read"] = [round(value, 4) for value in read_ms]
    numbers["summary_ms"]["read"] = summarize(read_ms)


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is read of the device while it is measured; None what cannot be."""

    on_gpu: bool
    gpu: Optional[Gpu]
    power: Optional[PowerSource]
    power_reason: Optional[str]
    """Why there is no power."""

    def readers(self) -> Dict[str, Callable[[], Optional[float]]]:
        readers: Dict[str, Callable[[], Optional[float]]] = {}
        if self.on_gpu:
            readers["clock_mhz"] = lambda: gpu_clock_mhz(self.gpu)
        if self.gpu is not None:
            readers.update(slowdowns=self.gpu.slowdowns, used_mib=self.gpu.used_mib)
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
        yield Watch(on_gpu, gpu, power, reason)
    finally:
        if power is not None:
            power.close()


def gpu_reasons(clocks_mhz: Sequence[float], slowdowns: Sequence[float]) -> List[Reason]:
    """What the readings of a GPU say against comparing the run."""
    reasons: List[Reason] = []
    seen = functools.reduce(lambda bits, more: bits | int(more), slowdowns, 0)
    held = [words for bit, words in GPU_SLOWDOWNS.items() if seen & bit]
    if held:
        reasons.append(Reason("gpu_slowed", f"the GPU was slowed down by {' and '.join(held)}"))
    if clocks_mhz and min(clocks_mhz) < (1 - MOVING_CLOCK) * max(clocks_mhz):
        moved = f"the GPU's clock moved between {min(clocks_mhz):.0f} and {max(clocks_mhz):.0f} MHz"
        lock = "sudo jetson_clocks" if jetson_gpus() else "nvidia-smi --lock-gpu-clocks"
        reasons.append(Reason("gpu_clock", f"{moved}: lock it with {lock}"))
    return reasons


def measure(detection: Detection, options: LatencyOptions, gpu_before_mib: Optional[float]) -> Dict[str, Any]:
    """The `numbers` of a result file but for `read` and `sweep`."""
    with open_watch(detection.on_gpu) as watch, Monitor(watch.readers()) as monitor:
        others = busy_cores(REST_S)
        rested_s = time.perf_counter()
        if watch.power is not None:
            time.sleep(IDLE_S)
        throttled, warm_up_s = throttle_count(), time.perf_counter()
        warmup_runs, warm = warm_up(detection.run, Pace(options.fps), options.max_warmup_s, detection.images)
        start_s = time.perf_counter()
        samples, late = take_samples(detection.run, Pace(options.fps), options.runs)
        end_s = time.perf_counter()
        monitor.read_once()
        throttled, hot = throttle_count() - throttled, thermal_limits()
        host_peak = detection.memory_mib()
        idle_w = monitor.between("watts", rested_s, warm_up_s)
        load_w = monitor.between("watts", start_s, end_s)
        # With the reading behind the last run, since a short one has none of its own.
        clocks, slowdowns = (monitor.between(name, start_s, math.inf) for name in ("clock_mhz", "slowdowns"))
        used_mib = monitor.between("used_mib", warm_up_s, math.inf)
    numbers = numbers_from_samples(samples, detection.description, options.threads, detection.images)
    reasons = [Reason("clocks", text) for text in clock_reasons(detection.on_gpu)] + gpu_reasons(clocks, slowdowns)

    def add(code: str, text: str) -> None:
        reasons.append(Reason(code, text))

    if detection.on_gpu and not (clocks and slowdowns) and not jetson_gpus():
        unread = "the GPU's clocks and slow-downs could not be read"
        add("gpu_unread", f"{unread}: install nvidia-ml-py; with several GPUs set CUDA_VISIBLE_DEVICES to a UUID")
    reasons += reasons_from_spread(numbers["spread"])
    if not warm:
        add("warm_up", f"the warm-up of {warmup_runs} runs did not become stable; raise --max-warmup-s")
    if others is not None and others > OTHERS_CORES:
        add("others", f"other programs kept {others:.1f} processors busy before it began")
    if throttled:
        add("throttled", "the device throttled")  # each of its events is counted for every core
    if hot:
        add("hot", f"the device was too hot at the end: {' and '.join(hot)} held its clocks down")
    power, power_reason = None, watch.power_reason
    if watch.power is not None:
        try:
            seconds = (end_s - start_s) / options.runs
            power = power_from_readings(idle_w, load_w, seconds, watch.power.description)
        except NotHere as error:
            power_reason = str(error)
    device_peak = max(used_mib) - gpu_before_mib if used_mib and gpu_before_mib is not None else None
    return {
        **numbers,
        **numbers_from_reasons(reasons),
        "warmup_runs": warmup_runs,
        "mode": "back-to-back" if options.fps is None else "paced",
        "fps": options.fps,
        "late_frames": None if options.fps is None else late,
        "memory_mib": {"host_peak": _rounded(host_peak), "device_peak": _rounded(device_peak)},
        "power": power,
        "power_reason": power_reason,
    }


def _rounded(value: Optional[float]) -> Optional[float]:
    return None if value is None else round(value, 1)


def device_memory_used_mib() -> Optional[float]:
    """What is used of the GPU's memory now, by whomever; None where that cannot be read."""
    try:
        return open_gpu().used_mib()
    except NotHere:
        return None
