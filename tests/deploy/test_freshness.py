"""Whether a file was made by a command from inputs that are still the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from deploy.contract import RESULT_VERSION, sealed, sidecar_path, write_sidecar
from deploy.files import sha256_of, write_json
from deploy.freshness import (
    STARTED,
    changed_inputs,
    changed_keys,
    is_current,
    is_made,
    read_record,
    read_start,
    start_from,
    write_start,
)

WORDS = ["deploy.export", "run", "-o", "x.onnx"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("one")
    return path


@pytest.fixture
def artefact(tmp_path: Path, source: Path) -> Path:
    path = tmp_path / "x.onnx"
    path.write_text("made")
    write_sidecar(path, {"source": source}, command=["python", "-m", *WORDS])
    return path


@pytest.fixture
def result(tmp_path: Path, source: Path) -> Callable[..., Path]:
    """`result(key=value, ...)`: a result file with detections beside it."""

    def make(**changes: Any) -> Path:
        path, kept = tmp_path / "x.accuracy.result.json", tmp_path / "x.accuracy.detections.json"
        kept.write_text("[]")
        document: Dict[str, Any] = {
            "result_version": RESULT_VERSION,
            "inputs": {"source": {"file": str(source), "sha256": sha256_of(source)}},
            "command": ["python", "-m", "benchmarks.accuracy", "x.onnx"],
            "environment": {"cpu": "A 1"},
            "detections": {"file": kept.name, "sha256": sha256_of(kept)},
        }
        write_json(path, sealed({**document, **changes}))
        return path

    return make


def test_what_was_made_by_this_command_from_these_files_is_made(artefact: Path) -> None:
    assert is_made(artefact, WORDS)
    assert not is_made(artefact, [*WORDS, "--dynamic-batch"])
    assert not is_made(artefact, WORDS[:-1])


def test_a_training_that_was_resumed_is_the_same(artefact: Path) -> None:
    write_sidecar(artefact, {}, command=["python", "-m", *WORDS, "--resume"])
    assert is_made(artefact, WORDS)


@pytest.mark.parametrize("fault", ["input", "no input", "artefact", "no artefact", "no sidecar", "damaged", "a list"])
def test_what_changed_is_not_current(artefact: Path, source: Path, fault: str) -> None:
    assert is_current(artefact)
    sidecar = sidecar_path(artefact)
    {
        "input": lambda: source.write_text("two"),
        "no input": source.unlink,
        "artefact": lambda: artefact.write_text("edited"),
        "no artefact": artefact.unlink,
        "no sidecar": sidecar.unlink,
        "damaged": lambda: sidecar.write_text(sidecar.read_text()[:-20]),
        "a list": lambda: sidecar.write_text("[]"),
    }[fault]()
    assert not is_current(artefact)
    assert not is_made(artefact, WORDS)


def test_changed_inputs_are_named(artefact: Path, source: Path) -> None:
    record = read_record(artefact)
    assert changed_inputs(record) == []
    source.write_text("two")
    assert changed_inputs(record) == [str(source)]


def test_a_result_is_its_own_record(result: Callable[..., Path]) -> None:
    words = ["benchmarks.accuracy", "x.onnx"]
    assert is_made(result(), words)
    assert is_made(result(), words, cpu="A 1")
    assert not is_made(result(), words, cpu="B 2")
    assert not is_made(result(result_version=RESULT_VERSION - 1), words)
    assert is_made(result(detections=None), words)


def test_a_result_that_was_edited_or_has_lost_its_detections_is_not_current(result: Callable[..., Path]) -> None:
    path = result()
    path.write_text(json.dumps({**json.loads(path.read_text()), "role": "teacher"}))
    assert not is_current(path)
    path = result()
    path.with_name("x.accuracy.detections.json").write_text("[1]")
    assert not is_current(path)
    path.with_name("x.accuracy.detections.json").unlink()
    assert not is_current(path)


def test_the_start_of_a_run_is_its_command_and_its_files(tmp_path: Path, source: Path) -> None:
    start = start_from(WORDS, [*WORDS, str(source)], seed=1)
    assert start == {"command": ["python", "-m", *WORDS], "files": {str(source): sha256_of(source)}, "seed": 1}
    assert read_start(tmp_path) == {}
    write_start(tmp_path, start)
    assert read_start(tmp_path) == start
    for damaged in (
        "{",
        "[1]",
        "3",
        "[" * 100_000,
        '{"command": 3, "files": {}}',
        '{"command": [], "files": {"a": [1]}}',
    ):
        (tmp_path / STARTED).write_text(damaged)
        assert read_start(tmp_path) == {}


def test_what_measurements_depended_on_is_compared_by_name() -> None:
    assert changed_keys({"a": 1, "b": [2], "c": 3}, {"a": 1, "b": [3], "d": 4}) == ["b", "d", "c"]
    assert changed_keys({"a": None}, {"a": None}) == []
