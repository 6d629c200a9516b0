"""Images per second with several images at once, and with several sessions at once."""

from __future__ import annotations

import functools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import numpy as np

from benchmarks.measuring.subject import Subject
from benchmarks.measuring.timing import LatencyOptions
from deploy.progress import progress
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Session, open_session

SWEEP_WARMUP = 3
"""Batches of each session before those that count."""


def throughput(
    opener: Callable[[], ContextManager[Session]], pixels: Sequence[np.ndarray], batch: int, streams: int, images: int
) -> float:
    """
    Images per second, from decoded images to detections, with `streams` threads that each hold a session.

    Args:
        opener: opens a session.
        batch: images per inference.
        images: how many in all; more, where they do not share out evenly.
    """
    rounds = max(1, math.ceil(images / (batch * streams)))
    together = threading.Barrier(streams)

    def stream() -> Tuple[float, float]:
        try:
            with opener() as session:  # in the thread that uses it, as CUDA's contexts want it
                for number in range(SWEEP_WARMUP):
                    _detect_batch(session, pixels, batch, number)
                together.wait()
                start = time.perf_counter()
                for number in range(rounds):
                    _detect_batch(session, pixels, batch, number)
                return start, time.perf_counter()
        except BaseException:
            together.abort()  # or the others would wait for ever
            raise

    with ThreadPoolExecutor(streams) as pool:
        futures = [pool.submit(stream) for _ in range(streams)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    spans = [future.result() for future in futures]
    return rounds * batch * streams / (max(end for _, end in spans) - min(start for start, _ in spans))


def _detect_batch(session: Session, pixels: Sequence[np.ndarray], batch: int, number: int) -> None:
    contract = session.contract
    prepared = [preprocess(pixels[(number * batch + index) % len(pixels)], contract) for index in range(batch)]
    outputs = session.infer({contract.input_name: np.concatenate([one.input for one in prepared])})
    for index, one in enumerate(prepared):
        postprocess(outputs, contract, one, index)


def sweep(subject: Subject, pixels: Sequence[np.ndarray], options: LatencyOptions) -> Optional[List[Dict[str, Any]]]:
    """
    `batch`, `streams` and `images_per_s` of each combination that the options ask for; None if they ask for none.

    Args:
        subject: the model.
        pixels: decoded images, used in turn.
    """
    if not options.sweep_batches and not options.sweep_streams:
        return None
    opener = functools.partial(open_session, subject.path, threads=options.threads, runtime=subject.runtime)
    pairs = [(batch, streams) for batch in options.sweep_batches or [1] for streams in options.sweep_streams or [1]]
    return [
        {
            "batch": batch,
            "streams": streams,
            "images_per_s": round(throughput(opener, pixels, batch, streams, options.runs), 3),
        }
        for batch, streams in progress(pairs, len(pairs), "sweep")
    ]
