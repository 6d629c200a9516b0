"""The campaign of `make test-faults` repeats what it finds, and finds what is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploy.errors import DataError
from tests.faults import fuzz, inputs
from tests.faults.fuzz import ROOT, Fuzzer, judge, read
from tests.faults.inputs import Kind
from tests.faults.mutations import (
    bytes_damaged,
    image_damaged,
    json_damaged,
    npy_damaged,
    onnx_damaged,
    text_damaged,
    zip_damaged,
    zip_of_entries,
)


def samples(tmp_path):
    import onnx

    from tests.stand_ins.detector import mini_detector

    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(3, 4))
    npy = (tmp_path / "a.npy").read_bytes()
    document = json.dumps({"a": [1, 2.5, {"b": None}], "c": "text"}).encode()
    picture = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(40)
    return {
        bytes_damaged: bytes(range(256)),
        json_damaged: document,
        image_damaged: picture,
        onnx_damaged: onnx.ModelProto.SerializeToString(mini_detector()),
        lambda rng, content: text_damaged(rng, content.decode()).encode(
            "utf-8", "surrogatepass"
        ): b"a = 1\n[b]\nc = 'x'\n",
        lambda rng, content: zip_damaged(rng, content, npy_damaged): zip_of_entries({"a.npy": npy}),
    }


def test_a_seed_repeats_its_damage_and_another_makes_other(tmp_path):
    for damage, content in samples(tmp_path).items():
        made = [damage(random.Random(f"0/x/{number}"), content) for number in range(40)]
        again = [damage(random.Random(f"0/x/{number}"), content) for number in range(40)]
        assert made == again
        assert len(set(made)) > 25
        assert made.count(content) < 15


@pytest.mark.parametrize(
    ("status", "output", "errors", "fault"),
    [
        (0, "done", "note: x", ""),
        (2, "", "error: x is y; expected z\n", ""),
        (3, "", "Traceback (most recent call last):\n  ...\nKeyError: 'a'\nerror: this is a fault", "traceback"),
        (2, "", "error: cannot read x (MemoryError)\n", "memory"),
        (2, "", "error: a\nerror: b\n", "message"),
        (2, "", "", "message"),
        (0, "", "error: but all is well", "message"),
        (0, "name \x1b[2J", "", "message"),
        (2, "", f"error: {'x' * 5000}\n", "message"),
        (0, "", "x.py:3: RuntimeWarning: overflow\n", "message"),
        (1, "", "error: x\n", "status"),
    ],
)
def test_what_is_wrong_with_an_end_is_seen(status, output, errors, fault):
    assert judge("reader", status, output, errors, 0.1, verdict=False).fault == fault


def test_readers_are_called_as_commands_are():
    def refuses():
        raise DataError("x is y")

    assert read("sound", lambda: None, verdict=False)[:3] == ("sound", 0, "")
    assert read("refuses", refuses, verdict=False)[:3] == ("refuses", 2, "")
    assert read("fails", lambda: {}["a"], verdict=False)[1:3] == (3, "traceback")
    assert read("ends", lambda: sys.exit(2), verdict=False)[1:3] == (2, "message")
    assert read("hangs", lambda: time.sleep(9), verdict=False, limit_s=0.5).fault == "hang"


def test_inputs_are_damaged_read_and_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = b'{"a": 1, "b": [1, 2, 3]}'
    Path("x.json").write_bytes(sound)
    monkeypatch.setattr(inputs, "SOUND", {"x.json": sound})

    def careless():
        assert json.loads(Path("x.json").read_bytes())["a"] is not None

    def writes():
        Path("elsewhere").write_text("")

    found = list(Fuzzer(Kind("x", ("x.json",), json_damaged, (careless,)), 0).readings(0))
    faults = [
        one.fault
        for number in range(60)
        for one in Fuzzer(Kind("x", ("x.json",), json_damaged, (careless,)), 0).readings(number)
    ]
    assert found[0].reader == "careless"
    assert faults.count("traceback") > 10
    assert Path("x.json").read_bytes() == sound
    *_, last = Fuzzer(Kind("x", ("x.json",), json_damaged, (writes,)), 0).readings(0)
    assert last.fault == "writes"
    assert os.listdir() == ["x.json"]


def test_the_hook_counts_events_of_writing_and_kills_at_one(tmp_path):
    script = "import os\nfor name in 'abc':\n    open(f'f/{name}', 'w').close()\nos.rename('f/a', 'f/d')\nprint('done')"
    (tmp_path / "f").mkdir()

    def run(kill_at):
        (tmp_path / "events").write_text("")
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT / "tests/faults/hook"), "FAULTS_FOLDER": f"{tmp_path / 'f'}/",
            "FAULTS_COUNTER": str(tmp_path / "events"), "FAULTS_KILL_AT": str(kill_at), "FAULTS_KILL": "one",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        return done.returncode, (tmp_path / "events").stat().st_size, sorted(os.listdir(tmp_path / "f"))

    assert run(0) == (0, 4, ["b", "c", "d"])
    for path in (tmp_path / "f").iterdir():
        path.unlink()
    assert run(3) == (-9, 3, ["a", "b"])


def test_the_limits_are_those_that_the_figures_name():
    assert (fuzz.LIMIT_S, fuzz.LIMIT_MIB) == (10.0, 4096)
