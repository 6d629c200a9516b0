from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.measuring.detections import replacing_detections
from benchmarks.measuring.environment import read_environment
from benchmarks.measuring.result import read_result, write_result
from benchmarks.reporting import accuracy_numbers
from benchmarks.reporting.operating_point import comparison
from benchmarks.studies import calibration, calibration_methods
from benchmarks.studies.calibration_distilled import DistilledOptions, run_distilled
from benchmarks.studies.calibration_methods import (
    COMPARED_METHODS,
    is_finished,
    latency_of,
    rows_of,
    run_methods,
)
from benchmarks.studies.calibration_training import STILL_NORMS, recovery, run_int8_aware
from benchmarks.studies.jobs import Processes
from deploy.contract import read_sidecar, sidecar_path, write_sidecar
from deploy.errors import ConfigError, MeasurementError
from deploy.files import sha256_of, write_json
from deploy.folder_lock import held_locks

NOISE = {"max": 0.06, "percentile": 0.02, "entropy": 0.03, "mse": 0.03, "auto": 0.02}
"""Method -> what it adds to how far a model's detections are off, as a share of the box."""
BUDGET = "auto, at most 0.3 points lost"


def noise_of(file):
    return json.loads(Path(file).read_text())["noise"]


class FakeCommands:
    """In place of Processes: models are files that say how far their detections are off."""

    def __init__(self, fails=None, cut_off=False):
        self.fails = fails or {}
        """Word of a command -> the message that it ends with."""
        self.cut_off = cut_off
        """INT8-aware training ends when its weights are there, and the models that they become are not."""
        self.words = []

    def run(self, words, log, alone=False):
        with held_locks() as locks:
            assert locks  # so that the folder is held while the command runs on without us
        self.words.append(list(words))
        message = next((self.fails[word] for word in words if word in self.fails), None)
        log.write_text("something else\n" + (f"error: {message}\n" if message else ""))
        if message:
            return 2
        self.output = Path(words[words.index("-o") + 1])
        getattr(self, words[0].partition(".")[2])(list(words))
        return 0

    def stop(self):
        pass

    def write(self, path, noise, words, inputs, **details):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"noise": round(noise, 4), "by": words[0]}))
        write_sidecar(path, inputs, details=details)
        write_json(sidecar_path(path), {**read_sidecar(path), "command": ["python", "-m", *words]})

    def quantize(self, words):
        model, data = words[1], Path(words[words.index("--data") + 1])
        method = words[words.index("--method") + 1]
        budget = "--max-ap-drop" in words
        inputs = {"model": model, "annotations": data / "annotations" / "instances_train.json"}
        details = {
            "target": words[words.index("--target") + 1],
            "method": "percentile" if method == "auto" else method,
            "num_images": int(words[words.index("--num-images") + 1]),
            **({"budget": {"kept_blocks": ["stem", "neck"]}} if budget else {}),
        }
        self.write(self.output, noise_of(model) + (0.01 if budget else NOISE[method]), words, inputs, **details)

    def export(self, words):
        weights = Path(words[1]) / "student.pth"
        self.write(self.output, noise_of(weights), words, {"weights": weights})

    def distill(self, words):
        start = words[words.index("--from") + 1]
        inputs = {"start": start, "teacher": words[words.index("--teacher-checkpoint") + 1]}
        seed, epochs = (int(words[words.index(flag) + 1]) for flag in ("--seed", "--epochs"))
        noise = noise_of(start) + 0.001 * seed + 0.0001 * epochs
        self.write(self.output / "student.pth", noise, words, inputs)
        if "--quantize" in words and self.cut_off:
            raise MeasurementError("cut off")
        if "--quantize" in words:
            weights, model = self.output / "student.pth", self.output / "student.onnx"
            self.write(model, noise, ["deploy.export"], {"weights": weights})
            trained = {"target": "tensorrt", "method": "trained ranges"}
            int8 = self.output / "student.int8.onnx"
            self.write(int8, noise + 0.01, ["calibration.quantize"], {"model": model}, **trained)

    def accuracy(self, words):
        model, against = words[1], words[words.index("--against") + 1] if "--against" in words else None
        split, data = words[words.index("--split") + 1], Path(words[words.index("--data") + 1])
        path = data / "annotations" / f"instances_{split}.json"
        annotations = json.loads(path.read_text())
        random = np.random.default_rng(0)
        detections = []
        for box in annotations["annotations"]:
            moved = random.normal(0, noise_of(model), 2) * box["bbox"][2:]
            place = [*(np.array(box["bbox"][:2]) + moved).tolist(), *box["bbox"][2:]]
            score = round(float(random.random()), 4)
            entry = {"image_id": box["image_id"], "category_id": box["category_id"], "bbox": place, "score": score}
            detections.append(entry)
        numbers = accuracy_numbers.numbers_from_detections(
            annotations, detections, [image["id"] for image in annotations["images"]]
        )
        inputs = {"model": model, "annotations": path}
        if against:
            numbers["against"] = {"role": "float", **comparison(numbers, read_result(against)["numbers"])}
            inputs["against"] = against
        document = {
            "kind": "accuracy", "role": "any", "numbers": numbers,
            "model": {"file": model, "sha256": sha256_of(model), "bytes": 1, "format": "onnx", "parameters": None,
                      "inputs": {}, "command": []},
            "data": {"annotations": str(path), "annotations_sha256": sha256_of(path), "images_dir": "",
                     "images": len(annotations["images"]), "class_names": ["disc"]},
            "environment": {"cpu": read_environment()["cpu"], "cores": None, "os": None},
            "command": ["python", "-m", *words],
        }  # fmt: skip
        with replacing_detections(self.output, detections) as document["detections"]:
            write_result(self.output, document, inputs)

    def commands(self, module):
        return [words for words in self.words if words[0] == module]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder: 30 images to a split, three boxes each; no image files."""
    monkeypatch.setattr(accuracy_numbers, "BOOTSTRAP_DRAWS", 50)
    folder, random = tmp_path / "shapes", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        ids = range(100 * number, 100 * number + 30)
        images = [{"id": one, "file_name": f"{one}.png", "width": 200, "height": 200} for one in ids]
        boxes = [[*random.uniform(0, 100, 2), *random.uniform(20, 90, 2)] for _ in range(90)]
        annotations = [
            {"id": n + 1, "image_id": ids[n % 30], "category_id": 1, "bbox": box, "area": box[2] * box[3]}
            for n, box in enumerate(boxes)
        ]
        document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def methods(tmp_path, data, monkeypatch):
    """methods(fake, *words) makes the table of one model and returns its result file; latency and audit are fakes."""
    model = tmp_path / "student.onnx"
    FakeCommands().write(model, 0.03, ["deploy.export"], {})
    ratio = {"median": 2.5, "lowest": 2.4, "highest": 2.6}
    latency = {"float_ms": 10.0, "int8_ms": 4.0, "times": ratio, "description": "some runtime", "others_cores": 0.0}
    audit = {
        "products": [{"state": "INT8"}, {"state": "INT8"}, {"state": "float"}], "int8_share": 0.9, "faults": []
    }  # fmt: skip
    monkeypatch.setattr(calibration_methods, "latency_of", lambda *_: latency)
    monkeypatch.setattr(calibration_methods, "audit_of", lambda _: audit)

    def run(fake, *words):
        folders = ["--runs-dir", str(tmp_path / "runs"), "-o", str(tmp_path / "out" / "methods")]
        run_methods(calibration._parser().parse_args(["methods", f"small={model}:{data}", *words, *folders]), fake)
        return json.loads((tmp_path / "out" / "methods.json").read_text())

    run.model, run.table = model, tmp_path / "out" / "methods.md"
    return run


def test_every_method_is_a_row_of_each_target(methods):
    fake = FakeCommands()
    (model,) = methods(fake)["models"]
    assert [(row["target"], row["name"]) for row in model["rows"]] == [
        (target, name) for target in ("onnxruntime", "tensorrt") for name in (*COMPARED_METHODS, BUDGET)
    ]
    rows = {(row["target"], row["name"]): row for row in model["rows"]}
    best, worst = rows["tensorrt", BUDGET], rows["tensorrt", "max"]
    assert model["AP"] > best["AP"] > rows["tensorrt", "auto"]["AP"] > worst["AP"]
    assert worst["against"]["AP_difference"] == pytest.approx(worst["AP"] - model["AP"], abs=1e-6)
    assert worst["against"]["low"] < worst["against"]["AP_difference"] < worst["against"]["high"] < 0
    assert worst["convolutions"] == {"INT8": 2, "float": 1}
    assert worst["num_images"] == 20  # two thirds of the split, so that auto has others to compare on
    assert best["kept_blocks"] == ["stem", "neck"]
    assert worst["latency"] is None
    assert rows["onnxruntime", "max"]["latency"]["times"]["median"] == 2.5

    text = methods.table.read_text()
    assert text.index("### small, ONNX Runtime") < text.index("### small, TensorRT")
    timed, untimed = ([line for line in part.splitlines() if line[:2] == "| "] for part in text.split("### ")[1:])
    for table, columns in ((timed, 8), (untimed, 6)):
        assert [line.split(" | ")[0] for line in table] == [
            "| method", "| ---", "| FP32", "| max", "| percentile", "| entropy", "| mse", "| auto (percentile)",
            f"| {BUDGET} (percentile)",
        ]  # fmt: skip
        assert {line.count("|") - 1 for line in table} == {columns}
    points = f"{100 * worst['AP']:.2f}"
    assert untimed[3].startswith(f"| max | {points} |")
    assert untimed[3].endswith("| 2 of 3 (90.0 %) |")
    assert timed[3].endswith("| 2 of 3 (90.0 %) | 10.0, 4.00 | 2.50\N{MULTIPLICATION SIGN} (2.40 to 2.60) |")
    assert text.count(f"- {BUDGET}: in float stem, neck\n") == 2


def test_statistics_are_shared_and_those_for_the_budget_come_first(methods):
    fake = FakeCommands()
    methods(fake)
    quantized = fake.commands("calibration.quantize")
    for target in ("onnxruntime", "tensorrt"):
        files = {words[words.index("--statistics") + 1] for words in quantized if target in words}
        assert len(files) == 1
        first = next(words for words in quantized if target in words)
        assert "--max-ap-drop" in first  # the others' are a part of what it needs
    (other,) = {words[words.index("--statistics") + 1] for words in quantized if "tensorrt" in words}
    FakeCommands().write(methods.model, 0.04, ["deploy.export"], {})
    again = FakeCommands()
    methods(again)
    assert not [words for words in again.words if other in words]  # they are of another model


def test_what_is_finished_is_kept_and_what_changed_is_made_again(methods, data):
    first = methods(FakeCommands(), "--targets", "tensorrt")
    again = FakeCommands()
    second = methods(again, "--targets", "tensorrt")
    assert again.words == []
    assert second["models"] == first["models"]

    other = FakeCommands()
    methods(other, "--targets", "tensorrt", "--max-ap-drop", "1")
    assert len(other.commands("calibration.quantize")) == len(other.commands("benchmarks.accuracy")) == 1

    test = data / "annotations" / "instances_test.json"
    test.write_text(test.read_text() + "\n")
    measured = FakeCommands()
    methods(measured, "--targets", "tensorrt")
    assert not measured.commands("calibration.quantize")
    assert len(measured.commands("benchmarks.accuracy")) == 1 + 6


def test_what_was_timed_on_another_processor_is_timed_again(methods, tmp_path, monkeypatch):
    methods(FakeCommands(), "--targets", "onnxruntime")
    (path,) = (tmp_path / "runs" / "small").glob("onnxruntime-mse.latency.json")
    elsewhere = json.loads(path.read_text())
    elsewhere["environment"]["cpu"] = "Another 9000"
    elsewhere["numbers"]["int8_ms"] = 1.0
    path.write_text(json.dumps(elsewhere))
    (model,) = methods(FakeCommands(), "--targets", "onnxruntime")["models"]
    assert {row["latency"]["int8_ms"] for row in model["rows"]} == {4.0}


def test_a_row_that_fails_says_why_and_is_tried_again(methods, capsys):
    fails = {"--max-ap-drop": "the budget of 0.3 points of AP cannot be met: the best"}
    (model,) = methods(FakeCommands(fails), "--targets", "tensorrt")["models"]
    assert [row["name"] for row in model["rows"] if row["error"]] == [BUDGET]
    assert model["rows"][-1]["error"] == fails["--max-ap-drop"]
    text = methods.table.read_text()
    assert f"| {BUDGET} | failed |  |" in text
    assert f"- {BUDGET}: failed: the budget of 0.3 points" in text
    assert "error: small, tensorrt, auto, at most 0.3" in capsys.readouterr().err
    fake = FakeCommands()
    (model,) = methods(fake, "--targets", "tensorrt")["models"]
    assert len(fake.words) == 2
    assert not [row["name"] for row in model["rows"] if row["error"]]


def test_a_float_model_that_cannot_be_measured_ends_it(methods):
    with pytest.raises(MeasurementError, match="no such class"):
        methods(FakeCommands({"benchmarks.accuracy": "no such class"}))


def test_a_trained_model_is_a_row_of_the_target_that_it_is_for(methods, tmp_path):
    trained = tmp_path / "trained.int8.onnx"
    FakeCommands().write(trained, 0.035, ["calibration.quantize"], {}, target="tensorrt", method="trained ranges")
    fake = FakeCommands()
    (model,) = methods(fake, "--int8-aware", f"small={trained}")["models"]
    (row,) = [row for row in model["rows"] if row["name"] == "INT8-aware"]
    assert row["target"] == "tensorrt"
    assert row["sha256"] == sha256_of(trained)
    assert row["against"]["AP_difference"] < 0
    FakeCommands().write(trained, 0.03, ["calibration.quantize"], {}, target="tensorrt", method="trained ranges")
    again = FakeCommands()
    (model,) = methods(again, "--int8-aware", f"small={trained}")["models"]
    assert [words[1] for words in again.words] == [str(trained)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.onnx:{data}"], r"x.onnx:.* names no model; expected NAME=MODEL.onnx:DATA_DIR"),
        (["a/b={model}:{data}"], "names no model"),
        (["a={model}:{data}:dev"], "the split is dev; expected one of val, test"),
        (["a={model}:{data}:train"], "the split is train; expected one of val, test"),  # which it is calibrated on
        (["a={model}:{data}", "a={model}:{data}"], "the models are named a, a; expected a name of its own"),
        (["a={model}:{data}", "--int8-aware", "b={model}"], "expected NAME=FILE.int8.onnx, NAME one of a"),
        (["a={model}:{data}", "--int8-aware", "a={model}"], "its sidecar has the target None"),
        (
            ["a={model}:{data}", "--targets", "tensorrt", "tensorrt"],
            "--targets are tensorrt tensorrt; expected each once",
        ),
        (["a={model}:{data}", "--max-ap-drop", "nan"], "--max-ap-drop is nan; expected points of AP, 0 or more"),
        (["a=nope.onnx:{data}"], "no such file: nope.onnx"),
    ],
)
def test_models_that_are_not_there_or_not_clear_are_refused(words, message, methods, data, tmp_path, capsys):
    words = [word.format(model=methods.model, data=data) for word in words]
    folders = ["--runs-dir", str(tmp_path / "runs"), "-o", str(tmp_path / "out" / "methods")]
    assert calibration.main(["methods", *words, *folders]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "out" / "methods.json").exists()


# INT8-aware training


@pytest.fixture
def aware(tmp_path, data):
    """aware(fake, *words) fine-tunes and returns the result file."""
    student, teacher, config = tmp_path / "run", tmp_path / "teacher.pth", tmp_path / "config.py"
    FakeCommands().write(student / "student.pth", 0.03, ["crosskd.distill"], {})
    teacher.write_text("weights")
    config.write_text("")
    words = [
        "int8-aware", str(config), "--student", str(student), "--teacher", str(teacher), "--data", str(data),
        "--epochs", "4", "--learning-rate", "0.001", "--jobs", "1", "--runs-dir", str(tmp_path / "runs"),
        "-o", str(tmp_path / "out" / "aware"),
    ]  # fmt: skip

    def run(fake, *more):
        run_int8_aware(calibration._parser().parse_args([*words, *more]), fake)
        return json.loads((tmp_path / "out" / "aware.json").read_text())

    run.words, run.table, run.runs = words, tmp_path / "out" / "aware.md", tmp_path / "runs"
    return run


def test_each_seed_is_trained_with_rounding_and_without(aware):
    fake = FakeCommands()
    result = aware(fake)
    trainings = fake.commands("crosskd.distill")
    assert [Path(words[words.index("-o") + 1]).name for words in trainings] == [
        f"{kind}-{seed}" for seed in (0, 1, 2) for kind in ("int8-aware", "float")
    ]
    aware_words, float_words = trainings[:2]
    start = aware_words.index("--quantize")
    assert aware_words[start : start + 3] == ["--quantize", "int8", "--calibrated"]
    assert Path(aware_words[start + 3]) == aware.runs / "student.int8.onnx"
    # The same but for the rounding; with it, norms are still anyway.
    assert [*aware_words[:start], STILL_NORMS] == float_words[: float_words.index("-o")]
    for flag, value in (("--epochs", "4"), ("--precision", "fp32"), ("--set", "optim_wrapper.optimizer.lr=0.001")):
        assert float_words[float_words.index(flag) + 1] == value
    # What was trained without rounding is quantised as the student was.
    quantized = [words[1:1] + words[2 : words.index("-o")] for words in fake.commands("calibration.quantize")]
    assert len(quantized) == 4
    assert all(words == quantized[0] for words in quantized)

    lost = -result["int8"]["against"]["AP_difference"]
    assert lost > 0.01
    for run in result["runs"]:
        expected = (run["int8"]["AP"] - result["int8"]["AP"]) / lost
        assert run["recovered"]["value"] == pytest.approx(expected, abs=1e-4)
    kinds = result["kinds"]
    assert kinds["INT8-aware"]["recovered"]["value"] > 0.5 > kinds["fine-tuned, then INT8"]["recovered"]["value"]
    mean = np.mean([run["int8"]["AP"] for run in result["runs"] if run["kind"] == "INT8-aware"])
    assert kinds["INT8-aware"]["AP"] == pytest.approx(mean, abs=1e-6)
    assert "6 of 6 trainings" in aware.table.read_text()
    table = [line for line in aware.table.read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 2 + 2 * 4
    assert len({line.count("|") for line in table}) == 1


def test_finished_trainings_are_kept_and_new_seeds_are_added(aware):
    aware(FakeCommands(), "--seeds", "0")
    fake = FakeCommands()
    result = aware(fake, "--seeds", "0", "1")
    assert len(fake.commands("crosskd.distill")) == 2
    assert [run["seed"] for run in result["runs"]] == [0, 0, 1, 1]
    again = FakeCommands()
    aware(again, "--seeds", "0", "1")
    assert again.words == []


def test_a_training_that_was_cut_off_between_its_files_is_done_again(aware):
    aware(FakeCommands(), "--seeds", "0")
    sidecar_path(aware.runs / "int8-aware-0" / "student.int8.onnx").unlink()
    fake = FakeCommands()
    aware(fake, "--seeds", "0")
    assert [words[words.index("-o") + 1] for words in fake.commands("crosskd.distill")] == [
        str(aware.runs / "int8-aware-0")
    ]


def test_an_int8_model_of_an_earlier_training_is_not_taken_for_that_of_the_last(aware):
    aware(FakeCommands(), "--seeds", "0")
    with pytest.raises(MeasurementError, match="1 of 2 trainings failed"):
        aware(FakeCommands(cut_off=True), "--seeds", "0", "--epochs", "5")
    fake = FakeCommands()
    aware(fake, "--seeds", "0", "--epochs", "5")
    assert [Path(words[-1]).name for words in fake.commands("crosskd.distill")] == ["int8-aware-0"]


def test_a_training_that_fails_does_not_end_the_others(aware, capsys):
    fake = FakeCommands({"int8": "a loss is not finite"})
    with pytest.raises(MeasurementError, match=r"2 of 4 trainings failed: .*int8-aware-0, .*int8-aware-1"):
        aware(fake, "--seeds", "0", "1")
    assert "2 of 4 trainings, made by" in aware.table.read_text()
    assert "int8-aware-0: a loss is not finite" in capsys.readouterr().err
    result = json.loads(aware.table.with_suffix(".json").read_text())
    assert [run["kind"] for run in result["runs"]] == ["fine-tuned, then INT8"] * 2


def test_no_share_is_given_of_a_loss_that_may_be_none():
    random = np.random.default_rng(0)
    plain, unsure, sure = 0.3 + random.normal(0, 0.01, (3, 201))
    nothing = recovery(plain, plain, unsure)
    assert nothing["recovered"] is None
    rounded = plain - 0.02 - 0.001 * random.random(201)
    half = recovery((plain + rounded) / 2, plain, rounded)
    assert half["recovered"]["value"] == pytest.approx(0.5)
    assert half["recovered"]["low"] == pytest.approx(half["recovered"]["high"])
    assert half["to_float"]["high"] < 0 < half["to_int8"]["low"]
    assert recovery(sure, plain, rounded)["recovered"]["low"] < recovery(sure, plain, rounded)["recovered"]["high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; expected at least 1"),
        (["--jobs", "0"], "--jobs is 0; expected at least 1"),
        (["--seeds", "0", "-1"], "--seeds is -1; expected at least 0"),
        (["--seeds", "1", "1"], "--seeds are [1, 1]; expected each once"),
        (["--learning-rate", "nan"], "--learning-rate is nan; expected a number above 0"),
        (["--teacher", "nope.pth"], "no such file: nope.pth"),
        (["--student", "nope"], "nope holds neither of student.pth and detector.pth"),
        (["--data", "nope"], "no such file or folder: nope"),
    ],
)
def test_wrong_flags_of_the_training_are_refused(words, message, aware, capsys):
    assert calibration.main([*aware.words, *words]) == 2
    assert message in capsys.readouterr().err
    assert not aware.runs.exists()


# The real commands


@pytest.fixture
def real(tmp_path, detector):
    """(ONNX file, data folder): a detector with a convolution before that of its final prediction, and images."""
    import onnx
    from onnx import helper, numpy_helper

    path = detector("real.onnx")
    contract = read_sidecar(path)["contract"]
    model = onnx.load(path)
    weight = np.random.default_rng(0).normal(0, 0.01, (3, 3, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "first_weight"))
    model.graph.node[0].input[0] = "features"
    first = [
        helper.make_node("Conv", ["image", "first_weight"], ["first"], name="first"),
        helper.make_node("Relu", ["first"], ["features"]),
    ]
    nodes = [*first, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    write_sidecar(path, {})
    write_json(sidecar_path(path), {**read_sidecar(path), "contract": contract})

    folder = tmp_path / "real_data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    categories = [{"id": 3, "name": "disc"}, {"id": 7, "name": "star"}]
    for number, split in enumerate(("train", "val", "test")):
        ids = range(10 * number, 10 * number + 3)
        for one in ids:
            pixels = np.random.default_rng(one).integers(0, 256, (128, 192, 3), np.uint8)
            cv2.imwrite(str(folder / "images" / f"{one}.png"), pixels)
        document = {
            "images": [{"id": one, "file_name": f"{one}.png", "width": 192, "height": 128} for one in ids],
            "annotations": [
                {"id": one + 1, "image_id": one, "category_id": 3, "bbox": [20, 10, 60, 50], "area": 3000, "iscrowd": 0}
                for one in ids
            ],
            "categories": categories,
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return path, folder


def test_the_real_commands_do_what_is_asked_of_them(real, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("faster_coco_eval")
    monkeypatch.setattr(calibration_methods, "COMPARED_METHODS", ("max",))
    run = Processes.run

    def run_but_the_budget(processes, words, log):
        if "--max-ap-drop" in words:
            log.write_text("error: left out of this test")
            return 2
        return run(processes, words, log)

    monkeypatch.setattr(Processes, "run", run_but_the_budget)
    model, folder = real
    words = ["methods", f"real={model}:{folder}:val", "--targets", "onnxruntime", "--runs-dir", str(tmp_path / "runs")]
    output = tmp_path / "out" / "methods"
    assert calibration.main([*words, "-o", str(output)]) == 0
    (entry,) = json.loads(Path(f"{output}.json").read_text())["models"]
    best, budget = entry["rows"]
    assert best["error"] is None
    assert (best["method"], best["num_images"], best["faults"]) == ("max", 2, [])
    assert best["convolutions"] == {"INT8": 1, "float": 1}
    assert 0 < best["int8_share"] < 1
    assert best["AP"] == entry["AP"]  # its boxes are constants
    assert best["against"]["AP_difference"] == 0
    assert best["latency"]["float_ms"] > 0
    assert budget["error"] == "left out of this test"  # minutes of searching
    assert len(list((tmp_path / "runs" / "real").glob("*.statistics.npz"))) == 1

    arguments = calibration._parser().parse_args([*words, "-o", str(output)])
    options = calibration_methods.MethodsOptions(
        models=arguments.models, output=arguments.output, targets=arguments.targets, max_ap_drop=arguments.max_ap_drop
    )
    row = rows_of(calibration_methods.Model.from_argument(words[1], tmp_path / "runs"), options, [])[0]
    assert row.file.is_file()
    assert set(latency_of(row.model, row.file)) == set(best["latency"]) - {"created_utc", "environment"}
    assert is_finished(row)


def test_help_of_both_tables_names_their_files(capsys):
    for table in ("methods", "int8-aware"):
        with pytest.raises(SystemExit) as end:
            calibration.main([table, "--help"])
        assert end.value.code == 0
        assert "PATH.json, PATH.md" in capsys.readouterr().out


def test_a_second_trained_model_of_a_target_is_refused(methods, tmp_path):
    trained = tmp_path / "trained.int8.onnx"
    FakeCommands().write(trained, 0.035, ["calibration.quantize"], {}, target="tensorrt")
    with pytest.raises(ConfigError, match="a second file of small for tensorrt"):
        methods(FakeCommands(), "--int8-aware", f"small={trained}", f"small={trained}")


# Students alone and distilled


@pytest.fixture
def distilled(tmp_path, data):
    """distilled(fake, *words) compares two pairs of students, of which the distilled lose more, for one target."""
    runs = {"alone": [], "distilled": []}
    for kind, noise in (("alone", 0.03), ("distilled", 0.02)):
        for seed in range(2):
            runs[kind].append(str(tmp_path / f"{kind}-{seed}"))
            weights = tmp_path / f"{kind}-{seed}" / "student.pth"
            FakeCommands().write(weights, noise + 0.001 * seed, ["crosskd.distill"], {})
    teacher, config = tmp_path / "teacher.pth", tmp_path / "config.py"
    teacher.write_text("weights")
    config.write_text("")
    words = [
        "distilled", str(config), "--alone", *runs["alone"], "--distilled", *runs["distilled"], "--teacher",
        str(teacher), "--data", str(data), "--targets", "tensorrt", "--methods", "max", "mse", "--runs-dir",
        str(tmp_path / "runs"), "-o", str(tmp_path / "out" / "distilled"),
    ]  # fmt: skip

    def run(fake, *more):
        values = vars(calibration._parser().parse_args([*words, *more]))
        del values["table"]
        run_distilled(DistilledOptions(**values), fake)
        return json.loads((tmp_path / "out" / "distilled.json").read_text())

    run.words, run.table = words, tmp_path / "out" / "distilled.md"
    return run


def test_what_students_lose_is_compared_pair_by_pair(distilled):
    fake = FakeCommands()
    result = distilled(fake)
    assert [row["name"] for row in result["rows"]] == ["max", "mse"]
    cells = {(cell["kind"], cell["pair"]): cell for cell in result["cells"] if cell["name"] == "max"}
    changes = {key: cell["int8"]["AP"] - cell["float"]["AP"] for key, cell in cells.items()}
    row = result["rows"][0]
    for kind in ("alone", "distilled"):
        assert row[kind]["by_pair"] == pytest.approx([changes[kind, 0], changes[kind, 1]], abs=1e-6)
        assert row[kind]["low"] < row[kind]["value"] < row[kind]["high"] < 0
    difference = np.mean([changes["distilled", pair] - changes["alone", pair] for pair in (0, 1)])
    assert row["difference"]["value"] == pytest.approx(difference, abs=1e-6)
    assert row["difference"]["low"] < difference < row["difference"]["high"]
    trained = [words[1] for words in fake.commands("deploy.export")]
    assert [Path(folder).name for folder in trained] == ["alone-0", "distilled-0", "alone-1", "distilled-1"]
    (line,) = [line for line in distilled.table.read_text().splitlines() if line.startswith("| max ")]
    assert f"| {100 * difference:+.2f} (" in line
    assert "8 of 8 cells" in distilled.table.read_text()


def test_int8_aware_training_is_the_last_row_and_begins_with_each_students_own_file(distilled):
    first = distilled(FakeCommands())
    fake = FakeCommands()
    result = distilled(fake, "--epochs", "2")
    assert [row["name"] for row in result["rows"]] == ["max", "mse", "INT8-aware"]
    assert result["rows"][:2] == first["rows"]  # kept
    assert not fake.commands("calibration.quantize")
    trainings = fake.commands("crosskd.distill")
    assert [Path(words[words.index("--from") + 1]).parent.name for words in trainings] == [
        "alone-0", "distilled-0", "alone-1", "distilled-1"
    ]  # fmt: skip
    calibrated = [Path(words[words.index("--calibrated") + 1]) for words in trainings]
    assert [f"{file.parent.name}/{file.name}" for file in calibrated] == [
        f"{kind}-{pair}/tensorrt-max.int8.onnx" for pair in (0, 1) for kind in ("alone", "distilled")
    ]
    assert [words[words.index("--seed") + 1] for words in trainings] == ["0", "0", "1", "1"]
    assert result["rows"][2]["alone"]["value"] > result["rows"][0]["alone"]["value"]
    again = FakeCommands()
    distilled(again, "--epochs", "2")
    assert again.words == []


def test_a_pair_counts_when_both_of_it_are_done(distilled, tmp_path):
    fake = FakeCommands({str(tmp_path / "distilled-1"): "no such run"})
    with pytest.raises(MeasurementError, match=r"2 of 8 cells failed: .*distilled-1, tensorrt, max"):
        distilled(fake)
    rows = json.loads(distilled.table.with_suffix(".json").read_text())["rows"]
    assert [row["pairs"] for row in rows] == [[0], [0]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alone", "a", "b", "--distilled", "c"], "--alone names 2 runs and --distilled 1; expected as many"),
        (["--alone", "a", "--distilled", "a"], "--alone and --distilled are a a; expected each run once"),
        (["--methods", "max", "max"], "--methods are max max; expected each once"),
        (["--epochs", "0"], "--epochs is 0; expected at least 1"),
        (["--alone", "a", "--distilled", "b"], "a holds neither of student.pth and detector.pth"),
    ],
)
def test_pairs_that_are_none_are_refused(words, message, distilled, capsys):
    assert calibration.main([*distilled.words, *words]) == 2
    assert message in capsys.readouterr().err
    assert not distilled.table.exists()
