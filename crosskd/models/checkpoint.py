"""Safe loading of weights, key and class-count checks, extraction of the student."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosskd.download import fetched_checkpoint
from crosskd.models.heads import FAMILIES
from deploy.errors import CheckpointError
from deploy.files import AnyPath, replacing

# mmengine falls back to full unpickling, with a warning, when a checkpoint holds more than tensors. That runs code of
# whoever made the file. torch reads this variable at each load and then refuses instead.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

UNKNOWN_CLASS_BIAS = -20.0
"""A logit: the probability is 2e-9."""


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
    if source.startswith(("http://", "https://")):
        source = str(fetched_checkpoint(source))
    try:
        with torch.serialization.safe_globals(_allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol, before it refuses the file
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


def state_of_checkpoint(path: AnyPath, checkpoint: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """
    Parameter name -> tensor.

    Args:
        checkpoint: the content of `path`, if it was read already.

    Raises:
        CheckpointError: as `read_checkpoint`, or there are no tensors in it.
    """
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no state_dict of tensors; found the keys {sorted(map(str, checkpoint))[:8]}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def classes_of_checkpoint(checkpoint: dict[str, Any]) -> tuple[str, ...] | None:
    """The class names that mmdet 3 (`meta.dataset_meta.classes`) or 2 (`meta.CLASSES`) wrote, if any."""
    meta = checkpoint.get("meta") or {}
    dataset = meta.get("dataset_meta") or {}
    names = dataset.get("classes") or dataset.get("CLASSES") or meta.get("CLASSES")
    return tuple(map(str, names)) if names else None


def state_for_classes(
    state: dict[str, Tensor], prefix: str, known: Sequence[str], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """
    The state of a detector that predicts `wanted`, from one that predicts `known`, each class by its own sigmoid.

    A class that is not known gets no weights and a bias that makes its probability nearly zero.

    Args:
        prefix: of the class predictor's keys; their first dimension is anchors * classes.
    """

    def chosen(key: str, values: Tensor) -> Tensor:
        by_class = values.unflatten(0, (-1, len(known)))  # (anchors, classes, ...)
        fill = UNKNOWN_CLASS_BIAS if key.endswith("bias") else 0.0
        columns = [
            by_class[:, known.index(name)] if name in known else torch.full_like(by_class[:, 0], fill)
            for name in wanted
        ]
        return torch.stack(columns, 1).flatten(0, 1)

    return {key: chosen(key, value) if key.startswith(prefix) else value for key, value in state.items()}


def load_detector_weights(
    detector: nn.Module,
    path: AnyPath,
    class_names: Sequence[str] | None = None,
    allow_missing_classes: bool = False,
) -> None:
    """
    Loads a checkpoint into a plain mmdet detector, every key of it.

    Args:
        class_names: of the detector's head. Where the checkpoint names its own classes, those of the same names are
            taken, in this order; without names on either side the classes are taken to be the same.
        allow_missing_classes: classes that the checkpoint does not know are then never detected.

    Raises:
        CheckpointError: as `state_of_checkpoint`; keys are missing or unexpected, or shapes differ (another
            architecture, another number of classes); classes are missing.
    """
    checkpoint, own = read_checkpoint(path), detector.state_dict()
    state = state_of_checkpoint(path, checkpoint)
    known = classes_of_checkpoint(checkpoint)
    head = getattr(detector, "bbox_head", None)
    predictor = getattr(FAMILIES.get(type(head).__name__), "predictor", None)
    if predictor and class_names and known and tuple(class_names) != known:
        missing_classes = [name for name in class_names if name not in known]
        if missing_classes and not allow_missing_classes:
            raise CheckpointError(
                f"{path} does not know the classes {missing_classes}; it knows {list(known)}. Give a checkpoint that "
                "knows them all, or set model.distill.allow_missing_classes=True to do without."
            )
        state = state_for_classes(state, f"bbox_head.{predictor}.", known, class_names)
    for key in own.keys() & state.keys() if predictor else ():
        if key.startswith(f"bbox_head.{predictor}.") and own[key].shape[:1] != state[key].shape[:1]:
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
