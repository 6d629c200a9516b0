"""The students of configs/recipes are made once and measured once; the guide's table is that of the results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.reporting.wording import ms
from benchmarks.studies import recipes
from benchmarks.studies.recipes import RecipesOptions, main, students
from deploy.contract import load_contract, write_sidecar

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "distil-on-my-data.md"
RESULTS = ROOT / "benchmarks" / "results" / "recipes" / "cpu.json"


@pytest.fixture
def made(detector, monkeypatch):
    """The names of the models that were made; each is a tiny detector."""
    names, source = [], detector()
    contract = load_contract(source)

    def run(self, words, log, alone=False):
        output = Path(words[words.index("-o") + 1])
        shutil.copyfile(source, output)
        write_sidecar(output, {}, contract, {"parameters": 1_500_000}, ["python", "-m", *words])
        names.append(output.name)
        log.write_text("")
        return 0

    monkeypatch.setattr(recipes.Processes, "run", run)
    monkeypatch.setattr(recipes, "FOLDER", ROOT / "configs/recipes")
    return names


def test_each_student_is_made_and_measured_once(made, data_dir, tmp_path, monkeypatch, capsys):
    measured = {"ms": {"fp32": 20.0, "int8": 8.0}, "rounds_ms": {"fp32": [20.0, 21.0, 20.0], "int8": [8.0, 8.0, 10.0]}}
    calls = []

    def timed(sessions, image):
        calls.append(list(sessions))
        return {**measured, "description": {"fp32": "some runtime, 1 thread"}, "others_cores": 0.0}

    monkeypatch.setattr(recipes, "latencies", timed)
    words = [
        "--data",
        str(data_dir),
        "--sides",
        "416",
        "--runs-dir",
        str(tmp_path / "runs"),
        "-o",
        str(tmp_path / "cpu"),
    ]
    assert main(words) == 0
    assert len(calls) == 8
    assert made[:2] == ["gfl_nano_416.onnx", "gfl_nano_416.int8.onnx"]
    assert main(words) == 0
    assert (len(calls), len(made)) == (8, 16)
    text = (tmp_path / "cpu.md").read_text()
    assert "| gfl_nano | 416 x 416 | 1.5 M | 20.0 | 8.00 | 2.50\N{MULTIPLICATION SIGN} (2.00 to 2.62) |" in text
    assert "rtmdet_medium_416: FP32 20.0 ms, INT8 8.0 ms" in capsys.readouterr().out


def test_without_the_recipes_it_says_where_to_run_it(tmp_path, monkeypatch, data_dir, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(data_dir), "-o", str(tmp_path / "cpu")]) == 2
    assert "there is no recipe in configs/recipes; run this command in the folder of the checkout" in (
        capsys.readouterr().err
    )


def test_the_guides_latencies_are_those_of_the_results():
    rows = json.loads(RESULTS.read_text())["rows"]
    found = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| ([^|]+) \|$", GUIDE.read_text(), re.MULTILINE)
    assert found
    for name, *cells in found:
        recipe = name if name.startswith("rtmdet") else f"gfl_{name}"
        own = [row for row in rows if row["recipe"] == recipe]
        expected = [", ".join(ms(row[key]) for row in own) for key in ("fp32_ms", "int8_ms")]
        assert cells == expected, name
    assert {row["recipe"] for row in rows} == {one.recipe.stem for one in students(RecipesOptions("", ""))}
