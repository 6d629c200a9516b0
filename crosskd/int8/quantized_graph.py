"""
Where an INT8 graph has its Q/DQ pairs, and what flows there: what fake quantisation in training has to repeat.

Reads the INT8 file that `calibration.quantize` wrote and the float file that it was made of. Needs onnx and
onnxruntime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from deploy.errors import CalibrationError
from deploy.graphs.graph import constants, load_onnx, producers, with_outputs
from deploy.graphs.products import weight_axis
from deploy.int8_format import SCALE_SUFFIX, Quantization


@dataclasses.dataclass(frozen=True)
class Operand:
    """An activation that a quantised node reads."""

    value: np.ndarray
    """In the float model, for the example input."""
    source: str | None
    """The tensor whose range its Q/DQ pair has; None without a pair."""


@dataclasses.dataclass(frozen=True)
class QuantizedNode:
    """A node that reads a pair, or that has an INT8 weight."""

    name: str
    op_type: str
    operands: list[Operand]
    weight: np.ndarray | None
    """The FP32 weight of a product whose weight is quantised, its output channels on the first axis."""


@dataclasses.dataclass(frozen=True)
class QuantizedGraph:
    """An INT8 graph as far as it is quantised."""

    nodes: list[QuantizedNode]
    quantizations: dict[str, Quantization]
    """Tensor whose range it is -> number format."""


def read_quantized_graph(int8_path: str | Path, float_path: str | Path, feed: dict[str, np.ndarray]) -> QuantizedGraph:
    """
    The quantised nodes of the INT8 file, with the values that the float file gives them for `feed`.

    Raises:
        ContractError: a file is missing or no ONNX.
        CalibrationError: the two are not one model, or there is no pair in the INT8 file.
    """
    int8, original = load_onnx(int8_path), load_onnx(float_path)
    readers, quantizations = _readers_of_pairs(int8)
    if not readers:
        raise CalibrationError(f"{int8_path} has no Q/DQ pairs; expected an INT8 model of calibration.quantize")
    originals = {node.output[0]: node for node in original.graph.node}
    strangers = [reader.node.output[0] for reader in readers if reader.node.output[0] not in originals]
    if strangers:
        raise CalibrationError(
            f"{int8_path} computes {strangers[0]}, {float_path} does not; expected the INT8 model that was made of it"
        )
    wanted = sorted({name for reader in readers for name in reader.sources} - set(feed))
    values = {**feed, **values_of(original, wanted, feed)}
    fixed = constants(original)

    def weight_of(product: onnx.NodeProto) -> np.ndarray:
        return np.moveaxis(numpy_helper.to_array(fixed[product.input[1]]), weight_axis(product), 0)

    nodes = [
        QuantizedNode(
            reader.node.name or reader.node.output[0],
            reader.node.op_type,
            [Operand(values[name], source) for name, source in reader.sources.items()],
            weight_of(originals[reader.node.output[0]]) if reader.has_weight else None,
        )
        for reader in readers
    ]
    return QuantizedGraph(nodes, quantizations)


class _Reader(NamedTuple):
    """A node of an INT8 file that reads pairs."""

    node: onnx.NodeProto
    sources: dict[str, str | None]
    """Activation that it reads -> tensor whose range the pair between has; None without a pair."""
    has_weight: bool
    """Whether its weight is INT8."""


def _readers_of_pairs(int8: onnx.ModelProto) -> tuple[list[_Reader], dict[str, Quantization]]:
    """The nodes that read pairs, in the order of the graph; and tensor whose range a pair has -> number format."""
    fixed, made_by = constants(int8), producers(int8)
    readers: list[_Reader] = []
    quantizations: dict[str, Quantization] = {}
    for node in int8.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        sources: dict[str, str | None] = {}
        has_weight = False
        for name in node.input:
            pair = made_by.get(name)
            if pair is None or pair.op_type != "DequantizeLinear":
                if name and name not in fixed:
                    sources[name] = None
                continue
            quantize = made_by.get(pair.input[0])
            tensor = quantize.input[0] if quantize is not None else pair.input[0]
            if tensor in fixed:
                has_weight = True
                continue
            source = sources[tensor] = pair.input[1].removesuffix(SCALE_SUFFIX)
            scale, zero_point = (numpy_helper.to_array(fixed[constant]) for constant in pair.input[1:])
            quantizations[source] = Quantization(float(scale), zero_point.reshape(-1)[0])
        if has_weight or any(sources.values()):
            readers.append(_Reader(node, sources, has_weight))
    return readers, quantizations


def values_of(model: onnx.ModelProto, tensors: Sequence[str], feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensor -> its value, of activations of the model."""
    opened = with_outputs(model, tensors).SerializeToString()
    session = onnxruntime.InferenceSession(opened, providers=["CPUExecutionProvider"])
    return dict(zip(tensors, session.run(list(tensors), feed), strict=True))
