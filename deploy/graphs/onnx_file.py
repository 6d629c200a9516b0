"""An ONNX file with its sidecar, checked to be one that TensorRT can be asked to build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, NamedTuple

from deploy.contract import ModelContract, load_contract, read_sidecar
from deploy.graphs.dla_ranges import DlaRanges, ranges_for_dla
from deploy.graphs.graph import check_graph, check_static, count_parameters, load_onnx
from deploy.graphs.precision import is_quantised

if TYPE_CHECKING:
    import onnx


class OnnxFile(NamedTuple):
    """A float or a quantised graph, and what its sidecar says."""

    path: Path
    model: onnx.ModelProto
    contract: ModelContract
    sidecar: Dict[str, Any]

    @property
    def is_quantised(self) -> bool:
        """Whether the graph has Q/DQ nodes."""
        return is_quantised(self.model)

    @property
    def dla_ranges(self) -> DlaRanges:
        """What a DLA is told of the ranges of a quantised graph."""
        return ranges_for_dla(self.model, self.sidecar["details"])

    @property
    def parameters(self) -> int:
        """How many numbers the network has learnt."""
        return count_parameters(self.model)


def read_onnx_file(path: Path) -> OnnxFile:
    """
    The graph at `path`, its hash compared with its sidecar.

    Raises:
        ContractError: the file does not match its sidecar or cannot be read.
        ExportError: the graph is not valid, or sizes other than the batch are not fixed.
    """
    contract = load_contract(path)
    model = load_onnx(path)
    check_graph(model)
    check_static(model, contract.input_shape[0] == -1, contract.outputs == "nms")
    return OnnxFile(path, model, contract, read_sidecar(path))
