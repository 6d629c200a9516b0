"""What a board detects, image by image: cut off and gone on with, and what of it is believed here."""

from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest

from benchmarks.boards import predict
from benchmarks.boards.image_set import ImageSet, SetImage
from benchmarks.boards.received import (
    input_differences,
    is_current,
    preparation_of,
    read_predictions,
    write_accuracy,
)
from benchmarks.boards.sending import images_from_coco, inputs_here
from benchmarks.measuring.result import read_result
from deploy.board import run
from deploy.board.archive import unpack
from deploy.bundle import main as make_bundle
from deploy.contract import load_contract
from deploy.dataset import load_split
from deploy.errors import MeasurementError
from deploy.files import lock, sha256_of, unlock


@pytest.fixture
def images(data_dir):
    return images_from_coco(load_split(data_dir, "test"))


@pytest.fixture
def board(detector, images, tmp_path):
    """A folder as `benchmarks.fleet` leaves it on a board: a bundle, the images by their hashes, and their list."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "board"
    assert make_bundle([str(detector()), "-o", str(tmp_path / "b.tar.gz")]) == 0
    unpack(tmp_path / "b.tar.gz", folder)
    (folder / "images").mkdir()
    for sha256, path in images.files.items():
        (folder / "images" / sha256).write_bytes(path.read_bytes())
    (folder / "images.json").write_bytes(images.content)
    return folder


def words(board, output="predictions.jsonl"):
    return ["--set", str(board / "images.json"), "--images-dir", str(board / "images"), "-o", str(board / output)]


def run_predict(board, output="predictions.jsonl"):
    return run.main(["predict", "--engine", str(board / "b/student.onnx"), *words(board, output)], board / "b")


def test_a_run_that_was_cut_goes_on(board, images, monkeypatch, capsys):
    real, seen = predict.postprocess, []

    def fails_at_the_third(*arguments, image):
        seen.append(image)
        if len(seen) == 3:
            raise MeasurementError("the power went")
        return real(*arguments, image=image)

    monkeypatch.setattr(predict, "postprocess", fails_at_the_third)
    assert run_predict(board) == 2
    assert not (board / "predictions.jsonl").exists()
    part = board / "predictions.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"image_id": 3, "inp')
    assert run_predict(board) == 0
    assert seen == [f"sub/{number}.png" for number in (1, 2, 3, 3, 4, 5)]
    assert not part.exists()
    found = read_predictions(board / "predictions.jsonl", images)
    assert found.crc32 == inputs_here(images, load_contract(board / "b/student.onnx"))
    assert len(found.results) == 10
    assert found.header["role"] == "onnx-fp32"

    monkeypatch.setattr(predict, "postprocess", real)
    assert run_predict(board, "again.jsonl") == 0
    lines = [(board / name).read_bytes().splitlines()[:-1] for name in ("predictions.jsonl", "again.jsonl")]
    assert lines[0] == lines[1]
    part.write_bytes(lines[0][0].replace(b"onnx-fp32", b"onnx-int8") + b"\n" + lines[0][1] + b"\n")
    assert run_predict(board) == 0
    assert (board / "predictions.jsonl").read_bytes().splitlines()[:-1] == lines[0]

    part.touch()
    with part.open("rb+") as file:
        handle = __import__("os").dup(file.fileno())
    lock(handle)
    capsys.readouterr()
    assert run_predict(board) == 2
    assert "is being written by another run.py predict" in capsys.readouterr().err
    unlock(handle)


def test_an_image_that_was_damaged_on_the_board_is_sent_anew(board, images, capsys):
    path = board / "images" / images.image_set.images[1].sha256
    path.write_bytes(path.read_bytes()[:-1])
    assert run_predict(board) == 2
    assert "sub/2.png was damaged on the board and is removed" in capsys.readouterr().err
    assert not path.exists()
    assert run_predict(board) == 2
    assert f"sub/2.png is not there as {path} (No such file or directory)" in capsys.readouterr().err


def test_the_accuracy_result_of_what_a_board_detected(board, images, tmp_path):
    pytest.importorskip("faster_coco_eval")
    assert run_predict(board) == 0
    found = read_predictions(board / "predictions.jsonl", images)
    path = tmp_path / "fp32.accuracy.result.json"
    write_accuracy(path, found, images, preparation_of(found, []))
    result = read_result(path)
    assert result["numbers"]["AP"] == pytest.approx(1.0)
    assert result["model"]["sha256"] == sha256_of(board / "b/student.onnx")
    assert is_current(path, found.header, images)
    assert not is_current(path, {**found.header, "library": "another"}, images)
    fewer = dataclasses.replace(images.coco, images=images.coco.images[:4])
    assert not is_current(path, found.header, images_from_coco(fewer))
    detections = tmp_path / "fp32.accuracy.detections.json"
    detections.write_text(detections.read_text() + " ")
    assert not is_current(path, found.header, images)


def test_how_far_inputs_differ_is_measured(board, images, tmp_path):
    path = board / "images" / images.image_set.images[0].sha256
    pixels = cv2.imread(str(path)).astype(int)
    assert run.main(["prepare", *words(board, "same.npz"), "--ids", "1", "2"], board / "b") == 0
    contract = load_contract(board / "b/student.onnx")
    assert input_differences(board / "same.npz", images, contract) == (0.0, 0.0)
    brighter = np.clip(pixels + 3, 0, 255).astype(np.uint8)
    cv2.imwrite(str(images.coco.images[0].path), brighter)  # here, after it was sent
    largest, mean = input_differences(board / "same.npz", images, contract)
    assert 2 <= largest <= 3
    assert 0.5 < mean < 1.5
    (board / "same.npz").write_bytes(b"PK")
    with pytest.raises(MeasurementError, match="what the board prepared cannot be read"):
        input_differences(board / "same.npz", images, contract)


HEADER = {
    "predictions_version": 1, "role": "r", "model": {"sha256": "0"}, "images_sha256": "0", "description": "d",
    "library": "l", "versions": {},
}  # fmt: skip
IMAGE = {"image_id": 1, "input_crc32": 7, "boxes": [[3, 0.5, 1, 2, 3, 4]]}
OTHER = {**IMAGE, "image_id": 2}
END = {"images": 2, "environment": {}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has a line that is not JSON"),
        ([HEADER, IMAGE, OTHER], "is cut: it has no end after 2 images"),
        ([HEADER, IMAGE, END], "has 1 images; expected the 2 that were sent"),
        ([HEADER, IMAGE, IMAGE, END], "has the image 1 twice"),
        ([HEADER, IMAGE, {**OTHER, "image_id": 5}, END], "expected the 2 that were sent"),
        ([HEADER, IMAGE, OTHER, END, END], "goes on behind its end"),
        ([HEADER, IMAGE, OTHER, {**END, "images": 3}], "expected the 2 that were sent"),
        ([HEADER, IMAGE, "[1]", END], "no JSON object"),
        ([HEADER, {**IMAGE, "boxes": [[1, 2, 3]]}, OTHER, END], r"boxes\[0\] is"),
        (
            [HEADER, json.dumps({**IMAGE, "boxes": [[1, 0, 0, 0, 0, float("inf")]]}), OTHER, END],
            r"boxes\[0\]\[5\] is inf",
        ),
        ([{**HEADER, "predictions_version": 9}, IMAGE, OTHER, END], "predictions_version is 9; expected 1"),
        ([{**HEADER, "role": 3}, IMAGE, OTHER, END], "role is 3"),
    ],
)
def test_what_a_board_sends_is_not_believed(lines, message, tmp_path):
    image_set = ImageSet({}, (SetImage(1, "a", "1"), SetImage(2, "b", "2")))
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))

    class Images:
        pass

    Images.image_set = image_set
    with pytest.raises(MeasurementError, match=message):
        read_predictions(path, Images)
