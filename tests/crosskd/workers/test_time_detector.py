"""crosskd.workers.time_detector: the stages of a detection in torch, timed on request."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import pytest
import torch

from crosskd.predict import predictor
from crosskd.run_dir import load_run
from crosskd.workers import time_detector
from deploy.dataset import load_coco
from deploy.layouts import split_paths

CPU_STAGES = {"preprocess", "inference", "postprocess", "total"}


@pytest.fixture
def images(shapes_dir: Path) -> list[Path]:
    return [image.path for image in load_coco(*split_paths(shapes_dir, "test")).images[:2]]


def test_a_line_is_answered_with_the_stages_of_a_run(
    student_run: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("0\n1\n2\n"))
    threads, threads_of_opencv = torch.get_num_threads(), cv2.getNumThreads()
    try:
        assert time_detector.main([str(student_run), *map(str, images), "--threads", "1"]) == 0
        assert cv2.getNumThreads() == 1
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads_of_opencv)
    starting, ready, *runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert starting == {"starting": True}
    assert torch.__version__ in ready["description"]
    assert ready["on_gpu"] is torch.cuda.is_available()
    assert ready["description"].endswith("CPU, 1 threads") or ready["on_gpu"]
    assert len(runs) == 3
    for run in runs:
        assert run.keys() == CPU_STAGES | ({"host_to_device", "device_to_host"} if ready["on_gpu"] else set())
        assert min(run.values()) > 0
        assert run["total"] == pytest.approx(sum(value for stage, value in run.items() if stage != "total"))


def test_what_is_timed_is_the_detection_itself(
    student_run: Path, shapes_dir: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, detector, _ = load_run(student_run)
    found = []
    decode = detector.bbox_head.predict_by_feat
    monkeypatch.setattr(
        detector.bbox_head, "predict_by_feat", lambda *args, **more: found.append(decode(*args, **more)) or found[-1]
    )
    detect, _, _ = time_detector.detection_of(config, detector, [cv2.imread(str(path)) for path in images], None)
    detect(3)  # the second of two images
    timed = found[-1][0]
    expected = predictor(config, detector)(load_coco(*split_paths(shapes_dir, "test")).images[1])
    assert timed.scores.tolist() == pytest.approx(expected[1])
    assert timed.bboxes.tolist() == [pytest.approx(box, abs=1e-3) for box in expected[0]]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--threads", "0"], "--threads is 0; expected at least 1"),
        (["nope.png"], "cannot read the image nope.png"),
    ],
)
def test_bad_input_is_refused_before_torch_starts(
    student_run: Path, images: list[Path], words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_detector.main([str(student_run), str(images[0]), *words]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_detector.main([str(tmp_path), str(images[0])]) == 2
    assert "expected one: the folder of a finished run" in capsys.readouterr().err
