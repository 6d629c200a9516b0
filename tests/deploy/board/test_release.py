from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, List, Optional

import numpy as np
import pytest

from deploy.board import release
from deploy.board.archive import unpack
from deploy.board.release import CURRENT, FORMER, RELEASES, activate, rollback
from deploy.board.run import MANIFEST, fault_of_files
from deploy.bundle import main as make_bundle
from deploy.contract import load_contract, read_sidecar, write_sidecar
from deploy.errors import ConfigError, ContractError, PipelineError
from tests.stand_ins.detector import CONTRACT, write_detector

pytest.importorskip("onnxruntime")


class PowerCut(BaseException):
    """What no handler in the code catches."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board's folder with two bundles, each with an engine."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("one", "two"):
        archive = folder / f"{name}.tar.gz"
        assert make_bundle([str(write_detector(folder / "student.onnx")), "-o", str(archive)]) == 0
        bundle = unpack(archive, folder / "board")
        engine = bundle / f"{name}.fp16.engine"
        engine.write_bytes(name.encode())
        details = {"tensorrt": "10.3.0", "precision": "fp16", "parameters": 1, "dla_core": None}
        write_sidecar(engine, {"onnx": bundle / "student.onnx"}, CONTRACT, details)
    return folder / "board"


@pytest.fixture
def board(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "board"))


def in_use(board: Path, link: str = CURRENT) -> Optional[str]:
    """The content of the engine that a program would open; its release is whole."""
    if not os.path.lexists(board / link):
        return None
    assert fault_of_files(board / link) == ""
    assert load_contract(board / link / "model.engine") == CONTRACT
    return (board / link / "model.engine").read_text()


def test_a_model_becomes_current_and_the_former_comes_back(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_use(board) is None
    assert activate(board / "one", []) == 0
    assert (in_use(board), in_use(board, FORMER)) == ("one", None)
    sha256 = read_sidecar(board / "one" / "one.fp16.engine")["artefact"]["sha256"]
    assert os.readlink(board / CURRENT) == f"{RELEASES}/{sha256}"
    assert activate(board / "two", ["--engine", str(board / "two" / "two.fp16.engine")]) == 0
    assert (in_use(board), in_use(board, FORMER)) == ("two", "one")
    assert activate(board / "two", []) == 0  # a second time nothing changes
    assert (in_use(board), in_use(board, FORMER)) == ("two", "one")
    shutil.rmtree(board / "one")  # a bundle that was cleared away is not needed
    shutil.rmtree(board / "two")
    capsys.readouterr()
    assert rollback((board / CURRENT).resolve(), []) == 0
    assert (in_use(board), in_use(board, FORMER)) == ("one", "two")
    assert capsys.readouterr().out == f"{board / CURRENT} is the model of SHA-256 {sha256[:12]}... again\n"
    assert rollback((board / CURRENT).resolve(), []) == 0
    assert (in_use(board), in_use(board, FORMER)) == ("two", "one")
    assert sorted(path.name for path in board.iterdir()) == [CURRENT, FORMER, RELEASES]


def cut_after(monkeypatch: pytest.MonkeyPatch, calls: int, work: Callable[[], Any]) -> bool:
    """Does `work` with the power cut before the call of that number which changes the disk; whether it was cut."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise PowerCut
            return function(*words, **named)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "symlink"), (os, "replace"), (os, "rename"), (os, "fsync"), (shutil, "copy2")):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            work()
        except PowerCut:
            return True
    return False


@pytest.mark.parametrize("step", ["activate", "rollback"])
def test_a_power_cut_at_any_point_leaves_one_of_the_two(
    step: str, board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):  # of few files, so that each cut can be tried
        manifest = json.loads((board / name / MANIFEST).read_text())
        manifest["files"] = {file: manifest["files"][file] for file in ("student.onnx", "golden/0.input.npy")}
        for room in ("deploy", "benchmarks", "graphs"):
            shutil.rmtree(board / name / room)
        (board / name / MANIFEST).write_text(json.dumps(manifest))
    activate(board / "one", [])
    if step == "rollback":
        activate(board / "two", [])
    seen: List[Optional[str]] = []
    calls, there = 0, tmp_path / "cut" / "board"
    while True:
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(board, there, symlinks=True)
        was_cut = cut_after(
            monkeypatch, calls, lambda: {"activate": activate, "rollback": rollback}[step](there / "two", [])
        )
        seen.append(in_use(there))
        if not was_cut:
            break
        if step == "activate":
            activate(there / "two", [])
            assert (in_use(there), in_use(there, FORMER)) == ("two", "one")
        calls += 1
    before, after = ("one", "two") if step == "activate" else ("two", "one")
    first = seen.index(after)
    assert seen == [before] * first + [after] * (len(seen) - first)
    assert 0 < first < len(seen)


def test_everything_is_on_the_disk_before_a_link_leads_there(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, at_link = set(), set()
    real_flush, real_point = release._flush, release._point
    monkeypatch.setattr(release, "_flush", lambda path: (flushed.add(path.name), real_flush(path)))
    monkeypatch.setattr(release, "_point", lambda *words: (at_link.update(flushed), real_point(*words)))
    activate(board / "one", [])
    for path in (board / CURRENT).resolve().rglob("*"):
        assert path.is_symlink() or path.name in at_link, path
    assert {RELEASES, "board", f"{(board / CURRENT).resolve().name}.unfinished"} <= at_link


def test_what_is_not_the_judged_model_is_refused(board: Path) -> None:
    with pytest.raises(ContractError, match=r"--sha256 is 000.*expected the model that was judged"):
        activate(board / "one", ["--sha256", "0" * 64])
    with pytest.raises(ConfigError, match="has no former model"):
        rollback(board / "one", [])
    (board / "one" / "one.fp16.engine").write_bytes(b"another")
    with pytest.raises(ContractError, match="is not the file that its sidecar describes"):
        activate(board / "one", [])
    assert sorted(path.name for path in board.iterdir()) == ["one", "two"]


def test_a_former_release_that_was_damaged_does_not_come_back(board: Path) -> None:
    activate(board / "one", [])
    activate(board / "two", [])
    ((board / FORMER).resolve() / "run.py").write_text("another")
    with pytest.raises(ContractError, match=r"the former model will not do: .*run\.py was changed"):
        rollback(board / "two", [])
    assert in_use(board) == "two"
    activate(board / "one", [])  # it is written anew
    assert (in_use(board), in_use(board, FORMER)) == ("one", "two")
    assert len(list((board / RELEASES).iterdir())) == 2


def test_a_full_disk_is_one_message(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(board / "one", [])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(PipelineError, match=r"No space left on device\. current is as it was, or new"):
        activate(board / "two", [])
    assert in_use(board) == "one"


def test_a_model_of_onnx_runtime_is_activated_too(tmp_path: Path) -> None:
    plain, quantised = write_detector(tmp_path / "student.onnx"), write_detector(tmp_path / "student.u8.onnx", np.uint8)
    write_sidecar(quantised, {"model": plain}, CONTRACT)
    assert make_bundle([str(plain), str(quantised), "-o", str(tmp_path / "x.tar.gz")]) == 0
    bundle = unpack(tmp_path / "x.tar.gz", tmp_path / "board")
    assert activate(bundle, ["--engine", str(bundle / "student.u8.onnx")]) == 0
    assert load_contract(tmp_path / "board" / CURRENT / "model.onnx") == CONTRACT
    assert fault_of_files(tmp_path / "board" / CURRENT) == ""
