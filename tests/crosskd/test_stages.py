"""The stages of a pipeline: what is skipped, what is resumed, what happens when one fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crosskd.stages import Stage, can_resume, is_up_to_date, note_start, run_stages, start_of
from deploy.contract import RESULT_VERSION, provenance, sealed, sidecar_path, write_sidecar
from deploy.errors import PipelineError
from deploy.files import sha256_of, write_json
from deploy.freshness import write_start

ROOT = Path(__file__).parents[2]

FAKE_STAGE = '''
"""Copies a file, with a sidecar, as the real commands do; fails on "bad"; tells each time that it ran."""
import pathlib, sys
from deploy.contract import write_sidecar
source, target, flags = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
with open("ran.txt", "a") as log:
    log.write(" ".join([target.name, *flags]) + "\\n")
content = pathlib.Path(source).read_text()
if content == "bad":
    sys.exit("error: on purpose")
target.write_text(content)
write_sidecar(target, {"source": source})
sys.exit(int(content) if content.isdigit() else 0)
'''


# ---- running it


@pytest.fixture
def make_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """(name, source, target) -> a stage that copies `source` to `target`; in an empty working directory."""
    (tmp_path / "fake_stage.py").write_text(FAKE_STAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    def make(name: str, source: str, target: str) -> Stage:
        return Stage(name, ["fake_stage", source, target], Path(target))

    return make


def _ran() -> list[str]:
    log = Path("ran.txt")
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_what_is_up_to_date_is_skipped_until_an_input_or_the_artefact_changes(
    make_stage: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("a").write_text("one")
    stages = [make_stage("first", "a", "b"), make_stage("second", "b", "c"), make_stage("report", "c", "d")]
    assert run_stages(stages) == 0
    assert _ran() == ["b", "c", "d"]
    assert "[1/3] first: python -m fake_stage a b" in capfd.readouterr().out
    assert run_stages(stages) == 0
    assert _ran() == ["d"]  # the report is always made
    assert "[1/3] first: up to date, b" in capfd.readouterr().out
    Path("a").write_text("two")
    run_stages(stages)
    assert _ran() == ["b", "c", "d"]
    Path("c").write_text("edited")
    run_stages(stages)
    assert _ran() == ["c", "d"]
    assert Path("d").read_text() == "two"
    sidecar_path("b").unlink()
    run_stages(stages)
    assert _ran() == ["b", "d"]
    other = Stage("first", ["fake_stage", "a", "b", "--flag"], Path("b"))
    run_stages([other, *stages[1:]])
    assert "b" in _ran()


def test_a_failed_stage_is_named_and_what_is_finished_is_kept(make_stage: Callable[..., Stage]) -> None:
    Path("a").write_text("one")
    Path("x").write_text("bad")
    stages = [make_stage("first", "a", "b"), make_stage("second", "x", "c"), make_stage("report", "c", "d")]
    with pytest.raises(PipelineError, match=r"stage 'second' ended with status 1.*what is finished is kept"):
        run_stages(stages)
    assert _ran() == ["b", "c"]
    Path("x").write_text("mended")
    assert run_stages(stages) == 0
    assert _ran() == ["c", "d"]


@pytest.mark.parametrize(("status", "passed_on"), [("1", True), ("2", False)])
def test_the_reports_verdict_is_passed_on_and_its_failure_is_not(
    make_stage: Callable[..., Stage], status: str, passed_on: bool
) -> None:
    Path("a").write_text(status)
    stages = [make_stage("report", "a", "b")]
    if passed_on:
        assert run_stages(stages) == 1
    else:
        with pytest.raises(PipelineError, match="stage 'report' ended with status 2"):
            run_stages(stages)


def test_boards_that_failed_are_for_their_report_to_tell(make_stage: Callable[..., Stage]) -> None:
    Path("a").write_text("2")
    Path("x").write_text("0")
    fleet, report = make_stage("fleet", "a", "b"), make_stage("report", "x", "c")
    with pytest.raises(PipelineError, match="stage 'fleet' ended with status 2"):
        run_stages([fleet, report])
    fleet = dataclasses.replace(fleet, answers=(2,))
    assert run_stages([fleet, report]) == 0
    assert run_stages([fleet, report]) == 0
    assert _ran() == ["b", "b", "c", "b", "c"]
    nothing = Stage("fleet", ["quiet", "2"], Path("b"), answers=(2,))  # bad input: it writes nothing
    Path("quiet.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    with pytest.raises(PipelineError, match="stage 'fleet' ended with status 2 and did not write b"):
        run_stages([nothing, report])


def test_a_report_that_is_not_written_is_not_called_done(make_stage: Callable[..., Stage]) -> None:
    Path("quiet.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    Path("d").write_text("an earlier report")
    for status in ("0", "1"):  # of a Python that cannot import the command, say
        with pytest.raises(PipelineError, match=f"stage 'report' ended with status {status} and did not write d"):
            run_stages([Stage("report", ["quiet", status], Path("d"))])


def _write_result(path: str, drop: float) -> Path:
    against = {"AP_difference": -drop, "low": -drop, "high": -drop}
    numbers = {"AP": 0.4, "against": against}
    write_json(path, sealed({"result_version": RESULT_VERSION, "numbers": numbers, **provenance({})}))
    return Path(path)


def test_a_stage_is_left_out_where_a_result_before_it_keeps_the_budget(
    make_stage: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("a").write_text("one")
    results = (Path("first.json"), Path("second.json"))
    further = dataclasses.replace(make_stage("further", "a", "b"), unless=results, max_int8_drop=0.5)
    stages = [further, make_stage("report", "a", "d")]
    _write_result("first.json", 0.02)
    run_stages(stages)
    assert _ran() == ["b", "d"]  # the second was not measured
    Path("b").unlink()
    _write_result("second.json", 0.004)
    run_stages(stages)
    assert _ran() == ["d"]
    assert "[1/2] further: not needed, INT8 keeps its budget without it" in capfd.readouterr().out


def test_a_stage_that_failed_says_what_else_to_do(make_stage: Callable[..., Stage]) -> None:
    Path("x").write_text("bad")
    stage = dataclasses.replace(make_stage("training", "x", "c"), advice="; or do without it")
    with pytest.raises(PipelineError, match=r"'training' ended with status 1.*what is finished is kept; or do without"):
        run_stages([stage, make_stage("report", "x", "d")])


# ---- trainings: their config counts, and they can be resumed


@pytest.fixture
def training(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    shutil.copytree(configs, tmp_path / "tests" / "crosskd" / "configs")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    words = ["crosskd.train", "tests/crosskd/configs/gfl_tiny.py", "--data", "D", "-o", "run"]
    return Stage("baseline", words, Path("run/detector.pth"))


def _finish(stage: Stage) -> None:
    """Leaves what a finished run leaves, as far as the pipeline looks."""
    stage.artefact.write_text("weights")
    sidecar = {"schema_version": 1, "inputs": {}, "command": stage.command, "versions": {}, "details": {}}
    bytes_ = stage.artefact.stat().st_size
    sidecar["artefact"] = {"file": stage.artefact.name, "sha256": sha256_of(stage.artefact), "bytes": bytes_}
    sidecar_path(stage.artefact).write_text(json.dumps(sidecar))


def _edit(path: str, old: str, new: str) -> None:
    content = Path(path).read_text()
    assert old in content
    Path(path).write_text(content.replace(old, new))


def test_a_training_is_made_again_when_its_config_changes(training: Stage) -> None:
    note_start(training)
    _finish(training)
    assert is_up_to_date(training)
    _edit(training.words[1], "# The small student", "# The very small student")
    assert is_up_to_date(training)  # a comment changes nothing
    _edit("configs/_base_/gfl_320.py", "lr=1.5e-3", "lr=1.0e-3")  # what it inherits from what it inherits
    assert not is_up_to_date(training)


def test_what_a_stage_does_not_use_of_its_config_makes_nothing_again(training: Stage) -> None:
    words = ["crosskd.distill", "tests/crosskd/configs/crosskd_tiny.py", "--data", "D", "-o", "student"]
    student = Stage("student", words, Path("student/student.pth"))
    baseline = Stage("baseline", ["crosskd.train", *words[1:-1], "run"], training.artefact)
    for stage in (student, baseline):
        note_start(stage)
        _finish(stage)
    _edit(words[1], "max_ap_drop=5.0", "max_ap_drop=7.0")
    assert is_up_to_date(student)
    assert is_up_to_date(baseline)
    _edit(words[1], 'method="crosskd"', 'method="pkd"')
    assert not is_up_to_date(student)
    assert is_up_to_date(baseline)  # it has no teacher


def test_what_an_earlier_version_noted_still_counts(training: Stage) -> None:
    note_start(training)
    write_start(training.artefact.parent, start_of(training, whole_config=True))
    Path("run/last_checkpoint").write_text("run/epoch_1.pth")
    assert can_resume(training)
    _finish(training)
    assert is_up_to_date(training)
    _edit("configs/_base_/gfl_320.py", "lr=1.5e-3", "lr=1.0e-3")
    assert not is_up_to_date(training)


def test_a_run_made_by_hand_with_the_same_command_counts(training: Stage) -> None:
    training.artefact.parent.mkdir()
    _finish(training)
    assert is_up_to_date(training)


def test_only_the_same_interrupted_training_is_resumed(training: Stage) -> None:
    last = Path("run/last_checkpoint")
    note_start(training)
    assert not can_resume(training)  # nothing was saved yet
    last.write_text("run/epoch_1.pth")
    assert can_resume(training)
    other = Stage(training.name, [*training.words, "--seed", "1"], training.artefact)
    assert not can_resume(other)
    note_start(other)
    assert not last.exists()  # the other seed's checkpoint must not be resumed
    note_start(training)
    last.write_text("run/epoch_1.pth")
    _edit("configs/_base_/gfl_320.py", "lr=1.5e-3", "lr=1.0e-3")
    assert not can_resume(training)


def test_an_interrupted_repetition_is_not_taken_for_the_run_before_it(training: Stage) -> None:
    note_start(training)
    _finish(training)
    _edit("configs/_base_/gfl_320.py", "lr=1.5e-3", "lr=1.0e-3")
    note_start(training)  # and then the power fails
    assert not is_up_to_date(training)


def test_a_training_that_was_cut_off_while_its_int8_file_was_made_goes_on(training: Stage) -> None:
    stage = dataclasses.replace(training, artefact=Path("run/student.int8.onnx"), record=Path("run/detector.pth"))
    note_start(stage)
    Path("run/last_checkpoint").write_text("run/epoch_1.pth")
    _finish(training)
    assert not is_up_to_date(stage)
    assert can_resume(stage)
    stage.artefact.write_text("INT8")
    write_sidecar(stage.artefact, {"weights": "run/detector.pth"})
    assert is_up_to_date(stage)
    _edit("configs/_base_/gfl_320.py", "lr=1.5e-3", "lr=1.0e-3")
    assert not is_up_to_date(stage)
    note_start(stage)
    assert not Path("run/detector.pth").exists()


def test_a_resumed_training_is_up_to_date(training: Stage) -> None:
    note_start(training)
    _finish(Stage(training.name, [*training.words, "--resume"], training.artefact))
    assert is_up_to_date(training)
