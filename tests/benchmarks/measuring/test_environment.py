from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks.measuring import environment
from deploy import machine

DATA = Path(__file__).parent / "data"


@pytest.fixture
def sys_files(tmp_path, monkeypatch):
    """`sys_files("class/x", "1")` writes a file under what then stands for /sys."""
    monkeypatch.setattr(environment, "_SYS", tmp_path / "sys")

    def write(name, text):
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    return write


class NvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """nvidia-ml-py on a machine with one GPU: it says what a test sets here, and does not support the rest."""
    module = ModuleType("pynvml")
    module.NVMLError = NvmlError
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: f"gpu {index}"
    module.nvmlDeviceGetHandleByUUID = lambda uuid: f"gpu {uuid}"
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def test_what_is_found_is_json_and_plausible():
    found = environment.read_environment()
    json.dumps(found, allow_nan=False)
    assert found["cores"] >= found["cores_usable"] >= 1
    assert found["os"]
    assert set(environment.VARYING) - {"after", "clock_jump_s"} <= set(found)  # which boards add


def test_nothing_to_find_is_none(monkeypatch):
    def missing(*_args, **_keywords):
        raise OSError("not here")

    monkeypatch.setattr(environment.Path, "read_text", missing)
    monkeypatch.setattr(environment.os, "sysconf", missing)
    monkeypatch.setattr(environment.os, "getloadavg", missing)
    monkeypatch.setattr(machine.subprocess, "run", missing)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = environment.read_environment()
    there = {key for key, value in found.items() if value is not None}
    assert there <= {"cpu", "cores", "cores_usable", "omp_num_threads", "os", "now"}
    assert found["os"]
    assert environment.busy_s() is environment.process_memory_mib(1) is None
    assert environment.throttle_count() == 0


def test_the_commit_is_that_of_this_file(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    copy = tmp_path / "environment.py"
    copy.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(copy))
    assert environment.read_environment()["commit"] is None
    git("init", "-q")
    assert environment.read_environment()["commit"] is None  # in a repository that does not hold it
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert environment.read_environment()["commit"] == git("rev-parse", "HEAD")
    copy.write_text("2")
    assert environment.read_environment()["commit"] == git("rev-parse", "HEAD") + "+changes"


def test_the_power_mode_of_a_jetson(monkeypatch):
    text = (DATA / "nvpmodel_agx_orin.txt").read_text()
    monkeypatch.setattr(machine, "output_of", lambda *words: text if words[0] == "nvpmodel" else None)
    assert environment.read_environment()["nvpmodel"] == "MODE_30W"


def test_temperatures_and_clocks(sys_files):
    sys_files("class/thermal/thermal_zone0/type", "cpu-thermal")
    sys_files("class/thermal/thermal_zone0/temp", "44843")
    sys_files("class/thermal/thermal_zone1/type", "cv0-thermal")
    sys_files("class/thermal/thermal_zone1/temp", "unreadable")  # as Orin's are while the engine is off
    for cpu, high in ((0, 2201600), (4, 1190400)):
        sys_files(f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_min_freq", "729600")
        sys_files(f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_max_freq", str(high))
    sys_files("devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1190400")
    found = environment.read_environment()
    assert found["now"]["temperatures_c"] == {"cpu-thermal": 44.843}
    assert found["now"]["cpu_clock_mhz"] == 1190.4
    assert (found["cpu_clock_min_mhz"], found["cpu_clock_max_mhz"]) == (729.6, 2201.6)


CPU = "devices/system/cpu"


@pytest.mark.parametrize(
    ("files", "reasons"),
    [
        ({}, []),
        ({f"{CPU}/cpu0/cpufreq/scaling_governor": "performance"}, []),
        ({f"{CPU}/cpu1/cpufreq/scaling_governor": "schedutil"}, ["the CPU governor is schedutil, not performance"]),
        (
            {
                f"{CPU}/cpu1/cpufreq/scaling_governor": "schedutil",  # a Jetson after jetson_clocks
                f"{CPU}/cpu1/cpufreq/scaling_min_freq": "2201600",
                f"{CPU}/cpu1/cpufreq/scaling_max_freq": "2201600",
            },
            [],
        ),
        ({f"{CPU}/intel_pstate/no_turbo": "0"}, ["the CPU's turbo is on"]),
        ({f"{CPU}/intel_pstate/no_turbo": "1"}, []),
        ({f"{CPU}/cpufreq/boost": "1"}, ["the CPU's turbo is on"]),
        ({f"{CPU}/cpufreq/boost": "0"}, []),
        (
            {
                "class/devfreq/17000000.gpu/min_freq": "306000000",
                "class/devfreq/17000000.gpu/max_freq": "1300500000",
                "class/devfreq/15340000.vic/min_freq": "1",
            },
            ["the clocks of the Jetson's GPU are not locked: sudo jetson_clocks"],
        ),
        (
            {
                "class/devfreq/17000000.gv11b/min_freq": "1377000000",
                "class/devfreq/17000000.gv11b/max_freq": "1377000000",
            },
            [],
        ),
        (
            {
                "class/devfreq/gpu-gpc-0/min_freq": "315000000",  # Thor
                "class/devfreq/gpu-gpc-0/max_freq": "1575000000",
                "class/devfreq/gpu-nvd-0/min_freq": "315000000",
                "class/devfreq/gpu-nvd-0/max_freq": "1692000000",
            },
            ["the clocks of the Jetson's GPU are not locked: sudo jetson_clocks"],
        ),
    ],
)
def test_clocks_that_move_are_a_reason(sys_files, files, reasons):
    for name, text in files.items():
        sys_files(name, text)
    assert environment.clock_reasons(on_gpu=True) == reasons


def test_the_gpu_of_a_jetson_does_not_matter_to_a_model_on_its_processor(sys_files):
    sys_files("class/devfreq/17000000.gpu/min_freq", "306000000")
    assert environment.clock_reasons(on_gpu=False) == []


def test_throttling_is_counted_over_all_counters(sys_files):
    assert environment.throttle_count() == 0
    sys_files(f"{CPU}/cpu0/thermal_throttle/core_throttle_count", "3")
    sys_files(f"{CPU}/cpu1/thermal_throttle/package_throttle_count", "4")
    sys_files("class/hwmon/hwmon5/oc1_event_cnt", "5")
    assert environment.throttle_count() == 12


def test_only_what_holds_clocks_down_is_a_thermal_limit(sys_files):
    kinds = [
        ("gpu-throttle-alert", 1),
        ("cpufreq-cpu0", 2),
        ("devfreq-17000000.gpu", 0),
        ("pwm-fan", 3),
        ("Processor", 1),
        ("thermal-cpufreq-0", 1),  # before kernel 5.13
        ("thermal-devfreq-1", 0),
    ]
    for number, (kind, state) in enumerate(kinds):
        sys_files(f"class/thermal/cooling_device{number}/type", kind)
        sys_files(f"class/thermal/cooling_device{number}/cur_state", str(state))
    assert environment.thermal_limits() == ["cpufreq-cpu0", "gpu-throttle-alert", "thermal-cpufreq-0"]


@pytest.mark.parametrize("device", ["17000000.gpu", "17000000.ga10b", "17000000.gv11b", "gpu-gpc-0"])
def test_the_clocks_of_a_jetsons_gpu(sys_files, monkeypatch, device):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for name, hertz in (("min_freq", 306000000), ("max_freq", 1300500000), ("cur_freq", 612000000)):
        sys_files(f"class/devfreq/{device}/{name}", str(hertz))
        sys_files(f"class/devfreq/gpu-nvd-0/{name}", "999000000")  # of Thor's video engines: does not count
    found = environment.read_environment()
    assert (found["gpu_clock_min_mhz"], found["gpu_clock_max_mhz"]) == (306.0, 1300.5)
    assert found["now"]["gpu_clock_mhz"] == 612.0


def test_what_nvml_does_not_say_of_an_orin_is_read_from_its_files(sys_files, nvml):
    nvml.nvmlDeviceGetName = lambda gpu: "Orin (nvgpu)"
    for name, hertz in (("min_freq", 306000000), ("max_freq", 918000000), ("cur_freq", 612000000)):
        sys_files(f"class/devfreq/17000000.gpu/{name}", str(hertz))
    sys_files("class/thermal/thermal_zone0/type", "gpu-thermal")
    sys_files("class/thermal/thermal_zone0/temp", "47812")
    found = environment.read_environment()
    assert (found["gpu"], found["gpu_driver"]) == ("Orin (nvgpu)", "580.1")
    assert (found["gpu_clock_min_mhz"], found["gpu_clock_max_mhz"]) == (306.0, 918.0)
    assert (found["now"]["gpu_clock_mhz"], found["now"]["gpu_temperature_c"]) == (612.0, 47.812)
    nvml.nvmlDeviceGetClockInfo = lambda gpu, clock: 500
    assert environment.read_environment()["now"]["gpu_clock_mhz"] == 500


def test_the_load_of_others_is_what_kept_processors_busy(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 100 5000 60 5 5 0 90 10\ncpu0 1 1 1 1\n")

    def sleep(seconds):
        clock.now += seconds
        stat.write_text("cpu  160 10 120 5100 70 15 15 0 99 10\ncpu0 1 1 1 1\n")  # 100 ticks more, guests aside

    monkeypatch.setattr(environment, "_PROC", tmp_path)
    monkeypatch.setattr(environment.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(environment, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep))
    assert environment.busy_cores(0.5) == pytest.approx(2.0)


def test_memory_of_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tx\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\n")
    assert environment.process_memory_mib(7) == (2.0, 3.0)
    assert environment.process_memory_mib(8) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_peak_of_this_process_is_seen():
    before = environment.process_memory_mib(os.getpid())
    block = bytearray(b"x") * (64 << 20)
    after = environment.process_memory_mib(os.getpid())
    assert after[1] >= before[0] + 60
    assert after[1] >= after[0]
    assert len(block) == 64 << 20


def test_what_a_gpu_says_of_itself(nvml):
    nvml.nvmlDeviceGetName = lambda gpu: b"NVIDIA X"  # old versions of the package return bytes
    nvml.nvmlDeviceGetMemoryInfo = lambda gpu: SimpleNamespace(total=16 << 30, used=512 << 20)
    nvml.nvmlDeviceGetMaxClockInfo = lambda gpu, clock: 1980
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda gpu: 70_000
    nvml.nvmlDeviceGetPowerUsage = lambda gpu: 31_500
    gpu = environment.open_gpu()
    assert gpu.facts() == {
        "gpu": "NVIDIA X", "gpu_driver": "580.1", "gpu_memory_mib": 16384, "gpu_clock_max_mhz": 1980,
        "gpu_power_limit_w": 70.0,
    }  # fmt: skip
    assert (gpu.power_w(), gpu.used_mib()) == (31.5, 512.0)
    assert environment.read_environment()["gpu"] == "NVIDIA X"


def test_what_a_gpu_does_not_say_is_none(nvml):
    def refuse(*_words):
        raise NvmlError("not supported")

    nvml.nvmlDeviceGetPowerUsage = nvml.nvmlDeviceGetClockInfo = nvml.nvmlSystemGetDriverVersion = refuse
    gpu = environment.open_gpu()
    assert [gpu.power_w(), gpu.clock_mhz(), gpu.temperature_c(), gpu.used_mib(), gpu.slowdowns()] == [None] * 5
    assert set(gpu.facts().values()) == {None}


@pytest.mark.parametrize(
    "name", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
)
def test_only_what_slows_a_busy_gpu_down_is_a_slowdown(nvml, name):
    setattr(nvml, name, lambda gpu: 0x1 | 0x2 | 0x4 | 0x40 | 0x100)  # idle, set clocks, power, heat, display
    assert environment.open_gpu().slowdowns() == 0x4 | 0x40


def test_with_several_gpus_the_one_that_is_used_must_be_named(nvml, monkeypatch):
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetName = lambda gpu: gpu
    with pytest.raises(environment.NotHere, match="2 GPUs"):
        environment.open_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(environment.NotHere, match="UUID"):
        environment.open_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-12ab,GPU-34cd")
    assert environment.open_gpu().facts()["gpu"] == "gpu GPU-12ab"


def test_no_driver_is_a_reason(nvml):
    def refuse():
        raise NvmlError("driver not loaded")

    nvml.nvmlInit = refuse
    with pytest.raises(environment.NotHere, match="driver not loaded"):
        environment.open_gpu()
