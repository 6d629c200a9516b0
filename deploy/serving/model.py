"""What a server has to know of a model file: its tensors and how many images it takes. Needs the package onnx."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from deploy.contract import DYNAMIC, ModelContract, load_contract, read_sidecar
from deploy.errors import ConfigError, ContractError
from deploy.files import sha256_of
from deploy.graphs.onnx_file import OnnxFile, read_onnx_file
from deploy.runtime.session import TensorInfo
from deploy.targets import target_from_path, version_numbers


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model file that is to be handed over."""

    path: Path
    contract: ModelContract
    details: Dict[str, Any]
    """Of its sidecar."""
    outputs: Tuple[TensorInfo, ...]
    """Sizes of -1 where the file leaves them open."""
    fewest: int
    most: Optional[int]
    """Images of one inference; None: any number."""
    onnx: Optional[OnnxFile]
    """None for an engine."""

    @property
    def is_engine(self) -> bool:
        return self.onnx is None


def read_served_model(path: Path) -> ServedModel:
    """
    The model at `path`, an ONNX file or an engine, compared with its sidecar.

    Raises:
        ContractError, ExportError: the file does not match its sidecar, or its graph cannot be deployed.
        ConfigError: of an engine: the ONNX file that it was built from is not there.
    """
    if target_from_path(path).suffix == ".onnx":
        source = read_onnx_file(path)
        batch = source.contract.input_shape[0]
        limits = (1, None) if batch == DYNAMIC else (batch, batch)
        return ServedModel(
            path, source.contract, source.sidecar["details"], _outputs(source), limits[0], limits[1], source
        )
    details = read_sidecar(path, details=("tensorrt", "precision"))["details"]
    contract = load_contract(path)
    outputs = _outputs(_built_from(path))
    if version_numbers(details["tensorrt"]) < (10,):  # it has no int64
        outputs = tuple((name, "int32" if kind == "int64" else kind, sizes) for name, kind, sizes in outputs)
    batch = contract.input_shape[0]
    fewest, _, most = (batch,) * 3 if batch != DYNAMIC else details.get("shapes") or (1, None, None)
    return ServedModel(path, contract, details, outputs, fewest, most, None)


def _built_from(engine: Path) -> OnnxFile:
    """The ONNX file that an engine was built from, which says the sizes of its outputs: an engine alone does not."""
    entry = read_sidecar(engine)["inputs"].get("onnx")
    if entry is None:
        raise ContractError(
            f"the sidecar of {engine} does not say what it was built from; expected one of deploy.build_trt or of a "
            "bundle's run.py build: build it anew"
        )
    recorded = Path(entry["file"])
    for path in (recorded, engine.with_name(recorded.name)):
        if path.is_file() and sha256_of(path) == entry["sha256"]:
            return read_onnx_file(path)
    raise ConfigError(
        f"{engine} was built from {recorded}, which is not there as it was; expected that file where it was, or beside "
        "the engine, with its sidecar: it says the sizes of the outputs"
    )


def _outputs(source: OnnxFile) -> Tuple[TensorInfo, ...]:
    from onnx import helper

    found = {}
    for value in source.model.graph.output:
        tensor = value.type.tensor_type
        sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
        found[value.name] = (value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, sizes)
    return tuple(found[name] for name in source.contract.output_names)
