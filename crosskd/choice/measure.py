"""What a candidate takes on the target: exported with random weights, quantised, timed there by `benchmarks`."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from crosskd.choice.search import Candidate, Measured
from crosskd.choice.space import config_of
from deploy.commands import run_captured, run_status
from deploy.contract import write_sidecar
from deploy.dataset import CocoSet
from deploy.errors import ExportError, MeasurementError
from deploy.files import read_json, sha256_of, write_json
from deploy.layouts import SPLITS, has_split
from deploy.machine import text_of
from deploy.schema import read_checked

JOURNAL = "measured.json"
"""In the output folder: what was measured, under which conditions."""
_ENTRY = {"conditions": dict, "candidate": str, "p99_ms": float, "size_mib": float, "memory_mib": (float, None)}
JOURNAL_KINDS = {"measured": [_ENTRY]}
"""Table of that file."""
WARM_UP_S = 5


@dataclasses.dataclass(frozen=True)
class Target:
    """Where and how candidates are measured."""

    data: str
    """Folder of images in COCO format, on which they are measured."""
    runtime: str = "onnxruntime"
    """onnxruntime or tensorrt."""
    precision: str = "int8"
    """int8 or float: FP32 with ONNX Runtime, FP16 with TensorRT."""
    boards: Path | None = None
    """List of boards, for `benchmarks.fleet`; None: this machine."""
    threads: int | None = None
    """Of the CPU; None: one for each usable processor."""
    fps: float | None = None
    """Images come at this rate; None: one after the other."""
    runs: int = 100

    def conditions(self, data: CocoSet) -> dict[str, Any]:
        """What has to be the same for a measurement to count."""
        cpu = re.search(r"model name\s*: (.*)", text_of("/proc/cpuinfo") or "")
        return {
            "runtime": self.runtime,
            "precision": self.precision,
            "threads": self.threads,
            "fps": self.fps,
            "boards": None if self.boards is None else sha256_of(self.boards),
            "machine": cpu[1] if cpu and self.boards is None else platform.machine(),
            "annotations_sha256": sha256_of(data.annotations_path),
        }


class Bench:
    """Measures candidates, and keeps what it has measured in JOURNAL of a folder."""

    def __init__(self, folder: Path, target: Target, data: CocoSet) -> None:
        """
        Raises:
            MeasurementError: there is a journal, which is damaged.
        """
        self.folder, self.target, self.data = folder, target, data
        self.conditions = target.conditions(data)
        journal = folder / JOURNAL
        self.entries: list[dict[str, Any]] = []
        if journal.exists():
            self.entries = read_checked(journal, JOURNAL_KINDS, MeasurementError, "a journal of measurements")[
                "measured"
            ]

    def known(self) -> dict[str, Measured]:
        """Name of a candidate -> what was measured first under these conditions."""
        ours = [entry for entry in self.entries if entry["conditions"] == self.conditions]
        return {
            entry["candidate"]: Measured(entry["p99_ms"], entry["size_mib"], entry["memory_mib"])
            for entry in reversed(ours)
        }

    def measure(self, candidate: Candidate) -> Measured | None:
        """
        What the candidate takes: of the journal, else measured now. None: it cannot be exported, which is told.

        Raises:
            PipelineError: a step of it failed, on a board, too.
        """
        known = self.known().get(candidate.name)
        return self.measure_again(candidate) if known is None else known

    def measure_again(self, candidate: Candidate) -> Measured | None:
        """As `measure`, whether it was measured or not."""
        try:
            with tempfile.TemporaryDirectory(prefix="choose.", dir=self.folder) as folder:
                found = measured_once(candidate, self.target, self.data, Path(folder))
        except ExportError as error:
            print(f"{candidate.name} cannot be exported, and is left out: {error}", file=sys.stderr, flush=True)
            return None
        self.entries.append({"conditions": self.conditions, "candidate": candidate.name, **dataclasses.asdict(found)})
        write_json(self.folder / JOURNAL, {"measured": self.entries})
        memory = "" if found.memory_mib is None else f", {found.memory_mib:.0f} MiB of memory"
        print(
            f"{candidate.name}: {candidate.macs / 1e9:.2f} GMAC, p99 {found.p99_ms:.2f} ms, {found.size_mib:.1f} MiB"
            f"{memory}",
            flush=True,
        )
        return found


def measured_once(candidate: Candidate, target: Target, data: CocoSet, folder: Path) -> Measured:
    """
    Exports, quantises, builds and times a candidate; all files of it go into `folder`.

    Raises:
        PipelineError: one of these failed.
    """
    model = folder / "student.onnx"
    export(candidate, data, model)
    if target.precision == "int8":
        quantised = folder / "student.int8.onnx"
        quantised_for = ["--num-images", "2", "--target", target.runtime]
        run_captured("calibration.quantize", model, "--data", target.data, *quantised_for, "-o", quantised)
        model = quantised
    if target.boards is not None:
        return measured_on_boards(model, target.boards, folder)
    role = f"onnx-{'int8' if target.precision == 'int8' else 'fp32'}"
    if target.runtime == "tensorrt":
        precision = "int8" if target.precision == "int8" else "fp16"
        engine, role = folder / "student.engine", f"engine-{precision}"
        run_captured("deploy.build_trt", model, f"--{precision}", "-o", engine)
        model = engine
    result = folder / "latency.result.json"
    words = ["--data", target.data, "--role", role, "--runs", target.runs, "--max-warmup-s", WARM_UP_S, "-o", result]
    for flag, value in (("--threads", target.threads), ("--fps", target.fps)):
        words += [] if value is None else [flag, value]
    if not has_split(target.data, "test"):
        words += ["--split", "val"]
    run_captured("benchmarks.latency", model, *words)
    numbers = read_json(result, MeasurementError, "a result file")["numbers"]
    return Measured(
        p99_ms=float(numbers["summary_ms"]["total"]["p99"]),
        size_mib=model.stat().st_size / 2**20,
        memory_mib=numbers["memory_mib"]["host_peak"],
    )


def export(candidate: Candidate, data: CocoSet, path: Path) -> None:
    """
    Writes a candidate with random weights as an ONNX file with its contract.

    Raises:
        ExportError: it cannot be exported.
    """
    export_untrained(config_of(candidate, data.class_names), data.class_names, data.category_ids, path)


def export_untrained(
    config: Any, class_names: tuple[str, ...], category_ids: tuple[int, ...], path: Path, as_started: bool = False
) -> None:
    """
    Writes the detector of a config with random weights as an ONNX file with its contract.

    Args:
        config: whose head predicts these classes.
        as_started: begin the head as a training does, which detects nothing; else it detects something everywhere, and
            post-processing has most to do.

    Raises:
        ExportError: it cannot be exported.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from crosskd.models.contract import contract_from_config
    from crosskd.models.deployed import OPSET, onnx_from_detector
    from crosskd.models.detector import detector_from_config

    torch.manual_seed(0)
    detector = detector_from_config(config, load_weights=False)
    if as_started:
        detector.bbox_head.init_weights()
    contract = contract_from_config(config, class_names, category_ids)
    for module in detector.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            if not module.weight.any():
                torch.nn.init.constant_(module.weight, 0.2)  # timm begins some with zeros, of which there is no range
    with torch.no_grad():  # the statistics of noise, or values would grow from layer to layer, beyond what compares
        detector.train().bbox_head(detector.extract_feat(torch.randn(4, *contract.input_shape[1:])))
    detector.eval()
    onnx_from_detector(detector, contract, path)
    parameters = sum(one.numel() for one in detector.parameters())
    write_sidecar(path, {"config": config.filename}, contract, {"opset": OPSET, "parameters": parameters})


def measured_on_boards(model: Path, boards: Path, folder: Path) -> Measured:
    """
    What a model takes on a list of boards: of several the slowest.

    Raises:
        PipelineError: it cannot be bundled. MeasurementError: a board answered with an error; all are named.
    """
    bundle, output = folder / "student.tar.gz", folder / "fleet"
    run_captured("deploy.bundle", model, "-o", bundle)
    run_status("benchmarks.fleet", boards, bundle, "-o", output)
    document = read_json(output / "fleet.json", MeasurementError, "what benchmarks.fleet wrote")
    outcomes = document["outcomes"]
    failed = [f"{one['board']} ({one['reason']})" for one in outcomes if one["state"] != "ok" or one["p99_ms"] is None]
    if failed:
        raise MeasurementError(
            f"{len(failed)} of {len(outcomes)} boards could not be measured: {'; '.join(failed)}. Put that right and "
            "run the same command again: what was measured is kept"
        )
    return Measured(max(float(one["p99_ms"]) for one in outcomes), model.stat().st_size / 2**20, None)


def split_to_measure_on(data: str) -> str:
    """test, or val where there is no test split."""
    return SPLITS[2] if has_split(data, SPLITS[2]) else SPLITS[1]
