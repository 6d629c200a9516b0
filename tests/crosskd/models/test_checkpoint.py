"""What is loaded, and above all what is refused: files that are not weights, or not of this detector."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch

from crosskd.models.checkpoint import (
    classes_of_checkpoint,
    latest_checkpoint,
    load_detector_weights,
    read_checkpoint,
    save_detector_weights,
    state_of_checkpoint,
)
from deploy.errors import CheckpointError

ROOT = Path(__file__).parents[3]


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + b"\0\0\0\0",
         "is a safetensors file; expected one that torch.save wrote. Convert it: torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no checkpoint: it is a pointer of Git LFS: run git"),
        (b"\x1f\x8b\x08\0", "is no checkpoint: it is packed by gzip: unpack it"),
    ],
)  # fmt: skip
def test_a_file_of_another_format_is_called_by_its_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {message}")):
        read_checkpoint(path)


def test_a_device_is_not_read() -> None:
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint /dev/zero \(it is a folder, a device or a"):
        read_checkpoint("/dev/zero")


def test_a_damaged_checkpoint_to_go_on_from_names_what_else_there_is(saved: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "last_checkpoint").write_text(str(run_dir / "epoch_2.pth"))
    (run_dir / "epoch_2.pth").write_bytes(saved.read_bytes()[:-500])
    start = r"cannot go on from the last checkpoint: cannot read the checkpoint .*epoch_2.pth .*copy it again. Else "
    with pytest.raises(CheckpointError, match=f"{start}start the run anew, without --resume"):
        latest_checkpoint(run_dir)
    (run_dir / "epoch_1.pth").write_bytes(saved.read_bytes())
    with pytest.raises(
        CheckpointError, match=f"{start}write the name of an earlier one .epoch_1.pth. into .*last_check"
    ):
        latest_checkpoint(run_dir)
    (run_dir / "last_checkpoint").write_text("epoch_1.pth")
    assert latest_checkpoint(run_dir) == run_dir / "epoch_1.pth"


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
    with pytest.raises(CheckpointError, match="it is a folder, a device or a pipe, not a file"):
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
    with pytest.raises(CheckpointError, match=r"trained with 80 classes .* the data has 6.*--from FILE"):
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


def _save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def _numpy_1(path: Path) -> None:
    """Makes the file one that numpy 1 wrote: its functions had other names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"cnumpy._core.", b"cnumpy.core."))


HARMLESS = {
    "defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "OrderedDict": (collections.OrderedDict(a=1),) * 2,
    "deque": (collections.deque([1, 2], maxlen=5), [1, 2]),
    "Path": (Path("/runs/x"), PurePosixPath("/runs/x")),
    "PureWindowsPath": (PureWindowsPath("c:/x"), PureWindowsPath("c:/x")),
    "datetime": (datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),) * 2,
    "timedelta": (datetime.timedelta(hours=2),) * 2,
    "Namespace": (argparse.Namespace(lr=0.1, data=argparse.Namespace(root="d")),) * 2,
    "SimpleNamespace": (types.SimpleNamespace(lr=0.1), argparse.Namespace(lr=0.1)),
    "types": ([int, float, str, list, dict, bool, tuple],) * 2,
    "bytes": ([b"", b"ab"],) * 2,
    "TorchVersion": (torch.__version__, str(torch.__version__)),
    **{f"numpy.{kind}": (getattr(np, kind)(1),) * 2 for kind in ("bool_", "uint8", "int16", "float16", "float64")},
    "numpy.str_": (np.str_("hello"),) * 2,
}


@pytest.mark.parametrize("numpy_version", [1, 2])
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_trainers_keep_beside_their_weights_is_read(kind: str, numpy_version: int, tmp_path: Path) -> None:
    written, read = HARMLESS[kind]
    path = _save(tmp_path / "x.pth", {"state_dict": {"a": torch.zeros(1)}, "meta": written})
    if numpy_version == 1:
        _numpy_1(path)
    found = read_checkpoint(path)["meta"]
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.arange(3, dtype=">i4"), np.float32(3)[None][0:0]])
def test_arrays_of_numpy_1_are_read(array: Any, tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pth", {"state_dict": {"a": torch.zeros(1)}, "meta": array})
    _numpy_1(path)
    np.testing.assert_array_equal(read_checkpoint(path)["meta"], array)


def test_a_newer_pickle_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"newer pickle protocol .* expected protocol 2"):
        read_checkpoint(_save(tmp_path / "x.pth", {"a": torch.zeros(1)}, pickle_protocol=4))


def test_no_forged_pickle_runs_anything(tmp_path: Path) -> None:
    """3000 of calls, objects and states at random, of all that the list allows; Python's audit hook sees what runs."""
    script = Path(__file__).with_name("forged_pickles.py")
    words = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "x.pth"), "3000"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    read, refused = map(int, done.stdout.split()[:2])
    assert read > 100
    assert refused > 300
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("stored", ["O", "O8", "V8", "f8,f8", "(1000,)f8"])
def test_dtypes_of_objects_and_records_are_refused(stored: str, tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "x": _Runs(np.dtype, stored, False, True)}
    with pytest.raises(CheckpointError, match="it asks for the numpy dtype"):
        read_checkpoint(_save(tmp_path / "x.pth", content))


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {f"ema_{key.replace('.', '_')}": value for key, value in state.items()}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (lambda s, _o: {"state_dict": s}, None),
        (lambda s, _o: s, None),
        (lambda s, _o: {"state_dict": {f"module.{k}": v for k, v in s.items()}}, "begin with 'module.'"),
        (lambda s, _o: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}}, "begin with '_orig_mod.'"),
        (lambda s, _o: {f"module.model.{k}": v for k, v in s.items()}, "begin with 'module.model.'"),
        (
            lambda s, _o: {"state_dict": {"teacher.x": torch.ones(1), **{f"student.{k}": v for k, v in s.items()}}},
            "begin with 'student.'; left out 1 more, such as teacher.x",
        ),
        (lambda s, _o: {"state_dict": {f"ema_{k}": v for k, v in s.items()}}, "begin with 'ema_'"),
        (lambda s, _o: {"state_dict": _flat(s)}, "begin with 'ema_'"),
        (lambda s, _o: {"state_dict_ema": s}, "in state_dict_ema"),
        (lambda s, _o: {"ema": {"module": s, "updates": 3}}, "in ema.module"),
        # mmengine's and mmdet 2's EMA hooks: what they evaluate has the plain names
        (
            lambda s, o: {
                "state_dict": s,
                "ema_state_dict": {"steps": torch.ones(1), **{f"module.{k}": v for k, v in o.items()}},
            },
            "in state_dict; left out 1 more, such as ema_state_dict",
        ),
        (lambda s, o: {"state_dict": {**s, **_flat(o)}}, "such as ema_backbone"),
        # twice the same
        (lambda s, _o: {"state_dict": s, "model_ema": dict(s)}, "left out 1 more, such as model_ema"),
    ],
)
def test_prefixes_and_averages_are_recognised(
    content: Any, line: str | None, build: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, other, loaded = (build("gfl_tiny.py") for _ in range(3))
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter)
    state = detector.state_dict()
    load_detector_weights(loaded, _save(tmp_path / "x.pth", content(state, other.state_dict())))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    printed = capsys.readouterr().out
    assert printed.count("\n") == (line is not None)
    assert (line or "") in printed


@pytest.mark.parametrize(
    "content",
    [
        lambda s, o: {"state_dict": s, "state_dict_ema": o},
        lambda s, o: {"state_dict": {**{f"student.{k}": v for k, v in s.items()}, **{f"teacher.{k}": o[k] for k in o}}},
        lambda s, o: {"model": s, "ema": {"module": o}},
    ],
)
def test_two_sets_of_weights_are_named_and_none_is_guessed(
    content: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    state = build("gfl_tiny.py").state_dict()
    other = {key: value + 1 for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"2 sets of weights .*(state_dict_ema|'teacher\.'|ema\.module)"):
        load_detector_weights(build("gfl_tiny.py"), _save(tmp_path / "x.pth", content(state, other)))


def test_a_part_of_a_detector_is_named_with_where_it_was_found(build: Callable[..., Any], tmp_path: Path) -> None:
    state = build("gfl_tiny.py").state_dict()
    backbone = {f"module.teacher.{key}": value for key, value in state.items() if key.startswith("backbone.")}
    path = _save(tmp_path / "x.pth", {"state_dict": backbone})
    with pytest.raises(
        CheckpointError, match=r"state_dict with names that begin with 'module\.teacher\.' holds \d+ of"
    ):
        load_detector_weights(build("gfl_tiny.py"), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    value: float, build: Callable[..., Any], detector: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        detector.bbox_head.gfl_cls.weight[0, 0, 0, :2] = value
        detector.bbox_head.gfl_reg.bias[0] = value
    save_detector_weights(detector, tmp_path / "x.pth", meta={})
    before = build("gfl_tiny.py")
    state = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"bbox_head\.gfl_(cls|reg)\.\w+ has \d of \d+ values that are NaN"):
        load_detector_weights(before, tmp_path / "x.pth")
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.state_dict().items())


def with_itself() -> dict[str, Any]:
    content: dict[str, Any] = {"state_dict": {"a": torch.zeros(2)}}
    content["again"] = [content]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1).expand(1 << 30)}}, "expected one for each value"),
        ({"state_dict": {"a": torch.zeros(2, 2).to_sparse()}}, "expected plain numbers"),
        ({"state_dict": {"a": torch.zeros(2, device="meta")}}, "expected plain numbers"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2, dtype=torch.complex64)}}}}, "expected plain numbers"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1 << 18)}}, tmp_path / "x.pth")
    packed = zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.pth") as plain, packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(CheckpointError, match="it claims 1,04"):
        read_checkpoint(tmp_path / "y.pth")


def test_a_checkpoint_that_holds_itself_is_read(tmp_path: Path) -> None:
    torch.save(with_itself(), tmp_path / "x.pth")
    assert len(read_checkpoint(tmp_path / "x.pth")["again"]) == 1


@pytest.mark.parametrize("meta", [None, 3, "x", [], {"dataset_meta": 3}, {"dataset_meta": {"classes": []}}])
def test_a_meta_without_classes_names_none(meta: Any) -> None:
    assert classes_of_checkpoint("x.pth", {"meta": meta}) is None


def test_classes_are_names() -> None:
    assert classes_of_checkpoint("x.pth", {"meta": {"CLASSES": "balloon"}}) == ("balloon",)
    for names in (5, [5], {"a": 1}, ["a", None]):
        with pytest.raises(CheckpointError, match="expected a list of names"):
            classes_of_checkpoint("x.pth", {"meta": {"CLASSES": names}})
