"""What runs aside of a training, before its first step, and leaves no trace in it."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.logging import MMLogger


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Puts the random states of Python, numpy and torch back after the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def quiet_logger() -> Iterator[None]:
    """Lets mmengine log warnings only."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
