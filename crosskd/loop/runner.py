"""mmengine's runner with a console that a person can read, and with convolutions in their fastest layout."""

from __future__ import annotations

import logging
import re
from typing import Any

from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor, nn

from crosskd.loop.guard import skip_unreadable
from crosskd.loop.layout import use_channels_last
from crosskd.models.checkpoint import check_finite
from deploy.errors import CheckpointError, ConfigError, PipelineError

PROGRESS = re.compile(r"(Epoch|Iter)\((train|val)\)")
EXPECTED = re.compile(r"is skipped since its requires_grad=False")
"""mmengine warns of every frozen parameter: each of the teacher's, for one."""


class TrainingRunner(Runner):
    """
    Runner whose console leaves out the environment, the whole config and the table of hooks: hundreds of lines, which
    are in its log file.
    """

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> nn.Module:
        # First weights are drawn before the layout is changed, in mmdet's own and so with its own values, and gradients
        # are gathered from several processes after.
        if not getattr(model, "has_weights", False):
            try:
                model.init_weights()
            except PipelineError:
                raise
            except Exception as error:  # of whatever reads weights, over the network or from a file
                raise ConfigError(
                    f"the initial weights cannot be read: {type(error).__name__}: {error}. They are those of an "
                    "init_cfg=dict(type='Pretrained', checkpoint=...) in the config's model. Without a network, fetch "
                    "the file elsewhere and give its path as the checkpoint; init_cfg=None draws weights at random"
                ) from error
            check_finite("the initial weights", dict(model.named_parameters()))
        use_channels_last(model, get_device())
        return super().wrap_model(model_wrapper_cfg, model)

    def build_train_loop(self, loop: Any) -> Any:
        built = super().build_train_loop(loop)
        skip_unreadable(built.dataloader)
        return built

    def resume(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().resume(*args, **kwargs)
        except PipelineError:
            raise
        except Exception as error:  # mmengine and torch read a dozen keys of it, and check none
            raise CheckpointError(
                f"the run cannot go on from {self._load_from}: {type(error).__name__}: {error}. Expected a checkpoint "
                "that a run with this config wrote; the file was changed, or is of another version. Start a new run"
            ) from error
        for parameter, values in self.optim_wrapper.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"the run cannot go on from {self._load_from}: the optimiser's {name} has the shape "
                        f"{tuple(value.shape)} for a parameter of {tuple(parameter.shape)}. Start a new run"
                    )

    def _init_model_weights(self) -> None:
        """Done in `wrap_model`."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_is_for_people)
        return logger


def _is_for_people(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        return not EXPECTED.search(message)
    return bool(PROGRESS.match(message))
