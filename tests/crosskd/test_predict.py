"""crosskd.predict: COCO results of mmdet's own detections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosskd import predict
from crosskd.run_dir import load_run
from deploy.dataset import load_coco
from deploy.layouts import split_paths


def _words(run_dir: Path, shapes_dir: Path, output: Path) -> list[str]:
    annotations, images_dir = split_paths(shapes_dir, "test")
    return [str(run_dir), "--annotations", str(annotations), "--images-dir", str(images_dir), "-o", str(output)]


def test_the_results_are_those_of_the_detector(student_run: Path, shapes_dir: Path, tmp_path: Path) -> None:
    assert predict.main(_words(student_run, shapes_dir, tmp_path / "x.json")) == 0
    results = json.loads((tmp_path / "x.json").read_text())
    assert len(results) > 10
    config, detector, _ = load_run(student_run)
    detect = predict.predictor(config, detector)
    expected = []
    for image in load_coco(*split_paths(shapes_dir, "test")).images:
        for (x1, y1, x2, y2), score, label in zip(*detect(image), strict=True):
            assert 0 <= x1 < x2 <= image.width_px
            assert 0 <= y1 < y2 <= image.height_px
            expected.append((image.image_id, label + 1, pytest.approx([x1, y1, x2 - x1, y2 - y1]), score))
    assert [(one["image_id"], one["category_id"], one["bbox"], one["score"]) for one in results] == expected


def test_a_limit(student_run: Path, shapes_dir: Path, tmp_path: Path) -> None:
    assert predict.main([*_words(student_run, shapes_dir, tmp_path / "x.json"), "--limit", "1"]) == 0
    first = load_coco(*split_paths(shapes_dir, "test")).images[0]
    assert {one["image_id"] for one in json.loads((tmp_path / "x.json").read_text())} == {first.image_id}


def test_bad_input_is_refused(
    student_run: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(student_run, shapes_dir, tmp_path / "x.json")
    annotations = json.loads(Path(words[2]).read_text())
    annotations["categories"][0]["name"] = "disc"
    (tmp_path / "other.json").write_text(json.dumps(annotations))
    other = [words[0], "--annotations", str(tmp_path / "other.json"), *words[3:]]
    for bad, named in (
        ([str(tmp_path), *words[1:]], "expected one: the folder of a finished run"),
        ([*words, "--limit", "0"], "--limit is 0; expected at least 1"),
        (other, "has the classes ['disc', 'triangle'"),
        ([*words[:4], str(tmp_path), *words[5:]], "cannot read"),
    ):
        assert predict.main(bad) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert named in error
    assert not (tmp_path / "x.json").exists()
