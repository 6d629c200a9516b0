"""Training, evaluation and deployment see the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.dataset import Compose, pseudo_collate

from crosskd.config import load_config
from crosskd.models.contract import contract_from_config
from crosskd.transforms import FitJitter
from deploy.runtime.preprocess import preprocess


@pytest.mark.parametrize(
    ("width", "height"),
    [(200, 100), (100, 200), (96, 64), (97, 65), (95, 63), (31, 7), (3, 211), (211, 3), (1, 1), (64, 96), (640, 427)],
)
def test_the_network_input_is_that_of_deployment(configs: Path, width: int, height: int) -> None:
    config = load_config(configs / "gfl_tiny.py")
    contract = contract_from_config(config, ["a"], [1])
    image = np.random.randint(0, 256, (height, width, 3), np.uint8)
    transforms = config.test_dataloader.dataset.pipeline[1:]  # the first one reads the file
    pipeline = Compose([TRANSFORMS.build(transform) for transform in transforms])
    shape = image.shape[:2]
    data = pipeline({"img": image, "img_id": 0, "img_path": "", "img_shape": shape, "ori_shape": shape})
    expected = MODELS.build(config.model.data_preprocessor)(pseudo_collate([data]), False)
    found = preprocess(image, contract)
    torch.testing.assert_close(torch.from_numpy(found.input), expected["inputs"], rtol=0, atol=1e-5)
    meta = expected["data_samples"][0].metainfo
    assert found.resized_wh_px == meta["img_shape"][::-1]  # without the padding: boxes are clipped to it
    assert found.scale_xy == pytest.approx(meta["scale_factor"], abs=0)


def test_boxes_are_resized_with_their_image() -> None:
    from mmdet.structures.bbox import HorizontalBoxes

    resize = TRANSFORMS.build(dict(type="FitResize", scale=(96, 64)))
    boxes = HorizontalBoxes(torch.tensor([[10.0, 20.0, 50.0, 100.0]]))
    found = resize({"img": np.zeros((128, 100, 3), np.uint8), "gt_bboxes": boxes})
    assert found["img"].shape == (64, 50, 3)  # a tall image is fitted by its height
    torch.testing.assert_close(found["gt_bboxes"].tensor, torch.tensor([[5.0, 10.0, 25.0, 50.0]]))


def test_fit_jitter_never_gives_more_than_fits_and_boxes_follow() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:20, 40:60] = 255
    sizes = set()
    for _ in range(30):
        boxes = HorizontalBoxes(np.array([[40.0, 10.0, 60.0, 20.0]], np.float32))
        results = dict(img=image, img_shape=(40, 80), gt_bboxes=boxes, gt_bboxes_labels=np.zeros(1, np.int64),
                       gt_ignore_flags=np.zeros(1, bool))  # fmt: skip
        results = FitJitter((64, 64), (0.5, 2.0)).transform(results)
        height, width = results["img"].shape[:2]
        assert (height, width) == results["img_shape"]
        assert height <= 64
        assert width <= 64
        sizes.add((height, width))
        for x1, y1, x2, y2 in results["gt_bboxes"].tensor.round().int().tolist():
            assert results["img"][y1:y2, x1:x2].mean() > 200  # the white part, wherever it went
    assert len(sizes) > 10
