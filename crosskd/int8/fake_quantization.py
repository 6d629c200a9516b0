"""
INT8 while training: a student computes with the rounding of its INT8 graph, and learns to live with it.

The graph's Q/DQ pairs are put on the calls that the detector makes of torch's functions, by a TorchFunctionMode: to a
shared head each level is a call of its own, with scales of its own, and residual and top-down additions have their
pairs. Quantisers of modules, such as torchao's and ModelOpt's, give neither. Which call is which node of the graph is
found by value: both compute the same for the same input.

- Activations: torch's own fake quantisation with a learnt scale, whose gradient is that of LSQ ("Learned Step Size
  Quantization", Esser et al., arXiv 1902.08153, eq. 3, scaled as in its section 2.2). A scale is its calibrated value
  times exp(offset): so it stays positive, and any optimiser moves all scales alike and by weight decay towards
  calibration.
- Weights: per output channel, the largest absolute value becomes 127, as `calibration` quantises them; straight-through
  gradient. A BatchNorm is part of the weight before it, as in the exported graph; its running statistics stay still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from crosskd.int8.quantized_graph import QuantizedGraph, QuantizedNode
from deploy.errors import ConfigError
from deploy.graphs.products import channel_axis
from deploy.int8_format import LARGEST_INT8, SMALLEST_SCALE, Quantization

OPERATORS = {
    "conv2d": ("Conv",), "linear": ("Gemm", "MatMul"), "add": ("Add",), "add_": ("Add",), "max_pool2d": ("MaxPool",),
    "interpolate": ("Resize",),
}  # fmt: skip
"""Name of torch's function -> operators that it is in a graph; of others any that reads the same value is taken."""
KNOWN_OPERATORS = {operator for operators in OPERATORS.values() for operator in operators}
WEIGHTED = ("conv2d", "linear")
"""Functions whose second argument is a weight, its output channels on the first axis."""
TOLERANCE = 1e-3
"""Of the values in torch and in ONNX Runtime, as a share of the largest."""
SAMPLES = 10_000
"""Of a tensor's values, by which it is known: all activations of a detector would take gigabytes."""

CallKey = tuple[str, int]
"""Name of a function of torch, and how many calls of it in a forward pass came before."""


@dataclasses.dataclass
class Site:
    """What INT8 rounds in one call of a torch function: its activations, its weight."""

    pairs: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Place among the call's arguments, as tree_flatten numbers them -> number of the range, channels of the tensor:
    the second size, but of a matrix product the last."""
    has_weight: bool = False
    norm: _BatchNorm | None = None
    """Follows the convolution, and is folded into its weight by exporting."""


@dataclasses.dataclass
class _Sample:
    """What a tensor is known by."""

    shape: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def of(cls, tensor: np.ndarray) -> _Sample:
        flat = tensor.reshape(-1)
        return cls(tensor.shape, flat[:: max(1, flat.size // SAMPLES)].copy())  # what comes next may work in place

    def as_rows(self) -> _Sample:
        """Of the tensor as a matrix, all but its last dimension joined."""
        return _Sample((math.prod(self.shape[:-1]), *self.shape[-1:]), self.values)


@dataclasses.dataclass
class _Call:
    """One call in the pass by which the nodes are found."""

    key: CallKey
    inputs: dict[int, _Sample]
    """Place -> value, of the tensors that the detector computed."""
    weight: Tensor | None
    norm: _BatchNorm | None = None

    def places_of(self, value: np.ndarray) -> list[int]:
        """Where the call reads a value. A graph may have all rows that a matrix product reads in one dimension."""
        as_rows = self.key[0] == "linear" and value.ndim == 2
        inputs = {place: sample.as_rows() if as_rows else sample for place, sample in self.inputs.items()}
        return [place for place, sample in inputs.items() if _same(sample, value)]

    @functools.cached_property
    def folded_weight(self) -> _Sample:
        """The weight of the product with its norm folded in, as the exported graph has it."""
        weight = torch.zeros(0) if self.weight is None else self.weight.detach()
        return _Sample.of((weight if self.norm is None else weight * _factor_of(self.norm).detach()).numpy())


class _Calls(TorchFunctionMode):
    """Numbers the calls of torch's functions and leaves each to `visit`."""

    def __init__(self, visit: Callable[[CallKey, Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.visit = visit
        self.before: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.silu:  # a Sigmoid and a Mul in the graph, each of which rounds
            with self:
                return args[0] * args[0].sigmoid()
        key = (function.__name__, self.before[function.__name__])
        self.before[function.__name__] += 1
        return self.visit(key, function, args, kwargs or {})


class FakeQuantization(nn.Module):
    """
    The rounding of an INT8 graph for the detector that it was exported from, with learnt ranges of activations.

    Args:
        detector: a plain mmdet detector; it is not kept as a submodule.
        graph: its INT8 graph, with values for `images`.
        images: (1, 3, height, width), float32: the input that the values are of.

    Raises:
        ConfigError: a quantised node of the graph is none of the detector's calls, or the detector makes other calls in
            training than in evaluation.
    """

    calibrated: Tensor
    """(ranges,): the scales that training starts with."""
    zero_points: Tensor
    """(ranges,)"""
    offsets: nn.Parameter
    """(ranges,): of each scale, by exp(offset), from the calibrated one."""

    def __init__(self, detector: nn.Module, graph: QuantizedGraph, images: Tensor) -> None:
        super().__init__()
        check_calls_in_training(detector)
        self.sources = sorted(graph.quantizations)
        """The tensor that each range is of."""
        formats = self._formats = [graph.quantizations[source] for source in self.sources]
        self.offsets = nn.Parameter(torch.zeros(len(formats)))
        self.register_buffer("calibrated", torch.tensor([number.scale for number in formats]))
        self.register_buffer("zero_points", torch.tensor([float(number.zero_point) for number in formats]))
        self._norms = [module for module in detector.modules() if isinstance(module, _BatchNorm)]
        self._sites = sites_of_calls(graph.nodes, recorded_calls(detector, images), self.sources)
        self._scales = self.calibrated
        self._quantized: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}

    @property
    def scales(self) -> Tensor:
        """(ranges,): the scales of now, calibrated times learnt."""
        return self.calibrated * self.offsets.exp()

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Tensor -> smallest and largest value that its scale can tell, as calibration.quantize --ranges takes them."""
        formats = zip(self.sources, self.scales.tolist(), self._formats, strict=True)
        return {source: Quantization(scale, start.zero_point).range for source, scale, start in formats}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Makes one forward pass of the detector inside the block round as its INT8 graph does."""
        for norm in self._norms:  # each time, since a runner sets the training mode anew
            norm.eval()
        self._quantized.clear()
        self._scales = self.scales
        with _Calls(self._visit):
            yield

    def as_read(self, tensor: Tensor) -> Tensor:
        """The rounded values that the last pass read of a tensor, or the tensor itself if it read it unrounded."""
        return next((rounded for read, _, rounded in self._quantized.values() if read is tensor), tensor)

    def _visit(self, key: CallKey, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = self._sites.get(key)
        if site is None:
            return function(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        for place, (number, channels) in site.pairs.items():
            found = leaves[place].shape[-1 if key[0] == "linear" else 1]
            if found != channels:
                raise ConfigError(
                    f"--quantize int8: in training the detector calls {key[0]} for the time {key[1] + 1} with {found} "
                    f"channels, as it was exported with {channels}; expected a detector that computes alike in both"
                )
            leaves[place] = self._rounded(leaves[place], number)
        if site.has_weight:
            leaves[1] = rounded_weight(leaves[1], site.norm)
        args, kwargs = tree_unflatten(leaves, structure)
        return function(*args, **kwargs)

    def _rounded(self, tensor: Tensor, number: int) -> Tensor:
        """Once for all calls that read it: the towers of a head share a level of the pyramid."""
        kept = self._quantized.get((id(tensor), number))
        if kept is None or kept[1] != tensor._version:
            smallest, largest = self._formats[number].limits
            rounded = torch._fake_quantize_learnable_per_tensor_affine(
                tensor.float(),
                self._scales[number : number + 1],
                self.zero_points[number : number + 1],
                smallest,
                largest,
                1 / math.sqrt(tensor.numel() * largest),
            )
            kept = self._quantized[id(tensor), number] = (tensor, tensor._version, rounded)
        return kept[2]


def sites_of_calls(
    nodes: Sequence[QuantizedNode], calls: Sequence[_Call], sources: Sequence[str]
) -> dict[CallKey, Site]:
    """
    Call -> what is quantised of it.

    Args:
        nodes: the quantised ones of a graph. calls: the detector's. sources: the tensor that each range is of.

    Raises:
        ConfigError: a node is none of the calls.
    """
    sites: dict[CallKey, Site] = {}
    lost = []
    for node in nodes:
        matching = [call for call in calls if _is_call_of(node, call)]
        if node.op_type in KNOWN_OPERATORS:  # one node, one call
            matching = [call for call in matching if call.key not in sites][:1]
        for call in matching:
            site = sites.setdefault(call.key, Site())
            site.has_weight, site.norm = node.weight is not None, call.norm
            for operand in node.operands:
                if operand.source is not None:
                    pair = sources.index(operand.source), operand.value.shape[channel_axis(node.op_type)]
                    site.pairs.update(dict.fromkeys(call.places_of(operand.value), pair))
        if not matching:
            lost.append(node)
    if lost:
        raise ConfigError(
            f"--quantize int8: {len(lost)} of the {len(nodes)} quantised operations of the exported graph cannot "
            f"be found in what the detector calls, such as {lost[0].name}. {_advice_on_lost(lost, len(nodes))}"
        )
    return sites


def _advice_on_lost(lost: Sequence[QuantizedNode], nodes: int) -> str:
    if 2 * len(lost) > nodes:
        return "Expected the student of the config to be that of --from: its layers, activations and all."
    products = " ".join(node.name for node in lost if node.weight is not None)
    return (
        "What is exported as other operations than torch calls has to stay in float: quantise with "
        f"calibration.quantize --keep-float {products or '...'} and give that file with --calibrated."
    )


def check_calls_in_training(detector: nn.Module) -> None:
    """
    Raises ConfigError if a module makes calls in training that it does not make in evaluation, by which calls are
    numbered: stochastic depth, or, to save memory, the forward pass again while gradients are computed, where nothing
    would round.
    """
    for name, module in detector.named_modules():
        for setting in ("with_cp", "grad_checkpointing", "drop_prob"):
            value = getattr(module, setting, None)
            if value:
                raise ConfigError(
                    f"--quantize int8: {setting} of the student's {name} is {value}; expected none, since calls are "
                    "found by their order, which has to be the same in training as in the exported graph. Switch it "
                    "off in the config: with_cp=False, drop_path_rate=0."
                )


def rounded_weight(weight: Tensor, norm: _BatchNorm | None) -> Tensor:
    """
    A product's weight as INT8 has it, to be followed by its norm.

    Args:
        weight: (output channels, ...).
        norm: in evaluation mode. The product of weight and factor is rounded, which the norm then multiplies again.
    """
    factor = None
    if norm is not None:
        factor = _factor_of(norm)
        factor = torch.where(factor == 0, torch.ones_like(factor), factor)  # nothing passes such a channel
        weight = weight * factor
    with torch.no_grad():
        scales = (weight.abs().flatten(1).amax(1) / LARGEST_INT8).clamp(min=SMALLEST_SCALE).float()
        zeros = torch.zeros_like(scales, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(weight.float(), scales, zeros, 0, -LARGEST_INT8, LARGEST_INT8)
    return weight if factor is None else weight / factor


def _factor_of(norm: _BatchNorm) -> Tensor:
    """(channels, 1, 1, 1): what a norm in evaluation mode multiplies by."""
    variance: Any = norm.running_var  # None in a norm that tracks nothing, which no exported graph folds
    factor = (variance + norm.eps).rsqrt()
    return (factor if norm.weight is None else factor * norm.weight).view(-1, 1, 1, 1)


def recorded_calls(detector: Any, images: Tensor) -> list[_Call]:
    """The calls of torch's functions in a forward pass of the detector in evaluation mode, as far as its head goes."""
    norms = {id(m.running_mean): m for m in detector.modules() if isinstance(m, _BatchNorm)}
    constant = {id(tensor) for tensor in (*detector.parameters(), *detector.buffers())}
    calls: list[_Call] = []
    made_by: dict[int, tuple[_Call, Any]] = {}  # by a convolution's output, kept so that no other gets its id

    def visit(key: CallKey, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        if key[0] == "batch_norm":
            call, _ = made_by.pop(id(leaves[0]), (None, None))
            if call is not None:
                call.norm = norms.get(id(leaves[1]))
            return function(*args, **kwargs)
        inputs = {
            place: _Sample.of(leaf.numpy())
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in constant
        }
        output = function(*args, **kwargs)
        if inputs and any(isinstance(leaf, Tensor) for leaf in tree_flatten(output)[0]):  # chunk gives several
            calls.append(_Call(key, inputs, leaves[1] if key[0] in WEIGHTED else None))
            if key[0] == "conv2d":
                made_by[id(output)] = calls[-1], output
        return output

    was_training = detector.training
    detector.eval()
    with torch.no_grad(), _Calls(visit):
        detector.bbox_head(detector.extract_feat(images))
    detector.train(was_training)
    return calls


def _is_call_of(node: QuantizedNode, call: _Call) -> bool:
    operators = OPERATORS.get(call.key[0])
    if node.op_type not in (operators or ()) and (operators is not None or node.op_type in KNOWN_OPERATORS):
        return False
    if node.weight is not None and not _same(call.folded_weight, node.weight):
        return False
    values = [operand.value for operand in node.operands if operators is not None or operand.source is not None]
    return all(call.places_of(value) for value in values)


def _same(sample: _Sample, tensor: np.ndarray) -> bool:
    if sample.shape != tensor.shape:
        return False
    expected = _Sample.of(tensor).values
    return bool(np.abs(sample.values - expected).max() <= TOLERANCE * max(float(np.abs(expected).max()), 1e-12))
