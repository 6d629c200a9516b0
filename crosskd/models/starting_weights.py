"""Weights to start a training from: the config's `load_from`, mmdet's way to fine-tune, and its pretrained parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor

from crosskd.models.checkpoint import OPTIONAL, classes_of_checkpoint, read_checkpoint, state_for_detector
from crosskd.models.heads import FAMILIES
from deploy.errors import CheckpointError
from deploy.files import AnyPath


@WEIGHT_INITIALIZERS.register_module(name="Pretrained", force=True)
class FileInit(PretrainedInit):
    """
    mmengine's `init_cfg=dict(type="Pretrained", checkpoint=...)`, which takes what fits of a file and leaves the rest.

    Here the weights of a file may stand behind a prefix, as `state_for_detector` finds them, and a file without any
    of the module's is refused. Addresses, and files with a `prefix` in the config, are read by mmengine.

    Raises:
        CheckpointError: as `read_checkpoint` and `state_for_detector`, or none of it fits.
    """

    def __call__(self, module: Any) -> None:
        if self.prefix is not None or not Path(self.checkpoint).is_file():
            super().__call__(module)
            return
        wanted = module.state_dict()
        names = [name for name in wanted if not name.endswith("num_batches_tracked")]
        state = state_for_detector(self.checkpoint, read_checkpoint(self.checkpoint), names)
        if not wanted.keys() & state.keys():
            raise CheckpointError(
                f"{self.checkpoint} holds no weights of this {type(module).__name__}: expected names such as "
                f"{names[0]}, found {next(iter(state))}. Give weights of the same architecture as the pretrained ones"
            )
        load_state_dict(module, state, strict=False, logger="current")


def start_from_checkpoint(detector: Any, path: AnyPath, class_names: Sequence[str]) -> None:
    """
    Gives a plain mmdet detector the weights of a checkpoint, all but what belongs to classes that this does not know.

    Classes that both know keep their weights, by name; others keep those that the detector has. Without names in the
    checkpoint, a class layer of the same size is taken as it is, and one of another size is not. Says what was done.

    Args:
        detector: its heads are initialised; all else has its weights from the file. class_names: those to learn.

    Raises:
        CheckpointError: as `read_checkpoint` and `state_for_detector`, or it is of another detector.
    """
    checkpoint = read_checkpoint(path)
    for name, part in detector.named_children():
        if "head" in name:
            part.init_weights()
    drawn = detector.state_dict()
    state = state_for_detector(path, checkpoint, drawn.keys())
    keys = [{key for key in part if not key.endswith(OPTIONAL)} for part in (drawn, state)]
    known = classes_of_checkpoint(path, checkpoint)
    predictor = getattr(FAMILIES.get(type(getattr(detector, "bbox_head", None)).__name__), "predictor", None)
    by_class = {key for key in drawn if predictor and key.startswith(f"bbox_head.{predictor}.")}
    words = "all of it"
    if by_class and known and known != tuple(class_names):
        for key in by_class & state.keys():
            state[key] = _rows_by_name(drawn[key], state[key], known, class_names)
        new = [name for name in class_names if name not in known]
        words = f"classes by name; {new} are new to it and start anew" if new else "classes by name"
    resized = sorted(key for key in drawn.keys() & state.keys() if drawn[key].shape != state[key].shape)
    strange = [key for key in resized if "head" not in key.split(".")[0]]
    if keys[0] != keys[1] or strange or len(resized) == len(drawn):
        missing, unexpected = sorted(keys[0] - keys[1]), sorted(keys[1] - keys[0])
        raise CheckpointError(
            f"load_from: {path} is not a checkpoint of this {type(detector).__name__}: {len(missing)} keys missing"
            f"{f' (such as {missing[0]})' if missing else ''}, {len(unexpected)} unexpected"
            f"{f' (such as {unexpected[0]})' if unexpected else ''}, {len(strange)} of another shape"
            f"{f' (such as {strange[0]})' if strange else ''}. Expected weights of the same architecture; those of a "
            "backbone alone go into model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    if resized:
        words = f"all but {', '.join(resized)}, which {'is' if len(resized) == 1 else 'are'} of other classes"
    print(f"starting from {path}: {words}")
    detector.load_state_dict({key: value for key, value in state.items() if key not in resized}, strict=False)


def _rows_by_name(drawn: Tensor, loaded: Tensor, known: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The class layer `own`, (anchors * wanted, ...), with the rows of `loaded`, (anchors * known, ...), by name."""
    if len(loaded) % len(known):
        return loaded  # of another number of classes than it names: told apart by its shape
    rows, source = drawn.unflatten(0, (-1, len(wanted))).clone(), loaded.unflatten(0, (-1, len(known)))
    if rows[:, 0].shape != source[:, 0].shape:
        return loaded
    for number, name in enumerate(wanted):
        if name in known:
            rows[:, number] = source[:, known.index(name)]
    return torch.flatten(rows, 0, 1)
