from __future__ import annotations

import pytest

from calibration.choose import main
from calibration.quantize import main as quantize
from deploy.contract import RESULT_VERSION, provenance, read_sidecar, sealed
from deploy.files import sha256_of, write_json

FLOAT_AP = 0.4


def write_result(path, kind, model, role, images=120, annotations="instances_val.json", inputs=None, **numbers):
    document = {
        "result_version": RESULT_VERSION,
        "kind": kind,
        "role": role,
        "model": {"file": str(model), "sha256": sha256_of(model)},
        "data": {"annotations": annotations, "annotations_sha256": f"hash of {annotations}", "images": images},
        "numbers": numbers,
        **provenance(inputs or {}),
    }
    write_json(path, sealed({**document, "elapsed_s": 10.0}))
    return path


@pytest.fixture
def float_result(model_path, tmp_path):
    return write_result(tmp_path / "float.accuracy.result.json", "accuracy", model_path, "onnx-fp32", AP=FLOAT_AP)


@pytest.fixture
def measured(model_path, data_dir, float_result, tmp_path):
    """(name, drop, ...) -> accuracy and latency of an INT8 model of that name with that drop, fractions."""

    def make(name, drop, half_width=0.001, keep_float=(), against=float_result, float_ap=FLOAT_AP, **data):
        model = tmp_path / f"{name}.onnx"
        kept = ["--keep-float", *keep_float] if keep_float else []
        words = [str(model_path), "--data", str(data_dir), "--num-images", "2", "--target", "onnxruntime", *kept]
        assert quantize([*words, "-o", str(model)]) == 0
        difference = {"AP_difference": -drop, "low": -drop - half_width, "high": -drop + half_width}
        accuracy = write_result(
            tmp_path / f"{name}.accuracy.result.json", "accuracy", model, name, inputs={"against": against},
            AP=float_ap - drop, against=difference, **data,
        )  # fmt: skip
        latency = tmp_path / f"{name}.latency.result.json"
        write_result(latency, "latency", model, name, comparable=False, summary_ms={"total": {"median": 12.5}}, **data)
        return ["--rung", str(accuracy), str(latency)]

    return make


@pytest.fixture
def choose(tmp_path, capsys):
    """(words, ...) -> status, what is said, and the budget in the sidecar of the file that is written, if it is."""

    def run(*words, budget="0.5"):
        output = tmp_path / "student.int8.onnx"
        status = main([*words, "--max-int8-drop", budget, "-o", str(output)])
        printed = capsys.readouterr()
        found = read_sidecar(output)["details"]["int8_budget"] if output.exists() else None
        return status, printed.err if status else printed.out, found

    return run


def test_the_first_that_keeps_the_budget_is_taken_and_those_after_it_are_not_read(measured, choose, tmp_path):
    rungs = [*measured("max", 0.02), *measured("auto", 0.004, keep_float=["node_down1"]), *measured("best", 0.0)]
    (tmp_path / "best.accuracy.result.json").unlink()
    status, said, budget = choose(*rungs)
    assert status == 0
    assert "auto keeps the budget of 0.5 points of AP: AP 39.60, a drop of 0.40 points" in said
    assert "The interval" not in said
    assert sha256_of(tmp_path / "student.int8.onnx") == sha256_of(tmp_path / "auto.onnx")
    assert (budget["max_int8_drop"], budget["ships"]) == (0.5, None)
    first, second = budget["rungs"]
    assert (first["title"], first["holds"], second["title"], second["holds"]) == ("max", False, "auto", True)
    assert (first["ap"], first["drop"], first["low"], first["high"]) == pytest.approx((0.38, 0.02, 0.019, 0.021))
    assert (first["median_ms"], first["comparable"]) == (12.5, False)
    assert 0 < second["int8_share"] < first["int8_share"] < 1
    made = read_sidecar(tmp_path / "max.onnx")["elapsed_s"]
    assert first["elapsed_s"] == pytest.approx(20 + made, abs=0.06)


def test_the_sidecar_is_that_of_the_chosen_file_and_says_what_it_was_chosen_by(measured, choose, model_path, tmp_path):
    choose(*measured("max", 0.02), *measured("auto", 0.001))
    output, chosen = (read_sidecar(tmp_path / name) for name in ("student.int8.onnx", "auto.onnx"))
    assert output["contract"] == chosen["contract"]
    assert {**chosen["details"], "int8_budget": output["details"]["int8_budget"]} == output["details"]
    inputs = {name: entry["file"] for name, entry in output["inputs"].items()}
    assert inputs["model"] == inputs["float"] == str(model_path)
    assert inputs["chosen"] == str(tmp_path / "auto.onnx")
    assert inputs["max, accuracy"] == str(tmp_path / "max.accuracy.result.json")


@pytest.mark.parametrize(("otherwise", "title"), [([], "ONNX FP32"), (["--otherwise", "engine-fp16"], "TensorRT FP16")])
def test_where_none_keeps_it_the_nearest_is_written_and_float_ships(measured, choose, tmp_path, otherwise, title):
    rungs = [*measured("max", 0.02), *measured("auto", 0.01, keep_float=["node_down1"]), *measured("bias", 0.03)]
    status, said, budget = choose(*rungs, *otherwise)
    assert status == 0
    assert said.strip().endswith(f"What ships is {title}: do not roll out INT8.")
    assert "No way to INT8 keeps the budget of 0.5 points of AP. The nearest, auto, has AP 39.00" in said
    assert sha256_of(tmp_path / "student.int8.onnx") == sha256_of(tmp_path / "auto.onnx")
    assert budget["ships"] == (otherwise[1] if otherwise else "onnx-fp32")
    assert [rung["holds"] for rung in budget["rungs"]] == [False, False, False]


@pytest.mark.parametrize(("drop", "ships"), [(0.001, "fp16"), (0.01, "engine-fp32")])
def test_fp16_is_next_and_ships_if_it_keeps_the_budget(measured, choose, drop, ships):
    fp16 = ["--fp16", *measured("fp16", drop)[1:]]
    status, _, budget = choose(*measured("max", 0.02), *fp16, "--otherwise", "engine-fp32")
    assert (status, budget["ships"], len(budget["rungs"])) == (0, ships, 2)
    assert len(choose(*measured("max", 0.001), *fp16)[2]["rungs"]) == 1


@pytest.mark.parametrize(
    ("images", "half_width", "said"),
    [
        (120, 0.006, "beyond the budget: on other images it may not hold. For an interval of 0.5 points to either "
                     "side about 200 are needed."),
        (12, 0.03, "So few images leave a wide interval; expected 50 or more. For an interval of 0.5 points to either "
                   "side about 400 are needed."),
        (12, 0.001, "So few images leave a wide interval; expected 50 or more."),
    ],
)  # fmt: skip
def test_a_wide_interval_is_said_with_what_is_needed(measured, choose, images, half_width, said):
    words = measured("max", 0.001, half_width=half_width, images=images)
    assert choose(*words)[1].strip().endswith(said)


@pytest.mark.parametrize("budget", ["-0.1", "100.5", "nan"])
def test_a_budget_that_is_none_is_one_message_and_no_file(choose, budget):
    status, said, found = choose("--rung", "a", "b", budget=budget)
    assert (status, found) == (2, None)
    assert "expected points of AP, 0 or more and at most 100" in said


def test_what_was_not_measured_alike_is_refused(measured, choose, model_path, tmp_path):
    other = write_result(tmp_path / "other.accuracy.result.json", "accuracy", model_path, "onnx-fp32", AP=0.5)
    for change in ({"images": 60}, {"annotations": "instances_test.json"}, {"against": other}):
        status, said, found = choose(*measured("max", 0.02), *measured("auto", 0.001, **change))
        assert (status, found) == (2, None)
        assert "auto.accuracy.result.json and" in said
        assert "are of other images, or compared with other float models" in said


def test_results_of_another_model_under_the_same_name_are_refused(measured, choose, tmp_path):
    words = measured("max", 0.02)
    earlier = (tmp_path / "max.latency.result.json").read_bytes()
    measured("max", 0.02, keep_float=["node_down1"])
    (tmp_path / "max.latency.result.json").write_bytes(earlier)
    status, said, found = choose(*words)
    assert (status, found) == (2, None)
    assert "max.latency.result.json is of" in said
    assert "as it was, or of another model; expected" in said


def test_a_float_model_that_finds_nothing_is_refused(measured, choose, model_path):
    status, said, found = choose(*measured("max", 0.0, float_ap=0.0))
    assert (status, found) == (2, None)
    assert f"the float model {model_path} has AP 0 on instances_val.json; expected one that finds something" in said


def test_the_output_is_none_of_those_to_choose_from(measured, tmp_path, capsys):
    words = measured("student.int8", 0.001)
    made = (tmp_path / "student.int8.onnx").read_bytes()
    assert main([*words, "--max-int8-drop", "1", "-o", str(tmp_path / "student.int8.onnx")]) == 2
    assert "one of those to choose from" in capsys.readouterr().err
    assert (tmp_path / "student.int8.onnx").read_bytes() == made
