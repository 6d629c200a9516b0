"""How a command reaches a board's shell. What needs a server is in test_fleet.py."""

from __future__ import annotations

import subprocess

from benchmarks.boards import ssh


def test_words_reach_the_board_as_they_are(tmp_path):
    """A shell takes the command apart again into the same words."""
    (tmp_path / "a 'b").mkdir()
    words = ["bench", "--engine", "x; touch y", "$(id)", "-o", 'q"']
    show = '#!/bin/sh\npwd\necho "$V"\nprintf \'%s\\n\' "$@"\n'
    (tmp_path / "py thon").write_text(show)
    (tmp_path / "py thon").chmod(0o755)
    line = ssh.command_line(str(tmp_path / "a 'b"), str(tmp_path / "py thon"), words, {"V": "`id` 'x'"}, 2.5)
    shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [str(tmp_path / "a 'b"), "`id` 'x'", "-u", "run.py", *words]
