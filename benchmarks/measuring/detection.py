"""A model that detects in one image per call and times its stages; runs on a board, too."""

from __future__ import annotations

import os
import time
from typing import Dict, Optional, Sequence

import numpy as np

from benchmarks.measuring.environment import process_memory_mib
from deploy.files import AnyPath
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Session

Times = Dict[str, float]
"""Stage -> milliseconds, of one run."""


class Detection:
    """
    A model that detects in one of a few images per call and times its stages.

    Attributes:
        description: what runs it where, in words.
        on_gpu: whether the network runs on a GPU.
        images: how many images take turns.
    """

    description: str
    on_gpu: bool
    images: int

    def run(self, number: int) -> Times:
        """The milliseconds of each stage, and in `total` from the decoded image to its detections."""
        raise NotImplementedError

    def memory_mib(self) -> Optional[float]:
        """The most host memory so far beyond what there was before the model was opened; None but on Linux."""
        raise NotImplementedError


class SessionDetection(Detection):
    """An ONNX file or an engine, in this process. What is held of memory is taken before it is opened."""

    def __init__(
        self,
        session: Session,
        images: Sequence[AnyPath],
        pixels: Sequence[np.ndarray],
        on_gpu: bool,
        before_mib: Optional[float],
    ) -> None:
        self.description, self.on_gpu, self.images = session.description, on_gpu, len(pixels)
        self._session, self._names, self._pixels, self._before_mib = session, images, pixels, before_mib
        self.batch = session.batch_limits[0]
        """Images of each run: of a model that takes no single one, the same several times."""

    def run(self, number: int) -> Times:
        contract, turn = self._session.contract, number % self.images
        image, name = self._pixels[turn], self._names[turn]
        times_ms: Times = {}
        start = time.perf_counter()
        prepared = preprocess(image, contract)
        prepared_at = time.perf_counter()
        fed = prepared.input if self.batch == 1 else np.repeat(prepared.input, self.batch, axis=0)
        outputs = self._session.infer({contract.input_name: fed}, times_ms)
        inferred_at = time.perf_counter()
        postprocess(outputs, contract, prepared, image=name)
        end = time.perf_counter()
        return {
            "preprocess": 1e3 * (prepared_at - start),
            **times_ms,
            "postprocess": 1e3 * (end - inferred_at),
            "total": 1e3 * (end - start),
        }

    def memory_mib(self) -> Optional[float]:
        now = process_memory_mib(os.getpid())
        return None if now is None or self._before_mib is None else now[1] - self._before_mib
