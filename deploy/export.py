"""
Checkpoint -> ONNX: `python -m deploy.export RUN_DIR -o student.onnx`.

One file, one static graph: points and strides are constants, boxes are decoded and the best candidates of each level
chosen in the graph. Non-maximum suppression stays outside (deploy/runtime/postprocess.py) or, with `--outputs nms`,
follows in the graph. Only the number of images may be left open (`--batch dynamic`). The sidecar carries the model
contract.

How a head's outputs become boxes is said by its family (crosskd/models/families).

Needs the training packages (torch, mmdet) and onnx; it is the one file outside crosskd/ that may import them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from deploy.contract import LAYOUTS, OUTPUTS, ModelContract, weights_of_run, write_sidecar
from deploy.errors import ConfigError, ExportError, command
from deploy.files import check_writable, replacing

if TYPE_CHECKING:
    import onnx

OPSET = 17
"""The highest that TensorRT 8.5 parses, and high enough for every operator here (facts: TensorRT, section 2)."""
TOPK_LIMIT = 3839
"""From 10.1 on TensorRT's parser takes K < 3840 (facts: TensorRT, section 6)."""
DYNAMIC = -1
"""The batch size of a contract whose graph takes any number of images."""
CANDIDATE = "candidate_"
"""Before the names of what goes into NMS, where that is in the graph."""


@command
def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.export", description="Export a trained detector to ONNX.")
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of a finished run: student.pth or detector.pth, config.py"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.onnx")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="of the network input (default: that of the test pipeline)",
    )
    parser.add_argument(
        "--batch",
        type=batch_from_text,
        default=1,
        metavar="N",
        help="images per inference, or 'dynamic' for any number (default: 1)",
    )
    parser.add_argument(
        "--input-type",
        choices=sorted(LAYOUTS),
        default="float32",
        help="float32: normalised, (N, 3, height, width). uint8: pixels, (N, height, width, 3), normalised by the "
        "graph, a quarter of the bytes (default: float32)",
    )
    parser.add_argument(
        "--outputs",
        choices=sorted(OUTPUTS),
        default="topk",
        help="topk: the best candidates before NMS. nms: detections, NMS in the graph (default: topk)",
    )
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix != ".onnx":
        raise ConfigError(f"the output is {output}; expected a name that ends in .onnx")
    check_writable(output)

    from crosskd.run_dir import load_run

    config, detector, sidecar = load_run(arguments.run_dir)
    details = sidecar["details"]
    contract = contract_from_config(
        config,
        details["class_names"],
        details["category_ids"],
        tuple(arguments.size) if arguments.size else None,
        batch=arguments.batch,
        input_type=arguments.input_type,
        outputs=arguments.outputs,
    )
    note = family_with_decoder(type(detector.bbox_head).__name__).note_of_export(detector.bbox_head)
    if note:
        print(f"note: {note}")
    if contract.resize == "keep_ratio" and any(
        one["type"] == "Resize" and len(set(one.get("scale", ()))) > 1
        for one in config.test_dataloader.dataset.pipeline
    ):
        print(
            "note: mmdet's Resize turns its size for images that are taller than wide; the network input has one size, "
            "into which they are fitted, smaller"
        )
    onnx_from_detector(detector, contract, output)
    write_sidecar(
        output,
        {"weights": weights_of_run(arguments.run_dir)},
        contract,
        {"opset": OPSET, "parameters": details["parameters"]},
    )
    ranges = Path(arguments.run_dir) / "int8.json"
    if ranges.is_file():
        print(f"note: the run learnt ranges for INT8, which calibration.quantize --ranges {ranges} takes")
    print(
        f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB), input {contract.input_width_px} x "
        f"{contract.input_height_px}"
    )
    return 0


def batch_from_text(text: str) -> int:
    """The number of images, or DYNAMIC; for argparse, which names the flag."""
    if text == "dynamic":
        return DYNAMIC
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images; expected 1 or more, or 'dynamic'")
    return int(text)


def contract_from_config(
    config: Any,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    size_px: Optional[Tuple[int, int]] = None,
    batch: int = 1,
    input_type: str = "float32",
    outputs: str = "topk",
) -> ModelContract:
    """
    The model contract of an mmdet config: pre-processing from its test pipeline, thresholds from its test_cfg.

    Args:
        size_px: width and height of the network input; by default what the test pipeline pads to.
        batch: number of images, DYNAMIC for any.
        input_type, outputs: as in ModelContract.

    Raises:
        ExportError: the head's boxes cannot be decoded in a graph, the pipeline does something that deployment does
            not know, or the size does not fit the strides.
    """
    family = family_with_decoder(config.model.bbox_head.type)
    transforms = {transform["type"]: transform for transform in config.test_dataloader.dataset.pipeline}
    known = {"LoadImageFromFile", "LoadAnnotations", "Resize", "FitResize", "Pad", "FitPad", "PackDetInputs"}
    unknown = sorted(set(transforms) - known)
    if unknown:
        raise ExportError(f"test_pipeline has {unknown}, which deployment cannot repeat; expected only {sorted(known)}")
    resize = transforms.get("FitResize") or transforms.get("Resize")
    if resize is None:
        raise ExportError(
            "test_pipeline has neither Resize nor FitResize; expected one, since the network input has a fixed size"
        )
    normalise = config.model.data_preprocessor
    turned = bool(normalise.get("bgr_to_rgb") or normalise.get("rgb_to_bgr"))  # mmdet reads blue-green-red
    pad = transforms.get("FitPad") or transforms.get("Pad")
    width, height = size_px or size_from_pipeline(resize, pad or {}, normalise.get("pad_size_divisor", 1))
    if width % 32 or height % 32:
        raise ExportError(
            f"the network input is {width} x {height}; expected multiples of 32. Give --size WIDTH HEIGHT"
        )
    scale = resize.get("scale")
    into_all = size_px is not None or not isinstance(scale, (tuple, list)) or tuple(scale) == (width, height)
    mean, std = normalise.get("mean") or (0.0, 0.0, 0.0), normalise.get("std") or (1.0, 1.0, 1.0)
    pad_value = mean  # mmdet's preprocessor pads with 0 after normalisation
    if pad:
        value = pad.get("pad_value") or pad.get("pad_val", 0)
        value = value.get("img", 0) if isinstance(value, dict) else value
        value = (value, value, value) if isinstance(value, (int, float)) else value
        pad_value = value[::-1] if turned else value
    test_cfg = config.model.test_cfg
    if test_cfg.nms.get("type", "nms") != "nms":
        raise ExportError(f"test_cfg.nms.type is {test_cfg.nms.type!r}; deployment knows 'nms' only")
    sizes = {"N": batch, "3": 3, "height": height, "width": width}
    return ModelContract(
        input_name="image",
        input_shape=tuple(sizes[name] for name in LAYOUTS[input_type]),
        channel_order="rgb" if turned else "bgr",
        mean=tuple(float(v) for v in mean),
        std=tuple(float(v) for v in std),
        pad_value=tuple(float(v) for v in pad_value),
        resize="keep_ratio" if resize["type"] == "FitResize" or resize.get("keep_ratio") else "stretch",
        output_names=OUTPUTS[outputs],
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        # Where the graph applies mmdet's threshold, what it rejects leaves with a score of 0: see best_candidates.
        score_threshold=0.0 if family.threshold_in_graph else test_cfg.score_thr,
        nms_iou_threshold=test_cfg.nms.iou_threshold,
        max_detections=test_cfg.max_per_img,
        input_type=input_type,
        outputs=outputs,
        resize_wh_px=None if into_all else tuple(scale),
    )


def size_from_pipeline(resize: Any, pad: Any, divisor: int) -> Tuple[int, int]:
    """
    Width and height to which a test pipeline brings its images.

    Raises:
        ExportError: it brings them to no fixed size.
    """
    size = pad.get("size") or resize.get("scale")
    if not isinstance(size, (tuple, list)) or len(size) != 2 or isinstance(size[0], (tuple, list)):
        raise ExportError(
            f"test_pipeline resizes to {size!r}; expected one (width, height), since the network input has a fixed "
            "size. Give --size WIDTH HEIGHT"
        )
    divisor = pad.get("size_divisor") or divisor
    width, height = (-(-side // divisor) * divisor for side in size)
    return width, height


def family_with_decoder(head_type: str) -> Any:
    """
    The HeadFamily of a type of head.

    Raises:
        ExportError: none that decodes boxes; the heads that have one are named.
    """
    import crosskd.models.families  # noqa: F401  registers them
    from crosskd.models.heads import FAMILIES, heads_with_decoder

    if head_type not in heads_with_decoder():
        raise ExportError(
            f"cannot export the head {head_type}; can export {', '.join(heads_with_decoder())}. docs/add-a-head.md "
            "says how to add one."
        )
    return FAMILIES[head_type]


def onnx_from_detector(detector: Any, contract: ModelContract, path: Path) -> None:
    """
    Writes the detector as one ONNX file, checked by onnx and compared with torch's own outputs through ONNX Runtime.

    Raises:
        ExportError: the head cannot be decoded in a graph, or the file does not compute what the detector does.
    """
    import torch

    from crosskd.models.families.deform import deform_convolutions_of_standard_operators
    from deploy.graphs.graph import check_graph, save_onnx

    with replacing(path) as temporary, deform_convolutions_of_standard_operators(), torch.no_grad():
        model = deployed_model(detector, contract)
        if contract.input_shape[0] == DYNAMIC:
            graph = graph_of_any_batch(*(traced_graph(model, contract, images, temporary) for images in (2, 3)))
        else:
            graph = traced_graph(model, contract, contract.input_shape[0], temporary)
        save_onnx(graph, temporary)
        images = example_input(contract, 1)
        check_same_outputs(temporary, contract.input_name, images.numpy(), [part.numpy() for part in model(images)])
        if contract.outputs == "nms":
            add_suppression(graph, contract)
            check_graph(graph)
            save_onnx(graph, temporary)
            run_once(temporary, {contract.input_name: images.numpy()})


def traced_graph(model: Any, contract: ModelContract, images: int, scratch: Path) -> onnx.ModelProto:
    """
    The cleaned graph of a deployed model for a number of images, with the outputs of 'topk'.

    Args:
        scratch: a file that is overwritten.

    Raises:
        ExportError: as `clean_graph`.
    """
    import torch

    from deploy.graphs.graph import load_onnx

    images_in = example_input(contract, images)
    names = [CANDIDATE + name for name in OUTPUTS["topk"]] if contract.outputs == "nms" else contract.output_names
    with warnings.catch_warnings():
        # The tracer warns of each Python number, all of which are meant to be constants.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (images_in,),
            str(scratch),
            dynamo=False,
            opset_version=OPSET,
            input_names=[contract.input_name],
            output_names=list(names),
        )
    return clean_graph(load_onnx(scratch), {contract.input_name: images_in.numpy()})


def example_input(contract: ModelContract, images: int) -> Any:
    """A tensor of noise, of the contract's type and shape; of as many images as asked for if it takes any number."""
    import torch

    batch, *sizes = contract.input_shape
    shape = (images if batch == DYNAMIC else batch, *sizes)
    generator = torch.Generator().manual_seed(0)
    if contract.input_type == "uint8":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def deployed_model(detector: Any, contract: ModelContract) -> Any:
    """
    A torch module: network input -> boxes (N, K, 4) in input pixels, scores (N, K), labels (N, K).

    Sizes in it are Python numbers, so that the traced graph holds constants and no shape arithmetic.

    Raises:
        ExportError: no decoder for this head; those that there are, are named. Or its classes exclude one another.
    """
    import torch

    head = detector.bbox_head
    family = family_with_decoder(type(head).__name__)
    if not head.use_sigmoid_cls:
        raise ExportError(
            f"{type(head).__name__} scores its classes by softmax (loss_cls.use_sigmoid is false); can export heads "
            "with use_sigmoid=True only"
        )
    traceable = family.traceable(head)
    test_cfg = head.test_cfg

    class Deployed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = detector
            if contract.input_type == "uint8":
                self.mean, self.std = (torch.tensor(v).reshape(3, 1, 1) for v in (contract.mean, contract.std))
            with torch.no_grad():
                maps = traceable(detector.extract_feat(self.normalised(example_input(contract, 1))))[0]
            sizes = [tuple(level.shape[-2:]) for level in maps]
            for level, priors in enumerate(head.prior_generator.grid_priors(sizes, device="cpu")):
                self.register_buffer(f"priors_{level}", priors, persistent=False)

        def normalised(self, images: torch.Tensor) -> torch.Tensor:
            if contract.input_type == "float32":
                return images
            return (images.float().permute(0, 3, 1, 2) - self.mean) / self.std

        def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            outputs = traceable(detector.extract_feat(self.normalised(images)))
            found: List[Tuple[torch.Tensor, ...]] = []
            for level, maps in enumerate(zip(*outputs)):
                priors = getattr(self, f"priors_{level}")
                rows = [rows_of_priors(m, len(priors)) for m in maps]
                boxes, scores, *factor = family.decode(head, level, priors, *rows)
                found.append(
                    best_candidates(boxes, scores, test_cfg.get("nms_pre", -1), *factor, threshold=test_cfg.score_thr)
                )
            return tuple(torch.cat(parts, dim=1) for parts in zip(*found))

    return Deployed().eval()


def rows_of_priors(maps: Any, priors: int) -> Any:
    """(N, A * channels, H, W) -> (N, P, channels), with P = H * W * A."""
    channels = int(maps.shape[1]) * int(maps.shape[2]) * int(maps.shape[3]) // priors
    return maps.permute(0, 2, 3, 1).reshape(-1, priors, channels)


def best_candidates(
    boxes: Any, scores: Any, limit: int, factor: Optional[Any] = None, threshold: float = 0.0
) -> Tuple[Any, Any, Any]:
    """
    The `limit` best (box, class) pairs of a level, as mmdet's `filter_scores_and_topk` chooses them.

    Args:
        boxes: (N, P, 4). scores: (N, P, classes).
        factor: (N, P), of heads with centerness. mmdet chooses by the score alone, above `threshold`, and multiplies
            afterwards: what is below becomes 0 here, so that nothing is left for a later threshold to do.

    Returns:
        boxes (N, k, 4), scores (N, k), labels (N, k) int64, with k = min(limit, P * classes).
    """
    import torch

    points, classes = int(scores.shape[1]), int(scores.shape[2])
    k = min(points * classes, limit if limit > 0 else TOPK_LIMIT, TOPK_LIMIT)
    best, index = scores.reshape(-1, points * classes).topk(k, dim=1)
    point = torch.div(index, classes, rounding_mode="trunc")
    rows = torch.stack([point] * 4, dim=-1)  # (N, k, 4)
    if factor is not None:
        best = (best > threshold).to(best.dtype) * best * factor.gather(1, point)
    return boxes.gather(1, rows), best, index - point * classes


def clean_graph(model: onnx.ModelProto, feed: Dict[str, Any]) -> onnx.ModelProto:
    """
    The graph with constants and shape arithmetic folded by onnxslim, and equal weights stored once.

    Folding the norms gives each level a copy of the head's convolutions, which are the same for all levels.

    Args:
        feed: input name -> array, of the one shape that the graph was traced for.

    Raises:
        ExportError: onnx's checker refuses the graph, or an operator is not ONNX's own, or a shape is not static.
    """
    import onnxslim

    from deploy.graphs.graph import check_graph, check_static, share_equal_initializers

    model = onnxslim.slim(model)
    if any(node.op_type == "Shape" for node in model.graph.node):  # onnxslim cannot infer every one, as behind a Pad
        fix_shapes(model, feed)
        model = onnxslim.slim(model)
    share_equal_initializers(model)
    check_graph(model)
    check_static(model)
    left = sorted({node.op_type for node in model.graph.node} & {"Shape", "ConstantOfShape", "NonZero", "If", "Loop"})
    if left:
        raise ExportError(f"the graph still computes shapes ({', '.join(left)}); expected a static graph")
    return model


def fix_shapes(model: onnx.ModelProto, feed: Dict[str, Any]) -> None:
    """Replaces each Shape by what it gives for `feed`, in place, and each output's shape; all sizes are static."""
    import onnx
    import onnxruntime

    nodes = [node for node in model.graph.node if node.op_type == "Shape"]
    outputs = list(model.graph.output)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in nodes)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, feed)
    for value, result in zip(outputs, results):
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, result.shape))
    for node, result in zip(nodes, results[len(outputs) :]):
        model.graph.initializer.append(onnx.numpy_helper.from_array(result, node.output[0]))
        model.graph.node.remove(node)
    del model.graph.value_info[:]  # inferred without these


def graph_of_any_batch(two: onnx.ModelProto, three: onnx.ModelProto) -> onnx.ModelProto:
    """
    `two`, changed so that it takes any number of images, without computing a shape.

    What differs between a graph for two images and one for three is the number of images. In a Reshape it becomes -1,
    in an Expand 1, since there is nothing to repeat; the sizes of a Resize become scales.

    Raises:
        ExportError: another operator depends on the number of images, or the nodes themselves.
    """
    import numpy as np
    from onnx import numpy_helper, shape_inference

    from deploy.graphs.graph import initializers, remove_unused

    def differs(reason: str) -> ExportError:
        return ExportError(
            f"the graph depends on the number of images by more than sizes: {reason}. Give a number, as in --batch 1"
        )

    def shapes_in(model: onnx.ModelProto) -> Dict[str, Any]:
        graph = shape_inference.infer_shapes(model).graph
        values = (*graph.input, *graph.value_info, *graph.output)
        return {value.name: np.array([d.dim_value for d in value.type.tensor_type.shape.dim]) for value in values}

    values = [{name: numpy_helper.to_array(t) for name, t in initializers(model).items()} for model in (two, three)]
    shapes, other_shapes = shapes_in(two), shapes_in(three)
    if [node.op_type for node in two.graph.node] != [node.op_type for node in three.graph.node]:
        raise differs("its nodes are others")
    for node, other in zip(two.graph.node, three.graph.node):
        for index, (name, other_name) in enumerate(zip(node.input, other.input)):
            if name not in values[0] or other_name not in values[1]:
                continue
            mine, theirs = values[0][name], values[1][other_name]
            if np.array_equal(mine, theirs):
                continue
            known = values[0].get(node.input[0])
            before = shapes[node.input[0]] if known is None else np.array(known.shape)
            after = shapes[node.output[0]]
            of_batch = after != other_shapes[other.output[0]]
            if node.op_type == "Reshape" and of_batch.sum() == 1:
                changed = np.where(of_batch, -1, after)
            elif node.op_type == "Expand" and len(before) == len(after) and (before == after)[of_batch].all():
                changed = np.where(of_batch, 1, after)
            elif node.op_type == "Resize" and index == 3 and of_batch.tolist() == [True, False, False, False]:
                changed = (after / before).astype(np.float32)
                del node.input[3]
                index = 2
            else:
                raise differs(f"the input {name} of {node.name or node.output[0]} ({node.op_type})")
            two.graph.initializer.append(numpy_helper.from_array(changed, f"{node.output[0]}_{index}_of_any_batch"))
            node.input[index] = two.graph.initializer[-1].name
    for value in (*two.graph.input, *two.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del two.graph.value_info[:]  # for two images
    remove_unused(two)
    return two


def add_suppression(model: onnx.ModelProto, contract: ModelContract) -> None:
    """
    Appends threshold and NMS per class to a graph with the outputs of 'topk', in place: outputs as of 'nms'.

    As mmdet's `batched_nms`: the boxes of each class are moved to a place of their own, so that boxes overlap within
    their class only. Boxes are clipped to the network input before: the size of the image in it, to which
    deploy/runtime/postprocess.py clips, the graph does not know. TensorRT looks at the best 5000 candidates of an image
    only (facts: TensorRT, section 4). What NMS reads has to stay in float32, where large numbers keep their pixels.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    boxes, scores, labels = (value.name for value in graph.output)
    width, height = contract.input_width_px, contract.input_height_px

    def constant(name: str, value: Any, kind: Any = np.int64) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, kind), f"nms_{name}"))
        return f"nms_{name}"

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(operator, inputs, [output], name=f"nms/{output}", **attributes))
        return output

    clipped = add("Max", [boxes, constant("zero", 0, np.float32)], "nms_inside")
    limits = constant("limits", [width, height, width, height], np.float32)
    clipped = add("Min", [clipped, limits], "nms_clipped")  # (N, K, 4)
    corners = [
        add("Gather", [clipped, constant(name, axes)], f"nms_{name}_corner", axis=2)
        for name, axes in (("second", [2, 3]), ("first", [0, 1]))
    ]
    sides = add("Sub", corners, "nms_sides")
    # Of a box without an area NonMaxSuppression would swap the corners; mmdet drops it.
    shortest = add("ReduceMin", [sides], "nms_shortest", axes=[2], keepdims=0)  # (N, K)
    solid = add("Cast", [add("Greater", [shortest, "nms_zero"], "nms_solid")], "nms_factor", to=TensorProto.FLOAT)
    solid_scores = add("Mul", [scores, solid], "nms_scores")
    place = add("Cast", [labels], "nms_class", to=TensorProto.FLOAT)
    place = add("Mul", [place, constant("offset", max(width, height) + 1, np.float32)], "nms_place")
    moved = add("Add", [clipped, add("Unsqueeze", [place, constant("last", [2])], "nms_place_column")], "nms_moved")
    rows = add("Unsqueeze", [solid_scores, constant("middle", [1])], "nms_score_rows")  # (N, 1, K)
    settings = [
        constant("max_detections", [contract.max_detections]),
        constant("iou_threshold", [contract.nms_iou_threshold], np.float32),
        constant("score_threshold", [contract.score_threshold], np.float32),
    ]
    selected = add("NonMaxSuppression", [moved, rows, *settings], "nms_selected")  # (D, 3): image, 0, candidate
    index = add("Gather", [selected, constant("image_and_candidate", [0, 2])], "nms_index", axis=1)
    box_name, score_name, label_name, image_name = contract.output_names
    add("GatherND", [clipped, index], box_name)
    add("GatherND", [scores, index], score_name)
    add("GatherND", [labels, index], label_name)
    add("Gather", [selected, constant("image", 0)], image_name, axis=1)
    del graph.output[:]
    for name, kind, sizes in (
        (box_name, TensorProto.FLOAT, ["D", 4]),
        (score_name, TensorProto.FLOAT, ["D"]),
        (label_name, TensorProto.INT64, ["D"]),
        (image_name, TensorProto.INT64, ["D"]),
    ):
        graph.output.append(helper.make_tensor_value_info(name, kind, sizes))


def run_once(path: Path, feed: Dict[str, Any]) -> List[Any]:
    """
    The outputs of the file on ONNX Runtime.

    Raises:
        ExportError: it cannot run there.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, feed)
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise ExportError(f"ONNX Runtime cannot run the exported graph: {error}") from error


def check_same_outputs(path: Path, input_name: str, images: Any, expected: Sequence[Any]) -> None:
    """
    Runs the file on ONNX Runtime and compares it with torch: scores to 1e-4, boxes to 0.05 pixel.

    Candidates of equal score may change places, so scores are compared in order and boxes by their nearest.

    Args:
        images: the network input. expected: boxes, scores and labels before NMS.

    Raises:
        ExportError: they differ.
    """
    import numpy as np

    boxes, scores, _labels = run_once(path, {input_name: images})
    score_error = float(np.abs(np.sort(scores) - np.sort(expected[1])).max())
    box_error = max(
        float(np.abs(found[:, None] - wanted[None, :100]).max(-1).min(0).max())  # each of torch's first to its nearest
        for found, wanted in zip(boxes, expected[0])
    )
    if not (score_error <= 1e-4 and box_error <= 0.05):  # so written, not-a-number differs, too
        raise ExportError(
            f"the exported graph does not compute what the detector does: scores differ by {score_error:.2g}, boxes by "
            f"{box_error:.2g} pixel; expected at most 1e-4 and 0.05"
        )


if __name__ == "__main__":
    sys.exit(main())
