"""What people are told of statistics that were kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibration.activation_statistics import SAMPLE, Collected, Seen, Statistics, save_statistics
from calibration.statistics import main, table_from_statistics
from tests.calibration.activations import statistics_of


def rows(table):
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}


def test_table_for_people(arrays):
    plain = np.linspace(-1, 1, SAMPLE, dtype=np.float32)
    outlier = np.stack([plain] * 20)
    outlier[3, 7] = 50
    flat = Statistics.minmax_only()
    flat.update(Seen.of(np.float32([-1.5, 2])))
    seen = {"outlier": statistics_of(outlier), "flat": flat, "relu": statistics_of([np.maximum(plain, 0)])}
    collected = Collected(seen, {"ab" * 32: 7, "cd" * 32: 3})
    for target in ("tensorrt", "onnxruntime"):
        table = table_from_statistics(collected, target)
        assert table.startswith(f"2 images; clipped, for {target}, by percentile, entropy, mse")
        found = rows(table)
        assert found["tensor"] == ["smallest", "largest", "mean", "deviation", "zeros", "percentile", "entropy", "mse"]
        assert found["flat"] == ["-1.5", "2"]
        assert found["outlier"][:2] == ["-1", "50"]
        assert [float(value) for value in found["outlier"][2:4]] == pytest.approx(
            [outlier.mean(), outlier.std()], rel=1e-3
        )
        percentile, entropy, mse = (float(share.rstrip("%")) for share in found["outlier"][5:])
        assert 0.005 <= percentile <= 0.011
        assert 0 < entropy <= 1  # MOST_CLIPPED of calibration.ranges
        assert mse > 0
        assert float(found["relu"][4].rstrip("%")) == pytest.approx(50, abs=0.1)


def test_command_prints_a_file(tmp_path, model_path, contract, collected, capsys):
    path = tmp_path / "s.npz"
    save_statistics(path, collected, model_path, contract)
    assert main([str(path), "--target", "onnxruntime"]) == 0
    printed = capsys.readouterr().out
    assert printed == table_from_statistics(collected, "onnxruntime") + "\n"
    words = [sys.executable, "-m", "calibration.statistics", str(path), "--target", "onnxruntime"]
    root = Path(__file__).parents[2]
    assert subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout == printed


def test_command_says_what_is_wrong_with_a_file(tmp_path, capsys):
    (tmp_path / "s.npz").write_text("not statistics")
    assert main([str(tmp_path / "s.npz")]) == 2
    assert "cannot read the statistics in" in capsys.readouterr().err
