"""One of our commands as a process of its own: its line, its status, its message."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.commands import (
    command_line,
    last_message,
    run_captured,
    run_command,
    run_relayed,
    run_status,
    shell_line,
)
from deploy.errors import CalibrationError, PipelineError

SAYS = """
import os, signal, sys
print("result")
print("warning: w", file=sys.stderr)
if sys.argv[1] == "killed":
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
1 / int(sys.argv[1] != "crash")
if sys.argv[1] == "2":
    print("error: the file is bad", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
WORDS = [
    "plain", "", "two words", "it's", "a;b", "$HOME", "`id`", "*", "ä", "{'type': 'GN'}", "--set=x", "back\\slash",
    "line\nbreak", "tab\tand 'quote' and \\n", "\x1b[31mred", "\x07", "bell\x07123", "\u2028", "\x85", "ä\n", "\udcff",
]  # fmt: skip


@pytest.fixture(autouse=True)
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_printed_line_is_one_and_a_shell_makes_the_same_words_of_it() -> None:
    line = shell_line(WORDS)
    assert line.isprintable()
    words = [sys.executable, "-c", "import sys; sys.stdout.buffer.write(ascii(sys.argv[1:]).encode())"]
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run(
        [bash, "-c", f"{shell_line(words)} {line}"], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout == ascii(WORDS)


def test_an_ordinary_line_is_as_shlex_writes_it() -> None:
    assert command_line("deploy.export", Path("my run"), "-o", "x.onnx") == "python -m deploy.export 'my run' -o x.onnx"


@pytest.mark.parametrize(("word", "status"), [("0", 0), ("1", 1), ("2", 2), ("killed", 137)])
def test_the_status_is_passed_on(word: str, status: int) -> None:
    assert run_status("says", word) == status


def test_a_command_is_printed_and_its_failure_raised(capfd: pytest.CaptureFixture[str]) -> None:
    run_command("says", "0")
    assert capfd.readouterr().out == "python -m says 0\nresult\n"
    with pytest.raises(CalibrationError, match=r"^says ended with status 2; its message is above$"):
        run_command("says", "2", error_type=CalibrationError, tell=sys.stderr)
    printed = capfd.readouterr()
    assert printed.out == "result\n"
    assert printed.err.splitlines() == ["python -m says 2", "warning: w", "error: the file is bad"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("2", "^the file is bad$"),
        ("crash", "^says ended with status 1: its output is above$"),
        ("killed", "^says ended with status -9: its output is above$"),
    ],
)
def test_a_relayed_command_raises_its_own_message(word: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    run_relayed("says", "0")
    with pytest.raises(PipelineError, match=message):
        run_relayed("says", word)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "error:" not in printed.err
    assert printed.err.count("result") == printed.err.count("warning: w") == 2


def test_what_a_command_prints_is_returned() -> None:
    assert run_captured("says", "0") == "result\n"
    assert run_captured("says", "1", verdict=True) == "result\n"
    for word, verdict, message in (
        ("1", False, r"^says ended with status 1: warning: w$"),
        ("2", True, r"^says ended with status 2: the file is bad$"),
        ("crash", False, r"^says ended with status 1: ZeroDivisionError"),
    ):
        with pytest.raises(CalibrationError, match=message):
            run_captured("says", word, verdict=verdict, error_type=CalibrationError)


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("error: one\nmore\n", 2, "one"),
        ("usage: x\nx: error: no such flag\n", 2, "x: error: no such flag"),
        ("error: of another\nKeyError: 'x'\n\n", 1, "KeyError: 'x'"),
        ("KeyError: 'x'\nerror: this is a fault of the program\n", 3, "KeyError: 'x'"),
        ("error: killed\n", -9, "error: killed"),
        ("\n", 1, ""),
    ],
)
def test_the_last_message_of_a_command(text: str, status: int, expected: str) -> None:
    assert last_message(text, status) == expected
