from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest

from deploy.board.archive import unpack
from deploy.board.run import MANIFEST
from deploy.board.signature import SIGNATURE, UNSIGNED, sign, signer, verify
from deploy.bundle import main as make_bundle
from deploy.errors import ConfigError, ContractError, MissingDependencyError
from tests.stand_ins.detector import write_detector

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen of OpenSSH")
Key = Callable[..., Tuple[Path, str]]


@pytest.fixture
def key(tmp_path: Path) -> Key:
    """Makes a key; its file and its public half as allowed signers have it."""

    def make(name: str, passphrase: str = "") -> Tuple[Path, str]:
        path = tmp_path / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)
        return path, " ".join(path.with_suffix(".pub").read_text().split()[:2])

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a signature looks at: a manifest."""
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / MANIFEST).write_text('{"files": {}}')
    return tmp_path / "mini"


def allowed(folder: Path, *lines: str) -> Path:
    path = folder.with_name("allowed_signers")
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def signed(folder: Path, key: Path) -> None:
    (folder / SIGNATURE).write_bytes(sign((folder / MANIFEST).read_bytes(), key))


def test_the_signer_is_named(folder: Path, key: Key) -> None:
    private, public = key("mine")
    signed(folder, private)
    assert re.fullmatch(r"signed with ED25519 key SHA256:\S+, which was .* no allowed signers", signer(folder, None))
    found = signer(folder, allowed(folder, f"other@x {key('other')[1]}", f"*@release,me {public}"))
    assert re.fullmatch(r"signed by \*@release with ED25519 key SHA256:\S+", found)


def test_what_was_changed_after_signing_is_refused(folder: Path, key: Key) -> None:
    private, public = key("mine")
    signed(folder, private)
    (folder / MANIFEST).write_text('{"files": {"run.py": {}}}')
    for signers in (None, allowed(folder, f"me {public}")):
        with pytest.raises(ContractError, match=r"^mini was changed after it was signed: .* is not of its MANIFEST"):
            signer(folder, signers)
    (folder / SIGNATURE).write_bytes(b"\0")
    with pytest.raises(ContractError, match="was changed after it was signed"):
        signer(folder, None)


def test_a_signature_of_something_else_by_the_same_key_is_refused(folder: Path, key: Key) -> None:
    private, _ = key("mine")
    words = ["ssh-keygen", "-q", "-Y", "sign", "-f", private, "-n", "git"]
    done = subprocess.run(words, input=(folder / MANIFEST).read_bytes(), capture_output=True, check=True)
    (folder / SIGNATURE).write_bytes(done.stdout)
    with pytest.raises(ContractError, match="was changed after it was signed"):
        signer(folder, None)


def test_only_the_allowed_will_do(folder: Path, key: Key) -> None:
    private, public = key("mine")
    with pytest.raises(ContractError, match="mini is unsigned: nothing tells who made it; expected a signature"):
        signer(folder, allowed(folder, f"me {public}"))
    assert signer(folder, None) == UNSIGNED
    signed(folder, private)
    for lines, reason in (
        ([f"other@x {key('other')[1]}"], "which is none that .*allowed_signers allows now. Ask who made it"),
        ([], "which is none that"),
        ([f'me namespaces="git" {public}'], "which is not allowed it: "),
        ([f'me valid-before="20200101" {public}'], "which is n"),
    ):
        with pytest.raises(ContractError, match=rf"mini was signed with ED25519 key SHA256.*{reason}"):
            signer(folder, allowed(folder, *lines))
    with pytest.raises(ConfigError, match=r"no such file: .*nobody; expected allowed signers"):
        signer(folder, folder / "nobody")


def test_keys_that_cannot_sign(folder: Path, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such file: nobody; expected a private SSH key"):
        sign(b"", Path("nobody"))
    (tmp_path / "text").write_text("a text")
    with pytest.raises(ConfigError, match=r"ssh-keygen cannot sign with .*text: "):
        sign(b"", tmp_path / "text")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="a signature needs the package openssh-client"):
        sign(b"", key_file(tmp_path))
    old = tmp_path / "ssh-keygen"
    old.write_text("#!/bin/sh\necho 'unknown option -- Y' >&2; exit 1\n")
    old.chmod(0o755)
    with pytest.raises(MissingDependencyError, match=r"openssh-client 8\.2 or newer"):
        sign(b"", key_file(tmp_path))


def key_file(folder: Path) -> Path:
    (folder / "key").touch()
    return folder / "key"


def on_a_board(folder: Path, *words: Any) -> Tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "run.py", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_bundle_is_signed_and_verified(key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    private, public = key("mine")
    words: List[object] = [write_detector(tmp_path / "student.onnx"), "-o", tmp_path / "mini.tar.gz"]
    assert make_bundle([*map(str, words), "--sign", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert make_bundle(list(map(str, words))) == 0
    assert "unsigned: nothing tells who made it; --sign KEY signs it" in capsys.readouterr().out
    assert make_bundle([*map(str, words), "--sign", str(private)]) == 0
    assert f"signed with {private}\n" in capsys.readouterr().out
    folder = unpack(tmp_path / "mini.tar.gz", tmp_path / "board")
    signers = allowed(folder, f"me {public}")
    status, text = on_a_board(folder, "verify", "--allowed-signers", signers)
    assert (status, text.startswith("mini: signed by me with ED25519 key SHA256:")) == (0, True), text
    assert not list(folder.rglob("*.pyc"))
    assert verify(folder, ["--allowed-signers", str(signers)]) == 0

    (folder / "deploy" / "errors.cpython-311.pyc").write_bytes(b"")
    status, text = on_a_board(folder, "verify", "--allowed-signers", signers)
    assert (status, len(text.splitlines())) == (2, 1)
    assert "errors.cpython-311.pyc is not of this bundle, and Python would run it" in text
    (folder / "deploy" / "errors.cpython-311.pyc").unlink()

    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["LICENSE"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    status, text = on_a_board(folder, "verify", "--allowed-signers", signers)
    assert (status, len(text.splitlines())) == (2, 1)
    assert text.startswith("error: mini was changed after it was signed")
