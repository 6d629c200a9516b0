from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import cv2
import numpy as np
import pytest

from deploy import detect
from deploy.detector import Detector
from deploy.runtime.draw import draw
from deploy.runtime.pictures import FRAMES_PER_S

ROOT = Path(__file__).parents[2]
SCORE = 0.6


@pytest.fixture
def model(detector_file: Callable[..., Path]) -> Path:
    return detector_file("mini.onnx")


def _image(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(image, (width, height))


def _write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    assert cv2.imwrite(str(path), _image(seed))
    return path


def _write_video(path: Path, frames: int, rate: float = 25.0) -> Path:
    codec = {".mp4": "mp4v", ".avi": "MJPG"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (160, 120))
    for index in range(frames):
        writer.write(_image(index))
    writer.release()
    return path


def _frames(path: Path) -> int:
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        count += 1
    return count


def _run(model: Path, *words: Any) -> int:
    return detect.main([str(model), *map(str, words), "--score", str(SCORE)])


def _results(path: Path) -> List[Dict[str, Any]]:
    results: List[Dict[str, Any]] = json.loads(path.read_text())
    return results


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def _names(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_and_folders_are_drawn_and_written_as_coco_results(model: Path, tmp_path: Path) -> None:
    lone = _write_image(tmp_path / "lone.png", 1)
    for seed, name in enumerate(("b.jpg", "a.PNG", "c.bmp", "notes.txt", "below/d.jpg")):
        if name == "notes.txt":
            (tmp_path / "folder" / name).write_text("no image")
        else:
            _write_image(tmp_path / "folder" / name, seed)
    assert _run(model, lone, tmp_path / "folder", "-o", tmp_path / "out") == 0
    assert _names(tmp_path / "out") == ["a.PNG", "b.jpg", "c.bmp", "lone.png", "results.json"]
    results = _results(tmp_path / "out" / "results.json")
    order = [lone, *(tmp_path / "folder" / name for name in ("a.PNG", "b.jpg", "c.bmp"))]
    expected = []
    with Detector(model, SCORE) as detector:
        for image_id, path in enumerate(order, start=1):
            found = detector(path)
            for (x1, y1, x2, y2), score, label in zip(
                found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            ):
                expected.append((image_id, str(path), label + 1, pytest.approx([x1, y1, x2 - x1, y2 - y1]), score))
        drawn = draw(cv2.imread(str(lone)), detector(lone), detector.class_names)
    assert len(expected) > 8
    keys = ("image_id", "file_name", "category_id", "bbox", "score")
    assert [tuple(one[key] for key in keys) for one in results] == expected
    assert all(set(one) == set(keys) for one in results)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / "lone.png")), drawn)
    assert (drawn != cv2.imread(str(lone))).any()


def test_pictures_of_the_same_name_get_numbers(model: Path, tmp_path: Path) -> None:
    sources = [_write_image(tmp_path / name, seed) for seed, name in enumerate(("1/x.jpg", "2/X.jpg", "3/x_2.jpg"))]
    video = _write_video(tmp_path / "x.mp4", 2)
    other = _write_video(tmp_path / "x.avi", 3)
    results = tmp_path / "elsewhere" / "seen.json"
    assert _run(model, *sources, video, other, "-o", tmp_path / "out", "--json", results) == 0
    assert _names(tmp_path / "out") == ["X_2.jpg", "x.jpg", "x.mp4", "x_2.mp4", "x_2_2.jpg"]
    assert (_frames(tmp_path / "out" / "x.mp4"), _frames(tmp_path / "out" / "x_2.mp4")) == (2, 3)
    assert _names(tmp_path / "elsewhere") == ["seen.json"]


def test_a_video_becomes_an_annotated_video(model: Path, tmp_path: Path) -> None:
    video = _write_video(tmp_path / "clip.mp4", 6, rate=12.5)
    assert _run(model, video, "-o", tmp_path / "out") == 0
    results = _results(tmp_path / "out" / "results.json")
    assert {one["frame"] for one in results} == set(range(6))
    assert all(one["image_id"] == one["frame"] + 1 and one["file_name"] == str(video) for one in results)
    written = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert written.get(cv2.CAP_PROP_FPS) == 12.5
    before, after = cv2.VideoCapture(str(video)).read()[1], written.read()[1]
    assert after.shape == before.shape
    assert np.abs(after.astype(int) - before).mean() > 3  # boxes are in it
    assert _names(tmp_path / "out") == ["clip.mp4", "results.json"]


def test_an_engine_is_run_too(
    model: Path, fake_tensorrt: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy import build_trt

    fake_tensorrt("10.3.0")
    assert build_trt.main([str(model), "-o", str(tmp_path / "mini.engine")]) == 0
    source = _write_image(tmp_path / "x.png")
    assert _run(tmp_path / "mini.engine", source, "-o", tmp_path / "out") == 0
    assert "TensorRT 10.3.0, Stand-in GPU" in capsys.readouterr().out
    assert _run(model, source, "-o", tmp_path / "out2") == 0
    found, expected = (_results(tmp_path / name / "results.json") for name in ("out", "out2"))
    assert len(found) == len(expected) > 0


def test_what_cannot_be_read_is_named_and_the_rest_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        _write_image(folder / name)
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:300])
    text = tmp_path / "text.mov"
    text.write_text("no video")
    assert _run(model, folder, text, "-o", tmp_path / "out") == 2
    error = _error(capsys)
    assert "of 4 sources 2 could not be read to the end" in error
    assert f"{folder / 'b.jpg'}: a truncated JPEG" in error
    assert f"{text}: OpenCV reads no frame" in error
    assert _names(tmp_path / "out") == ["a.jpg", "c.jpg", "results.json"]
    assert {one["image_id"] for one in _results(tmp_path / "out" / "results.json")} == {1, 2}

    for name in ("a.jpg", "c.jpg"):
        (folder / name).write_bytes(b"")
    assert _run(model, folder, "-o", tmp_path / "nothing") == 2
    assert "of 3 sources 3 could not" in _error(capsys)
    assert _names(tmp_path / "nothing") == []


def test_many_faults_are_one_message_of_bounded_length(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(12):
        path = tmp_path / "folder" / f"{index:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert _run(model, tmp_path / "folder", "-o", tmp_path / "out") == 2
    error = _error(capsys)
    assert "04.jpg" in error
    assert "05.jpg" not in error
    assert error.endswith("; and 7 more")


def test_a_video_that_ends_early_is_said_to_and_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = _write_video(tmp_path / "clip.avi", 20)
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    readable = _frames(video)
    assert 5 < readable < 15
    assert _run(model, video, "-o", tmp_path / "out") == 2
    assert f"{video} ends after {readable} of 20 frames" in _error(capsys)
    assert _frames(tmp_path / "out" / "clip.mp4") == readable
    assert {one["frame"] for one in _results(tmp_path / "out" / "results.json")} == set(range(readable))

    video = _write_video(tmp_path / "clip.mp4", 20)
    video.write_bytes(video.read_bytes()[:-200])  # which takes its index
    assert _run(model, video, "-o", tmp_path / "none") == 2
    assert "OpenCV reads no frame" in _error(capsys)
    assert _names(tmp_path / "none") == []


class Camera:
    """Stands for cv2.VideoCapture on a camera of `frames` frames; then Ctrl-C is pressed, or it is unplugged."""

    def __init__(self, frames: int, then: str) -> None:
        self.left, self.then, self.released = frames, then, False

    def read(self) -> Tuple[bool, Any]:
        if self.left == 0 and self.then == "Ctrl-C":
            raise KeyboardInterrupt
        self.left -= 1
        return (True, _image(self.left)) if self.left >= 0 else (False, None)

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FRAME_COUNT: -1.0, cv2.CAP_PROP_FPS: 0.0}[what]

    def isOpened(self) -> bool:
        return True

    def release(self) -> None:
        self.released = True


@pytest.mark.parametrize(("then", "status"), [("Ctrl-C", 0), ("unplugged", 2)])
def test_a_camera_runs_until_it_is_stopped(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    then: str,
    status: int,
) -> None:
    camera, real = Camera(4, then), cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: camera if source == 3 else real(source))
    monkeypatch.chdir(tmp_path)
    assert _run(model, "3", "-o", "out") == status
    assert camera.released
    assert _frames(tmp_path / "out" / "camera3.mp4") == 4
    assert real(str(tmp_path / "out" / "camera3.mp4")).get(cv2.CAP_PROP_FPS) == FRAMES_PER_S
    results = _results(tmp_path / "out" / "results.json")
    assert {(one["file_name"], one["frame"]) for one in results} == {("camera 3", frame) for frame in range(4)}
    if status:
        assert "camera 3 gave no more after 4 frames" in _error(capsys)


def test_ctrl_c_in_a_video_leaves_nothing_half_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, real = _write_video(tmp_path / "clip.mp4", 9), cv2.VideoCapture
    monkeypatch.setattr(
        cv2, "VideoCapture", lambda source: Camera(4, "Ctrl-C") if source == str(video) else real(source)
    )
    assert _run(model, video, "-o", tmp_path / "out") == 130
    assert _names(tmp_path / "out") == []


def test_nothing_that_is_read_is_written_over(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write_image(tmp_path / "images" / "x.png")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "images")
    before = {path: path.read_bytes() for path in (source, model, Path(f"{model}.json"))}
    for words in (
        ["-o", source.parent],
        ["-o", link],
        ["-o", tmp_path / "out", "--json", source],
        ["-o", tmp_path / "out", "--json", model],
        ["-o", tmp_path / "out", "--json", f"{model}.json"],
    ):
        assert _run(model, source, *words) == 2
        assert "would be written over, and is read here" in _error(capsys)
    assert {path: path.read_bytes() for path in before} == before
    assert _names(source.parent) == ["x.png"]


def test_bad_words_are_one_message(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write_image(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    out = ["-o", str(tmp_path / "out")]
    for words, named in (
        ([str(model), "nope.jpg", *out], "no such file or folder: nope.jpg"),
        ([str(model), str(tmp_path / "empty"), *out], "has no images"),
        ([str(model), str(source), "--score", "1.5", *out], "the score threshold is 1.5"),
        ([str(tmp_path / "nope.onnx"), str(source), *out], "no such file"),
        ([str(source), str(source), *out], r"suffix is '.png'; expected .onnx or .engine"),
    ):
        assert detect.main(words) == 2
        assert named in _error(capsys)
    assert not (tmp_path / "out").exists() or _names(tmp_path / "out") == []


LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from deploy.detect import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("name", ["x.png", "clip.mp4"])
def test_a_full_disk_is_one_message_and_nothing_half_written(model: Path, tmp_path: Path, name: str) -> None:
    source = _write_image(tmp_path / name) if name == "x.png" else _write_video(tmp_path / name, 30)
    assert source.stat().st_size > 8000
    words = ["-c", LIMITED, "8000", str(model), str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: cannot write {tmp_path / 'out' / name}")
    assert "Is the disk full?" in error
    assert _names(tmp_path / "out") == []


# Drawing --------------------------------------------------------------------------------------------------------------
