from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measuring import detection, environment, power, timing
from benchmarks.measuring.detection import Detection, SessionDetection
from deploy.runtime.session import OrtSession

CPU_STAGES = {"read", "preprocess", "inference", "postprocess", "total"}


class Clock:
    """Time that passes when somebody sleeps, or says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """In place of the clock of latency and power, on a machine of which nothing can be read."""
    clock = Clock()
    for module in (timing, detection, power):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(timing, "busy_cores", lambda seconds: None)
    monkeypatch.setattr(timing, "clock_reasons", lambda on_gpu: [])
    monkeypatch.setattr(timing, "throttle_count", lambda: 0)
    monkeypatch.setattr(timing, "thermal_limits", lambda: [])
    monkeypatch.setattr(timing, "open_gpu", not_here)
    monkeypatch.setattr(timing, "open_power", not_here)
    return clock


def not_here(*_words):
    raise environment.NotHere("not here")


# The loop


def runs_of(clock, totals_s):
    """A detection that takes so long, run by run; the last time for ever."""
    seen = []

    def one(number):
        elapsed_s = totals_s[min(len(seen), len(totals_s) - 1)]
        seen.append(number)
        clock.now += elapsed_s
        return {"total": 1e3 * elapsed_s}

    return one, seen


def test_warm_up_ends_when_two_windows_agree(clock):
    one, seen = runs_of(clock, [1.0 - 0.1 * step for step in range(8)] + [0.3])
    assert timing.warm_up(one, timing.Pace(None), most_s=60.0, images=1) == (len(seen), True)
    last = seen[-1] + 1
    older, newer = ([max(1.0 - 0.1 * step, 0.3) for step in range(last - back, last - back + 5)] for back in (10, 5))
    assert np.median(newer) == pytest.approx(np.median(older), rel=timing.WARMUP_AGREEMENT)
    assert last < 20


def test_warm_up_takes_a_second_however_short_the_runs(clock):
    one, seen = runs_of(clock, [0.001])
    assert timing.warm_up(one, timing.Pace(None), most_s=60.0, images=1)[1]
    assert len(seen) == pytest.approx(1000, abs=2)


@pytest.mark.parametrize("images", [2, 3, 8])
def test_images_that_take_longer_than_others_do_not_prolong_the_warm_up(clock, images):
    totals_s = [0.1 + 0.1 * (number % images) for number in range(100)]
    one, seen = runs_of(clock, totals_s)
    assert timing.warm_up(one, timing.Pace(None), most_s=60.0, images=images) == (len(seen), True)
    assert len(seen) <= 16


def test_warm_up_that_never_agrees_is_bounded(clock):
    one, seen = runs_of(clock, [1.1**step for step in range(1000)])  # slower and slower
    runs, stable = timing.warm_up(one, timing.Pace(None), most_s=50.0, images=1)
    assert not stable
    assert runs == len(seen)
    assert 50.0 <= clock.now < 70.0


def test_no_warm_up(clock):
    one, seen = runs_of(clock, [1.0])
    assert timing.warm_up(one, timing.Pace(None), most_s=0.0, images=1) == (0, False)
    assert not seen


def test_frames_start_on_schedule_and_late_ones_are_counted(clock):
    starts = []
    times_s = [0.01, 0.25, 0.01, 0.01, 0.01, 0.01]  # the second takes two and a half frames

    def one(number):
        starts.append(clock.now)
        clock.now += times_s[number]
        return {"total": 1e3 * times_s[number]}

    samples, late = timing.take_samples(one, timing.Pace(10.0), 6)
    assert starts == pytest.approx([0.0, 0.1, 0.35, 0.36, 0.4, 0.5])  # two at once, then back on schedule
    assert late == 2
    assert samples == {"total": pytest.approx([10, 250, 10, 10, 10, 10])}


def test_back_to_back_nothing_waits_and_nothing_is_late(clock):
    one, _ = runs_of(clock, [0.5])
    assert timing.take_samples(one, timing.Pace(None), 4) == ({"total": [500.0] * 4}, 0)
    assert clock.now == 2.0


def test_images_are_used_in_turn_and_the_stages_are_the_sessions_own(clock, detector):
    seen = []

    class Slow(OrtSession):
        def infer(self, feed, times_ms=None):
            seen.append(float(feed["image"].mean()))
            outputs = super().infer(feed)
            clock.now += 0.006  # 1 ms of it not the device's
            times_ms.update(host_to_device=1.0, inference=3.0, device_to_host=1.0)
            return outputs

    pixels = [np.full((64, 96, 3), value, np.uint8) for value in (10, 20, 30)]
    with Slow(detector()) as session:
        names = [Path(f"{value}.png") for value in (10, 20, 30)]
        subject = SessionDetection(session, names, pixels, on_gpu=True, before_mib=None)
        samples, _ = timing.take_samples(subject.run, timing.Pace(None), 4)
    assert seen == [10, 20, 30, 10]
    assert samples == {
        "preprocess": [0.0] * 4,
        "host_to_device": [1.0] * 4,
        "inference": [3.0] * 4,
        "device_to_host": [1.0] * 4,
        "postprocess": [0.0] * 4,
        "total": pytest.approx([6.0] * 4),
    }


# The measurement, on a fake clock


class FakeGpu:
    """Its clock is what `clocks` says, one reading after the other; 900 MiB are used at the most, at rest more."""

    def __init__(self, clocks=(1000.0,), slowdowns=0):
        self._clocks, self._slowdowns, self._used = (
            list(clocks),
            slowdowns,
            [5000.0] * 5 + [100.0] * 10 + [900.0, 300.0],
        )

    def clock_mhz(self):
        return self._clocks.pop(0) if len(self._clocks) > 1 else self._clocks[0]

    def slowdowns(self):
        return self._slowdowns

    def used_mib(self):
        return self._used.pop(0) if len(self._used) > 1 else self._used[0]


class FakeDetection(Detection):
    """Takes 100 ms; lets the monitor read once per run, as its thread would ten times a second."""

    description, on_gpu, images = "a stand-in", True, 1

    def __init__(self, clock, monitors, scatter=0.0):
        self._clock, self._monitors, self._scatter = clock, monitors, scatter

    def run(self, number):
        elapsed_s = 0.1 * (1 + self._scatter * (number % 4))
        self._clock.now += elapsed_s
        for monitor in self._monitors:
            monitor.read_once()
        return {"inference": 1e3 * elapsed_s, "total": 1e3 * elapsed_s}

    def memory_mib(self):
        return 12.34


class FakePower(power.PowerSource):
    """10 W at rest, 30 W from the first run on."""

    description = "a stand-in"

    def __init__(self, clock):
        self._clock, self.closed = clock, False

    def watts(self):
        return 10.0 if self._clock.now < timing.REST_S + timing.IDLE_S + 0.05 else 30.0

    def close(self):
        self.closed = True


QUIET = FakeGpu()


@pytest.fixture
def measured(clock, monkeypatch):
    """`measured(gpu=..., source=..., others=..., ...)` -> the numbers."""
    monitors = []

    class HandDriven(timing.Monitor):
        def __enter__(self):
            monitors.append(self)
            return self

        def __exit__(self, *_words):
            pass

    monkeypatch.setattr(timing, "Monitor", HandDriven)

    def sleep(seconds):
        for _ in range(round(10 * seconds)):
            clock.now += 0.1
            for monitor in monitors:
                monitor.read_once()

    monkeypatch.setattr(clock, "sleep", sleep)

    def make(gpu=QUIET, source=None, others=0.0, throttled=(0, 0), scatter=0.0, max_warmup_s=30.0, images=1, runs=20):
        def busy(seconds):
            sleep(seconds)
            return others

        counts = iter(throttled)
        monkeypatch.setattr(timing, "busy_cores", busy)
        monkeypatch.setattr(timing, "throttle_count", lambda: next(counts))
        monkeypatch.setattr(timing, "open_gpu", (lambda: gpu) if gpu is not None else not_here)
        if source is not None:
            monkeypatch.setattr(timing, "open_power", lambda on_gpu: source)
        options = timing.LatencyOptions(runs=runs, max_warmup_s=max_warmup_s)
        subject = FakeDetection(clock, monitors, scatter)
        subject.images = images
        return timing.measure(subject, options, gpu_before_mib=100.0)

    return make


def test_images_that_differ_do_not_make_a_machine_unstable(measured):
    numbers = measured(gpu=FakeGpu(), scatter=0.5, images=4, runs=40)
    assert (numbers["comparable_reasons"], numbers["stable"], numbers["spread"]) == ([], True, pytest.approx(0))
    few = measured(gpu=FakeGpu(), scatter=0.5, images=4, runs=19)  # too few of each to tell image from machine
    assert few["comparable_codes"] == ["unstable"]


def test_a_quiet_measurement_compares(measured):
    numbers = measured(gpu=FakeGpu())
    assert (numbers["comparable"], numbers["comparable_reasons"]) == (True, [])
    assert (numbers["mode"], numbers["fps"], numbers["late_frames"]) == ("back-to-back", None, None)
    assert numbers["warmup_runs"] == 10
    assert len(numbers["samples_ms"]["total"]) == 20


@pytest.mark.parametrize(
    ("facts", "code", "reason"),
    [
        ({"others": 0.8}, "others", "other programs kept 0.8 processors busy before it began"),
        ({"throttled": (3, 7)}, "throttled", "the device throttled"),
        ({"scatter": 0.2}, "unstable", "it is unstable: the interquartile range is 23 % of the median, above 10 %"),
        ({"max_warmup_s": 0.0}, "warm_up", "the warm-up of 0 runs did not become stable; raise --max-warmup-s"),
        ({"gpu": None}, "gpu_unread", "the GPU's clocks and slow-downs could not be read: install nvidia-ml-py"),
        (
            {"gpu": FakeGpu(slowdowns=0x04 | 0x40)},
            "gpu_slowed",
            "by its power limit and its temperature (hardware)",
        ),
        ({"gpu": FakeGpu(clocks=[1000.0] * 40 + [1300.0])}, "gpu_clock", "clock moved between 1000 and 1300 MHz"),
    ],
)
def test_what_speaks_against_comparing_is_said(measured, facts, code, reason):
    numbers = measured(**facts)
    assert numbers["comparable"] is False
    assert numbers["comparable_codes"] == [code]
    assert len(numbers["comparable_reasons"]) == 1
    assert reason in numbers["comparable_reasons"][0]


def test_the_clock_of_a_jetson_whose_nvml_says_nothing_is_watched_in_its_files(measured, monkeypatch):
    clocks = itertools.chain([1300.5] * 40, itertools.repeat(612.0))
    monkeypatch.setattr(timing, "jetson_gpus", lambda: [Path("/sys/class/devfreq/17000000.gpu")])
    monkeypatch.setattr(timing, "gpu_clock_mhz", lambda gpu: next(clocks))
    (reason,) = measured(gpu=None)["comparable_reasons"]
    assert reason == "the GPU's clock moved between 612 and 1300 MHz: lock it with sudo jetson_clocks"


def test_clocks_of_the_machine_are_a_reason(measured, monkeypatch):
    monkeypatch.setattr(timing, "clock_reasons", lambda on_gpu: [f"moving, {on_gpu}"])
    assert measured()["comparable_reasons"] == ["moving, True"]


def test_a_hot_device_is_a_reason(measured, monkeypatch):
    monkeypatch.setattr(timing, "thermal_limits", lambda: ["gpu-throttle-alert"])
    (reason,) = measured()["comparable_reasons"]
    assert reason == "the device was too hot at the end: gpu-throttle-alert held its clocks down"


def test_a_gpu_that_was_idle_before_the_runs_does_not_count(measured):
    """Its clock rises during the warm-up, and that is what the warm-up is for."""
    assert measured(gpu=FakeGpu(clocks=[200.0] * 12 + [1000.0]))["comparable"]


def test_power_is_that_at_rest_and_that_of_the_runs(measured, clock):
    source = FakePower(clock)
    numbers = measured(source=source)
    assert numbers["power"] == {
        "idle_w": 10.0,
        "load_w": 30.0,
        "energy_mj_per_inference": pytest.approx(3000.0),  # 30 W for 100 ms
        "energy_above_idle_mj_per_inference": pytest.approx(2000.0),
        "source": "a stand-in",
    }
    assert numbers["power_reason"] is None
    assert source.closed


def test_no_power_comes_with_the_reason(measured):
    numbers = measured()
    assert (numbers["power"], numbers["power_reason"]) == (None, "not here")


def test_a_source_without_readings_is_no_power(measured, clock):
    source = FakePower(clock)
    source.watts = lambda: None
    numbers = measured(source=source)
    assert numbers["power"] is None
    assert "no reading while at rest" in numbers["power_reason"]


def test_memory_of_host_and_device(measured):
    assert measured(gpu=FakeGpu())["memory_mib"] == {"host_peak": 12.3, "device_peak": 800.0}
    assert measured(gpu=None)["memory_mib"] == {"host_peak": 12.3, "device_peak": None}
