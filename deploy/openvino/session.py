"""Running ONNX files on OpenVINO's CPU plugin. Needs the package openvino."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from deploy.contract import load_contract
from deploy.errors import ContractError, MissingDependencyError, PipelineError
from deploy.files import AnyPath
from deploy.machine import thread_limit
from deploy.runtime.session import Arrays, Session, TensorInfo, check_tensors

OPENVINO_TYPES = {"f32": "float32", "f16": "float16", "u8": "uint8", "i32": "int32", "i64": "int64"}
"""OpenVINO's name of a type -> numpy's, for those that a detector's inputs and outputs have."""


class OpenVinoSession(Session):
    """
    An ONNX file on OpenVINO, on the CPU.

    What is FP32 in the graph is computed in FP32: by itself OpenVINO takes BF16 or FP16 where the processor has them.
    What has Q/DQ it computes in INT8, with the scales of the graph; where activations are signed, as in files for
    TensorRT, in float between them, and says so: its INT8 kernels give other results for them (AP 0.8 in place of 29.7
    for a NanoDet, whose depthwise convolutions follow a MaxPool; OpenVINO 2026.4).

    Args:
        path: the ONNX file, with its sidecar.
        threads: for operators; None leaves the choice to OpenVINO (one per physical core), but for what a container may
            use.

    Raises:
        MissingDependencyError: openvino is not installed.
        ContractError: the file does not match its sidecar or cannot be read.
    """

    def __init__(self, path: AnyPath, threads: Optional[int] = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingDependencyError("openvino", f"running {Path(path).name}", "pip install openvino") from error
        self.contract = load_contract(path)
        threads = thread_limit() if threads is None else threads
        words = f"{threads} threads" if threads is not None else "default threads"
        self.description = f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU, {words}"
        settings: Dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            read = core.read_model(str(path))
            if _has_signed_activations(read):
                settings["LP_TRANSFORMS_MODE"] = "NO"
                self.description += ", no INT8 kernels"
                print(
                    f"{path}: its activations are signed, for which OpenVINO's INT8 kernels give wrong results: it is "
                    "computed in float, and slowly. For INT8 on OpenVINO: calibration.quantize --target onnxruntime",
                    file=sys.stderr,
                )
            model = core.compile_model(read, "CPU", settings)
        except RuntimeError as error:
            raise ContractError(f"OpenVINO cannot open {path}: {_reason(error)}. Export the model again.") from error
        batch = self.contract.input_shape[0]
        self.batch_limits = (batch, batch) if batch > 0 else (1, sys.maxsize)
        names = (self.contract.input_name, *self.contract.output_names)
        inputs, outputs = ([_tensor(port, names) for port in ports] for ports in (model.inputs, model.outputs))
        check_tensors(inputs, outputs, self.contract, path)
        self._request: Any = model.create_infer_request()

    def infer(self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None) -> Arrays:
        array = self._input_of(feed)
        if self._request is None:
            raise PipelineError(f"{self.description}: the session is closed; open another")
        try:
            start = time.perf_counter()
            self._request.infer([array], share_inputs=True)
            outputs = {name: self._request.get_tensor(name).data for name in self.contract.output_names}
        except RuntimeError as error:
            raise PipelineError(f"{self.description} could not run the model: {_reason(error)}") from error
        if times_ms is not None:
            times_ms["inference"] = 1e3 * (time.perf_counter() - start)
        return outputs

    def close(self) -> None:
        self._request = None  # the arrays that a caller still has of it live on


def _has_signed_activations(model: Any) -> bool:
    """Whether a QuantizeLinear to int8 reads anything but a constant: OpenVINO reads it as FakeQuantize and Convert."""
    for node in model.get_ops():
        if node.get_type_name() != "Convert" or node.get_output_element_type(0).get_type_name() != "i8":
            continue
        source = node.input_value(0).get_node()
        if source.get_type_name() == "FakeQuantize" and source.input_value(0).get_node().get_type_name() != "Constant":
            return True
    return False


def _reason(error: RuntimeError) -> str:
    """What OpenVINO says, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Exception from"))


def _tensor(port: Any, names: Sequence[str]) -> TensorInfo:
    """Of an input or output; a tensor that a node passes on as it is has several names, of which `names` chooses."""
    sizes = tuple(size.get_length() if size.is_static else -1 for size in port.get_partial_shape())
    kind = port.get_element_type().get_type_name()
    name = next((name for name in names if name in port.get_names()), port.get_any_name())
    return name, OPENVINO_TYPES.get(kind, kind), sizes
