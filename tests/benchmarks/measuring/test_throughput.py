from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.measuring import throughput
from benchmarks.measuring.subject import Subject
from benchmarks.measuring.timing import LatencyOptions
from deploy.errors import ContractError
from deploy.runtime.session import OrtSession

CPU_STAGES = {"read", "preprocess", "inference", "postprocess", "total"}


class Batches:
    """A session that takes any batch and notes its size and thread."""

    description = "a stand-in"

    def __init__(self, contract, log):
        self.contract, self._log = contract, log

    def __enter__(self):
        return self

    def __exit__(self, *_words):
        pass

    def infer(self, feed):
        (images,) = feed.values()
        self._log.append((threading.get_ident(), len(images)))
        count = len(images)
        return {
            "boxes": np.zeros((count, 1, 4), np.float32),
            "scores": np.zeros((count, 1), np.float32),
            "labels": np.zeros((count, 1), np.int64),
        }


@pytest.fixture
def contract(detector):
    with OrtSession(detector()) as session:
        return session.contract


def test_a_stream_is_a_thread_with_a_session(contract):
    log = []
    pixels = [np.zeros((64, 96, 3), np.uint8)] * 3
    rate = throughput.throughput(lambda: Batches(contract, log), pixels, batch=2, streams=3, images=20)
    assert rate > 0
    assert {size for _, size in log} == {2}
    threads = [thread for thread, _ in log]
    assert len(log) == 3 * (throughput.SWEEP_WARMUP + 4)  # 20 images in twos on three streams: four rounds each
    assert {threads.count(thread) for thread in set(threads)} == {throughput.SWEEP_WARMUP + 4}
    assert threading.get_ident() not in threads


def test_images_of_all_streams_and_batches_count(contract, monkeypatch):
    asked = threading.local()

    def perf_counter():  # of each thread: 5 s at its start, 7 s at its end
        asked.now = getattr(asked, "now", 3.0) + 2.0
        return asked.now

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=perf_counter))
    pixels = [np.zeros((64, 96, 3), np.uint8)]
    rate = throughput.throughput(lambda: Batches(contract, []), pixels, batch=2, streams=3, images=20)
    assert rate == pytest.approx(24 / 2.0)  # four rounds of six images, in two seconds


def test_a_stream_that_fails_does_not_hold_up_the_others(contract):
    opened = []

    @contextlib.contextmanager
    def opener():
        opened.append(1)
        if len(opened) == 2:
            raise ContractError("no memory left")
        yield Batches(contract, [])

    with pytest.raises(ContractError, match="no memory left"):
        throughput.throughput(opener, [np.zeros((64, 96, 3), np.uint8)], batch=1, streams=3, images=20)


def test_a_sweep_takes_every_combination(monkeypatch):
    monkeypatch.setattr(throughput, "throughput", lambda opener, pixels, batch, streams, images: 10.0 * batch * streams)
    options = LatencyOptions(sweep_batches=(1, 4), sweep_streams=(1, 2), runs=10)
    assert throughput.sweep(Subject(Path("x.onnx"), Path("x.onnx"), "onnx", {}), [], options) == [
        {"batch": 1, "streams": 1, "images_per_s": 10.0},
        {"batch": 1, "streams": 2, "images_per_s": 20.0},
        {"batch": 4, "streams": 1, "images_per_s": 40.0},
        {"batch": 4, "streams": 2, "images_per_s": 80.0},
    ]
