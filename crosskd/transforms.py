"""Image transforms that training, evaluation and deployment share: read, fit into a fixed size, pad to it."""

from __future__ import annotations

from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms import LoadImageFromFile as MmcvLoadImageFromFile
from mmdet.datasets.transforms import RandomCrop, Resize
from mmdet.registry import TRANSFORMS

from deploy.errors import DataError


@TRANSFORMS.register_module()
class LoadImageFromFile(MmcvLoadImageFromFile):
    """
    mmcv's own, whose place it takes in every config: it names the image that cannot be read or decoded.

    Raises:
        DataError: which image, and why.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return super().transform(results)
        except Exception as error:  # of the file system, OpenCV, Pillow, a store of images, or mmcv's assertion
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{results['img_path']} cannot be read or decoded ({reason})") from error


@TRANSFORMS.register_module()
class FitResize(Resize):
    """
    Resizes to the largest size of the same aspect ratio that fits into `scale`.

    mmdet's own keep-ratio resize takes `scale` as (long side, short side) whichever way the image lies, so that a
    tall image does not fit into a wide network input.

    Args:
        scale: (width, height) in pixels.
    """

    def __init__(self, scale: tuple[int, int]) -> None:
        super().__init__(scale=tuple(scale), keep_ratio=True)

    def _resize_img(self, results: dict[str, Any]) -> None:
        height, width = results["img"].shape[:2]
        to_width, to_height = self.scale
        factor = min(to_width / width, to_height / height)
        size = max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))
        results["img"] = mmcv.imresize(results["img"], size, backend=self.backend)
        results["img_shape"] = results["img"].shape[:2]
        results["scale_factor"] = size[0] / width, size[1] / height
        results["keep_ratio"] = self.keep_ratio


@TRANSFORMS.register_module()
class FitJitter(BaseTransform):
    """
    As FitResize, times a random factor; of an image that is larger than `scale` then, a random part of that size.

    Args:
        scale: (width, height) in pixels.
        factors: the smallest and the largest.
    """

    def __init__(self, scale: tuple[int, int], factors: tuple[float, float] = (0.5, 1.5)) -> None:
        self.scale, self.factors = tuple(scale), tuple(factors)
        width, height = self.scale
        self.crop = RandomCrop((height, width), allow_negative_crop=True)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        smallest, largest = self.factors
        factor = np.random.uniform(smallest, largest)
        width, height = (max(1, round(factor * side)) for side in self.scale)
        return self.crop(FitResize((width, height))(results))


@TRANSFORMS.register_module()
class FitPad(BaseTransform):
    """
    Pads to a fixed size, right and below; to be the last transform before packing.

    `img_shape` stays that of the image without padding, so that boxes are clipped to the image and not to the padding.

    Args:
        size: (width, height) in pixels.
        pad_value: per channel of the image as loaded (blue, green, red), 0 to 255.
    """

    def __init__(self, size: tuple[int, int], pad_value: tuple[int, int, int]) -> None:
        self.size, self.pad_value = tuple(size), tuple(pad_value)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        width, height = self.size
        results["img"] = mmcv.impad(results["img"], shape=(height, width), pad_val=self.pad_value)
        return results
