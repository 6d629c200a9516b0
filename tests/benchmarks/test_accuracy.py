from __future__ import annotations

import contextlib
import dataclasses
import json
import tracemalloc

import cv2
import numpy as np
import pytest

from benchmarks import accuracy
from benchmarks.measuring import subject, timing
from benchmarks.measuring.result import read_result
from deploy.contract import load_contract, write_sidecar
from deploy.dataset import load_split
from deploy.errors import MeasurementError
from deploy.files import sha256_of
from deploy.runtime.session import open_session


def run(*words):
    return accuracy.main([str(word) for word in words])


def test_an_onnx_file_that_finds_everything_has_ap_1(data_dir, detector, tmp_path, capsys):
    model, output = detector(), tmp_path / "fp32.result.json"
    assert run(model, "--data", data_dir, "--role", "onnx-fp32", "-o", output) == 0
    result = read_result(output)
    assert result["numbers"]["AP"] == pytest.approx(1.0)
    assert result["numbers"]["AP_small"] is None
    assert result["numbers"]["per_class"] == pytest.approx({"disc": 1.0, "star": 1.0})
    assert (result["kind"], result["role"]) == ("accuracy", "onnx-fp32")
    assert result["model"]["sha256"] == sha256_of(model)
    assert result["model"]["bytes"] == model.stat().st_size
    assert result["model"]["parameters"] == 3  # the weight of the one convolution
    assert result["data"]["images"] == 5
    numbers = result["numbers"]
    assert numbers["best_f1"]["score"] == pytest.approx(0.9, abs=1e-6)
    assert [numbers["best_f1"][key] for key in ("f1", "true", "false", "missed")] == [1.0, 10, 0, 0]
    assert numbers["best_f1_per_class"]["star"]["true"] == 5
    assert numbers["found_scores"] == {name: pytest.approx([0.9] * 5) for name in ("disc", "star")}
    assert len(numbers["bootstrap"]["ap"]) == 1001
    assert set(numbers["bootstrap"]["ap"]) == {1.0}
    assert len(numbers["pr_curves"]["AP50"]["mean"]) == 101
    assert numbers["against"] is None
    kept = tmp_path / "fp32.detections.json"
    assert result["detections"] == {"file": kept.name, "sha256": sha256_of(kept), "count": 10}
    assert json.loads(kept.read_text())[0]["bbox"] == pytest.approx([20.0, 10.0, 60.0, 50.0])
    assert "AP 100.0" in capsys.readouterr().out


def test_all_pictures_that_cannot_be_read_are_named_at_once(data_dir, detector, tmp_path, capsys):
    images = load_split(data_dir, "test").images
    for image in images[1:3]:
        noise = np.random.default_rng(0).integers(0, 255, (image.height_px, image.width_px, 3), np.uint8)
        content = cv2.imencode(".png", noise)[1].tobytes()
        start = content.index(b"IDAT") + 4
        image.path.write_bytes(content[:start] + bytes(500) + content[start + 500 :])
    assert run(detector(), "--data", data_dir, "--role", "onnx-fp32", "-o", tmp_path / "r.result.json") == 2
    said = capsys.readouterr().err
    assert f"2 of {len(images)} pictures cannot be decoded" in said
    assert all(image.path.name in said for image in images[1:3])


def test_the_same_file_on_openvino(data_dir, detector, tmp_path):
    pytest.importorskip("openvino")
    output = tmp_path / "openvino.result.json"
    words = ["--runtime", "openvino", "--role", "openvino-fp32"]
    assert run(detector(), "--data", data_dir, *words, "-o", output) == 0
    result = read_result(output)
    assert result["numbers"]["AP"] == pytest.approx(1.0)
    assert result["model"]["runtime"] == "openvino"


def test_a_runtime_for_what_is_not_run_is_refused(data_dir, tmp_path, capsys):
    (tmp_path / "results.json").write_text("[]")
    for model, message in ((tmp_path / "results.json", "nothing is run"), (tmp_path, "is a run directory")):
        words = [model, "--runtime", "openvino", "--data", data_dir, "-o", tmp_path / "x.result.json"]
        assert run(*words) == 2
        assert message in capsys.readouterr().err


def test_boxes_found_twice_and_missed_lower_ap(data_dir, detector, tmp_path):
    output = tmp_path / "x.result.json"
    run(detector(boxes=[[20.0, 10.0, 80.0, 60.0]]), "--data", data_dir, "-o", output)
    result = read_result(output)
    assert result["numbers"]["per_class"] == pytest.approx({"disc": 1.0, "star": 0.0})
    assert result["numbers"]["AP"] == pytest.approx(0.5)
    assert result["role"] == "student.onnx"  # not "student", which is torch's


def test_limit_counts_only_the_first_images(data_dir, detector, tmp_path):
    output = tmp_path / "x.result.json"
    annotations = data_dir / "annotations" / "instances_test.json"
    words = ["--annotations", annotations, "--images-dir", data_dir / "images", "--limit", 2, "-o", output]
    assert run(detector(), *words) == 0
    result = read_result(output)
    assert result["data"]["images"] == 2
    assert result["detections"]["count"] == 4
    assert result["numbers"]["AP"] == pytest.approx(1.0)


def test_the_kept_detections_are_a_model_of_the_same_numbers(data_dir, detector, tmp_path, capsys):
    """COCO results of anybody's detector go in as they are; ours are such a file."""
    run(detector(boxes=[[20.0, 10.0, 80.0, 64.0]]), "--data", data_dir, "-o", tmp_path / "x.result.json")
    kept = tmp_path / "x.detections.json"
    assert run(kept, "--data", data_dir, "--role", "rival", "-o", tmp_path / "rival.result.json") == 0
    first, second = (read_result(tmp_path / f"{name}.result.json") for name in ("x", "rival"))
    assert second["numbers"] == first["numbers"]
    assert (second["role"], second["model"]["format"], second["model"]["parameters"]) == ("rival", "detections", None)
    assert second["model"]["sha256"] == sha256_of(kept)
    assert run(kept, "--data", data_dir, "-o", tmp_path / "x.result.json") == 2
    assert "would be written over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": 77, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}]', "no image that is measured"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]', "no category has the id 1"),
        ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, -3, 4], "score": 0.5}]', "its size is negative"),
        ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": NaN}]', "a number is not finite"),
        ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]', "a key is missing"),
        ("[3]", "a key is missing or of a wrong type"),
        ('{"images": []}', "holds a dict; expected COCO results"),
        ("[", "is not JSON"),
    ],
)
def test_bad_results_of_others_are_one_message_and_no_file(data_dir, tmp_path, capsys, content, message):
    (tmp_path / "theirs.json").write_text(content)
    assert run(tmp_path / "theirs.json", "--data", data_dir, "-o", tmp_path / "x.result.json") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


def test_no_results_of_others(data_dir, tmp_path, capsys):
    assert run(tmp_path / "none.json", "--data", data_dir, "-o", tmp_path / "x.result.json") == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("[]")
    words = (tmp_path / "none.json", "--data", data_dir, "-o", tmp_path / "x.result.json")
    assert run(*words, "--limit", 2) == 2
    assert "--limit does not go with" in capsys.readouterr().err
    assert run(*words) == 0
    numbers = read_result(tmp_path / "x.result.json")["numbers"]
    assert (numbers["AP"], numbers["best_f1"], numbers["best_f1_per_class"]["disc"]) == (0.0, None, None)


def test_against_another_result_tells_what_was_lost_and_gained(data_dir, detector, tmp_path, capsys):
    both, one = tmp_path / "both.result.json", tmp_path / "one.result.json"
    run(detector("both.onnx"), "--data", data_dir, "--role", "teacher", "-o", both)
    model = detector("one.onnx", boxes=[[20.0, 10.0, 80.0, 60.0]])
    assert run(model, "--data", data_dir, "--against", both, "-o", one) == 0
    result = read_result(one)
    against = result["numbers"]["against"]
    assert against["role"] == "teacher"
    assert [against[key] for key in ("AP_difference", "low", "high")] == pytest.approx([-0.5] * 3)
    assert (against["lost"], against["gained"], against["score_shift"]) == (5, 0, 0.0)
    assert against["per_class"] == {"disc": {"lost": 0, "gained": 0}, "star": {"lost": 5, "gained": 0}}
    assert result["inputs"]["against"]["sha256"] == sha256_of(both)
    assert "5 boxes lost and 0 gained against it" in capsys.readouterr().out


def test_against_other_data_is_refused_before_measuring(data_dir, detector, result, tmp_path, capsys):
    words = (detector(), "--data", data_dir, "-o", tmp_path / "x.result.json", "--against")
    assert run(*words, result("teacher", ap=0.5, data__annotations_sha256="0" * 64)) == 2
    assert "differ in data.annotations_sha256" in capsys.readouterr().err
    assert run(*words, result("teacher", ms=9.0)) == 2
    assert "expected an accuracy result" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


def test_a_failure_while_writing_leaves_no_result(data_dir, detector, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("benchmarks.measuring.result.write_json", fail)
    assert run(detector(), "--data", data_dir, "-o", tmp_path / "x.result.json") == 3
    assert "OSError: disk full" in capsys.readouterr().err
    assert not (tmp_path / "x.result.json").exists()


def test_memory_does_not_grow_with_the_images(data_dir, detector):
    """Only detections stay: an image and what is computed of it are gone when the next is read."""
    data = load_split(data_dir, "test")
    few, many = dataclasses.replace(data, images=data.images[:2]), dataclasses.replace(data, images=data.images * 40)
    peaks = []
    with open_session(detector()) as session:
        for images in (few, many):
            tracemalloc.start()
            accuracy.detections_from_session(session, images)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2e6  # 198 images more are 14 MB of pixels, 44 MB of network inputs


def test_values_that_are_no_numbers_name_the_image(data_dir, detector, tmp_path, capsys):
    output = tmp_path / "x.result.json"
    assert run(detector(boxes=[[0, 0, np.inf, 9]]), "--data", data_dir, "-o", output) == 2
    assert "1.png: the model gave values that are not numbers" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("contract", "words", "message"),
    [
        ({"class_names": ("disc", "ring")}, (), "differ in their classes"),
        ({"category_ids": (1, 2)}, (), "differ in their classes"),
        ({"input_shape": (2, 3, 64, 96)}, (), "its contract expects"),
        ({}, ("--against", "none.json"), "cannot read none.json"),
        ({}, ("--limit", "0"), "--limit is 0"),
        ({}, ("--role", " "), "--role is empty"),
        ({}, ("--split", "val"), "instances_val.json"),
        ({}, ("--images-dir", "x"), "give either --data"),
        ({}, ("-o", "/dev/null/x.result.json"), "cannot write"),
    ],
)
def test_bad_input_is_one_message_and_no_file(data_dir, detector, tmp_path, capsys, contract, words, message):
    output = tmp_path / "x.result.json"
    assert run(detector(**contract), "--data", data_dir, "-o", output, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert not output.exists()


@pytest.mark.parametrize(("batch", "fits"), [(1, True), (-1, True), (2, False)])
def test_a_model_takes_one_image_or_any_number(data_dir, detector, batch, fits):
    model = detector()
    contract = dataclasses.replace(load_contract(model), input_shape=(batch, 3, 64, 96))
    expectation = contextlib.nullcontext() if fits else pytest.raises(MeasurementError, match="takes 2 images at once")
    with expectation:
        subject.check_fits(contract, load_split(data_dir, "test"), subject.load_subject(str(model)))


def test_a_model_that_cannot_be_measured(data_dir, detector, tmp_path, capsys):
    words = ("--data", data_dir, "-o", tmp_path / "x.result.json")
    assert run(tmp_path / "model.pt", *words) == 2
    assert "expected an .onnx file, an .engine file or a run directory" in capsys.readouterr().err
    model = detector()
    model.write_bytes(model.read_bytes()[:-10])
    assert run(model, *words) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert run(data_dir, *words) == 2
    assert "holds neither of student.pth and detector.pth" in capsys.readouterr().err


PREDICT = """
import json, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
document = json.load(open(words["--annotations"]))
count = int(words.get("--limit", 99))
boxes = [{**box, "score": 0.8} for box in document["annotations"] if box["image_id"] <= count]
print("torch says hello")
json.dump(boxes, open(words["-o"], "w"))
"""


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run directory, and a stand-in for the training side's command that this process would start."""
    folder, package = tmp_path / "run", tmp_path / "package" / "crosskd"
    folder.mkdir()
    package.mkdir(parents=True)
    (folder / "student.pth").write_bytes(b"weights")
    write_sidecar(folder / "student.pth", {}, details={"parameters": 1234})
    (package / "__init__.py").write_text("")
    (package / "predict.py").write_text(PREDICT)
    monkeypatch.chdir(package.parent)  # `python -m` looks here first
    return folder


def test_a_run_directory_is_measured_by_the_training_side(run_dir, data_dir, tmp_path, capfd):
    output = tmp_path / "x.result.json"
    assert run(run_dir, "--data", data_dir, "--limit", 3, "-o", output) == 0
    result = read_result(output)
    assert result["numbers"]["AP"] == pytest.approx(1.0)
    assert (result["role"], result["model"]["format"], result["model"]["parameters"]) == ("run", "torch", 1234)
    assert result["model"]["sha256"] == sha256_of(run_dir / "student.pth")
    assert "torch says hello" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.stderr.write('error: no such layer\\n'); sys.exit(2)", "error: no such layer"),
        ("1 / 0", "ended with status 1"),
        ("", "expected COCO results"),
        (
            "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('{}')",
            "holds a dict; expected COCO results",
        ),
    ],
)
def test_the_training_sides_failure_is_ours(run_dir, data_dir, tmp_path, capfd, program, message):
    (tmp_path / "package" / "crosskd" / "predict.py").write_text(program)
    assert run(run_dir, "--data", data_dir, "-o", tmp_path / "x.result.json") == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "x.result.json").exists()


def test_two_weights_in_a_run_directory_are_refused(run_dir, data_dir, tmp_path, capsys):
    (run_dir / "detector.pth").write_bytes(b"weights")
    assert run(run_dir, "--data", data_dir, "-o", tmp_path / "x.result.json") == 2
    assert "holds student.pth and detector.pth" in capsys.readouterr().err


def test_samples_are_spread_best_first_and_few():
    assert timing.spread(range(100), 12)[:2] == [0, 9]
    assert timing.spread(range(100), 12)[-1] == 99
    assert timing.spread(range(3), 12) == [0, 1, 2]
