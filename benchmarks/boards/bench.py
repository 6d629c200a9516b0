"""
The command `bench` of a bundle's `run.py`: latency of a model on the board.

With a set of images it is that of `benchmarks.latency`: all stages, back to back or paced, memory, power, clocks. That
needs OpenCV or Pillow.

Without one it is that of the network alone. No image is prepared and no box suppressed, so that neither OpenCV nor data
are needed: the inputs are the bundle's golden ones. `total` is therefore less; the result says so
(`comparable_reasons`), and its data are those of no annotation file, so that `benchmarks.report` takes it with results
of this bundle alone.

Needs what `deploy.board.commands` needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from benchmarks.boards.board_result import BoardWatch, model_of_result
from benchmarks.boards.image_set import ImageSet, add_image_arguments, read_image_set, read_set_image
from benchmarks.measuring.detection import SessionDetection
from benchmarks.measuring.environment import clock_reasons, process_memory_mib, reset_peak_memory
from benchmarks.measuring.result import (
    LEAST_RUNS,
    STATISTICS,
    Reason,
    numbers_from_reasons,
    numbers_from_samples,
    reasons_from_numbers,
    reasons_from_spread,
    write_result,
)
from benchmarks.measuring.timing import (
    IMAGES,
    LatencyOptions,
    add_read,
    device_memory_used_mib,
    measure,
    read_samples,
    spread,
)
from deploy.board.commands import BoardModel, Bundle, add_engine_argument, golden_path
from deploy.errors import ConfigError
from deploy.files import check_writable
from deploy.machine import usable_cores
from deploy.pixels import cv2
from deploy.progress import progress
from deploy.runtime.session import Session

NETWORK_ALONE = Reason(
    "network_alone", "total is that of the network alone: no image was prepared, no boxes were suppressed"
)
WARMUP_RUNS = 50
"""Of the network alone, before the runs that count."""

Samples = Dict[str, List[float]]
"""Stage -> milliseconds of each run."""
Measured = Tuple[Dict[str, Any], Dict[str, Any]]
"""`data` and `numbers` of a result file."""


def bench(folder: Path, words: Optional[List[str]] = None) -> int:
    """Measures a model, writes a result file and prints the summary."""
    arguments = _parser().parse_args(words)
    _check(arguments)
    bundle = Bundle(folder)
    model = bundle.model(arguments.engine)
    output = arguments.output or bundle.folder / f"{model.path.stem}.latency.result.json"
    check_writable(output)
    watch = BoardWatch(arguments.board)  # before we load the machine ourselves
    threads = usable_cores() if "threads" in model.target.session_options else None
    if arguments.set is None:
        warmup = WARMUP_RUNS if arguments.warmup is None else arguments.warmup
        data, numbers = measure_network(bundle, model, threads, arguments.runs, warmup)
    else:
        most_s = LatencyOptions.max_warmup_s if arguments.max_warmup_s is None else arguments.max_warmup_s
        options = LatencyOptions(arguments.runs, most_s, threads, arguments.fps)
        data, numbers = measure_on_images(read_image_set(arguments.set), arguments.images_dir, model, options)
    result = {
        "kind": "latency",
        "role": arguments.role or model.role,
        "model": model_of_result(model),
        "data": data,
        "environment": watch.environment(),
        "numbers": numbers,
    }
    write_result(output, result, {"model": model.path})
    pace = "" if numbers["fps"] is None else f" at {numbers['fps']:g} frames/s, {numbers['late_frames']} late"
    print(
        f"{result['role']}, {numbers['description']}, {arguments.runs} runs{pace} after {numbers['warmup_runs']} of "
        "warm-up"
    )
    for stage, summary in numbers["summary_ms"].items():
        if summary is not None:
            print(f"{stage:>14}: " + ", ".join(f"{name} {summary[name]:.2f}" for name in STATISTICS) + " ms")
    for reason in numbers["comparable_reasons"]:
        print(f"NOT COMPARABLE: {reason}")
    print(f"result: {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 run.py bench",
        description="Measure the latency of a model: with --set stage by stage, from the decoded image to its "
        "detections; else from network input to outputs.",
    )
    add_engine_argument(parser)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="runs that count (default: 200)")
    parser.add_argument(
        "--warmup", type=int, metavar="N", help=f"runs before these (default: {WARMUP_RUNS}); with --set until stable"
    )
    add_image_arguments(parser, required=False)
    parser.add_argument(
        "--fps", type=float, metavar="N", help="with --set: start runs on schedule, as a camera does"
    )  # fmt: skip
    parser.add_argument(
        "--max-warmup-s", type=float, metavar="SECONDS", help="with --set: the longest warm-up (default: 30)"
    )
    parser.add_argument("--role", help="what the model is in the report (default: as engine-int8, onnx-int8)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="result file to write (default: beside the engine)"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if a number is out of range, or flags do not go together."""
    for flag, least in (("runs", LEAST_RUNS), ("warmup", 1)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag} is {value}; expected at least {least}")
    if (arguments.set is None) != (arguments.images_dir is None):
        raise ConfigError("one of --set and --images-dir is given; expected both, or neither for the network alone")
    others = ("fps", "max_warmup_s") if arguments.set is None else ("warmup",)
    for flag in others:
        if getattr(arguments, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')} does not go {'without' if arguments.set is None else 'with'} --set"
            )


def measure_on_images(image_set: ImageSet, images_dir: Path, model: BoardModel, options: LatencyOptions) -> Measured:
    """All stages, in a few of the images."""
    images = spread(image_set.images, IMAGES)
    if cv2 is not None and options.threads is not None:
        cv2.setNumThreads(options.threads)  # OpenCV resizes with threads of its own
    pixels = [read_set_image(images_dir, image) for image in images]
    read_ms = read_samples([images_dir / image.sha256 for image in images], options.runs)
    gpu_before_mib = device_memory_used_mib()
    memory = process_memory_mib(os.getpid()) if reset_peak_memory() else None
    with model.open(options.threads) as session:
        names = [image.name for image in images]
        detection = SessionDetection(session, names, pixels, model.target.on_gpu, memory[0] if memory else None)
        numbers = measure(detection, options, gpu_before_mib)
        if detection.batch != 1:
            reasons = [*reasons_from_numbers(numbers), Reason("batch", f"each run takes {detection.batch} images")]
            numbers.update(numbers_from_reasons(reasons))
    add_read(numbers, read_ms)
    return {**image_set.data, "images": len(images)}, {**numbers, "sweep": None}


def measure_network(bundle: Bundle, model: BoardModel, threads: Optional[int], runs: int, warmup: int) -> Measured:
    """The network alone, on the golden inputs."""
    with model.open(threads) as session:
        fewest, most = session.batch_limits
        inputs = [
            np.resize(golden, (min(max(len(golden), fewest), most), *golden.shape[1:]))
            for golden in bundle.golden_inputs()
        ]
        samples = samples_from_session(session, inputs, runs, warmup)
        numbers = numbers_of_bench(samples, session.description, threads, model.target.on_gpu, warmup, inputs)
    return data_from_bundle(bundle), numbers


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
