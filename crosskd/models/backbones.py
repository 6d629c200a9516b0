"""
Any backbone of timm in an mmdet detector, as one line of a config:

    backbone=dict(type="TimmBackbone", model="mobilenetv4_conv_small", out_indices=(1, 2, 3, 4), pretrained=True),
    neck=dict(in_channels="backbone", ...),

Needs timm, and mmdet.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crosskd.download import fetched_from_hub
from crosskd.models.checkpoint import (
    detector_weights_in,
    read_checkpoint,
    state_for_detector,
    state_of_checkpoint,
)
from crosskd.models.ops import register_mmcv_ops
from deploy.errors import CheckpointError, ConfigError, MissingDependencyError, PipelineError

register_mmcv_ops()  # before mmdet is imported, which asks for them then
from mmdet.registry import MODELS  # noqa: E402

INSTALL = "pip install 'crosskd[train]'"


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """
    A timm model as the backbone of an mmdet detector: feature maps, finest first.

    Args:
        model: timm's name of it, such as "resnet18" or, with the set of weights, "resnet18.a1_in1k".
        out_indices: the feature levels that the neck gets. Most models count from stride 2, some (ConvNeXt, Swin) from
            stride 4; an error that a config gives names the strides found.
        pretrained: True for timm's weights, from the network when a training starts; a path for those in a local file
            of this timm model (.safetensors, or what torch.save wrote), whatever classes its classifier has.
        frozen_stages: the highest feature level, counted as in `out_indices`, that stays as it is, with all before it;
            -1: everything is trained.
        norm_eval: BatchNorm keeps its running statistics in training, as mmdet's ResNets do; for pretrained weights.
        model_kwargs: further arguments of timm's `create_model`, such as dict(drop_path_rate=0.1), or
            dict(img_size=(256, 320)) for the transformers that are built for one size (height, width).

    Raises:
        ConfigError: timm has no such model, it has no such levels, or a key is none of the above.
        MissingDependencyError: timm is not installed.
    """

    def __init__(
        self,
        model: str,
        out_indices: tuple[int, ...],
        pretrained: bool | str = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"backbone has the keys {sorted(unknown)}, which TimmBackbone does not know. If they come from another "
                "backbone that this config inherits, add _delete_=True to `backbone`; timm's own go into model_kwargs."
            )
        self.name, self.out_indices, self.pretrained = model, tuple(out_indices), pretrained
        self.model_kwargs = dict(model_kwargs or {})
        check_timm_model(model)
        try:
            self.model: Any = self._features()
            self.channels = tuple(self.model.feature_info.channels())
            self.strides = tuple(self.model.feature_info.reduction())
        except Exception as error:  # whatever timm raises of an index or an argument
            raise ConfigError(
                f"timm cannot build {model} with out_indices={self.out_indices} and {self.model_kwargs}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.norm_eval = norm_eval
        self.frozen = frozen_modules(self.model, frozen_stages) if frozen_stages >= 0 else []
        for module in self.frozen:
            module.requires_grad_(False)

    def _features(self, **kwargs: Any) -> Any:
        import timm

        return timm.create_model(
            self.name, features_only=True, out_indices=self.out_indices, **self.model_kwargs, **kwargs
        )

    def init_weights(self) -> None:
        """
        Loads the pretrained weights, if there are to be any; else timm's random ones stay.

        As in mmdet's backbones this is the start of a training: nobody downloads anything to read a trained detector.

        Raises:
            CheckpointError: they cannot be had, or are those of another model.
        """
        path = self.pretrained_file()
        if path is None and self.pretrained is False:
            return
        if path is None:
            try:
                source = self._features(pretrained=True)
            except Exception as error:  # of the network, of the hub's client, or timm has no weights of this model
                raise CheckpointError(
                    f"timm cannot get its weights of {self.name} ({type(error).__name__}: {error}). Set "
                    "backbone.pretrained to a file of them, or to False."
                ) from error
        else:
            source = self.features_from_file(path)
        self.model.load_state_dict(source.state_dict())

    def pretrained_file(self) -> str | None:
        """
        The file of the pretrained weights, which is fetched if they are timm's own; None if there are to be none, or
        timm has them in no file of its hub.

        Raises:
            CheckpointError: it cannot be fetched.
        """
        if isinstance(self.pretrained, str):
            return self.pretrained
        facts = self.model.pretrained_cfg
        if not self.pretrained or facts.get("file") or not facts.get("hf_hub_id"):
            return None
        return str(fetched_from_hub(facts["hf_hub_id"]))

    def features_from_file(self, path: str) -> nn.Module:
        """
        The feature extractor with the weights of a file of this timm model, whatever classes its classifier has.

        timm drops what does not fit without a word, so every tensor is looked up in the file first.

        Raises:
            CheckpointError: as `state_of_file`, or they are of another model.
        """
        keys = [key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")]
        needed = {_flat(key.removeprefix("model.")) for key in keys}  # a ViT's have that prefix
        state = state_of_file(path, [name for name in self._names_of_whole_model() if _flat(name) in needed])
        held = {_flat(key) for key in state}
        missing = [key for key in keys if _flat(key.removeprefix("model.")) not in held]
        if missing:
            raise CheckpointError(
                f"{path} does not hold weights of timm's {self.name}: {len(missing)} of the backbone's tensors are not "
                f"in it (such as {missing[0]}). Set backbone.model to the model that it was written from."
            )
        try:
            return self._features(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
        except RuntimeError as error:  # shapes differ: a line for each of them
            first = " ".join(str(error).split("\n\t")[:2])
            raise CheckpointError(f"{path} does not hold weights of timm's {self.name} ({first})") from error

    def _names_of_whole_model(self) -> list[str]:
        """The names in timm's files, which differ from those of the extractor where timm cuts a model open."""
        import timm

        with torch.device("meta"):  # layers without memory
            return list(timm.create_model(self.name, **self.model_kwargs).state_dict())

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> per level of `out_indices` (N, C, H / stride, W / stride)."""
        maps = self.model(images)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":  # Swin and its kin
            return tuple(level.permute(0, 3, 1, 2) for level in maps)
        return tuple(maps)


def check_timm_model(name: str) -> None:
    """
    Raises ConfigError, with the closest names, if timm has no such model, and MissingDependencyError without timm.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), f"the backbone {name}", INSTALL) from error
    architecture = name.split(".")[0]  # what follows the dot names a set of weights
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        raise ConfigError(
            f"timm has no model {name!r}; {f'there are {close}' if close else 'timm.list_models() lists what it has'}"
        )


def frozen_modules(model: Any, level: int) -> list[nn.Module]:
    """
    The modules that the feature level `level` of a timm feature extractor is made by, and nothing after it.

    timm registers modules in the order in which they run, and names the one that a level leaves from; where it cuts a
    model open it writes the dots of that name as underscores.

    Raises:
        ConfigError: the level is not among those computed, or timm does not say where it leaves.
    """
    info = model.feature_info
    if level > max(index % len(info.info) for index in info.out_indices):
        raise ConfigError(f"backbone.frozen_stages is {level}; expected at most the highest of out_indices")
    boundary = _flat(info.module_name(level)) + "_"
    modules = list(model.named_modules())[1:]
    inside = [i for i, (name, _) in enumerate(modules) if f"{_flat(name)}_".startswith(boundary)]
    if not inside:
        raise ConfigError(
            "backbone.frozen_stages: timm does not say which layers of this model come first; set it to -1"
        )
    last = inside[-1]
    later = [name for name, _ in modules[last + 1 :]]
    return [module for name, module in modules[: last + 1] if not any(other.startswith(f"{name}.") for other in later)]


def state_of_file(path: str, names: Collection[str]) -> dict[str, Tensor]:
    """
    Parameter name -> tensor, of a .safetensors file or of a checkpoint.

    Args:
        names: what is looked for. Where the file has all of them behind a prefix (`module.`, `model.`, ...), it is
            taken off, as `state_for_detector` does.

    Raises:
        CheckpointError: as `read_checkpoint` and `state_for_detector`; or no such file, or it is damaged.
        MissingDependencyError: safetensors is needed, and not installed.
    """
    checkpoint = read_safetensors(path) if Path(path).suffix == ".safetensors" else read_checkpoint(path)
    if any(len(weights.keys) == len(names) for weights in detector_weights_in(checkpoint, names)):
        return state_for_detector(path, checkpoint, names)
    return state_of_checkpoint(path, checkpoint)


def read_safetensors(path: str) -> dict[str, Tensor]:
    """
    Parameter name -> tensor, of a .safetensors file.

    Raises:
        CheckpointError: no such file, or it is damaged. MissingDependencyError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise MissingDependencyError("safetensors", path, INSTALL) from error
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path} ({error})") from error


def _flat(name: str) -> str:
    """The name of a module or tensor as timm writes it where it cuts a model open."""
    return name.replace(".", "_")


def fit_to_backbone(model: Any) -> None:
    """
    Fills in `neck.in_channels="backbone"` of a detector's config, in place, and checks that a TimmBackbone fits the
    neck, the strides of the head and the normalisation of the images. Other backbones are left as they are.

    Raises:
        ConfigError: they do not fit, or the backbone cannot be built.
    """
    backbone, neck = model.get("backbone") or {}, model.get("neck") or {}
    neck = neck[0] if isinstance(neck, (list, tuple)) else neck
    if backbone.get("type") != "TimmBackbone":
        if neck.get("in_channels") == "backbone":
            raise ConfigError(
                f'neck.in_channels is "backbone" and the backbone {backbone.get("type")}; that works with TimmBackbone '
                "only. Give the numbers of channels."
            )
        return
    try:
        with torch.device("meta"):  # layers without memory
            built = MODELS.build(backbone)
    except PipelineError:
        raise
    except TypeError as error:  # a key is missing
        raise ConfigError(f"the backbone cannot be built: {error}") from error
    if neck.get("in_channels") == "backbone":
        neck["in_channels"] = list(built.channels)
    given = neck.get("in_channels")
    if isinstance(given, (list, tuple)) and tuple(given) != built.channels:
        raise ConfigError(
            f"neck.in_channels is {list(given)}, but {built.name} gives {list(built.channels)} channels at the strides "
            f'{list(built.strides)}. Write these, or in_channels="backbone".'
        )
    head = model.get("bbox_head") or {}
    wanted = (head.get("anchor_generator") or head.get("prior_generator") or head).get("strides")
    levels = built.strides[neck.get("start_level", 0) :]
    if wanted and list(levels) != list(wanted)[: len(levels)]:
        raise ConfigError(
            f"the head has the strides {list(wanted)}, but {built.name} gives the neck maps of {list(levels)} from "
            "neck.start_level on. Change backbone.out_indices, or the head's strides."
        )
    if built.pretrained is True:
        check_normalisation(built, model.get("data_preprocessor") or {})


def check_normalisation(backbone: TimmBackbone, preprocessor: Any) -> None:
    """Raises ConfigError unless images are normalised as they were for timm's weights."""
    facts = backbone.model.pretrained_cfg
    wanted = {
        "mean": [round(255 * value, 3) for value in facts["mean"]],
        "std": [round(255 * value, 3) for value in facts["std"]],
        "bgr_to_rgb": True,  # mmdet reads blue-green-red
    }
    given = {
        "mean": list(preprocessor.get("mean") or []),
        "std": list(preprocessor.get("std") or []),
        "bgr_to_rgb": bool(preprocessor.get("bgr_to_rgb")),
    }
    if given != wanted:
        raise ConfigError(
            f"timm's weights of {backbone.name} want a data_preprocessor with {wanted}; found {given}. Change it, or "
            "set backbone.pretrained=False."
        )
