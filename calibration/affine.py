"""
What is affine per channel beside a convolution becomes part of its weights, before anything is placed.

A constant Mul, Add, Sub or Div per channel (FrozenBatchNorm, exports of Keras) and BatchNormalization cost a way to
float and back between two convolutions in INT8. They are folded into the convolution before them, through a Concat
too, or, where that is not possible, into the convolutions that read them and do not pad. Needs the package onnx.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from deploy.graphs.graph import constants, consumers, producers, remove_unused
from deploy.graphs.products import Products

if TYPE_CHECKING:
    import onnx

OPERATORS = ("Mul", "Add", "Sub", "Div", "BatchNormalization")


class Affine(NamedTuple):
    """A node that computes scale * x + shift."""

    node: onnx.NodeProto
    read: str
    scale: np.ndarray
    """(channels,) or (1,), float64; so is the shift."""
    shift: np.ndarray


def fold_affine(model: onnx.ModelProto) -> str:
    """
    Folds what it can, in place; a sentence on what was folded, or nothing.

    Tensors keep their names where they keep their values. Convolutions of the final prediction stay as they are.
    """
    folded: List[str] = []
    while True:
        found = _Folding(model).step()
        if not found:
            break
        folded.append(found)
    if not folded:
        return ""
    remove_unused(model)
    del model.graph.value_info[:]
    counts = ", ".join(f"{count} {operator}" for operator, count in collections.Counter(folded).items())
    return f"affine nodes beside convolutions are folded into their weights: {counts}"


class _Folding:
    """The tables of a graph, and one change to it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.model, self.graph = model, model.graph
        self.known, self.made_by, self.read_by = constants(model), producers(model), consumers(model)
        self.outputs = {value.name for value in model.graph.output}
        self.final = Products(model).final
        self.array = numpy_helper.to_array

    def step(self) -> str:
        """Folds one node; its operator, or nothing where there is none left."""
        for node in self.graph.node:
            affine = self.affine(node) if node.op_type in OPERATORS else None
            if affine is not None and (self.into_makers(affine) or self.into_readers(affine)):
                self.graph.node.remove(node)
                return str(node.op_type)
        return ""

    def affine(self, node: onnx.NodeProto) -> Optional[Affine]:
        if node.output[0] in self.outputs:
            return None
        if node.op_type == "BatchNormalization":
            attributes = {entry.name: entry for entry in node.attribute}
            if len(node.output) > 1 or any(name not in self.known for name in node.input[1:]):
                return None
            epsilon = attributes["epsilon"].f if "epsilon" in attributes else 1e-5
            gain, bias, mean, variance = (self.array(self.known[name]).astype(np.float64) for name in node.input[1:])
            scale = gain / np.sqrt(variance + epsilon)
            return Affine(node, node.input[0], scale, bias - mean * scale)
        fixed = [index for index, name in enumerate(node.input) if name in self.known]
        if len(fixed) != 1 or (node.op_type == "Div" and fixed == [0]):
            return None
        values = self.array(self.known[node.input[fixed[0]]])
        is_vector = values.ndim in (3, 4) and values.size == values.shape[-3]
        if values.dtype != np.float32 or not ((values.size == 1 and values.ndim <= 4) or is_vector):
            return None
        values, one, zero = values.reshape(-1).astype(np.float64), np.ones(1), np.zeros(1)
        scale, shift = {
            "Mul": (values, zero),
            "Add": (one, values),
            "Sub": (one, -values) if fixed == [1] else (-one, values),
            "Div": (one / values, zero) if values.all() else (np.array([np.nan]), zero),
        }[node.op_type]
        affine = Affine(node, node.input[1 - fixed[0]], scale, shift)
        return affine if np.isfinite(scale).all() else None

    def is_foldable(self, node: Optional[onnx.NodeProto]) -> bool:
        """Whether it is a convolution over pictures, with weights that are known, and not of the final prediction."""
        return (
            node is not None
            and node.op_type == "Conv"
            and node.output[0] not in self.final
            and all(name in self.known for name in node.input[1:] if name)
            and len(self.known[node.input[1]].dims) == 4
            and self.array(self.known[node.input[1]]).dtype == np.float32
        )

    def is_read_once(self, tensor: str) -> bool:
        return len(self.read_by.get(tensor, [])) == 1 and tensor not in self.outputs

    def into_makers(self, affine: Affine) -> bool:
        """Into the convolution that makes what the node reads, or into those behind a Concat of channels."""
        maker, output = self.made_by.get(affine.read), affine.node.output[0]
        if maker is None or not self.is_read_once(affine.read):
            return False
        if self.is_foldable(maker):
            self.scale_outputs(maker, affine.scale, affine.shift)
            maker.output[0] = output
            return True
        makers = [self.made_by.get(name) for name in maker.input]
        if not (_joins_channels(maker) and all(map(self.is_foldable, makers))):
            return False
        if not all(map(self.is_read_once, maker.input)):
            return False
        convolutions = [one for one in makers if one is not None]
        sizes = [self.known[one.input[1]].dims[0] for one in convolutions]
        ends = np.cumsum(sizes)[:-1]
        scales, shifts = (np.split(np.broadcast_to(v, sum(sizes)), ends) for v in (affine.scale, affine.shift))
        for index, (convolution, scale, shift) in enumerate(zip(convolutions, scales, shifts)):
            self.scale_outputs(convolution, scale, shift)
            convolution.output[0] = maker.input[index] = f"{output}/part_{index}"
        maker.output[0] = output
        return True

    def into_readers(self, affine: Affine) -> bool:
        """Into the convolutions that read what the node makes, or a Concat of channels with it in it."""
        output, readers = affine.node.output[0], [node for node, _ in self.read_by.get(affine.node.output[0], [])]
        scale, shift, joined = affine.scale, affine.shift, None
        if len(readers) == 1 and _joins_channels(readers[0]) and list(readers[0].input).count(output) == 1:
            joined = readers[0]
            vectors = self.spread(joined, affine)
            if vectors is None or joined.output[0] in self.outputs:
                return False
            scale, shift = vectors
            readers = [node for node, _ in self.read_by.get(joined.output[0], [])]
        if not readers or not all(map(self.is_foldable, readers)):
            return False
        if any(reader.input[0] not in (output, joined.output[0] if joined else output) for reader in readers):
            return False
        if shift.any() and any(map(_pads, readers)):
            return False
        for reader in readers:
            self.scale_inputs(reader, scale, shift)
        if joined is None:
            for reader in readers:
                reader.input[0] = affine.read
        else:
            joined.input[list(joined.input).index(output)] = affine.read
            joined.output[0] = f"{joined.output[0]}/unscaled_{affine.read}"
            for reader in readers:
                reader.input[0] = joined.output[0]
        return True

    def spread(self, joined: onnx.NodeProto, affine: Affine) -> Optional[Tuple[np.ndarray, np.ndarray]]:
        """(scale, shift) of all channels of a Concat, one of whose inputs is affine; None if their numbers are open."""
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(self.model).graph
        dims = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.input)}
        sizes = [dims[name][1].dim_value if len(dims.get(name, ())) == 4 else 0 for name in joined.input]
        if not all(sizes):
            return None
        index = list(joined.input).index(affine.node.output[0])
        scales, shifts = ([np.full(size, value) for size in sizes] for value in (1.0, 0.0))
        scales[index], shifts[index] = (np.broadcast_to(v, sizes[index]) for v in (affine.scale, affine.shift))
        return np.concatenate(scales), np.concatenate(shifts)

    def scale_outputs(self, node: onnx.NodeProto, scale: np.ndarray, shift: np.ndarray) -> None:
        weight, bias = self.weights(node)
        self.set_weights(node, weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift)

    def scale_inputs(self, node: onnx.NodeProto, scale: np.ndarray, shift: np.ndarray) -> None:
        weight, bias = self.weights(node)
        groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
        channels = groups * weight.shape[1]
        of_group = np.arange(len(weight)) * groups // len(weight)  # of each output channel
        scales, shifts = (np.broadcast_to(v, channels).reshape(groups, -1)[of_group] for v in (scale, shift))
        self.set_weights(node, weight * scales[..., None, None], bias + (weight.sum((2, 3)) * shifts).sum(1))

    def weights(self, node: onnx.NodeProto) -> Tuple[np.ndarray, np.ndarray]:
        weight = self.array(self.known[node.input[1]]).astype(np.float64)
        has_bias = len(node.input) > 2 and node.input[2]
        return weight, self.array(self.known[node.input[2]]).astype(np.float64) if has_bias else np.zeros(len(weight))

    def set_weights(self, node: onnx.NodeProto, weight: np.ndarray, bias: np.ndarray) -> None:
        """Others may read the weights that it had: it gets new ones."""
        from onnx import numpy_helper

        taken = {tensor.name for tensor in self.graph.initializer} | set(self.made_by)
        names = []
        for values, kind in ((weight, "weight"), (bias, "bias")):
            base = f"{node.name or node.output[0]}/folded_{kind}"
            names.append(
                next(name for name in (base, *(f"{base}_{n}" for n in range(len(taken)))) if name not in taken)
            )
            self.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), names[-1]))
        node.input[:] = [node.input[0], *names]


def _joins_channels(node: onnx.NodeProto) -> bool:
    return node.op_type == "Concat" and any(entry.name == "axis" and entry.i in (1, -3) for entry in node.attribute)


def _pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution adds zeros at the edges, which a shift in its weights would not reach."""
    attributes: Dict[str, onnx.AttributeProto] = {entry.name: entry for entry in node.attribute}
    automatic = attributes["auto_pad"].s if "auto_pad" in attributes else b"NOTSET"
    return automatic not in (b"NOTSET", b"VALID") or ("pads" in attributes and any(attributes["pads"].ints))
