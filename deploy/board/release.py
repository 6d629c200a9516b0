"""
What is in use on a board: of all bundles that were brought there, one model is current, and the one before it is kept.

Beside the bundles' folders lies `releases/HASH/`, the bundle with the model of that hash and its sidecar, and two
links: `current` and `former`. A program opens `current/model.engine` (or `current/model.onnx`). A release is written
under another name, flushed and renamed; then each link is replaced by one rename. So `current` leads to a whole release
at any moment, also after a power cut: to the new one or to that before.

Needs no more than a bundle's other commands.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from typing import Iterator, List, Optional

from deploy.board.commands import Bundle, add_engine_argument
from deploy.board.run import MANIFEST, fault_of_files
from deploy.board.signature import SIGNATURE
from deploy.contract import read_sidecar, sidecar_path
from deploy.errors import ConfigError, ContractError, PipelineError

RELEASES = "releases"
CURRENT, FORMER = "current", "former"
UNFINISHED = ".unfinished"


def activate(folder: Path, words: Optional[List[str]] = None) -> int:
    """Makes a model of the bundle the current one; the one that was is kept."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py activate",
        description="Make a model of this bundle the current one of the folder that holds the bundle.",
    )
    add_engine_argument(parser)
    parser.add_argument("--sha256", metavar="HASH", help="refuse a model of another hash than this")
    arguments = parser.parse_args(words)
    bundle = Bundle(folder)
    path = bundle.model(arguments.engine).path
    sha256 = str(read_sidecar(path)["artefact"]["sha256"])
    if arguments.sha256 not in (None, sha256):
        raise ContractError(
            f"{path} has the SHA-256 {sha256[:12]}..., --sha256 is {arguments.sha256[:12]}...; expected the model that "
            "was judged: build and measure it anew"
        )
    base = folder.parent
    with _writing(base):
        release = _release(bundle, path, sha256, base / RELEASES / sha256)
        before = _target(base / CURRENT)
        if before not in (None, release):
            _point(base / FORMER, before)
        _point(base / CURRENT, release)
        _remove_others(base)
    print(f"{base / CURRENT} is {path.name}, SHA-256 {sha256[:12]}...")
    return 0


def rollback(folder: Path, words: Optional[List[str]] = None) -> int:
    """Makes the former model current again, and the current one the former. `folder` is a bundle's or a release's."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py rollback", description="Make the model current that was so before the last activate."
    )
    parser.parse_args(words)
    base = folder.parent.parent if folder.parent.name == RELEASES else folder.parent
    before, former = _target(base / CURRENT), _target(base / FORMER)
    if former is None or former == before:
        raise ConfigError(f"{base} has no {FORMER} model; expected one that was current before the one that is")
    fault = _fault(former)
    if fault:
        raise ContractError(f"the former model will not do: {fault}. Activate another")
    with _writing(base):
        _point(base / CURRENT, former)
        if before is not None:
            _point(base / FORMER, before)
    print(f"{base / CURRENT} is the model of SHA-256 {former.name[:12]}... again")
    return 0


@contextlib.contextmanager
def _writing(base: Path) -> Iterator[None]:
    """Makes one message of what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise PipelineError(
            f"cannot write into {base}: {error}. {CURRENT} is as it was, or new: see where the link leads, make room, "
            "and run it again"
        ) from error


def _release(bundle: Bundle, model: Path, sha256: str, release: Path) -> Path:
    """The folder `release` with the bundle and its model, whole and on the disk."""
    while release.is_dir() and _fault(release):  # it was damaged, and a link may lead to it
        release = release.with_name(f"{release.name}+")
    if release.is_dir():
        return release
    unfinished = release.with_name(f"{sha256}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in [MANIFEST, SIGNATURE, *bundle.manifest["files"]]:
        if (bundle.folder / name).is_file():
            _copy(bundle.folder / name, unfinished / name)
    for source, suffix in ((model, ""), (sidecar_path(model), ".json")):
        if not (unfinished / source.name).exists():
            _copy(source, unfinished / source.name)
        os.symlink(source.name, unfinished / f"model{model.suffix}{suffix}")
    for path in sorted((path for path in unfinished.rglob("*") if path.is_dir()), reverse=True):
        _flush(path)
    _flush(unfinished)
    os.rename(unfinished, release)
    _flush(release.parent)
    _flush(release.parent.parent)
    return release


def _fault(release: Path) -> str:
    """What is wrong with a release; "" if nothing is."""
    models = [path for path in release.glob("model.*") if path.suffix != ".json"]
    try:
        read_sidecar(models[0] if models else release / "model")
    except ContractError as error:
        return str(error)
    return fault_of_files(release)


def _remove_others(base: Path) -> None:
    """Removes the releases that neither link leads to."""
    kept = {_target(base / CURRENT), _target(base / FORMER)}
    for path in (base / RELEASES).iterdir():
        if path not in kept:
            shutil.rmtree(path)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    _flush(target)


def _flush(path: Path) -> None:
    """Waits until what `path` is, a file's content or the entries of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _target(link: Path) -> Optional[Path]:
    """The release that a link leads to; None if there is no link, or what it led to is gone."""
    release = link.parent / os.readlink(link) if link.is_symlink() else None
    return release if release is not None and release.is_dir() else None


def _point(link: Path, release: Path) -> None:
    """Lets `link` lead to `release`, at one moment."""
    new = link.with_name(f".{link.name}{UNFINISHED}")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    os.symlink(f"{RELEASES}/{release.name}", new)
    os.replace(new, link)
    _flush(link.parent)
