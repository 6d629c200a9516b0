"""
Where the Q/DQ pairs of a float graph go.

What is quantised: products, that is convolutions, depthwise ones too, and matrix products by a constant (fully
connected layers, the projections of attention), both their input (one scale per tensor) and their weight (one scale per
output channel, symmetric), never one of the two. The final predictions and what follows them stay in float: rounding
there shrinks scores and moves boxes; so does what says where to read. Where it is asked for (`int8_predictors`), the
products of the final predictions are quantised, but nothing behind them. Matrix products of two activations (queries by
keys, attention by values) stay in float: on ONNX Runtime integers take as long there, and TensorRT has one kernel for
all of an attention in FP16, which Q/DQ within it would take apart; softmax, norms and GELU are float, too. Where the
pairs go depends on the target:

- `tensorrt` (signed, symmetric): on the input of each product; its output stays float, for TensorRT to fuse what
  follows. At an addition of a convolution's output, on the other branch, so that convolution, addition and ReLU become
  one kernel; not behind a matrix product, where the sum goes on from layer to layer and must not be rounded in each.
  MaxPool and nearest Resize only choose among values: one pair before them serves what comes after. All
  else between two products is float in the graph: activations that do not fuse, bilinear Resize, average pools, the
  Sigmoid and Mul of gates, and the Concat, Reshape, Transpose and Split of a channel shuffle, past which TensorRT may
  itself move the pair.
  https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
- `onnxruntime` (unsigned activations, signed weights): ONNX Runtime's integer convolutions want integers in and out, so
  also on the output of each convolution, after the ReLU that it fuses with (a Clip from 0 on, too; one that saturates
  elsewhere runs in float between two pairs); matrix products give float. An operator of INTEGER_OPS gets one on its
  output where all of its inputs are integers and some product reads what comes of it; one that only chooses or
  moves values has a pair on both sides, of one scale. What has no integer kernel (bilinear Resize, HardSwish,
  HardSigmoid) runs in float between the pairs of its neighbours. What is made in float is read in float by all that
  are not integer.
  https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence, Set, Tuple

from deploy.errors import ConfigError
from deploy.graphs.graph import constants, consumers, producers
from deploy.graphs.products import Products, attribute, only_decodes, weight_axis
from deploy.int8_format import FloatReason
from deploy.targets import TARGETS

if TYPE_CHECKING:
    import onnx

MOVING_OPS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split")
"""Operators whose outputs are values of the first input, in other places: one scale fits both."""
INTEGER_PRODUCTS = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger")
"""Operators of a graph that was quantised to another format than Q/DQ pairs."""
FEWEST_INPUTS = 16
"""Values to a sum of a matrix product in INT8. Of fewer, such as a box's sides, rounding costs more than it saves."""
FEWEST_OUTPUTS = 32
"""Of a predicting convolution in INT8: with fewer, integers to float take as long as float (ONNX Runtime 1.31)."""
INTEGER_OPS = ("Add", "Mul", "Concat", "LeakyRelu", "Sigmoid", "AveragePool", "GlobalAveragePool")
"""Operators with uint8 kernels in ONNX Runtime's CPU provider: docs/ContribOperators.md of version 1.31, QLinear*."""


class FloatGraph:
    """
    A model with the tables that placing Q/DQ needs.

    Args:
        keep_float: names of nodes, or of the blocks whose nodes' names begin with them ("/backbone/layer1"): their
            products stay in float.
        int8_predictors: whether the products of the final predictions are quantised.

    Raises:
        ConfigError: a name of `keep_float` is that of no product that would be quantised.
    """

    def __init__(self, model: onnx.ModelProto, keep_float: Sequence[str] = (), int8_predictors: bool = False) -> None:
        self.model = model
        self.int8_predictors = int8_predictors
        self.nodes = list(model.graph.node)
        self.constants = constants(model)
        self.producers = producers(model)
        self.consumers = consumers(model)
        special = Products(model)
        self.products = special.nodes
        """Convolutions and matrix products, in the order of the graph."""
        self.predictors = {node.output[0] for node in self.products if self._is_predictor(node, special)}
        """Output names of the products of the final predictions that could be quantised."""
        self.kept = self._kept_products(special)
        for name in keep_float:
            self._keep(name)
        self.quantized = [node for node in self.products if node.output[0] not in self.kept]
        """The products to quantise."""

    def _kept_products(self, special: Products) -> Dict[str, FloatReason]:
        """Output name of each product that has to stay in float -> why."""
        kept: Dict[str, FloatReason] = {}
        for node in self.products:
            reason = special.last.get(node.output[0])
            if reason is FloatReason.FINAL_PREDICTION and self.int8_predictors and node.output[0] in self.predictors:
                reason = None
            reason = reason or self._hindrance(node)
            if reason is not None:
                kept[node.output[0]] = reason
        return kept

    def _hindrance(self, node: onnx.NodeProto) -> Optional[FloatReason]:
        """Why a product cannot be quantised, whatever it is for; None if it can be."""
        import onnx

        operands = [self.constants.get(name) for name in node.input[1:]]
        if node.op_type == "MatMul" and operands[0] is None:
            return FloatReason.TWO_ACTIVATIONS
        if any(tensor is None or tensor.data_type != onnx.TensorProto.FLOAT for tensor in operands):
            return FloatReason.NOT_CONSTANT
        if node.op_type == "Conv":
            return None
        weight, *bias = ([] if tensor is None else tensor.dims for tensor in operands)
        plain = not attribute(node, "transA") and all(attribute(node, name, 1) == 1 for name in ("alpha", "beta"))
        if len(weight) != 2 or not plain or bias not in ([], [[weight[weight_axis(node)]]]):
            return FloatReason.FORM
        return FloatReason.FEW_INPUTS if weight[1 - weight_axis(node)] < FEWEST_INPUTS else None

    def _is_predictor(self, node: onnx.NodeProto, special: Products) -> bool:
        """Whether a product makes final predictions, has learnt weights, and is quicker from integers to float."""
        last = special.last.get(node.output[0]) is FloatReason.FINAL_PREDICTION
        if not last or only_decodes(node, self.constants) or self._hindrance(node) is not None:
            return False
        dims = self.constants[node.input[1]].dims
        is_plain = attribute(node, "group", 1) == 1 and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
        return node.op_type != "Conv" or (is_plain and len(dims) == 4 and dims[0] >= FEWEST_OUTPUTS)

    def _keep(self, name: str) -> None:
        chosen = [node for node in self.products if node_name(node) == name or node_name(node).startswith(f"{name}/")]
        if not chosen:
            names = [node_name(node) for node in self.products]
            raise ConfigError(
                f"--keep-float has {name!r}; expected the name of a convolution or matrix product, or of a block that "
                f"their names begin with, such as {names[0]!r}. The {len(names)} of them are: {', '.join(names)}"
            )
        for node in chosen:
            self.kept.setdefault(node.output[0], FloatReason.ASKED)

    def with_one(self, node: onnx.NodeProto) -> FloatGraph:
        """This graph with all products but `node`, one of `quantized`, in float."""
        other = copy.copy(self)
        others = [one.output[0] for one in self.quantized if one is not node]
        other.kept = {**self.kept, **dict.fromkeys(others, FloatReason.ASKED)}
        other.quantized = [node]
        return other

    @property
    def reasons(self) -> Dict[str, FloatReason]:
        """Name of each product in float, in the order of the graph -> why."""
        return {node_name(node): self.kept[node.output[0]] for node in self.products if node.output[0] in self.kept}

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


@dataclasses.dataclass
class Placement:
    """Where Q/DQ pairs for activations go."""

    pairs: Dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensor that has a pair -> tensor whose range it takes: itself, or where its values come from."""
    edges: Set[Tuple[str, int]] = dataclasses.field(default_factory=set)
    """Readers of a pair rather than of the float tensor: (first output of the node, index of its input)."""


def place_for_tensorrt(graph: FloatGraph) -> Placement:
    """Pairs on the inputs of products and on the skip branch of additions; see the module's docstring."""
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
    made: Set[str] = set()  # of these, what an integer kernel makes
    for node in graph.quantized:
        integers[node.input[0]] = node.input[0]
        if node.op_type == "Conv" and node.output[0] not in graph.predictors:
            integers[graph.activation(node)] = graph.activation(node)
            made.add(graph.activation(node))
    wanted = set(integers)
    for node in graph.nodes:
        if only_moves(node) and node.input[0] in integers:
            integers.update(dict.fromkeys(node.output, integers[node.input[0]]))
            made.update(node.output)
        elif node.op_type in INTEGER_OPS and all(name in integers for name in node.input):
            integers.setdefault(graph.activation(node), graph.activation(node))
            made.add(graph.activation(node))
    for node in reversed(graph.nodes):
        moves = only_moves(node)
        outputs = list(node.output) if moves else [graph.activation(node)]
        inputs = [node.input[0]] if moves else list(node.input) if node.op_type in INTEGER_OPS else []
        if inputs and wanted.intersection(outputs) and all(name in integers for name in inputs):
            wanted.update(inputs + outputs)
    pairs = {name: source for name, source in integers.items() if name in wanted}
    quantized = {node.output[0] for node in graph.quantized}

    def reads_integers(node: onnx.NodeProto, index: int) -> bool:
        if node.output[0] in quantized or only_moves(node):
            return index == 0
        return node.op_type in INTEGER_OPS and graph.activation(node) in pairs

    readers = {name: graph.consumers.get(name, []) for name in pairs}
    return Placement(
        pairs,
        {
            (node.output[0], index)
            for name, nodes in readers.items()
            for node, index in nodes
            if name in made or reads_integers(node, index)
        },
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

    Where both do, the one with fewer products behind it: the downsampling or lateral one.
    """
    convolutions = [node.output[0] for node in graph.quantized if node.op_type == "Conv"]
    from_convolution = {name for name in convolutions if len(graph.readers(name)) == 1}
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
    """Tensor -> number of products on the longest path to it."""
    depths: Dict[str, int] = {}
    products = {node.output[0] for node in graph.products}
    for node in graph.nodes:
        depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.output[0] in products)
        depths.update(dict.fromkeys(node.output, depth))
    return depths
