from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from deploy.contract import load_contract, write_sidecar
from deploy.errors import ConfigError
from deploy.files import sha256_of
from deploy.graphs.known_ranges import known_ranges, words_of_ranges
from deploy.graphs.onnx_file import read_onnx_file
from deploy.graphs.precision import typed_graph

pytest.importorskip("onnx")
File = Callable[..., Path]


def write_int8(detector_file: File, name: str, made_of: Path, ranges: Any) -> Path:
    path = detector_file(name, np.int8)
    write_sidecar(path, {"model": made_of}, load_contract(path), {"ranges": ranges})
    return path


def write_statistics(path: Path, made_of: Path, **extremes: Any) -> Path:
    header = {"schema_version": 1, "model_sha256": sha256_of(made_of), "tensors": sorted(extremes)}
    ends = np.array([extremes[name] for name in sorted(extremes)])
    np.savez(path, header=np.array(json.dumps(header)), minimum=ends[:, 0], maximum=ends[:, 1])
    return path


def test_files_of_this_very_model_are_asked_whatever_their_names(
    detector_file: File, capsys: pytest.CaptureFixture[str]
) -> None:
    source = detector_file("mini.onnx")
    first = write_int8(detector_file, "a.onnx", source, {"x": [-2.0, 1.0], "y": [0.0, 3.0]})
    second = write_statistics(source.with_name("b.npz"), source, x=(-1.0, 5.0), z=(0.0, 7.0))
    write_int8(detector_file, "of_another.onnx", first, {"w": [0.0, 1.0]})
    write_statistics(source.with_name("of_another.npz"), first, w=(0.0, 1.0))
    np.savez(source.with_name("images.npz"), images=np.zeros(3))
    source.with_name("damaged.npz").write_bytes(b"PK no archive")
    source.with_name("no.onnx").write_bytes(b"")
    source.with_name("no.onnx.json").write_text("[1, 2]")
    beside = known_ranges(read_onnx_file(source))
    assert beside.ranges == {"x": (-2.0, 5.0), "y": (0.0, 3.0), "z": (0.0, 7.0)}
    assert beside.files == (first, second)
    assert capsys.readouterr().err == ""


def test_an_int8_file_asks_for_the_float_file_that_it_was_made_of(detector_file: File) -> None:
    source = detector_file("mini.onnx")
    int8 = write_int8(detector_file, "a.onnx", source, {"x": [-2.0, 1.0]})
    statistics = write_statistics(source.with_name("b.npz"), source, z=(0.0, 7.0))
    assert known_ranges(read_onnx_file(int8)) == ({"z": (0.0, 7.0)}, (statistics,))
    elsewhere = detector_file("c.onnx", np.int8)  # whose sidecar names no model
    assert known_ranges(read_onnx_file(elsewhere)) == ({}, ())


@pytest.mark.parametrize("fault", ["ranges", "changed", "no json"])
def test_what_cannot_be_read_is_told_and_left_out(
    fault: str, detector_file: File, capsys: pytest.CaptureFixture[str]
) -> None:
    source = detector_file("mini.onnx")
    int8 = write_int8(detector_file, "a.onnx", source, [1] if fault == "ranges" else {"x": [-2.0, 1.0]})
    if fault == "changed":
        int8.write_bytes(int8.read_bytes() + b"x")
    if fault == "no json":
        int8.with_name("a.onnx.json").write_text("{")
    assert known_ranges(read_onnx_file(source)) == ({}, ())
    told = capsys.readouterr().err
    assert told.startswith(f"note: {int8} is not asked for ranges: ")
    assert told.count("\n") == 1


def test_files_elsewhere_are_named(detector_file: File, tmp_path: Path) -> None:
    source = detector_file("mini.onnx")
    (tmp_path / "elsewhere").mkdir()
    statistics = write_statistics(tmp_path / "elsewhere" / "b.npz", source, x=(-1.0, 5.0))
    assert known_ranges(read_onnx_file(source), [statistics]) == ({"x": (-1.0, 5.0)}, (statistics,))
    for other in (write_statistics(statistics.with_name("c.npz"), statistics, x=(0.0, 1.0)), tmp_path / "missing.npz"):
        with pytest.raises(ConfigError, match=f"--ranges-from {other} tells no ranges of the float graph of .*mini"):
            known_ranges(read_onnx_file(source), [other])


def test_it_is_said_how_many_ranges_are_known(detector_file: File) -> None:
    source = read_onnx_file(detector_file("mini.onnx"))
    unknown = typed_graph(source.model, "fp16", {})
    names = unknown.unseen
    assert len(names) == unknown.growing > 3
    assert words_of_ranges(unknown, []).startswith(f"FP16: no range is known of the {len(names)} tensors")
    some = typed_graph(source.model, "fp16", {"ranges": {names[0]: [0, 1]}}, {names[1]: [0, 1]})
    assert some.unseen == names[2:]
    assert f"{len(names) - 2} run in FP16 unchecked ({names[2]}, " in words_of_ranges(some, ["s.npz"])
    every = typed_graph(source.model, "fp16", {}, dict.fromkeys(names, (0.0, 1.0)))
    assert words_of_ranges(every, ["s.npz"]) == (
        f"FP16: the ranges of all {len(names)} tensors that may leave it are known, from s.npz"
    )
    beyond = typed_graph(source.model, "fp16", {}, dict.fromkeys(names, (0.0, 100000.0)))
    assert (beyond.growing, beyond.unseen) == (len(names), ())
