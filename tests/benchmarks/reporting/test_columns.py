"""The table of a report: what it shows, and what was not measured."""

from __future__ import annotations


def test_a_table_shows_what_was_measured_and_says_what_was_not(result, run_report, tmp_path):
    power = {
        "idle_w": 5.0,
        "load_w": 15.0,
        "energy_mj_per_inference": 123.4,
        "energy_above_idle_mj_per_inference": 80.0,
        "source": "NVML",
    }
    sweep = [{"batch": 4, "streams": 2, "images_per_s": 321.5}]
    memory = {"host_peak": 900.0, "device_peak": 222.0}
    changes = {"numbers__power": power, "numbers__sweep": sweep, "numbers__memory_mib": memory}
    reasons = {"numbers__comparable": False, "numbers__comparable_reasons": ["the clocks are not locked"]}
    paths = [result("engine-int8", ms=5.0, **changes, **reasons), result("onnx-int8", ms=9.0)]
    document = run_report(paths, "--max-energy-mj", 130)[2]
    estimates = {row["role"]: row["estimates"] for row in document["rows"]}
    assert estimates["engine-int8"]["memory_mib"]["value"] == 222.0  # the device's own, where it has one
    assert estimates["onnx-int8"]["memory_mib"]["value"] == 321.0
    assert estimates["onnx-int8"]["energy_mj"] is None
    assert document["limits"][0]["measured"] == 123.4
    assert "Latency not comparable (TensorRT INT8): the clocks are not locked." in document["notes"]
    text = (tmp_path / "out" / "report.html").read_text()
    for shown in ("321.5", "123.4", "222", "not comparable"):
        assert shown in text
    run_report([result("onnx-int8", ms=9.0)])
    assert "No device told its power" in (tmp_path / "out" / "report.html").read_text()
