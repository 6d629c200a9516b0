from __future__ import annotations

import copy
import dataclasses
import struct
from pathlib import Path
from typing import Any, Dict, Tuple

import cv2
import numpy as np
import pytest

from deploy.contract import ModelContract, write_sidecar
from deploy.dataset import CocoImage
from deploy.detector import Detector
from deploy.errors import DataError
from deploy.images import read_image
from deploy.limits import LARGEST_IMAGE_PX
from deploy.runtime.preprocess import preprocess

CONFIGS = Path(__file__).parents[2] / "crosskd" / "configs"

CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, 64, 64),
    channel_order="rgb",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    pad_value=(114.0, 0.0, 30.0),
    resize="keep_ratio",
    output_names=("boxes", "scores", "labels"),
    class_names=("thing",),
    category_ids=(1,),
    score_threshold=0.05,
    nms_iou_threshold=0.6,
    max_detections=100,
)
HEIGHT_WIDTH = [(64, 64), (63, 65), (127, 33), (200, 301), (500, 375), (20, 11), (1, 1), (1, 40), (40, 1), (3, 190)]


def _image(height: int, width: int) -> np.ndarray:
    return np.random.randint(0, 256, (height, width, 3), np.uint8)


def _contract(height: int, width: int, **values: object) -> ModelContract:
    return dataclasses.replace(CONTRACT, **{"input_shape": (1, 3, height, width), **values})


@pytest.mark.parametrize("height_width", HEIGHT_WIDTH)
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_pixels_are_those_of_mmcv(height_width: Tuple[int, int], channel_order: str) -> None:
    mmcv = pytest.importorskip("mmcv")
    image = _image(*height_width)
    contract = _contract(64, 64, channel_order=channel_order)
    prepared = preprocess(image, contract)

    resized = mmcv.imrescale(image, (64, 64))
    to_rgb = channel_order == "rgb"
    padding = contract.pad_value[::-1] if to_rgb else contract.pad_value  # mmcv pads before it swaps the channels
    padded = mmcv.impad(resized, shape=(64, 64), pad_val=padding)
    expected = mmcv.imnormalize(padded, np.array(contract.mean), np.array(contract.std), to_rgb)

    assert prepared.input.shape == (1, 3, 64, 64)
    assert prepared.input.dtype == np.float32
    assert prepared.input.flags.c_contiguous
    np.testing.assert_allclose(prepared.input[0].transpose(1, 2, 0), expected, rtol=0, atol=1e-5)
    assert prepared.resized_wh_px == resized.shape[1::-1]
    assert prepared.image_wh_px == image.shape[1::-1]


@pytest.mark.parametrize("height_width", [(48, 97), (200, 301), (375, 500), (60, 80)])
def test_an_oblong_input_holds_a_landscape_image_as_mmcv_does(height_width: Tuple[int, int]) -> None:
    mmcv = pytest.importorskip("mmcv")
    resized = mmcv.imrescale(_image(*height_width), (80, 60))
    assert preprocess(_image(*height_width), _contract(60, 80)).resized_wh_px == resized.shape[1::-1]


@pytest.mark.parametrize("height_width", [(300, 100), (100, 300), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("input_height_width", [(60, 80), (80, 60), (32, 640)])
def test_the_image_fits_and_touches_one_side(
    height_width: Tuple[int, int], input_height_width: Tuple[int, int]
) -> None:
    prepared = preprocess(_image(*height_width), _contract(*input_height_width))
    width, height = prepared.resized_wh_px
    assert 1 <= height <= input_height_width[0]
    assert 1 <= width <= input_height_width[1]
    assert height == input_height_width[0] or width == input_height_width[1]
    assert prepared.scale_xy == (width / height_width[1], height / height_width[0])


def test_padding_of_the_mean_is_zero_after_normalisation() -> None:
    prepared = preprocess(_image(10, 40), _contract(64, 64, pad_value=CONTRACT.mean))
    assert prepared.resized_wh_px == (64, 16)
    assert not prepared.input[:, :, 16:].any()


def test_stretch_fills_the_input() -> None:
    prepared = preprocess(_image(10, 40), _contract(32, 64, resize="stretch"))
    assert prepared.resized_wh_px == (64, 32)
    assert prepared.scale_xy == (1.6, 3.2)


@pytest.mark.parametrize(("resize", "expected_wh"), [("keep_ratio", (90, 45)), ("stretch", (90, 50))])
def test_the_image_may_be_resized_into_a_part_of_the_input(resize: str, expected_wh: Tuple[int, int]) -> None:
    contract = _contract(64, 96, resize=resize, resize_wh_px=(90, 50), pad_value=CONTRACT.mean)
    prepared = preprocess(_image(100, 200), contract)
    assert prepared.resized_wh_px == expected_wh
    assert prepared.input.shape == (1, 3, 64, 96)
    assert not prepared.input[..., 90:].any()
    assert not prepared.input[:, :, 50:].any()


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = _image(64, 64)
    contract = _contract(64, 64, channel_order="bgr", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(preprocess(image, contract).input[0], image.transpose(2, 0, 1))


def test_the_image_is_left_as_it_was() -> None:
    image = _image(30, 40)
    before = image.copy()
    preprocess(image, CONTRACT)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("height_width", HEIGHT_WIDTH)
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_pixels_for_the_graph_become_the_normalised_input(height_width: Tuple[int, int], channel_order: str) -> None:
    contract = _contract(64, 96, channel_order=channel_order)
    pixels_contract = dataclasses.replace(contract, input_type="uint8", input_shape=(1, 64, 96, 3))
    image = _image(*height_width)
    pixels, expected = preprocess(image, pixels_contract), preprocess(image, contract)
    assert (pixels.input.shape, pixels.input.dtype) == ((1, 64, 96, 3), np.uint8)
    assert pixels.input.flags.c_contiguous
    mean, std = np.float32(contract.mean), np.float32(contract.std)
    np.testing.assert_array_equal(((pixels.input - mean) / std).transpose(0, 3, 1, 2), expected.input)
    assert (pixels.scale_xy, pixels.resized_wh_px) == (expected.scale_xy, expected.resized_wh_px)


def test_pixels_of_padding_are_rounded() -> None:
    contract = _contract(32, 32, input_type="uint8", input_shape=(1, 32, 32, 3), pad_value=(123.675, 116.28, 0.0))
    prepared = preprocess(_image(10, 20), contract)
    assert prepared.resized_wh_px == (32, 16)
    assert (prepared.input[0, 16:] == (124, 116, 0)).all()


def test_pixels_of_the_right_size_are_a_copy() -> None:
    image = _image(64, 64)
    contract = _contract(64, 64, input_type="uint8", input_shape=(1, 64, 64, 3), channel_order="bgr")
    prepared = preprocess(image, contract)
    np.testing.assert_array_equal(prepared.input[0], image)
    assert not np.shares_memory(prepared.input, image)


@pytest.mark.parametrize("view", [np.s_[:, ::-1], np.s_[::2, ::2], np.s_[..., ::-1]])
@pytest.mark.parametrize("input_type", ["float32", "uint8"])
def test_views_are_read_as_what_they_show(view: Any, input_type: str) -> None:
    shape = (1, 3, 64, 64) if input_type == "float32" else (1, 64, 64, 3)
    contract = _contract(64, 64, input_type=input_type, input_shape=shape)
    for side in (64, 128, 100):
        image = _image(side, side)[view]
        np.testing.assert_array_equal(
            preprocess(image, contract).input, preprocess(np.ascontiguousarray(image), contract).input
        )


# Files, through mmdet's own pipeline ---------------------------------------------------------------------------------


def _write_images(folder: Path) -> Dict[str, Path]:
    """Files of every kind that comes from cameras, phones and drawing programs."""
    noise = np.random.randint(0, 256, (200, 301, 3), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 5)
    alpha = np.random.randint(0, 256, (65, 97, 1), np.uint8)
    pictures = {
        "odd.jpg": noise,
        "tall.png": cv2.resize(smooth, (33, 211)),
        "tiny.png": smooth[:1, :1],
        "flat.png": cv2.resize(smooth, (400, 3)),
        "steep.png": cv2.resize(smooth, (3, 400)),
        "large.jpg": cv2.resize(smooth, (1300, 901)),
        "fits.bmp": cv2.resize(noise, (96, 64)),
        "grey.png": noise[..., 0],
        "grey.jpg": smooth[..., 0],
        "deep.png": np.random.randint(0, 1 << 16, (65, 97, 3), np.uint16),
        "deep_grey.png": np.random.randint(0, 1 << 16, (65, 97), np.uint16),
        "alpha.png": np.concatenate([smooth[:65, :97], alpha], axis=2),
        "turned.jpg": noise,
    }
    for name, pixels in pictures.items():
        assert cv2.imwrite(str(folder / name), pixels)
    # EXIF orientation 6, to be turned clockwise. TIFF header, one entry: tag 0x112, type SHORT, count 1, value 6.
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, 6, 0, 0)
    content = (folder / "turned.jpg").read_bytes()
    (folder / "turned.jpg").write_bytes(
        content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
    )
    return {name: folder / name for name in pictures}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    np.random.seed(0)
    return _write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tiny() -> Tuple[Any, Any, ModelContract]:
    """Config, detector and contract of the tiny GFL: 96 x 64 pixels, random weights that see things everywhere."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mmdet")
    from crosskd.config import load_config
    from crosskd.models.contract import contract_from_config
    from crosskd.models.detector import detector_from_config

    config = load_config(CONFIGS / "gfl_tiny.py", {"model.bbox_head.num_classes": 4})
    torch.manual_seed(0)
    detector = detector_from_config(config, load_weights=False).eval()
    with torch.no_grad():
        head = detector.bbox_head
        head.gfl_cls.weight.normal_(0, 0.05)
        head.gfl_cls.bias.fill_(-2.0)
        head.gfl_reg.weight.normal_(0, 0.1)
    names = [f"class {label}" for label in range(head.num_classes)]
    return config, detector, contract_from_config(config, names, range(1, len(names) + 1))


def _mmdet_inputs(config: Any, transforms: Any, path: Path) -> Tuple[np.ndarray, Dict[str, Any]]:
    """The normalised input of mmdet's pipeline and preprocessor, and the picture's metadata."""
    from mmdet.registry import MODELS, TRANSFORMS
    from mmengine.dataset import Compose, pseudo_collate

    pipeline = Compose([TRANSFORMS.build(transform) for transform in transforms])
    data = pipeline({"img_id": 0, "img_path": str(path)})
    batch = MODELS.build(config.model.data_preprocessor)(pseudo_collate([data]), False)
    return batch["inputs"].numpy(), batch["data_samples"][0].metainfo


def test_files_give_the_network_input_that_mmdet_gives(
    tiny: Tuple[Any, Any, ModelContract], files: Dict[str, Path]
) -> None:
    config, _, contract = tiny
    for name, path in files.items():
        found = preprocess(read_image(path), contract)
        expected, meta = _mmdet_inputs(config, config.test_dataloader.dataset.pipeline, path)
        np.testing.assert_allclose(found.input, expected, rtol=0, atol=1e-5, err_msg=name)
        assert found.image_wh_px == meta["ori_shape"][::-1], name
        assert found.scale_xy == pytest.approx(meta["scale_factor"], abs=0), name
        assert found.resized_wh_px == meta["img_shape"][::-1], name
    assert preprocess(read_image(files["turned.jpg"]), contract).image_wh_px == (200, 301)


def test_files_give_the_network_input_of_mmdets_resize_and_pad(
    tiny: Tuple[Any, Any, ModelContract], files: Dict[str, Path]
) -> None:
    config, _, contract = tiny
    transforms = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(96, 64), keep_ratio=True),
        dict(type="Pad", size=(96, 64), pad_val=dict(img=(104, 116, 124))),
        dict(type="PackDetInputs"),
    ]
    for name in ("odd.jpg", "large.jpg", "fits.bmp", "grey.png", "deep.png", "alpha.png"):  # none of them is tall
        expected, _ = _mmdet_inputs(config, transforms, files[name])
        found = preprocess(read_image(files[name]), contract)
        np.testing.assert_allclose(found.input, expected, rtol=0, atol=1e-5, err_msg=name)


def test_mmdets_size_that_is_no_multiple_of_32_is_kept(
    tiny: Tuple[Any, Any, ModelContract], files: Dict[str, Path]
) -> None:
    from crosskd.models.contract import contract_from_config

    config = copy.deepcopy(tiny[0])
    config.test_dataloader.dataset.pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(90, 60), keep_ratio=True),
        dict(type="Pad", size_divisor=32, pad_val=dict(img=(104, 116, 124))),
        dict(type="PackDetInputs"),
    ]
    contract = contract_from_config(config, ["a"], [1])
    assert contract.input_shape == (1, 3, 64, 96)
    assert contract.resize_wh_px == (90, 60)
    cv2.imwrite(str(files["odd.jpg"].with_name("wide.png")), _image(100, 190))
    for path in (files["odd.jpg"], files["large.jpg"], files["odd.jpg"].with_name("wide.png")):
        expected, meta = _mmdet_inputs(config, config.test_dataloader.dataset.pipeline, path)
        found = preprocess(read_image(path), contract)
        assert found.scale_xy == pytest.approx(meta["scale_factor"], abs=0)
        assert expected.shape == (1, 3, 64, 96)
        np.testing.assert_allclose(found.input, expected, rtol=0, atol=1e-5, err_msg=path.name)


def test_files_give_the_detections_that_mmdet_gives(
    tiny: Tuple[Any, Any, ModelContract], files: Dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    from crosskd.models.deployed import onnx_from_detector
    from crosskd.predict import predictor

    config, detector, contract = tiny
    onnx_from_detector(detector, contract, tmp_path / "tiny.onnx")
    write_sidecar(tmp_path / "tiny.onnx", {}, contract)
    predict = predictor(config, detector)
    seen = 0
    with Detector(tmp_path / "tiny.onnx") as detect:
        for name, path in files.items():
            found = detect(path)
            image = CocoImage(0, path, 1, 1, *[np.zeros(0)] * 6)  # without boxes
            boxes, scores, labels = (np.array(values) for values in predict(image))
            tolerance_px = 0.05 / min(preprocess(read_image(path), contract).scale_xy)
            np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-4, err_msg=name)
            np.testing.assert_array_equal(found.labels, labels, err_msg=name)
            np.testing.assert_allclose(found.boxes_xyxy, boxes.reshape(-1, 4), rtol=0, atol=tolerance_px, err_msg=name)
            seen += len(boxes)
    assert seen > 20 * len(files)


# What a file claims to be ---------------------------------------------------------------------------------------------


def _claims(kind: str, path: Path, width: int, height: int) -> None:
    """Writes a small file of this kind that says it is `width` x `height`."""
    small = np.full((8, 8, 3), 90, np.uint8)
    content = bytearray(cv2.imencode(kind, small)[1].tobytes())
    if kind == ".png":
        content[16:24] = struct.pack(">II", width, height)
    elif kind == ".bmp":
        content[18:26] = struct.pack("<ii", width, -height)
    else:
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", [".png", ".jpg", ".bmp"])
def test_an_image_that_claims_to_be_enormous_is_refused_before_it_is_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"bomb{kind}"
    _claims(kind, path, 30_000, 20_000)
    decoded = []
    monkeypatch.setattr(cv2, "imdecode", lambda *arguments: decoded.append(arguments))
    with pytest.raises(DataError, match=r"bomb.*30000 x 20000 pixels; expected at most 268 megapixels"):
        read_image(path)
    assert not decoded
    _claims(kind, path, 17_000, 12_500)  # more than the largest camera
    assert LARGEST_IMAGE_PX > 17_000 * 12_500
    with pytest.raises(DataError, match="cannot decode"):
        read_image(path)
    assert len(decoded) == 1


def test_of_16_bits_half_as_many_pixels_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    cv2.imwrite(str(path), np.zeros((2, 2, 3), np.uint16))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 12_000, 12_000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"12000 x 12000 pixels; expected at most 134 megapixels of 16 bits"):
        read_image(path)


def test_a_hundred_megapixels_and_one_pixel_are_read(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((10_000, 10_000), np.uint8))
    cv2.imwrite(str(tmp_path / "small.png"), np.full((1, 1, 3), 7, np.uint8))
    large = read_image(tmp_path / "large.png")
    assert large.shape == (10_000, 10_000, 3)
    assert preprocess(large, CONTRACT).scale_xy == (0.0064, 0.0064)
    np.testing.assert_array_equal(read_image(tmp_path / "small.png"), [[[7, 7, 7]]])
