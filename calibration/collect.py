"""
Calibration images, and the ranges of a float model's activations over them.

One pass with ONNX Runtime, one image at a time: the memory it takes does not depend on the number of images. Needs the
packages onnx and onnxruntime.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from typing import TYPE_CHECKING, Dict, List, Sequence

import numpy as np

from deploy.contract import ModelContract
from deploy.dataset import CocoImage, CocoSet, read_image
from deploy.errors import CalibrationError, ConfigError, DataError, MissingDependencyError
from deploy.files import sha256_of
from deploy.preprocess import preprocess
from deploy.progress import progress

if TYPE_CHECKING:
    import onnx


@dataclasses.dataclass
class ActivationRange:
    """The smallest and largest value of one tensor so far."""

    minimum: float = float("inf")
    maximum: float = float("-inf")

    def update(self, values: np.ndarray) -> bool:
        """False, and nothing is changed, if a value is NaN or infinite."""
        smallest, largest = float(values.min()), float(values.max())  # NaN if one value is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            return False
        self.minimum, self.maximum = min(self.minimum, smallest), max(self.maximum, largest)
        return True


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


def collect_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], images: Sequence[CocoImage], contract: ModelContract
) -> Dict[str, ActivationRange]:
    """
    Tensor name -> its range over the images, pre-processed as in deployment.

    Args:
        tensors: activations or inputs of the graph, float32.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CalibrationError: ONNX Runtime cannot run the graph, or a tensor holds NaN or infinity.
        DataError: an image cannot be read.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "calibration", "pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    outputs = [name for name in tensors if name != contract.input_name]
    try:
        session = onnxruntime.InferenceSession(
            _with_outputs(model, outputs).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise CalibrationError(f"ONNX Runtime cannot run the model: {error}. Export it again.") from error

    ranges = {name: ActivationRange() for name in tensors}
    for image in progress(images, len(images), "calibration"):
        batch = np.repeat(preprocess(read_image(image.path), contract).input, contract.input_shape[0], axis=0)
        feed = {contract.input_name: batch}
        values = {**feed, **dict(zip(outputs, session.run(outputs, feed)))}
        for name, seen in ranges.items():
            if not seen.update(values[name]):
                raise CalibrationError(
                    f"the tensor {name} holds NaN or infinity for the image {image.path}; expected finite activations. "
                    "The weights may have diverged in training: measure the float model first."
                )
    return ranges


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose only outputs are these tensors."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return changed
