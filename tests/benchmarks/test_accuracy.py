from __future__ import annotations

import json

import pytest

from benchmarks import accuracy, subject
from benchmarks.result import read_result
from deploy.contract import write_sidecar
from deploy.files import sha256_of


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
    sample = result["samples"][0]
    assert sample["file_name"] == "sub/1.png"
    assert [box["box_xyxy"] for box in sample["detected"]] == [box["box_xyxy"] for box in sample["annotated"]]
    assert "AP 100.0" in capsys.readouterr().out


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
    assert [sample["file_name"] for sample in result["samples"]] == ["sub/1.png", "sub/2.png"]
    assert result["numbers"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("contract", "words", "message"),
    [
        ({"class_names": ("disc", "ring")}, (), "differ in their classes"),
        ({"category_ids": (1, 2)}, (), "differ in their classes"),
        ({"input_shape": (2, 3, 64, 96)}, (), "takes 2 images at once"),
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
        ("", "expected the COCO results of crosskd.predict"),
        ("import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('{}')", "expected a list of COCO results"),
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
    assert subject.spread(range(100), 12)[:2] == [0, 9]
    assert subject.spread(range(100), 12)[-1] == 99
    assert subject.spread(range(3), 12) == [0, 1, 2]


def test_samples_leave_out_low_scores_and_keep_the_best(data_dir):
    from deploy.dataset import load_split

    data = load_split(data_dir, "test")
    results = [
        {"image_id": 1, "category_id": 7, "bbox": [1.0, 2.0, 3.0, 4.0], "score": score / 100} for score in range(100)
    ]
    samples = accuracy.samples_from_results(results, data)
    scores = [box["score"] for box in samples[0]["detected"]]
    assert scores == [score / 100 for score in range(99, 49, -1)]
    assert samples[0]["detected"][0] == {"box_xyxy": [1.0, 2.0, 4.0, 6.0], "label": 1, "score": 0.99}
    assert samples[1]["detected"] == []
    assert json.dumps(samples)
