"""mmengine's runner with a console that a person can read: progress and warnings. Everything is in the log file."""

from __future__ import annotations

import logging
import re
from typing import Any

from mmengine.logging import MMLogger
from mmengine.runner import Runner

PROGRESS = re.compile(r"(Epoch|Iter)\((train|val)\)")
EXPECTED = re.compile(r"is skipped since its requires_grad=False")
"""mmengine warns of every frozen parameter: each of the teacher's, for one."""


class TrainingRunner(Runner):
    """Runner whose console leaves out the environment, the whole config and the table of hooks: hundreds of lines."""

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
