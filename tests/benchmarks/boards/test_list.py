"""The list of boards: what is in it, and what is said of one that will not do."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.boards.list import Board, boards_from_file, build_options
from deploy.errors import ConfigError
from deploy.tensorrt.options import BuildOptions

EXAMPLE = Path(__file__).parents[3] / "docs" / "boards.example.toml"
GOOD = "[[board]]\nname = 'a'\nhost = 'h'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no [[board]]; expected one [[board]] for each board"),
        ("board = []", "has no [[board]]"),
        ("[board]\nname = 'a'", "has no [[board]]"),
        ("x = 1\n" + GOOD, "has x; expected one [[board]] for each board, and nothing else"),
        ("[[board", "is not TOML"),
        ("[[board]]\nname = 'a'", "[[board]] 'a': host is missing"),
        ("[[board]]\nhost = 'a'", "[[board]] 1: name is missing"),
        (GOOD + "password = 'x'", "has a password; expected none, since files are copied"),
        (GOOD + "passphrase = 'x'", "has a passphrase; expected none"),
        (GOOD + "hots = 'x'", "unknown key 'hots'; expected some of name, host, port"),
        (GOOD + "port = 0", "port is 0; expected a whole number at least 1 and at most 65535"),
        (GOOD + "port = true", "port is True"),
        (GOOD + "timeout_s = nan", "timeout_s is nan; expected a number at least 0.001"),
        (GOOD + "folder = '~you/x'", "folder is '~you/x'; expected a path on the board that starts with / or ~/"),
        (GOOD + "folder = '/a\\u001b[2J'".replace("'", '"'), "folder is '/a\\x1b[2J'; expected a path on the board"),
        (GOOD + "python = ''", "python is ''; expected a line of text"),
        (GOOD + "precisions = ['int4']", "precisions[0] is 'int4'; expected one of int8, fp16, fp32"),
        (GOOD + "precisions = [['int8']]", "precisions[0] is ['int8']; expected one of int8, fp16, fp32"),
        (GOOD + "precisions = ['int8', 'int8']", "precisions is ['int8', 'int8']; expected each once"),
        (GOOD + "precisions = 'int8'", "precisions is 'int8'; expected a list of 1 to 3, each one of int8"),
        (GOOD + "runtime = 'torch'", "runtime is 'torch'; expected one of tensorrt, onnxruntime"),
        (GOOD + "runtime = 'onnxruntime'\nprecisions = ['fp16']", "precisions has fp16; expected some of int8, fp32"),
        (GOOD + "build = '--verbose'", "build is '--verbose'; expected a list"),
        (GOOD + "build = [1]", "build[0] is 1"),
        (GOOD + "build = {int4 = []}", "build has 'int4'; expected some of int8, fp16, fp32"),
        (GOOD + "runtime = 'onnxruntime'\nbuild = ['--verbose']", "but nothing is built for the runtime onnxruntime"),
        (GOOD + "environment = {PATH = 1}", "environment.PATH is 1; expected a line of text or an empty string"),
        (GOOD + "environment = {'A;B' = 'x'}", "environment has 'A;B'; expected the name of a variable"),
        (GOOD + "key = 'nope'", "nope' is no file"),
        (GOOD + "key = '~nobody-here/x'", "key is '~nobody-here/x', and"),
        ("[[board]]\nname = '../a'\nhost = 'h'", "name is '../a'; expected letters"),
        ("[[board]]\nname = 'a'\nhost = '-oProxyCommand=id'", "expected a host name, an address or an alias"),
        (GOOD + GOOD.replace("'a'", "'A'").replace("'h'", "'g'"), "a and A have the same name"),
        (GOOD + GOOD.replace("'a'", "'b'").replace("'h'", "'H'"), "a and b have the same host and port"),
    ],
)
def test_a_list_of_boards_that_will_not_do(text, message, tmp_path):
    path = tmp_path / "boards.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message.format(folder=tmp_path))) as error:
        boards_from_file(path)
    assert "\n" not in str(error.value)


def board_of(tmp_path, text):
    path = tmp_path / "boards.toml"
    path.write_text(GOOD + text)
    (board,) = boards_from_file(path)
    return board


def test_options_of_a_build(tmp_path):
    board = board_of(tmp_path, "build = ['--workspace-mib', '1024', '--shapes', '1', '2', '4', '--dla-core', '0']")
    options = build_options(board, "int8")
    assert (options.precision, options.workspace_mib, options.shapes, options.dla_core) == ("int8", 1024, (1, 2, 4), 0)
    board = board_of(tmp_path, "build = {int8 = ['--scales', 'fp32']}")
    assert build_options(board, "int8").scales == "fp32"
    assert build_options(board, "fp16") == BuildOptions("fp16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "['--scales', 'fp32']",
            "build, for fp16: --scales is given with fp16; it serves --int8 alone: leave it out. F",
        ),
        ("['--workspace', '9']", "build, for fp16: unrecognized arguments: --workspace 9"),
        ("['-o', 'x.engine']", "build, for fp16: unrecognized arguments: -o x.engine"),
        ("['--help']", "build, for fp16: unrecognized arguments: --help"),
        ("['--workspace-mib', 'all']", "build, for fp16: argument --workspace-mib: invalid int value: 'all'"),
        ("['--gpu-fallback']", "build, for fp16: --gpu-fallback is given without --dla-core"),
        ("['--int8']", "build has --int8; expected that in precisions"),
    ],
)
def test_options_of_a_build_that_will_not_do(words, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_options(board_of(tmp_path, f"build = {words}"), "fp16")


def test_the_example_is_good(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / ".ssh" / "id_ed25519").write_text("")
    (tmp_path / "known_hosts").write_text("")
    shutil.copy(EXAMPLE, tmp_path)
    first, second = boards_from_file(tmp_path / EXAMPLE.name)
    assert (first.name, first.user, first.precisions) == ("orin-nano-1", None, ())
    assert second.precisions == ("int8", "fp16")
    assert second.key == home / ".ssh" / "id_ed25519"
    assert {field.name for field in dataclasses.fields(Board)} == set(
        re.findall(r"^(\w+) =", EXAMPLE.read_text(), re.M)
    )
