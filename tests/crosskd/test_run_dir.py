"""What is read of a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from crosskd.run_dir import load_run
from deploy.errors import CheckpointError, ContractError


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
