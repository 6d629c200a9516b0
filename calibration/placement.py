"""
Where the Q/DQ pairs of a float graph go.

What is quantised: convolutions, depthwise ones too, both their input (one scale per tensor) and their weight (one scale
per output channel, symmetric), never one of the two. The final prediction convolutions and what follows them stay in
float: rounding there shrinks scores and moves boxes. Where the pairs go depends on the target:

- `tensorrt` (signed, symmetric): on the input of each convolution; its output stays float, for TensorRT to fuse what
  follows. At an addition of a convolution's output, on the other branch, so that convolution, addition and ReLU become
  one kernel. MaxPool and nearest Resize only choose among values: one pair before them serves what comes after. All
  else between two convolutions is float in the graph: activations that do not fuse, bilinear Resize, average pools, the
  Sigmoid and Mul of gates, and the Concat, Reshape, Transpose and Split of a channel shuffle, past which TensorRT may
  itself move the pair.
  https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
- `onnxruntime` (unsigned activations, signed weights): ONNX Runtime's integer kernels want integers in and out, so
  also on the output of each convolution, after the ReLU that it fuses with (a Clip from 0 on, too; one that saturates
  elsewhere runs in float between two pairs). An operator of INTEGER_OPS gets one on its
  output where all of its inputs are integers and some convolution reads what comes of it; one that only chooses or
  moves values has a pair on both sides, of one scale. What has no integer kernel (bilinear Resize, HardSwish,
  HardSigmoid) runs in float between the pairs of its neighbours.
  https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Callable, Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np

from deploy.errors import ConfigError
from deploy.graphs.graph import constants, consumers, producers
from deploy.int8_format import FloatReason
from deploy.targets import TARGETS

if TYPE_CHECKING:
    import onnx

MOVING_OPS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split")
"""Operators whose outputs are values of the first input, in other places: one scale fits both."""
INTEGER_PRODUCTS = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger")
"""Operators of a graph that was quantised to another format than Q/DQ pairs."""
FEWEST_DECODING_WEIGHTS = 4
"""Of a convolution that decodes: as many as there are sides of a box."""
INTEGER_OPS = ("Add", "Mul", "Concat", "LeakyRelu", "Sigmoid", "AveragePool", "GlobalAveragePool")
"""Operators with uint8 kernels in ONNX Runtime's CPU provider: docs/ContribOperators.md of version 1.31, QLinear*."""


class FloatGraph:
    """
    A model with the tables that placing Q/DQ needs.

    Args:
        keep_float: names of nodes, or of the blocks whose nodes' names begin with them ("/backbone/layer1"): their
            convolutions stay in float.

    Raises:
        ConfigError: a name of `keep_float` is that of no convolution that would be quantised.
    """

    def __init__(self, model: onnx.ModelProto, keep_float: Sequence[str] = ()) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = constants(model)
        self.producers = producers(model)
        self.consumers = consumers(model)
        self.convolutions = [node for node in self.nodes if node.op_type == "Conv"]
        self.kept = self._kept_convolutions()
        for name in keep_float:
            self._keep(name)
        self.quantized = [node for node in self.convolutions if node.output[0] not in self.kept]
        """The convolutions to quantise."""

    def _kept_convolutions(self) -> Dict[str, FloatReason]:
        """Output name of each convolution that has to stay in float -> why."""
        import onnx

        kept = dict.fromkeys(final_convolutions(self.model), FloatReason.FINAL_PREDICTION)
        for node in self.convolutions:
            operands = [self.constants.get(name) for name in node.input[1:]]
            if any(tensor is None or tensor.data_type != onnx.TensorProto.FLOAT for tensor in operands):
                kept.setdefault(node.output[0], FloatReason.NOT_CONSTANT)
        return kept

    def _keep(self, name: str) -> None:
        chosen = [
            node for node in self.convolutions if node_name(node) == name or node_name(node).startswith(f"{name}/")
        ]
        if not chosen:
            names = [node_name(node) for node in self.convolutions]
            raise ConfigError(
                f"--keep-float has {name!r}; expected the name of a convolution, or of a block that their names begin "
                f"with, such as {names[0]!r}. The {len(names)} convolutions are: {', '.join(names)}"
            )
        for node in chosen:
            self.kept.setdefault(node.output[0], FloatReason.ASKED)

    @property
    def reasons(self) -> Dict[str, FloatReason]:
        """Name of each convolution in float, in the order of the graph -> why."""
        return {node_name(node): self.kept[node.output[0]] for node in self.convolutions if node.output[0] in self.kept}

    def readers(self, tensor: str) -> List[onnx.NodeProto]:
        """The nodes that read the values of a tensor; Shape does not."""
        return [node for node, _ in self.consumers.get(tensor, []) if node.op_type != "Shape"]

    def activation(self, node: onnx.NodeProto) -> str:
        """The output of a node, after the ReLU or Clip that a runtime fuses with it."""
        readers = self.readers(node.output[0])
        return readers[0].output[0] if len(readers) == 1 and self._is_relu_like(readers[0]) else node.output[0]

    def _is_relu_like(self, node: onnx.NodeProto) -> bool:
        """Whether it cuts at 0, so that values in uint8 need no cutting; a Clip that saturates elsewhere does."""
        from onnx import numpy_helper

        if node.op_type != "Clip":
            return bool(node.op_type == "Relu")
        lowest = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        return lowest is not None and float(numpy_helper.to_array(lowest)) == 0


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or that of its output where it has none."""
    return node.name or node.output[0]


def final_convolutions(model: onnx.ModelProto) -> Set[str]:
    """
    Output names of the convolutions from which an output of the graph is reached without passing another convolution.

    Paths through Shape do not count: they carry no values. A convolution that only decodes is passed, and final, too.
    """
    made_by, known = producers(model), constants(model)
    pending, seen, final = [value.name for value in model.graph.output], set(), set()
    while pending:
        name = pending.pop()
        node = made_by.get(name)
        if node is None or name in seen or node.op_type == "Shape":
            continue
        seen.add(name)
        if node.op_type == "Conv":
            final.add(name)
            if only_decodes(node, known):
                pending.append(node.input[0])
        else:
            pending.extend(node.input)
    return final


def only_decodes(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> bool:
    """
    Whether a convolution has weights that nobody has learnt: it is part of what makes boxes of predictions.

    Such as the sum over the bins 0, 1, 2, ... of a distribution (DFL), or corners from centres and sizes: pointwise,
    and all of its weights multiples of a half, which learnt ones never are.
    """
    from onnx import numpy_helper

    tensor = known.get(node.input[1])
    if tensor is None or any(size != 1 for size in tensor.dims[2:]):
        return False
    weights = numpy_helper.to_array(tensor)
    doubled = 2 * weights.astype(np.float64)
    return bool(weights.size >= FEWEST_DECODING_WEIGHTS and np.unique(weights).size > 1 and (doubled % 1 == 0).all())


@dataclasses.dataclass
class Placement:
    """Where Q/DQ pairs for activations go."""

    pairs: Dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensor that has a pair -> tensor whose range it takes: itself, or where its values come from."""
    edges: Set[Tuple[str, int]] = dataclasses.field(default_factory=set)
    """Readers of a pair rather than of the float tensor: (first output of the node, index of its input)."""


def place_for_tensorrt(graph: FloatGraph) -> Placement:
    """Pairs on the inputs of convolutions and on the skip branch of additions; see the module's docstring."""
    placement = Placement()
    for node, index in [(node, 0) for node in graph.quantized] + _skip_branches(graph):
        placement.edges.add((node.output[0], index))
        name = node.input[index]
        while name in graph.producers and _only_chooses(graph.producers[name]):
            placement.edges.add((name, 0))
            name = graph.producers[name].input[0]
        placement.pairs[name] = name
    return placement


def place_for_onnxruntime(graph: FloatGraph) -> Placement:
    """Pairs on inputs and outputs of convolutions and of what ONNX Runtime runs in integers between them."""
    integers: Dict[str, str] = {}  # tensor that can have a pair -> tensor whose range it takes
    for node in graph.quantized:
        for name in (node.input[0], graph.activation(node)):
            integers[name] = name
    wanted = set(integers)
    for node in graph.nodes:
        if only_moves(node) and node.input[0] in integers:
            integers.update(dict.fromkeys(node.output, integers[node.input[0]]))
        elif node.op_type in INTEGER_OPS and all(name in integers for name in node.input):
            integers.setdefault(graph.activation(node), graph.activation(node))
    for node in reversed(graph.nodes):
        moves = only_moves(node)
        outputs = list(node.output) if moves else [graph.activation(node)]
        inputs = [node.input[0]] if moves else list(node.input) if node.op_type in INTEGER_OPS else []
        if inputs and wanted.intersection(outputs) and all(name in integers for name in inputs):
            wanted.update(inputs + outputs)
    pairs = {name: source for name, source in integers.items() if name in wanted}
    return Placement(
        pairs, {(node.output[0], index) for name in pairs for node, index in graph.consumers.get(name, [])}
    )


PLACEMENTS: Dict[str, Callable[[FloatGraph], Placement]] = {
    "tensorrt": place_for_tensorrt,
    "onnxruntime": place_for_onnxruntime,
}
"""Target -> where its pairs go."""
DEFAULT_TARGET = "tensorrt"


def has_signed_activations(target: str) -> bool:
    """Whether the target's graphs have activations in int8, symmetric about 0, rather than in uint8."""
    return bool(TARGETS[target].signed)


def only_moves(node: onnx.NodeProto) -> bool:
    """Whether the outputs hold values of the first input and no others, so that one scale fits both."""
    return node.op_type in MOVING_OPS or _only_chooses(node)


def _only_chooses(node: onnx.NodeProto) -> bool:
    if node.op_type == "Resize":
        return next((a.s for a in node.attribute if a.name == "mode"), b"nearest") == b"nearest"
    return node.op_type == "MaxPool"


def _skip_branches(graph: FloatGraph) -> List[Tuple[onnx.NodeProto, int]]:
    """
    (addition, index of its input) of the branch that does not come straight from the convolution that fuses with it.

    Where both do, the one with fewer convolutions behind it: the downsampling or lateral one.
    """
    from_convolution = {node.output[0] for node in graph.quantized if len(graph.readers(node.output[0])) == 1}
    depths = _depths(graph)
    branches = []
    for node in graph.nodes:
        if node.op_type == "Add" and not any(name in graph.constants for name in node.input):
            fusable = [index for index, name in enumerate(node.input) if name in from_convolution]
            if fusable:
                fused = max(fusable, key=lambda index: depths[node.input[index]])
                branches.append((node, 1 - fused))
    return branches


def _depths(graph: FloatGraph) -> Dict[str, int]:
    """Tensor -> number of convolutions on the longest path to it."""
    depths: Dict[str, int] = {}
    for node in graph.nodes:
        depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.op_type == "Conv")
        depths.update(dict.fromkeys(node.output, depth))
    return depths
