"""benchmarks.measuring.power: watts, where the device tells them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.measuring import environment, power

DATA = Path(__file__).parent / "data"


def lines_of(board):
    lines = (DATA / f"tegrastats_{board}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(
    ("board", "rails", "watts"),
    [
        ("agx_orin", 3, [5.715, 5.718, 5.721, 24.0, 24.0]),
        ("orin_nx", 1, [12.457]),
        ("agx_xavier", 6, [15.72, 15.524]),
        ("xavier_nx", 1, [8.935]),
    ],
)
def test_the_module_of_each_board(board, rails, watts):
    names = power.module_rails(power.rails_from_tegrastats(lines_of(board)[0]))
    assert len(names) == rails
    found = [sum(power.rails_from_tegrastats(line)[name] for name in names) for line in lines_of(board)]
    assert found == pytest.approx(watts)


def test_the_rails_are_the_present_power_and_nothing_else_of_the_line():
    assert power.rails_from_tegrastats(lines_of("xavier_nx")[0]) == {
        "VDD_IN": 8.935,
        "VDD_CPU_GPU_CV": 4.511,
        "VDD_SOC": 1.512,
    }
    assert set(power.rails_from_tegrastats(lines_of("agx_orin")[0])) == {
        "VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "NC", "VDDQ_VDD2_1V8AO",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("tj@50C/50C VDD_IN 4711mW/4698mW/6120mW VDD_CPU_GPU_CV 502mW/498mW/811mW VDD_SOC 1mW/1mW/1mW", 4.711),
        ("VDD_GPU 11mW/0mW VDD_CPU_SOC_MSS 5500mW/5512mW VIN_SYS_5V0 5100mW/5080mW VIN 16900mW/16850mW", 10.611),
        ("VIN 19000mW/1mW/1mW VDD_GPU -7mW/1mW/1mW VDD_CPU_SOC_MSS 5900mW/1mW/1mW VIN_SYS_5V0 5600mW/1mW/1mW", 11.493),
        ("VDD_GPU_SOC 1592mW/-1592mW VDD_CPU_CV -25mW/-12mW VIN_SYS_5V0 2624mW/2624mW", 4.191),
        ("RAM 1790/3964MB SWAP 0/0MB APE 150 VIC_FREQ 115 GPU@36C POM_5V_IN 1022/1030 POM_5V_GPU 0/0", 1.022),
        ("APE 150 VDD_IN 3990mW VDD_SOC 800mW", 3.99),
    ],
)  # fmt: skip
def test_lines_of_other_releases_and_boards(line, watts):
    rails = power.rails_from_tegrastats(line)
    assert not {"APE", "RAM", "SWAP", "VIC_FREQ"} & set(rails)
    assert sum(rails[name] for name in power.module_rails(rails)) == pytest.approx(watts)


def test_rails_that_only_root_sees_are_said():
    with pytest.raises(environment.NotHere, match="sudo"):
        power.module_rails(power.rails_from_tegrastats("RAM 721/31927MB (lfb 7291x4MB) CPU [2%@1190] GPU@37.5C"))


def test_rails_of_an_unknown_board_are_not_added_up():
    with pytest.raises(environment.NotHere, match=r"\['VDD_OTHER'\]"):
        power.module_rails({"VDD_OTHER": 3.0})


@pytest.fixture
def tegrastats(tmp_path, monkeypatch):
    """`tegrastats(text)`: a program of that name, which prints the lines and then waits to be ended."""

    def install(lines):
        (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n" if lines else "")
        program = tmp_path / "tegrastats"
        program.write_text(f'#!/bin/sh\n[ "$1 $2" = "--interval 100" ] && cat {tmp_path}/lines.txt\nexec sleep 60\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def test_a_jetson_is_read_through_tegrastats(tegrastats):
    tegrastats(lines_of("agx_orin")[:1])
    source = power.open_power(on_gpu=True)
    try:
        assert source.watts() == pytest.approx(5.715)
        assert source.description == "tegrastats, the whole module (VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0)"
    finally:
        source.close()
    assert source._process.returncode is not None


def test_a_reading_that_is_old_does_not_count(tegrastats, monkeypatch):
    tegrastats(lines_of("orin_nx"))
    source = power.TegrastatsPower()
    try:
        at_s = source._line[0]
        monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: at_s + 1.5))
        assert source.watts() is None
    finally:
        source.close()


@pytest.mark.parametrize(("lines", "reason"), [([], "printed nothing"), (["VDD_OTHER 3mW/3mW"], "VDD_OTHER")])
def test_a_tegrastats_that_is_no_use_is_ended(tegrastats, monkeypatch, lines, reason):
    monkeypatch.setattr(power, "TEGRASTATS_PATIENCE_S", 0.05 if not lines else 3.0)
    tegrastats(lines)
    ended = []
    close = power.TegrastatsPower.close
    monkeypatch.setattr(power.TegrastatsPower, "close", lambda self: (close(self), ended.append(self._process.poll())))
    with pytest.raises(environment.NotHere, match=reason):
        power.TegrastatsPower()
    assert ended
    assert ended[0] is not None


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """`rapl(package, energy_uj)` sets the counter of a package, whose range is 1,000,000 uJ."""

    def write(package, energy_uj, name="package-0"):
        for zone in (f"intel-rapl:{package}", f"intel-rapl:{package}:0"):  # the second is a part of the first
            (tmp_path / zone).mkdir(exist_ok=True)
            (tmp_path / zone / "energy_uj").write_text(f"{energy_uj}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text("999999\n")
            (tmp_path / zone / "name").write_text(f"{name}\n")

    monkeypatch.setattr(power, "_POWERCAP", tmp_path)
    return write


def test_rapl_is_the_energy_of_all_packages_over_time(rapl, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    rapl(0, 100_000)
    rapl(1, 900_000)
    rapl(2, 0, "psys")  # the platform, in which the packages are counted already
    source = power.RaplPower()
    assert source.watts() is None  # no time has passed
    clock.now = 0.1
    rapl(0, 600_000)
    rapl(2, 999_000, "psys")
    rapl(1, 400_000)  # its counter has started again at zero
    assert source.watts() == pytest.approx((500_000 + 500_000) / 1e6 / 0.1, rel=1e-9)


def test_no_rapl_and_an_unreadable_one_say_why(rapl, tmp_path):
    with pytest.raises(environment.NotHere, match="no RAPL here"):
        power.RaplPower()
    rapl(0, 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(environment.NotHere, match="it takes root"):
        power.RaplPower()


def test_a_gpu_without_nvml_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(environment.NotHere, match="pip install nvidia-ml-py"):
        power.open_power(on_gpu=True)


def test_a_gpu_that_does_not_tell_its_power(monkeypatch):
    monkeypatch.setattr(power, "open_gpu", lambda: SimpleNamespace(power_w=lambda: None))
    with pytest.raises(environment.NotHere, match="does not tell"):
        power.NvmlPower()


def test_a_monitor_keeps_what_was_read_in_a_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    values = iter([1.0, None, 3.0, 4.0])
    monitor = power.Monitor({"watts": lambda: next(values)})
    for clock.now in (0.0, 0.1, 0.2, 0.3):
        monitor.read_once()
    assert monitor.between("watts", 0.1, 0.3) == [3.0, 4.0]
    assert monitor.between("other", 0.0, 1.0) == []


def test_a_monitor_reads_in_a_thread_of_its_own_and_ends_it():
    read = []
    monitor = power.Monitor({"watts": lambda: read.append(1) or 5.0})
    with monitor:
        while len(read) < 2:
            assert monitor._thread.is_alive()
            monitor._thread.join(0.01)
    assert not monitor._thread.is_alive()
    assert monitor.between("watts", 0.0, float("inf")) == [5.0] * len(read)


def test_a_monitor_is_bounded(monkeypatch):
    monkeypatch.setattr(power, "MOST_READINGS", 3)
    values = iter(range(1, 6))
    monitor = power.Monitor({"watts": lambda: float(next(values))})
    for _ in range(5):
        monitor.read_once()
    assert monitor.between("watts", 0.0, float("inf")) == [3.0, 4.0, 5.0]


def test_energy_is_power_times_time():
    assert power.power_from_readings([10.0, 12.0], [30.0, 32.0], 0.02, "x") == {
        "idle_w": 11.0,
        "load_w": 31.0,
        "energy_mj_per_inference": 620.0,
        "energy_above_idle_mj_per_inference": 400.0,
        "source": "x",
    }


@pytest.mark.parametrize(("idle", "load", "when"), [([], [1.0], "at rest"), ([1.0], [], "while it ran")])
def test_no_reading_is_no_number(idle, load, when):
    with pytest.raises(environment.NotHere, match=when):
        power.power_from_readings(idle, load, 0.01, "x")
