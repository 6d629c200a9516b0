"""
Checkpoint -> ONNX: `python -m deploy.export RUN_DIR -o student.onnx`.

One file, one static graph: points and strides are constants, boxes are decoded and the best candidates of each level
chosen in the graph; non-maximum suppression stays outside (deploy/postprocess.py). The sidecar carries the model
contract.

Needs the training packages (torch, mmdet) and onnx; it is the one file outside crosskd/ that may import them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from deploy.contract import ModelContract, weights_of_run, write_sidecar
from deploy.errors import ConfigError, ExportError, command
from deploy.files import check_writable, replacing

OPSET = 17
"""The highest that TensorRT 8.5 parses, and high enough for every operator here (facts: TensorRT, section 2)."""
TOPK_LIMIT = 3840
"""TensorRT takes no larger K from 10.1 on (facts: TensorRT, section 6)."""


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
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix != ".onnx":
        raise ConfigError(f"the output is {output}; expected a name that ends in .onnx")
    check_writable(output)

    from crosskd.training import load_run

    config, detector, sidecar = load_run(arguments.run_dir)
    details = sidecar["details"]
    size = tuple(arguments.size) if arguments.size else None
    contract = contract_from_config(config, details["class_names"], details["category_ids"], size)
    onnx_from_detector(detector, contract, output)
    write_sidecar(
        output,
        {"weights": weights_of_run(arguments.run_dir)},
        contract,
        {"opset": OPSET, "parameters": details["parameters"]},
    )
    print(
        f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB), input {contract.input_width_px} x "
        f"{contract.input_height_px}"
    )
    return 0


def contract_from_config(
    config: Any, class_names: Sequence[str], category_ids: Sequence[int], size_px: Optional[Tuple[int, int]] = None
) -> ModelContract:
    """
    The model contract of an mmdet config: pre-processing from its test pipeline, thresholds from its test_cfg.

    Args:
        size_px: width and height of the network input; by default what the test pipeline pads to.

    Raises:
        ExportError: the pipeline does something that deployment does not know, or the size does not fit the strides.
    """
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
    return ModelContract(
        input_name="image",
        input_shape=(1, 3, height, width),
        channel_order="rgb" if turned else "bgr",
        mean=tuple(float(v) for v in mean),
        std=tuple(float(v) for v in std),
        pad_value=tuple(float(v) for v in pad_value),
        resize="keep_ratio" if resize["type"] == "FitResize" or resize.get("keep_ratio") else "stretch",
        output_names=("boxes", "scores", "labels"),
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        score_threshold=0.0 if config.model.bbox_head.type in WITH_CENTERNESS else test_cfg.score_thr,
        nms_iou_threshold=test_cfg.nms.iou_threshold,
        max_detections=test_cfg.max_per_img,
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


def onnx_from_detector(detector: Any, contract: ModelContract, path: Path) -> None:
    """
    Writes the detector as one ONNX file, checked by onnx and compared with torch's own outputs through ONNX Runtime.

    Raises:
        ExportError: the head cannot be decoded in a graph, or the file does not compute what the detector does.
    """
    import torch

    model = deployed_model(detector, contract)
    image = torch.randn(contract.input_shape, generator=torch.Generator().manual_seed(0))
    with replacing(path) as temporary:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter(
                "ignore"
            )  # the tracer warns of each Python number, all of which are meant to be constants
            torch.onnx.export(
                model,
                (image,),
                str(temporary),
                dynamo=False,
                opset_version=OPSET,
                input_names=[contract.input_name],
                output_names=list(contract.output_names),
            )
        clean_graph(temporary)
        with torch.no_grad():
            check_same_outputs(temporary, contract, image.numpy(), [output.numpy() for output in model(image)])


def deployed_model(detector: Any, contract: ModelContract) -> Any:
    """
    A torch module: normalised image -> boxes (N, K, 4) in input pixels, scores (N, K), labels (N, K).

    Sizes in it are Python numbers, so that the traced graph holds constants and no shape arithmetic.

    Raises:
        ExportError: no decoder for this head; those that there are, are named.
    """
    import torch

    head = detector.bbox_head
    name = type(head).__name__
    if name not in DECODERS:
        raise ExportError(f"cannot export the head {name}; can export {', '.join(sorted(DECODERS))}")
    decode = DECODERS[name]
    test_cfg = head.test_cfg
    batch = contract.input_shape[0]
    strides = [float(stride[0]) for stride in head.prior_generator.strides]

    class Deployed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = detector
            with torch.no_grad():
                outputs = head(detector.extract_feat(torch.zeros(contract.input_shape)))
            sizes = [tuple(maps.shape[-2:]) for maps in outputs[0]]
            for level, priors in enumerate(head.prior_generator.grid_priors(sizes, device="cpu")):
                self.register_buffer(f"priors_{level}", priors, persistent=False)

        def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            outputs = head(detector.extract_feat(image))
            found: List[Tuple[torch.Tensor, ...]] = []
            for level, maps in enumerate(zip(*outputs)):
                priors = getattr(self, f"priors_{level}")
                rows = [m.permute(0, 2, 3, 1).reshape(batch, len(priors), -1) for m in maps]  # (N, P, channels)
                boxes, scores, *factor = decode(head, priors, strides[level], *rows)
                found.append(
                    best_candidates(boxes, scores, test_cfg.get("nms_pre", -1), *factor, threshold=test_cfg.score_thr)
                )
            return tuple(torch.cat(parts, dim=1) for parts in zip(*found))

    return Deployed().eval()


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

    batch, points, classes = (int(size) for size in scores.shape)
    k = min(points * classes, limit if limit > 0 else TOPK_LIMIT, TOPK_LIMIT)
    best, index = scores.reshape(batch, points * classes).topk(k, dim=1)
    point = torch.div(index, classes, rounding_mode="trunc")
    rows = point.reshape(batch, k, 1).repeat(1, 1, 4)
    if factor is not None:
        best = (best > threshold).to(best.dtype) * best * factor.gather(1, point)
    return boxes.gather(1, rows), best, index - point * classes


def decode_gfl(head: Any, anchors: Any, stride: float, logits: Any, distances: Any) -> Tuple[Any, ...]:
    """
    Boxes (N, P, 4) and scores (N, P, classes) of one level of a GFL head.

    A side's distance is the mean of its distribution over the bins 0 to reg_max, in strides (arXiv 2006.04388,
    equation 4).

    Args:
        anchors: (P, 4), pixels. logits: (N, P, classes). distances: (N, P, 4 * (reg_max + 1)).
    """
    import torch

    bins = head.reg_max + 1
    distribution = distances.reshape(int(distances.shape[0]), len(anchors), 4, bins).softmax(-1)
    sides = (distribution * (torch.arange(bins) * stride)).sum(-1)
    return _boxes_from_sides((anchors[:, :2] + anchors[:, 2:]) / 2, sides), logits.sigmoid()


def decode_fcos(head: Any, points: Any, stride: float, logits: Any, sides: Any, centerness: Any) -> Tuple[Any, ...]:
    """
    Boxes (N, P, 4), scores (N, P, classes) and centerness (N, P) of one level of an FCOS head.

    Args:
        points: (P, 2), pixels. logits: (N, P, classes). sides: (N, P, 4), pixels. centerness: (N, P, 1), logit.
    """
    return _boxes_from_sides(points, sides), logits.sigmoid(), centerness[..., 0].sigmoid()


def decode_anchors(
    head: Any, anchors: Any, stride: float, logits: Any, deltas: Any, centerness: Optional[Any] = None
) -> Tuple[Any, ...]:
    """
    Boxes (N, P, 4), scores (N, P, classes) and, of ATSS, centerness (N, P) of one level of a head with anchors.

    Deltas are those of Faster R-CNN (arXiv 1506.01497, equation 2), scaled by the coder's means and stds.

    Args:
        anchors: (P, 4), pixels. logits: (N, P, classes). deltas: (N, P, 4). centerness: (N, P, 1), logit.
    """
    import math

    import torch
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder

    coder = head.bbox_coder
    if type(coder) is not DeltaXYWHBBoxCoder or coder.add_ctr_clamp:
        raise ExportError(f"cannot export the box coder {coder}; can export DeltaXYWHBBoxCoder without add_ctr_clamp")
    deltas = deltas * torch.tensor(coder.stds) + torch.tensor(coder.means)
    centres, sizes = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    longest = abs(math.log(16 / 1000))  # mmdet's wh_ratio_clip, beyond which a box cannot grow
    halves = sizes * deltas[..., 2:].clamp(-longest, longest).exp() / 2
    centres = centres + sizes * deltas[..., :2]
    boxes = torch.cat([centres - halves, centres + halves], dim=-1)
    return (boxes, logits.sigmoid()) if centerness is None else (boxes, logits.sigmoid(), centerness[..., 0].sigmoid())


def _boxes_from_sides(points: Any, sides: Any) -> Any:
    """(N, P, 4) x1 y1 x2 y2 from points (P, 2) and distances to left, top, right, bottom (N, P, 4)."""
    import torch

    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


DECODERS: Dict[str, Callable[..., Tuple[Any, ...]]] = {
    "GFLHead": decode_gfl,
    "RetinaHead": decode_anchors,
    "ATSSHead": decode_anchors,
    "FCOSHead": decode_fcos,
}
WITH_CENTERNESS = ("ATSSHead", "FCOSHead")
"""Their scores leave the graph with mmdet's threshold applied: see `best_candidates`."""


def clean_graph(path: Path) -> None:
    """
    Folds constants and shape arithmetic with onnxslim, and stores equal weights once, in place.

    Folding the norms gives each level a copy of the head's convolutions, which are the same for all levels.

    Raises:
        ExportError: onnx's checker refuses the graph, or a shape is not static.
    """
    import onnxslim

    from deploy.graph import check_graph, check_static, load_onnx, save_onnx, share_equal_initializers

    model = onnxslim.slim(load_onnx(path))
    share_equal_initializers(model)
    check_graph(model)
    check_static(model)
    left = sorted({node.op_type for node in model.graph.node} & {"Shape", "ConstantOfShape", "NonZero", "If", "Loop"})
    if left:
        raise ExportError(f"the graph still computes shapes ({', '.join(left)}); expected a static graph")
    save_onnx(model, path)


def check_same_outputs(path: Path, contract: ModelContract, image: Any, expected: Sequence[Any]) -> None:
    """
    Runs the file on ONNX Runtime and compares it with torch: scores to 1e-4, boxes to 0.05 pixel.

    Candidates of equal score may change places, so scores are compared in order and boxes by their nearest.

    Raises:
        ExportError: they differ.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    boxes, scores, _labels = session.run(list(contract.output_names), {contract.input_name: image})
    score_error = float(np.abs(np.sort(scores) - np.sort(expected[1])).max())
    distance = (
        np.abs(boxes[0][:, None] - expected[0][0][None, :100]).max(-1).min(0)
    )  # each of torch's first to its nearest
    if score_error > 1e-4 or distance.max() > 0.05:
        raise ExportError(
            f"the exported graph does not compute what the detector does: scores differ by {score_error:.2g}, boxes by "
            f"{distance.max():.2g} pixel; expected at most 1e-4 and 0.05"
        )


if __name__ == "__main__":
    sys.exit(main())
