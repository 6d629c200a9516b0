"""mmdet's published checkpoints: found by the config's name, downloaded once, checked by the hash in their name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from http.client import HTTPException
from pathlib import Path

from deploy.errors import CheckpointError, ConfigError
from deploy.files import check_writable, sha256_of, user_cache

HASHED = re.compile(r"-([0-9a-f]{8,})\.pth$")
"""The end of an address whose file can be checked: the beginning of its SHA-256."""


def local_weights(named: str, config_name: str = "", only_with_hash: bool = False) -> str:
    """
    The file of weights that a user or a config names; fetched if it is not on this machine yet.

    Args:
        named: a file; an address, or one of mmengine's short ones (torchvision://resnet18); `mmdet::FAMILY/NAME.py` for
            what mmdet publishes for that config; `published` for what it publishes for `config_name`.
        only_with_hash: addresses whose names have no hash come back as they are.

    Raises:
        ConfigError: as `published_url`, or mmengine has no such short address.
        CheckpointError: as `fetched_checkpoint`.
    """
    if named == "published" or named.startswith("mmdet::"):
        return str(published_checkpoint(config_name if named == "published" else named))
    scheme, is_address, name = named.partition("://")
    if not is_address:
        return named
    if scheme in ("torchvision", "open-mmlab", "openmmlab"):
        from mmengine.runner.checkpoint import get_external_models, get_torchvision_models

        known = get_torchvision_models() if scheme == "torchvision" else get_external_models()
        if known.get(name) is None:
            raise ConfigError(f"there are no weights {named}; expected one of {', '.join(filter(known.get, known))}")
        named = str(known[name])
    if only_with_hash and not HASHED.search(named):
        return named
    return str(fetched_checkpoint(named))


def published_checkpoint(config_name: str) -> Path:
    """
    The file of the weights that mmdet publishes for one of its configs; downloaded if it is not there yet.

    Args:
        config_name: such as `mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py`.

    Raises:
        ConfigError: as `published_url`.
        CheckpointError: as `fetched_checkpoint`.
    """
    return fetched_checkpoint(published_url(config_name))


def published_url(config_name: str) -> str:
    """
    The address of the weights that mmdet publishes for one of its configs: the `Weights` of its metafiles.

    Raises:
        ConfigError: not a config of mmdet's, or none of its metafiles has weights for it.
    """
    from mmengine.hub import get_config

    url = None
    if config_name.startswith("mmdet::"):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # mmdet tells of an optional data service each time
                url = get_config(config_name, pretrained=True).get("model_path")
        except (AssertionError, FileNotFoundError):  # an entry without weights; no such config
            url = None
    if url is None:
        raise ConfigError(
            f"mmdet publishes no weights for {config_name}; give --teacher-checkpoint, the weights of a teacher that "
            "you have or train (crosskd.train), or mmdet::FAMILY/NAME.py in place of `published`: one of mmdet's own "
            "configs, of the same network, that has weights"
        )
    return str(url)


def fetched_checkpoint(url: str) -> Path:
    """
    The file at `url`, downloaded once into the cache ($CROSSKD_CACHE, else ~/.cache/crosskd) unless torch's has it.

    Its name must end in the first eight digits of its SHA-256, as those of mmdet's checkpoints do. It is checked each
    time, also when it is in the cache.

    Raises:
        CheckpointError: it cannot be downloaded, has another hash than its name says, or has none in its name.
        PipelineError: the cache cannot be written.
    """
    from torch.hub import get_dir

    name = url.rsplit("/", 1)[-1]
    match = HASHED.search(name)
    if match is None:
        raise CheckpointError(
            f"{url} cannot be checked: expected a name that ends in -<first 8 digits of the SHA-256>.pth. Download it "
            "yourself and give the file in place of the address."
        )
    path = cache_dir() / name
    of_torch = Path(get_dir()) / "checkpoints" / name
    if not path.is_file() and of_torch.is_file():
        path = of_torch
    if path.is_file():
        digest = sha256_of(path)
        if not digest.startswith(match[1]):
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 begins with {digest[:8]}, expected {match[1]} as in its name. Delete "
                "it; the next run downloads it again."
            )
        return path
    _download(url, path, match[1])
    return path


def fetched_from_hub(repository: str, name: str = "model.safetensors") -> Path:
    """
    A file of a repository of the Hugging Face hub, such as timm's weights; from its client's cache, or downloaded once.

    Raises:
        CheckpointError: it cannot be downloaded.
        PipelineError: the cache cannot be written.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    known = try_to_load_from_cache(repository, name)
    path = Path(known) if isinstance(known, str) else cache_dir() / f"{repository.replace('/', '--')}.{name}"
    if not path.is_file():  # without the client, whose many tries without a network fill the screen
        _download(hf_hub_url(repository, name), path, None)
    return path


def _download(url: str, path: Path, hash_prefix: str | None) -> None:
    """
    Raises:
        CheckpointError: it cannot be downloaded, or has another hash. PipelineError: `path` cannot be written.
    """
    from torch.hub import download_url_to_file

    check_writable(path)
    print(f"downloading {url} to {path}", file=sys.stderr)
    try:
        download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=sys.stderr.isatty())
    except RuntimeError as error:  # torch's word for a wrong hash
        raise CheckpointError(
            f"what {url} sent is not the published file ({error}); it was not kept. Try again, or see what answers "
            "there: a proxy's own page, perhaps."
        ) from error
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"cannot download {url} ({getattr(error, 'reason', None) or error}). Without a network: fetch it elsewhere "
            f"and put it at {path}, or give a file of weights in its place."
        ) from error


def cache_dir() -> Path:
    """The folder of downloads: $CROSSKD_CACHE, or ~/.cache/crosskd."""
    given = os.environ.get("CROSSKD_CACHE")
    return Path(os.path.expanduser(given)) if given else user_cache("set CROSSKD_CACHE to a folder for downloads")
