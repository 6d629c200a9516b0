from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies import training_step
from benchmarks.studies.training_step import RATIOS, VARIANTS, lines_from_numbers, numbers_from_rounds

ROOT = Path(__file__).parents[3]


def times(*samples_s, peak_mib=100.0):
    return {
        "samples_s": list(samples_s),
        "peak_mib": peak_mib,
        "precision": "fp32",
        "device": "CPU",
        "threads": 2,
    }


def rounds_of(**seconds):
    """Rounds from variant -> median of each round; those not named take a second."""
    count = max(map(len, seconds.values()))
    return [
        {name: times(*[seconds.get(name.replace("-", "_"), [1.0] * count)[i]] * 3) for name in VARIANTS}
        for i in range(count)
    ]


def ratio(numbers, over, under):
    (found,) = (one for one in numbers["ratios"] if (one["over"], one["under"]) == (over, under))
    return found


def test_a_ratio_is_taken_within_a_round():
    # The machine is twice as slow in the second round and four times in the third: the ratio does not see it.
    numbers = numbers_from_rounds(rounds_of(student=[1.0, 2.0, 4.0], distill_fast=[1.5, 3.0, 6.0]))
    found = ratio(numbers, "distill-fast", "student")
    assert found == {"over": "distill-fast", "under": "student", "median": 1.5, "lowest": 1.5, "highest": 1.5}


def test_the_spread_of_a_ratio_is_that_over_the_rounds():
    found = ratio(numbers_from_rounds(rounds_of(distill_fast=[1.2, 1.1, 1.6])), "distill-fast", "student-fast")
    assert (found["median"], found["lowest"], found["highest"]) == (1.2, 1.1, 1.6)


def test_a_variant_is_summarised_over_all_rounds():
    rounds = rounds_of(student=[1.0, 1.0])
    rounds[0]["distill"] = times(1.0, 2.0, peak_mib=300.0)
    rounds[1]["distill"] = times(3.0, 4.0, 5.0, peak_mib=400.0)
    variants = numbers_from_rounds(rounds)["variants"]
    row = variants["distill"]
    assert (row["median_s"], row["quartiles_s"], row["peak_mib"]) == (3.0, [2.0, 4.0], 400.0)
    assert [run["samples_s"] for run in row["rounds"]] == [[1.0, 2.0], [3.0, 4.0, 5.0]]
    assert (row["stable"], variants["student"]["stable"]) == (False, True)


def test_the_tables_line_up():
    lines = lines_from_numbers(numbers_from_rounds(rounds_of(distill_fast=[1.25, 1.5, 12.0])))
    gap = lines.index("")
    for table, rows in ((lines[:gap], len(VARIANTS)), (lines[gap + 1 :], len(RATIOS))):
        assert len(table) == 1 + rows
    (row,) = (line for line in lines[1:gap] if line.startswith("distillation, fast form, bf16"))
    assert row.split()[4:] == ["1.500", "1.250", "to", "12.000", "100", "fp32"]
    assert {line.index("fp32") for line in lines[1:gap]} == {lines[0].index("precision")}


TIME_TRAINING = """
import json, sys
words = sys.argv[2:]
position = words.index("--size")
size = words[position + 1 : position + 3]
rest = words[:position] + words[position + 3 :]
flags = dict(zip(rest[::2], rest[1::2]))
with open("calls.txt", "a") as file:
    print(flags["--variant"], *size, flags["--batch"], flags["--steps"], flags.get("--threads"), file=file)
samples_s = [0.5] * int(flags["--steps"])
facts = {"peak_mib": 7.0, "precision": "fp32", "device": "CPU", "threads": 1}
json.dump({"samples_s": samples_s, **facts}, open(flags["-o"], "w"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The working folder, with a training side that only says how it was called, and a config."""
    package = tmp_path / "crosskd"
    package.mkdir()
    (package / "workers").mkdir()
    for folder in (package, package / "workers"):
        (folder / "__init__.py").write_text("")
    (package / "workers" / "time_training.py").write_text(TIME_TRAINING)
    (tmp_path / "config.py").write_text("model = dict()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_round_runs_all_variants_and_the_result_says_how(fake, capsys):
    words = ["config.py", "--size", "96", "64", "--batch", "2", "--steps", "3", "--rounds", "2", "--threads", "1"]
    assert training_step.main([*words, "-o", "out.json"]) == 0
    assert (fake / "calls.txt").read_text().splitlines() == [f"{name} 96 64 2 3 1" for name in VARIANTS] * 2
    result = json.loads((fake / "out.json").read_text())
    assert result["kind"] == "training_step"
    assert result["settings"] == {"size": [96, 64], "batch": 2, "steps": 3, "rounds": 2, "threads": 1}
    assert len(result["inputs"]["config"]["sha256"]) == 64
    assert {"environment", "command", "versions", "created_utc"} <= result.keys()
    assert result["numbers"]["variants"].keys() == VARIANTS.keys()
    for row in result["numbers"]["variants"].values():
        assert [run["samples_s"] for run in row["rounds"]] == [[0.5] * 3] * 2
        assert all("load_average" in run for run in row["rounds"])
    printed = capsys.readouterr().out
    assert "4 images" not in printed
    assert "2 images of 96 x 64, CPU, 1 threads, 2 rounds of 3 steps" in printed
    assert "distillation, fast form, bf16 / student alone, float32" in printed
    assert "UNSTABLE" not in printed


def test_without_an_output_the_table_is_only_printed(fake, capsys):
    assert training_step.main(["config.py", "--steps", "1", "--rounds", "1"]) == 0
    assert "student alone, float32" in capsys.readouterr().out
    assert (fake / "calls.txt").read_text().startswith("student 320 320 4 1 None\n")
    assert {path.name for path in fake.iterdir()} == {"crosskd", "config.py", "calls.txt"}


def test_an_unstable_variant_is_named(fake, capsys):
    program = TIME_TRAINING.replace('[0.5] * int(flags["--steps"])', "[0.5, 0.9, 1.5]")
    (fake / "crosskd" / "workers" / "time_training.py").write_text(program)
    assert training_step.main(["config.py", "--steps", "3", "--rounds", "1"]) == 0
    assert "UNSTABLE: student alone, float32; student alone, fast form, bf16;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (TIME_TRAINING.replace('int(flags["--steps"])', "1"), "wrote 1 samples of student; expected 2"),
        ("print('error: no torch here'); raise SystemExit(2)", "error: no torch here"),
        ("raise SystemExit(3)", "crosskd.workers.time_training ended with status 3"),
    ],
)
def test_a_failure_of_the_training_side_is_one_message(fake, capsys, program, message):
    (fake / "crosskd" / "workers" / "time_training.py").write_text(program)
    assert training_step.main(["config.py", "--steps", "2", "--rounds", "1", "-o", "out.json"]) == 2
    assert message in capsys.readouterr().err
    assert not (fake / "out.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config.py", "--batch", "0"], "--batch is 0; expected at least 1"),
        (["config.py", "--steps", "0"], "--steps is 0"),
        (["config.py", "--rounds", "0"], "--rounds is 0"),
        (["config.py", "--threads", "0"], "--threads is 0"),
        (["nope.py"], "no such config: nope.py"),
    ],
)
def test_bad_flags(fake, capsys, words, message):
    assert training_step.main([*words, "-o", "out.json"]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in fake.iterdir()} == {"crosskd", "config.py"}


@pytest.mark.slow
def test_the_real_training_side(tmp_path, monkeypatch):
    pytest.importorskip("mmdet")
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out.json"
    words = ["tests/crosskd/configs/crosskd_tiny.py", "--size", "96", "64", "--steps", "2", "--rounds", "1"]
    assert training_step.main([*words, "-o", str(output)]) == 0
    variants = json.loads(output.read_text())["numbers"]["variants"]
    assert variants["distill"]["median_s"] > variants["teacher-forward"]["median_s"]
