from __future__ import annotations

import errno
import json
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import numpy as np
import pytest

from deploy.board.archive import ROOT, unpack
from deploy.board.run import MANIFEST, fault_of_files
from deploy.bundle import main
from deploy.contract import ModelContract, sidecar_path, write_sidecar
from deploy.errors import PipelineError
from deploy.runtime.golden import noise_input
from deploy.runtime.session import OrtSession

onnx = pytest.importorskip("onnx")
File = Callable[..., Path]
Sources = Tuple[Path, Path]


@pytest.fixture
def sources(detector_file: File, detector_contract: ModelContract) -> Sources:
    """The float detector, and the quantised one whose sidecar says that it was made of it."""
    plain, quantised = detector_file("student.onnx"), detector_file("student.int8.onnx", np.int8)
    write_sidecar(quantised, {"model": plain}, detector_contract)
    return plain, quantised


def manifest_of(folder: Path) -> Dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def test_a_bundle_holds_what_a_board_needs(sources: Sources, tmp_path: Path, detector_contract: ModelContract) -> None:
    archive = tmp_path / "board.tar.gz"
    assert main([str(sources[1]), str(sources[0]), "-o", str(archive)]) == 0
    folder = unpack(archive, tmp_path / "there")
    assert folder == tmp_path / "there" / "board"
    manifest = manifest_of(folder)
    assert ModelContract.from_json(manifest["contract"], folder) == detector_contract
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *manifest["files"],
        MANIFEST,
    }
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (folder / "run.py").stat().st_mode & 0o111
    for kind, path in (("float", sources[0]), ("int8", sources[1])):
        described = manifest["sources"][kind]
        assert (folder / described["file"]).read_bytes() == path.read_bytes()
        with OrtSession(path) as session:
            outputs = session.infer({"images": noise_input(detector_contract, 1)})
            for name in detector_contract.output_names:
                assert np.array_equal(np.load(folder / f"golden/1.{kind}.{name}.npy"), outputs[name])
    assert manifest["sources"]["float"]["amax"] == {}
    assert set(manifest["sources"]["int8"]["tolerance"]) == {"box", "logit", "matched"}
    assert manifest["sources"]["int8"]["amax"]["images"] == pytest.approx(6.0)
    assert np.array_equal(np.load(folder / "golden/2.input.npy"), noise_input(detector_contract, 2))
    assert str(tmp_path) not in (folder / MANIFEST).read_text()


def test_each_form_of_the_graphs_is_there(sources: Sources, tmp_path: Path) -> None:
    assert main([str(sources[0]), str(sources[1]), "-o", str(tmp_path / "b.tar.gz")]) == 0
    folder = unpack(tmp_path / "b.tar.gz", tmp_path / "there")
    manifest = manifest_of(folder)

    def facts(kind: str, form: str) -> Tuple[bool, bool, int]:
        model = onnx.load(str(folder / manifest["sources"][kind]["graphs"][form]["file"]))
        onnx.checker.check_model(model, full_check=True)
        half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
        quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        return half, quantised, model.opset_import[0].version

    assert facts("float", "fp32") == (False, False, 17)
    assert facts("float", "fp16") == (True, False, 17)
    assert facts("int8", "int8") == (True, True, 19)
    assert facts("int8", "int8_fp32_scales") == (False, True, 17)
    assert facts("int8", "int8_tensorrt8") == (False, True, 17)
    graphs = manifest["sources"]["int8"]["graphs"]
    assert graphs["int8_tensorrt8"]["file"] == graphs["int8_fp32_scales"]["file"]  # without depthwise convolutions
    assert facts("int8", "fp32") == (False, False, 17)  # for a DLA, with `amax`
    graphs = manifest["sources"]["float"]["graphs"]
    assert graphs["fp32"]["float_tensors"]  # for TensorRT 8, whose flag lets everything be FP16
    assert graphs["fp32"]["file"] == "student.onnx"  # not twice in the archive


def test_one_kind_of_graph_is_enough(sources: Sources, detector_file: File, tmp_path: Path) -> None:
    paths = (*sources, detector_file("student.onnxruntime.onnx", np.uint8))
    for path, kind in zip(paths, ("float", "int8", "int8_onnxruntime"), strict=True):
        archive = tmp_path / f"{kind}.tar.gz"
        assert main([str(path), "-o", str(archive)]) == 0
        assert list(manifest_of(unpack(archive, tmp_path))["sources"]) == [kind]


def test_the_same_inputs_give_the_same_bytes(sources: Sources, tmp_path: Path) -> None:
    archives = [tmp_path / "one" / "b.tar.gz", tmp_path / "two" / "b.tar.gz"]
    for archive, order in zip(archives, (sources, sources[::-1]), strict=True):
        assert main([*map(str, order), "-o", str(archive)]) == 0
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert [m.name for m in members] == sorted(m.name for m in members)


def test_models_that_do_not_belong_together_are_refused(
    sources: Sources, detector_file: File, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, quantised = sources
    other = detector_file("other.onnx")
    model = onnx.load(str(other))
    model.producer_name = "somebody else"
    onnx.save(model, str(other))
    write_sidecar(other, {}, OrtSession(plain).contract)
    foreign = detector_file("foreign.onnx", np.uint8)
    twice = detector_file("twice.onnx", np.int8)

    def message(*words: Any, output: str = "b.tar.gz") -> str:
        assert main([*map(str, words), "-o", str(tmp_path / output)]) == 2
        assert not list(tmp_path.glob("*.gz"))
        return capsys.readouterr().err

    assert "are both float graphs; expected one float graph and one quantised" in message(plain, other)
    assert "was not made of" in message(quantised, other)
    assert "foreign.onnx was not made of" in message(plain, quantised, foreign)
    assert "are both graphs quantised for TensorRT; expected one float" in message(quantised, twice)
    assert "no such file" in message(tmp_path / "none.onnx")
    assert "that ends in .onnx: rename the file" in message(tmp_path / "LICENSE")
    assert "expected NAME.tar.gz" in message(plain, output="b.zip")
    assert "expected NAME.tar.gz" in message(plain, output="a b.tar.gz")
    plain.write_bytes(plain.read_bytes()[:-50])
    assert "not the file that its sidecar describes" in message(plain)
    sidecar_path(plain).unlink()
    assert "keep the two together" in message(plain)


def test_a_full_disk_leaves_nothing(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: tarfile.TarFile, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    folder = tmp_path / "full"
    assert main([str(sources[0]), "-o", str(folder / "b.tar.gz")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_nothing_is_unpacked_over_what_is_there(sources: Sources, tmp_path: Path) -> None:
    archive = tmp_path / "b.tar.gz"
    assert main([str(sources[0]), "-o", str(archive)]) == 0
    folder = unpack(archive, tmp_path / "there")
    (folder / "mine").write_text("mine")
    with pytest.raises(PipelineError, match="is there already; remove it"):
        unpack(archive, tmp_path / "there")
    assert (folder / "mine").read_text() == "mine"
    with pytest.raises(PipelineError, match="Give a folder that can be written"):
        unpack(archive, archive)


def test_plain_tar_unpacks_it_too(sources: Sources, tmp_path: Path) -> None:
    archive = tmp_path / "b.tar.gz"
    assert main([str(sources[0]), "-o", str(archive)]) == 0
    with tarfile.open(archive) as tar:
        assert {name.partition("/")[0] for name in tar.getnames()} == {"b"}
    assert fault_of_files(unpack(archive, tmp_path)) == ""
