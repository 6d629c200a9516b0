from __future__ import annotations

import argparse
import contextlib
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.measuring import environment, power
from benchmarks.measuring.result import STAGES, STATISTICS, read_result
from deploy.contract import write_sidecar
from deploy.errors import ContractError
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
    for module in (latency, power):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(latency, "busy_cores", lambda seconds: None)
    monkeypatch.setattr(latency, "clock_reasons", lambda on_gpu: [])
    monkeypatch.setattr(latency, "throttle_count", lambda: 0)
    monkeypatch.setattr(latency, "thermal_limits", lambda: [])
    monkeypatch.setattr(latency, "open_gpu", not_here)
    monkeypatch.setattr(latency, "open_power", not_here)
    return clock


def not_here(*_words):
    raise environment.NotHere("not here")


@pytest.fixture
def quick(monkeypatch):
    """No rest before the warm-up, which ends as soon as it is stable."""
    monkeypatch.setattr(latency, "REST_S", 0.01)
    monkeypatch.setattr(latency, "LEAST_WARMUP_S", 0.0)


def run(*words):
    return latency.main([str(word) for word in words])


# Statistics


def test_summaries_of_known_samples():
    samples = [float(value) for value in range(1, 102)]  # 1 to 101: percentiles fall on samples
    expected = {"median": 51.0, "mean": 51.0, "p90": 91.0, "p95": 96.0, "p99": 100.0, "max": 101.0}
    assert latency.summarize(samples) == expected
    assert tuple(expected) == STATISTICS
    assert latency.relative_spread(samples) == pytest.approx(50 / 51)


def test_a_stage_that_a_runtime_does_not_have_is_null():
    numbers = latency.numbers_from_samples({"inference": [1.0, 2.0], "total": [3.0, 4.0]}, "x", None)
    assert set(numbers["samples_ms"]) == set(numbers["summary_ms"]) == set(STAGES)
    assert {stage for stage, values in numbers["samples_ms"].items() if values} == {"inference", "total"}
    assert {stage for stage, values in numbers["summary_ms"].items() if values} == {"inference", "total"}
    assert numbers["summary_ms"]["total"]["max"] == 4.0


@pytest.mark.parametrize(("width", "stable"), [(0.09, True), (0.11, False)])
def test_an_interquartile_range_above_a_tenth_of_the_median_is_unstable(width, stable):
    total = (100 * (1 + width * np.linspace(-1, 1, 101))).tolist()  # interquartile range: `width` of the median
    numbers = latency.numbers_from_samples({"total": total}, "x", None)
    assert numbers["spread"] == pytest.approx(width)
    assert numbers["stable"] is stable


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
    assert latency.warm_up(one, latency.Pace(None), most_s=60.0) == (len(seen), True)
    last = seen[-1] + 1
    older, newer = ([max(1.0 - 0.1 * step, 0.3) for step in range(last - back, last - back + 5)] for back in (10, 5))
    assert np.median(newer) == pytest.approx(np.median(older), rel=latency.WARMUP_AGREEMENT)
    assert last < 20


def test_warm_up_takes_a_second_however_short_the_runs(clock):
    one, seen = runs_of(clock, [0.001])
    assert latency.warm_up(one, latency.Pace(None), most_s=60.0)[1]
    assert len(seen) == pytest.approx(1000, abs=2)


def test_warm_up_that_never_agrees_is_bounded(clock):
    one, seen = runs_of(clock, [1.1**step for step in range(1000)])  # slower and slower
    runs, stable = latency.warm_up(one, latency.Pace(None), most_s=50.0)
    assert not stable
    assert runs == len(seen)
    assert 50.0 <= clock.now < 70.0


def test_no_warm_up(clock):
    one, seen = runs_of(clock, [1.0])
    assert latency.warm_up(one, latency.Pace(None), most_s=0.0) == (0, False)
    assert not seen


def test_frames_start_on_schedule_and_late_ones_are_counted(clock):
    starts = []
    times_s = [0.01, 0.25, 0.01, 0.01, 0.01, 0.01]  # the second takes two and a half frames

    def one(number):
        starts.append(clock.now)
        clock.now += times_s[number]
        return {"total": 1e3 * times_s[number]}

    samples, late = latency.take_samples(one, latency.Pace(10.0), 6)
    assert starts == pytest.approx([0.0, 0.1, 0.35, 0.36, 0.4, 0.5])  # two at once, then back on schedule
    assert late == 2
    assert samples == {"total": pytest.approx([10, 250, 10, 10, 10, 10])}


def test_back_to_back_nothing_waits_and_nothing_is_late(clock):
    one, _ = runs_of(clock, [0.5])
    assert latency.take_samples(one, latency.Pace(None), 4) == ({"total": [500.0] * 4}, 0)
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
        detection = latency.SessionDetection(session, pixels, on_gpu=True, before_mib=None)
        samples, _ = latency.take_samples(detection.run, latency.Pace(None), 4)
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


class FakeDetection(latency.Detection):
    """Takes 100 ms; lets the monitor read once per run, as its thread would ten times a second."""

    description, on_gpu = "a stand-in", True

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
        return 10.0 if self._clock.now < latency.REST_S + latency.IDLE_S + 0.05 else 30.0

    def close(self):
        self.closed = True


QUIET = FakeGpu()


@pytest.fixture
def measured(clock, monkeypatch):
    """`measured(gpu=..., source=..., others=..., ...)` -> the numbers."""
    monitors = []

    class HandDriven(latency.Monitor):
        def __enter__(self):
            monitors.append(self)
            return self

        def __exit__(self, *_words):
            pass

    monkeypatch.setattr(latency, "Monitor", HandDriven)

    def sleep(seconds):
        for _ in range(round(10 * seconds)):
            clock.now += 0.1
            for monitor in monitors:
                monitor.read_once()

    monkeypatch.setattr(clock, "sleep", sleep)

    def make(gpu=QUIET, source=None, others=0.0, throttled=(0, 0), scatter=0.0, max_warmup_s=30.0):
        def busy(seconds):
            sleep(seconds)
            return others

        counts = iter(throttled)
        monkeypatch.setattr(latency, "busy_cores", busy)
        monkeypatch.setattr(latency, "throttle_count", lambda: next(counts))
        monkeypatch.setattr(latency, "open_gpu", (lambda: gpu) if gpu is not None else not_here)
        if source is not None:
            monkeypatch.setattr(latency, "open_power", lambda on_gpu: source)
        arguments = argparse.Namespace(runs=20, fps=None, threads=None, max_warmup_s=max_warmup_s)
        return latency.measure(FakeDetection(clock, monitors, scatter), arguments, gpu_before_mib=100.0)

    return make


def test_a_quiet_measurement_compares(measured):
    numbers = measured(gpu=FakeGpu())
    assert (numbers["comparable"], numbers["comparable_reasons"]) == (True, [])
    assert (numbers["mode"], numbers["fps"], numbers["late_frames"]) == ("back-to-back", None, None)
    assert numbers["warmup_runs"] == 10
    assert len(numbers["samples_ms"]["total"]) == 20


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"others": 0.8}, "other programs kept 0.8 processors busy before it began"),
        ({"throttled": (3, 7)}, "the device throttled"),
        ({"scatter": 0.2}, "it is unstable: the interquartile range is 23 % of the median, above 10 %"),
        ({"max_warmup_s": 0.0}, "the warm-up of 0 runs did not become stable; raise --max-warmup-s"),
        ({"gpu": None}, "the GPU's clocks and slow-downs could not be read: install nvidia-ml-py"),
        ({"gpu": FakeGpu(slowdowns=0x04 | 0x40)}, "slowed down by its power limit and its temperature (hardware)"),
        ({"gpu": FakeGpu(clocks=[1000.0] * 40 + [1300.0])}, "clock moved between 1000 and 1300 MHz"),
    ],
)
def test_what_speaks_against_comparing_is_said(measured, facts, reason):
    numbers = measured(**facts)
    assert numbers["comparable"] is False
    assert len(numbers["comparable_reasons"]) == 1
    assert reason in numbers["comparable_reasons"][0]


def test_clocks_of_the_machine_are_a_reason(measured, monkeypatch):
    monkeypatch.setattr(latency, "clock_reasons", lambda on_gpu: [f"moving, {on_gpu}"])
    assert measured()["comparable_reasons"] == ["moving, True"]


def test_a_hot_device_is_a_reason(measured, monkeypatch):
    monkeypatch.setattr(latency, "thermal_limits", lambda: ["gpu-throttle-alert"])
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


# The command


def test_an_onnx_file_is_timed_stage_by_stage(data_dir, detector, tmp_path, capsys, quick):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--role", "onnx-int8", "--runs", 30, "--threads", 1, "-o", output)
    assert run(detector(), *words) == 0
    numbers = read_result(output)["numbers"]
    counts = {stage: len(samples) for stage, samples in numbers["samples_ms"].items() if samples is not None}
    assert counts == dict.fromkeys(CPU_STAGES, 30)
    for stage in CPU_STAGES - {"read"}:
        assert numbers["summary_ms"][stage] == latency.summarize(numbers["samples_ms"][stage])
    stages = [numbers["samples_ms"][stage] for stage in ("preprocess", "inference", "postprocess")]
    for total, *parts in zip(numbers["samples_ms"]["total"], *stages, strict=True):
        assert total >= sum(parts) - 1e-3
    assert "1 threads" in numbers["description"]
    assert numbers["sweep"] is None
    printed = capsys.readouterr().out
    assert "total: median" in printed
    assert printed.count("NOT COMPARABLE: ") == len(numbers["comparable_reasons"])
    assert numbers["comparable"] is not bool(numbers["comparable_reasons"])


def test_a_paced_measurement(data_dir, detector, tmp_path, capsys, quick):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "--runs", 10, "--fps", 200, "-o", output) == 0
    numbers = read_result(output)["numbers"]
    assert (numbers["mode"], numbers["fps"]) == ("paced", 200.0)
    assert 0 <= numbers["late_frames"] <= 10
    assert f"at 200 frames/s, {numbers['late_frames']} late" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--runs", "9"), "--runs is 9; expected at least 10"),
        (("--max-warmup-s", "-1"), "--max-warmup-s is -1.0"),
        (("--max-warmup-s", "inf"), "--max-warmup-s is inf"),
        (("--threads", "0"), "--threads is 0"),
        (("--fps", "0"), "--fps is 0.0; expected a positive number"),
        (("--fps", "nan"), "--fps is nan"),
        (("--sweep-streams", "1", "0"), "--sweep-streams is [1, 0]; expected at least 1 each"),
        (("--sweep-batches", "1", "2"), "takes 1 images at once"),
        (("--annotations", "x"), "give either --data"),
    ],
)
def test_bad_flags(data_dir, detector, tmp_path, capsys, words, message):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "-o", output, *words) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_all_runtimes_have_as_many_threads_unless_told_otherwise(data_dir, detector, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(latency, "usable_cores", lambda: 1)
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "--runs", 10, "-o", output) == 0
    numbers = read_result(output)["numbers"]
    assert numbers["threads"] == 1
    assert "1 threads" in numbers["description"]


def test_no_images_are_refused(data_dir, detector, tmp_path, capsys):
    path = data_dir / "annotations" / "instances_test.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "images": [], "annotations": []}))
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "-o", output) == 2
    assert "images" in capsys.readouterr().err
    assert not output.exists()


def test_threads_of_an_engine_are_refused(data_dir, tmp_path, capsys):
    engine = tmp_path / "student.engine"
    engine.write_bytes(b"engine")
    write_sidecar(engine, {})
    assert run(engine, "--data", data_dir, "--threads", "2", "-o", tmp_path / "x.result.json") == 2
    assert "--threads has no effect" in capsys.readouterr().err


def test_result_files_are_json_without_nan(data_dir, detector, tmp_path, quick):
    output = tmp_path / "x.result.json"
    assert run(detector(), "--data", data_dir, "--runs", 10, "-o", output) == 0

    def refuse(name):
        raise AssertionError(name)

    json.loads(output.read_text(), parse_constant=refuse)


# The sweep


class Batches:
    """A session that takes any batch and notes its size and thread."""

    description = "a stand-in"

    def __init__(self, contract, log):
        self.contract, self._log = contract, log

    def __enter__(self):
        return self

    def __exit__(self, *_words):
        pass

    def infer(self, feed):
        (images,) = feed.values()
        self._log.append((threading.get_ident(), len(images)))
        count = len(images)
        return {
            "boxes": np.zeros((count, 1, 4), np.float32),
            "scores": np.zeros((count, 1), np.float32),
            "labels": np.zeros((count, 1), np.int64),
        }


@pytest.fixture
def contract(detector):
    with OrtSession(detector()) as session:
        return session.contract


def test_a_stream_is_a_thread_with_a_session(contract):
    log = []
    pixels = [np.zeros((64, 96, 3), np.uint8)] * 3
    rate = latency.throughput(lambda: Batches(contract, log), pixels, batch=2, streams=3, images=20)
    assert rate > 0
    assert {size for _, size in log} == {2}
    threads = [thread for thread, _ in log]
    assert len(log) == 3 * (latency.SWEEP_WARMUP + 4)  # 20 images in twos on three streams: four rounds each
    assert {threads.count(thread) for thread in set(threads)} == {latency.SWEEP_WARMUP + 4}
    assert threading.get_ident() not in threads


def test_images_of_all_streams_and_batches_count(contract, monkeypatch):
    asked = threading.local()

    def perf_counter():  # of each thread: 5 s at its start, 7 s at its end
        asked.now = getattr(asked, "now", 3.0) + 2.0
        return asked.now

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=perf_counter))
    pixels = [np.zeros((64, 96, 3), np.uint8)]
    rate = latency.throughput(lambda: Batches(contract, []), pixels, batch=2, streams=3, images=20)
    assert rate == pytest.approx(24 / 2.0)  # four rounds of six images, in two seconds


def test_a_stream_that_fails_does_not_hold_up_the_others(contract):
    opened = []

    @contextlib.contextmanager
    def opener():
        opened.append(1)
        if len(opened) == 2:
            raise ContractError("no memory left")
        yield Batches(contract, [])

    with pytest.raises(ContractError, match="no memory left"):
        latency.throughput(opener, [np.zeros((64, 96, 3), np.uint8)], batch=1, streams=3, images=20)


def test_a_sweep_over_streams(data_dir, detector, tmp_path, quick):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--runs", 10, "--threads", 1, "--sweep-streams", 1, 2, "-o", output)
    assert run(detector(), *words) == 0
    sweep = read_result(output)["numbers"]["sweep"]
    assert [(entry["batch"], entry["streams"]) for entry in sweep] == [(1, 1), (1, 2)]
    assert all(entry["images_per_s"] > 0 for entry in sweep)


def test_a_sweep_takes_every_combination(monkeypatch):
    monkeypatch.setattr(latency, "throughput", lambda opener, pixels, batch, streams, images: 10.0 * batch * streams)
    arguments = argparse.Namespace(sweep_batches=[1, 4], sweep_streams=[1, 2], threads=None, runs=10)
    assert latency.sweep(SimpleNamespace(path="x.onnx"), [], arguments) == [
        {"batch": 1, "streams": 1, "images_per_s": 10.0},
        {"batch": 1, "streams": 2, "images_per_s": 20.0},
        {"batch": 4, "streams": 1, "images_per_s": 40.0},
        {"batch": 4, "streams": 2, "images_per_s": 80.0},
    ]


# The training side

TIME_DETECTOR = """
import json, sys
images = [word for word in sys.argv[2:] if word.endswith(".png")]
print(json.dumps({"starting": True}), flush=True)
FAULT
words = f"torch, {sys.argv[-1]} threads, {len(images)} images"
print(json.dumps({"description": words, "on_gpu": False}), flush=True)
for line in sys.stdin:
    times = {"preprocess": 1.0, "inference": 7.0 + (int(line) % len(images)) / 1e3, "postprocess": 1.0, "total": 9.5}
    print(json.dumps(times), flush=True)
"""


@pytest.fixture
def run_dir(tmp_path, monkeypatch, quick):
    """`run_dir(fault="")`: a run directory, and a stand-in for the command of the training side."""

    def make(fault=""):
        folder, package = tmp_path / "run", tmp_path / "package" / "crosskd"
        folder.mkdir()
        (package / "workers").mkdir(parents=True)
        (folder / "detector.pth").write_bytes(b"weights")
        write_sidecar(folder / "detector.pth", {}, details={"parameters": 1234})
        (package / "__init__.py").write_text("")
        (package / "workers" / "__init__.py").write_text("")
        (package / "workers" / "time_detector.py").write_text(TIME_DETECTOR.replace("FAULT", fault))
        monkeypatch.chdir(package.parent)
        return folder

    return make


def test_a_run_directory_is_timed_by_the_training_side(run_dir, data_dir, tmp_path):
    output = tmp_path / "x.result.json"
    words = ("--data", data_dir, "--runs", 10, "--threads", 2, "--role", "teacher", "-o", output)
    assert run(run_dir(), *words) == 0
    numbers = read_result(output)["numbers"]
    assert numbers["samples_ms"]["total"] == [9.5] * 10
    assert numbers["samples_ms"]["inference"] == [7.0, 7.001, 7.002, 7.003, 7.004] * 2  # the five images in turn
    assert len(numbers["samples_ms"]["read"]) == 10
    assert (numbers["description"], numbers["threads"]) == ("torch, 2 threads, 5 images", 2)
    assert numbers["stable"] is True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("print('error: no such weights', file=sys.stderr); sys.exit(2)", "error: no such weights"),
        ("print('lost', file=sys.stderr); sys.exit(3)", "ended with status 3: its output is above"),
        ("print('chatter', flush=True)", "wrote 'chatter'; expected JSON with ['description', 'on_gpu']"),
        ("print('[1]', flush=True)", "wrote '[1]'; expected JSON"),
    ],
)
def test_a_training_side_that_fails(run_dir, data_dir, tmp_path, capsys, fault, message):
    output = tmp_path / "x.result.json"
    assert run(run_dir(fault), "--data", data_dir, "-o", output) == 2
    error = capsys.readouterr().err
    assert message in error
    assert ("lost" in error) is ("lost" in fault)
    assert not output.exists()


def test_a_sweep_of_a_run_directory_is_refused(run_dir, data_dir, tmp_path, capsys):
    words = ("--data", data_dir, "--sweep-streams", "2", "-o", tmp_path / "x.result.json")
    assert run(run_dir(), *words) == 2
    assert "--sweep-streams is for .onnx and .engine files" in capsys.readouterr().err
