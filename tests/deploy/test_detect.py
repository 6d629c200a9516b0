from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import pytest
from PIL import Image

from deploy import detect
from deploy.detector import Detector
from deploy.errors import ContractError
from deploy.runtime import video as video_module
from deploy.runtime.draw import draw

ROOT = Path(__file__).parents[2]
SCORE = 0.6


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """What started the tests may ignore them, as nohup and the background jobs of a shell do."""
    wanted = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def _times(path: Path) -> List[float]:
    """When each frame of a video is shown, in s."""
    capture, times = cv2.VideoCapture(str(path)), []
    while capture.read()[0]:
        times.append(round(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, 3))
    return times


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
    """
    Stands for cv2.VideoCapture on a camera of `frames` frames; then it is unplugged.

    Args:
        then: a signal that comes while the last frame is taken.
        times_s: its clock at each frame; none: it has no clock.
        last: the last frame.
    """

    def __init__(
        self, frames: int, then: Optional[int] = None, times_s: Sequence[float] = (), last: Optional[np.ndarray] = None
    ) -> None:
        self.frames, self.then, self.times_s, self.last = frames, then, times_s, last
        self.taken, self.released = 0, False

    def read(self) -> Tuple[bool, Any]:
        self.taken += 1
        if self.taken == self.frames and self.then is not None:
            signal.raise_signal(self.then)
        if self.taken == self.frames and self.last is not None:
            return True, self.last
        return (True, _image(self.taken)) if self.taken <= self.frames else (False, None)

    def get(self, what: int) -> float:
        if what == cv2.CAP_PROP_POS_MSEC:
            return 1000 * self.times_s[self.taken - 1] if self.times_s else 0.0
        return {cv2.CAP_PROP_FRAME_COUNT: -1.0, cv2.CAP_PROP_FPS: 0.0}[what]

    def isOpened(self) -> bool:
        return True

    def release(self) -> None:
        self.released = True


@pytest.fixture
def camera_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Camera], None]:
    """`camera_3(camera)` plugs it in as number 3 and as rtsp://camera."""
    real = cv2.VideoCapture

    def plug_in(camera: Camera) -> None:
        monkeypatch.setattr(
            cv2, "VideoCapture", lambda source, *api: camera if source in (3, "rtsp://camera") else real(source)
        )
        monkeypatch.chdir(tmp_path)

    return plug_in


@pytest.mark.parametrize(
    ("then", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (None, 2)]
)
def test_a_camera_runs_until_it_is_stopped(
    model: Path,
    tmp_path: Path,
    camera_3: Callable[[Camera], None],
    capsys: pytest.CaptureFixture[str],
    then: Optional[int],
    status: int,
) -> None:
    camera = Camera(4, then, times_s=(50.0, 50.5, 50.6, 51.0))
    camera_3(camera)
    assert _run(model, "3", "-o", "out") == status
    assert camera.released
    assert _times(tmp_path / "out" / "camera3.mp4") == [0.0, 0.5, 0.6, 1.0]
    results = _results(tmp_path / "out" / "results.json")
    assert {(one["file_name"], one["frame"], one["time_s"]) for one in results} == {
        ("camera 3", frame, time_s) for frame, time_s in enumerate((0.0, 0.5, 0.6, 1.0))
    }
    output = capsys.readouterr()
    assert "camera 3: 4 frames in 1.0 s, from 20" in output.out
    assert f"{len(results)} detections in 4 pictures" in output.out
    if then is None:
        assert "camera 3 gave no more after 4 frames" in output.err.splitlines()[-1]


def test_ctrl_c_ends_a_camera_and_not_what_comes_after_it(
    model: Path, tmp_path: Path, camera_3: Callable[[Camera], None]
) -> None:
    camera_3(Camera(4, signal.SIGINT))
    video = _write_video(tmp_path / "clip.mp4", 3)
    assert _run(model, "3", video, "-o", "out") == 0
    assert (_frames(tmp_path / "out" / "camera3.mp4"), _frames(tmp_path / "out" / "clip.mp4")) == (4, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_seen_of_a_video_and_of_pictures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    picture, video = _write_image(tmp_path / "a.png"), _write_video(tmp_path / "clip.mp4", 9)
    detect_one, calls = Detector.__call__, 0

    def detect_and_press(self: Detector, image: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            signal.raise_signal(number)
        return detect_one(self, image)

    monkeypatch.setattr(Detector, "__call__", detect_and_press)
    for last, names, kept in ((4, ["a.png", "clip.mp4", "results.json"], 3), (1, ["a.png", "results.json"], 0)):
        calls = 0
        out = tmp_path / f"out{last}"
        assert _run(model, picture, video, "-o", out) == 128 + number
        assert _names(out) == names
        assert kept == 0 or _frames(out / "clip.mp4") == kept
        assert {one["image_id"] for one in _results(out / "results.json")} == set(range(1, last + 1))
        assert ", of what was seen before the end" in capsys.readouterr().out


def test_a_camera_without_a_clock_is_said_to_have_none(
    model: Path, tmp_path: Path, camera_3: Callable[[Camera], None], capsys: pytest.CaptureFixture[str]
) -> None:
    camera_3(Camera(4, signal.SIGINT))
    assert _run(model, "3", "-o", "out") == 0
    times = sorted({one["time_s"] for one in _results(tmp_path / "out" / "results.json")})
    assert times[0] == 0
    assert len(times) == 4  # of arrival
    assert "camera 3: no frames have a time stamp of their own: time_s is the times at which" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "named"),
    [
        (np.zeros((96, 160, 3), np.uint8), "its frames change from 160 x 120 to 160 x 96 pixels"),
        (np.zeros((120, 160, 3), np.uint16), "its frames are uint16, (120, 160, 3); expected uint8"),
        (np.zeros((180, 160), np.uint8), "its frames are uint8, (180, 160); expected uint8, (height, width, 3)"),
    ],
)
def test_frames_that_are_unlike_the_first_end_a_stream(
    model: Path,
    tmp_path: Path,
    camera_3: Callable[[Camera], None],
    capsys: pytest.CaptureFixture[str],
    last: np.ndarray,
    named: str,
) -> None:
    camera_3(Camera(4, last=last))
    assert _run(model, "rtsp://camera", "-o", "out") == 2
    error = _error(capsys)
    assert "rtsp://camera ends after 3 frames: " in error
    assert named in error
    assert _frames(tmp_path / "out" / "camera.mp4") == 3
    camera_3(Camera(1, last=np.zeros((120, 160), np.uint8)))
    assert _run(model, "rtsp://camera", "-o", "none") == 2
    assert "its frames are uint8, (120, 160)" in _error(capsys)
    assert _names(tmp_path / "none") == []


def test_what_the_model_gives_for_a_frame_may_be_wrong_and_what_came_before_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video, detect_one, calls = _write_video(tmp_path / "clip.mp4", 9), Detector.__call__, 0

    def detect_four(self: Detector, image: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ContractError("the image: the model gave values that are not numbers")
        return detect_one(self, image)

    monkeypatch.setattr(Detector, "__call__", detect_four)
    assert _run(model, video, tmp_path / "clip.mp4", "-o", tmp_path / "out") == 2
    assert f"file_name {video}, frame 4" in _error(capsys)
    assert _names(tmp_path / "out") == ["clip.mp4", "results.json"]
    assert _frames(tmp_path / "out" / "clip.mp4") == 4


def test_a_disk_that_fills_up_ends_a_video_while_it_can_be_closed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([2**30, 10 * 2**20])
    monkeypatch.setattr(video_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(looks)))
    monkeypatch.setattr(video_module, "FRAMES_BETWEEN_LOOKS", 4)
    assert _run(model, _write_video(tmp_path / "clip.mp4", 9), "-o", tmp_path / "out") == 2
    error = _error(capsys)
    assert f"cannot write {tmp_path / 'out' / 'clip.mp4'} beyond 4 frames: only 10 MiB are free" in error
    assert _frames(tmp_path / "out" / "clip.mp4") == 4


# Streams --------------------------------------------------------------------------------------------------------------


class MotionJpeg(http.server.BaseHTTPRequestHandler):
    """What an IP camera sends, until it breaks off after some frames."""

    FRAMES = 6

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        for index in range(self.FRAMES):
            jpeg = cv2.imencode(".jpg", _image(index))[1].tobytes()
            self.wfile.write(b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
            self.wfile.write(jpeg + b"\r\n")

    def log_message(self, *_words: Any) -> None:
        pass


@pytest.fixture
def stream() -> Iterator[str]:
    """Host and port of a server that sends it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MotionJpeg)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_stream_that_breaks_off_keeps_what_came(
    model: Path, tmp_path: Path, stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(model, f"http://user:secret@{stream}/cam1/live.mjpg?channel=2", "-o", tmp_path / "out") == 2
    output = capsys.readouterr()
    name = f"http://user:***@{stream}/cam1/live.mjpg?channel=2"
    assert f"{name} gave no more after 6 frames" in output.err.splitlines()[-1]
    video = f"{stream.replace(':', '_')}_cam1_live.mp4"
    assert _names(tmp_path / "out") == sorted([video, "results.json"])
    assert _frames(tmp_path / "out" / video) == 6
    results = _results(tmp_path / "out" / "results.json")
    assert {one["frame"] for one in results} == set(range(6))
    assert {one["file_name"] for one in results} == {name}
    assert "secret" not in output.out + output.err + (tmp_path / "out" / "results.json").read_text()


def test_a_pipe_is_read_as_a_video(model: Path, tmp_path: Path) -> None:
    video, pipe = _write_video(tmp_path / "clip.avi", 5), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(video.read_bytes()))
    writer.start()
    assert _run(model, pipe, "-o", tmp_path / "out") == 0
    writer.join()
    assert _frames(tmp_path / "out" / "pipe.mp4") == 5


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("http://127.0.0.1:1/live", "http://127.0.0.1:1/live: OpenCV reads no frame from it; expected the address"),
        ("videotestsrc ! appsink", "built without GStreamer"),
        ("/dev/null", "/dev/null: OpenCV reads no frame from it; expected a camera"),
        ("987", "camera 987: OpenCV reads no frame from it; expected a camera"),
        ("/dev/video987", "no such file or folder: /dev/video987; expected a picture"),
        ("x" * 300, "no such file or folder: xxx"),
        ("x ! " * 100, "built without GStreamer"),
    ],
)
def test_a_source_that_gives_nothing_is_one_message(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, named: str
) -> None:
    if "GStreamer" in named and cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        pytest.skip("this OpenCV has GStreamer")
    assert _run(model, word, "-o", tmp_path / "out") == 2
    assert named in _error(capsys)
    assert not (tmp_path / "out").exists() or _names(tmp_path / "out") == []


def test_frame_times_of_a_video_of_variable_rate_are_kept(model: Path, tmp_path: Path) -> None:
    pictures = [Image.fromarray(_image(seed)) for seed in range(5)]
    gif = tmp_path / "clip.gif"
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=[100, 300, 50, 500, 200])
    assert _run(model, gif, "-o", tmp_path / "out") == 0
    expected = [0.0, 0.1, 0.4, 0.45, 0.95]
    results = _results(tmp_path / "out" / "results.json")
    assert sorted({(one["frame"], one["time_s"]) for one in results}) == list(enumerate(expected))
    assert _times(tmp_path / "out" / "clip.mp4") == expected


def test_a_video_without_times_goes_by_its_rate_and_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "clip.mjpg"
    video.write_bytes(b"".join(cv2.imencode(".jpg", _image(seed))[1].tobytes() for seed in range(4)))
    assert _run(model, video, "-o", tmp_path / "out") == 0
    assert "no frames have a time stamp of their own: time_s is counted by 25 frames per s" in capsys.readouterr().err
    results = _results(tmp_path / "out" / "results.json")
    assert sorted({one["time_s"] for one in results}) == [0.0, 0.04, 0.08, 0.12]


# Pictures of all formats ----------------------------------------------------------------------------------------------


def test_pictures_of_every_format_that_opencv_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, image = tmp_path / "folder", _image(0)
    folder.mkdir()
    for suffix in (".jpe", ".dib", ".webp", ".tiff", ".jp2", ".ppm", ".pnm", ".ras", ".gif", ".avif"):
        if cv2.haveImageWriter(f"x{suffix}"):
            assert cv2.imwrite(str(folder / f"in{suffix[1:]}{suffix}"), image)
    assert cv2.imwrite(str(folder / "grey.pgm"), image[..., 0])
    assert cv2.imwrite(str(folder / "hdr.hdr"), image.astype(np.float32) / 255)
    (folder / "clip.mov").write_bytes(b"")
    read = len(list(folder.iterdir())) - 1
    lone = _write_image(tmp_path / "photo.jpg").rename(tmp_path / "photo")  # by its content
    assert _run(model, folder, lone, "-o", tmp_path / "out") == 0
    assert f"1 of the {read + 1} files in {folder} are no pictures by their names (.mov)" in capsys.readouterr().err
    names = _names(tmp_path / "out")
    assert {"injpe.jpe", "indib.dib", "intiff.tiff", "inras.png", "grey.png", "hdr.png", "photo.png"} <= set(names)
    assert len(names) == read + 2
    assert all(cv2.imread(str(tmp_path / "out" / name)).shape == image.shape for name in names if "json" not in name)


def test_pictures_without_a_scale_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = _image(0).astype(np.float32) / 255
    for name in ("x.pfm", "x.tif"):
        assert cv2.imwrite(str(tmp_path / name), values)
        assert _run(model, tmp_path / name, "-o", tmp_path / "out") == 2
        assert "of which nothing says which value is white; expected 8 or 16 bits" in _error(capsys)


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
    assert source.stat().st_size > 15000
    words = ["-c", LIMITED, "15000", str(model), str(source), "-o", str(tmp_path / "out"), "--score", "0.7"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write ")
    assert "Is the disk full?" in error
    assert "results in" in done.stdout
    written = _names(tmp_path / "out")
    results = _results(tmp_path / "out" / "results.json")  # of all that was detected before
    if name == "x.png":
        assert f"cannot write {tmp_path / 'out' / name}" in error
        assert written == ["results.json"]
        assert {one["image_id"] for one in results} == {1}
    else:
        seen = {one["image_id"] for one in results}
        assert 0 < len(seen) < 30
        assert written == ["results.json"] or _frames(tmp_path / "out" / name) == len(seen)


# Drawing --------------------------------------------------------------------------------------------------------------
