"""The part of cuda-python that is used here, on host memory."""

from __future__ import annotations

import ctypes
import enum
import itertools
import time
from types import ModuleType, SimpleNamespace
from typing import Any


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Copy(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Capture(enum.Enum):
    cudaStreamCaptureModeThreadLocal = 1


def cuda_python_stand_in() -> ModuleType:
    """
    The module `cuda.bindings.runtime`, whose device memory is host memory.

    `memory` holds the allocated blocks by address, `handles` what was created and not destroyed yet. `full` makes each
    allocation and creation fail, `capture_fails` the end of each capture. `captured` is the list of steps that the
    stream records during a capture, else None.
    """
    runtime: Any = ModuleType("cuda.bindings.runtime")
    runtime.memory, runtime.freed, runtime.full = {}, [], False
    runtime.handles, runtime.captured, runtime.capture_fails, runtime.launches = {}, None, False, 0
    runtime.cudaError_t, runtime.cudaMemcpyKind, runtime.cudaStreamNonBlocking = Status, Copy, 1
    runtime.cudaStreamCaptureMode = Capture

    def allocate(size: int) -> tuple[Any, ...]:
        if runtime.full:
            return Status.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(size)
        runtime.memory[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def free(address: int) -> tuple[Any, ...]:
        block = runtime.memory.pop(address)
        ctypes.memset(block, 0xFF, len(block))
        runtime.freed.append(block)  # a view into it finds not-a-numbers, not another's memory
        return (Status.cudaSuccess,)

    def copy(target: int, source: int, count: int, kind: Copy, stream: int) -> tuple[Any, ...]:
        assert stream == 77
        assert runtime.captured is None
        device = target if kind is Copy.cudaMemcpyHostToDevice else source
        assert device in runtime.memory
        ctypes.memmove(target, source, count)
        return (Status.cudaSuccess,)

    runtime.cudaMalloc = runtime.cudaMallocHost = allocate
    runtime.cudaFree = runtime.cudaFreeHost = free
    runtime.cudaMemcpyAsync = copy
    runtime.cudaGetDevice = lambda: (Status.cudaSuccess, 0)
    properties = SimpleNamespace(name=b"Stand-in GPU\0\0", major=8, minor=7, multiProcessorCount=8)
    runtime.cudaGetDeviceProperties = lambda device: (Status.cudaSuccess, properties)
    runtime.cudaRuntimeGetVersion = lambda: (Status.cudaSuccess, 13000)
    runtime.cudaDriverGetVersion = lambda: (Status.cudaSuccess, 13010)

    def create(value: Any) -> tuple[Any, ...]:
        if runtime.full:
            return Status.cudaErrorMemoryAllocation, None
        handle = 77 if value == "stream" else 1000 + next(numbers)
        runtime.handles[handle] = value
        return Status.cudaSuccess, handle

    def destroy(handle: int) -> tuple[Any, ...]:
        del runtime.handles[handle]
        return (Status.cudaSuccess,)

    def record(event: int, stream: int) -> tuple[Any, ...]:
        assert runtime.captured is None
        runtime.handles[event] = time.perf_counter()
        return (Status.cudaSuccess,)

    def begin(stream: int, mode: Capture) -> tuple[Any, ...]:
        runtime.captured = []
        return (Status.cudaSuccess,)

    def end(stream: int) -> tuple[Any, ...]:
        steps, runtime.captured = runtime.captured, None
        if runtime.capture_fails:
            return Status.cudaErrorStreamCaptureUnsupported, None
        return create(steps)

    def launch(graph: int, stream: int) -> tuple[Any, ...]:
        runtime.launches += 1
        for step in runtime.handles[graph]:
            step()
        return (Status.cudaSuccess,)

    numbers = itertools.count()
    runtime.cudaStreamCreateWithFlags = lambda flags: create("stream")
    runtime.cudaEventCreate = lambda: create(None)
    runtime.cudaGraphInstantiateWithFlags = lambda graph, flags: create(runtime.handles[graph])
    runtime.cudaStreamDestroy = runtime.cudaEventDestroy = destroy
    runtime.cudaGraphDestroy = runtime.cudaGraphExecDestroy = destroy
    runtime.cudaEventRecord, runtime.cudaGraphLaunch = record, launch
    runtime.cudaEventElapsedTime = lambda start, end: (
        Status.cudaSuccess,
        1e3 * (runtime.handles[end] - runtime.handles[start]),
    )
    runtime.cudaStreamBeginCapture, runtime.cudaStreamEndCapture = begin, end
    runtime.cudaGetLastError = lambda: (Status.cudaSuccess,)
    runtime.cudaStreamSynchronize = lambda stream: (Status.cudaSuccess,)
    return runtime


def cuda_modules(runtime: ModuleType) -> dict[str, ModuleType]:
    """What `sys.modules` has to have for `from cuda.bindings import runtime` to find `runtime`."""
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = runtime
    return {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
