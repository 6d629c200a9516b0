from __future__ import annotations

import ast
import errno
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import pytest

from deploy import bundle
from deploy.board.run import MANIFEST
from deploy.bundle import MODULES, ROOT, main, pack, unpack
from deploy.contract import ModelContract, sidecar_path, write_sidecar
from deploy.errors import ContractError, PipelineError
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
    assert facts("int8", "int8_fp32_scales") == (False, True, 17)  # what TensorRT 8 takes
    assert facts("int8", "fp32") == (False, False, 17)  # for a DLA, with `amax`
    graphs = manifest["sources"]["float"]["graphs"]
    assert graphs["fp32"]["float_tensors"]  # for TensorRT 8, whose flag lets everything be FP16
    assert graphs["fp32"]["file"] == "student.onnx"  # not twice in the archive


def test_one_kind_of_graph_is_enough(sources: Sources, tmp_path: Path) -> None:
    for path, kind in zip(sources, ("float", "int8"), strict=True):
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

    def message(*words: Any, output: str = "b.tar.gz") -> str:
        assert main([*map(str, words), "-o", str(tmp_path / output)]) == 2
        assert not list(tmp_path.glob("*.gz"))
        return capsys.readouterr().err

    assert "are both float graphs; expected one float and one quantised" in message(plain, other)
    assert "was not made of" in message(quantised, other)
    assert "quantised for target onnxruntime" in message(foreign)
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


def test_the_modules_are_closed_under_import() -> None:
    """What a shipped module imports of ours is shipped, but for what needs onnx and never runs on a board."""
    needs_onnx = {"deploy/graphs/graph.py", "deploy/graphs/operators.py", "deploy/graphs/precision.py"}
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("deploy.", "benchmarks.")):
                assert f"{str(node.module).replace('.', '/')}.py" in needs_onnx | set(MODULES), (module, node.module)
    assert not needs_onnx & set(MODULES)


# Unpacking ------------------------------------------------------------------------------------------------------------


def archive_of(path: Path, members: List[Tuple[tarfile.TarInfo, Optional[bytes]]]) -> Path:
    with gzip.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:  # type: ignore[arg-type]
        for member, content in members:
            if content is not None:
                member.size = len(content)
            tar.addfile(member, None if content is None else io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


GOOD = (member("b/good"), b"x")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([GOOD, (member("/b/evil"), b"x")], "'/b/evil' is no path of a bundle"),
        ([GOOD, (member("../evil"), b"x")], r"'../evil' is no path"),
        ([GOOD, (member("b/../../evil"), b"x")], "is no path"),
        ([GOOD, (member("b/./x"), b"x")], "is no path"),
        ([GOOD, (member("b//x"), b"x")], "is no path"),
        ([GOOD, (member("evil"), b"x")], "is no path"),
        ([GOOD, (member("b\\..\\evil"), b"x")], "is no path"),
        ([GOOD, (member("C:/evil"), b"x")], "is no path"),
        ([GOOD, (member("b/ev\nil"), b"x")], "is no path"),
        ([GOOD, (member("b/link", tarfile.SYMTYPE, "/etc"), None)], "'b/link' is no plain file"),
        ([GOOD, (member("b/link", tarfile.LNKTYPE, "b/good"), None)], "is no plain file"),
        ([GOOD, (member("b/null", tarfile.CHRTYPE), None)], "is no plain file"),
        ([GOOD, (member("b/pipe", tarfile.FIFOTYPE), None)], "is no plain file"),
        ([GOOD, (member("b/folder", tarfile.DIRTYPE), None)], "is no plain file"),
        ([GOOD, GOOD], "'b/good' comes twice"),
        ([GOOD, (member("b/GOOD"), b"x")], "'b/GOOD' comes twice"),
        ([GOOD, (member("c/x"), b"x")], r"holds the folders \['b', 'c'\]; expected one"),
        ([(member(f"b/{i}"), b"") for i in range(1001)], "over 1000 files or 16 GiB"),
        ([GOOD], "cannot read .*MANIFEST.json"),
        ([GOOD, (member(f"b/{MANIFEST}"), b"[]")], "is not the manifest of a bundle"),
        ([GOOD, (member(f"b/{MANIFEST}"), b'{"files": {}}')], "good is in one of archive and manifest, not in both"),
        ([], "holds the folders .*expected one"),
    ],
)
def test_what_is_no_bundle_is_not_unpacked(members: List[Any], message: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "evil.tar.gz", members)
    with pytest.raises(ContractError, match=message):
        unpack(archive, tmp_path / "deep" / "there")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "evil.tar.gz", "there"]


def test_absurd_sizes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    huge = member("b/huge")
    huge.size = 1 << 40
    header = member("b/x", tarfile.XHDTYPE)
    header.size = 1 << 33
    for info, message in ((huge, "over 1000 files or 16 GiB"), (header, "a header of")):
        path = tmp_path / "evil.tar.gz"
        path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 21)))
        with pytest.raises(ContractError, match=message):
            unpack(path, tmp_path / "there")
        assert list((tmp_path / "there").iterdir()) == []


def test_cut_and_foreign_archives(tmp_path: Path) -> None:
    files = {"a.bin": np.random.default_rng(0).bytes(100_000), MANIFEST: b"{}"}
    archive = tmp_path / "b.tar.gz"
    pack("b", files, archive)
    whole = archive.read_bytes()
    for content in (b"", b"PK\3\4 no gzip", whole[:200], whole[: len(whole) // 2], whole[:-5], gzip.compress(b"text")):
        archive.write_bytes(content)
        with pytest.raises(ContractError, match=r"cannot be read as a \.tar\.gz|expected one, that of a bundle"):
            unpack(archive, tmp_path / "there")
        assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(PipelineError, match="cannot unpack"):
        unpack(tmp_path / "none.tar.gz", tmp_path / "there")


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
    assert bundle.fault_of_files(unpack(archive, tmp_path)) == ""
