"""
The commands of a bundle on a board: `build`, `check` and `detect` of `run.py`, and the bundle itself.

Needs numpy, TensorRT 8.5 or newer and one of cuda-python and pycuda; `detect` also OpenCV. `run.py` has compared the
files with the manifest before anything here runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from deploy.arrays import array_from_npy
from deploy.board.run import MANIFEST
from deploy.contract import OUTPUTS, ModelContract, read_sidecar
from deploy.errors import ConfigError, ContractError, MissingDependencyError
from deploy.files import read_regular
from deploy.runtime.golden import TOLERANCES, Tolerance, check_agreement, measure_agreement, words_of_agreement
from deploy.runtime.session import Arrays, Session
from deploy.runtime.sources import add_picture_arguments, picture_options_from_arguments
from deploy.schema import FileName, Maybe, Whole, check_content, read_checked
from deploy.tensorrt.engine import NetworkSource, make_engine, open_machine
from deploy.tensorrt.options import add_build_arguments, check_options, options_from_arguments
from deploy.tensorrt.session import TrtSession

BUNDLE_VERSION = 1
SOURCE_OF = {"int8": "int8", "fp16": "float", "fp32": "float"}
"""Precision, the best for a board first -> the kind of ONNX file that it is built from."""

_GRAPH = {"file": str, "float_tensors": [str], "kept": {str: [str]}}
_SOURCE = {
    "file": FileName(),
    "parameters": (Whole(0), None),
    "amax": {str: float},
    "graphs": {str: _GRAPH},
    "tolerance": Maybe(({"box": float, "logit": float, "matched": float}, None)),
}
MANIFEST_KINDS: Dict[Any, Any] = {
    "contract": dict,
    "golden": Whole(1, 100),
    "sources": {"float": Maybe(_SOURCE), "int8": Maybe(_SOURCE)},
    "versions": {str: str},
    "files": {str: {"sha256": str, "bytes": Whole(0)}},
}
"""Table of a bundle's manifest, but for its version."""


def golden_path(index: int, part: str) -> str:
    """Where in a bundle an array of the golden input `index` is; part: "input", "float.boxes", "int8.scores" ..."""
    return f"golden/{index}.{part}.npy"


class Bundle:
    """
    An unpacked bundle.

    Raises:
        ContractError: it is of another version of this project.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        self.manifest: Dict[str, Any] = read_checked(
            path, {"bundle_version": int}, ContractError, "the manifest of a bundle"
        )
        version = self.manifest["bundle_version"]
        if version != BUNDLE_VERSION:
            raise ContractError(
                f"{path}: bundle_version is {version!r}; expected {BUNDLE_VERSION}. Make the bundle again."
            )
        check_content(self.manifest, MANIFEST_KINDS, path, ContractError, "Make the bundle again.")
        self.contract = ModelContract.from_json(self.manifest["contract"], folder / MANIFEST)

    @property
    def precisions(self) -> List[str]:
        """What can be built, the best for a board first."""
        return [precision for precision, kind in SOURCE_OF.items() if kind in self.manifest["sources"]]

    def source(self, precision: str) -> Mapping[str, Any]:
        """
        What the manifest says of the ONNX file that this precision is built from.

        Raises:
            ConfigError: the bundle has none.
        """
        if precision not in self.precisions:
            kind = "quantised" if precision == "int8" else "float"
            raise ConfigError(
                f"--{precision} needs the {kind} graph, which is not in this bundle; it can build "
                f"{', '.join(self.precisions)}. Give python -m deploy.bundle the {kind} ONNX file too."
            )
        return self.manifest["sources"][SOURCE_OF[precision]]

    def golden_inputs(self) -> List[np.ndarray]:
        """The fixed inputs, as the contract says."""
        return [self._array(index, "input") for index in range(self.manifest["golden"])]

    def golden_outputs(self, precision: str) -> List[Arrays]:
        """ONNX Runtime's outputs for each of the fixed inputs, of the ONNX file for this precision."""
        kind, names = SOURCE_OF[precision], dict(zip(OUTPUTS[self.contract.outputs], self.contract.output_names))
        return [
            {name: self._array(index, f"{kind}.{part}") for part, name in names.items()}
            for index in range(self.manifest["golden"])
        ]

    def tolerance(self, precision: str, dla_core: Optional[int]) -> Tolerance:
        """
        How far an engine may differ from the golden outputs.

        For INT8 as it was measured when the bundle was made, but not on a DLA, which is INT8 between convolutions too.
        """
        measured = self.source(precision).get("tolerance")
        if not measured or dla_core is not None:
            return TOLERANCES[precision]
        return Tolerance(measured["box"], measured["logit"], measured["matched"])

    def _array(self, index: int, part: str) -> np.ndarray:
        path = self.folder / golden_path(index, part)
        try:
            return array_from_npy(read_regular(path))
        except (OSError, ValueError) as error:
            raise ContractError(f"cannot read {path}: {error}. Make the bundle again.") from error

    def engine(self, path: Optional[Path]) -> Tuple[Path, Dict[str, Any]]:
        """
        An engine file and its sidecar's details: `path`, or the one engine in the bundle's folder.

        Raises:
            ConfigError: `path` is None and there is no engine, or more than one.
            ContractError: it does not match its sidecar, or was not built from this bundle.
        """
        if path is None:
            found = sorted(self.folder.glob("*.engine"))
            if not found:
                raise ConfigError(f"{self.folder} holds no engine: run python3 run.py build first, or name --engine")
            if len(found) > 1:
                raise ConfigError(f"{self.folder} holds {', '.join(one.name for one in found)}; name one with --engine")
            path = found[0]
        sidecar = read_sidecar(path, details=("precision", "parameters"))
        known = {entry["sha256"] for entry in self.manifest["files"].values()}
        if not all(entry.get("sha256") in known for entry in sidecar["inputs"].values()):
            raise ContractError(
                f"{path} was built from {sidecar['inputs']}, which is not in this bundle; expected an engine of this "
                "bundle's python3 run.py build: build it here"
            )
        return path, sidecar["details"]


class GoldenSession(Session):
    """What ONNX Runtime gave for the fixed inputs, in place of ONNX Runtime."""

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.contract = bundle.contract
        self._made_with = bundle.manifest["versions"]
        self.description = f"ONNX Runtime {self._made_with.get('onnxruntime')}, when the bundle was made"
        self._pairs = list(zip(bundle.golden_inputs(), bundle.golden_outputs(precision)))

    def infer(self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None) -> Arrays:
        for array, outputs in self._pairs:
            if np.array_equal(array, feed[self.contract.input_name]):
                return outputs
        raise ContractError(
            f"numpy {np.__version__} draws other noise here than numpy {self._made_with.get('numpy')} did when the "
            "bundle was made, so its outputs serve no more; install that numpy, or make the bundle with this one"
        )


def build(folder: Path, words: Optional[List[str]] = None) -> int:
    """Builds an engine, in the form that the TensorRT found here takes, and keeps it if it answers as it should."""
    bundle = Bundle(folder)
    arguments = _parse_build(bundle, words)
    options = options_from_arguments(arguments)
    output: Path = arguments.output or folder / f"{folder.name}.{options.precision}.engine"
    source = bundle.source(options.precision)
    machine = open_machine(options, output, arguments.timing_cache, arguments.no_timing_cache, arguments.verbose)
    check_options(machine.trt, options, bundle.contract)
    graph = source["graphs"][machine.recipe.graph]
    make_engine(
        machine,
        options,
        output,
        NetworkSource(
            (folder / graph["file"]).read_bytes(),
            graph["float_tensors"],
            graph["kept"],
            source["amax"],
            source["dla_half"],
            graph["float_convolutions"],
        ),
        bundle.contract,
        {"onnx": folder / source["file"], "graph": folder / graph["file"]},
        source["parameters"],
        GoldenSession(bundle, options.precision),
        bundle.tolerance(options.precision, options.dla_core),
    )
    return 0


def _parse_build(bundle: Bundle, words: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 run.py build",
        description="Build an engine for this board; it is kept if it answers as it should.",
    )
    add_build_arguments(parser, bundle.precisions[0])
    parser.add_argument("-o", "--output", type=Path, help="engine file to write, *.engine (default: in the bundle)")
    arguments = parser.parse_args(words)
    if arguments.output is not None and arguments.output.suffix != ".engine":
        raise ConfigError(f"--output is {arguments.output}; expected a name that ends in .engine")
    return arguments


def check(folder: Path, words: Optional[List[str]] = None) -> int:
    """Runs the golden inputs through an engine and compares its outputs with ONNX Runtime's."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py check", description="Compare an engine's answers with those of ONNX Runtime."
    )
    add_engine_argument(parser)
    bundle = Bundle(folder)
    path, details = bundle.engine(parser.parse_args(words).engine)
    with TrtSession(path) as session:
        compare = measure_agreement if details.get("keep_differing") else check_agreement
        precision = details["precision"]
        found = compare(GoldenSession(bundle, precision), session, bundle.tolerance(precision, details["dla_core"]))
        print(f"{path}: {words_of_agreement(found)}, by {session.description}")
    return 0


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --engine."""
    parser.add_argument(
        "--engine", type=Path, metavar="FILE", help="an engine built here (default: the only one in the bundle)"
    )


def detect(folder: Path, words: Optional[List[str]] = None) -> int:
    """Draws what an engine of the bundle sees."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py detect",
        description="Draw what an engine sees in images, folders of them, videos or a camera (its number). Needs "
        "OpenCV, which the other commands do not.",
    )
    add_engine_argument(parser)
    add_picture_arguments(parser)
    arguments = parser.parse_args(words)
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "opencv-python-headless", "python3 run.py detect, alone of the commands,",
            f"pip install opencv-python-headless (or apt install python3-opencv). Python says: {error}",
        ) from error  # fmt: skip
    engine, _ = Bundle(folder).engine(arguments.engine)
    from deploy.detector import Detector
    from deploy.runtime.pictures import detect_in_pictures

    options = picture_options_from_arguments(arguments, engine)
    with Detector(engine, options.score_threshold) as detector:
        print(f"{engine} on {detector.description}")
        detect_in_pictures(detector, detector.contract, options)
    return 0
