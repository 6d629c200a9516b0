from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from benchmarks import accuracy
from calibration import from_images, quantize, search
from calibration.audit import INT8, audit
from calibration.images import choose_images
from calibration.quantize import main
from calibration.ranges import RANGE_METHODS
from calibration.search import journal_path
from deploy.contract import load_contract, read_sidecar, sidecar_path, write_sidecar
from deploy.files import sha256_of
from deploy.graphs.calibration_cache import amax_from_quantised
from deploy.graphs.graph import initializers, load_onnx, save_onnx
from deploy.images import read_image
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import OrtSession

PREDICTIONS = ["prediction_3", "prediction_4"]
QUANTIZED = [
    "stem", "plain1", "plain2", "down1", "down2", "down_skip",
    "lateral3", "lateral4", "fpn3", "fpn4", "tower_3", "tower_4",
]  # fmt: skip


def test_command_writes_model_and_sidecar(model_path, data_dir, target, capsys):
    output = model_path.with_name("student.int8.onnx")
    status = main(
        [str(model_path), "--data", str(data_dir), "-o", str(output), "--target", target, "--num-images", "5"]
    )
    printed = capsys.readouterr()
    assert status == 0
    assert "12 of 14 convolutions and matrix products in INT8" in printed.out
    assert "2 final prediction" in printed.out
    assert "warning: 5 calibration images" in printed.err

    sidecar = read_sidecar(output)
    details = sidecar["details"]
    assert sidecar["inputs"]["model"]["sha256"] == sha256_of(model_path)
    assert sidecar["inputs"]["annotations"]["file"].endswith("instances_train.json")
    assert load_contract(output) == load_contract(model_path)
    assert (details["target"], details["method"], details["seed"], details["num_images"]) == (target, "max", 0, 5)
    assert len(set(details["image_ids"])) == 5
    assert len(details["images_sha256"]) == 64
    assert {"image", "stem", "merged", "prediction_3"} <= set(details["ranges"])  # the FP16 conversion reads them
    assert "boxes_all_3" not in details["ranges"]
    assert all(smallest <= largest for smallest, largest in details["ranges"].values())
    assert details["quantized_convolutions"] == [f"node_{name}" for name in QUANTIZED]
    assert details["float_convolutions"] == {f"node_{name}": "final prediction" for name in PREDICTIONS}
    assert details["op_counts"] == Counter(node.op_type for node in load_onnx(output).graph.node)
    with OrtSession(output, threads=1) as session:
        outputs = session.infer({"image": np.zeros((1, 3, 32, 48), np.float32)})
    assert outputs["boxes"].shape == (1, 24, 4)


def test_command_takes_explicit_paths(model_path, data_dir, capsys):
    """The evaluation images lie in a folder of their own, under the names of calibration images."""
    evaluation = data_dir / "evaluation"
    evaluation.mkdir()
    for index in range(3):
        shutil.copy(data_dir / "images" / f"{index + 8:02}.png", evaluation / f"{index:02}.png")
    annotations = json.loads((data_dir / "annotations" / "instances_val.json").read_text())
    for index, image in enumerate(annotations["images"]):
        image["file_name"] = f"{index:02}.png"
    named = data_dir / "evaluation.json"
    named.write_text(json.dumps(annotations))
    output = model_path.with_name("student.int8.onnx")
    words = [str(model_path), "--annotations", str(data_dir / "annotations" / "instances_train.json")]
    words += ["--images-dir", str(data_dir / "images"), "-o", str(output)]

    assert main(words) == 0
    assert "no overlap was looked for" in capsys.readouterr().err
    words += ["--evaluation-annotations", str(named), "--evaluation-images-dir", str(evaluation)]
    assert main(words) == 0
    assert "no overlap was looked for" not in capsys.readouterr().err
    assert read_sidecar(output)["details"]["evaluation_annotations"] == [str(named)]
    shutil.copy(data_dir / "images" / "03.png", evaluation / "01.png")
    assert main(words) == 2
    assert "03.png is the image 01.png" in capsys.readouterr().err


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_every_method_makes_a_model(words, model_path, method):
    assert main([*words, "--method", method, *(["--percentile", "99.5"] if method == "percentile" else [])]) == 0
    details = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]
    assert details["method"] == method
    assert details.get("percentile") == (99.5 if method == "percentile" else None)


def test_a_method_clips_what_max_does_not(words, model_path):
    largest = {}
    for method, further in (("max", []), ("percentile", ["--percentile", "95"])):
        assert main([*words, "--method", method, *further]) == 0
        output = model_path.with_name("student.int8.onnx")
        largest[method] = amax_from_quantised(load_onnx(output))["fpn3"]
        smallest_seen, largest_seen = read_sidecar(output)["details"]["ranges"]["fpn3"]  # as seen, whatever the method
        assert max(-smallest_seen, largest_seen) == pytest.approx(largest["max"])
    assert largest["percentile"] < 0.9 * largest["max"]


def test_auto_takes_the_method_of_the_best_ap(words, model_path, data_dir, contract, monkeypatch, capsys):
    measured = []

    def measure(path, annotations, images_dir):
        assert load_contract(path) == contract
        held_out = {image["id"] for image in json.loads(annotations.read_text())["images"]}
        measured.append((held_out, images_dir))
        return {"AP": (0.3, 0.5, 0.5, 0.2)[len(measured) - 1]}

    monkeypatch.setattr(from_images, "accuracy_numbers", measure)
    assert main([*words, "--method", "auto"]) == 0
    details = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]
    assert details["method"] == "percentile"
    assert details["auto_ap"] == {"max": 0.3, "percentile": 0.5, "entropy": 0.5, "mse": 0.2}
    everything = set(range(1, 9))
    assert len(measured) == len(RANGE_METHODS)
    for held_out, images_dir in measured:
        assert held_out == everything - set(details["image_ids"]) == set(details["held_out_image_ids"])
        assert images_dir == data_dir / "images"
    assert "percentile: AP 50.00 on 3 held-out images" in capsys.readouterr().err


def test_auto_says_where_ap_tells_nothing(words, monkeypatch, capsys):
    monkeypatch.setattr(from_images, "RANGE_METHODS", ("max", "percentile"))
    monkeypatch.setattr(from_images, "accuracy_numbers", lambda *paths: {"AP": 0.0})
    assert main([*words, "--method", "auto"]) == 0
    assert "AP says nothing of the methods" in capsys.readouterr().err


def annotate(data_dir, image_ids):
    """One box on each of these training images, none on others."""
    path = data_dir / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    document["annotations"] = [{**document["annotations"][0], "id": n, "image_id": n} for n in image_ids]
    path.write_text(json.dumps(document))


def test_auto_measures_with_the_command_of_the_benchmarks(words, model_path, data_dir, monkeypatch):
    pytest.importorskip("faster_coco_eval")
    monkeypatch.setattr(from_images, "RANGE_METHODS", ("max", "percentile"))
    annotate(data_dir, range(1, 9))
    assert main([*words, "--method", "auto"]) == 0
    ap = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]["auto_ap"]
    assert list(ap) == ["max", "percentile"]
    assert all(0 <= value <= 1 for value in ap.values())


def test_an_ap_that_cannot_be_measured_is_an_error(words, data_dir, images, monkeypatch, capsys):
    """No box is annotated in the held-out images."""
    pytest.importorskip("faster_coco_eval")
    monkeypatch.setattr(from_images, "RANGE_METHODS", ("max",))
    annotate(data_dir, [image.image_id for image in choose_images(images, 5, seed=0)])
    assert main([*words, "--method", "auto"]) == 2
    assert "the AP could not be measured on" in capsys.readouterr().err


def test_auto_needs_images_to_compare_on(model_path, data_dir, capsys):
    for flags in (["--method", "auto"], ["--bias-correction"]):
        words = ["--data", str(data_dir), "--num-images", "8", *flags]
        check_refused(model_path, data_dir, words, "--num-images takes all 8 of the split", capsys)


def test_of_a_small_split_some_images_are_left_to_compare_on(words, model_path, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(from_images, "accuracy_numbers", lambda *_: {"AP": 0.5})
    assert main([*words[:-2], "--method", "auto"]) == 0
    assert "6 of 8 images are calibrated on, models compared on the others; --num-images" in capsys.readouterr().err
    details = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]
    assert (len(details["image_ids"]), len(details["held_out_image_ids"])) == (6, 2)


def test_bias_correction_is_measured_and_said(words, model_path, target, capsys):
    output = model_path.with_name("student.int8.onnx")
    words = [*words, "--target", target, "--method", "percentile", "--percentile", "90"]
    assert main(words) == 0
    plain = sha256_of(output)
    assert main([*words, "--bias-correction"]) == 0
    assert sha256_of(output) != plain
    details = read_sidecar(output)["details"]
    effect = details["bias_correction"]
    assert set(details["held_out_image_ids"]) == set(range(1, 9)) - set(details["image_ids"])
    assert all(0 < effect[key]["boxes"] < 1 for key in ("error_without", "error_with"))
    before, after = (100 * sum(effect[key].values()) for key in ("error_without", "error_with"))
    printed = capsys.readouterr().err
    assert f"goes from {before:.2f} % to {after:.2f} % on 3 held-out images" in printed
    assert ("bias correction does not help here" in printed) == (after > before)
    with OrtSession(output, threads=1) as session:
        session.infer({"image": np.zeros((1, 3, 32, 48), np.float32)})


class FakeAccuracy:
    """In place of benchmarks.accuracy: each convolution in INT8 costs the AP that `costs` says."""

    def __init__(self, costs):
        self.costs, self.hashes, self.measured, self.fails_at = costs, {}, [], None

    def __call__(self, model, annotations, images_dir, limit=None, against=None, output=None):
        assert annotations.name == "instances_val.json"
        if against is None:
            output.write_text("the result of the float model")
            return {"AP": 0.4}
        names = {entry.name for entry in audit(load_onnx(model)).products if entry.state == INT8}
        drop = sum(self.costs.get(name, 0.0) for name in names)
        if len(self.measured) + 1 == self.fails_at:
            raise KeyboardInterrupt
        self.measured.append(names)
        self.hashes[drop] = sha256_of(model)
        return {"AP": 0.4 - drop, "against": {"AP_difference": -drop, "low": -drop - 0.001, "high": -drop + 0.002}}


def test_budget_keeps_blocks_in_float(words, model_path, target, monkeypatch, capsys):
    fake = FakeAccuracy({"node_down2": 0.02, "node_stem": 0.002})
    monkeypatch.setattr(search, "accuracy_numbers", fake)
    assert main([*words, "--max-ap-drop", "0.3", "--target", target]) == 0
    printed = capsys.readouterr()
    output = model_path.with_name("student.int8.onnx")
    details = read_sidecar(output)["details"]
    budget = details["budget"]
    assert budget["kept_blocks"] == ["node_down1"]  # which is down1 and down2
    assert (budget["max_ap_drop"], budget["num_images"], budget["float_ap"]) == (0.3, 3, 0.4)
    assert (budget["ap"], budget["drop"]) == pytest.approx((0.398, 0.002))
    assert (budget["low"], budget["high"]) == pytest.approx((0.0, 0.003))
    assert read_sidecar(output)["inputs"]["budget_annotations"]["file"] == budget["annotations"]
    assert budget["annotations"].endswith("instances_val.json")
    assert budget["steps"][0]["kept"] == []
    assert budget["steps"][0]["drop"] == pytest.approx(0.022)
    assert not budget["steps"][0]["holds"]
    assert [name for name, why in details["float_convolutions"].items() if why == "kept in float for the AP budget"] \
        == ["node_down1", "node_down2"]  # fmt: skip
    assert [name for name, code in details["float_convolution_codes"].items() if code == "ap_budget"] \
        == ["node_down1", "node_down2"]  # fmt: skip
    assert len(details["quantized_convolutions"]) == 10
    assert sha256_of(output) == fake.hashes[0.002]  # the very file that was measured
    first = "step 1: all blocks in INT8; 0.0 % of the multiplications in float; AP 37.80, a drop of 2.20 points"
    assert first in printed.err
    assert "10 of 14 convolutions and matrix products in INT8" in printed.out
    assert "AP 39.80, a drop of 0.20 points against float (95 % interval 0.00 to 0.30), on 3 images of" in printed.out
    assert "in float for it: node_down1, " in printed.out
    assert "chosen by the drop on these very images" in printed.out
    assert "the interval reaches beyond" not in printed.out
    assert not journal_path(output).exists()
    audited = audit(load_onnx(output))
    assert budget["float_share"] == pytest.approx(
        sum(entry.multiplications for entry in audited.products if entry.name in ("node_down1", "node_down2"))
        / sum(entry.multiplications for entry in audited.products if "prediction" not in entry.name)
    )


def test_budget_of_a_model_that_finds_nothing_is_an_error(model_path, data_dir, monkeypatch, capsys):
    """It would always be met."""

    def measure(model, annotations, images_dir, limit=None, against=None, output=None):
        output.write_text("the result of the float model")
        return {"AP": 0.0}

    monkeypatch.setattr(search, "accuracy_numbers", measure)
    words = ["--data", str(data_dir), "--max-ap-drop", "0.3"]
    check_refused(model_path, data_dir, words, "student.onnx has AP 0 on", capsys)


def test_budget_that_is_met_keeps_nothing(words, model_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "accuracy_numbers", FakeAccuracy({"node_down2": 0.002}))
    output = model_path.with_name("student.int8.onnx")
    assert main([*words, "--max-ap-drop", "0.3"]) == 0
    with_budget = sha256_of(output)
    assert len(read_sidecar(output)["details"]["budget"]["steps"]) == 1
    assert "chosen by" not in capsys.readouterr().out  # nothing was
    assert main(words) == 0
    assert sha256_of(output) == with_budget


def test_budget_that_cannot_be_met_is_one_message_and_no_model(model_path, data_dir, monkeypatch, capsys):
    costs = {f"node_{name}": 0.01 for name in QUANTIZED}
    monkeypatch.setattr(search, "accuracy_numbers", FakeAccuracy(costs))
    words = ["--data", str(data_dir), "--num-images", "3", "--max-ap-drop", "0.3"]
    output = model_path.with_name("student.int8.onnx")
    words = [str(model_path), *words, "-o", str(output)]
    assert main(words) == 2
    assert "the budget of 0.3 points of AP cannot be met: the best of 7" in capsys.readouterr().err
    journal = journal_path(output)
    assert sorted(model_path.parent.iterdir()) == sorted([data_dir, model_path, sidecar_path(model_path), journal])
    monkeypatch.setattr(search, "accuracy_numbers", None)  # what is known is enough for a larger budget
    monkeypatch.setattr(search, "OutputError", None)
    assert main([*words, "--max-ap-drop", "11"]) == 0
    assert not journal.exists()
    budget = read_sidecar(output)["details"]["budget"]
    assert (budget["float_ap"], len(budget["steps"])) == (0.4, 2)


def test_the_nearest_is_written_where_it_is_asked_for(words, model_path, monkeypatch, capsys):
    costs = {f"node_{name}": 0.01 for name in QUANTIZED}
    monkeypatch.setattr(search, "accuracy_numbers", FakeAccuracy(costs))
    assert main([*words, "--max-ap-drop", "0.3", "--nearest"]) == 0
    assert "more than the budget of 0.3, and the nearest to it" in capsys.readouterr().out
    budget = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]["budget"]
    assert not budget["holds"]
    assert budget["drop"] == pytest.approx(min(step["drop"] for step in budget["steps"]))
    assert budget["kept_blocks"]


def test_a_search_that_was_cut_off_goes_on(words, model_path, monkeypatch, capsys):
    costs = {"node_lateral4": 0.02, "node_stem": 0.002}
    output = model_path.with_name("student.int8.onnx")
    words = [*words, "--max-ap-drop", "0.3"]
    monkeypatch.setattr(search, "accuracy_numbers", FakeAccuracy(costs))
    assert main(words) == 0
    whole = read_sidecar(output)["details"]["budget"], sha256_of(output)
    expected = capsys.readouterr().err
    sets = len(whole[0]["steps"])
    assert sets > 2
    output.unlink()
    for fails_at in (1, 2, sets):
        fake = FakeAccuracy(costs)
        fake.fails_at = fails_at
        monkeypatch.setattr(search, "accuracy_numbers", fake)
        assert main(words) == 130
        assert not output.exists()
        fake.fails_at = None
        fake.measured.clear()
        assert main(words) == 0
        assert len(fake.measured) == sets - fails_at + 1
        assert (read_sidecar(output)["details"]["budget"], sha256_of(output)) == whole
        printed = capsys.readouterr().err
        assert [line for line in printed.splitlines() if line.startswith("step ")][-sets:] == [
            line for line in expected.splitlines() if line.startswith("step ")
        ]
        output.unlink()


@pytest.mark.parametrize(
    ("further", "changed"),
    [
        (["--method", "percentile", "--percentile", "99"], "method, percentile"),
        (["--num-images", "4"], "calibration images"),
    ],
)
def test_a_search_of_other_settings_begins_anew(words, monkeypatch, capsys, further, changed):
    fake = FakeAccuracy({"node_down2": 0.02})
    fake.fails_at = 2
    monkeypatch.setattr(search, "accuracy_numbers", fake)
    words = [*words, "--max-ap-drop", "0.3"]
    assert main(words) == 130
    fake.fails_at = None
    fake.measured.clear()
    assert main([*words, *further]) == 0
    assert f"search.json is of other {changed}: the search begins anew" in capsys.readouterr().err
    assert len(fake.measured[0]) >= 11  # all in INT8 once more


def test_a_search_by_other_packages_begins_anew(words, monkeypatch, capsys):
    fake = FakeAccuracy({"node_down2": 0.02})
    fake.fails_at = 2
    monkeypatch.setattr(search, "accuracy_numbers", fake)
    words = [*words, "--max-ap-drop", "0.3"]
    assert main(words) == 130
    fake.fails_at = None
    monkeypatch.setattr("calibration.quantizer.package_versions", lambda: {"onnxruntime": "1.20.0"})
    assert main(words) == 0
    assert "is of other package versions: the search begins anew" in capsys.readouterr().err


def test_two_searches_of_one_output_end_both(words, model_path, monkeypatch):
    """The first to end removes the file that both keep."""
    journal = journal_path(model_path.with_name("student.int8.onnx"))
    monkeypatch.setattr(search, "accuracy_numbers", FakeAccuracy({}))
    monkeypatch.setattr(quantize, "save_onnx", lambda *saved: journal.unlink() or save_onnx(*saved))
    assert main([*words, "--max-ap-drop", "0.3"]) == 0


def test_budget_with_the_command_of_the_benchmarks(words, model_path, data_dir, contract, capsys):
    """What the float model detects is taken as the truth: what INT8 changes is a loss then."""
    pytest.importorskip("faster_coco_eval")
    annotate_with_detections(model_path, data_dir, contract)
    assert main([*words, "--max-ap-drop", "9"]) == 0
    output = model_path.with_name("student.int8.onnx")
    budget = read_sidecar(output)["details"]["budget"]
    assert budget["float_ap"] > 0.99
    assert budget["steps"][0]["drop"] > 0.09 >= budget["drop"]
    assert budget["low"] <= budget["drop"] <= budget["high"]
    assert 0 < len(budget["kept_blocks"]) < 7
    result = model_path.with_name("again.result.json")
    assert accuracy.main([str(output), "--data", str(data_dir), "--split", "val", "-o", str(result)]) == 0
    assert json.loads(result.read_text())["numbers"]["AP"] == budget["ap"]


def annotate_with_detections(model_path, data_dir, contract):
    path = data_dir / "annotations" / "instances_val.json"
    document = json.loads(path.read_text())
    document["annotations"] = []
    with OrtSession(model_path, threads=1) as session:
        for image in document["images"]:
            prepared = preprocess(read_image(data_dir / "images" / image["file_name"]), contract)
            found = postprocess(session.infer({"image": prepared.input}), contract, prepared)
            for (left, top, right, bottom), label in zip(found.boxes_xyxy.tolist(), found.labels, strict=True):
                number = len(document["annotations"]) + 1
                size = [right - left, bottom - top]
                document["annotations"].append(
                    {"id": number, "image_id": image["id"], "category_id": contract.category_ids[label],
                     "bbox": [left, top, *size], "area": size[0] * size[1], "iscrowd": 0}
                )  # fmt: skip
    path.write_text(json.dumps(document))


def test_images_can_be_chosen_to_cover(words, model_path, data_dir):
    assert main([*words[:-1], "1", "--choose", "covering"]) == 0
    details = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]
    assert (details["choice"], details["image_ids"]) == ("covering", [1])  # the only one with a box


def test_statistics_are_kept_and_reused_with_another_method(words, model_path, tmp_path, monkeypatch):
    file, output = tmp_path / "seen.npz", model_path.with_name("student.int8.onnx")
    assert main([*words, "--method", "percentile"]) == 0
    expected = sha256_of(output)
    assert main([*words, "--statistics", str(file)]) == 0
    before = sha256_of(file)
    monkeypatch.setattr("onnxruntime.InferenceSession", None)  # nothing is run again
    assert main([*words, "--statistics", str(file), "--method", "percentile"]) == 0
    assert sha256_of(output) == expected
    assert sha256_of(file) == before


def test_statistics_are_extended_by_further_images(words, model_path, tmp_path):
    file, output = tmp_path / "seen.npz", model_path.with_name("student.int8.onnx")
    assert main([*words, "--num-images", "8"]) == 0
    expected = sha256_of(output)
    assert main([*words, "--statistics", str(file)]) == 0
    assert main([*words, "--statistics", str(file), "--num-images", "8"]) == 0
    assert sha256_of(output) == expected


def test_statistics_of_other_images_are_refused(words, tmp_path, capsys):
    file = tmp_path / "seen.npz"
    assert main([*words, "--statistics", str(file)]) == 0
    assert main([*words, "--statistics", str(file), "--num-images", "3"]) == 2
    assert "2 of which are not among the 3 chosen now" in capsys.readouterr().err


def test_statistics_of_another_model_are_refused(words, model_path, contract, tmp_path, capsys):
    file = tmp_path / "seen.npz"
    assert main([*words, "--statistics", str(file)]) == 0
    model = onnx.load(model_path)
    model.doc_string = "another"
    onnx.save(model, model_path)
    write_sidecar(model_path, {}, contract)
    assert main([*words, "--statistics", str(file)]) == 2
    assert "statistics of another model" in capsys.readouterr().err


def test_what_is_kept_in_float_is_said(words, model_path):
    assert main([*words, "--keep-float", "node_down1", "node_tower_3"]) == 0
    details = read_sidecar(model_path.with_name("student.int8.onnx"))["details"]
    assert details["keep_float"] == ["node_down1", "node_tower_3"]
    assert details["float_convolutions"] == {
        "node_down1": "kept in float as asked", "node_tower_3": "kept in float as asked",
        **{f"node_{name}": "final prediction" for name in PREDICTIONS},
    }  # fmt: skip
    assert details["float_convolution_codes"] == {
        "node_down1": "asked", "node_tower_3": "asked",
        **{f"node_{name}": "final_prediction" for name in PREDICTIONS},
    }  # fmt: skip
    assert "node_down1" not in details["quantized_convolutions"]


def set_bias_of_down1(path, value):
    model = onnx.load(path)
    tensor = initializers(model)["down1.bias"]
    tensor.CopyFrom(numpy_helper.from_array(np.full(16, value, np.float32), tensor.name))
    onnx.save(model, path)


def test_dead_activation_is_an_error_that_names_it_and_the_way_out(words, model_path, contract, capsys):
    set_bias_of_down1(model_path, -1e6)  # nothing gets through the ReLU behind it
    write_sidecar(model_path, {}, contract)
    assert main(words) == 2
    assert "the tensor down1_relu is 0 everywhere in all calibration images" in capsys.readouterr().err
    assert main([*words, "--keep-float", "node_down2"]) == 0  # the one convolution that reads it


def overflow(path):
    set_bias_of_down1(path, 3e38)


def hold_a_subgraph(path):
    model = onnx.load(path)
    branch = parser.parse_graph("g () => (float y) { y = Constant <value_float = 1.0> () }")
    condition = numpy_helper.from_array(np.array(True), "condition")
    model.graph.initializer.append(condition)
    node = onnx.helper.make_node("If", ["condition"], ["chosen"], name="choice", then_branch=branch, else_branch=branch)
    model.graph.node.append(node)
    onnx.save(model, path)


def set_weight_to_nan(path):
    model = onnx.load(path)
    tensor = initializers(model)["down1.weight"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(np.nan), tensor.name))
    onnx.save(model, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def quantize_by_hand(path):
    model = onnx.load(path)
    model.graph.node[1].op_type = "QuantizeLinear"
    model.graph.node[1].input.extend(["scale", "zero"])
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(1), "scale"), zero])
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", ["integers", "scale", "zero"], [model.graph.node[1].output[0]]
    )
    model.graph.node[1].output[0] = "integers"
    model.graph.node.insert(2, dequantize)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("change", "renew_sidecar", "message"),
    [
        (truncate, False, "is not the file that its sidecar describes"),
        (truncate, True, "truncated"),
        (set_weight_to_nan, False, "is not the file that its sidecar describes"),
        (set_weight_to_nan, True, "NaN"),
        (quantize_by_hand, True, "quantised already"),
        (overflow, True, "holds NaN or infinity"),
        (hold_a_subgraph, True, "the node choice (If) holds a subgraph"),
    ],
)
def test_bad_model_is_one_message_and_no_file(model_path, data_dir, contract, capsys, change, renew_sidecar, message):
    change(model_path)
    if renew_sidecar:
        write_sidecar(model_path, {}, contract)
    check_refused(model_path, data_dir, ["--data", str(data_dir)], message, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "DATA", "--images-dir", "DATA/images"], "--images-dir is"),
        (["--annotations", "DATA/annotations/instances_train.json"], "without --images-dir"),
        (
            ["--annotations", "DATA/annotations/instances_train.json", "--images-dir", "DATA/images", "--split", "val"],
            "--split is val",
        ),
        (["--data", "DATA", "--evaluation-images-dir", "DATA"], "without --evaluation-annotations"),
        (["--data", "DATA/nothing"], "no such file or folder"),
        (["--data", "DATA", "--split", "val"], "expected no image in both"),
        (["--data", "DATA", "--num-images", "0"], "--num-images is 0"),
        (["--data", "DATA", "--max-ap-drop", "-0.1"], "--max-ap-drop is -0.1; expected points of AP, 0 or more"),
        (["--data", "DATA", "--max-ap-drop", "nan"], "--max-ap-drop is nan"),
        (["--data", "DATA", "--max-ap-drop", "101"], "--max-ap-drop is 101.0"),
        (["--data", "DATA", "--nearest"], "--nearest is given without --max-ap-drop"),
        (["--data", "DATA", "--budget-split", "val"], "expected none without --max-ap-drop"),
        (["--data", "DATA", "--max-ap-drop", "1", "--budget-split", "train"], "expected no image in both"),
        (["--data", "DATA", "--max-ap-drop", "1", "--budget-split", "test"], "no such file or folder"),
        (["--calibration-cache", "CACHE", "--max-ap-drop", "1"], "--max-ap-drop is given without --data"),
        (["--data", "DATA", "--method", "percentile", "--percentile", "30"], "--percentile is 30.0"),
        (["--data", "DATA", "--percentile", "99"], "expected none with --method max"),
        (["--data", "DATA", "--write-calibration-cache", "CACHE"], "and --tensorrt-version, or neither"),
        (["--data", "DATA", "--statistics", "DATA/../student.int8.onnx"], "two of the files to read and write are one"),
        (
            ["--data", "DATA", "--write-calibration-cache", "DATA/../student.onnx", "--tensorrt-version", "8.5.3"],
            "two of the files to read and write are one",
        ),
        (
            ["--data", "DATA", "--write-calibration-cache", "CACHE", "--tensorrt-version", "ten"],
            "--tensorrt-version is 'ten'",
        ),
        *(
            (
                [flag, "FILE", "--write-calibration-cache", "FILE", "--tensorrt-version", "8.5.3"],
                "two of the files to read and write are one",
            )
            for flag in ("--calibration-cache", "--ranges")
        ),
        (["--calibration-cache", "CACHE", "--target", "onnxruntime"], "the target is onnxruntime"),
        (["--calibration-cache", "CACHE", "--num-images", "5"], "--num-images: expected none with --calibration-cache"),
        (["--ranges", "R", "--seed", "5", "--split", "val"], "--split, --seed: expected none with --ranges"),
        (["--ranges", "R", "--target", "tensorrt"], "--target: expected none with --ranges"),
        (["--ranges", "R", "--keep-float", "node_stem"], "--keep-float: expected none with --ranges"),
        (["--ranges", "R", "--choose", "covering"], "--choose: expected none with --ranges"),
        (["--ranges", "R", "--max-ap-drop", "1"], "--max-ap-drop is given without --data"),
        (
            ["--calibration-cache", "CACHE", "--method", "mse", "--split", "val", "--bias-correction"],
            "--split, --method, --bias-correction: expected none with",
        ),
        (["--calibration-cache", "DATA/annotations/instances_train.json"], "expected a calibration cache of TensorRT"),
        (["--data", "DATA", "--statistics", "DATA/annotations/instances_train.json"], "cannot read the statistics in"),
    ],
)
def test_bad_flags_are_one_message_and_no_file(model_path, data_dir, capsys, words, message):
    check_refused(model_path, data_dir, [word.replace("DATA", str(data_dir)) for word in words], message, capsys)


def test_overlap_is_an_error(model_path, data_dir, capsys):
    shutil.copy(data_dir / "images" / "04.png", data_dir / "images" / "10.png")
    check_refused(model_path, data_dir, ["--data", str(data_dir)], "04.png is the image 10.png (id 11)", capsys)


def test_no_images_are_an_error(model_path, data_dir, capsys):
    path = data_dir / "annotations" / "instances_train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []}))
    check_refused(model_path, data_dir, ["--data", str(data_dir)], "has no images at all", capsys)


def test_images_of_other_sizes_and_types_are_prepared_as_in_deployment(words, data_dir, model_path):
    images, annotations = data_dir / "images", data_dir / "annotations" / "instances_train.json"
    document = json.loads(annotations.read_text())
    for entry, (width, height) in zip(document["images"], [(31, 90), (8, 8)], strict=False):
        entry.update(width=width, height=height)
    document["annotations"] = [dict(entry, bbox=[1, 1, 5, 5]) for entry in document["annotations"]]
    annotations.write_text(json.dumps(document))
    cv2.imwrite(str(images / "00.png"), np.full((90, 31), 200, np.uint8))  # grey, upright, larger
    cv2.imwrite(str(images / "01.png"), np.full((8, 8, 4), 65535, np.uint16))  # alpha, 16 bits
    assert main([*words, "--num-images", "8"]) == 0


def test_file_that_is_no_image_is_an_error(model_path, data_dir, capsys):
    (data_dir / "images" / "03.png").write_text("GIF89a")
    check_refused(model_path, data_dir, ["--data", str(data_dir)], "03.png, image id 4: not an image", capsys)


def test_truncated_image_is_an_error(model_path, data_dir, capsys):
    truncate(data_dir / "images" / "02.png")
    check_refused(model_path, data_dir, ["--data", str(data_dir)], "02.png", capsys)


def check_refused(model_path, data_dir, words, message, capsys):
    output = model_path.with_name("student.int8.onnx")
    assert main([str(model_path), *words, "-o", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(model_path.parent.iterdir()) == sorted([data_dir, model_path, sidecar_path(model_path)])


@pytest.mark.parametrize("name", ["student.onnx", "student.int8", "student.onnx/int8.onnx"])
def test_output_that_cannot_be_written_is_an_error(model_path, data_dir, capsys, name):
    before = sha256_of(model_path)
    assert main([str(model_path), "--data", str(data_dir), "-o", str(model_path.parent / name)]) == 2
    assert name in capsys.readouterr().err
    assert sha256_of(model_path) == before


def test_help_needs_no_heavy_package():
    code = (
        "import sys\nfrom calibration.quantize import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(bool({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
