from __future__ import annotations

import errno
import gzip
import hashlib
import os
from pathlib import Path

import pytest

from deploy.errors import ConfigError, DataError, PipelineError
from deploy.files import check_writable, new_folder, read_json, replacing, sha256_of, user_cache, write_json


def test_replacing_puts_the_whole_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.onnx"
    with replacing(path) as temporary:
        assert temporary.suffix == ".onnx"
        assert temporary.parent == path.parent
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["a.onnx"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_replacing_leaves_the_old_file_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_check_writable_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    check_writable(path)
    assert os.listdir(tmp_path) == []
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("path", ["file/below/a.txt", "folder"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(PipelineError, match=f"cannot write .*{path}"):
        check_writable(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_sha256_of_reads_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_json_survives_the_round_trip(tmp_path: Path) -> None:
    document = {"größe_px": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json", DataError, "anything") == document


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_what_is_not_json(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": value})
    assert os.listdir(tmp_path) == []


def test_read_json_raises_the_error_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ConfigError, match=r"a\.json.*No such file.*a list of teachers"):
        read_json(path, ConfigError, "a list of teachers")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        read_json(path, DataError, "anything")
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path, DataError, "anything")


def test_a_path_that_is_no_text_survives_the_round_trip(tmp_path: Path) -> None:
    document = {"file": os.fsdecode(b"caf\xe9 \xf0\x9f\x90\x8d")}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json", DataError, "anything") == document


def test_without_a_home_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_cache("x") == Path("/somewhere/.cache/crosskd")

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(PipelineError, match=r"HOME is not set\. Set it, or build elsewhere"):
        user_cache("build elsewhere")


def test_a_full_disk_is_a_pipeline_error_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(PipelineError, match=r"No space left on device\. Is the disk full"), replacing(tmp_path / "a"):
        fill()
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):  # another's fault keeps its own name
        (tmp_path / "missing").read_bytes()


def test_a_device_a_pipe_and_a_socket_are_never_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (Path(os.devnull), pipe, link):
        with pytest.raises(PipelineError, match=f"cannot write {path}: .* is a device, a pipe or a socket, not a file"):
            check_writable(path)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert Path(os.devnull).is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_of_a_link_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(b"{}"), "packed by gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "it is empty"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=["gzip", "git lfs", "empty", "deep"],
)
def test_what_stands_in_the_place_of_a_json_file_is_said(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=reason):
        read_json(path, PipelineError, "numbers")


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    kept = [".gitignore", ".env", ".x.unfinished-notes.md", "y.unfinished-01234567.onnx", "a.onnx"]
    left = [".a.unfinished-01234567.onnx", ".a.onnx.unfinished-abcdefg_.json", ".last\nline.unfinished-zzzzzzzz"]
    for name in [*kept, *left]:
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "b.onnx") as being_written:
        check_writable(tmp_path / "a.onnx")
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, being_written.name])
        being_written.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "b.onnx"])


def test_a_name_as_long_as_it_may_be_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("名" * 83 + ".json")
    write_json(path, {})
    assert read_json(path, DataError, "anything") == {}


def test_a_full_disk_is_found_below_what_a_library_makes_of_it(tmp_path: Path) -> None:
    def write() -> None:
        try:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        finally:
            raise RuntimeError("unexpected pos 576 vs 534")  # as torch.save does

    with pytest.raises(PipelineError, match=r"cannot write .*a\.pth: File too large"), replacing(tmp_path / "a.pth"):
        write()


def test_a_new_folder_may_be_there_if_it_is_empty(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for _ in range(2):
        with new_folder(folder) as temporary:
            (temporary / "a").write_text("whole")
        assert [path.name for path in tmp_path.rglob("*")] == ["new", "a"]
        (folder / "a").unlink()
    (folder / "b").write_text("somebody's")
    for taken in (folder, folder / "b"):
        with pytest.raises(PipelineError, match="is there already"), new_folder(taken):
            raise AssertionError("begun")
    (folder / "b").unlink()
    with pytest.raises(ZeroDivisionError), new_folder(folder) as temporary:
        (temporary / "a").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
