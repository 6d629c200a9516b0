"""
A float ONNX detector -> an INT8 one, with Q/DQ pairs (QuantizeLinear, DequantizeLinear) where its runtime wants them.

    python -m calibration.quantize student.onnx --data DIR -o student.int8.onnx
    python -m calibration.quantize student.onnx --annotations train.json --images-dir train/ \\
        --evaluation-annotations val.json --evaluation-images-dir val/ -o student.int8.onnx

Needs onnx, onnxruntime, OpenCV, and the sidecar that `deploy.export` wrote beside the model.

What is quantised: convolutions, both their input (one scale per tensor) and their weight (one scale per output channel,
symmetric), never one of the two. The final prediction convolutions and what follows them stay in float: rounding there
shrinks scores and moves boxes. Where the pairs go depends on the target:

- `tensorrt` (signed, symmetric): on the input of each convolution; its output stays float, for TensorRT to fuse what
  follows. At an addition of a convolution's output, on the other branch, so that convolution, addition and ReLU become
  one kernel. MaxPool and nearest Resize only choose among values: one pair before them serves what comes after. Weights
  remain FP32 constants with a pair; biases remain float.
  https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
- `onnxruntime` (unsigned activations, signed weights): ONNX Runtime's integer kernels (QLinearConv, QLinearAdd) want
  integers in and out, so also on the output of each convolution, after its ReLU, and of each addition of quantised
  tensors. MaxPool and nearest Resize have a pair on both sides, of one scale. Weights are stored as int8, biases as
  int32. https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
  On x86 CPUs without VNNI these kernels add pairs of products in 16 bits, which can saturate: measure AP there.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from calibration.collect import check_no_overlap, choose_images, collect_ranges, sha256_of_images
from calibration.ranges import Quantization, int8_from_weight, signed_from_range, unsigned_from_range, weight_scales
from deploy.contract import ModelContract, load_contract, write_sidecar
from deploy.dataset import SPLITS, CocoImage, CocoSet, check_image_files, load_coco, split_paths
from deploy.errors import CalibrationError, ConfigError, command
from deploy.files import check_writable
from deploy.graph import check_graph, check_static, constants, consumers, load_onnx, producers, remove_unused, save_onnx

if TYPE_CHECKING:
    import onnx

TARGETS = ("tensorrt", "onnxruntime")
SMALLEST_OPSET = 13
"""The first in which QuantizeLinear has an axis."""
FEWEST_IMAGES = 300
"""Below it ranges vary from sample to sample; a warning, not an error."""
LARGEST_BIAS = 2.0**30
"""Of an int32 bias: half of what it can hold, since accumulated products are added to it."""


class Graph:
    """A model with the tables that placing Q/DQ needs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = constants(model)
        self.producers = producers(model)
        self.consumers = consumers(model)
        self.convolutions = [node for node in self.nodes if node.op_type == "Conv"]
        self.kept = self._kept_convolutions()
        self.quantized = [node for node in self.convolutions if node.output[0] not in self.kept]

    def _kept_convolutions(self) -> Dict[str, str]:
        """Output name of each convolution that stays in float -> why."""
        import onnx

        kept = dict.fromkeys(final_convolutions(self.model), "final prediction")
        for node in self.convolutions:
            operands = [self.constants.get(name) for name in node.input[1:]]
            if any(tensor is None or tensor.data_type != onnx.TensorProto.FLOAT for tensor in operands):
                kept.setdefault(node.output[0], "weight or bias not an FP32 constant")
        return kept

    def readers(self, tensor: str) -> List[onnx.NodeProto]:
        """The nodes that read the values of a tensor; Shape does not."""
        return [node for node, _ in self.consumers.get(tensor, []) if node.op_type != "Shape"]

    def activation(self, node: onnx.NodeProto) -> str:
        """The output of a node, after the ReLU or Clip that a runtime fuses with it."""
        readers = self.readers(node.output[0])
        return readers[0].output[0] if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") else node.output[0]


def final_convolutions(model: onnx.ModelProto) -> Set[str]:
    """
    Output names of the convolutions from which an output of the graph is reached without passing another convolution.

    Paths through Shape do not count: they carry no values.
    """
    made_by = producers(model)
    pending, seen, found = [value.name for value in model.graph.output], set(), set()
    while pending:
        name = pending.pop()
        node = made_by.get(name)
        if node is None or name in seen or node.op_type == "Shape":
            continue
        seen.add(name)
        if node.op_type == "Conv":
            found.add(name)
        else:
            pending.extend(node.input)
    return found


@dataclasses.dataclass
class Placement:
    """Where Q/DQ pairs for activations go."""

    pairs: Dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensor that has a pair -> tensor whose range it takes: itself, or where its values come from."""
    edges: Set[Tuple[str, int]] = dataclasses.field(default_factory=set)
    """What reads the pair, not the float tensor: (first output of the node, index of its input)."""


def place_for_tensorrt(graph: Graph) -> Placement:
    """Pairs on the inputs of convolutions and on the skip branch of additions; see the module's docstring."""
    placement = Placement()
    edges = [(node, 0) for node in graph.quantized] + _skip_branches(graph)
    for node, index in edges:
        placement.edges.add((node.output[0], index))
        name = node.input[index]
        while name in graph.producers and _only_chooses(graph.producers[name]):
            placement.edges.add((name, 0))
            name = graph.producers[name].input[0]
        placement.pairs[name] = name
    return placement


def place_for_onnxruntime(graph: Graph) -> Placement:
    """Pairs on inputs and outputs of convolutions and of what ONNX Runtime runs in integers between them."""
    pairs: Dict[str, str] = {}
    for node in graph.quantized:
        for name in (node.input[0], graph.activation(node)):
            pairs[name] = name
    for node in graph.nodes:
        if _only_chooses(node) and node.input[0] in pairs:
            pairs[node.output[0]] = pairs[node.input[0]]
        elif node.op_type == "Add" and all(name in pairs for name in node.input):
            pairs.setdefault(graph.activation(node), graph.activation(node))
    return Placement(
        pairs, {(node.output[0], index) for name in pairs for node, index in graph.consumers.get(name, [])}
    )


def _only_chooses(node: onnx.NodeProto) -> bool:
    """The output holds values of the input and no others, so that one scale fits both."""
    if node.op_type == "Resize":
        return next((a.s for a in node.attribute if a.name == "mode"), b"nearest") == b"nearest"
    return node.op_type == "MaxPool"


def _skip_branches(graph: Graph) -> List[Tuple[onnx.NodeProto, int]]:
    """
    (addition, index of its input) of the branch that does not come straight from the convolution that fuses with it.

    Where both do, the one with fewer convolutions behind it: the downsampling or lateral one.
    """
    from_convolution = {node.output[0] for node in graph.quantized if len(graph.readers(node.output[0])) == 1}
    depths = _depths(graph)
    found = []
    for node in graph.nodes:
        if node.op_type == "Add" and not any(name in graph.constants for name in node.input):
            fusable = [index for index, name in enumerate(node.input) if name in from_convolution]
            if fusable:
                fused = max(fusable, key=lambda index: depths[node.input[index]])
                found.append((node, 1 - fused))
    return found


def _depths(graph: Graph) -> Dict[str, int]:
    """Tensor -> number of convolutions on the longest path to it."""
    depths: Dict[str, int] = {}
    for node in graph.nodes:
        depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.op_type == "Conv")
        depths.update(dict.fromkeys(node.output, depth))
    return depths


class _Writer:
    """The nodes of the quantised graph, in order, and the initialisers that they bring."""

    def __init__(self) -> None:
        self.nodes: List[onnx.NodeProto] = []
        self.tensors: Dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(values, name)
        return name

    def node(self, op_type: str, inputs: List[str], output: str, **axis: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **axis))
        return output

    def activation_pair(self, tensor: str, source: str, quantization: Quantization) -> None:
        """tensor -> Q -> DQ -> `<tensor>_dequantized`."""
        scale = self.constant(f"{source}_scale", np.array(quantization.scale, np.float32))
        zero_point = self.constant(f"{source}_zero_point", np.array(quantization.zero_point))
        integers = self.node("QuantizeLinear", [tensor, scale, zero_point], f"{tensor}_quantized")
        self.node("DequantizeLinear", [integers, scale, zero_point], f"{tensor}_dequantized")

    def float_weight(self, node: onnx.NodeProto, name: str, scales: np.ndarray) -> None:
        """
        FP32 constant `name` -> Q -> DQ -> convolution.

        Convolutions that share a weight share the constants and have a pair each, to be folded into each of them.
        """
        prefix = f"{node.output[0]}_weight"
        scale = self.constant(f"{name}_scale", scales)
        zero_point = self.constant(f"{name}_zero_point", np.zeros(len(scales), np.int8))
        integers = self.node("QuantizeLinear", [name, scale, zero_point], f"{prefix}_quantized", axis=0)
        node.input[1] = self.node("DequantizeLinear", [integers, scale, zero_point], f"{prefix}_dequantized", axis=0)

    def integer_operand(
        self, node: onnx.NodeProto, index: int, name: str, integers: np.ndarray, scales: np.ndarray
    ) -> None:
        """Integer constant `name` -> DQ -> input `index` of the convolution."""
        inputs = [
            self.constant(name, integers),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero_point", np.zeros(len(scales), integers.dtype)),
        ]
        node.input[index] = self.node("DequantizeLinear", inputs, f"{node.output[0]}_{index}_dequantized", axis=0)


def quantize_graph(
    model: onnx.ModelProto, placement: Placement, quantizations: Dict[str, Quantization], target: str
) -> onnx.ModelProto:
    """
    A copy of the model with Q/DQ pairs.

    Args:
        placement: of the target.
        quantizations: of each tensor among the values of `placement.pairs`.
    """
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, writer = Graph(result), _Writer()
    weights = {node.output[0]: graph.constants[node.input[1]] for node in graph.quantized}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(graph.constants[name])

    def input_scale(node: onnx.NodeProto) -> np.float32:
        return np.float32(quantizations[placement.pairs[node.input[0]]].scale)

    def add_pair(tensor: str) -> None:
        if tensor in placement.pairs:
            source = placement.pairs[tensor]
            writer.activation_pair(tensor, source, quantizations[source])

    scales: Dict[str, np.ndarray] = {}  # by the name of the weight: the levels of a head share one
    for node in graph.quantized:
        name = weights[node.output[0]].name
        needed = weight_scales(array(node.input[1]))
        if target == "onnxruntime" and len(node.input) > 2:  # so that the bias fits into int32
            needed = np.maximum(needed, np.abs(array(node.input[2])) / (input_scale(node) * LARGEST_BIAS))
        scales[name] = np.maximum(needed, scales.get(name, needed))

    for value in result.graph.input:
        add_pair(value.name)
    for node in graph.nodes:
        if node.output[0] in weights:
            name = weights[node.output[0]].name
            if target == "tensorrt":
                writer.float_weight(node, name, scales[name])
            else:
                integers = int8_from_weight(array(node.input[1]), scales[name])
                writer.integer_operand(node, 1, f"{name}_int8", integers, scales[name])
                if len(node.input) > 2:
                    bias_scales = scales[name] * input_scale(node)
                    integers = np.rint(array(node.input[2]) / bias_scales).astype(np.int32)
                    writer.integer_operand(node, 2, f"{node.output[0]}_bias_int32", integers, bias_scales)
        for index, name in enumerate(node.input):
            if (node.output[0], index) in placement.edges and name in placement.pairs:
                node.input[index] = f"{name}_dequantized"
        writer.nodes.append(node)
        for name in node.output:
            add_pair(name)
    del result.graph.node[:]
    result.graph.node.extend(writer.nodes)
    result.graph.initializer.extend(writer.tensors.values())
    remove_unused(result)
    return result


def check_quantizable(graph: Graph) -> None:
    """
    Raises CalibrationError if the model is quantised already, of too old an opset, has batch normalisations to fold, or
    has no convolution to quantise.
    """
    done = sorted(
        {node.op_type for node in graph.nodes} & {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger"}
    )
    if done:
        raise CalibrationError(f"the model is quantised already: it has {done}; expected the float model")
    opset = next((entry.version for entry in graph.model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < SMALLEST_OPSET:
        raise CalibrationError(
            f"the model has ONNX opset {opset}; expected {SMALLEST_OPSET} or newer. Export it again."
        )
    for node in graph.convolutions:
        if "BatchNormalization" in [reader.op_type for reader in graph.readers(node.output[0])]:
            raise CalibrationError(
                f"a BatchNormalization follows the convolution {node_name(node)}; expected it folded into the weight, "
                "which is what is rounded. Export the model in evaluation mode."
            )
    if not graph.quantized:
        raise CalibrationError(
            f"none of the {len(graph.convolutions)} convolutions can be quantised: {sorted(set(graph.kept.values()))}; "
            "expected a detector, with convolutions before those of the final prediction"
        )


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or that of its output where it has none."""
    return node.name or node.output[0]


def int8_from_float(graph: Graph, target: str, images: Sequence[CocoImage], contract: ModelContract) -> onnx.ModelProto:
    """
    The model with Q/DQ pairs for the target; ranges are those over the images (method max).

    Raises:
        CalibrationError: ONNX Runtime cannot run the model, or an activation is not finite.
    """
    if target == "tensorrt":
        placement, quantization_from_range = place_for_tensorrt(graph), signed_from_range
    else:
        placement, quantization_from_range = place_for_onnxruntime(graph), unsigned_from_range
    ranges = collect_ranges(graph.model, sorted(set(placement.pairs.values())), images, contract)
    quantizations = {name: quantization_from_range(seen.minimum, seen.maximum) for name, seen in ranges.items()}
    return quantize_graph(graph.model, placement, quantizations, target)


def load_calibration_set(arguments: argparse.Namespace) -> CocoSet:
    """
    The annotation file that `--data` and `--split`, or `--annotations` and `--images-dir`, name.

    Raises:
        ConfigError: the flags do not go together.
        DataError: the data is missing or not COCO.
    """
    if arguments.data:
        if arguments.images_dir:
            raise ConfigError(
                f"--images-dir is {arguments.images_dir}; expected none with --data, whose images are in images/"
            )
        return load_coco(*split_paths(arguments.data, arguments.split or "train"), check_files=False)
    if not arguments.images_dir:
        raise ConfigError("--annotations is given without --images-dir; expected the folder of its images")
    if arguments.split:
        raise ConfigError(
            f"--split is {arguments.split}; expected none with --annotations, which names the file itself"
        )
    return load_coco(arguments.annotations, arguments.images_dir, check_files=False)


def load_evaluation_sets(arguments: argparse.Namespace, calibration: CocoSet) -> List[CocoSet]:
    """
    What the calibration images must not overlap with: `--evaluation-annotations`, or else val and test of `--data`.

    Raises:
        ConfigError: the flags do not go together.
        DataError: the data is missing or not COCO.
    """
    if arguments.evaluation_images_dir and not arguments.evaluation_annotations:
        raise ConfigError("--evaluation-images-dir is given without --evaluation-annotations; expected both or neither")
    paths = [Path(path) for path in arguments.evaluation_annotations]
    if arguments.data and not paths:
        folder = calibration.annotations_path.parent
        paths = [path for path in (folder / f"instances_{split}.json" for split in ("val", "test")) if path.is_file()]
    images_dir = arguments.evaluation_images_dir or calibration.images_dir
    return [load_coco(path, images_dir, check_files=False) for path in paths]


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.quantize", description="Quantise an ONNX detector to INT8, with Q/DQ nodes."
    )
    parser.add_argument("model", help="float ONNX file, with its sidecar")
    parser.add_argument("-o", "--output", required=True, help="INT8 ONNX file to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", metavar="DIR", help="folder with annotations/instances_{train,val,test}.json and images/"
    )
    source.add_argument("--annotations", metavar="FILE", help="COCO file of the calibration images; with --images-dir")
    parser.add_argument("--images-dir", metavar="DIR", help="folder of the images of --annotations")
    parser.add_argument("--split", choices=SPLITS, help="split of --data to calibrate on (default: train)")
    parser.add_argument(
        "--target", choices=TARGETS, default=TARGETS[0], help="runtime that will run it (default: %(default)s)"
    )
    parser.add_argument(
        "--num-images", type=int, default=512, metavar="N", help="images to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")
    parser.add_argument(
        "--evaluation-annotations", nargs="+", default=[], metavar="FILE",
        help="COCO files with none of whose images to calibrate (default: val and test of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation-images-dir",
        metavar="DIR",
        help="folder of their images (default: that of the calibration images)",
    )
    return parser.parse_args(argv)


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Quantises one model; see the module's docstring."""
    arguments = parse_arguments(argv)
    output = Path(arguments.output)
    if output.suffix != ".onnx" or output.resolve() == Path(arguments.model).resolve():
        raise ConfigError(f"--output is {output}; expected another file than the model, with the suffix .onnx")
    check_writable(output)
    contract = load_contract(arguments.model)
    model = load_onnx(arguments.model)
    check_graph(model)
    check_static(model)
    graph = Graph(model)
    check_quantizable(graph)

    calibration = load_calibration_set(arguments)
    evaluations = load_evaluation_sets(arguments, calibration)
    images = choose_images(calibration.images, arguments.num_images, arguments.seed)
    check_image_files(images)
    for evaluation in evaluations:
        check_no_overlap(images, evaluation)
    if not evaluations:
        _warn("no evaluation set is known, so that no overlap was looked for; name it with --evaluation-annotations")
    if len(images) < FEWEST_IMAGES:
        _warn(f"{len(images)} calibration images; {FEWEST_IMAGES} or more give ranges that do not hang on the choice")

    result = int8_from_float(graph, arguments.target, images, contract)
    check_graph(result)
    save_onnx(result, output)
    kept = {node_name(node): graph.kept[node.output[0]] for node in graph.convolutions if node.output[0] in graph.kept}
    write_sidecar(
        output,
        {"model": arguments.model, "annotations": calibration.annotations_path},
        contract,
        {
            "target": arguments.target,
            "method": "max",
            "seed": arguments.seed,
            "num_images": len(images),
            "image_ids": [image.image_id for image in images],
            "images_sha256": sha256_of_images(images),
            "evaluation_annotations": [str(evaluation.annotations_path) for evaluation in evaluations],
            "quantized_convolutions": [node_name(node) for node in graph.quantized],
            "float_convolutions": kept,
            "op_counts": dict(sorted(collections.Counter(node.op_type for node in result.graph.node).items())),
        },
    )
    reasons = ", ".join(f"{number} {why}" for why, number in collections.Counter(kept.values()).items())
    print(
        f"{output}: {len(graph.quantized)} of {len(graph.convolutions)} convolutions in INT8 for {arguments.target}, "
        f"the others in float ({reasons}); "
        f"{len(images)} images of {calibration.annotations_path}, seed {arguments.seed}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
