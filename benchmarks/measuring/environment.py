"""
What a measurement runs on, and whether its clocks and its load let timings compare.

Reading never fails: what cannot be found is None. The GPU is read through NVML (the package nvidia-ml-py), a Jetson
through its files under /sys and /etc.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple

from deploy.machine import L4T_RELEASE, board_model, output_of, power_mode, text_of, usable_cores

VARYING = ("load_average", "now", "after", "clock_jump_s")
"""Keys of `read_environment` that differ from one measurement to the next on the same machine."""
THROTTLE_COUNTERS = (
    "devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
    "devices/system/cpu/cpu[0-9]*/thermal_throttle/package_throttle_count",
    "class/hwmon/hwmon*/oc*_event_cnt",
)
"""Files under /sys that count how often the device slowed itself down: Intel processors (the kernel's
Documentation/ABI/testing/sysfs-devices-system-cpu); over-current events of a Jetson (Jetson Linux Developer Guide,
Platform Power and Performance, "Over-current throttling")."""
GPU_SLOWDOWNS = {
    0x04: "its power limit",
    0x08: "a hardware slowdown",
    0x20: "its temperature (software)",
    0x40: "its temperature (hardware)",
    0x80: "a power brake",
}
"""Bits of NVML's clocks event reasons that slow a busy GPU down: NVML API Reference, NvmlClocksEventReasons."""

_SYS, _PROC = Path("/sys"), Path("/proc")


class NotHere(Exception):
    """What would measure something is not on this machine; the message is the reason, for a result file."""


def read_environment() -> Dict[str, Any]:
    """
    Fact -> value: machine, processor, GPU, clocks, memory, system, load, and the commit of this project.

    `now` holds what changes by itself: temperatures and present clocks. Package versions are not here: every result
    file has them from `deploy.contract.provenance`.
    """
    clocks = _cpu_clocks_mhz()
    gpu = _gpu_if_any()
    return {
        "machine": board_model(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "cpu_governor": _first_line(_SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cpu_clock_min_mhz": min((low for low, _ in clocks), default=None),
        "cpu_clock_max_mhz": max((high for _, high in clocks), default=None),
        "cpu_turbo": _cpu_turbo(),
        **_merged(gpu.facts() if gpu else {}, _jetson_gpu_facts()),
        "jetpack": _jetpack(),
        "nvpmodel": power_mode(),
        "memory_mib": _memory_mib(),
        "os": platform.platform(),
        "load_average": _load_average(),
        "now": _now(gpu),
        "commit": _commit(),
    }


def read_now() -> Dict[str, Any]:
    """What changes by itself: temperatures and present clocks."""
    return _now(_gpu_if_any())


def _now(gpu: Optional[Gpu]) -> Dict[str, Any]:
    return {
        "temperatures_c": _temperatures_c(),
        "cpu_clock_mhz": _mhz(_SYS / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"),
        "gpu_clock_mhz": gpu_clock_mhz(gpu),
        "gpu_temperature_c": gpu_temperature_c(gpu),
    }


def _gpu_if_any() -> Optional[Gpu]:
    try:
        return open_gpu()
    except NotHere:
        return None


# The GPU


class Gpu:
    """The GPU that is measured, through NVML. A reading that it does not support is None."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def _ask(self, name: str, *words: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *words)
        except (AttributeError, self._nvml.NVMLError):  # an old nvidia-ml-py; an old driver or another GPU
            return None

    def facts(self) -> Dict[str, Any]:
        """What does not change while it is measured: name, driver, memory, highest clock, power limit."""
        memory, limit_mw = self._ask("nvmlDeviceGetMemoryInfo"), self._ask("nvmlDeviceGetEnforcedPowerLimit")
        try:
            driver = _text(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError:
            driver = None
        return {
            "gpu": _text(self._ask("nvmlDeviceGetName")),
            "gpu_driver": driver,
            "gpu_memory_mib": memory.total >> 20 if memory else None,
            "gpu_clock_max_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM),
            "gpu_power_limit_w": limit_mw / 1e3 if limit_mw is not None else None,
        }

    def clock_mhz(self) -> Optional[float]:
        return self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)

    def temperature_c(self) -> Optional[float]:
        return self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)

    def power_w(self) -> Optional[float]:
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def used_mib(self) -> Optional[float]:
        """Memory in use by everybody: that of one process is not to be had inside a container."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else memory.used / 2**20

    def slowdowns(self) -> Optional[int]:
        """The bits of GPU_SLOWDOWNS that hold at present, or 0."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # the name before driver 535
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else bits & sum(GPU_SLOWDOWNS)


def open_gpu() -> Gpu:
    """
    The GPU that CUDA takes by default.

    Raises:
        NotHere: no NVML, no GPU, or several and no telling which.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NotHere("the package nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        count, visible = pynvml.nvmlDeviceGetCount(), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        if visible.startswith("GPU-"):
            return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(visible))
        if count == 1:
            return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError as error:
        raise NotHere(f"NVML finds no GPU: {error}") from error
    raise NotHere(  # CUDA counts the fastest first, NVML by the bus
        f"NVML finds {count} GPUs and cannot tell which is used: set CUDA_VISIBLE_DEVICES to the UUID of one "
        "(nvidia-smi -L)"
    )


def gpu_clock_mhz(gpu: Optional[Gpu]) -> Optional[float]:
    """The present clock of the GPU: as NVML says, else as a Jetson's files do."""
    said = gpu.clock_mhz() if gpu is not None else None
    return said if said is not None else _jetson_gpu_mhz("cur_freq")


def gpu_temperature_c(gpu: Optional[Gpu]) -> Optional[float]:
    """As NVML says, else that of a Jetson's thermal zone: "gpu-thermal", on Xavier "GPU-therm"."""
    said = gpu.temperature_c() if gpu is not None else None
    seen = (degrees for zone, degrees in _temperatures_c().items() if zone.lower().startswith("gpu-therm"))
    return said if said is not None else next(seen, None)


# Clocks, throttling and load


def clock_reasons(on_gpu: bool) -> List[str]:
    """
    Why the clocks may move while something is timed, in words; empty if they are fixed, or nothing can be seen of them.

    A discrete GPU does not say whether its clocks are locked; `benchmarks.latency` watches them instead.

    Args:
        on_gpu: whether the model runs on the GPU; the processor's clocks count in any case.
    """
    reasons = []
    moving = {
        governor
        for policy in sorted(_SYS.glob("devices/system/cpu/cpu[0-9]*/cpufreq"))
        for governor in [_first_line(policy / "scaling_governor")]
        if governor not in (None, "performance") and not _is_fixed(policy / "scaling_min_freq", "scaling_max_freq")
    }
    if moving:
        reasons.append(f"the CPU governor is {' and '.join(sorted(map(str, moving)))}, not performance")
    if _cpu_turbo():
        reasons.append("the CPU's turbo is on")
    if on_gpu and not all(_is_fixed(device / "min_freq", "max_freq") for device in jetson_gpus()):
        reasons.append("the clocks of the Jetson's GPU are not locked: sudo jetson_clocks")
    return reasons


def jetson_gpus() -> List[Path]:
    """
    The GPU of a Jetson among the devices with clocks, that of its computing units first: 17000000.ga10b or .gpu on
    Orin, 17000000.gv11b on Xavier; on Thor gpu-gpc-0, and gpu-nvd-0 of its video engines.
    """
    return [
        path
        for path in sorted(_SYS.glob("class/devfreq/*"))
        if path.name.rpartition(".")[2] in ("gpu", "ga10b", "gv11b", "gp10b", "gm20b")
        or path.name.startswith(("gpu-gpc-", "gpu-nvd-"))
    ]


def _merged(said: Dict[str, Any], seen: Dict[str, Any]) -> Dict[str, Any]:
    """`said` by NVML, and what it does not say as `seen` in files: on an Orin of JetPack 6 or 7 it supports nothing."""
    return {**said, **{name: value for name, value in seen.items() if said.get(name) is None}}


def _jetson_gpu_facts() -> Dict[str, Any]:
    """A Jetson's GPU has no name of its own (the machine's says it), and shares the machine's memory."""
    return {
        "gpu": None,
        "gpu_clock_min_mhz": _jetson_gpu_mhz("min_freq"),
        "gpu_clock_max_mhz": _jetson_gpu_mhz("max_freq"),
    }


def _jetson_gpu_mhz(name: str) -> Optional[float]:
    clocks_hz = [_first_line(device / name) for device in jetson_gpus()]  # in Hz
    return int(clocks_hz[0]) / 1e6 if clocks_hz and clocks_hz[0] is not None and clocks_hz[0].isdigit() else None


def _is_fixed(low: Path, high: str) -> bool:
    lowest, highest = _first_line(low), _first_line(low.parent / high)
    return lowest is not None and lowest == highest


def throttle_count() -> int:
    """How often the device has slowed itself down since it was started, by all counters that can be read."""
    counts = (_first_line(path) for pattern in THROTTLE_COUNTERS for path in _SYS.glob(pattern))
    return sum(int(count) for count in counts if count is not None and count.isdigit())


def thermal_limits() -> List[str]:
    """
    What holds clocks down at present because the device is hot: the cooling devices of cpufreq and devfreq, and the
    alerts of a Jetson ("gpu-throttle-alert"), that are at work. Kernel: Documentation/driver-api/thermal/sysfs-api.rst;
    before 5.13 their names were numbers, "thermal-cpufreq-0" (drivers/thermal/cpufreq_cooling.c).
    """
    kinds = set()
    for device in _SYS.glob("class/thermal/cooling_device*"):
        kind, state = _first_line(device / "type") or "", _first_line(device / "cur_state") or ""
        slows = any(word in kind for word in ("cpufreq", "devfreq", "throttle"))
        if slows and state.isdigit() and int(state) > 0:
            kinds.add(kind)
    return sorted(kinds)


def busy_s() -> Optional[float]:
    """Seconds that all processors together have been busy since the machine was started."""
    words = (_first_line(_PROC / "stat") or "").split()
    if len(words) < 5 or words[0] != "cpu":
        return None
    # man 5 proc: user nice system idle iowait irq softirq steal guest guest_nice, the guests counted in user and nice
    ticks = [int(word) for word in words[1:9]]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")


def busy_cores(seconds: float) -> Optional[float]:
    """Sleeps for `seconds` and returns how many processors were busy meanwhile, in the mean: the load of others."""
    start, before = time.perf_counter(), busy_s()
    time.sleep(seconds)
    after, elapsed_s = busy_s(), time.perf_counter() - start
    return None if before is None or after is None else (after - before) / elapsed_s


def process_memory_mib(pid: int) -> Optional[Tuple[float, float]]:
    """(resident, highest resident) memory of a process; None but on Linux."""
    try:
        lines = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return (kib["VmRSS"] / 1024, kib["VmHWM"] / 1024) if len(kib) == 2 else None


def reset_peak_memory() -> bool:
    """Makes the highest resident memory of this process its present one; False if the kernel refuses (man 5 proc)."""
    try:
        (_PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# Facts, one by one


def _text(value: Any) -> Optional[str]:
    """NVML's strings are bytes in old versions of its package."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _first_line(path: Any) -> Optional[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.strip("\0\n ").split("\n")[0] or None


def _mhz(path: Path) -> Optional[float]:
    """Of a file in kHz, as cpufreq writes them."""
    text = _first_line(path)
    return int(text) / 1e3 if text is not None and text.isdigit() else None


def _cpu_clocks_mhz() -> List[Tuple[float, float]]:
    """(lowest, highest) clock that each processor is allowed."""
    clocks_mhz = [
        (_mhz(policy / "scaling_min_freq"), _mhz(policy / "scaling_max_freq"))
        for policy in _SYS.glob("devices/system/cpu/cpu[0-9]*/cpufreq")
    ]
    return [(low, high) for low, high in clocks_mhz if low is not None and high is not None]


def _cpu_turbo() -> Optional[bool]:
    """Whether clocks above the nominal one are allowed: intel_pstate says it one way, all others the other."""
    no_turbo = _first_line(_SYS / "devices/system/cpu/intel_pstate/no_turbo")
    if no_turbo is not None:
        return no_turbo == "0"
    boost = _first_line(_SYS / "devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == "1"


def _temperatures_c() -> Dict[str, float]:
    """Name of the thermal zone -> degrees Celsius."""
    temperatures_c = {}
    for zone in sorted(_SYS.glob("class/thermal/thermal_zone*")):
        name, text = _first_line(zone / "type"), _first_line(zone / "temp")
        if name is not None and text is not None and text.lstrip("-").isdigit():
            temperatures_c[name] = int(text) / 1e3
    return temperatures_c


def _jetpack() -> Optional[str]:
    """The release of Jetson Linux: "R35 (release), REVISION: 4.1" of its own file."""
    text = text_of(L4T_RELEASE)
    return None if text is None else ",".join(text.lstrip("# ").split(",")[:2])


def _cpu_model() -> Optional[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return models[0] if models else platform.processor() or platform.machine() or None


def _memory_mib() -> Optional[int]:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    except (AttributeError, OSError, ValueError):
        return None


def _load_average() -> Optional[List[float]]:
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _commit() -> Optional[str]:
    """The commit this file is of, with "+changes" if tracked files differ from it; None when installed elsewhere."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # an installed copy may lie inside somebody else's repository
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(*words: str) -> Optional[str]:
    return output_of("git", "-C", str(Path(__file__).parent), *words)
