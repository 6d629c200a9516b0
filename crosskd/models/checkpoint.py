"""Safe loading of weights, key and class-count checks, extraction of the student."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosskd.download import fetched_checkpoint
from crosskd.models.allowed_globals import allowed_globals
from crosskd.models.heads import FAMILIES
from deploy.errors import CheckpointError
from deploy.files import AnyPath, check_regular, replacing, stands_in_for
from deploy.limits import LARGEST_EXPANDED_BYTES, check_zip_claims
from deploy.schema import short

# mmengine falls back to full unpickling, with a warning, when a checkpoint holds more than tensors. That runs code of
# whoever made the file. torch reads this variable at each load and then refuses instead.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

OPTIONAL = "integral.project"
"""The end of a name: a constant that mmdet registers as a buffer in some versions and not in others."""
EMA_PREFIX = "ema_"
"""Before the names of averages, which mmdet 2 keeps beside the weights."""
START_FROM = "To start a training from such weights, give --from FILE: all but what belongs to other classes is taken."


class OtherClassesError(CheckpointError):
    """The weights of a detector do not know all the classes; as a start for a training of these they may do."""


DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
LARGEST_SAFETENSORS_HEADER = 100_000_000
"""Bytes of the JSON object that follows its own length: https://github.com/huggingface/safetensors, "Format"."""
UNKNOWN_CLASS_BIAS = -20.0
"""A logit: the probability is 2e-9."""


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
        check_regular(source)
        _check_format(source)
        check_zip_claims(source)
        with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol, before it refuses the file
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"no such checkpoint: {source}") from error
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise CheckpointError(
                f"{source} was written with a newer pickle protocol than torch.save's own, which cannot be read "
                "without running code; expected protocol 2. Save it again without pickle_protocol."
            ) from error
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
    _check_tensors(source, checkpoint)
    return checkpoint


def _check_format(path: str) -> None:
    """Raises CheckpointError for a file of weights that other programs than torch.save write."""
    with open(path, "rb") as file:
        head = file.read(64)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 0 < length < LARGEST_SAFETENSORS_HEADER:
        raise CheckpointError(
            f"{path} is a safetensors file; expected one that torch.save wrote. Convert it: "
            'torch.save({"state_dict": safetensors.torch.load_file(FILE)}, "weights.pth")'
        )
    found = "" if head.startswith(b"PK") else stands_in_for(head)  # torch.save's own files are zip archives
    if found:
        raise CheckpointError(f"{path} is no checkpoint: {found}; expected a file that torch.save wrote")


def _check_tensors(path: str, checkpoint: dict[Any, Any]) -> None:
    """Raises CheckpointError for a tensor that is not plain numbers in memory, or claims more of them than it has."""
    todo: list[Any] = [checkpoint]
    seen: set[int] = set()  # a pickle may hold itself
    while todo:
        part = todo.pop()
        if isinstance(part, Tensor):
            plain = part.layout == torch.strided and part.device.type == "cpu" and not part.is_quantized
            if not plain or part.dtype not in DTYPES:
                raise CheckpointError(
                    f"{path} holds a tensor of {part.dtype}, {part.layout}, on {part.device}; expected plain numbers"
                )
            if part.numel() * part.itemsize > max(part.untyped_storage().nbytes(), LARGEST_EXPANDED_BYTES):
                raise CheckpointError(
                    f"{path} holds a tensor of the shape {tuple(part.shape)} with "
                    f"{part.untyped_storage().nbytes()} bytes of numbers; expected one for each value"
                )
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            todo += part.values() if isinstance(part, dict) else part


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
    return {
        key.removeprefix("module."): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


class DetectorWeights(NamedTuple):
    """One set of a detector's weights in a checkpoint."""

    place: str
    """The keys that lead to its dict, such as 'state_dict'; '' for the checkpoint itself."""
    prefix: str
    """What the names of its tensors begin with, before the detector's own names."""
    keys: dict[str, str]
    """The detector's name -> name in that dict."""
    tensors: dict[str, Tensor]
    """All of that dict."""

    def __str__(self) -> str:
        place = self.place or "the file itself"
        return f"{place} with names that begin with {self.prefix!r}" if self.prefix else place


def detector_weights_in(checkpoint: dict[str, Any], names: Collection[str]) -> list[DetectorWeights]:
    """All sets of tensors in a checkpoint that are called like some of `names`, but for what is before the name."""
    flat = {name.replace(".", "_"): name for name in names}

    def own_names(key: str) -> Iterator[tuple[str, str]]:
        """(prefix, name) for each way to read a key; mmdet 2 writes the average of a.b as ema_a_b."""
        if key.startswith(EMA_PREFIX):
            yield EMA_PREFIX, flat.get(key[len(EMA_PREFIX) :], key[len(EMA_PREFIX) :])
        for start in (0, *(place.end() for place in re.finditer(r"\.", key))):
            yield key[:start], key[start:]

    sets = []
    for place, tensors in _dicts_of_tensors(checkpoint):
        by_prefix: dict[str, dict[str, str]] = {}
        for key in tensors:
            for prefix, name in own_names(key):
                if name in names:
                    by_prefix.setdefault(prefix, {})[name] = key
        sets += [DetectorWeights(place, prefix, keys, tensors) for prefix, keys in by_prefix.items()]
    return sets


def _dicts_of_tensors(
    content: dict[Any, Any], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place, name -> tensor) of the dict and of those in it, two levels deep; an optimiser's lie deeper."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(value, dict) and depth < 2:
            yield from _dicts_of_tensors(value, f"{place}.{key}" if place else str(key), depth + 1)


def state_for_detector(path: AnyPath, checkpoint: dict[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    """
    The weights of a detector with these parameter names, under these names, and what else lies among them.

    Names may have a prefix (`module.`, `student.`, `_orig_mod.`, ...), and the dict another name than state_dict; a
    line then says what was taken. mmengine and mmdet 2 keep two sets, of which the plain one is what they evaluate.

    Args:
        path: for messages. names: of the detector's own state_dict.

    Raises:
        CheckpointError: there are no tensors, not all of a set whose names have a prefix,
            several sets that differ, or values that are no numbers.
    """
    candidates = detector_weights_in(checkpoint, names)
    if not candidates:
        return state_of_checkpoint(path, checkpoint)
    needed = {name for name in names if not name.endswith(OPTIONAL)}
    whole = [entry for entry in candidates if needed <= entry.keys.keys()]
    plain = next((entry for entry in whole if entry.place in ("", "state_dict") and not entry.prefix), None)
    meant = [entry for entry in whole if entry is plain or plain is None or not _kept_beside(entry, plain)]
    if any(not _same(meant[0], entry) for entry in meant[1:]):
        raise CheckpointError(
            f"{path} holds {len(meant)} sets of weights for this detector: {'; '.join(map(str, meant))}. Expected one: "
            "save the one that you mean alone, as state_dict, beside the same meta, and give that file."
        )
    chosen = plain or (meant[0] if meant else max(candidates, key=lambda entry: len(entry.keys)))
    if not whole and (chosen.prefix or chosen.place not in ("", "state_dict")):
        missing = sorted(needed - chosen.keys.keys())
        raise CheckpointError(
            f"{path} is not a checkpoint of this detector: {chosen} holds {len(chosen.keys)} of its tensors and lacks "
            f"{len(missing)} (such as {missing[0]}). Give the config that it was trained with."
        )
    known = set(chosen.keys.values())
    averages = {key for entry in candidates if entry.prefix == EMA_PREFIX for key in entry.keys.values()}
    among = [key for key in chosen.tensors if key.startswith(chosen.prefix) and key not in known | averages]
    state = {name: chosen.tensors[key] for name, key in chosen.keys.items()}
    state.update((key[len(chosen.prefix) :], chosen.tensors[key]) for key in among)
    left_out = [key for key in chosen.tensors if key not in known and key not in among]
    left_out += [entry.place for entry in whole if entry.place != chosen.place]
    if whole and (chosen.prefix or left_out or chosen.place not in ("", "state_dict")):
        others = f"; left out {len(left_out)} more, such as {left_out[0]}" if left_out else ""
        print(f"{path}: took the weights in {chosen}{others}")
    check_finite(path, {chosen.keys.get(name, name): value for name, value in state.items()})
    return state


def _kept_beside(weights: DetectorWeights, plain: DetectorWeights) -> bool:
    """Whether mmengine's or mmdet 2's EMA hook wrote this set beside the plain one, which holds what they evaluate."""
    mmengine = weights.place == "ema_state_dict" and plain.place == "state_dict" and "steps" in weights.tensors
    return mmengine or (weights.place == plain.place and weights.prefix == EMA_PREFIX)


def _same(one: DetectorWeights, other: DetectorWeights) -> bool:
    pairs = [(one.tensors[one.keys[name]], other.tensors[other.keys[name]]) for name in one.keys.keys() & other.keys]
    return all(first.shape == second.shape and bool((first == second).all()) for first, second in pairs)


def check_finite(path: AnyPath, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, with the first name, if a tensor of `path` holds values that are NaN or infinite."""
    wrong = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        values = state[wrong[0]]
        raise CheckpointError(
            f"{path}: {wrong[0]} has {int((~values.isfinite()).sum())} of {values.numel()} values that are NaN or "
            f"infinite{f', as have {len(wrong) - 1} more tensors' if wrong[1:] else ''}; expected numbers. The "
            "training that wrote it diverged, or the file is damaged: give an earlier checkpoint."
        )


def classes_of_checkpoint(path: AnyPath, checkpoint: dict[str, Any]) -> tuple[str, ...] | None:
    """
    The class names that mmdet 3 (`meta.dataset_meta.classes`) or 2 (`meta.CLASSES`) wrote, if any.

    Raises:
        CheckpointError: they are no names.
    """
    meta = _dict_or_empty(checkpoint.get("meta"))
    dataset = _dict_or_empty(meta.get("dataset_meta"))
    names = dataset.get("classes") or dataset.get("CLASSES") or meta.get("CLASSES")
    if not names:
        return None
    names = [names] if isinstance(names, str) else names  # of one class, as mmdet 2 allows
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: the classes in its meta are {short(names)}; expected a list of names")
    return tuple(names)


def _dict_or_empty(value: Any) -> dict[str, Any]:
    """What mmdet keeps beside the weights; others keep other things there, which nobody reads."""
    return value if isinstance(value, dict) else {}


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
        CheckpointError: as `read_checkpoint` and `state_for_detector`; keys are missing or unexpected, or shapes
            differ (another architecture, another number of classes); classes are missing.
    """
    checkpoint, wanted = read_checkpoint(path), detector.state_dict()
    state = state_for_detector(path, checkpoint, wanted.keys())
    known = classes_of_checkpoint(path, checkpoint)
    head: Any = getattr(detector, "bbox_head", None)
    predictor = getattr(FAMILIES.get(type(head).__name__), "predictor", None)
    if predictor and class_names and known and tuple(class_names) != known:
        missing_classes = [name for name in class_names if name not in known]
        if missing_classes and not allow_missing_classes:
            raise OtherClassesError(
                f"{path} does not know the classes {missing_classes}; it knows {list(known)}. Give a checkpoint that "
                "knows them all, or set model.distill.allow_missing_classes=True to do without."
            )
        rows = {key: value.shape[:1] for key, value in state.items() if key.startswith(f"bbox_head.{predictor}.")}
        uneven = [key for key, shape in rows.items() if not shape or shape[0] % len(known)]
        if uneven:
            raise CheckpointError(
                f"{path} names {len(known)} classes, but {uneven[0]} has the shape {tuple(state[uneven[0]].shape)}; "
                "expected as many rows for each class. Its meta is of other weights."
            )
        state = state_for_classes(state, f"bbox_head.{predictor}.", known, class_names)
    for key in wanted.keys() & state.keys() if predictor else ():
        if key.startswith(f"bbox_head.{predictor}.") and wanted[key].shape[:1] != state[key].shape[:1]:
            class_count = (
                len(state[key]) * head.num_classes // len(wanted[key])
            )  # several anchors a point have a class each
            raise OtherClassesError(
                f"{path} was trained with {class_count} classes ({key}), the data has {head.num_classes}. Give "
                f"a checkpoint that was trained on these classes. {START_FROM}"
            )
    missing = sorted(key for key in wanted.keys() - state.keys() if not key.endswith(OPTIONAL))
    unexpected = sorted(key for key in state.keys() - wanted.keys() if not key.endswith(OPTIONAL))
    differing = sorted(key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape)
    if missing or unexpected or differing:
        only_head = not missing and not unexpected and all(key.startswith("bbox_head.") for key in differing)
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
            f"that it was trained with.{f' {START_FROM}' if only_head else ''}"
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
    path = Path(run_dir) / Path(pointer.read_text(errors="replace").strip()).name
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        others = sorted(found.name for found in Path(run_dir).glob("*.pth") if found != path)
        instead = f"write the name of an earlier one ({', '.join(others)}) into {pointer}, or " if others else ""
        raise CheckpointError(
            f"cannot go on from the last checkpoint: {error} Else {instead}start the run anew, without --resume."
        ) from error
    return path
