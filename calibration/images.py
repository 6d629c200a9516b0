"""Calibration images: chosen by seed, whole, and none of them among those that models are measured on."""

from __future__ import annotations

import hashlib
import heapq
import random
from typing import Callable, Dict, List, Sequence, Set, Tuple

import numpy as np

from calibration.messages import warn
from deploy.dataset import CocoImage, CocoSet, check_image_files
from deploy.errors import CalibrationError, ConfigError, DataError
from deploy.files import sha256_of

FEWEST_IMAGES = 300
"""The fewest images without a warning: with fewer, ranges vary from choice to choice."""


def choose_images(images: Sequence[CocoImage], number: int, seed: int) -> List[CocoImage]:
    """
    `number` of the images, or all if there are fewer, by increasing id.

    The choice depends on the ids and the seed, not on the order of `images`.

    Raises:
        ConfigError: `number` is below 1.
    """
    if number < 1:
        raise ConfigError(f"--num-images is {number}; expected at least 1")
    by_id = sorted(images, key=lambda image: image.image_id)
    chosen = random.Random(seed).sample(by_id, min(number, len(by_id)))
    return sorted(chosen, key=lambda image: image.image_id)


def choose_covering(images: Sequence[CocoImage], number: int, seed: int) -> List[CocoImage]:
    """
    `number` of the images, or all if there are fewer, that show every class in every size as evenly as they can; by
    increasing id.

    Greedy: always the image that adds most, where what an image shows for the n-th time adds 1 / n; by seed among
    equals. What it adds only falls as others are chosen, so that most images need not be looked at again (M. Minoux,
    "Accelerated greedy algorithms for maximizing submodular set functions", 1978).

    Raises:
        ConfigError: `number` is below 1.
    """
    if not 0 < number < len(images):
        return choose_images(images, number, seed)
    shuffled = sorted(images, key=lambda image: image.image_id)
    random.Random(seed).shuffle(shuffled)
    shown = [classes_and_sizes(image) for image in shuffled]
    times: Dict[Tuple[int, int], int] = {}

    def gain(index: int) -> float:
        return sum(1 / (1 + times.get(kind, 0)) for kind in shown[index])

    waiting = [(-gain(index), index) for index in range(len(shuffled))]
    heapq.heapify(waiting)
    chosen: List[CocoImage] = []
    while waiting and len(chosen) < number:
        believed, index = heapq.heappop(waiting)
        if -gain(index) > believed:  # it has fallen since
            heapq.heappush(waiting, (-gain(index), index))
            continue
        chosen.append(shuffled[index])
        for kind in shown[index]:
            times[kind] = times.get(kind, 0) + 1
    return sorted(chosen, key=lambda image: image.image_id)


def classes_and_sizes(image: CocoImage) -> Set[Tuple[int, int]]:
    """
    (label, size) of the boxes in an image. A size is an octave, about what a level of a pyramid sees: how often the
    root of the box's area can be doubled until it is as long as the image's longer side.
    """
    sides = np.sqrt(np.prod(image.boxes_xyxy[:, 2:] - image.boxes_xyxy[:, :2], axis=1))  # (boxes,)
    octaves = np.floor(np.log2(max(image.width_px, image.height_px) / np.maximum(sides, 1)))
    return set(zip(image.labels.tolist(), octaves.astype(int).tolist()))


CHOICES: Dict[str, Callable[[Sequence[CocoImage], int, int], List[CocoImage]]] = {
    "random": choose_images,
    "covering": choose_covering,
}
"""Name -> how images are chosen: of images so many, by a seed."""


def sha256_of_images(images: Sequence[CocoImage]) -> str:
    """One SHA-256 over the contents of the image files, whatever their order and names."""
    return hashlib.sha256("".join(sorted(sha256_of(image.path) for image in images)).encode()).hexdigest()


def check_no_overlap(images: Sequence[CocoImage], evaluation: CocoSet) -> None:
    """
    Raises CalibrationError if a calibration image is also in the evaluation set, under whatever name.

    Contents are compared; only files of equal size are read.

    Raises:
        DataError: an image of the evaluation set is not there.
    """
    by_size: Dict[int, List[CocoImage]] = {}
    for image in evaluation.images:
        try:
            by_size.setdefault(image.path.stat().st_size, []).append(image)
        except OSError as error:
            raise DataError(
                f"cannot read {image.path} ({error.strerror}), image id {image.image_id} of "
                f"{evaluation.annotations_path}; expected it, to compare the calibration images with. Give the folder "
                "of these images with --evaluation-images-dir."
            ) from error
    for image in images:
        candidates = by_size.get(image.path.stat().st_size, [])
        digest = sha256_of(image.path) if candidates else ""
        for other in candidates:
            if sha256_of(other.path) == digest:
                raise CalibrationError(
                    f"the calibration image {image.path} is the image {other.path.name} (id {other.image_id}) of the "
                    f"evaluation set {evaluation.annotations_path}; expected no image in both, or the AP measured "
                    "there is too good. Calibrate on the training split, or remove the image from one of them."
                )


def calibration_images(
    calibration: CocoSet, number: int, seed: int, evaluations: Sequence[CocoSet], choice: str = "random"
) -> List[CocoImage]:
    """
    `number` images of the set by seed, whole and in none of the evaluation sets; a warning if they are few.

    Args:
        choice: a name of CHOICES.

    Raises:
        ConfigError: `number` is below 1.
        DataError: an image is missing or truncated.
        CalibrationError: an image is in an evaluation set.
    """
    images = CHOICES[choice](calibration.images, number, seed)
    check_image_files(images)
    for evaluation in evaluations:
        check_no_overlap(images, evaluation)
    if len(images) < FEWEST_IMAGES:
        warn(f"{len(images)} calibration images; {FEWEST_IMAGES} or more give ranges that do not hang on the choice")
    return images
