from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, Mapping, Optional

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.errors import EngineBuildError
from deploy.runtime.golden import (
    BLACK_AND_WHITE,
    SEEDS,
    TOLERANCES,
    Tolerance,
    check_agreement,
    match_distances,
    noise_input,
    tolerance_from_distances,
)
from deploy.runtime.session import Session

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
        self.batch_limits = (1, 2)

    def infer(self, feed: Mapping[str, np.ndarray], times_ms: Optional[Dict[str, float]] = None) -> Arrays:
        return self.outputs


def test_the_same_candidates_in_another_order_agree(detector_contract: ModelContract) -> None:
    order = np.random.default_rng(0).permutation(60)
    shuffled = {name: values[:, order] for name, values in detections().items()}
    found = check_agreement(Fixed(detector_contract, detections()), Fixed(detector_contract, shuffled), EXACT)
    assert found == {"compared": 50 * len(SEEDS), "matched": 1.0, "box": 0.0, "logit": 0.0}


def test_distances(detector_contract: ModelContract) -> None:
    def logit(score: np.ndarray) -> np.ndarray:
        return np.log(score / (1 - score))

    found = changed(boxes=lambda x: x + np.float32(0.64), scores=lambda x: 1 / (1 + np.exp(0.3 - logit(x))))
    box, shift = match_distances(detections(), found, detector_contract, 1).T
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
    pixels = noise_input(detector_contract, BLACK_AND_WHITE) * detector_contract.std[0] + detector_contract.mean[0]
    assert pixels.min() == pytest.approx(0, abs=1e-4)
    assert pixels.max() == pytest.approx(255, abs=1e-4)


def test_noise_of_pixels_and_of_any_number_of_images(detector_contract: ModelContract) -> None:
    _, channels, height, width = detector_contract.input_shape
    several = dataclasses.replace(detector_contract, input_shape=(-1, channels, height, width))
    assert noise_input(several, 0).shape == (2, channels, height, width)
    pixels = dataclasses.replace(detector_contract, input_type="uint8", input_shape=(1, height, width, channels))
    found = noise_input(pixels, 0)
    assert (found.shape, found.dtype) == ((1, height, width, channels), np.uint8)
    mean, std = np.float32(detector_contract.mean), np.float32(detector_contract.std)
    normalised = ((found.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
    assert np.array_equal(normalised, noise_input(detector_contract, 0))  # the same picture


def test_the_tolerance_of_integer_kernels() -> None:
    spread = np.stack([np.linspace(0, 0.1, 101), np.linspace(0, 1, 101)], -1)
    assert tolerance_from_distances(spread) == Tolerance(0.27, 2.7, 0.9)  # three times what nine of ten are within
    assert tolerance_from_distances(spread / 1e6) == Tolerance(0.02, 0.1, 0.9)  # at least what FP16 has
    spread[:40] = np.inf  # labels that rounding changes have no match
    assert tolerance_from_distances(spread).matched == pytest.approx(61 / 101 - 0.05, abs=1e-4)
    assert tolerance_from_distances(np.full((3, 2), np.inf)) == TOLERANCES["int8"]
    assert tolerance_from_distances(np.empty((0, 2))) == TOLERANCES["int8"]


@pytest.fixture
def suppressed_contract(detector_contract: ModelContract) -> ModelContract:
    names = ("boxes", "scores", "labels", "images")
    shape = (-1, *detector_contract.input_shape[1:])
    return dataclasses.replace(detector_contract, outputs="nms", output_names=names, input_shape=shape)


def suppressed(kept: slice = slice(None)) -> Arrays:
    """60 detections, of two images."""
    rows = {name: values[0] for name, values in detections().items()}
    return {name: values[kept] for name, values in {**rows, "images": np.arange(60) % 2}.items()}


def test_detections_in_another_order_agree(suppressed_contract: ModelContract) -> None:
    backwards = Fixed(suppressed_contract, suppressed(slice(None, None, -1)))
    found = check_agreement(Fixed(suppressed_contract, suppressed()), backwards, EXACT)
    assert found == {"compared": len(SEEDS) * 2 * 60, "matched": 1.0, "box": 0.0, "logit": 0.0}


@pytest.mark.parametrize("mine", [slice(0, 60), slice(0, 30)])
def test_detections_that_one_side_lacks_are_found(suppressed_contract: ModelContract, mine: slice) -> None:
    theirs = slice(0, 90 - mine.stop)
    with pytest.raises(EngineBuildError, match="the engine is wrong"):
        check_agreement(
            Fixed(suppressed_contract, suppressed(mine)), Fixed(suppressed_contract, suppressed(theirs)),
            TOLERANCES["int8"],
        )  # fmt: skip


def test_detections_of_another_image_are_found(suppressed_contract: ModelContract) -> None:
    mixed_up = {**suppressed(), "images": 1 - suppressed()["images"]}
    with pytest.raises(EngineBuildError, match="the engine is wrong"):
        check_agreement(
            Fixed(suppressed_contract, suppressed()), Fixed(suppressed_contract, mixed_up), TOLERANCES["int8"]
        )


def test_nothing_found_by_both_is_said_to_be_nothing(suppressed_contract: ModelContract) -> None:
    nothing = Fixed(suppressed_contract, suppressed(slice(0, 0)))
    assert check_agreement(nothing, nothing, EXACT)["compared"] == 0
    with pytest.raises(EngineBuildError, match="the engine is wrong"):
        check_agreement(nothing, Fixed(suppressed_contract, suppressed()), TOLERANCES["int8"])
