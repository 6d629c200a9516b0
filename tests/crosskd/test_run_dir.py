"""What is read of a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from crosskd.run_dir import RECORD, check_resumed, load_run
from deploy.errors import CheckpointError, ConfigError, ContractError
from deploy.files import write_json


def test_a_finished_run_is_read_back(student_run: Path) -> None:
    config, detector, sidecar = load_run(student_run)
    assert not detector.training
    assert detector.bbox_head.num_classes == len(sidecar["details"]["class_names"]) == 6
    assert config.model.type == "GFL"
    state = torch.load(student_run / "student.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(detector.state_dict()[key], value) for key, value in state.items())


def test_a_changed_or_unfinished_run_is_refused(student_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(student_run, run_dir)
    (run_dir / "config.py").write_text((student_run / "config.py").read_text() + "\nmax_epochs = 2\n")
    with pytest.raises(CheckpointError, match=r"config.py is missing or was changed since student.pth was written"):
        load_run(run_dir)
    shutil.copy(student_run / "config.py", run_dir / "config.py")
    (run_dir / "student.pth").write_bytes((student_run / "student.pth").read_bytes()[:-9])
    with pytest.raises(ContractError, match="not the file that its sidecar describes"):
        load_run(run_dir)
    (run_dir / "student.pth").unlink()
    with pytest.raises(ContractError, match=r"student\.pth and detector\.pth; expected one"):
        load_run(run_dir)


def test_the_start_of_a_run_is_compared_by_what_it_must_have(tmp_path: Path) -> None:
    split = {"images": 1, "boxes": 2, "sha256": "0"}
    record = {"class_names": ["a"], "annotations": {"train": split, "val": split}, "inputs": {}, "settings": {"x": 1}}
    write_json(tmp_path / RECORD, {**record, "annotations": {**record["annotations"], "more": split}})
    check_resumed(record, tmp_path)
    write_json(tmp_path / RECORD, {**record, "annotations": {"train": split}})
    with pytest.raises(ConfigError, match=r"annotations\.val is missing"):
        check_resumed(record, tmp_path)
    write_json(tmp_path / RECORD, {**record, "settings": {"x": "y" * 1000}})
    with pytest.raises(ConfigError, match=r"another setting: x was 'yyy.*\.\.\., now it is 1"):
        check_resumed(record, tmp_path)
