from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.measuring.environment import read_environment
from benchmarks.studies.jobs import is_current, is_made, make, printed_json
from deploy.contract import read_sidecar, sidecar_path, write_sidecar
from deploy.errors import MeasurementError
from deploy.files import write_json
from deploy.trials import TrialDied


class Maker:
    """In place of Processes: writes the artefact with its sidecar, as `python -m copy FROM TO` would."""

    def __init__(self, output="", status=0):
        self.output, self.status, self.runs = output, status, 0

    def run(self, words, log):
        self.runs += 1
        log.write_text(self.output)
        if not self.status:
            source, artefact = words[1:]
            Path(artefact).write_text(Path(source).read_text())
            write_sidecar(artefact, {"source": source})
            write_json(sidecar_path(artefact), {**read_sidecar(artefact), "command": ["python", "-m", *words]})
        return self.status


@pytest.fixture
def files(tmp_path):
    """(words, source, artefact) of a command that copies."""
    source, artefact = tmp_path / "source.txt", tmp_path / "made" / "copy.txt"
    source.write_text("one")
    return ["copy", str(source), str(artefact)], source, artefact


def test_what_is_made_from_the_same_files_is_not_made_again(files, tmp_path):
    words, source, artefact = files
    maker = Maker()
    make(artefact, words, maker)
    make(artefact, words, maker)
    assert maker.runs == 1
    source.write_text("two")
    assert not is_made(artefact, words)
    make(artefact, words, maker)
    assert (maker.runs, artefact.read_text()) == (2, "two")
    artefact.write_text("edited")
    assert not is_made(artefact, words)
    make(artefact, words, maker)
    assert (maker.runs, artefact.read_text()) == (3, "two")
    assert not is_made(artefact, ["copy", "-p", *words[1:]])
    sidecar_path(artefact).unlink()
    assert not is_made(artefact, words)


def test_a_result_file_is_its_own_sidecar(files, tmp_path):
    source, result = files[1], tmp_path / "x.result.json"
    sidecar = {"inputs": {"a": {"file": str(source), "sha256": "0"}}, "command": ["python", "-m", "m", "x"]}
    result.write_text(json.dumps(sidecar))
    assert not is_made(result, ["m", "x"])
    result.write_text(json.dumps({**sidecar, "inputs": {}}))
    assert is_made(result, ["m", "x"])


def test_what_was_measured_on_another_processor_is_not_current(tmp_path):
    result = tmp_path / "x.result.json"
    for cpu, expected in ((read_environment()["cpu"], True), ("Another 9000", False)):
        result.write_text(json.dumps({"inputs": {}, "command": [], "environment": {"cpu": cpu}}))
        assert is_current(result) is expected


def test_a_verdict_is_read_and_a_failure_raised(tmp_path, monkeypatch):
    (tmp_path / "says.py").write_text(
        "import sys; 1 / int(sys.argv[2]); print('{\"a\": 1}'); print('error: bad', file=sys.stderr); "
        "sys.exit(int(sys.argv[1]))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert printed_json(["says", "0", "1"]) == printed_json(["says", "1", "1"]) == {"a": 1}
    with pytest.raises(MeasurementError, match=r"^says ended with status 2: bad$"):
        printed_json(["says", "2", "1"])
    with pytest.raises(MeasurementError, match=r"^says ended with status 1: ZeroDivisionError"):
        printed_json(["says", "0", "0"])


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        ("warning: x\nerror: the file is bad\nsecond line\n", 2, "^the file is bad$"),
        (
            "Traceback\n  File\nKeyError: 'x'\n",
            1,
            r"^copy ended with status 1, and .*copy.txt.log with: KeyError: 'x'$",
        ),
        ("", -9, r"^copy ended with status -9 \(killed: was the memory full\?\), and .*copy.txt.log with: nothing$"),
    ],
)
def test_a_command_that_fails_is_quoted(output, status, message, files):
    words, _, artefact = files
    with pytest.raises(MeasurementError, match=message) as error:
        make(artefact, words, Maker(output, status))
    assert isinstance(error.value, TrialDied) == (status != 2)
