"""mmengine's runner with a console that a person can read, and with convolutions in their fastest layout."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn

PROGRESS = re.compile(r"(Epoch|Iter)\((train|val)\)")
EXPECTED = re.compile(r"is skipped since its requires_grad=False")
"""mmengine warns of every frozen parameter: each of the teacher's, for one."""


class TrainingRunner(Runner):
    """
    Runner whose console leaves out the environment, the whole config and the table of hooks: hundreds of lines, which
    are in its log file.
    """

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        # The layout in which convolutions run fastest, in bf16 most of all. First weights are drawn before, in mmdet's
        # own layout and so with its own values, and gradients are gathered from several processes after.
        model.init_weights()
        return super().wrap_model(model_wrapper_cfg, model.to(memory_format=torch.channels_last))

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
