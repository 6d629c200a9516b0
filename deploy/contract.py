"""
The model contract and the sidecars that carry it.

Every artefact `X` has a sidecar `X.json`, written last and atomically. It says what made `X` (inputs with their hashes,
command, package versions, time) and, for a model, how to feed it and read it: the contract. Later stages take what
they need from there, never from a second flag.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import mmap
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from deploy.errors import ContractError, MeasurementError
from deploy.files import AnyPath, read_json, sha256_of, write_json
from deploy.limits import LARGEST_INPUT_VALUES, MOST_DETECTIONS
from deploy.schema import Items, Maybe, Number, Whole, check_content

SCHEMA_VERSION = 1
RESULT_VERSION = 2
"""Of the result files of benchmarks, which says what the versions are."""
PACKAGES = (
    "crosskd", "torch", "torchvision", "mmdet", "onedl-mmdetection", "onedl-mmcv", "onedl-mmengine",
    "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "opencv-python-headless",
    "opencv-python", "faster-coco-eval",
)  # fmt: skip
RUN_WEIGHTS = ("student.pth", "detector.pth")
"""What a training leaves in its run directory: of crosskd.distill, of crosskd.train."""
LAYOUTS = {"float32": ("N", "3", "height", "width"), "uint8": ("N", "height", "width", "3")}
"""Type of the network's input -> its dimensions."""
WHOLE = ("input_shape", "category_ids", "max_detections", "resize_wh_px")
"""Fields of whole numbers."""
OUTPUTS = {
    "topk": ("boxes", "scores", "labels"),
    "nms": ("boxes", "scores", "labels", "images"),
    "rows": ("detections",),
}
"""Kind of outputs -> what they are, in order; the names that they have unless others are chosen."""
LOCATION = b"\n\x08location\x12"
"""How the key of that name is written in an ONNX file, up to its value."""
DYNAMIC = -1
"""The batch size of a contract whose graph takes any number of images."""
INPUTS = {str: {"file": str, "sha256": str}}
"""Table of what a sidecar or a result says of the files that something was made from."""
CONTRACT: Dict[Any, Any] = {
    "input_name": str,
    "input_shape": Items(int, 4, 4),
    "channel_order": str,
    "mean": Items(float, 3, 3),
    "std": Items(Number(1e-9), 3, 3),
    "pad_value": Items(float, 3, 3),
    "resize": str,
    "output_names": [str],
    "class_names": [str],
    "category_ids": [int],
    "score_threshold": float,
    "nms_iou_threshold": float,
    "max_detections": Whole(1, MOST_DETECTIONS),
    "input_type": str,
    "outputs": str,
    "resize_wh_px": (Items(int, 2, 2), None),
}
"""Table of a model contract, but for what its values say of each other."""
_STRING_OR_NULL = (str, None)
_PART = Number(-1.001, 1.001)
INT8_BUDGET: Dict[Any, Any] = {
    "max_int8_drop": Number(0, 100),
    "ships": _STRING_OR_NULL,
    "sentence": str,
    "rungs": Items(
        {
            "title": str,
            "file": str,
            "ap": _PART,
            "drop": _PART,
            "low": _PART,
            "high": _PART,
            "holds": bool,
            "int8_share": (_PART, None),
            "median_ms": Number(0),
            "comparable": bool,
            "elapsed_s": Number(0),
        }
    ),
}
"""Table of what `calibration.choose` says of how INT8 was reached."""
DETAILS: Dict[Any, Any] = {
    "class_names": [str],
    "category_ids": [int],
    "parameters": (Whole(0), None),
    "target": str,
    "precision": str,
    "ranges": {str: Items(float, 2, 2)},
    "int8_budget": INT8_BUDGET,
    "int8_predictors": bool,
    "float_convolutions": {str: str},
    "float_convolution_codes": {str: str},
    "tensorrt": str,
    "device": str,
    "compute_capability": str,
    "cuda_runtime": str,
    "cuda_driver": str,
    "dla_core": (Whole(0, 63), None),
    "version_compatible": bool,
    "hardware_compatible": bool,
    "keep_differing": bool,
    "board": _STRING_OR_NULL,
    "power_mode": _STRING_OR_NULL,
    "coverage": {"layers": ({"int8": {"count": Whole(0)}}, None)},
    "golden": ({"compared": Number(0), "matched": Number(0, 1 + 1e-9), "agrees": Maybe(bool)}, None),
}
"""Table of those of a sidecar's details that programs read; each is of the kinds of artefact that have it."""
SIDECAR: Dict[Any, Any] = {
    "schema_version": int,
    "artefact": {"file": str, "sha256": str, "bytes": int},
    "inputs": INPUTS,
    "command": [str],
    "versions": {str: str},
    "contract": Maybe(dict),
    "details": {key: Maybe(kind) for key, kind in DETAILS.items()},
}
_STARTED = time.time()


@dataclasses.dataclass(frozen=True)
class ModelContract:
    """How to feed a detector and how to read it."""

    input_name: str
    input_shape: Tuple[int, int, int, int]
    """As `input_type` says; N is -1 where the graph takes any number of images."""
    channel_order: str
    """'rgb' or 'bgr': the order of the channels of the input, of mean, std and pad_value."""
    mean: Tuple[float, float, float]
    """Subtracted from the pixel, 0 to 255."""
    std: Tuple[float, float, float]
    """Divides after the subtraction."""
    pad_value: Tuple[float, float, float]
    """Pixel value, 0 to 255, right of and below the resized image; equal to `mean` it is 0 after normalisation."""
    resize: str
    """'keep_ratio': the largest size of the same aspect ratio that fits, at the top left. 'stretch': both sides.

    Into `resize_wh_px` or, where that is None, into the whole input.
    """
    output_names: Tuple[str, ...]
    """As `outputs` says. Boxes are float32, x1 y1 x2 y2 in pixels of the input; scores float32; labels integer."""
    class_names: Tuple[str, ...]
    category_ids: Tuple[int, ...]
    """The COCO category id of each label."""
    score_threshold: float
    nms_iou_threshold: float
    max_detections: int
    """The most detections kept per image after NMS."""
    input_type: str = "float32"
    """'float32': (N, 3, height, width), normalised. 'uint8': (N, height, width, 3), pixels, normalised by the graph."""
    outputs: str = "topk"
    """'topk': boxes (N, K, 4), scores (N, K), labels (N, K) before NMS, the best K candidates of all levels.

    'nms': boxes (D, 4), scores (D,), labels (D,) after threshold and NMS, and images (D,) integer: the index in the
    batch that each is of. D is known only after the inference.

    'rows': those of 'topk' in one tensor, detections (N, K, 6) float32: x1 y1 x2 y2 score label.
    """
    resize_wh_px: Optional[Tuple[int, int]] = None
    """Width and height that images are resized into, where the input is larger: 1333 x 800 in mmdet's 1344 x 800."""

    def __post_init__(self) -> None:
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        check_content(listed, CONTRACT, "model contract", ContractError)

        def check(good: bool, field: str, expected: str) -> None:
            if not good:
                raise ContractError(f"model contract: {field} is {getattr(self, field)!r}; expected {expected}")

        check(self.input_type in LAYOUTS, "input_type", f"one of {list(LAYOUTS)}")
        shape, layout = self.input_shape, LAYOUTS[self.input_type]
        check(
            len(shape) == 4
            and shape[layout.index("3")] == 3
            and min(shape[1:]) > 0
            and (shape[0] > 0 or shape[0] == DYNAMIC),
            "input_shape",
            f"({', '.join(layout)}), all positive, or N = -1 for any",
        )
        check(self.outputs in OUTPUTS, "outputs", f"one of {list(OUTPUTS)}")
        check(self.channel_order in ("rgb", "bgr"), "channel_order", "'rgb' or 'bgr'")
        check(self.resize in ("keep_ratio", "stretch"), "resize", "'keep_ratio' or 'stretch'")
        into = self.resize_wh_px
        check(
            into is None
            or (len(into) == 2 and 0 < into[0] <= self.input_width_px and 0 < into[1] <= self.input_height_px),
            "resize_wh_px",
            "null, or width and height, positive and no larger than the input's",
        )
        values = shape[0] * shape[1] * shape[2] * shape[3]
        check(values <= LARGEST_INPUT_VALUES, "input_shape", f"at most {LARGEST_INPUT_VALUES} values")
        expected = OUTPUTS[self.outputs]
        check(len(self.output_names) == len(expected), "output_names", f"{len(expected)} names: {', '.join(expected)}")
        names = self.output_names
        check(len(set(names)) == len(names) and all(names), "output_names", "names that differ")
        check(len(self.class_names) > 0, "class_names", "at least one name")
        for field in ("score_threshold", "nms_iou_threshold"):
            check(isinstance(getattr(self, field), (int, float)), field, "a number")
        check(len(self.category_ids) == len(self.class_names), "category_ids", f"{len(self.class_names)} ids")
        check(0 <= self.score_threshold < 1, "score_threshold", "0 <= threshold < 1")
        check(0 < self.nms_iou_threshold <= 1, "nms_iou_threshold", "0 < threshold <= 1")

    @property
    def input_height_px(self) -> int:
        return self.input_shape[LAYOUTS[self.input_type].index("height")]

    @property
    def input_width_px(self) -> int:
        return self.input_shape[LAYOUTS[self.input_type].index("width")]

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: AnyPath) -> ModelContract:
        """
        The contract in a sidecar's `contract` object.

        Raises:
            ContractError: a key is missing, unknown or of a wrong value; `source` is named.
        """
        check_content(document, {str: object}, source, ContractError)
        names = {field.name for field in dataclasses.fields(cls)}
        optional = {field.name for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}
        wrong = sorted((names ^ set(document)) - (optional - set(document)))
        if wrong:
            raise ContractError(f"{source}: contract has missing or unknown keys {wrong}; expected {sorted(names)}")
        values: Dict[str, Any] = {key: _value_from_json(key, value) for key, value in document.items()}
        try:
            return cls(**values)
        except ContractError as error:
            raise ContractError(f"{source}: {error}") from error

    def to_json(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)


def _value_from_json(key: str, value: Any) -> Any:
    """A list as a tuple, and a whole number as one where the field counts: 640.0 is 640."""
    if isinstance(value, list):
        return tuple(_value_from_json(key, one) for one in value)
    return int(value) if key in WHOLE and isinstance(value, float) and value.is_integer() else value


def external_files(path: AnyPath) -> List[str]:
    """
    The files beside an ONNX file in which it keeps weights (external data), as it names them; without the package onnx.

    They are found by their field in onnx.proto: `TensorProto.external_data` (13), whose first key is `location`.
    """
    if Path(path).suffix != ".onnx" or Path(path).stat().st_size == 0:
        return []
    found = set()
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(LOCATION)
        while start >= 0:
            length_at = start + len(LOCATION)
            if 0x6A in content[max(0, start - 3) : start]:  # the field's tag, then the length of the entry
                name = content[length_at + 1 : length_at + 1 + content[length_at]]
                found.add(name.decode("utf-8", "replace"))
            start = content.find(LOCATION, length_at)
    return sorted(found)


def sidecar_path(artefact: AnyPath) -> Path:
    """`X.json` for the artefact `X`."""
    return Path(f"{artefact}.json")


def package_versions() -> Dict[str, str]:
    """The installed version of each package that can change a result, and Python's."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def provenance(inputs: Mapping[str, AnyPath], command: Optional[List[str]] = None) -> Dict[str, Any]:
    """
    What made a file: the part that sidecars and result files share.

    Args:
        inputs: name -> file. Each is recorded with its SHA-256.
        command: the words of the command; by default this process's own.
    """
    words = command or this_command()
    return {
        "schema_version": SCHEMA_VERSION,
        "inputs": {name: {"file": str(path), "sha256": sha256_of(path)} for name, path in inputs.items()},
        "command": words,
        "versions": package_versions(),
        "created_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "elapsed_s": round(time.time() - _STARTED, 3),
    }


def this_command() -> List[str]:
    """The words of the command that this process runs: `python -m MODULE ARGUMENTS`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name, *sys.argv[1:]] if spec else ["python", *sys.argv]


def write_sidecar(
    artefact: AnyPath,
    inputs: Mapping[str, AnyPath],
    contract: Optional[ModelContract] = None,
    details: Optional[Mapping[str, Any]] = None,
    command: Optional[List[str]] = None,
) -> None:
    """
    Writes `artefact`'s sidecar; to be called when the artefact itself is in place.

    Args:
        inputs: name -> file, recorded with their hashes.
        details: what only this kind of artefact has to say, under the key `details`.
        command: as in `provenance`.
    """
    document = provenance(inputs, command)
    document["artefact"] = {
        "file": Path(artefact).name,
        "sha256": sha256_of(artefact),
        "bytes": Path(artefact).stat().st_size,
    }
    if contract is not None:
        document["contract"] = contract.to_json()
    document["details"] = dict(details or {})
    write_json(sidecar_path(artefact), document)


def read_sidecar(artefact: AnyPath, details: Sequence[str] = ()) -> Dict[str, Any]:
    """
    The sidecar of `artefact`, whose hash has been compared with the file.

    Args:
        details: keys of its details that must be there.

    Raises:
        ContractError: the artefact or its sidecar is missing, not as its table says, of another schema version, or the
            hash differs.
    """
    artefact, path = Path(artefact), sidecar_path(artefact)
    if not artefact.is_file():
        raise ContractError(f"no such file: {artefact}")
    document = read_json(
        path,
        ContractError,
        f"the sidecar that was written with {artefact.name}; keep the two together, or write one for a model from "
        "elsewhere with deploy.adopt_onnx",
    )
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version") if isinstance(document, dict) else document
        raise ContractError(
            f"{path}: schema_version is {found!r}; expected {SCHEMA_VERSION}. Make {artefact.name} again."
        )
    entry, found = document.get("artefact"), sha256_of(artefact)
    recorded = entry.get("sha256") if isinstance(entry, dict) else None
    if recorded != found:
        raise ContractError(
            f"{artefact} is not the file that its sidecar describes: its SHA-256 is {found[:12]}..., {path.name} says "
            f"{str(recorded)[:12]}... It was changed or truncated after it was made: make it again, or bring back "
            f"the original."
        )
    elsewhere = external_files(artefact)
    if elsewhere:
        raise ContractError(
            f"{artefact} keeps weights in other files ({', '.join(elsewhere)}), which its sidecar does not vouch for; "
            f"expected one file. Remove {path.name} and adopt the model anew: deploy.adopt_onnx writes one file"
        )
    document.setdefault("details", {})
    needed = {**SIDECAR["details"], **{key: DETAILS[key] for key in details}}
    check_content(document, {**SIDECAR, "details": needed}, path, ContractError, f"Make {artefact.name} again.")
    return document


def load_contract(artefact: AnyPath) -> ModelContract:
    """
    The model contract of `artefact`, read from its sidecar.

    Raises:
        ContractError: as `read_sidecar`, or the sidecar has no contract.
    """
    document = read_sidecar(artefact)
    if "contract" not in document:
        raise ContractError(f"{sidecar_path(artefact)} has no model contract; expected the sidecar of a detector")
    return ModelContract.from_json(document["contract"], sidecar_path(artefact))


def weights_of_run(run_dir: AnyPath) -> Path:
    """
    The weights file of a training's run directory; it has not been compared with its sidecar.

    Raises:
        ContractError: there is none, or more than one.
    """
    found = [path for path in (Path(run_dir) / name for name in RUN_WEIGHTS) if path.is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "neither"
        raise ContractError(
            f"{run_dir} holds {names} of {' and '.join(RUN_WEIGHTS)}; expected one: the folder of a finished run of "
            "crosskd.distill or crosskd.train"
        )
    return found[0]


def sealed(document: Mapping[str, Any]) -> Dict[str, Any]:
    """`document` with the hash of its content, which `check_seal` compares."""
    return {**document, "content_sha256": _content_sha256(document)}


def check_seal(document: Mapping[str, Any], path: AnyPath) -> None:
    """Raises MeasurementError if the content is not what was written."""
    recorded, found = document.get("content_sha256"), _content_sha256(document)
    if recorded != found:
        raise MeasurementError(
            f"{path} was edited: the hash of its content is {found[:12]}..., content_sha256 says "
            f"{str(recorded)[:12]}... Bring back the original, or measure again."
        )


def _content_sha256(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "content_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
