"""
The commands of a bundle on a board: `build`, `check` and `detect` of `run.py`, and the bundle itself.

Needs numpy and what runs the model: TensorRT 8.5 or newer with one of cuda-python and pycuda, or ONNX Runtime, for
which nothing is built. `detect` also needs OpenCV. `run.py` has compared the files with the manifest before anything
here runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional

import numpy as np

from deploy.arrays import array_from_npy
from deploy.board.run import MANIFEST
from deploy.contract import OUTPUTS, ModelContract, read_sidecar
from deploy.errors import ConfigError, ContractError, MissingDependencyError
from deploy.files import read_regular
from deploy.runtime.golden import (
    BUILD_ANEW,
    RUN_ELSEWHERE,
    TOLERANCES,
    Tolerance,
    check_agreement,
    measure_agreement,
    words_of_agreement,
)
from deploy.runtime.session import Arrays, Session, open_session
from deploy.runtime.sources import add_picture_arguments, picture_options_from_arguments
from deploy.schema import FileName, Maybe, Whole, check_content, read_checked
from deploy.targets import TARGETS, Target, target_from_path
from deploy.tensorrt.engine import NetworkSource, make_engine, open_machine
from deploy.tensorrt.options import add_build_arguments, check_options, options_from_arguments

BUNDLE_VERSION = 2
SOURCE_OF: Dict[str, Dict[str, str]] = {
    "tensorrt": {"int8": "int8", "fp16": "float", "fp32": "float"},
    "onnxruntime": {"int8": "int8_onnxruntime", "fp32": "float"},
}
"""Runtime -> precision, the best for a board first -> the kind of ONNX file that it is built from, or runs."""
KINDS = {
    "float": "float graph",
    "int8": "graph quantised for TensorRT",
    "int8_onnxruntime": "graph quantised for ONNX Runtime",
}
"""Kind of ONNX file in a bundle -> what it is called in a message."""
MADE_BY = {
    "float": "the float ONNX file",
    "int8": "a file of calibration.quantize --target tensorrt",
    "int8_onnxruntime": "a file of calibration.quantize --target onnxruntime",
}
"""Kind of ONNX file in a bundle -> where it comes from."""

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
    "sources": {kind: Maybe(_SOURCE) for kind in KINDS},
    "versions": {str: str},
    "files": {str: {"sha256": str, "bytes": Whole(0)}},
}
"""Table of a bundle's manifest, but for its version."""


class BoardModel(NamedTuple):
    """What runs on a board: an engine that was built there, or an ONNX file of the bundle."""

    path: Path
    target: Target
    precision: str
    sidecar: Dict[str, Any]
    parameters: Optional[int]

    @property
    def details(self) -> Dict[str, Any]:
        """Those of its sidecar."""
        return self.sidecar["details"]

    @property
    def role(self) -> str:
        """What it is in the report."""
        named = [role.name for role in self.target.roles if role.precision == self.precision]
        return named[0] if named else f"{self.path.suffix[1:]}-{self.precision}"

    def open(self, threads: Optional[int] = None) -> Session:
        """Its session. Raises what `open_session` raises."""
        return open_session(self.path, threads=threads)


def golden_path(index: int, part: str) -> str:
    """Where in a bundle an array of the golden input `index` is; part: "input", "float.boxes", "int8.scores" ..."""
    return f"golden/{index}.{part}.npy"


def precisions_of(kinds: Collection[str], runtime: str) -> List[str]:
    """What this runtime can be given of a bundle of these kinds of ONNX files, the best for a board first."""
    return [precision for precision, kind in SOURCE_OF[runtime].items() if kind in kinds]


def best_precision(kinds: Collection[str], runtime: str) -> str:
    """
    The first of `precisions_of`.

    Raises:
        ConfigError: the bundle has nothing for this runtime.
    """
    able = precisions_of(kinds, runtime)
    if not able:
        wanted = " or ".join(MADE_BY[kind] for kind in dict.fromkeys(SOURCE_OF[runtime].values()))
        raise ConfigError(
            f"this bundle has nothing for {TARGETS[runtime].title}, only a "
            f"{' and a '.join(KINDS[kind] for kind in kinds)}. Give python -m deploy.bundle {wanted} too."
        )
    return able[0]


def source_kind(kinds: Collection[str], precision: str, runtime: str) -> str:
    """
    The kind of ONNX file, of those in a bundle, that this precision is built from, or that is run.

    Raises:
        ConfigError: the bundle has none.
    """
    kind = SOURCE_OF[runtime].get(precision)
    if kind in kinds:
        return str(kind)
    able = ", ".join(precisions_of(kinds, runtime)) or "nothing"
    title = TARGETS[runtime].title
    if kind is None:
        raise ConfigError(f"{title} has no --{precision} here; of this bundle it can run {able}")
    raise ConfigError(
        f"--{precision} needs the {KINDS[kind]}, which is not in this bundle; of it {title} can run {able}. "
        f"Give python -m deploy.bundle {MADE_BY[kind]} too."
    )


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

    def precisions(self, runtime: str) -> List[str]:
        """What this runtime can be given, the best for a board first."""
        return precisions_of(self.manifest["sources"], runtime)

    def best_precision(self, runtime: str) -> str:
        """As the function of that name."""
        return best_precision(self.manifest["sources"], runtime)

    def source(self, precision: str, runtime: str) -> Mapping[str, Any]:
        """
        What the manifest says of the ONNX file that this precision is built from, or that is run.

        Raises:
            ConfigError: the bundle has none.
        """
        return self.manifest["sources"][source_kind(self.manifest["sources"], precision, runtime)]

    def golden_inputs(self) -> List[np.ndarray]:
        """The fixed inputs, as the contract says."""
        return [self._array(index, "input") for index in range(self.manifest["golden"])]

    def golden_outputs(self, precision: str, runtime: str) -> List[Arrays]:
        """ONNX Runtime's outputs for each of the fixed inputs, of the ONNX file for this precision."""
        kind = SOURCE_OF[runtime][precision]
        names = dict(zip(OUTPUTS[self.contract.outputs], self.contract.output_names))
        return [
            {name: self._array(index, f"{kind}.{part}") for part, name in names.items()}
            for index in range(self.manifest["golden"])
        ]

    def tolerance(self, precision: str, runtime: str, dla_core: Optional[int] = None) -> Tolerance:
        """
        How far what runs on a board may differ from the golden outputs.

        For INT8 as it was measured when the bundle was made, but not on a DLA, which is INT8 between convolutions too.
        """
        measured = self.source(precision, runtime).get("tolerance")
        if not measured or dla_core is not None:
            return TOLERANCES[precision]
        return Tolerance(measured["box"], measured["logit"], measured["matched"])

    def _array(self, index: int, part: str) -> np.ndarray:
        path = self.folder / golden_path(index, part)
        try:
            return array_from_npy(read_regular(path))
        except (OSError, ValueError) as error:
            raise ContractError(f"cannot read {path}: {error}. Make the bundle again.") from error

    def model(self, path: Optional[Path]) -> BoardModel:
        """
        An engine file that was built here or an ONNX file of the bundle: `path`, or the one engine in its folder.

        Raises:
            ConfigError: `path` is None and there is no engine, or more than one.
            ContractError: it does not match its sidecar, or does not belong to this bundle.
        """
        path = path or self._only_engine()
        target = target_from_path(path)
        if target.name == "onnxruntime":
            return self._onnx_model(path, target)
        sidecar = read_sidecar(path, details=("precision", "parameters"))
        known = {entry["sha256"] for entry in self.manifest["files"].values()}
        if not all(entry.get("sha256") in known for entry in sidecar["inputs"].values()):
            raise ContractError(
                f"{path} was built from {sidecar['inputs']}, which is not in this bundle; expected an engine of this "
                "bundle's python3 run.py build: build it here"
            )
        return BoardModel(path, target, sidecar["details"]["precision"], sidecar, sidecar["details"]["parameters"])

    def _only_engine(self) -> Path:
        engines = sorted(self.folder.glob("*.engine"))
        if len(engines) > 1:
            raise ConfigError(f"{self.folder} holds {', '.join(one.name for one in engines)}; name one with --engine")
        if not engines:
            ready = [self.source(precision, "onnxruntime")["file"] for precision in self.precisions("onnxruntime")]
            instead = f", or for ONNX Runtime --engine {ready[0]}" if ready else ""
            raise ConfigError(
                f"{self.folder} holds no engine: run python3 run.py build first, or name --engine{instead}"
            )
        return engines[0]

    def _onnx_model(self, path: Path, target: Target) -> BoardModel:
        sidecar = read_sidecar(path)
        for precision in self.precisions(target.name):
            source = self.source(precision, target.name)
            if self.manifest["files"][source["file"]]["sha256"] == sidecar["artefact"]["sha256"]:
                return BoardModel(path, target, precision, sidecar, source["parameters"])
        able = [self.source(precision, target.name)["file"] for precision in self.precisions(target.name)]
        raise ContractError(
            f"{path} is no graph of this bundle that is meant for {target.title}; expected "
            f"{' or '.join(able) or 'one: give python -m deploy.bundle ' + MADE_BY['int8_onnxruntime']}"
        )


class GoldenSession(Session):
    """What ONNX Runtime gave for the fixed inputs, in place of ONNX Runtime."""

    def __init__(self, bundle: Bundle, precision: str, runtime: str) -> None:
        self.contract = bundle.contract
        self._made_with = bundle.manifest["versions"]
        self.description = f"ONNX Runtime {self._made_with.get('onnxruntime')}, when the bundle was made"
        self._pairs = list(zip(bundle.golden_inputs(), bundle.golden_outputs(precision, runtime)))

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
    source = bundle.source(options.precision, "tensorrt")
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
        GoldenSession(bundle, options.precision, "tensorrt"),
        bundle.tolerance(options.precision, "tensorrt", options.dla_core),
    )
    return 0


def _parse_build(bundle: Bundle, words: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 run.py build",
        description="Build an engine for this board; it is kept if it answers as it should.",
    )
    add_build_arguments(parser, bundle.best_precision("tensorrt"))
    parser.add_argument("-o", "--output", type=Path, help="engine file to write, *.engine (default: in the bundle)")
    arguments = parser.parse_args(words)
    if arguments.output is not None and arguments.output.suffix != ".engine":
        raise ConfigError(f"--output is {arguments.output}; expected a name that ends in .engine")
    return arguments


def check(folder: Path, words: Optional[List[str]] = None) -> int:
    """Runs the golden inputs through a model and compares its outputs with those that ONNX Runtime gave."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py check", description="Compare a model's answers with those that ONNX Runtime gave."
    )
    add_engine_argument(parser)
    bundle = Bundle(folder)
    model = bundle.model(parser.parse_args(words).engine)
    runtime = model.target.name
    golden = GoldenSession(bundle, model.precision, runtime)
    tolerance = bundle.tolerance(model.precision, runtime, model.details.get("dla_core"))
    advice = BUILD_ANEW if model.path.suffix == ".engine" else RUN_ELSEWHERE
    with model.open() as session:
        if model.details.get("keep_differing"):
            found = measure_agreement(golden, session, tolerance)
        else:
            found = check_agreement(golden, session, tolerance, advice)
        print(f"{model.path}: {words_of_agreement(found)}, by {session.description}")
    return 0


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --engine."""
    parser.add_argument(
        "--engine", type=Path, metavar="FILE", help="an engine built here (default: the only one in the bundle), or an "
        "ONNX file of the bundle, which ONNX Runtime runs as it is"
    )  # fmt: skip


def detect(folder: Path, words: Optional[List[str]] = None) -> int:
    """Draws what an engine of the bundle sees."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py detect",
        description="Draw what an engine sees in images, folders of them, videos, a camera (its number) or a stream. "
        "Needs OpenCV, which the other commands do not.",
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
    engine = Bundle(folder).model(arguments.engine).path
    from deploy.detector import Detector
    from deploy.runtime.pictures import detect_in_pictures

    options = picture_options_from_arguments(arguments, engine)
    with Detector(engine, options.score_threshold) as detector:
        print(f"{engine} on {detector.description}")
        detect_in_pictures(detector, detector.contract, options)
    return 0
