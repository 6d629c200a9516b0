from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import cv2
import numpy as np
import pytest

import deploy.detector
from deploy import Detector
from deploy.contract import ModelContract
from deploy.errors import ConfigError, ContractError, DataError
from deploy.images import read_image
from deploy.runtime.postprocess import Detections, postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import OrtSession, Session

ROOT = Path(__file__).parents[2]
LIGHT = """
import sys
import deploy
print(sorted({"numpy", "cv2", "deploy.detector"} & set(sys.modules)))
print(deploy.Detector.__module__)
"""


class Echo(Session):
    """Sees one box in each image, of the size of the image in the input, with its mean brightness as the score."""

    def __init__(self, contract: ModelContract) -> None:
        self.contract, self.description = contract, "echo"
        size = contract.input_shape[0]
        self.batch_limits = (size, size) if size > 0 else (1, sys.maxsize)
        self.batches: List[int] = []
        self.closed = 0

    def infer(
        self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None
    ) -> Dict[str, np.ndarray]:
        images = feed[self.contract.input_name]
        assert images.flags.c_contiguous
        self.batches.append(len(images))
        scores = images[:, 0, :4, :4].mean(axis=(1, 2)).reshape(-1, 1)
        boxes = np.tile(np.float32([0, 0, 64, 64]), (len(images), 1, 1))
        return dict(zip(self.contract.output_names, (boxes, scores, np.zeros((len(images), 1), np.int64)), strict=True))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def echo(detector_contract: ModelContract, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Echo]:
    """`echo(batch size)`: the session that the next Detector gets."""

    def install(batch: int) -> Echo:
        values: Dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0)}
        session = Echo(dataclasses.replace(detector_contract, input_shape=(batch, 3, 64, 64), **values))
        monkeypatch.setattr(deploy.detector, "open_session", lambda path, *settings: session)
        return session

    return install


def _grey(brightness: int, width: int = 50) -> np.ndarray:
    return np.full((width, width, 3), brightness, np.uint8)


def _assert_equal(found: Detections, expected: Detections) -> None:
    for field in dataclasses.fields(Detections):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_the_package_is_light_until_the_detector_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "deploy.detector"]
    with pytest.raises(AttributeError, match="has no attribute 'Detektor'"):
        deploy.Detektor  # noqa: B018


def test_an_array_and_a_file_give_what_the_parts_give(detector_file: Callable[..., Path], tmp_path: Path) -> None:
    model = detector_file("mini.onnx")
    image = np.random.randint(0, 256, (48, 90, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    with OrtSession(model) as session:
        prepared = preprocess(image, session.contract)
        outputs = session.infer({session.contract.input_name: prepared.input})
        expected = postprocess(outputs, session.contract, prepared)
    assert len(expected.scores) > 5
    with Detector(model) as detect:
        _assert_equal(detect(image), expected)
        _assert_equal(detect(tmp_path / "image.png"), expected)
        _assert_equal(detect(str(tmp_path / "image.png")), expected)
        assert detect.class_names == ("disc", "bar")
        assert detect.description.startswith("ONNX Runtime")
        np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image)


def test_an_engine_runs_as_an_onnx_file_does(
    detector_file: Callable[..., Path], fake_tensorrt: Callable[[str], Any], tmp_path: Path
) -> None:
    from deploy import build_trt

    fake_tensorrt("10.3.0")
    model, engine = detector_file("mini.onnx"), tmp_path / "mini.engine"
    assert build_trt.main([str(model), "-o", str(engine)]) == 0
    image = np.random.randint(0, 256, (48, 90, 3), np.uint8)
    with Detector(model) as of_onnx, Detector(engine) as of_engine:
        found, expected = of_engine(image), of_onnx(image)
    assert len(expected.scores) > 5
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)


def test_the_threshold_cuts_the_end_off(detector_file: Callable[..., Path]) -> None:
    model = detector_file("mini.onnx")
    image = np.random.randint(0, 256, (48, 90, 3), np.uint8)
    with Detector(model) as detect:
        everything = detect(image)
    threshold = float(everything.scores[3])
    with Detector(model, score_threshold=threshold) as detect:
        found = detect(image)
    _assert_equal(found, Detections(everything.boxes_xyxy[:4], everything.scores[:4], everything.labels[:4]))
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"threshold is {wrong}"):
            Detector(model, score_threshold=wrong)


@pytest.mark.parametrize("batch", [1, 4, -1])
def test_images_of_a_batch_keep_their_places(echo: Callable[[int], Echo], batch: int) -> None:
    session = echo(batch)
    images = [_grey(200, 32), _grey(100, 128), _grey(50, 64)][: batch if batch > 0 else 3]
    with Detector("any.onnx") as detect:
        found = detect.batch(images)
    assert session.batches == [batch if batch > 0 else 3]
    assert [len(one.scores) for one in found] == [1] * len(images)
    for image, one in zip(images, found, strict=True):
        np.testing.assert_allclose(one.scores, image.mean() / 255, atol=1e-5)
        np.testing.assert_array_equal(one.boxes_xyxy, [[0, 0, len(image), len(image)]])
    with Detector("any.onnx") as detect:  # of one image, whatever the batch
        np.testing.assert_allclose(detect(images[0]).scores, 200 / 255, atol=1e-5)


@pytest.mark.parametrize(("batch", "count"), [(1, 2), (4, 5), (1, 0), (-1, 0)])
def test_a_batch_that_the_model_cannot_take_is_refused(echo: Callable[[int], Echo], batch: int, count: int) -> None:
    session = echo(batch)
    detect = Detector("any.onnx")
    with pytest.raises(DataError, match=f"{count} images for one batch; expected 1 to"):
        detect.batch([_grey(9)] * count)
    assert not session.batches


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5, 3), np.float32),
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((1, 5, 5, 3), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(echo: Callable[[int], Echo], image: np.ndarray) -> None:
    session = echo(1)
    with pytest.raises(DataError, match="expected uint8, \\(height, width, 3\\), blue-green-red"):
        Detector("any.onnx")(image)
    assert not session.batches


def test_a_file_that_is_not_there_is_refused(echo: Callable[[int], Echo], tmp_path: Path) -> None:
    echo(1)
    with pytest.raises(DataError, match="cannot read the image"):
        Detector("any.onnx")(tmp_path / "nope.jpg")


def test_one_pixel_is_enough(detector_file: Callable[..., Path]) -> None:
    with Detector(detector_file("mini.onnx")) as detect:
        found = detect(np.full((1, 1, 3), 255, np.uint8))
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= 1).all()


def test_it_is_closed_with_its_block_even_after_an_error(echo: Callable[[int], Echo]) -> None:
    session = echo(1)
    with pytest.raises(DataError), Detector("any.onnx") as detect:
        detect(np.zeros(3, np.uint8))
    assert session.closed == 1


def test_an_unknown_suffix_is_refused() -> None:
    with pytest.raises(ContractError, match=r"expected \.onnx or \.engine"):
        Detector("student.pth")


def test_no_runtime_writes_to_or_reports_from_home(
    small_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name, value in (("HOME", home), ("XDG_CACHE_HOME", home / "cache"), ("XDG_DATA_HOME", home / "data")):
        monkeypatch.setenv(name, str(value))
    for name in ("CI", "ORT_DISABLE_TELEMETRY"):  # either keeps ONNX Runtime silent by itself
        monkeypatch.delenv(name, raising=False)
    code = "import sys; from deploy import Detector; Detector(sys.argv[1]).close()"
    subprocess.run([sys.executable, "-c", code, str(small_file("topk"))], check=True, cwd=ROOT)
    assert [str(path) for path in home.rglob("*")] == []
