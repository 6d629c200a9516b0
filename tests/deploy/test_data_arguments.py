"""The flags that name a set, which are the same in every command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from deploy.data_arguments import SetOptions, add_set_arguments, set_options
from deploy.errors import ConfigError


def _options(*words: str) -> SetOptions:
    parser = argparse.ArgumentParser()
    add_set_arguments(parser, "test")
    return set_options(parser.parse_args(list(words)), "test")


def test_a_folder_or_a_file_names_the_set(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    for split in ("val", "test"):
        (tmp_path / f"annotations/instances_{split}.json").touch()
    assert _options("--data", str(tmp_path)).paths()[0].name == "instances_test.json"
    assert _options("--data", str(tmp_path), "--split", "val").paths()[0].name == "instances_val.json"
    assert _options("--annotations", "a.json", "--images-dir", "b").paths() == (Path("a.json"), Path("b"))
    assert _options("--data", "d", "--strict").strict


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), "none is given"),
        (("--annotations", "a.json"), "--annotations without --images-dir"),
        (("--data", "d", "--annotations", "a.json"), "--annotations is a.json"),
        (("--data", "d", "--images-dir", "i"), "--images-dir is i"),
        (("--annotations", "a.json", "--images-dir", "i", "--split", "val"), "--split is val"),
    ],
)
def test_flags_that_do_not_go_together_are_named(words: tuple[str, ...], found: str) -> None:
    with pytest.raises(ConfigError, match=f"give either --data .*{found}"):
        _options(*words).paths()
