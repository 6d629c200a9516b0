"""What a report says of its results: the models' order, what ships, the ladder, what to distrust."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.measuring.result import STAGES
from deploy.contract import sealed


def test_a_second_runtime_is_a_rung_and_not_what_ships(data_dir, results, result, run_report):
    """OpenVINO runs the very file of ONNX INT8: a second opinion on its accuracy."""
    same = json.loads(next(path for path in results if path.name == "onnx-int8.accuracy.result.json").read_text())
    second = result("openvino-int8", ap=0.494, model__sha256=same["model"]["sha256"], model__runtime="openvino")
    engine = result("engine-int8", ap=0.493, made_from="onnx-int8")
    status, _, document = run_report([*results, second, engine])
    assert status == 0
    assert [rung["role"] for rung in document["ladder"]][-3:] == ["onnx-int8", "openvino-int8", "engine-int8"]
    assert [rung["from"] for rung in document["ladder"]][-2:] == ["ONNX INT8", "ONNX INT8"]
    assert document["ladder"][-2]["change"] == pytest.approx(-0.001)
    assert not [note for note in document["notes"] if "does not come from" in note]
    assert document["lineage"][-1]["inputs"][0]["role"] == "onnx-int8"
    _, _, document = run_report([*results, second])
    assert document["verdict"]["ship"] == "onnx-int8"
    assert document["int8"]["rows"] == ["onnx-int8", "onnx-fp32"]


def test_one_role_on_two_runtimes_is_refused(result, run_report):
    paths = [
        result("student-int8", ap=0.5, model__runtime="openvino"),
        result("student-int8", ms=9.0, model__runtime="onnxruntime"),
    ]
    status, error, document = run_report(paths)
    assert status == 2
    assert "accuracy and latency of different runtimes, openvino and onnxruntime" in error
    assert document is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numbers__threads": 4}, "the teacher was timed with threads 4, this model with threads 2"),
        ({"model__runtime": "torch"}, "the teacher was timed with runtime torch"),
        ({"environment__cpu": "another processor"}, "cpu another processor"),
        ({"environment__cpu_clock_max_mhz": 2000.0}, "cpu_clock_max_mhz 2000.0"),
        ({"environment__nvpmodel": "MAXN"}, "nvpmodel MAXN"),
        ({"numbers__mode": "paced", "numbers__fps": 30.0}, "mode paced, fps 30.0"),
    ],
)
def test_a_speed_up_is_told_between_like_and_like_alone(result, run_report, tmp_path, changes, words):
    paths = [result("teacher", ms=200.0, **changes), result("onnx-int8", ms=10.0, made_from="x")]
    status, _, document = run_report(paths, "--min-speedup", 2)
    assert status == 1
    (limit,) = document["limits"]
    assert (limit["outcome"], limit["measured"]) == ("cannot tell", None)
    assert words in limit["why"]
    assert [row["speedup"] for row in document["rows"]] == [None, None]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "20.00" not in text.split("## All models")[1].split("##")[0]


def test_the_teacher_in_the_students_runtime_is_what_a_speed_up_is_against(result, run_report, tmp_path):
    torch = result("teacher", ms=400.0, model__runtime="torch", model__format="torch")
    ours = [result("onnx-int8", ms=10.0, model__runtime="onnxruntime"), result("onnx-int8", ap=0.4)]
    in_float = result("teacher-onnx-fp32", ms=100.0, model__runtime="onnxruntime")
    status, _, document = run_report([torch, *ours, in_float], "--min-speedup", 5)
    assert (status, document["verdict"]["ship"]) == (0, "onnx-int8")
    rows = {row["role"]: row for row in document["rows"]}
    assert list(rows) == ["teacher", "teacher-onnx-fp32", "onnx-int8"]
    assert rows["onnx-int8"]["speedup"] == pytest.approx(10.0)
    assert rows["teacher-onnx-fp32"]["speedup"] is None  # torch's time is there, for information
    assert rows["teacher"]["latency_ms"]["total"]["median"] == pytest.approx(400.0)
    assert "against Teacher, ONNX FP32" in (tmp_path / "out" / "report.html").read_text()
    like = result("teacher-onnx-int8", ms=40.0, model__runtime="onnxruntime")
    document = run_report([torch, *ours, in_float, like])[2]
    assert document["rows"][-1]["speedup"] == pytest.approx(4.0)  # that of the same precision, where it was measured


def test_a_teacher_that_was_disturbed_makes_no_speed_up_certain(result, run_report):
    busy = {"numbers__comparable": False, "numbers__comparable_reasons": ["others kept the machine busy"]}
    paths = [result("teacher", ms=200.0, **busy), result("onnx-int8", ms=10.0)]
    (limit,) = run_report(paths, "--min-speedup", 2)[2]["limits"]
    assert limit["outcome"] == "cannot tell"
    assert limit["why"] == "the teacher's latency is not comparable: others kept the machine busy"


def test_accuracy_is_compared_with_a_form_of_the_teacher_where_torch_was_not_measured(data_dir, result, run_report):
    document = run_report([result("teacher-engine-fp16", ap=0.52), result("engine-int8", ap=0.5)])[2]
    assert document["teacher"] == "teacher-engine-fp16"
    assert document["rows"][-1]["AP_gain"] == pytest.approx(-0.02)


def test_latencies_of_single_images_are_told_apart_from_scatter(result, run_report, tmp_path):
    totals = (10.0 * (1 + 0.5 * (np.arange(100) % 5))).tolist()  # five images in turn
    path = result("student", ms=20.0, numbers__samples_ms={**dict.fromkeys(STAGES), "total": totals})
    (row,) = run_report([path])[2]["rows"]
    assert row["by_image_ms"] == [10.0, 30.0]
    assert row["estimates"]["median_ms"] == {"value": 20.0, "low": 20.0, "high": 20.0}
    assert "10.0 to 30.0" in (tmp_path / "out" / "report.html").read_text()


def test_own_roles_come_after_the_known_ones_and_do_not_ship_unasked(result, run_report):
    _, _, document = run_report([result("rival", ap=0.6), result("student", ap=0.5), result("teacher", ap=0.55)])
    assert [row["role"] for row in document["rows"]] == ["teacher", "student", "rival"]
    assert document["verdict"]["ship"] == "student"


def test_notes_tell_what_to_distrust(result, run_report):
    paths = [
        result("teacher", ms=100.0, environment__cpu="another processor"),
        result("onnx-fp32", ap=0.5),
        result("onnx-int8", ap=0.5, made_from="elsewhere"),
        result("onnx-int8", ms=10.0, made_from="elsewhere", spread=0.5, numbers__threads=4),
    ]
    notes = "\n".join(run_report(paths)[2]["notes"])
    assert "Latency not comparable (ONNX INT8): it is unstable." in notes
    assert "different machines" in notes
    assert "different thread counts: no speed-up is told" in notes
    assert "Teacher: accuracy was not measured." in notes
    assert "ONNX INT8 does not come from the measured ONNX FP32" in notes


def test_the_first_bad_rung_is_named(result, run_report):
    aps = {"student": 0.5, "onnx-fp32": 0.5, "onnx-int8": 0.45}
    document = run_report([result(role, ap=ap) for role, ap in aps.items()])[2]
    assert document["first_bad_rung"] == "onnx-int8"
    assert document["ladder"][2]["faults"] == ["AP falls by 5.00 points, more than 1.0"]
    assert document["ladder"][2]["movement"]["worst_px"] == 0.0


@pytest.mark.parametrize(
    ("int8", "float_", "answer"),
    [((0.495, 10.0), (0.5, 20.0), "yes"), ((0.45, 10.0), (0.5, 20.0), "no"), ((0.5, 20.0), (0.5, 10.0), "no"),
     ((0.49, 10.0), (0.5, 20.0), "cannot tell")],
)  # fmt: skip
@pytest.mark.parametrize("pair", [("onnx-int8", "onnx-fp32"), ("engine-int8", "engine-fp16")])
def test_is_int8_worth_it(result, run_report, pair, int8, float_, answer):
    paths = [result(role, ap=ap) for role, (ap, _) in zip(pair, (int8, float_), strict=True)]
    paths += [result(role, ms=ms) for role, (_, ms) in zip(pair, (int8, float_), strict=True)]
    found = run_report(paths)[2]["int8"]
    assert found["rows"] == list(pair)
    assert found["answer"] == answer
    assert found["speedup"]["low"] <= found["speedup"]["value"] <= found["speedup"]["high"]
    assert run_report(paths[:3])[2]["int8"]["answer"] == "cannot tell"


def test_engines_are_asked_first_whether_int8_is_worth_it(result, run_report):
    paths = [result(role, ap=0.5) for role in ("onnx-fp32", "onnx-int8", "engine-fp16", "engine-int8")]
    assert run_report(paths)[2]["int8"]["rows"] == ["engine-int8", "engine-fp16"]
    assert run_report(paths[:1])[2]["int8"] is None


def test_edited_and_missing_detections_are_refused(results, run_report, tmp_path):
    kept = tmp_path / "onnx-int8.accuracy.detections.json"
    text = kept.read_text()
    kept.write_text(text.replace("0.85", "0.95"))
    status, error, document = run_report(results)
    assert status == 2
    assert "onnx-int8.accuracy.detections.json was changed" in error
    assert document is None
    kept.unlink()
    assert "is missing" in run_report(results)[1]
    kept.write_text(text)
    assert run_report(results)[0] == 0


def test_what_varies_by_itself_makes_no_other_environment(result, run_report):
    warm = {"environment__now": {"temperatures_c": {"cpu": 71.0}}, "environment__load_average": [2.0, 1.0, 1.0]}
    document = run_report([result("student", ap=0.5), result("student", ms=9.0, **warm)])[2]
    assert len(document["environments"]) == 1
    assert "now" not in document["environments"][0]["facts"]


def test_what_distillation_gained_may_not_be_certain(result, run_report):
    notes = run_report([result("baseline", ap=0.5), result("student", ap=0.5001)])[2]["notes"]
    assert any(note.startswith("What distillation gained is not certain: 0.0 points") for note in notes)
    assert run_report([result("baseline", ap=0.5), result("student", ap=0.45)])[2]["rows"][1]["gain_kept"] is None


def test_results_of_anybodys_detections_have_no_latency_to_miss(result, run_report):
    notes = "\n".join(
        run_report([result("student", ap=0.5), result("rival", ap=0.4, model__format="detections")])[2]["notes"]
    )
    assert "Distilled student: latency was not measured." in notes
    assert "rival" not in notes


def test_twenty_results_are_rendered(result, run_report):
    paths = [result(f"own-{index}", ap=0.3 + index / 50) for index in range(10)]
    paths += [result(f"own-{index}", ms=5.0 + index) for index in range(10)]
    document = run_report(paths)[2]
    assert [row["role"] for row in document["rows"]] == [f"own-{index}" for index in range(10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ap": 0.4, "data__annotations_sha256": "0" * 64}, "differ in data.annotations_sha256"),
        ({"ms": 9.0, "data__class_names": ["disc", "ring"]}, "differ in data.class_names"),
        ({"ap": 0.4, "data__images": 4}, "differ in data.images"),
    ],
)
def test_results_of_different_data_are_refused(result, run_report, changes, message):
    status, error, document = run_report([result("teacher", ap=0.5), result("student", **changes)])
    assert status == 2
    assert message in error
    assert document is None


def test_latency_may_use_fewer_images(result, run_report):
    assert run_report([result("student", ap=0.5), result("student", ms=9.0, data__images=8)])[0] == 0


def test_two_results_of_a_role_are_refused(result, run_report):
    status, error, _ = run_report([result("student", ap=0.5), result("student", ap=0.6, suffix="2")])
    assert status == 2
    assert "second accuracy result of role 'student'" in error
    status, error, _ = run_report([result("student", ap=0.5), result("student", ms=9.0, model__sha256="f" * 64)])
    assert status == 2
    assert "accuracy and latency of different files" in error


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["numbers"]["bootstrap"].update(ap=[0.5, "x"]), "numbers.bootstrap.ap[1] is 'x'"),
        (lambda d: d["numbers"]["bootstrap"].update(ap=[0.5]), "bootstrap draws"),
        (lambda d: d["numbers"]["best_f1"].pop("score"), "numbers.best_f1.score is missing"),
        (lambda d: d["numbers"]["pr_curves"]["AP"].update(mean=3), "numbers.pr_curves.AP.mean is 3"),
        (lambda d: d["numbers"]["found_scores"].update(disc=[[]]), "numbers.found_scores.disc[0] is []"),
        (lambda d: d["numbers"]["found_scores"].update(disc=[0.9]), "'disc' is 1 in one and 5 in the other"),
        (lambda d: d["numbers"]["per_class"].update(ring=0.5), "'ring' for one"),
        (lambda d: d["model"].update(inputs={"model": "x"}), "model.inputs.model is 'x'"),
        (lambda d: d["model"].update(bytes=10**400), "model.bytes is 1000"),
        (lambda d: d.update(role="\ud800"), "role is '\\ud800'"),
        (lambda d: d["detections"].update(file="../x.json"), "detections.file is '../x.json'"),
    ],
)
def test_a_result_of_another_structure_is_one_message(result, run_report, edit, message):
    path = result("onnx-int8", ap=0.4)
    document = json.loads(path.read_text())
    del document["content_sha256"]
    edit(document)
    path.write_text(json.dumps(sealed(document)))
    status, error, report = run_report([result("teacher", ap=0.5), path])
    assert (status, report) == (2, None)
    assert message in error
    assert error.count("\n") == 1
