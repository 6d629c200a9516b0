"""Weights to start a training from: --from, the config's `load_from`, the teacher, and mmdet's pretrained parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor

from crosskd.download import local_weights
from crosskd.models.backbones import TimmBackbone, read_safetensors
from crosskd.models.checkpoint import (
    OPTIONAL,
    classes_of_checkpoint,
    detector_weights_in,
    read_checkpoint,
    state_for_detector,
    state_of_checkpoint,
)
from crosskd.models.heads import FAMILIES
from deploy.errors import CheckpointError
from deploy.files import AnyPath

LEAST_SHARE = 0.9
"""Of a backbone's parameters that must fit: weights of which less fits are of another one."""
COUNTERS = "num_batches_tracked"
"""The end of a name: no weights, and not in every file."""


@WEIGHT_INITIALIZERS.register_module(name="Pretrained", force=True)
class FileInit(PretrainedInit):
    """
    mmengine's `init_cfg=dict(type="Pretrained", checkpoint=...)`, which takes what fits and is silent about the rest.

    Here the weights of a file may stand behind a prefix, as `state_for_detector` finds them, and a file of which less
    than LEAST_SHARE of the module's parameters can be taken is refused. Addresses whose names have no hash are read by
    mmengine.

    Raises:
        CheckpointError: as `local_weights`, `read_checkpoint` and `state_for_detector`, or too little fits.
    """

    def __call__(self, module: Any) -> None:
        path = pretrained_file(self.checkpoint)
        if path is None:
            super().__call__(module)
            return
        own = _counted(module.state_dict())
        state = state_for_detector(path, read_checkpoint(path), own.keys())
        _check_share(path, type(module).__name__, own, state)
        module.load_state_dict({key: value for key, value in state.items() if _fits(own, key, value)}, strict=False)


def pretrained_file(checkpoint: str) -> Path | None:
    """
    The local file of an `init_cfg`'s checkpoint, which is fetched if it is an address with a hash in its name, such as
    mmdet's or those of torchvision:// and open-mmlab://. None: no such file, or an address without a hash.

    Raises:
        CheckpointError: as `local_weights`.
    """
    path = Path(local_weights(checkpoint, only_with_hash=True))
    return path if path.is_file() else None


def pretrained_parts(detector: Any) -> dict[str, str]:
    """
    Name of a part -> where its config takes pretrained weights from, of those parts that have any. What is an address
    has been fetched, so that it is a file, where that can be (`pretrained_file`).

    Raises:
        CheckpointError: it cannot be fetched.
    """
    named = {}
    for name, part in detector.named_children():
        init = getattr(part, "init_cfg", None)
        pretrained = [
            one for one in (init if isinstance(init, list) else [init]) if one and one["type"] == "Pretrained"
        ]
        if isinstance(part, TimmBackbone) and part.pretrained:
            named[name] = part.pretrained_file() or f"timm's weights of {part.name}"
        elif pretrained:
            checkpoint = pretrained[-1]["checkpoint"]
            named[name] = str(pretrained_file(checkpoint) or checkpoint)
    return named


def pretrained_inputs(detector: Any, taken: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, str]:
    """
    Name -> file, for a sidecar, of what mmdet initialises parts of a detector with.

    Args:
        taken: tensors from elsewhere; a part of which all is among them is not initialised.

    Raises:
        CheckpointError: as `pretrained_parts`.
    """
    sources = pretrained_parts(detector)
    begun = {
        name: sources[name]
        for name, part in detector.named_children()
        if name in sources and not _is_whole(name, part, taken)
    }
    return {f"pretrained_{name}": source for name, source in begun.items() if Path(source).is_file()}


@dataclasses.dataclass(frozen=True)
class Start:
    """How much of a detector has been given weights to start from."""

    taken: Mapping[str, Tensor]
    """Name -> tensor, of those that were taken whole."""
    class_names_taken: Sequence[str] | None = None
    """The classes whose rows of the class predictor were taken by name; None: it was taken, or left, as a whole."""

    def is_whole(self, detector: Any) -> bool:
        return self.class_names_taken is None and _counted(detector.state_dict()).keys() <= self.taken.keys()

    def lines(self, detector: Any, class_names: Sequence[str]) -> list[str]:
        """A line for each part of the detector, and one for its classes, if they were matched by name."""
        lines = [_line_of_part(name, part, self.taken) for name, part in detector.named_children()]
        known = self.class_names_taken
        if known is not None:
            new = [name for name in class_names if name not in known]
            lines.append(
                f"  classes by name: {', '.join(known) or 'none'}" + (f"; new: {', '.join(new)}" if new else "")
            )
        return [line for line in lines if line]


def start_from_checkpoint(detector: Any, path: AnyPath, class_names: Sequence[str]) -> Start:
    """
    Gives a plain mmdet detector every tensor of a checkpoint that fits by name and shape; says how much of each part.

    Rows of the class predictor are taken by the names of the classes; what is not taken starts as mmdet starts it.
    Without names in the checkpoint, a class predictor of the same size is taken as it is, and one of another size is
    not. The file may be of a detector, or of a backbone alone.

    Args:
        class_names: those to learn.

    Raises:
        CheckpointError: as `read_checkpoint` and `state_for_detector`, or it is of another detector: less than
            LEAST_SHARE of the backbone's parameters fit.
    """
    checkpoint = read_safetensors(str(path)) if Path(path).suffix == ".safetensors" else read_checkpoint(path)
    own = detector.state_dict()
    state = _state_for_parts(detector, path, checkpoint)
    backbone = {key: value for key, value in _counted(own).items() if key.startswith("backbone.")}
    _check_share(path, type(detector).__name__, backbone or own, state)
    known = classes_of_checkpoint(path, checkpoint)
    family = FAMILIES.get(type(getattr(detector, "bbox_head", None)).__name__)
    by_name = set()
    if family is not None and known and known != tuple(class_names):
        by_name = {key for key in own.keys() & state.keys() if key.startswith(f"bbox_head.{family.predictor}.")}
    taken = {key: value for key, value in state.items() if _fits(own, key, value) and key not in by_name}
    _start_the_rest(detector, taken)
    rows: dict[str, Tensor] = {}
    for key in by_name:
        assert family is not None, "only a family's class predictor is matched by name"
        others = family.other_rows(detector.bbox_head)
        rows |= _rows_by_name(key, detector.state_dict()[key], state[key], known or (), class_names, others)
    start = Start(taken, [name for name in class_names if name in (known or ())] if rows else None)
    detector.load_state_dict({**taken, **rows}, strict=False)
    print("\n".join([f"starting from {path}:", *start.lines(detector, class_names)]))
    return start


def tensors_of_teacher(student: Any, teacher: Any) -> dict[str, Tensor]:
    """
    Name -> tensor of a teacher's neck and head that a student has in the same shape; of the backbone if LEAST_SHARE of
    it fits.

    Raises:
        CheckpointError: nothing fits.
    """
    own, source = student.state_dict(), teacher.state_dict()
    taken = {key: value.clone() for key, value in source.items() if _fits(own, key, value)}
    backbone = {key: value for key, value in _counted(own).items() if key.startswith("backbone.")}
    if _share(backbone, taken) < LEAST_SHARE:
        taken = {key: value for key, value in taken.items() if not key.startswith("backbone.")}
    if not _counted(taken):
        raise CheckpointError(
            f"--from teacher: no tensor of the teacher, a {type(teacher).__name__}, fits the student: expected necks "
            "or heads of equal width (out_channels of the neck, feat_channels of the head). Leave --from out"
        )
    return taken


def start_from_teacher(student: Any, taken: Mapping[str, Tensor]) -> None:
    """Gives a student tensors of its teacher, and all else as mmdet starts it. Says how much of each part."""
    _start_the_rest(student, taken)
    student.load_state_dict(taken, strict=False)
    print("\n".join(["starting from the teacher:", *Start(taken).lines(student, ())]))


def _start_the_rest(detector: Any, taken: Mapping[str, Tensor]) -> None:
    """Lets mmdet initialise every part of which not all has been taken."""
    for part_name, part in detector.named_children():
        if not _is_whole(part_name, part, taken) and hasattr(part, "init_weights"):
            part.init_weights()


def _is_whole(part_name: str, part: Any, taken: Mapping[str, Tensor]) -> bool:
    return _counted(part.state_dict(prefix=f"{part_name}.")).keys() <= taken.keys()


def _state_for_parts(detector: Any, path: AnyPath, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the detector's own names, as far as it has them; of a backbone alone, too."""
    own = _counted(detector.state_dict()).keys()
    in_backbone = {name for name in own if name.startswith("backbone.")}
    sets = detector_weights_in(checkpoint, own)
    if any(own <= one.keys.keys() for one in sets):
        return state_for_detector(path, checkpoint, own)
    if any(one.keys.keys() & in_backbone for one in sets):
        return state_for_detector(path, checkpoint, in_backbone)
    backbone = getattr(detector, "backbone", None)
    if isinstance(backbone, TimmBackbone):
        state = backbone.features_from_file(str(path)).state_dict(prefix="model.")
    else:
        bare = {name[len("backbone.") :] for name in in_backbone}
        if not detector_weights_in(checkpoint, bare):
            return state_of_checkpoint(path, checkpoint)
        state = state_for_detector(path, checkpoint, bare)
    return {f"backbone.{name}": value for name, value in state.items()}


def _check_share(path: AnyPath, kind: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, with what differs, if less than LEAST_SHARE of the numbers in `own` fit."""
    share = _share(own, state)
    if share >= LEAST_SHARE:
        return
    missing = sorted(own.keys() - state.keys())
    resized = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    unexpected = sorted(_counted(state).keys() - own.keys())
    differences = []
    if resized:
        key = resized[0]
        more = f", as are {len(resized) - 1} more of another shape" if resized[1:] else ""
        differences.append(f"{key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} here{more}")
    if missing:
        differences.append(f"{len(missing)} are missing there (such as {missing[0]})")
        differences += [f"it has others (such as {unexpected[0]})"] if unexpected else []
    raise CheckpointError(
        f"{path} is of another network: {share:.0%} of the backbone's parameters fit this {kind}, expected at least "
        f"{LEAST_SHARE:.0%}: {'; '.join(differences)}. Give weights of the same architecture, or the config that these "
        "were trained with"
    )


def _share(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> float:
    """Of the numbers in `own`, those that `state` has in the same shape."""
    fitting = sum(value.numel() for key, value in own.items() if key in state and _fits(own, key, state[key]))
    return fitting / max(1, sum(value.numel() for value in own.values()))


def _fits(own: Mapping[str, Tensor], key: str, value: Tensor) -> bool:
    return key in own and own[key].shape == value.shape


def _counted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what not every file of the same network has."""
    return {key: value for key, value in state.items() if not key.endswith((OPTIONAL, COUNTERS))}


def _line_of_part(name: str, part: Any, taken: Mapping[str, Tensor]) -> str:
    tensors = _counted(part.state_dict(prefix=f"{name}."))
    sizes = {key: value.numel() for key, value in part.named_parameters(prefix=name)}
    if not tensors:
        return ""
    left = [key for key in tensors if key not in taken]
    words = (
        f"  {name}: {len(tensors) - len(left)} of {len(tensors)} tensors, "
        f"{sum(size for key, size in sizes.items() if key in taken):,} of {sum(sizes.values()):,} parameters"
    )
    return f"{words}; the others as mmdet starts them, such as {left[0]}" if left else words


def _rows_by_name(
    key: str, drawn: Tensor, loaded: Tensor, known: Sequence[str], wanted: Sequence[str], others: int
) -> dict[str, Tensor]:
    """
    {key: the class predictor `drawn` with the rows of `loaded` by name}; empty if the two cannot be compared.

    Args:
        drawn, loaded: (anchors * classes + others, ...), of `wanted` and of `known`.
    """
    if (len(loaded) - others) % len(known):
        return {}  # of another number of classes than it names
    classes = drawn[: len(drawn) - others].unflatten(0, (-1, len(wanted))).clone()  # (anchors, wanted, ...)
    source = loaded[: len(loaded) - others].unflatten(0, (-1, len(known)))  # (anchors, known, ...)
    if classes[:, 0].shape != source[:, 0].shape:
        return {}
    for number, name in enumerate(wanted):
        if name in known:
            classes[:, number] = source[:, known.index(name)]
    return {key: torch.cat([classes.flatten(0, 1), loaded[len(loaded) - others :]])}
