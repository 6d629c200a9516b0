"""What is loaded, and above all what is refused: files that are not weights, or not of this detector."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd.models.checkpoint import (
    latest_checkpoint,
    load_detector_weights,
    read_checkpoint,
    save_detector_weights,
    state_of_checkpoint,
)
from deploy.errors import CheckpointError


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def detector(build: Callable[..., Any]) -> Any:
    return build("gfl_tiny.py")


@pytest.fixture
def saved(detector: Any, tmp_path: Path) -> Path:
    save_detector_weights(detector, tmp_path / "detector.pth", meta={"dataset_meta": {"classes": ("a",)}})
    return tmp_path / "detector.pth"


def test_weights_come_back(build: Callable[..., Any], detector: Any, saved: Path) -> None:
    other = build("gfl_tiny.py")
    load_detector_weights(other, saved)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in detector.state_dict().items())
    assert read_checkpoint(saved)["meta"] == {"dataset_meta": {"classes": ("a",)}}


def test_a_bare_state_dict_and_one_of_a_wrapped_module_are_read(detector: Any, tmp_path: Path) -> None:
    torch.save({f"module.{key}": value for key, value in detector.state_dict().items()}, tmp_path / "bare.pth")
    assert state_of_checkpoint(tmp_path / "bare.pth").keys() == detector.state_dict().keys()


def test_the_same_weights_give_the_same_bytes(detector: Any, saved: Path, tmp_path: Path) -> None:
    save_detector_weights(detector, tmp_path / "again.pth", meta={"dataset_meta": {"classes": ("a",)}})
    assert (tmp_path / "again.pth").read_bytes() == saved.read_bytes()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    detector: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def half(_content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_detector_weights(detector, saved, meta={})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("writer", ["torch", "torch, old format", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "it ran"
    content = {"state_dict": {"a": torch.zeros(1)}, "x": _Runs(os.system, f"touch '{proof}'")}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(_Runs(os.system, f"touch '{proof}'"), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(CheckpointError, match=r"would run code.*GLOBAL posix.system.*was not read") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not proof.exists()
    with pytest.raises(pickle.UnpicklingError):  # nor does any other torch.load of this process, mmengine's for one
        torch.load(path, weights_only=False)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # so the file is a real attack


def test_a_forged_getattr_is_refused(tmp_path: Path) -> None:
    from mmengine.logging.history_buffer import HistoryBuffer

    path = tmp_path / "forged.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": _Runs(getattr, HistoryBuffer, "__init__")}, path)
    with pytest.raises(CheckpointError, match="it asks for the attribute __init__ of"):
        read_checkpoint(path)


def test_a_checkpoint_of_mmengine_is_read(student_run: Path) -> None:
    path = latest_checkpoint(student_run)
    assert path == student_run / "epoch_1.pth"
    checkpoint = read_checkpoint(path)
    assert {"state_dict", "message_hub", "optimizer", "meta"} <= checkpoint.keys()
    assert not any(key.startswith("teacher.") for key in checkpoint["state_dict"])


def test_a_damaged_file_is_refused_wherever_it_ends(saved: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.pth"
    torch.save({"state_dict": {"a": torch.arange(50.0)}}, old, _use_new_zipfile_serialization=False)
    for source in (saved, old):
        content = source.read_bytes()
        for size in (0, 1, 10, 50, 200, len(content) // 2, len(content) - 1):
            (tmp_path / "cut.pth").write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"cut\.pth"):
                read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("text", "cannot read the checkpoint .* expected a file that torch.save wrote"),
        ([1, 2], "holds a list; expected a dict"),
        ({"epoch": 3}, r"no state_dict of tensors; found the keys \['epoch'\]"),
        ({"state_dict": {}}, "no state_dict of tensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_text("hello\n") if content == "text" else torch.save(content, path)
    with pytest.raises(CheckpointError, match=named):
        state_of_checkpoint(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint: .*nope\.pth"):
        read_checkpoint(tmp_path / "nope.pth")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_checkpoint(tmp_path)


def test_weights_of_another_detector_are_refused(build: Callable[..., Any], saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this GFL: \d+ keys of another shape"):
        load_detector_weights(build("gfl_tiny_teacher.py"), saved)
    with pytest.raises(CheckpointError, match=r"\d+ keys missing \(such as backbone\.layer"):
        load_detector_weights(build("gfl_tiny.py", {"model.backbone.depth": 34}), saved)
    deeper = build("gfl_tiny.py", {"model.bbox_head.stacked_convs": 1})
    with pytest.raises(CheckpointError, match=r"\d+ unexpected keys \(such as bbox_head\.cls_convs\.1"):
        load_detector_weights(deeper, saved)


def test_weights_for_other_classes_are_refused_with_both_counts(build: Callable[..., Any], saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained with 80 classes .* the data has 6"):
        load_detector_weights(build("gfl_tiny.py", {"model.bbox_head.num_classes": 6}), saved)


def test_a_run_is_not_resumed_from_a_file_that_would_run_code(tmp_path: Path) -> None:
    # mmengine, which loads it next, would allow `getattr` of anything.
    torch.save({"state_dict": {}, "x": _Runs(getattr, torch.Tensor, "__class__")}, tmp_path / "epoch_1.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    with pytest.raises(CheckpointError, match="it asks for the attribute __class__"):
        latest_checkpoint(tmp_path)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume .* Start the run without --resume"):
        latest_checkpoint(tmp_path)
