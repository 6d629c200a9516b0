"""
Watts while something runs, where the device tells them: a Jetson through tegrastats, a GPU through NVML (the package
nvidia-ml-py), a processor through RAPL (/sys/class/powercap). Elsewhere there is no number, but the reason.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from benchmarks.measuring.environment import NotHere, open_gpu
from deploy.errors import MeasurementError

INTERVAL_S = 0.1
MOST_READINGS = 36_000
"""An hour at ten a second; the oldest go first."""
MODULE_RAILS = (
    ("VDD_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    ("POM_5V_IN",),
)
"""
Rails of tegrastats that together are what the whole module takes; the first set that is there whole counts.

Orin NX, Orin Nano, Xavier NX: one rail. AGX Orin: three (its VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0). AGX Thor: three;
its VIN is the input of the whole board, carrier included (jetson_stats, pull request 900). AGX Xavier: six. Nano: one.
Jetson Linux Developer Guide, Platform Power and Performance, "3-Channel INA3221 Power Monitors" of each series.
"""
TEGRASTATS_PATIENCE_S = 3.0

_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW(?:/-?\d+mW){0,2}|(?:/-?\d+){1,2})(?!\S)")
_POWERCAP = Path("/sys/class/powercap")


class PowerSource:
    """
    Something that tells watts.

    Attributes:
        description: what tells it, and of what: "NVML, the GPU alone".
    """

    description: str

    def watts(self) -> Optional[float]:
        """The present power; None if there is no reading at this moment."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what the source holds."""


def open_power(on_gpu: bool) -> PowerSource:
    """
    The source that covers a model: of a Jetson the module, else of a GPU the GPU, else of a processor its packages.

    Raises:
        NotHere: nothing tells it on this machine.
    """
    if shutil.which("tegrastats") is not None:
        return TegrastatsPower()
    return NvmlPower() if on_gpu else RaplPower()


def check_power_is_told() -> None:
    """Raises MeasurementError if nothing on this machine tells the power of any model."""
    reasons = []
    for on_gpu in (False, True):
        try:
            open_power(on_gpu).close()
            return
        except NotHere as error:
            reasons.append(str(error))
    raise MeasurementError(
        f"max_energy_mj cannot be judged here: {'; '.join(dict.fromkeys(reasons))}. Leave it out, or use a device that "
        "tells its power"
    )


class NvmlPower(PowerSource):
    """An NVIDIA GPU. From Ampere on NVML tells the mean of a second (NVML API Reference, nvmlDeviceGetPowerUsage)."""

    description = "NVML, the GPU alone"

    def __init__(self) -> None:
        self._gpu = open_gpu()
        if self.watts() is None:
            raise NotHere("this GPU does not tell its power")

    def watts(self) -> Optional[float]:
        return self._gpu.power_w()


class RaplPower(PowerSource):
    """
    The processor's packages: energy counters in microjoules that start again at zero (the kernel's
    Documentation/power/powercap/powercap.rst). Intel has them, and AMD under the same names.
    """

    description = "RAPL, the processor packages"

    def __init__(self) -> None:
        # Two colons are a part of a package; psys is the platform, its packages included.
        names = sorted(path for path in _POWERCAP.glob("intel-rapl:[0-9]*/name") if path.parent.name.count(":") == 1)
        self._zones = [path.parent for path in names if path.read_text(encoding="utf-8").startswith("package")]
        if not self._zones:
            raise NotHere("no RAPL here: /sys/class/powercap has no intel-rapl")
        try:
            self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
            self._last = self._read()
        except (OSError, ValueError) as error:
            raise NotHere(f"RAPL cannot be read ({error}): it takes root, or sudo chmod -R a+r {_POWERCAP}") from error

    def _read(self) -> Tuple[float, List[int]]:
        return time.perf_counter(), [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def watts(self) -> Optional[float]:
        """Mean power in watts since the last call."""
        (before_s, before), (now_s, now) = self._last, self._read()
        if now_s <= before_s:
            return None
        self._last = now_s, now
        used_uj = sum((new - old) % (most + 1) for old, new, most in zip(before, now, self._ranges))
        return used_uj / 1e6 / (now_s - before_s)


def rails_from_tegrastats(line: str) -> Dict[str, float]:
    """
    Rail -> watts at present, of one line that tegrastats prints.

    "VDD_IN 4067mW/4067mW" is the present value and the mean. JetPack 7.2 prints a third, releases before 5 no unit. A
    rail at rest may be read as slightly below zero.
    """
    return {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line)}


def module_rails(rails: Mapping[str, float]) -> Tuple[str, ...]:
    """
    The power rails of a Jetson that add up to what its module draws.

    Raises:
        NotHere: the rails are those of no known board.
    """
    for names in MODULE_RAILS:
        if all(name in rails for name in names):
            return names
    if not rails:
        raise NotHere("tegrastats prints no rails here: some boards tell them only to root, so run this with sudo")
    raise NotHere(f"tegrastats names the rails {sorted(rails)}, which are those of no board known here")


class TegrastatsPower(PowerSource):
    """A Jetson's module, from the lines of a tegrastats that runs meanwhile."""

    def __init__(self) -> None:
        interval_ms = str(int(1e3 * INTERVAL_S))
        try:
            self._process: Any = subprocess.Popen(
                ["tegrastats", "--interval", interval_ms],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise NotHere(f"tegrastats cannot be run: {error}") from error
        self._line: Tuple[float, str] = (0.0, "")
        self._first = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        try:
            if not self._first.wait(TEGRASTATS_PATIENCE_S):
                raise NotHere(f"tegrastats printed nothing within {TEGRASTATS_PATIENCE_S:.0f} s")
            self._rails = module_rails(rails_from_tegrastats(self._line[1]))
        except NotHere:
            self.close()
            raise
        self.description = f"tegrastats, the whole module ({' + '.join(self._rails)})"

    def _follow(self) -> None:
        for line in self._process.stdout:
            self._line = time.perf_counter(), line
            self._first.set()

    def watts(self) -> Optional[float]:
        at_s, line = self._line
        rails = rails_from_tegrastats(line)
        fresh = time.perf_counter() - at_s < 10 * INTERVAL_S
        return (
            sum(rails[name] for name in self._rails) if fresh and all(name in rails for name in self._rails) else None
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class Monitor:
    """
    Takes readings ten times a second, in a thread, while the block runs. Without readers there is no thread.

    Args:
        readers: name -> what is called for a reading; None is left out.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Optional[float]]]) -> None:
        self._readers = dict(readers)
        self._readings: Dict[str, Deque[Tuple[float, float]]] = {
            name: collections.deque(maxlen=MOST_READINGS) for name in readers
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Monitor:
        if self._readers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self._stop.set()
        if self._readers:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.read_once()

    def read_once(self) -> None:
        """Takes one reading of each reader now."""
        for name, read in self._readers.items():
            value = read()
            if value is not None:
                self._readings[name].append((time.perf_counter(), value))

    def between(self, name: str, start_s: float, end_s: float) -> List[float]:
        """The readings of that time, in the clock of time.perf_counter; none if there is no such reader."""
        return [value for at_s, value in list(self._readings.get(name, ())) if start_s <= at_s <= end_s]


def power_from_readings(
    idle_w: Sequence[float], load_w: Sequence[float], seconds_per_inference: float, source: str
) -> Dict[str, Any]:
    """
    The `power` of a result file: mean watts idle and under load, millijoules per inference.

    `energy_mj_per_inference` is all that was used; `energy_above_idle_mj_per_inference` what being idle would not have.

    Raises:
        NotHere: there are no readings of one of the two.
    """
    if not idle_w or not load_w:
        raise NotHere(f"{source}: no reading while {'at rest' if not idle_w else 'it ran'}; raise --runs")
    idle, load = sum(idle_w) / len(idle_w), sum(load_w) / len(load_w)
    return {
        "idle_w": round(idle, 3),
        "load_w": round(load, 3),
        "energy_mj_per_inference": round(1e3 * load * seconds_per_inference, 3),
        "energy_above_idle_mj_per_inference": round(1e3 * (load - idle) * seconds_per_inference, 3),
        "source": source,
    }
