"""
The command `bench` of a bundle's `run.py`: latency of a model on the board, from network input to network outputs.

No image is prepared and no box suppressed, so that neither OpenCV nor data are needed: the inputs are the bundle's
golden ones. `total` is therefore less than that of `benchmarks.latency`; the result says so (`comparable_reasons`),
and its data are those of no annotation file, so that `benchmarks.report` takes it with results of this bundle alone.

Needs what `deploy.board.commands` needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from benchmarks.measuring.environment import clock_reasons, read_environment
from benchmarks.measuring.result import (
    LEAST_RUNS,
    STATISTICS,
    Reason,
    numbers_from_reasons,
    numbers_from_samples,
    reasons_from_spread,
    write_result,
)
from deploy.board.commands import Bundle, add_engine_argument, golden_path
from deploy.errors import ConfigError
from deploy.files import check_writable
from deploy.machine import usable_cores
from deploy.progress import progress
from deploy.runtime.session import Session

NETWORK_ALONE = Reason(
    "network_alone", "total is that of the network alone: no image was prepared, no boxes were suppressed"
)

Samples = Dict[str, List[float]]
"""Stage -> milliseconds of each run."""


def bench(folder: Path, words: Optional[List[str]] = None) -> int:
    """Measures an engine, writes a result file and prints the summary."""
    arguments = _parser().parse_args(words)
    for flag, least in (("runs", LEAST_RUNS), ("warmup", 1)):
        if getattr(arguments, flag) < least:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)}; expected at least {least}")
    bundle = Bundle(folder)
    model = bundle.model(arguments.engine)
    output = arguments.output or bundle.folder / f"{model.path.stem}.latency.result.json"
    check_writable(output)
    environment = read_environment()  # before we load the machine ourselves
    threads = usable_cores() if "threads" in model.target.session_options else None
    with model.open(threads) as session:
        fewest, most = session.batch_limits
        inputs = [
            np.resize(golden, (min(max(len(golden), fewest), most), *golden.shape[1:]))
            for golden in bundle.golden_inputs()
        ]
        samples = samples_from_session(session, inputs, arguments.runs, arguments.warmup)
        numbers = numbers_of_bench(samples, session.description, threads, model.target.on_gpu, arguments.warmup, inputs)
    result = {
        "kind": "latency",
        "role": arguments.role or model.role,
        "model": {
            "file": str(model.path),
            "format": model.path.suffix[1:],
            "runtime": model.target.name,
            "sha256": model.sidecar["artefact"]["sha256"],
            "bytes": model.sidecar["artefact"]["bytes"],
            "parameters": model.parameters,
            "inputs": model.sidecar["inputs"],
            "command": model.sidecar["command"],
        },
        "data": data_from_bundle(bundle),
        "environment": environment,
        "numbers": numbers,
    }
    write_result(output, result, {"model": model.path})
    print(f"{result['role']}, {numbers['description']}, {arguments.runs} runs after {arguments.warmup} of warm-up")
    for stage, summary in numbers["summary_ms"].items():
        if summary is not None:
            print(f"{stage:>14}: " + ", ".join(f"{name} {summary[name]:.2f}" for name in STATISTICS) + " ms")
    for reason in numbers["comparable_reasons"]:
        print(f"NOT COMPARABLE: {reason}")
    print(f"result: {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 run.py bench", description="Measure the latency of an engine, from network input to outputs."
    )
    add_engine_argument(parser)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="runs that count (default: 200)")
    parser.add_argument("--warmup", type=int, default=50, metavar="N", help="runs before these (default: 50)")
    parser.add_argument("--role", help="what the model is in the report (default: as engine-int8, onnx-int8)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="result file to write (default: beside the engine)"
    )
    return parser


def samples_from_session(session: Session, inputs: List[np.ndarray], runs: int, warmup: int) -> Samples:
    """
    Stage -> milliseconds of each run: the session's own stages, and `total` by the host's clock.

    Args:
        inputs: each as the contract says; used in turn.
    """
    samples: Samples = {}
    for run in progress(range(warmup + runs), warmup + runs, "runs"):
        feed = {session.contract.input_name: inputs[run % len(inputs)]}
        times_ms: Dict[str, float] = {}
        start = time.perf_counter()
        session.infer(feed, times_ms)
        times_ms["total"] = 1e3 * (time.perf_counter() - start)
        if run >= warmup:
            for stage, value in times_ms.items():
                samples.setdefault(stage, []).append(value)
    return samples


def numbers_of_bench(
    samples: Samples,
    description: str,
    threads: Optional[int],
    on_gpu: bool,
    warmup: int,
    inputs: Sequence[np.ndarray],
) -> Dict[str, Any]:
    """
    The `numbers` of a result file (`benchmarks.measuring.result`, kind latency). What was not measured is None.

    Args:
        threads: of the CPU; None for what runs on a GPU.
        inputs: which took turns.
    """
    numbers = numbers_from_samples(samples, description, threads, len(inputs))
    reasons = [NETWORK_ALONE, *(Reason("clocks", text) for text in clock_reasons(on_gpu))]
    if len(inputs[0]) != 1:
        reasons.append(Reason("batch", f"each run takes {len(inputs[0])} images"))
    return {
        **numbers,
        **numbers_from_reasons(reasons + reasons_from_spread(numbers["spread"])),
        "warmup_runs": warmup,
        "mode": "back-to-back",
        "fps": None,
        "late_frames": None,
        "memory_mib": {"host_peak": None, "device_peak": None},
        "power": None,
        "power_reason": "bench does not measure it",
        "sweep": None,
    }


def data_from_bundle(bundle: Bundle) -> Dict[str, Any]:
    """The `data` of a result file: the golden inputs, known by the hash of their hashes."""
    files = [bundle.manifest["files"][golden_path(index, "input")] for index in range(bundle.manifest["golden"])]
    hashes = json.dumps([entry["sha256"] for entry in files]).encode()
    return {
        "annotations": "the bundle's golden inputs",
        "annotations_sha256": hashlib.sha256(hashes).hexdigest(),
        "images_dir": "golden",
        "images": len(files),
        "class_names": list(bundle.contract.class_names),
    }
