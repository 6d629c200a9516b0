"""Safe loading of weights, key and class-count checks, extraction of the student."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy.errors import CheckpointError
from deploy.files import AnyPath, replacing

# mmengine falls back to full unpickling, with a warning, when a checkpoint holds more than tensors. That runs code of
# whoever made the file. torch reads this variable at each load and then refuses instead.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def _allowed_globals() -> list[Any]:
    """
    What mmengine's own checkpoints hold besides tensors: message buffers and numpy scalars. Nothing of it runs code.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    def method_of_history(owner: Any, name: str) -> Any:
        """In place of `getattr`, by which pickle writes a buffer's methods and a forger would reach anything."""
        if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
            raise pickle.UnpicklingError(f"it asks for the attribute {name} of {owner}")
        return getattr(HistoryBuffer, name)

    core = np._core.multiarray  # type: ignore[attr-defined]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "uint32")]
    own = [core._reconstruct, core.scalar, np.ndarray, np.dtype, *dtypes, HistoryBuffer]
    return [*own, (method_of_history, "builtins.getattr")]


def read_checkpoint(path: AnyPath) -> dict[str, Any]:
    """
    The content of a checkpoint file, or of an http(s) address (downloaded once, its hash compared with its name).

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, or would run code when unpickled.
    """
    source = str(path)
    try:
        with torch.serialization.safe_globals(_allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol, before it refuses the file
            if source.startswith(("http://", "https://")):
                checkpoint = torch.hub.load_state_dict_from_url(
                    source, map_location="cpu", check_hash=True, weights_only=True
                )
            else:
                checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no such checkpoint: {source}") from error
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL [\w.]+|it asks for .*", str(error))  # the rest of torch's message is advice
        raise CheckpointError(
            f"{source} is not a plain checkpoint: reading it would run code or build objects that are not weights"
            f"{f' ({asked_for[0]})' if asked_for else ''}, so it was not read. Expected tensors only; ask its author "
            "for the state_dict."
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {source} ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise anything
        words = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"cannot read the checkpoint {source} ({type(error).__name__}: {words}); expected a file that torch.save "
            "wrote. It may be truncated: copy it again."
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{source} holds a {type(checkpoint).__name__}; expected a dict with state_dict")
    return checkpoint


def state_of_checkpoint(path: AnyPath) -> dict[str, Tensor]:
    """
    Parameter name -> tensor.

    Raises:
        CheckpointError: as `read_checkpoint`, or there are no tensors in it.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no state_dict of tensors; found the keys {sorted(map(str, checkpoint))[:8]}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_detector_weights(detector: nn.Module, path: AnyPath) -> None:
    """
    Loads a checkpoint into a plain mmdet detector, every key of it.

    Raises:
        CheckpointError: as `state_of_checkpoint`; keys are missing or unexpected, or shapes differ (another
            architecture, another number of classes).
    """
    state, own = state_of_checkpoint(path), detector.state_dict()
    head = getattr(detector, "bbox_head", None)
    for name in ("gfl_cls", "atss_cls", "retina_cls", "conv_cls"):
        key = f"bbox_head.{name}.bias"
        if key in own and key in state and own[key].shape != state[key].shape:
            found = len(state[key]) * head.num_classes // len(own[key])  # several anchors a point have a class each
            raise CheckpointError(
                f"{path} was trained with {found} classes ({key}), the data has {head.num_classes}. Give "
                "a checkpoint that was trained on these classes."
            )
    # `integral.project` is a constant that mmdet registers as a buffer in some versions and not in others.
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith("integral.project"))
    unexpected = sorted(key for key in state.keys() - own.keys() if not key.endswith("integral.project"))
    differing = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or unexpected or differing:
        parts = [
            f"{len(keys)} {what} (such as {keys[0]})"
            for keys, what in (
                (missing, "keys missing"),
                (unexpected, "unexpected keys"),
                (differing, "keys of another shape"),
            )
            if keys
        ]
        raise CheckpointError(
            f"{path} is not a checkpoint of this {type(detector).__name__}: {', '.join(parts)}. Give the config "
            f"that it was trained with."
        )
    detector.load_state_dict(state, strict=False)


def save_detector_weights(detector: nn.Module, path: AnyPath, meta: dict[str, Any]) -> None:
    """Writes the detector's weights atomically, in the layout that mmdet reads: `state_dict` and `meta`."""
    state = {key: value.detach().cpu() for key, value in detector.state_dict().items()}
    with replacing(path) as temporary, temporary.open("wb") as file:  # by name, it would write the name into the file
        torch.save({"state_dict": state, "meta": meta}, file)


def latest_checkpoint(run_dir: AnyPath) -> Path:
    """
    The checkpoint from which a run goes on; it has been read safely.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    pointer = Path(run_dir) / "last_checkpoint"
    if not pointer.is_file():
        raise CheckpointError(f"nothing to resume in {run_dir}: it has no checkpoint. Start the run without --resume.")
    path = Path(run_dir) / Path(pointer.read_text().strip()).name
    read_checkpoint(path)
    return path
