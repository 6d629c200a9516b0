"""
TensorRT's calibration caches: the ranges of activations as text, for INT8 where explicit Q/DQ does not reach.

The DLA before TensorRT 11 takes INT8 only from ranges (developer guides of 8.x and 10.x, "Working with DLA"). They are
taken from the Q/DQ graph, which loses its Q/DQ in exchange, so that no images are needed on the board. A cache looks
like

    TRT-8503-EntropyCalibration2
    images: 3ca1204b

with a tensor and its scale on each line: largest value / 127, as the hexadecimal digits of a big-endian float32. NVIDIA
does not document the format; it is that of the caches which TensorRT 7 and 8 write.

Text needs nothing but numpy; what reads a graph needs onnx.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Container, Dict, Mapping, Optional

import numpy as np

from deploy.errors import CalibrationError, EngineBuildError
from deploy.files import AnyPath, replacing
from deploy.int8_format import LARGEST_INT8

if TYPE_CHECKING:
    import onnx

HEADER = re.compile(r"TRT-\d+-\w+")
LINE = re.compile(r"(?P<tensor>.+): (?P<scale>[0-9a-fA-F]{8})")
FLOAT32 = np.finfo(np.float32)


def text_from_amax(amax: Mapping[str, float], tensorrt_version: str) -> str:
    """
    The text of a calibration cache for `IInt8EntropyCalibrator2` of one version of TensorRT.

    Args:
        amax: tensor -> largest absolute value, positive.
        tensorrt_version: as `tensorrt.__version__` says it: "8.5.3", "10.3.0.30".

    Raises:
        CalibrationError: a value is none that a float32 scale can stand for, or a name has a line break.
    """
    major, minor, patch = (int(number) for number in re.findall(r"\d+", tensorrt_version)[:3])
    # NV_TENSORRT_VERSION of NvInferVersion.h: two digits for each part from 10.0 on
    number = (major * 100 + minor) * 100 + patch if major >= 10 else (major * 10 + minor) * 100 + patch
    lines = [f"TRT-{number}-EntropyCalibration2"]
    for tensor, largest in amax.items():
        if not is_scale(largest / LARGEST_INT8):
            raise CalibrationError(
                f"the largest value of the tensor {tensor!r} is {largest}; expected it finite and above 0: it has no "
                "INT8 scale. Calibrate again, on images of which the network makes something"
            )
        if len(tensor.splitlines()) != 1:
            raise CalibrationError(f"the tensor {tensor!r} has a line break in its name, which a cache cannot hold")
        lines.append(f"{tensor}: {struct.pack('>f', largest / LARGEST_INT8).hex()}")
    return "\n".join(lines) + "\n"


def is_scale(scale: float) -> bool:
    """Whether a float32 holds it as a number above 0 and in full precision: not 0, negative, denormal, inf or NaN."""
    return float(FLOAT32.tiny) <= scale <= float(FLOAT32.max)


def amax_from_text(text: str, source: AnyPath, tensors: Optional[Container[str]] = None) -> Dict[str, float]:
    """
    Tensor -> largest absolute value, of a cache that TensorRT or `text_from_amax` wrote.

    Args:
        tensors: those that are wanted, None for all. Of others TensorRT's own caches may hold what is no scale.

    Raises:
        CalibrationError: it is no cache, a line is broken, or a scale of those wanted is none; `source` is named.
    """
    header, *lines = text.splitlines() or [""]
    if not HEADER.fullmatch(header.strip()):
        raise CalibrationError(
            f"{source} begins with {header[:40]!r}; expected a calibration cache of TensorRT, which begins like "
            "'TRT-8503-EntropyCalibration2'"
        )
    found = {}
    for number, line in enumerate(lines, start=2):
        match = LINE.fullmatch(line.strip())
        if not match:
            raise CalibrationError(
                f"{source}, line {number} is {line[:60]!r}; expected 'tensor: ' and 8 hexadecimal digits. The file may "
                "be truncated: make it again."
            )
        tensor, (scale,) = match["tensor"], struct.unpack(">f", bytes.fromhex(match["scale"]))
        if tensors is not None and tensor not in tensors:
            continue
        if not is_scale(scale):
            raise CalibrationError(
                f"{source}, line {number}: the scale of the tensor {tensor!r} is {scale} ({match['scale']}); expected "
                "a finite float32 above 0 that is no denormal. The calibration saw nothing there, or an overflow: "
                "calibrate again on images (--data), or leave that tensor's layers in float"
            )
        found[tensor] = scale * LARGEST_INT8
    return found


def read_cache(path: AnyPath, tensors: Optional[Container[str]] = None) -> Dict[str, float]:
    """
    Tensor -> largest absolute value, of a cache file.

    Args:
        tensors: those that are wanted, None for all.

    Raises:
        CalibrationError: the file is missing, no cache, or broken, or a scale of those wanted is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path} ({error}); expected a calibration cache of TensorRT") from error
    return amax_from_text(text, path, tensors)


def write_cache(path: AnyPath, amax: Mapping[str, float], tensorrt_version: str) -> None:
    """Writes the cache of `text_from_amax`, atomically."""
    text = text_from_amax(amax, tensorrt_version)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def amax_from_quantised(model: onnx.ModelProto) -> Dict[str, float]:
    """
    Tensor -> largest absolute value that INT8 holds, scale * 127, of each activation that has Q/DQ.

    Raises:
        EngineBuildError: a scale is not one constant number.
    """
    from onnx import numpy_helper

    from deploy.graphs.graph import constants

    known = constants(model)
    amax: Dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in known:
            continue
        scale = known.get(node.input[1])
        if scale is None or numpy_helper.to_array(scale).size != 1:
            raise EngineBuildError(
                f"{node.name or node.output[0]} (QuantizeLinear) has the scale {node.input[1]!r}; expected one "
                "constant number for an activation, as calibration.quantize --target tensorrt writes it"
            )
        largest = numpy_helper.to_array(scale).item() * LARGEST_INT8
        amax[node.input[0]] = max(largest, amax.get(node.input[0], 0.0))
    return amax


def float_from_quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    A copy of the model without its Q/DQ pairs: the float graph, its tensors under their names.

    Raises:
        EngineBuildError: integers come from elsewhere than a QuantizeLinear, or a pair stands before an output.
    """
    import onnx

    from deploy.graphs.graph import remove_unused

    result = onnx.ModelProto()
    result.CopyFrom(model)
    before = tensors_before_pairs(result)
    for node in result.graph.node:
        node.input[:] = [before.get(name, name) for name in node.input]
    remove_unused(result)
    return result


def tensors_before_pairs(model: onnx.ModelProto) -> Dict[str, str]:
    """
    Output of each DequantizeLinear -> the tensor that its pair rounds, before all pairs that stand in a row.

    Raises:
        EngineBuildError: as `float_from_quantised`.
    """
    quantised = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    before: Dict[str, str] = {}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            if node.input[0] not in quantised or node.output[0] in outputs:
                raise EngineBuildError(
                    f"the node {node.name or node.output[0]} (DequantizeLinear) is not the second of a pair within the "
                    "graph; expected a file of calibration.quantize --target tensorrt"
                )
            source = quantised[node.input[0]]
            before[node.output[0]] = before.get(source, source)
    return before
