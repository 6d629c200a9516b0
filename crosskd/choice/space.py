"""The students that crosskd.choose looks at: GFL, as in configs/recipes, over backbone, head and image size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crosskd.choice.search import Candidate
from crosskd.config import load_config, set_classes
from crosskd.recipes import FOLDER, STUDENTS, recipe_path

BACKBONES = ("resnet18", "mobilenetv4_conv_medium", "mobilenetv4_conv_small", "mobilenetv4_conv_small_050")
"""Convolutions, ReLU and additions only, which all run in INT8; those first that do most multiplications in a time."""
HEADS = ((64, 2), (96, 2), (128, 3), (192, 4))
"""(channels, tower layers)."""
SIDES_PX = (320, 416, 512, 640)
SIGNED_PIXELS = ("mobilenetv4_conv_small_050",)
"""Backbones whose weights want pixels from -1 to 1."""


def families() -> list[list[Candidate]]:
    """All candidates, of one backbone each list, with their multiplications."""
    return [
        [
            Candidate(backbone, width, layers, side, macs)
            for width, layers in HEADS
            for side, macs in zip(SIDES_PX, _macs(backbone, width, layers), strict=True)
        ]
        for backbone in BACKBONES
    ]


def changes(candidate: Candidate) -> dict[str, Any]:
    """Dotted key -> value: what makes the recipe `tiny` of GFL a candidate."""
    signed = candidate.backbone in SIGNED_PIXELS
    values: dict[str, Any] = {
        "model.backbone.model": candidate.backbone,
        "model.neck.out_channels": candidate.width,
        "model.bbox_head.in_channels": candidate.width,
        "model.bbox_head.feat_channels": candidate.width,
        "model.bbox_head.stacked_convs": candidate.tower_layers,
        "input_size": (candidate.side_px, candidate.side_px),
    }
    return values | ({f"model.data_preprocessor.{name}": [127.5] * 3 for name in ("mean", "std")} if signed else {})


def config_of(candidate: Candidate, class_names: tuple[str, ...] = ()) -> Any:
    """The config of a candidate, for these classes if there are any."""
    config = load_config(recipe_path("tiny", STUDENTS), changes(candidate))
    if class_names:
        set_classes(config, class_names)
    return config


def config_text(candidate: Candidate, head: str) -> str:
    """A config file of a candidate, under a comment."""
    nested: dict[str, Any] = {}
    for key, value in changes(candidate).items():
        place = nested
        *parents, last = key.split(".")
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    lines = "\n".join(f"{name} = {value!r}" for name, value in nested.items())
    return f"# {head}\n_base_ = {str((FOLDER / 'gfl_tiny.py').resolve())!r}\n\n{lines}\n"


def _macs(backbone: str, width: int, layers: int) -> Iterator[int]:
    """Multiplications of a student's convolutions, for each of SIDES_PX."""
    import torch
    from torch import nn

    from crosskd.models.detector import detector_from_config

    with torch.device("meta"), torch.no_grad():  # layers without memory, that only tell their shapes
        detector = detector_from_config(config_of(Candidate(backbone, width, layers, SIDES_PX[0], 0))).eval()
        counts: list[int] = []

        def count(module: Any, _args: Any, output: torch.Tensor) -> None:
            counts.append(output.numel() * module.weight[0].numel())  # a filter for each number that comes out

        for module in detector.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        for side in SIDES_PX:
            counts.clear()
            detector.bbox_head(detector.extract_feat(torch.empty(1, 3, side, side)))
            yield sum(counts)
