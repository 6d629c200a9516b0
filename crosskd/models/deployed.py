"""
A detector as one static ONNX graph: points and strides are constants, boxes are decoded and the best candidates of each
level chosen in the graph.

How a head's outputs become boxes is said by its family (crosskd/models/families). What is done to the traced graph is
plain ONNX and stands in deploy/graphs/cleaning.py and suppression.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosskd.models.families import family_with_decoder
from crosskd.models.families.deform import deform_convolutions_of_standard_operators
from deploy.contract import DYNAMIC, ModelContract
from deploy.errors import ExportError
from deploy.files import replacing
from deploy.graphs.cleaning import check_same_outputs, clean_graph, graph_of_any_batch, run_once
from deploy.graphs.graph import check_graph, load_onnx, save_onnx
from deploy.graphs.output_layout import CANDIDATES, lay_out

if TYPE_CHECKING:
    import onnx

OPSET = 17
"""The highest that TensorRT 8.5 parses (docs/operators.md of github.com/onnx/onnx-tensorrt, release/8.5-GA)."""
TOPK_LIMIT = 3839
"""From 10.1 on TensorRT's parser takes K < 3840 (docs/operators.md of github.com/onnx/onnx-tensorrt, TopK)."""


def onnx_from_detector(detector: Any, contract: ModelContract, path: Path) -> None:
    """
    Writes the detector as one ONNX file, checked by onnx and compared with torch's own outputs through ONNX Runtime.

    Raises:
        ExportError: the head cannot be decoded in a graph, or the file does not compute what the detector does.
    """
    with replacing(path) as temporary, deform_convolutions_of_standard_operators(), torch.no_grad():
        model = deployed_model(detector, contract)
        if contract.input_shape[0] == DYNAMIC:
            graph = graph_of_any_batch(*(traced_graph(model, contract, images, temporary) for images in (2, 3)))
        else:
            graph = traced_graph(model, contract, contract.input_shape[0], temporary)
        save_onnx(graph, temporary)
        images = example_input(contract, 1)
        check_same_outputs(temporary, contract.input_name, images.numpy(), [part.numpy() for part in model(images)])
        lay_out(graph, contract)
        check_graph(graph)
        save_onnx(graph, temporary)
        run_once(temporary, {contract.input_name: images.numpy()})


def traced_graph(model: nn.Module, contract: ModelContract, images: int, scratch: Path) -> onnx.ModelProto:
    """
    The cleaned graph of a deployed model for a number of images, with the outputs CANDIDATES.

    Args:
        scratch: a file that is overwritten.

    Raises:
        ExportError: as `clean_graph`.
    """
    images_in = example_input(contract, images)
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
            output_names=list(CANDIDATES),
        )
    return clean_graph(load_onnx(scratch), {contract.input_name: images_in.numpy()})


def example_input(contract: ModelContract, images: int) -> Tensor:
    """A tensor of noise, of the contract's type and shape; of as many images as asked for if it takes any number."""
    batch, *sizes = contract.input_shape
    shape = (images if batch == DYNAMIC else batch, *sizes)
    generator = torch.Generator().manual_seed(0)
    if contract.input_type == "uint8":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def deployed_model(detector: Any, contract: ModelContract) -> nn.Module:
    """
    A torch module: network input -> boxes (N, K, 4) in input pixels, scores (N, K), labels (N, K).

    Sizes in it are Python numbers, so that the traced graph holds constants and no shape arithmetic.

    Raises:
        ExportError: no decoder for this head; those that there are, are named. Or its classes exclude one another.
    """
    head = detector.bbox_head
    family = family_with_decoder(type(head).__name__)
    if not head.use_sigmoid_cls:
        raise ExportError(
            f"{type(head).__name__} scores its classes by softmax (loss_cls.use_sigmoid is false); can export heads "
            "with use_sigmoid=True only"
        )
    traceable = family.traceable(head)
    test_cfg = head.test_cfg

    class Deployed(nn.Module):
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

        def normalised(self, images: Tensor) -> Tensor:
            if contract.input_type == "float32":
                return images
            return (images.float().permute(0, 3, 1, 2) - self.mean) / self.std

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs = traceable(detector.extract_feat(self.normalised(images)))
            candidates: list[tuple[Tensor, ...]] = []
            for level, maps in enumerate(zip(*outputs, strict=True)):
                priors = getattr(self, f"priors_{level}")
                rows = [rows_of_priors(m, len(priors)) for m in maps]
                boxes, scores, *factors = family.decode(head, level, priors, *rows)
                limit, factor = test_cfg.get("nms_pre", -1), factors[0] if factors else None
                candidates.append(best_candidates(boxes, scores, limit, factor, test_cfg.score_thr))
            return tuple(torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True))

    return Deployed().eval()


def rows_of_priors(maps: Tensor, priors: int) -> Tensor:
    """(N, A * channels, H, W) -> (N, P, channels), with P = H * W * A."""
    channels = int(maps.shape[1]) * int(maps.shape[2]) * int(maps.shape[3]) // priors
    return maps.permute(0, 2, 3, 1).reshape(-1, priors, channels)


def best_candidates(
    boxes: Tensor, scores: Tensor, limit: int, factor: Tensor | None = None, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The `limit` best (box, class) pairs of a level, as mmdet's `filter_scores_and_topk` chooses them.

    Args:
        boxes: (N, P, 4). scores: (N, P, classes).
        factor: (N, P), of heads with centerness. mmdet chooses by the score alone, above `threshold`, and multiplies
            afterwards: what is below becomes 0 here, so that nothing is left for a later threshold to do.

    Returns:
        boxes (N, k, 4), scores (N, k), labels (N, k) int64, with k = min(limit, P * classes).
    """
    points, classes = int(scores.shape[1]), int(scores.shape[2])
    k = min(points * classes, limit if limit > 0 else TOPK_LIMIT, TOPK_LIMIT)
    best, index = scores.reshape(-1, points * classes).topk(k, dim=1)
    point = torch.div(index, classes, rounding_mode="trunc")
    rows = torch.stack([point] * 4, dim=-1)  # (N, k, 4)
    if factor is not None:
        best = (best > threshold).to(best.dtype) * best * factor.gather(1, point)
    return boxes.gather(1, rows), best, index - point * classes
