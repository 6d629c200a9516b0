"""
Whether two sessions of one detector agree: the check that a fresh engine has to pass.

Builders have made wrong engines of right graphs (TensorRT 10.2.0; some 10.13 builds on Thor), so each engine runs a few
fixed inputs before it is kept. Candidates before NMS are compared: NMS makes another box of a last-digit difference.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Iterator, Tuple

import numpy as np

from deploy.contract import ModelContract
from deploy.errors import EngineBuildError
from deploy.session import Arrays, Session

SEEDS = (0, 1, 2)
BEST = 50
"""Candidates compared per image."""
SHORTEST_PX = 32.0


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far candidates may differ and still match."""

    box: float
    """Largest distance of a box side, as a part of the box's longer side (of SHORTEST_PX for smaller boxes)."""
    logit: float
    """Largest distance of log(score / (1 - score)), which sees 0.85 become 0.45 as well as 0.02 become 0.003."""
    matched: float
    """The least part of the best candidates that must have a match."""


TOLERANCES = {
    "fp32": Tolerance(0.005, 0.02, 0.98),
    "fp16": Tolerance(0.02, 0.1, 0.95),
    "int8": Tolerance(0.1, 0.5, 0.9),
}
"""Precision -> tolerance against FP32, for "int8" against the same Q/DQ graph in FP32.

Set above what rounding alone did to a trained GFL-R18 of half width on the CPU, 150 candidates: FP16 at most 0.0007
(box) and 0.006 (logit); FP16 around Q/DQ 0.013 and 0.14 for nine of ten, at most 0.04 and 1.3. Not yet seen on a GPU.
"""


def check_agreement(reference: Session, session: Session, tolerance: Tolerance) -> Dict[str, float]:
    """
    How well the two agree on noise: `matched`, the part of the reference's best candidates that have a match; `box` and
    `logit`, the median distances, as in `Tolerance`.

    Raises:
        EngineBuildError: fewer match than the tolerance allows.
    """
    contract = reference.contract
    distances = []
    for seed in SEEDS:
        feed = {contract.input_name: noise_input(contract, seed)}
        distances.append(match_distances(reference.infer(feed), session.infer(feed), contract))
    box, logit = np.concatenate(distances).T
    found = {
        "matched": float(np.mean((box <= tolerance.box) & (logit <= tolerance.logit))),
        "box": float(np.median(box)),
        "logit": float(np.median(logit)),
    }
    if found["matched"] < tolerance.matched:
        raise EngineBuildError(
            f"the engine is wrong, it was not kept: of the {len(box)} best candidates in {len(SEEDS)} noise images by "
            f"{reference.description}, {found['matched']:.1%} have a match by {session.description}; expected "
            f"{tolerance.matched:.0%} within {tolerance.box} of the box size and {tolerance.logit} in logit (medians: "
            f"{found['box']:.3g}, {found['logit']:.3g}). Try another --opt-level, another TensorRT version "
            "or a higher precision."
        )
    return found


def noise_input(contract: ModelContract, seed: int) -> np.ndarray:
    """The contract's input shape, float32: coloured blocks of 16 pixels under fine noise, normalised as an image is."""
    generator = np.random.default_rng(seed)
    batch, channels, height, width = contract.input_shape
    blocks = generator.integers(64, 160, (batch, channels, -(-height // 16), -(-width // 16)))
    pixels = np.kron(blocks, np.ones((16, 16), np.int64))[..., :height, :width] + generator.integers(
        0, 32, contract.input_shape
    )
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (contract.mean, contract.std))
    return (pixels.astype(np.float32) - mean) / std


def match_distances(reference: Arrays, found: Arrays, contract: ModelContract) -> np.ndarray:
    """
    (n, 2): box and logit distance, as in `Tolerance`, of the reference's best candidates to their nearest in `found`.

    The nearest is that of the same label whose box lies nearest; without one, or where numbers are not finite, both
    distances are infinite.
    """
    rows = []
    for expected, other in zip(_candidates(reference, contract), _candidates(found, contract)):
        boxes, scores, labels = expected
        for index in np.argsort(-scores, kind="stable")[:BEST]:
            size = max(SHORTEST_PX, float((boxes[index, 2:] - boxes[index, :2]).max()))
            distances = np.abs(other[0] - boxes[index]).max(axis=1) / size
            distances[~(np.isfinite(distances) & np.isfinite(other[1]) & (other[2] == labels[index]))] = np.inf
            nearest = int(np.argmin(distances))
            reached = np.isfinite(distances[nearest])
            rows.append(
                (distances[nearest], abs(_logit(scores[index]) - _logit(other[1][nearest])) if reached else np.inf)
            )
    return np.array(rows, np.float64).reshape(-1, 2)


def _candidates(outputs: Arrays, contract: ModelContract) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    boxes, scores, labels = (outputs[name] for name in contract.output_names)
    return zip(boxes.astype(np.float64), scores.astype(np.float64), labels)


def _logit(score: float) -> float:
    score = min(max(score, 1e-4), 1 - 1e-4)  # beyond, float32 itself is coarse
    return float(np.log(score / (1 - score)))
