from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional, Tuple

import pytest

from deploy.errors import FAULTS_OF_PATHS, FAULTS_OF_STORAGE, DataError, command, one_line


@command
def _main(argv=None):
    raise DataError("image 'a\x1b]0;title\x07\x9b31m\r\u202eb': é, 名\nsecond line")


def test_a_message_is_never_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main() == 2
    assert capsys.readouterr().err == "error: image 'a\\x1b]0;title\\x07\\x9b31m\\r\\u202eb': é, 名\nsecond line\n"


def test_what_is_printed_is_obeyed_only_as_bars_and_colours(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "name \x1b[2J\x1b]0;title\x07\r\x9b31m\u202e\x1b[8mgone"

    @command
    def main(argv: Optional[List[str]] = None) -> None:
        print(hostile)
        print(hostile, file=sys.stderr)
        print("\r[##..] 2/4\x1b[K", end="\n")
        print("\x1b[1m\x1b[32mINFO\x1b[0m\té 名")

    assert main() == 0
    shown = "name \\x1b[2J\\x1b]0;title\\x07\\r\\x9b31m\\u202e\\x1b[8mgone\n"
    assert capsys.readouterr() == (f"{shown}\r[##..] 2/4\x1b[K\n\x1b[1m\x1b[32mINFO\x1b[0m\té 名\n", shown)


def test_what_others_wrote_is_a_part_of_one_line() -> None:
    assert one_line("a\nb\t\x1b[2J\u202ec\r\n") == "a b  [2J c  "
    assert one_line(["x"] * 1000, 10) == "['x', 'x',"


COMMAND = """
import sys
from deploy.errors import FAULTS_OF_PATHS, FAULTS_OF_STORAGE, DataError, command
@command
def main(argv=None):
    for number in range(int(sys.argv[1])):
        print("line é", number, flush=number % 100 == 0)
    open(sys.argv[2], "w").write("the work is done")
    if sys.argv[3:]:
        raise {"bug": ZeroDivisionError, "fault": DataError}[sys.argv[3]]("x")
sys.exit(main())
"""


def _run(*words: str, end: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    line = f'exec "$0" -c "$CODE" "$@" {end}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}" if not end.startswith("|") else f'"$0" -c "$CODE" "$@" {end}',
         sys.executable, *words],
        env={**os.environ, "CODE": COMMAND, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "end", ["| head -n 1; exit ${PIPESTATUS[0]}", ">&-", "2>&1 | head -n 1; exit ${PIPESTATUS[0]}"]
)
def test_the_work_goes_on_when_nobody_reads_the_output(tmp_path: Path, end: str) -> None:
    done = _run("100000", str(tmp_path / "work"), end=end)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "work").read_text() == "the work is done"


def test_output_that_is_lost_on_a_full_disk_is_said(tmp_path: Path) -> None:
    done = _run("1000", str(tmp_path / "work"), end="> /dev/full")
    assert done.returncode == 2
    assert done.stderr == "error: the work is done, but its output is lost: No space left on device\n"
    assert (tmp_path / "work").read_text() == "the work is done"


def test_an_encoding_that_lacks_a_letter_is_no_fault(tmp_path: Path) -> None:
    done = _run("1", str(tmp_path / "work"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "line \\xe9 0\n", "")


def test_a_fault_of_the_program_is_status_3_and_of_its_input_2(tmp_path: Path) -> None:
    bug = _run("1", str(tmp_path / "work"), "bug")
    assert bug.returncode == 3
    assert "ZeroDivisionError: x" in bug.stderr
    assert _run("1", str(tmp_path / "work"), "fault").returncode == 2


def _message(error: Exception, capsys: pytest.CaptureFixture[str]) -> Tuple[int, str]:
    @command
    def main(argv: Optional[List[str]] = None) -> int:
        raise error

    status = main()
    return status, capsys.readouterr().err


@pytest.mark.parametrize("number", sorted({*FAULTS_OF_STORAGE, *FAULTS_OF_PATHS}))
def test_what_the_system_refuses_of_a_path_is_one_message(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    status, message = _message(OSError(number, os.strerror(number), "my images/a\n.png"), capsys)
    assert status == 2
    assert message.startswith("error: ")
    assert os.strerror(number) in message
    assert ("my images/a" in message) == (number in FAULTS_OF_PATHS)
    assert "Traceback" not in message


def test_of_two_paths_that_which_is_in_the_way_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    with pytest.raises(OSError) as refused:
        os.replace(tmp_path / "made", tmp_path / "there")
    status, message = _message(refused.value, capsys)
    assert status == 2
    assert message.startswith(f"error: {tmp_path / 'there'}: ")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "of no file"),
        OSError(errno.EINVAL, "of no kind that a user can mend", "file"),
        FileNotFoundError(errno.ENOENT, "one of Python's own", os.path.join(os.path.dirname(os.__file__), "gone.py")),
        OSError("of no number"),
    ],
)
def test_another_fault_of_the_system_keeps_its_traceback(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    status, message = _message(error, capsys)
    assert status == 3
    assert "Traceback" in message


def test_a_missing_file_that_the_program_stumbles_over_is_a_fault_of_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = KeyError("key")
    error.__context__ = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "gone")
    assert _message(error, capsys)[0] == 3


def test_a_message_carries_no_more_than_a_line_of_a_files_text(capsys: pytest.CaptureFixture[str]) -> None:
    _, message = _message(DataError("a name is " + "x" * 10**6 + "\nsecond line" * 1000), capsys)
    assert len(message) < 5000
    assert message.startswith("error: a name is xxx")
    assert message.count("\n") < 30


def test_a_machine_without_a_temporary_folder_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])

    @command
    def main(argv: Optional[List[str]] = None) -> int:
        tempfile.mkdtemp()
        return 0

    assert main() == 2
    assert "set TMPDIR" in capsys.readouterr().err
    assert _message(FileNotFoundError(errno.ENOENT, "of no path"), capsys)[0] == 2
    monkeypatch.undo()
    assert _message(FileNotFoundError(errno.ENOENT, "of no path"), capsys)[0] == 3
