"""crosskd.time_detector: raw samples of the stages of a detection in torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crosskd import time_detector
from deploy.dataset import split_paths


@pytest.fixture
def words(student_run: Path, shapes_dir: Path, tmp_path: Path) -> list[str]:
    annotations, images_dir = split_paths(shapes_dir, "test")
    paths = ["--annotations", str(annotations), "--images-dir", str(images_dir)]
    return [str(student_run), *paths, "-o", str(tmp_path / "times.json")]


def test_every_run_is_kept_stage_by_stage(words: list[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert time_detector.main([*words, "--runs", "5", "--warmup", "2", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["samples_ms"].keys() == {"preprocess", "inference", "postprocess"}
    assert all(len(samples) == 5 and min(samples) > 0 for samples in times["samples_ms"].values())
    assert times["description"].endswith("CPU, 1 threads") or torch.cuda.is_available()
    assert torch.__version__ in times["description"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--runs", "0"], "--runs 0 --warmup 20: expected at least 1 and 0"),
        (["--warmup", "-1"], "--runs 200 --warmup -1"),
        (["--threads", "0"], "--threads is 0; expected at least 1"),
    ],
)
def test_bad_numbers_are_refused(
    words: list[str], flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_detector.main([*words, *flags]) == 2
    assert named in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
