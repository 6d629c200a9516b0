"""
A float ONNX detector -> an INT8 one, with Q/DQ pairs (QuantizeLinear, DequantizeLinear) where its runtime wants them.

    python -m calibration.quantize student.onnx --data DIR -o student.int8.onnx
    python -m calibration.quantize student.onnx --annotations train.json --images-dir train/ \\
        --evaluation-annotations val.json --evaluation-images-dir val/ -o student.int8.onnx

Needs onnx, onnxruntime, OpenCV, and the sidecar that `deploy.export`, or `deploy.adopt_onnx` for a detector from
elsewhere, wrote beside the model; `--method auto` also what `benchmarks.accuracy` needs.

What is quantised and where the pairs go, for each target: see `calibration.placement`. On x86 CPUs without VNNI ONNX
Runtime's integer kernels add pairs of products in 16 bits, which can saturate: measure AP there.

The ranges of activations come from calibration images, by a method of `calibration.ranges`; `--method auto` quantises
with each and takes the one of the best AP on images of the same split that were not calibrated on. Or they come from a
calibration cache of TensorRT, and no images are needed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from calibration.collect import (
    check_no_overlap,
    choose_images,
    empty_statistics,
    extend_statistics,
    sha256_of_images,
)
from calibration.placement import PLACEMENTS, Graph, Placement, node_name
from calibration.qdq import quantize_graph
from calibration.ranges import METHODS, PERCENTILE, range_from_statistics
from calibration.statistics import Statistics, load_statistics, save_statistics
from deploy.calibration_cache import amax_from_quantised, read_cache, write_cache
from deploy.contract import ModelContract, load_contract, write_sidecar
from deploy.dataset import SPLITS, CocoImage, CocoSet, check_image_files, load_coco, split_paths
from deploy.errors import CalibrationError, ConfigError, command
from deploy.files import AnyPath, check_writable, read_json, sha256_of, write_json
from deploy.graph import check_graph, check_static, load_onnx, save_onnx

if TYPE_CHECKING:
    import onnx

Ranges = Dict[str, Tuple[float, float]]
"""Tensor -> (smallest, largest) value that INT8 is to hold."""

SMALLEST_OPSET = 13
"""The first in which QuantizeLinear has an axis."""
FEWEST_IMAGES = 300
"""Below it ranges vary from sample to sample; a warning, not an error."""
HELD_OUT_IMAGES = 128
"""Of the calibration split, for `--method auto` to compare methods on; beyond those that are calibrated on."""
GROWING_OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul",
    "InstanceNormalization", "GroupNormalization", "LayerNormalization",
)  # fmt: skip
"""Their outputs can be larger than their inputs: where FP16 may overflow, which the sidecar's `ranges` tell."""


@dataclasses.dataclass
class Quantized:
    """A quantised model and where its ranges come from, for the sidecar."""

    model: onnx.ModelProto
    inputs: Dict[str, AnyPath]
    details: Dict[str, Any]
    source: str
    """In words, for people."""


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


def ranges_from_cache(path: str, placement: Placement) -> Ranges:
    """
    The range of each tensor that gets a pair, from a calibration cache of TensorRT.

    Raises:
        CalibrationError: it is no cache, or a tensor is not in it.
    """
    amax, tensors = read_cache(path), sorted(set(placement.pairs.values()))
    missing = [name for name in tensors if name not in amax]
    if missing:
        raise CalibrationError(
            f"{path} has no range for {len(missing)} of {len(tensors)} tensors: {', '.join(missing[:5])}; expected a "
            "cache that was made with this very ONNX file. Calibrate on images instead, with --data."
        )
    return {name: (-amax[name], amax[name]) for name in tensors}


def tensors_that_may_grow(model: onnx.ModelProto) -> List[str]:
    """
    The float32 outputs of GROWING_OPS, as far as the last convolutions: the decoding after them may use infinity.
    """
    from onnx import TensorProto, shape_inference

    values = shape_inference.infer_shapes(model).graph.value_info
    floating = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    needed = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in GROWING_OPS and node.output[0] in floating & needed
    ]


def collect(
    graph: Graph,
    placement: Placement,
    images: Sequence[CocoImage],
    contract: ModelContract,
    file: Optional[Path],
    model_path: Path,
) -> Dict[str, Statistics]:
    """
    Tensor -> statistics over the images: those that get a pair, and extremes of those of `tensors_that_may_grow`.

    Args:
        file: where they are kept; statistics that it has already are not collected again.
        model_path: of the graph.

    Raises:
        CalibrationError: the file is of another model, of other images or for another target, or an activation is not
            finite.
    """
    tensors = sorted(set(placement.pairs.values()))
    minmax_only = sorted(set(tensors_that_may_grow(graph.model)) - set(tensors))
    if file is not None and file.is_file():
        collected = load_statistics(file, model_path, contract)
        collected.check_tensors(tensors, minmax_only, file)
        others = set(collected.image_ids) - {sha256_of(image.path) for image in images}
        if others:
            raise CalibrationError(
                f"{file} holds statistics of {len(collected.image_ids)} images, {len(others)} of which are not among "
                f"the {len(images)} chosen now; expected no others. Choose the same data, --num-images and --seed, "
                "or name another file with --statistics."
            )
    else:
        collected = empty_statistics(tensors, minmax_only)
    known = len(collected.image_ids)
    extend_statistics(collected, graph.model, images, contract)
    if file is not None and len(collected.image_ids) > known:
        save_statistics(file, collected, model_path, contract)
    return collected.statistics


def ranges_from_statistics(
    statistics: Dict[str, Statistics], placement: Placement, method: str, target: str, percentile: float
) -> Ranges:
    """
    The range of each tensor that gets a pair.

    Raises:
        CalibrationError: a tensor has one value only.
    """
    found = {}
    for name in sorted(set(placement.pairs.values())):
        seen = statistics[name]
        if seen.minimum == seen.maximum:
            raise CalibrationError(
                f"the tensor {name} is {seen.minimum:g} everywhere in all calibration images; expected an activation "
                "that varies. Are they images that the model is for? If this part of it is dead for good, keep the "
                "convolutions beside it in float with --keep-float."
            )
        found[name] = range_from_statistics(seen, method, target == "tensorrt", percentile)
    return found


def best_method(
    candidates: Dict[str, onnx.ModelProto], held_out: Sequence[CocoImage], calibration: CocoSet, contract: ModelContract
) -> Tuple[str, Dict[str, float]]:
    """
    The method whose model has the best AP on the held-out images, the first of equals; and the AP of each.

    Args:
        candidates: method -> quantised model.
        calibration: the set that the images are of.

    Raises:
        CalibrationError: an AP cannot be measured.
    """
    document = read_json(calibration.annotations_path, CalibrationError, "COCO annotations")
    ids = {image.image_id for image in held_out}
    document["images"] = [entry for entry in document["images"] if entry["id"] in ids]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in ids]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "held_out.json"
        write_json(annotations, document)
        for method, model in candidates.items():
            path = Path(folder) / f"{method}.onnx"
            save_onnx(model, path)
            write_sidecar(path, {}, contract)
            found[method] = _measured_ap(path, annotations, calibration.images_dir)
            print(f"{method}: AP {100 * found[method]:.2f} on {len(held_out)} held-out images", file=sys.stderr)
    return max(found, key=lambda method: found[method]), found


def _measured_ap(path: Path, annotations: Path, images_dir: Path) -> float:
    """By the command that measures AP everywhere; in a process of its own, since it is of a layer above."""
    output = path.with_suffix(".result.json")
    words = ["-m", "benchmarks.accuracy", str(path), "--annotations", str(annotations), "--images-dir", str(images_dir)]
    done = subprocess.run(
        [sys.executable, *words, "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    ap = None
    if done.returncode == 0:
        ap = read_json(output, CalibrationError, "a result of benchmarks.accuracy")["numbers"]["AP"]
    if ap is None:
        raise CalibrationError(
            f"the AP of method {path.stem} on held-out images could not be measured: benchmarks.accuracy ended with "
            f"status {done.returncode} ({done.stderr.strip()[-500:]}). Put that right, or name a method with --method."
        )
    return float(ap)


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
    source.add_argument(
        "--calibration-cache", metavar="FILE", help="ranges from a calibration cache of TensorRT instead of images"
    )
    parser.add_argument("--images-dir", metavar="DIR", help="folder of the images of --annotations")
    parser.add_argument("--split", choices=SPLITS, help="split of --data to calibrate on (default: train)")
    parser.add_argument(
        "--target",
        choices=sorted(PLACEMENTS),
        default="tensorrt",
        help="runtime that will run it (default: %(default)s)",
    )
    parser.add_argument(
        "--method", choices=(*METHODS, "auto"), default="max",
        help="how a range is taken from what was seen; auto: the best of them by AP (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--percentile", type=float, metavar="P",
        help=f"how many values in a hundred the method of that name does not clip (default: {PERCENTILE})",
    )  # fmt: skip
    parser.add_argument(
        "--keep-float", nargs="+", default=[], metavar="NAME",
        help="convolutions to keep in float: names of nodes, or what the names of a block's nodes begin with",
    )  # fmt: skip
    parser.add_argument(
        "--num-images", type=int, default=512, metavar="N", help="images to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")
    parser.add_argument(
        "--statistics", metavar="FILE",
        help="keep what was seen of the activations in FILE; if it is there, take it from there (.npz)",
    )  # fmt: skip
    parser.add_argument(
        "--write-calibration-cache", metavar="FILE", help="write the ranges as a calibration cache of TensorRT, too"
    )
    parser.add_argument(
        "--tensorrt-version", metavar="VERSION", help="for which that cache is, such as 8.5.3: others do not take it"
    )
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


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if flags do not go together, PipelineError if a file could not be written."""
    output = Path(arguments.output)
    if output.suffix != ".onnx" or output.resolve() == Path(arguments.model).resolve():
        raise ConfigError(f"--output is {output}; expected another file than the model, with the suffix .onnx")
    if arguments.percentile is not None:
        if arguments.method not in ("percentile", "auto"):
            raise ConfigError(
                f"--percentile is given; expected none with --method {arguments.method}, which has no use"
            )
        if not 50 < arguments.percentile <= 100:
            raise ConfigError(f"--percentile is {arguments.percentile}; expected above 50, at most 100, such as 99.99")
    if arguments.target != "tensorrt" and (arguments.calibration_cache or arguments.write_calibration_cache):
        raise ConfigError(
            f"--target is {arguments.target}; expected tensorrt with a calibration cache, which has symmetric ranges"
        )
    if bool(arguments.write_calibration_cache) != bool(arguments.tensorrt_version):
        raise ConfigError("expected both --write-calibration-cache and --tensorrt-version, or neither; one is given")
    if arguments.tensorrt_version and not re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", arguments.tensorrt_version):
        raise ConfigError(f"--tensorrt-version is {arguments.tensorrt_version!r}; expected one such as 8.5.3")
    if arguments.calibration_cache:
        given = [
            flag
            for flag, value in (
                ("--images-dir", arguments.images_dir), ("--split", arguments.split),
                ("--statistics", arguments.statistics), ("--method", arguments.method != "max"),
                ("--evaluation-annotations", arguments.evaluation_annotations),
                ("--evaluation-images-dir", arguments.evaluation_images_dir),
            )
            if value
        ]  # fmt: skip
        if given:
            raise ConfigError(f"{', '.join(given)}: expected none with --calibration-cache, which needs no images")
    for path in (arguments.output, arguments.statistics, arguments.write_calibration_cache):
        if path and not (path == arguments.statistics and Path(path).is_file()):
            check_writable(path)


def read_model(path: str, keep_float: Sequence[str]) -> Tuple[Graph, ModelContract]:
    """
    The float model and its contract, checked.

    Raises:
        ContractError: the file does not match its sidecar or cannot be read.
        ExportError: the graph is not valid, has control flow, or sizes that are not fixed.
        ConfigError: a name of `keep_float` is not in it.
        CalibrationError: it cannot be quantised.
    """
    contract = load_contract(path)
    model = load_onnx(path)
    check_graph(model)
    check_static(model, dynamic_batch=contract.input_shape[0] == -1, dynamic_outputs=contract.outputs == "nms")
    graph = Graph(model, keep_float)
    check_quantizable(graph)
    return graph, contract


def int8_from_cache(arguments: argparse.Namespace, graph: Graph) -> Quantized:
    """
    The model quantised with the ranges of `--calibration-cache`.

    Raises:
        CalibrationError: as `ranges_from_cache`.
    """
    placement = PLACEMENTS[arguments.target](graph)
    ranges = ranges_from_cache(arguments.calibration_cache, placement)
    return Quantized(
        quantize_graph(graph, placement, ranges, arguments.target),
        {"calibration_cache": arguments.calibration_cache},
        {"method": "calibration cache", "ranges": ranges},
        f"ranges of {arguments.calibration_cache}",
    )


def int8_from_images(arguments: argparse.Namespace, graph: Graph, contract: ModelContract) -> Quantized:
    """
    The model quantised with ranges over calibration images.

    Raises:
        ConfigError: flags do not go together.
        DataError: the data is missing or not COCO, or an image cannot be read.
        CalibrationError: an image is in an evaluation set, or activations or statistics will not do.
    """
    calibration = load_calibration_set(arguments)
    evaluations = load_evaluation_sets(arguments, calibration)
    images = choose_images(calibration.images, arguments.num_images, arguments.seed)
    held_out = choose_held_out(calibration.images, images, arguments.seed) if arguments.method == "auto" else []
    check_image_files([*images, *held_out])
    for evaluation in evaluations:
        check_no_overlap([*images, *held_out], evaluation)
    if not evaluations:
        _warn("no evaluation set is known, so that no overlap was looked for; name it with --evaluation-annotations")
    if len(images) < FEWEST_IMAGES:
        _warn(f"{len(images)} calibration images; {FEWEST_IMAGES} or more give ranges that do not hang on the choice")

    percentile = PERCENTILE if arguments.percentile is None else arguments.percentile
    placement = PLACEMENTS[arguments.target](graph)
    file = Path(arguments.statistics) if arguments.statistics else None
    statistics = collect(graph, placement, images, contract, file, Path(arguments.model))
    candidates = {
        method: quantize_graph(
            graph,
            placement,
            ranges_from_statistics(statistics, placement, method, arguments.target, percentile),
            arguments.target,
        )
        for method in (METHODS if arguments.method == "auto" else [arguments.method])
    }
    method: str = arguments.method
    details: Dict[str, Any] = {}
    if method == "auto":
        method, ap = best_method(candidates, held_out, calibration, contract)
        details = {"auto_ap": ap, "held_out_image_ids": [image.image_id for image in held_out]}
    if method == "percentile":
        details["percentile"] = percentile
    return Quantized(
        candidates[method],
        {"annotations": calibration.annotations_path},
        {
            "method": method,
            **details,
            "seed": arguments.seed,
            "num_images": len(images),
            "image_ids": [image.image_id for image in images],
            "images_sha256": sha256_of_images(images),
            "evaluation_annotations": [str(evaluation.annotations_path) for evaluation in evaluations],
            "ranges": {name: (float(one.minimum), float(one.maximum)) for name, one in sorted(statistics.items())},
        },
        f"method {method}, {len(images)} images of {calibration.annotations_path}, seed {arguments.seed}",
    )


def choose_held_out(images: Sequence[CocoImage], calibrated: Sequence[CocoImage], seed: int) -> List[CocoImage]:
    """
    Up to HELD_OUT_IMAGES of the images that are not calibrated on.

    Raises:
        ConfigError: there is none.
    """
    chosen = {image.image_id for image in calibrated}
    rest = [image for image in images if image.image_id not in chosen]
    if not rest:
        raise ConfigError(
            f"--method auto compares methods on images that are not calibrated on, and --num-images takes all "
            f"{len(images)} of the split; expected some to be left. Lower --num-images."
        )
    return choose_images(rest, HELD_OUT_IMAGES, seed)


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Quantises one model; see the module's docstring."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    graph, contract = read_model(arguments.model, arguments.keep_float)
    if arguments.calibration_cache:
        quantized = int8_from_cache(arguments, graph)
    else:
        quantized = int8_from_images(arguments, graph, contract)
    check_graph(quantized.model)
    save_onnx(quantized.model, arguments.output)
    if arguments.write_calibration_cache:
        write_cache(arguments.write_calibration_cache, amax_from_quantised(quantized.model), arguments.tensorrt_version)
    kept = {node_name(node): graph.kept[node.output[0]] for node in graph.convolutions if node.output[0] in graph.kept}
    write_sidecar(
        arguments.output,
        {"model": arguments.model, **quantized.inputs},
        contract,
        {
            "target": arguments.target,
            **quantized.details,
            "keep_float": arguments.keep_float,
            "quantized_convolutions": [node_name(node) for node in graph.quantized],
            "float_convolutions": kept,
            "op_counts": dict(sorted(collections.Counter(node.op_type for node in quantized.model.graph.node).items())),
        },
    )
    reasons = ", ".join(f"{number} {why}" for why, number in collections.Counter(kept.values()).items())
    print(
        f"{arguments.output}: {len(graph.quantized)} of {len(graph.convolutions)} convolutions in INT8 for "
        f"{arguments.target}, the others in float ({reasons}); {quantized.source}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
