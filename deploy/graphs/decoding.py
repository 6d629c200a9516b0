"""
From the outputs that detectors elsewhere have to the one layout that every stage here reads, by standard operators.

What people export: one tensor of all rows, boxes beside scores of each class, boxes in fractions of the picture,
centres and sizes, logits, and maps of each level that are yet to be decoded. `OutputLayout` says which;
docs/adopt-a-detector.md shows it for families of detectors. Needs the package onnx.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ContractError, ExportError
from deploy.graphs.restrictions import MOST_TOP_K

if TYPE_CHECKING:
    import onnx

PARTS = ("boxes", "objectness", "scores", "score", "label")
"""What a row of an output holds, side by side. `scores`: one of each class; `score` and `label`: of the best class."""
ORDINARY = (("boxes",), ("score",), ("label",))
"""The parts of the outputs of a ModelContract, 'topk'."""
CHOICES: Dict[str, Tuple[str, ...]] = {
    "box_format": ("xyxy", "cxcywh", "xywh"),
    "box_units": ("pixels", "fractions"),
    "score_format": ("probabilities", "logits", "softmax_logits"),
    "background": ("none", "first", "last"),
    "decode": ("none", "distances", "bins", "grid"),
}
STRIDES = ((8, 16, 32), (8, 16, 32, 64), (8, 16, 32, 64, 128), (4, 8, 16, 32), (4, 8, 16, 32, 64), (16, 32), (32,))
"""Of the pyramids that are tried on a graph whose contract gives no strides."""
DECODING_OPSET = 13
"""The first in which the operators used here are as they are written here."""


@dataclasses.dataclass(frozen=True)
class OutputLayout:
    """
    How the outputs of a detector from elsewhere are to be read: fields beside those of the contract.

    What is None is found out from the graph and from its values on pictures.
    """

    output_parts: Optional[Tuple[Tuple[str, ...], ...]] = None
    """For each output what its rows hold, of PARTS. An output (N, K, width) has the rows one after the other, one
    (N, width, K) or (N, width, height, width) side by side; where several hold the same part, they are the levels."""
    box_format: Optional[str] = None
    """'xyxy': two corners. 'cxcywh': centre, width, height. 'xywh': the first corner, width, height."""
    box_units: Optional[str] = None
    """'pixels' of the network input, or 'fractions' of its width and height."""
    score_format: Optional[str] = None
    """'probabilities'; 'logits', which want a sigmoid, objectness too; 'softmax_logits', a softmax over the classes."""
    background: str = "none"
    """Where the classes of the graph have one more that is no object: 'first' (SSD, torchvision) or 'last' (DETR)."""
    decode: str = "none"
    """What the boxes are. 'distances': from a point to the left, upper, right and lower side, in strides.
    'bins': logits of a distribution over 0, 1, 2, ... of each of these. 'grid': offset of the centre from its cell and
    logarithm of the size, in strides (YOLOX)."""
    strides: Optional[Tuple[int, ...]] = None
    """Of the levels, where something is to be decoded."""
    point_offset: Optional[float] = None
    """Where in its cell a point lies, in strides: 0.5 is the middle, and what is taken for distances and bins where
    nothing is said; 0 is the corner, and what is taken for a grid."""
    candidates: int = 1000
    """The most candidates that are kept for NMS, of all classes and levels together."""
    constant_inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Second inputs, such as the size of the picture -> the values that they always get."""

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value is not None and value not in choices:
                raise ContractError(f"{field} is {value!r}; expected one of {list(choices)}")
        parts = self.output_parts
        if parts is not None and not (
            all(one and set(one) <= set(PARTS) and len(set(one)) == len(one) for one in parts) and _is_whole(parts)
        ):
            raise ContractError(
                f"output_parts is {parts!r}; expected for each output a list of {list(PARTS)}: boxes in as many "
                "outputs as scores, or as score and label"
            )
        if not (_is_whole_number(self.candidates) and 0 < self.candidates <= MOST_TOP_K):
            raise ContractError(
                f"candidates is {self.candidates!r}; expected 1 to {MOST_TOP_K}, the most that TensorRT sorts"
            )
        strides = self.strides
        if strides is not None and not (
            isinstance(strides, tuple) and strides and all(_is_whole_number(one) and one > 0 for one in strides)
        ):
            raise ContractError(f"strides is {strides!r}; expected positive whole numbers, such as [8, 16, 32]")
        offset = self.point_offset
        if offset is not None and not (isinstance(offset, (int, float)) and 0 <= offset <= 1):
            raise ContractError(f"point_offset is {offset!r}; expected 0 to 1")
        if not isinstance(self.constant_inputs, Mapping):
            raise ContractError(f"constant_inputs is {self.constant_inputs!r}; expected an object, name -> values")
        if self.decode == "none" and (strides is not None or offset is not None):
            raise ContractError(
                "strides or point_offset is given and decode is not; expected it, one of 'distances', 'bins', 'grid'"
            )
        if self.decode != "none" and (self.box_format is not None or self.box_units == "fractions"):
            raise ContractError(
                f"decode is {self.decode!r} and box_format or box_units is given, too; expected one of the two: "
                "decoded boxes are in pixels"
            )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OutputLayout:
        """Raises ContractError if a value is wrong."""
        values: Dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
        }
        parts = values.get("output_parts")
        if parts is not None:
            if not (isinstance(parts, tuple) and all(isinstance(one, (str, list)) for one in parts)):
                raise ContractError(f"output_parts is {parts!r}; expected for each output a list of {list(PARTS)}")
            values["output_parts"] = tuple((one,) if isinstance(one, str) else tuple(map(str, one)) for one in parts)
        for name in ("candidates", "strides"):  # 1000.0 is 1000
            values.update({name: _whole(values[name])} if name in values else {})
        return cls(**values)

    @property
    def is_ordinary(self) -> bool:
        """Whether the outputs are already those of a ModelContract."""
        return (
            self.output_parts == ORDINARY
            and (self.box_format, self.box_units, self.score_format) == ("xyxy", "pixels", "probabilities")
            and (self.background, self.decode) == ("none", "none")
        )


LAYOUT_FIELDS = tuple(field.name for field in dataclasses.fields(OutputLayout))


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_whole, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Output(NamedTuple):
    """An output of the graph as a run of it showed it."""

    name: str
    shape: Tuple[int, ...]
    dtype: np.dtype


def propose_parts(outputs: Sequence[Output], layout: OutputLayout, contract: ModelContract) -> OutputLayout:
    """
    The layout with its `output_parts`, taken from the shapes and, where these leave a choice, the names.

    Raises:
        ContractError: they do not tell; what was seen, and the fields that would tell, are in the message.
    """
    if layout.output_parts is not None:
        if len(layout.output_parts) != len(outputs):
            raise ContractError(
                f"output_parts has {len(layout.output_parts)} entries; expected one for each of the outputs "
                f"{[output.name for output in outputs]}"
            )
        return layout
    fitting = _fitting_parts(outputs, layout, contract)
    if len(fitting) != 1:
        many = f"could be {' or '.join(str([list(p) for p in parts]) for parts in fitting[:4])}"
        raise ContractError(
            f"the outputs are {_seen(outputs)}, of a detector with {len(contract.class_names)} classes: which holds "
            f"the boxes and which the scores {'cannot be told' if not fitting else many}."
            f"{'' if fitting else _what_would_fit(outputs, layout, contract)} Say it with output_names and "
            f"output_parts, for each output a list of {list(PARTS)}, and with background where the scores have a "
            "class more than class_names, with decode where boxes are yet to be decoded: see docs/adopt-a-detector.md"
        )
    return dataclasses.replace(layout, output_parts=fitting[0])


def _fitting_parts(
    outputs: Sequence[Output], layout: OutputLayout, contract: ModelContract
) -> List[Tuple[Tuple[str, ...], ...]]:
    """Every choice of parts that the shapes allow, or of these the ones that go with the names."""
    choices = [_possible_parts(output, layout, contract) for output in outputs]
    fitting = [parts for parts in itertools.product(*choices) if _is_whole(parts)]
    if len(fitting) == 1:
        return fitting
    named = [parts for parts in fitting if all(map(_is_named, (output.name for output in outputs), parts))]
    return named or fitting


def _what_would_fit(outputs: Sequence[Output], layout: OutputLayout, contract: ModelContract) -> str:
    """A sentence on the fields with which the outputs would fit; empty if there are none."""
    more = '"background": "first" (SSD, torchvision) or "last" (DETR)', {"background": "first"}
    bins = '"decode": "bins"', {"decode": "bins", "box_format": None, "box_units": None}
    for told, changes in (more, bins, (f"{more[0]} and {bins[0]}", {**more[1], **bins[1]})):
        if _fitting_parts(outputs, dataclasses.replace(layout, **changes), contract):
            classes = "" if told == bins[0] else ", or with a class more in class_names"
            return f" They fit with {told}{classes}."
    return ""


def _seen(outputs: Sequence[Output]) -> str:
    return ", ".join(f"{output.name} {output.shape} {output.dtype}" for output in outputs)


def _is_whole(parts: Sequence[Sequence[str]]) -> bool:
    """Whether there are boxes and either scores or score and label, and each of them in as many outputs."""
    counts = {part: sum(part in one for one in parts) for part in PARTS}
    wanted = ["boxes", "scores"] if counts["scores"] else ["boxes", "score", "label"]
    there = [count for part, count in counts.items() if count]
    return len(set(there)) == 1 and set(wanted) | {"objectness"} >= {p for p, c in counts.items() if c} >= set(wanted)


def _is_named(name: str, parts: Sequence[str]) -> bool:
    """Whether the name of an output goes with what it is taken for; where it says nothing it does."""
    name = name.lower()
    boxes = re.search("box|bbox|loc|reg|dis", name) is not None
    scores = re.search("score|cls|conf|class|prob|logit", name) is not None
    objectness = re.search("obj", name) is not None
    if objectness and not boxes and not scores:
        return tuple(parts) == ("objectness",)
    if boxes == scores:
        return True
    return ("boxes" in parts) == boxes


def _possible_parts(output: Output, layout: OutputLayout, contract: ModelContract) -> List[Tuple[str, ...]]:
    classes, is_label = _classes(layout, contract), np.issubdtype(output.dtype, np.integer)
    if len(output.shape) < 3 and not (len(output.shape) == 2 and contract.input_shape[0] == 1 < output.shape[0]):
        return [("label",)] if is_label else [("score",), ("scores",)] if classes == 1 else [("score",)]
    found: List[Tuple[str, ...]] = []
    for parts in (
        ("boxes",), ("scores",), ("objectness",), ("boxes", "scores"), ("boxes", "objectness", "scores"),
        ("scores", "boxes"), ("boxes", "score", "label"),
    ):  # fmt: skip
        if is_label or (layout.decode != "bins" and parts == ("scores", "boxes")):
            continue  # of a row with plain boxes that order is not usual: the contract says it
        try:
            _width_axis(output, parts, layout, contract)
        except ContractError:
            continue
        last_only = parts == ("boxes", "score", "label")  # (N, 6, K) is not usual: it is two classes, or one
        if not last_only or output.shape[-1] == 6:
            found.append(parts)
    return found


def _width_axis(
    output: Output, parts: Tuple[str, ...], layout: OutputLayout, contract: ModelContract
) -> Tuple[int, Dict[str, int]]:
    """
    (axis of the columns, part -> columns) of an output; an axis behind the last one where there is one column alone.

    Raises:
        ContractError: no axis is as wide as the parts.
    """
    shape, classes = output.shape, _classes(layout, contract)
    if len(shape) <= 2 and len(parts) == 1 and (parts[0] in ("score", "label") or (parts[0], classes) == ("scores", 1)):
        return len(shape), {parts[0]: 1}
    batch = contract.input_shape[0] if contract.input_shape[0] > 0 else shape[0]
    for axis in (len(shape) - 1, *([1] if len(shape) > 2 else [])):
        widths = _widths(parts, layout, classes, shape[axis])
        if sum(widths.values()) != shape[axis]:
            continue
        rows = math.prod(shape) // (shape[axis] * batch)
        if layout.decode != "none" and "boxes" in parts and rows not in _possible_counts(layout, contract):
            continue
        if layout.decode == "bins" and "boxes" in parts and not (widths["boxes"] >= 8 and widths["boxes"] % 4 == 0):
            continue
        return axis, widths
    raise ContractError(
        f"the output {output.name!r} is {shape}; expected {' + '.join(parts)}, of {classes} classes with decode "
        f"{layout.decode!r}, in its last dimension or in the one after the batch. Correct output_parts, class_names, "
        "background, decode or strides"
    )


def _classes(layout: OutputLayout, contract: ModelContract) -> int:
    """Of the graph, the background among them."""
    return len(contract.class_names) + (layout.background != "none")


def _widths(parts: Sequence[str], layout: OutputLayout, classes: int, width: int) -> Dict[str, int]:
    """Part -> columns, in an output of so many: of bins it has what is left."""
    found = {part: {"boxes": 4, "scores": classes}.get(part, 1) for part in parts}
    if "boxes" in found and layout.decode == "bins":
        found["boxes"] = width - sum(columns for part, columns in found.items() if part != "boxes")
    return found


def _possible_counts(layout: OutputLayout, contract: ModelContract) -> Set[int]:
    """How many points a level, or all together, may have."""
    size = contract.input_width_px, contract.input_height_px
    pyramids = (layout.strides,) if layout.strides else STRIDES
    of_levels = [[math.prod(-(-side // stride) for side in size) for stride in strides] for strides in pyramids]
    return {count for counts in of_levels for count in (*counts, sum(counts))}


class _Writer:
    """Appends nodes to a graph; their names begin with a prefix that nothing else has."""

    def __init__(self, model: onnx.ModelProto, batch: int) -> None:
        self.graph = model.graph
        self.opset = opset_of(model)
        self.batch = batch if batch > 0 else 0  # 0: Reshape's "as it is"
        taken = " ".join([*(name for node in self.graph.node for name in (node.name, *node.output))])
        taken += " ".join(tensor.name for tensor in self.graph.initializer)
        self.prefix = next(p for p in (f"decoding{'_' * i}/" for i in itertools.count()) if p not in taken)
        self.count = 0

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        name = f"{self.prefix}constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        return self.several(operator, *inputs, outputs=1, **attributes)[0]

    def several(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> List[str]:
        from onnx import helper

        self.count += 1
        name = f"{self.prefix}{operator}_{self.count}"
        names = [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        self.graph.node.append(helper.make_node(operator, list(inputs), names, name=name, **attributes))
        return names

    def reshape(self, tensor: str, *sizes: int) -> str:
        """With the batch as the first size."""
        return self("Reshape", tensor, self.constant([self.batch, *sizes], np.int64))

    def columns(self, tensor: str, start: int, stop: int) -> str:
        """Of the last of three dimensions."""
        return self("Slice", tensor, *(self.constant([value], np.int64) for value in (start, stop, 2)))

    def largest(self, tensor: str) -> str:
        """Over the last of three dimensions."""
        if self.opset >= 18:
            return self("ReduceMax", tensor, self.constant([2], np.int64), keepdims=0)
        return self("ReduceMax", tensor, axes=[2], keepdims=0)

    def chosen(self, rows: str, index: str, width: int) -> str:
        """Rows (N, K, width) at index (N, k) -> (N, k, width)."""
        column = self("Unsqueeze", index, self.constant([2], np.int64))
        return self("GatherElements", rows, self("Expand", column, self.constant([1, 1, width], np.int64)), axis=1)


def add_decoding(
    model: onnx.ModelProto, outputs: Sequence[Output], layout: OutputLayout, contract: ModelContract
) -> None:
    """
    Gives the graph the outputs of `contract`, 'topk', in place: boxes, scores and labels of the best candidates.

    Args:
        outputs: those of the graph, in the order of `layout.output_parts`.
        layout: whole; None for a format stands for what needs no operator.

    Raises:
        ContractError: the outputs are not as the layout says.
        ExportError: the graph's opset is too old and cannot be raised.
    """
    from onnx import TensorProto, helper

    _raise_opset(model)
    free_names(model, contract.output_names)
    graph = model.graph
    names = [value.name for value in graph.output]
    writer = _Writer(model, contract.input_shape[0])
    outputs = [output._replace(name=name) for output, name in zip(outputs, names)]
    parts, counts, box_columns = _rows(writer, outputs, layout, contract)
    boxes = _boxes(writer, parts["boxes"], counts, box_columns, layout, contract)
    classes, rows = len(contract.class_names), sum(counts)
    score_format = layout.score_format or "probabilities"
    if "scores" in parts:
        scores = _scores(writer, parts, layout, classes)
        boxes, scores, labels, rows = _best(writer, boxes, scores, rows, classes, layout.candidates)
    else:
        scores = writer("Sigmoid", parts["score"]) if score_format == "logits" else parts["score"]
        if score_format == "softmax_logits":
            raise ContractError("score_format is 'softmax_logits' for one score a row; expected scores of each class")
        scores = writer.reshape(scores, -1)
        labels = writer("Cast", writer.reshape(parts["label"], -1), to=TensorProto.INT64)
        if layout.background == "first":
            labels = writer("Sub", labels, writer.constant(1, np.int64))
    del graph.output[:]
    batch = contract.input_shape[0] if contract.input_shape[0] > 0 else "N"
    for name, tensor, kind, sizes in zip(
        contract.output_names,
        (boxes, scores, labels),
        (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64),
        ((rows, 4), (rows,), (rows,)),
    ):
        graph.node.append(helper.make_node("Identity", [tensor], [name], name=f"{writer.prefix}{name}"))
        graph.output.append(helper.make_tensor_value_info(name, kind, [batch, *sizes]))


def _rows(
    writer: _Writer, outputs: Sequence[Output], layout: OutputLayout, contract: ModelContract
) -> Tuple[Dict[str, str], List[int], int]:
    """(part -> tensor (N, K, width) in FP32, or, of labels, as it is; rows of each level; columns of boxes)."""
    from onnx import TensorProto

    levels: Dict[str, List[Tuple[int, str]]] = {}
    box_columns = 4
    for output, parts in zip(outputs, layout.output_parts or ()):
        axis, widths = _width_axis(output, parts, layout, contract)
        width, box_columns = sum(widths.values()), widths.get("boxes", box_columns)
        batch = contract.input_shape[0] if contract.input_shape[0] > 0 else output.shape[0]
        count = math.prod(output.shape) // (width * batch)
        name = output.name
        if output.dtype != np.float32 and not np.issubdtype(output.dtype, np.integer):
            name = writer("Cast", name, to=TensorProto.FLOAT)
        if 0 < axis < len(output.shape) - 1:
            rows = writer("Transpose", writer.reshape(name, width, -1), perm=[0, 2, 1])
        else:
            rows = writer.reshape(name, -1, width)
        start = 0
        for part in parts:
            stop = start + widths[part]
            whole = widths[part] == width
            levels.setdefault(part, []).append((count, rows if whole else writer.columns(rows, start, stop)))
            start = stop
    # The fine levels first: exports differ in the order of their outputs, not in that of their points.
    ordered = {part: sorted(found, key=lambda level: -level[0]) for part, found in levels.items()}
    counts = [count for count, _ in ordered["boxes"]]
    for part, found in ordered.items():
        if [count for count, _ in found] != counts:
            raise ContractError(
                f"the boxes have {counts} rows, {part} {[count for count, _ in found]}; expected as many of each. "
                "Correct output_names and output_parts"
            )
    joined = {
        part: found[0][1] if len(found) == 1 else writer("Concat", *(name for _, name in found), axis=1)
        for part, found in ordered.items()
    }
    return joined, counts, box_columns


def _boxes(
    writer: _Writer, boxes: str, counts: Sequence[int], columns: int, layout: OutputLayout, contract: ModelContract
) -> str:
    """Corners in pixels of the network input, (N, K, 4)."""
    box_format, size = layout.box_format or "xyxy", (contract.input_width_px, contract.input_height_px)
    if layout.decode != "none":
        points, strides = _points(counts, layout, contract)
        if layout.decode == "grid":
            centres = writer("Add", writer.columns(boxes, 0, 2), writer.constant(points / strides))
            cells = writer("Concat", centres, writer("Exp", writer.columns(boxes, 2, 4)), axis=2)
            boxes, box_format = writer("Mul", cells, writer.constant(strides)), "cxcywh"
        else:
            if layout.decode == "bins":
                boxes = _expectations(writer, boxes, sum(counts), columns // 4)
            away = writer("Mul", boxes, writer.constant(strides * np.array([-1, -1, 1, 1])))
            boxes = writer("Add", away, writer.constant(np.concatenate([points, points], axis=2)))
    if box_format != "xyxy":
        first, sides = writer.columns(boxes, 0, 2), writer.columns(boxes, 2, 4)
        if box_format == "cxcywh":
            first = writer("Sub", first, writer("Mul", sides, writer.constant(0.5)))
        boxes = writer("Concat", first, writer("Add", first, sides), axis=2)
    if layout.box_units == "fractions":
        boxes = writer("Mul", boxes, writer.constant([*size, *size]))
    return boxes


def _expectations(writer: _Writer, bins: str, rows: int, count: int) -> str:
    """Logits (N, K, 4 * bins) -> expected distances (N, K, 4), of the bins 0, 1, 2, ..."""
    shares = writer("Softmax", writer.reshape(bins, rows, 4, count), axis=-1)
    sums = writer("MatMul", shares, writer.constant(np.arange(count).reshape(count, 1)))
    return writer.reshape(sums, rows, 4)


def _points(counts: Sequence[int], layout: OutputLayout, contract: ModelContract) -> Tuple[np.ndarray, np.ndarray]:
    """(points in pixels (1, K, 2), strides (1, K, 1)), row by row, the finest level first."""
    size = contract.input_width_px, contract.input_height_px
    default = 0.0 if layout.decode == "grid" else 0.5
    offset = default if layout.point_offset is None else layout.point_offset
    strides = layout.strides or propose_strides(counts, size)
    points, of_points = [], []
    for stride in sorted(strides):
        columns, rows = (-(-side // stride) for side in size)
        y, x = np.mgrid[:rows, :columns]
        points.append((np.stack([x.ravel(), y.ravel()], 1) + offset) * stride)
        of_points.append(np.full((rows * columns, 1), stride))
    found = [len(level) for level in points]
    if list(counts) not in (found, [sum(found)]):
        raise ContractError(
            f"the boxes have {list(counts)} rows; expected {found}, one for each point of the strides {list(strides)} "
            f"in {size[0]} x {size[1]} pixels. Correct strides or input_shape"
        )
    return np.concatenate(points)[None].astype(np.float32), np.concatenate(of_points)[None].astype(np.float32)


def propose_strides(counts: Sequence[int], size_wh_px: Tuple[int, int]) -> Tuple[int, ...]:
    """
    The strides of a usual pyramid with so many points.

    Raises:
        ContractError: none has.
    """
    for strides in STRIDES:
        points = [math.prod(-(-side // stride) for side in size_wh_px) for stride in strides]
        if list(counts) in (points, [sum(points)]):
            return strides
    raise ContractError(
        f"the boxes have {list(counts)} rows, which no usual pyramid has in {size_wh_px[0]} x {size_wh_px[1]} pixels; "
        "expected strides, such as [8, 16, 32]"
    )


def _scores(writer: _Writer, parts: Mapping[str, str], layout: OutputLayout, classes: int) -> str:
    """Probabilities (N, K, classes), without the background."""
    operators = {"logits": ("Sigmoid", {}), "softmax_logits": ("Softmax", {"axis": -1})}
    scores = parts["scores"]
    if layout.score_format in operators:
        operator, attributes = operators[layout.score_format]
        scores = writer(operator, scores, **attributes)
    if layout.background != "none":
        first = int(layout.background == "first")
        scores = writer.columns(scores, first, first + classes)
    if "objectness" in parts:
        objectness = parts["objectness"]
        if layout.score_format == "logits":
            objectness = writer("Sigmoid", objectness)
        scores = writer("Mul", scores, objectness)
    return scores


def _best(
    writer: _Writer, boxes: str, scores: str, rows: int, classes: int, candidates: int
) -> Tuple[str, str, str, int]:
    """(boxes, scores, labels, how many) of the best pairs of a row and a class."""

    def sorted_best(values: str, count: int) -> List[str]:
        return writer.several("TopK", values, writer.constant([count], np.int64), outputs=2)

    if rows > candidates:  # the best pairs are all in the rows of the best classes: less to sort
        _, index = sorted_best(writer.largest(scores), candidates)
        boxes, scores, rows = writer.chosen(boxes, index, 4), writer.chosen(scores, index, classes), candidates
    count = min(rows * classes, candidates)
    best, pair = sorted_best(writer.reshape(scores, rows * classes), count)
    number = writer.constant(classes, np.int64)
    return writer.chosen(boxes, writer("Div", pair, number), 4), best, writer("Mod", pair, number), count


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _raise_opset(model: onnx.ModelProto) -> None:
    from onnx import version_converter

    if opset_of(model) >= DECODING_OPSET:
        return
    try:
        model.CopyFrom(version_converter.convert_version(model, DECODING_OPSET))
    except Exception as error:  # onnx raises RuntimeError, ConvertError and others here
        raise ExportError(
            f"the graph has opset {opset_of(model)}, which cannot be raised to {DECODING_OPSET} ({error}). Export the "
            f"model again with opset {DECODING_OPSET} or newer"
        ) from error


def free_names(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Renames the tensors that have the names which the outputs are to get."""
    rename_tensors(model, {name: f"{name}_as_exported" for name in names})


def rename_tensors(model: onnx.ModelProto, new_names: Mapping[str, str]) -> None:
    """Gives tensors other names, in place."""
    for node in model.graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]
        node.output[:] = [new_names.get(name, name) for name in node.output]
    graph = model.graph
    for values in (graph.initializer, graph.input, graph.output, graph.value_info):
        for value in values:
            value.name = new_names.get(value.name, value.name)
