from __future__ import annotations

import ast
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy as np
import pytest

from deploy.board.archive import MODULES, ROOT, pack, unpack
from deploy.board.run import MANIFEST, fault_of_files
from deploy.errors import ContractError, PipelineError


def test_the_modules_are_closed_under_import() -> None:
    """What a shipped module imports of ours is shipped, but for what needs onnx and never runs on a board."""
    needs_onnx = {
        f"deploy/graphs/{name}.py" for name in ("dla_ranges", "graph", "integer_kernels", "operators", "precision")
    }
    for module in MODULES:
        nodes = list(ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))))
        blocks = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        never_run = [node for block in blocks for node in ast.walk(block)]
        for node in (node for node in nodes if node not in never_run):
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


def test_a_manifest_that_lists_what_is_no_file_of_the_bundle(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", "../x", "pipe", "a//b"):
        (tmp_path / MANIFEST).write_text(json.dumps({"files": {name: {"sha256": "0" * 64}}}))
        assert "is no file of a bundle" in fault_of_files(tmp_path)
