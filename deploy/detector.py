"""
A detector in three lines:

    from deploy import Detector
    detect = Detector("student.engine")
    detections = detect(image)

Needs numpy, OpenCV and what runs the file: ONNX Runtime for `.onnx`, TensorRT for `.engine`.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import List, Optional, Sequence, Tuple, Type, Union

import numpy as np

from deploy.contract import ModelContract
from deploy.errors import ConfigError, DataError
from deploy.files import AnyPath
from deploy.images import read_image
from deploy.runtime.postprocess import Detections, postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import open_session

AnyImage = Union[AnyPath, np.ndarray]


class Detector:
    """
    A model file that takes images and gives detections.

    A context manager; `close` gives back what the model holds. One thread at a time.

    Args:
        model: the ONNX or engine file, with its sidecar.
        score_threshold: detections with a lower score are dropped. Below the model's own threshold it changes nothing:
            that is low, so that AP is that of mmdet; for pictures 0.3 is usual.
        threads, provider, runtime: as `open_session`.

    Raises:
        ConfigError: the threshold is no score.
        Otherwise as `open_session`.
    """

    def __init__(
        self,
        model: AnyPath,
        score_threshold: float = 0.0,
        threads: Optional[int] = None,
        provider: Optional[str] = None,
        runtime: Optional[str] = None,
    ) -> None:
        if not 0 <= score_threshold < 1:
            raise ConfigError(f"the score threshold is {score_threshold}; expected 0 to below 1")
        self.score_threshold = score_threshold
        self._session = open_session(model, threads, provider, runtime)
        self.contract: ModelContract = self._session.contract

    @property
    def class_names(self) -> Tuple[str, ...]:
        """The name of each label."""
        return self.contract.class_names

    @property
    def description(self) -> str:
        """What runs the model where, in words."""
        return self._session.description

    def __call__(self, image: AnyImage) -> Detections:
        """
        What is in the image, the best first.

        Args:
            image: (height, width, 3), uint8, blue-green-red, as OpenCV reads it; or the path of a file.

        Raises:
            DataError: the file cannot be read, or the array is no such image.
            ContractError: what the model gave cannot be detections.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[AnyImage]) -> List[Detections]:
        """
        The detections of each of several images, which go through the network together.

        Args:
            images: one to as many as the model takes at once. Where it takes no fewer than some number, the rest is
                filled with the last image.

        Raises:
            DataError: an image is none, or there are none or too many.
        """
        fewest, most = self._session.batch_limits
        if not images or len(images) > most:
            limit = most if most < sys.maxsize else "any number"
            raise DataError(
                f"{len(images)} images for one batch; expected 1 to {limit}. Give fewer, or export the model with a "
                "larger or a dynamic --batch"
            )
        prepared = [preprocess(_checked(image), self.contract) for image in images]
        filled = prepared + prepared[-1:] * (fewest - len(prepared))
        feed = prepared[0].input if len(filled) == 1 else np.concatenate([one.input for one in filled])
        outputs = self._session.infer({self.contract.input_name: feed})
        return [
            self._chosen(postprocess(outputs, self.contract, one, index, _name(image)))
            for index, (one, image) in enumerate(zip(prepared, images))
        ]

    def _chosen(self, found: Detections) -> Detections:
        count = int(np.sum(found.scores >= self.score_threshold))  # they are sorted
        return Detections(found.boxes_xyxy[:count], found.scores[:count], found.labels[:count])

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.close()


def _name(image: AnyImage) -> AnyPath:
    return "the image" if isinstance(image, np.ndarray) else image


def _checked(image: AnyImage) -> np.ndarray:
    """The image as an array that `preprocess` takes."""
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(
            f"the image is an array of {image.dtype}, {image.shape}; expected uint8, (height, width, 3), "
            "blue-green-red. cv2.cvtColor makes three channels of one"
        )
    return image
