from __future__ import annotations

import json
from xml.etree import ElementTree

import onnx
import pytest

from calibration import sensitivity
from calibration.audit import INT8, audit
from calibration.sensitivity import chart_from_rows, cost, main, table_from_rows
from deploy.contract import write_sidecar

BLOCKS = [
    "node_stem", "node_down1", "node_down_skip", "node_lateral3", "node_lateral4", "node_fpn3", "node_tower_3",
]  # fmt: skip
COSTS = {"node_down_skip": 0.03, "node_fpn3": 0.01, "node_tower_3": -0.002}
"""AP that a convolution costs in INT8; others cost nothing."""


def quantized_names(path):
    return {entry.name for entry in audit(onnx.load(path)).products if entry.state == INT8}


class FakeAccuracy:
    """In place of benchmarks.accuracy; it fails where its `failing` is alone in INT8."""

    def __init__(self):
        self.measured, self.failing = [], None

    def __call__(self, model, annotations, images_dir, limit=None, against=None, output=None):
        assert annotations.name == "instances_val.json"
        if against is None:
            numbers = {"AP": 0.4, "AP_small": None, "AP_medium": 0.5, "AP_large": 0.6}
            output.write_text(json.dumps({"numbers": numbers}))
            return numbers
        names = quantized_names(model)
        self.measured.append(names)
        if names == {self.failing}:
            raise KeyboardInterrupt
        drop = sum(COSTS.get(name, 0.0) for name in names)
        return {
            "AP": 0.4 - drop, "AP_small": None, "AP_medium": 0.5 - drop, "AP_large": 0.6 - 2 * drop,
            "against": {"AP_difference": -drop, "low": -drop - 0.01, "high": -drop + 0.01, "score_shift": None},
        }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    fake = FakeAccuracy()
    monkeypatch.setattr(sensitivity, "accuracy_numbers", fake)
    return fake


@pytest.fixture
def output(tmp_path):
    return tmp_path / "sensitivity.json"


@pytest.fixture
def words(model_path, data_dir, output):
    return [str(model_path), "--data", str(data_dir), "-o", str(output), "--num-images", "3"]


def test_each_block_is_measured_alone_and_ranked(words, output, fake, target, capsys):
    assert main([*words, "--target", target]) == 0
    document = json.loads(output.read_text())
    assert [len(names) for names in fake.measured] == [3, 2, 1, 1, 2, 1, 2, 12]
    assert set.union(*fake.measured[:-1]) == fake.measured[-1]  # each once, then all together
    assert [row["name"] for row in document["blocks"]][:2] == ["node_down_skip", "node_fpn3"]
    assert document["blocks"][-1]["name"] == "node_tower_3"
    assert {row["name"] for row in document["blocks"]} == set(BLOCKS)
    first, together = document["blocks"][0], document["all"]
    assert (first["AP_drop"], first["low"], first["high"]) == pytest.approx((0.03, 0.02, 0.04))
    assert (first["AP_medium_drop"], first["AP_large_drop"]) == pytest.approx((0.03, 0.06))
    assert first["AP_small_drop"] is None
    assert together["AP_drop"] == pytest.approx(sum(COSTS.values()) - 0.002 + 0.002)
    assert together["multiplications"] == sum(row["multiplications"] for row in document["blocks"])
    assert all(0 < row["error"]["boxes"] < together["error"]["boxes"] * 2 for row in document["blocks"])
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith("all blocks")
    assert table[2].startswith("node_down_skip     3.00    (2.00 to 4.00)")
    assert ElementTree.parse(output.with_suffix(".svg")).getroot().tag.endswith("svg")


def test_ap_is_measured_with_the_command_of_the_benchmarks(words, output):
    pytest.importorskip("faster_coco_eval")
    others = [f"node_{name}" for name in ("stem", "plain1", "plain2", "down_skip", "lateral3", "lateral4", "fpn3")]
    others += ["node_fpn4", "node_tower_3", "node_tower_4"]
    assert main([*words, "--limit", "2", "--keep-float", *others]) == 0
    document = json.loads(output.read_text())
    (row,) = document["blocks"]
    assert row["name"] == "node_down1"
    assert {key: row[key] for key in row if key != "name"} == {
        key: document["all"][key] for key in row if key != "name"
    }  # fmt: skip
    assert row["low"] <= row["AP_drop"] <= row["high"]
    assert row["AP_medium_drop"] is None  # no such box is annotated
    assert abs(row["AP_small_drop"]) <= 1


def test_an_interrupted_run_goes_on(words, output, fake, capsys):
    fake.failing = "node_lateral3"
    assert main(words) == 130
    assert len(json.loads(output.read_text())["blocks"]) == 3
    assert not output.with_suffix(".svg").exists()
    fake.failing = None
    fake.measured.clear()
    assert main(words) == 0
    assert "3 of 8 are known from an earlier run" in capsys.readouterr().err
    assert [len(names) for names in fake.measured] == [1, 2, 1, 2, 12]
    resumed = json.loads(output.read_text())
    output.unlink()
    assert main(words) == 0
    whole = json.loads(output.read_text())
    assert (resumed["blocks"], resumed["all"]) == (whole["blocks"], whole["all"])


def test_a_finished_file_is_not_measured_again(words, output, monkeypatch, capsys):
    words = [*words, "--metric", "error"]
    assert main(words) == 0
    table = capsys.readouterr().out
    monkeypatch.setattr(sensitivity, "measured_block", None)
    assert main(words) == 0
    assert capsys.readouterr().out == table


def test_error_alone_needs_no_evaluation(words, output, monkeypatch):
    monkeypatch.setattr(sensitivity, "accuracy_numbers", None)
    assert main([*words, "--metric", "error", "--blocks", "each"]) == 0
    rows = json.loads(output.read_text())["blocks"]
    assert len(rows) == 12
    assert [cost(row) for row in rows] == sorted((cost(row) for row in rows), reverse=True)
    assert all("AP_drop" not in row for row in rows)


def test_what_is_kept_in_float_is_not_measured(words, output):
    assert main([*words, "--metric", "error", "--keep-float", "node_stem", "node_lateral3"]) == 0
    document = json.loads(output.read_text())
    names = {name for row in document["blocks"] for name in row["products"]}
    assert len(names) == 10
    assert not names & {"node_stem", "node_lateral3"}


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--method", "mse"], "the sensitivity of other method;"),
        (["--num-images", "4"], "the sensitivity of other calibration images;"),
        (["--limit", "2"], "the sensitivity of other measured images;"),
        (["--blocks", "each"], "the sensitivity of other block kind;"),
        (["--target", "onnxruntime", "--keep-float", "node_stem"], "other target, products kept in float;"),
    ],
)
def test_other_settings_do_not_go_on_with_a_file(words, output, capsys, further, message):
    words = [*words, "--metric", "error"]
    assert main(words) == 0
    before = output.read_text()
    assert main([*words, *further]) == 2
    assert message in capsys.readouterr().err
    assert output.read_text() == before


def test_another_model_does_not_go_on_with_a_file(words, output, model_path, contract, capsys):
    words = [*words, "--metric", "error"]
    assert main(words) == 0
    before = output.read_text()
    model = onnx.load(model_path)
    model.doc_string = "another"
    onnx.save(model, model_path)
    write_sidecar(model_path, {}, contract)
    assert main(words) == 2
    assert "the sensitivity of other model;" in capsys.readouterr().err
    assert output.read_text() == before


@pytest.mark.parametrize("content", ['{"images": []}', "[]", "{"])
def test_a_file_of_something_else_is_not_written_over(words, output, capsys, content):
    output.write_text(content)
    assert main(words) == 2
    assert str(output) in capsys.readouterr().err
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--split", "train"], "expected no image in both"),
        (["--limit", "0"], "the number of images is 0"),
        (["--num-images", "0"], "--num-images is 0"),
        (["--keep-float", "nothing"], "--keep-float has 'nothing'"),
        (["-o", "sensitivity.txt"], "with the suffix .json"),
    ],
)
def test_bad_flags_are_one_message_and_no_file(words, output, capsys, further, message):
    assert main([*words, *further]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_statistics_that_cannot_be_written_are_refused_before_any_work(words, monkeypatch, capsys):
    monkeypatch.setattr(sensitivity, "read_model", None)
    assert main([*words, "--statistics", "/dev/null/s.npz"]) == 2
    assert "cannot write /dev/null/s.npz" in capsys.readouterr().err


ROW = {
    "name": "a & <b>", "products": ["c"], "multiplications": 30, "error": {"boxes": 0.25, "scores": 0.01},
    "AP_drop": 0.02, "low": -0.01, "high": 0.05,
    "AP_small_drop": None, "AP_medium_drop": 0.03, "AP_large_drop": 0.0, "score_shift": -0.04,
}  # fmt: skip


def test_table_is_in_points():
    assert table_from_rows([ROW]).splitlines()[1].split() == [
        "a", "&", "<b>", "2.00", "(-1.00", "to", "5.00)", "-", "3.00", "0.00", "-0.040", "25.00", "1.00", "100.0%",
    ]  # fmt: skip


def test_chart_draws_bars_as_long_as_the_cost():
    rows = [ROW, {**ROW, "AP_drop": 0.01}, {**ROW, "AP_drop": -0.01}]
    root = ElementTree.fromstring(chart_from_rows(rows))
    bars = [element.attrib for element in root if element.tag.endswith("rect")]
    widths = [float(bar["width"]) for bar in bars]
    assert widths == pytest.approx([140, 70, 70])  # 420 for -1 to 5 points
    assert float(bars[2]["x"]) + widths[2] == pytest.approx(float(bars[0]["x"]))  # to the left of zero
    assert "a & <b>" in [element.text for element in root]
    only_error = [{key: ROW[key] for key in ("name", "multiplications", "error")}]
    assert "Error of boxes + scores" in chart_from_rows(only_error)
