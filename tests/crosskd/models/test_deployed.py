"""The exported file computes what mmdet's detector does, on the same images."""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("mmengine")


from crosskd.config import load_config, set_classes  # noqa: E402
from crosskd.models.contract import contract_from_config  # noqa: E402
from crosskd.models.deployed import deployed_model, onnx_from_detector  # noqa: E402
from crosskd.models.detector import detector_from_config  # noqa: E402
from crosskd.models.families import family_with_decoder  # noqa: E402
from crosskd.models.heads import FAMILIES, heads_with_decoder  # noqa: E402
from crosskd.predict import predictor  # noqa: E402
from crosskd.shapes import write_shapes  # noqa: E402
from deploy.contract import DYNAMIC, load_contract, write_sidecar  # noqa: E402
from deploy.dataset import CocoImage, load_coco  # noqa: E402
from deploy.errors import ExportError  # noqa: E402
from deploy.graphs.graph import count_parameters, load_onnx  # noqa: E402
from deploy.graphs.operators import check_operators  # noqa: E402
from deploy.images import read_image  # noqa: E402
from deploy.layouts import split_paths  # noqa: E402
from deploy.runtime.postprocess import postprocess  # noqa: E402
from deploy.runtime.preprocess import preprocess  # noqa: E402
from deploy.runtime.session import OrtSession  # noqa: E402
from tests.stand_ins.heads import HEADS, small_config  # noqa: E402

TINY = Path(__file__).parents[1] / "configs" / "gfl_tiny.py"


def _scattered(detector: Any) -> Any:
    """The detector with random weights that find much, of scores that lie far apart."""
    generator = torch.Generator().manual_seed(1)
    head = detector.bbox_head
    for layer in (head.gfl_cls, head.gfl_reg):
        torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)
    torch.nn.init.constant_(head.gfl_cls.bias, -3.0)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if trained: no layer's statistics are 0 and 1
            torch.nn.init.normal_(module.running_mean, std=0.1, generator=generator)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
    return detector.eval()


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "shapes"
    write_shapes(folder, images=12, size_px=96, seed=2)
    return folder


def _assert_same_detections(path: Path, predict: Any, images: list[CocoImage]) -> int:
    """The number of detections, every one of which is the same in torch and on ONNX Runtime, all images at once."""
    found = 0
    with OrtSession(path, threads=1) as session:
        contract = session.contract
        size = len(images) if contract.input_shape[0] == DYNAMIC else 1
        for index, image in enumerate(images):
            if index % size == 0:
                prepared = [preprocess(read_image(one.path), contract) for one in images[index : index + size]]
                outputs = session.infer({"image": np.concatenate([one.input for one in prepared])})
            detections = postprocess(outputs, contract, prepared[index % size], index % size)
            rows = zip(*predict(image), strict=True)
            rows = [row for row in rows if row[0][2] > row[0][0] and row[0][3] > row[0][1]]  # PAAHead leaves others
            boxes, scores, labels = zip(*rows, strict=True)
            labels = list(labels)
            assert detections.labels.tolist() == labels
            np.testing.assert_allclose(detections.scores, scores, rtol=0, atol=1e-4)
            np.testing.assert_allclose(detections.boxes_xyxy, np.reshape(boxes, (-1, 4)), rtol=0, atol=0.05)
            found += len(labels)
    return found


def _exported_to(path: Path, config: Any, detector: Any, **options: Any) -> None:
    contract = contract_from_config(config, list("abcdef"), list(range(6)), **options)
    onnx_from_detector(detector, contract, path)
    write_sidecar(path, {}, contract)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The tiny detector's config, itself, and its exported file."""
    config = load_config(TINY, {"model.test_cfg.score_thr": 0.05})
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    detector = _scattered(detector_from_config(config))
    path = tmp_path_factory.mktemp("tiny") / "x.onnx"
    _exported_to(path, config, detector)
    return config, detector, path


def test_detections_are_those_of_mmdet(tiny: tuple[Any, Any, Path], shapes_dir: Path) -> None:
    config, detector, exported = tiny
    images = load_coco(*split_paths(shapes_dir, "train")).images
    assert len({image.width_px > image.height_px for image in images}) == 2  # some lie, some stand
    assert _assert_same_detections(exported, predictor(config, detector), images) > 20 * len(images)


def test_the_graph_is_static_and_holds_each_weight_once(tiny: tuple[Any, Any, Path]) -> None:
    exported = tiny[2]
    model = load_onnx(exported)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [
        ("", 17)
    ]
    operators = collections.Counter(node.op_type for node in model.graph.node)
    assert not operators.keys() & {"Shape", "ConstantOfShape", "NonMaxSuppression", "NonZero", "Range", "If", "Loop"}
    assert operators["TopK"] == 5  # one for each level
    contents = [(t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer]
    assert len(contents) == len(set(contents))
    convolutions = [t for t in model.graph.initializer if tuple(t.dims) == (16, 16, 3, 3)]
    assert len(convolutions) == 3 + 5 + 4  # the backbone's; one of each of the neck's levels; two towers of two layers
    assert os.path.getsize(exported) < 1.5 * 4 * count_parameters(model)


def test_mmdets_standard_pipeline_gives_the_same_detections(tmp_path: Path) -> None:
    config = load_config(TINY, {"model.test_cfg.score_thr": 0.05})
    set_classes(config, tuple("abcdef"))
    config.test_dataloader.dataset.pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(96, 64), keep_ratio=True),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
    ]
    torch.manual_seed(0)
    detector = _scattered(detector_from_config(config))
    _exported_to(tmp_path / "x.onnx", config, detector)
    contract = load_contract(tmp_path / "x.onnx")
    assert contract.input_shape == (1, 3, 64, 96)
    assert contract.pad_value == contract.mean
    images = []
    for index, (width, height) in enumerate([(192, 128), (60, 40), (96, 64)]):
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), np.random.randint(0, 256, (height, width, 3), np.uint8))
        images.append(CocoImage(index, path, width, height, *[np.zeros(0)] * 6))
    assert _assert_same_detections(tmp_path / "x.onnx", predictor(config, detector), images) > 20 * len(images)


OF_ANY_BATCH = ("FCOSHead", "TOODHead", "VFNetHead", "RTMDetHead")
"""Exported for any number of images; the others for one, which takes half the time."""


def _small(name: str) -> tuple[Any, Any]:
    """The config of a small head, and its detector, with random weights that find much."""
    config = small_config(name, levels=3, layers=1)  # three levels show the same as five, in half the time
    # PAAHead takes as many places as others take pairs of place and class: it may take all here.
    config.model.test_cfg.update(nms_pre=1000 if name == "PAAHead" else 300, max_per_img=500)
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    detector = detector_from_config(config).eval()
    for key, parameter in detector.bbox_head.named_parameters():
        predictor_of = key.split(".")[0].rpartition("_")[2]
        if parameter.dim() < 2:
            if predictor_of == "cls":
                torch.nn.init.constant_(parameter, -2.0)
            elif predictor_of == "reg" and name.startswith("RTMDet"):
                torch.nn.init.constant_(parameter, 1.0)  # distances in strides
        elif predictor_of in ("cls", "reg"):
            torch.nn.init.normal_(parameter, std=(0.1 if predictor_of == "cls" else 0.03))
        else:  # mmdet's own are too small for different scores
            torch.nn.init.kaiming_normal_(parameter)
    return config, detector


@pytest.mark.parametrize("head", HEADS)
def test_detections_of_every_head_are_those_of_mmdet(head: str, shapes_dir: Path, tmp_path: Path) -> None:
    config, detector = _small(head)
    assert type(detector.bbox_head).__name__ == head.partition(",")[0]
    batch = DYNAMIC if head in OF_ANY_BATCH else 1
    path = tmp_path / "x.onnx"
    _exported_to(path, config, detector, batch=batch)
    _assert_deployable(path)
    images = load_coco(*split_paths(shapes_dir, "train")).images[:4]
    if head.startswith("TOODHead"):
        _clip_boxes(detector.bbox_head)
    assert _assert_same_detections(path, predictor(config, detector), images) > 5 * len(images)


def _clip_boxes(head: Any) -> None:
    """Clips boxes to the image, as mmdet does for every head but TOOD's."""
    original = head._bbox_post_process

    def clipped(results: Any, **others: Any) -> Any:
        height, width = others["img_meta"]["img_shape"][:2]
        results.bboxes = results.bboxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        return original(results, **others)

    head._bbox_post_process = clipped


VERSIONS = ("8.5", "8.6", "10.0", "10.3", "10.15", "11.1")


def _assert_deployable(path: Path, versions: tuple[str, ...] = VERSIONS) -> None:
    """Operators that every TensorRT takes, computed from no shape, of which only the number of images may be open."""
    model = load_onnx(path)
    for version in versions:
        assert check_operators(model, version) == []
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {
        "Shape", "ConstantOfShape", "NonZero", "Range", "If", "Loop", "BatchNormalization", "GroupNormalization",
    }  # fmt: skip
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "InstanceNormalization":  # what TensorRT 8.5 parses: scale and bias constant
            assert set(node.input[1:]) <= constants
    for value in (*model.graph.input, *model.graph.output):
        _, *others = value.type.tensor_type.shape.dim
        assert all(dimension.dim_value for dimension in others)


def test_score_voting_is_said_to_be_left_out() -> None:
    family = family_with_decoder("PAAHead")
    assert "score_voting" in family.note_of_export(argparse.Namespace(with_score_voting=True))
    assert family.note_of_export(argparse.Namespace(with_score_voting=False)) == ""


def test_every_head_that_can_be_distilled_can_be_exported() -> None:
    assert heads_with_decoder() == sorted(FAMILIES)
    own = {name for name, family in FAMILIES.items() if type(family).__module__.startswith("crosskd.")}
    assert {head.partition(",")[0] for head in HEADS} == own


@pytest.fixture(scope="module")
def topk(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A detector whose scores are multiplied by a centerness, its config, and its exported file."""
    return _exported(tmp_path_factory.mktemp("topk"))


def _exported(folder: Path, **options: Any) -> tuple[Any, Any, Path]:
    config, detector = _small("ATSSHead")
    _exported_to(folder / "x.onnx", config, detector, **options)
    return config, detector, folder / "x.onnx"


@pytest.mark.parametrize("batch", [2, DYNAMIC])
def test_nms_in_the_graph_keeps_what_nms_on_the_host_keeps(
    batch: int, topk: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    _, _, path = _exported(tmp_path, batch=batch, outputs="nms")
    operators = collections.Counter(node.op_type for node in load_onnx(path).graph.node)
    assert operators["NonMaxSuppression"] == 1
    assert not operators.keys() & {"Shape", "ConstantOfShape", "NonZero", "Range", "If", "Loop"}
    # They fill the network input: the host clips boxes to the image, the graph to the input, and overlaps differ then.
    images = [np.random.randint(0, 256, (height, height * 3 // 2, 3), np.uint8) for height in (64, 128, 32, 64, 64, 96)]
    size = 3 if batch == DYNAMIC else batch
    with OrtSession(path, threads=1) as session, OrtSession(topk[2], threads=1) as on_host:
        contract = session.contract
        assert contract.output_names == ("boxes", "scores", "labels", "images")
        assert contract.input_shape[0] == batch
        count = 0
        for start in range(0, len(images), size):
            prepared = [preprocess(image, contract) for image in images[start : start + size]]
            found = session.infer({"image": np.concatenate([one.input for one in prepared])})
            assert (np.bincount(found["images"], minlength=size) <= contract.max_detections).all()
            assert found["boxes"].min() >= 0
            assert (found["boxes"].max(0) <= [96, 64, 96, 64]).all()
            for index, one in enumerate(prepared):
                detections = postprocess(found, contract, one, index)
                expected = postprocess(on_host.infer({"image": one.input}), on_host.contract, one)
                assert detections.labels.tolist() == expected.labels.tolist()
                np.testing.assert_allclose(detections.scores, expected.scores, rtol=0, atol=1e-5)
                np.testing.assert_allclose(detections.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=0.01)
                count += len(detections.labels)
    assert count > 20 * len(images)


def test_pixels_in_give_the_detections_of_normalised_pixels(
    topk: tuple[Any, Any, Path], shapes_dir: Path, tmp_path: Path
) -> None:
    config, detector, path = _exported(tmp_path, input_type="uint8")
    contract = load_contract(path)
    assert contract.input_shape == (1, 64, 96, 3)
    assert load_onnx(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    images = load_coco(*split_paths(shapes_dir, "train")).images[:4]
    with OrtSession(path, threads=1) as session, OrtSession(topk[2], threads=1) as normalised:
        for image in images:
            pixels = preprocess(read_image(image.path), contract).input
            assert pixels.dtype == np.uint8
            tensor = (np.float32(pixels[0]) - np.float32(contract.mean)) / np.float32(contract.std)
            expected = normalised.infer({"image": np.ascontiguousarray(tensor.transpose(2, 0, 1)[None])})
            for name, values in session.infer({"image": pixels}).items():
                np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-4)
    assert _assert_same_detections(path, predictor(config, detector), images) > 20 * len(images)


def test_a_backbone_of_windows_is_exported_without_shape_arithmetic(shapes_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from crosskd.models.backbones import fit_to_backbone

    config = load_config(TINY, {"model.test_cfg.score_thr": 0.05})
    swin = {"img_size": (64, 96), "embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
    config.model.backbone = dict(
        type="TimmBackbone", model="swin_tiny_patch4_window7_224", out_indices=(0, 1, 2, 3), model_kwargs=swin
    )
    config.model.neck.in_channels = "backbone"
    fit_to_backbone(config.model)
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    detector = _scattered(detector_from_config(config))
    _exported_to(tmp_path / "x.onnx", config, detector)
    _assert_deployable(tmp_path / "x.onnx", VERSIONS[1:])  # 8.5 has no LayerNormalization
    images = load_coco(*split_paths(shapes_dir, "train")).images[:3]
    assert _assert_same_detections(tmp_path / "x.onnx", predictor(config, detector), images) > 10 * len(images)


def test_a_head_without_a_decoder_is_named_with_those_that_have_one() -> None:
    detector = torch.nn.Module()
    detector.bbox_head = torch.nn.Linear(1, 1)  # no dense head of any kind
    with pytest.raises(ExportError, match=r"cannot export the head Linear; can export .*GFLHead"):
        deployed_model(detector, contract_from_config(load_config(TINY), ["a"], [1]))
