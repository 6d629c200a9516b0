"""
Whether two sessions of one detector agree: the check that a fresh engine has to pass.

Builders have made wrong engines of right graphs (TensorRT 10.2.0; some 10.13 builds on Thor), so each engine runs a few
fixed inputs before it is kept. Candidates before NMS are compared where the graph ends there: NMS makes another box of
a last-digit difference. Where NMS is in the graph the detections are, in both directions, since each side may have some
that the other has not.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Dict, Iterator, Mapping, Tuple

import numpy as np

from deploy.contract import ModelContract
from deploy.errors import EngineBuildError
from deploy.runtime.session import Arrays, Session, candidates

if TYPE_CHECKING:
    import onnx

SEEDS = (0, 1, 2, 3)
BLACK_AND_WHITE = SEEDS[-1]
"""The seed whose blocks are black and white: values far from their mean, where norms overflow in FP16."""
BEST = 50
"""Candidates compared per image."""
SHORTEST_PX = 32.0
IMAGES_IF_ANY = 2
"""Images of the inputs of a graph that takes any number of them: more than one, so that they can be mixed up."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far candidates may differ and still match."""

    box: float
    """Largest distance of a box side, as a part of the box's longer side (of SHORTEST_PX for smaller boxes)."""
    logit: float
    """Largest distance of log(score / (1 - score)), which sees 0.85 become 0.45 as well as 0.02 become 0.003."""
    matched: float
    """The least part of the best candidates that must have a match."""


MARGIN = 3.0
"""How many times further than its emulation an INT8 engine may be: its kernels are chosen by speed, not by us."""
TOLERANCES = {
    "fp32": Tolerance(0.005, 0.02, 0.98),
    "fp16": Tolerance(0.02, 0.1, 0.95),
    "int8": Tolerance(0.1, 0.5, 0.9),
}
"""Precision -> tolerance against FP32, for "int8" against the same Q/DQ graph in FP32.

That of "int8" holds where the model itself was not measured (`tolerance_of_integer_kernels`). Set above what rounding
did to a trained GFL-R18 of half width on the CPU, 150 candidates: FP16 at most 0.0007 (box) and 0.006 (logit); FP16
around Q/DQ 0.013 and 0.14 for nine of ten, at most 0.04 and 1.3. Not yet seen on a GPU.
"""


def tolerance_of_integer_kernels(reference: Session, model: onnx.ModelProto) -> Tolerance:
    """
    How far an INT8 engine of a Q/DQ graph may be from ONNX Runtime, which computes it in float.

    Measured on the golden inputs, with the graph in the arithmetic of integer kernels: MARGIN times what nine of ten
    candidates stay within, at least what FP16 has, for as many of them (but for a twentieth) as stay within that.

    Args:
        reference: ONNX Runtime on the file of `model`.
        model: for target tensorrt. Needs onnx and onnxruntime.
    """
    import onnxruntime

    from deploy.graphs.integer_kernels import integer_kernels

    contract = reference.contract
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # as `half_from_float` says
    options.log_severity_level = 3
    try:
        content = integer_kernels(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen types
        print(f"warning: the engine is compared within {TOLERANCES['int8']}: {error}", file=sys.stderr)
        return TOLERANCES["int8"]
    distances = []
    for seed in SEEDS:
        noise = noise_input(contract, seed)
        expected = reference.infer({contract.input_name: noise})
        found = dict(zip(contract.output_names, session.run(list(contract.output_names), {contract.input_name: noise})))
        distances.append(match_distances(expected, found, contract, len(noise)))
        if contract.outputs == "nms":
            distances.append(match_distances(found, expected, contract, len(noise)))
    return tolerance_from_distances(np.concatenate(distances))


def tolerance_from_distances(distances: np.ndarray) -> Tolerance:
    """As `tolerance_of_integer_kernels`, of the (n, 2) distances that `match_distances` found."""
    finite = distances[np.isfinite(distances).all(axis=1)]
    if not len(finite):
        return TOLERANCES["int8"]
    least = TOLERANCES["fp16"]
    box, logit = MARGIN * np.quantile(finite, 0.9, axis=0)
    box, logit = max(float(box), least.box), max(float(logit), least.logit)
    within = float(np.mean((distances[:, 0] <= box) & (distances[:, 1] <= logit)))
    return Tolerance(round(box, 4), round(logit, 4), round(min(within, least.matched) - 0.05, 4))


BUILD_ANEW = (
    "Try another --opt-level, another TensorRT version or a higher precision, or keep it with --keep-differing and "
    "measure its AP."
)
RUN_ELSEWHERE = "Try another version of ONNX Runtime, or a higher precision."


def check_agreement(
    reference: Session, session: Session, tolerance: Tolerance, advice: str = BUILD_ANEW
) -> Dict[str, float]:
    """
    What `measure_agreement` finds.

    Args:
        advice: what to do about a difference, for the message.

    Raises:
        EngineBuildError: fewer match than the tolerance allows.
    """
    found = measure_agreement(reference, session, tolerance)
    if found["matched"] < tolerance.matched:
        raise EngineBuildError(
            f"the engine is wrong: of the {found['compared']} best candidates in {len(SEEDS)} noise images by "
            f"{reference.description}, {found['matched']:.1%} have a match by {session.description}; expected "
            f"{tolerance.matched:.0%} within {tolerance.box} of the box size and {tolerance.logit} in logit (medians: "
            f"{found['box']:.3g}, {found['logit']:.3g}). {advice}"
        )
    return found


def measure_agreement(reference: Session, session: Session, tolerance: Tolerance) -> Dict[str, float]:
    """
    How well the two agree on noise: `compared`, how many of the best candidates; `matched`, the part of them that
    have a match; `box` and `logit`, the median distances, as in `Tolerance`.

    Without NMS in the graph those of the reference are looked for in the session; with it those of each in the other,
    and there may be none at all, which says nothing of the engine: `compared` then is 0, the rest as if all matched.
    """
    contract = reference.contract
    distances = []
    for seed in SEEDS:
        noise = noise_input(contract, seed)
        fewest, most = session.batch_limits  # narrower than the graph's, where an engine was built for some batches
        batch = min(max(len(noise), fewest), most)
        expected = reference.infer({contract.input_name: noise})
        other = session.infer({contract.input_name: np.resize(noise, (batch, *noise.shape[1:]))})  # the same in turn
        images = min(batch, len(noise))
        distances.append(match_distances(expected, other, contract, images))
        if contract.outputs == "nms":
            distances.append(match_distances(other, expected, contract, images))
    box, logit = np.concatenate(distances).T
    if len(box) == 0:
        return {"compared": 0, "matched": 1.0, "box": 0.0, "logit": 0.0}
    return {
        "compared": len(box),
        "matched": float(np.mean((box <= tolerance.box) & (logit <= tolerance.logit))),
        "box": float(np.median(box)),
        "logit": float(np.median(logit)),
    }


def words_of_agreement(found: Mapping[str, float]) -> str:
    """What `measure_agreement` found, for a user."""
    if not found["compared"]:
        return "NOT compared with ONNX Runtime, since it detects nothing in noise: measure it with benchmarks.accuracy"
    return f"{found['matched']:.1%} of {found['compared']:.0f} candidates as in ONNX Runtime"


def noise_input(contract: ModelContract, seed: int) -> np.ndarray:
    """
    A network input of the contract's type and shape: coloured blocks of 16 pixels under fine noise, as of images.

    Of two images where the graph takes any number. Those of BLACK_AND_WHITE span all values that a pixel has.
    """
    generator = np.random.default_rng(seed)
    batch = IMAGES_IF_ANY if contract.input_shape[0] == -1 else contract.input_shape[0]
    height, width = contract.input_height_px, contract.input_width_px
    blocks = generator.integers(64, 160, (batch, 3, -(-height // 16), -(-width // 16)))
    if seed == BLACK_AND_WHITE:
        blocks = np.where(blocks < 112, 0, 255 - 31)
    pixels = np.kron(blocks, np.ones((16, 16), np.int64))[..., :height, :width]
    pixels = pixels + generator.integers(0, 32, (batch, 3, height, width))
    if contract.input_type == "uint8":
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (contract.mean, contract.std))
    return (pixels.astype(np.float32) - mean) / std


def match_distances(reference: Arrays, found: Arrays, contract: ModelContract, images: int) -> np.ndarray:
    """
    (n, 2): box and logit distance, as in `Tolerance`, of the reference's best candidates to their nearest in `found`.

    Of the first `images` of the batch.

    The nearest is that of the same label whose box lies nearest; without one, or where numbers are not finite, both
    distances are infinite.
    """
    rows = []
    for expected, other in zip(_candidates(reference, contract, images), _candidates(found, contract, images)):
        boxes, scores, labels = expected
        for index in np.argsort(-scores, kind="stable")[:BEST]:
            size = max(SHORTEST_PX, float((boxes[index, 2:] - boxes[index, :2]).max()))
            distances = np.abs(other[0] - boxes[index]).max(axis=1) / size
            distances[~(np.isfinite(distances) & np.isfinite(other[1]) & (other[2] == labels[index]))] = np.inf
            if np.isfinite(distances).any():
                nearest = int(np.argmin(distances))
                if contract.score_threshold == 0 and (scores[index] > 0) != (other[1][nearest] > 0):
                    continue  # at the threshold that this graph applies itself, where the last digit decides
                rows.append((distances[nearest], abs(_logit(scores[index]) - _logit(other[1][nearest]))))
            else:
                rows.append((np.inf, np.inf))
    return np.array(rows, np.float64).reshape(-1, 2)


def _candidates(
    outputs: Arrays, contract: ModelContract, images: int
) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Boxes (n, 4), scores (n,) and labels (n,) of each of the first images."""
    for image in range(images):
        boxes, scores, labels = candidates(outputs, contract, image)
        yield boxes.astype(np.float64), scores.astype(np.float64), labels


def _logit(score: float) -> float:
    score = min(max(score, 1e-4), 1 - 1e-4)  # beyond, float32 itself is coarse
    return float(np.log(score / (1 - score)))
