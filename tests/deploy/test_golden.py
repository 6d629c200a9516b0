from __future__ import annotations

from typing import Any, Callable, Dict, Mapping

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.errors import EngineBuildError
from deploy.golden import TOLERANCES, Tolerance, check_agreement, match_distances, noise_input
from deploy.session import Session

Arrays = Dict[str, np.ndarray]
EXACT = Tolerance(box=1e-9, logit=1e-9, matched=1.0)


def detections() -> Arrays:
    random = np.random.default_rng(3)
    corners = random.uniform(0, 40, (1, 60, 2))
    return {
        "boxes": np.concatenate([corners, corners + 64], -1).astype(np.float32),
        "scores": random.uniform(0.1, 0.9, (1, 60)).astype(np.float32),
        "labels": random.integers(0, 2, (1, 60)),
    }


def changed(**parts: Callable[[np.ndarray], Any]) -> Arrays:
    return {name: parts.get(name, lambda x: x)(values) for name, values in detections().items()}


class Fixed(Session):
    def __init__(self, contract: ModelContract, outputs: Arrays) -> None:
        self.contract, self.outputs, self.description = contract, outputs, "a fixed answer"

    def infer(self, feed: Mapping[str, np.ndarray]) -> Arrays:
        return self.outputs


def test_the_same_candidates_in_another_order_agree(detector_contract: ModelContract) -> None:
    order = np.random.default_rng(0).permutation(60)
    shuffled = {name: values[:, order] for name, values in detections().items()}
    found = check_agreement(Fixed(detector_contract, detections()), Fixed(detector_contract, shuffled), EXACT)
    assert found == {"matched": 1.0, "box": 0.0, "logit": 0.0}


def test_distances(detector_contract: ModelContract) -> None:
    def logit(score: np.ndarray) -> np.ndarray:
        return np.log(score / (1 - score))

    found = changed(boxes=lambda x: x + np.float32(0.64), scores=lambda x: 1 / (1 + np.exp(0.3 - logit(x))))
    box, shift = match_distances(detections(), found, detector_contract).T
    assert len(box) == 50
    assert np.allclose(box, 0.01, atol=1e-5)  # 0.64 of 64 pixels
    assert np.allclose(shift, 0.3, atol=1e-5)


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
@pytest.mark.parametrize(
    "wrong",
    [
        {"boxes": np.zeros_like},
        {"boxes": lambda x: x[..., ::-1]},
        {"boxes": lambda x: x * np.float32(1.5)},
        {"boxes": lambda x: np.full_like(x, np.nan)},
        {"scores": np.zeros_like},
        {"scores": lambda x: x / 2},
        {"scores": lambda x: np.full_like(x, np.nan)},
        {"labels": lambda x: 1 - x},
    ],
)
def test_wrong_engines_are_found(detector_contract: ModelContract, precision: str, wrong: Dict[str, Any]) -> None:
    reference, session = Fixed(detector_contract, detections()), Fixed(detector_contract, changed(**wrong))
    with pytest.raises(EngineBuildError, match=r"the engine is wrong.*a fixed answer.*expected"):
        check_agreement(reference, session, TOLERANCES[precision])


def test_noise_is_the_same_every_time_and_spans_the_contract(detector_contract: ModelContract) -> None:
    first = noise_input(detector_contract, 0)
    assert first.shape == detector_contract.input_shape
    assert first.dtype == np.float32
    assert np.array_equal(first, noise_input(detector_contract, 0))
    assert not np.array_equal(first, noise_input(detector_contract, 1))
    pixels = first * detector_contract.std[0] + detector_contract.mean[0]
    assert 60 < pixels.min() < pixels.max() < 195
