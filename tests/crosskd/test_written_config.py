"""What is read from data and written as Python text is never code, whoever reads it back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config

from crosskd.config import load_config
from crosskd.run_dir import load_run
from crosskd.train import main as train

HOSTILE = (
    # mmengine takes the value for a pattern and for a template: so it ends the string that it stands in.
    """{{$NOBODY_SET_THIS:x"\\'+__import__("os").mkdir("pwned")#|}}""",
    "{{ fileDirname }}",
    "{{ _base_.model }}",
    "{{'$HOME:x'}}",
    "{{{a}}} ' \" \\ \n\\x7b",
)


@pytest.fixture
def hostile_data(shapes_dir: Path, tmp_path: Path) -> Path:
    """The drawn shapes with class names that text substitution would run, in a folder of such a name."""
    data = tmp_path / "{{ fileBasename }}"
    shutil.copytree(shapes_dir, data)
    for path in (data / "annotations").glob("*.json"):
        document = json.loads(path.read_text())
        for category, name in zip(document["categories"], HOSTILE, strict=False):
            category["name"] = name
        path.write_text(json.dumps(document))
    return data


def test_a_dumped_config_gives_every_string_back_by_any_reader(configs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(configs / "gfl_tiny.py")
    config.names, config.by_name = HOSTILE, dict.fromkeys(("a", "b c"), 1)
    path = tmp_path / "config.py"
    config.dump(path)
    for read in (load_config(path), load_config(path, substitute=False), Config.fromfile(path)):
        assert tuple(read.names) == HOSTILE
        assert read.by_name == config.by_name
    assert os.listdir(tmp_path) == ["config.py"]


def test_training_on_a_hostile_data_set_runs_nothing_of_it(
    configs: Path, hostile_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    assert train([str(configs / "gfl_tiny.py"), "--data", str(hostile_data), "--epochs", "1", "-o", str(run_dir)]) == 0
    config, _detector, sidecar = load_run(run_dir)
    names = tuple(sidecar["details"]["class_names"])
    assert names[:2] == HOSTILE[:2]
    assert tuple(config.train_dataloader.dataset.metainfo.classes) == names
    # mmengine leaves copies of its own; whoever reads one gets the same names and runs nothing.
    written = list(run_dir.rglob("*.py"))
    assert len(written) >= 2
    for path in written:
        assert tuple(Config.fromfile(path).train_dataloader.dataset.metainfo.classes) == names
    assert not list(tmp_path.rglob("pwned"))
