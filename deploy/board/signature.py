"""
Who made a bundle: its manifest, which holds the hash of every other file, is signed with an SSH key.

OpenSSH's own `ssh-keygen` signs and verifies, from its version 8.2 on (ssh-keygen(1), "-Y sign", "-Y verify"; the
format is described in its PROTOCOL.sshsig). An agent, a hardware key or a passphrase serves as it does for ssh.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import subprocess
from pathlib import Path
from typing import Iterator, List, Optional, Set

from deploy.board.run import MANIFEST
from deploy.errors import ConfigError, ContractError, MissingDependencyError

SIGNATURE = f"{MANIFEST}.sig"
NAMESPACE = "crosskd-bundle"
"""What the signature is for: one that the same key made of anything else is not taken."""
UNSIGNED = "unsigned: nothing tells who made it"


def check_key(key: Path) -> None:
    """Raises ConfigError if there is no such file: asked before the work, as `sign` itself may ask for a passphrase."""
    if not key.is_file():
        raise ConfigError(f"no such file: {key}; expected a private SSH key, such as ~/.ssh/id_ed25519")


def sign(content: bytes, key: Path) -> bytes:
    """
    The signature of `content`.

    Args:
        key: the file of a private key, or of the public one whose private key the agent holds.

    Raises:
        ConfigError: the key cannot be read, or its passphrase is wrong.
        MissingDependencyError: there is no ssh-keygen, or an old one.
    """
    check_key(key)
    done = _ssh_keygen("sign", ["-f", str(key)], content)
    if done.returncode:
        raise ConfigError(
            f"ssh-keygen cannot sign with {key}: {_last_line(done)}. Give a private SSH key, or a public one whose "
            "private key is in the agent (ssh-add)"
        )
    return done.stdout


def signer(folder: Path, allowed_signers: Optional[Path]) -> str:
    """
    Who signed the bundle in `folder`, in words for a user; UNSIGNED if nobody did.

    The files of the bundle have been compared with its manifest before.

    Args:
        allowed_signers: the file of those whose bundles are taken, as in ssh-keygen(1), "ALLOWED SIGNERS"; None: the
            signature must be of this manifest, by whomever.

    Raises:
        ConfigError: `allowed_signers` is no file.
        ContractError: the manifest was changed after it was signed, none of the allowed signers signed it, or nobody.
        MissingDependencyError: there is no ssh-keygen, or an old one.
    """
    signature = folder / SIGNATURE
    if allowed_signers is not None and not allowed_signers.is_file():
        raise ConfigError(
            f"no such file: {allowed_signers}; expected allowed signers, a line each: a name, and a public SSH key"
        )
    if not signature.is_file():
        if allowed_signers is None:
            return UNSIGNED
        raise ContractError(
            f"{folder.name} is {UNSIGNED}; expected a signature of one of {allowed_signers}. Make it again with "
            "deploy.bundle --sign"
        )
    manifest = (folder / MANIFEST).read_bytes()
    done = _ssh_keygen("check-novalidate", ["-s", str(signature)], manifest)
    if done.returncode:
        raise ContractError(
            f"{folder.name} was changed after it was signed: {SIGNATURE} is not of its {MANIFEST}. Do not use it; "
            "fetch it again from who made it"
        )
    key = done.stdout.decode(errors="replace").partition(" with ")[2].strip()  # "ED25519 key SHA256:..."
    if allowed_signers is None:
        return f"signed with {key}, which was compared with no allowed signers"
    files = ["-s", str(signature), "-f", str(allowed_signers)]
    names = _ssh_keygen("find-principals", files, b"").stdout.decode(errors="replace").split()
    for name in names:
        done = _ssh_keygen("verify", [*files, "-I", name], manifest)
        if done.returncode == 0:
            return f"signed by {name} with {key}"
    raise ContractError(
        f"{folder.name} was signed with {key}, which is "
        + (f"not allowed it: {_last_line(done)}" if names else f"none that {allowed_signers} allows now")
        + ". Ask who made it; add the key to that file if it is to be trusted"
    )


def verify(folder: Path, words: Optional[List[str]] = None) -> int:
    """Says who signed the bundle, if it was one of the allowed."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py verify",
        description="Compare the bundle with its signature. Needs ssh-keygen of OpenSSH 8.2 or newer.",
    )
    parser.add_argument(
        "--allowed-signers",
        type=Path,
        required=True,
        metavar="FILE",
        help="those whose bundles are taken, a line each: a name, and a public SSH key (ssh-keygen(1))",
    )
    found = signer(folder, parser.parse_args(words).allowed_signers)
    listed = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    for path in _importable(folder, listed):
        raise ContractError(
            f"{path} is not of this bundle, and Python would run it: it was added after the bundle was signed. Remove "
            "it, or unpack the bundle again"
        )
    print(f"{folder.name}: {found}")
    return 0


def _importable(folder: Path, listed: Set[str]) -> Iterator[Path]:
    """Files that Python may import from `folder`, but for those that are `listed`."""
    for path in sorted(folder.rglob("*")):
        is_importable = path.name.endswith(tuple(importlib.machinery.all_suffixes()))
        if is_importable and path.relative_to(folder).as_posix() not in listed:
            yield path


def _ssh_keygen(action: str, words: List[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    """What `ssh-keygen -Y action` says of `content`. Raises MissingDependencyError."""
    command = ["ssh-keygen", "-Y", action, *([] if action == "find-principals" else ["-n", NAMESPACE]), *words]
    try:
        done = subprocess.run(command, input=content, capture_output=True, check=False)
    except OSError as error:
        raise MissingDependencyError(
            "openssh-client", "a signature", f"apt install openssh-client. It is said of ssh-keygen: {error.strerror}"
        ) from error
    if b"option -- Y" in done.stderr or b"nsupported operation for -Y" in done.stderr:
        raise MissingDependencyError("openssh-client 8.2 or newer", "a signature", "apt install openssh-client")
    return done


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"status {done.returncode}"
