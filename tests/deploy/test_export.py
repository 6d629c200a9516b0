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


from crosskd import adopt  # noqa: E402
from crosskd.config import load_config, overrides_from_arguments, set_classes  # noqa: E402
from crosskd.models.checkpoint import save_detector_weights  # noqa: E402
from crosskd.models.detector import detector_from_config  # noqa: E402
from crosskd.predict import predictor  # noqa: E402
from crosskd.run_dir import load_run  # noqa: E402
from crosskd.shapes import write_shapes  # noqa: E402
from deploy import export  # noqa: E402
from deploy.contract import ModelContract, load_contract, write_sidecar  # noqa: E402
from deploy.dataset import CocoImage, load_coco, read_image, split_paths  # noqa: E402
from deploy.errors import ExportError  # noqa: E402
from deploy.graphs.graph import count_parameters, load_onnx  # noqa: E402
from deploy.graphs.operators import check_operators  # noqa: E402
from deploy.runtime.postprocess import postprocess  # noqa: E402
from deploy.runtime.preprocess import preprocess  # noqa: E402
from deploy.runtime.session import OrtSession  # noqa: E402

TINY = Path(__file__).parents[1] / "crosskd" / "configs" / "gfl_tiny.py"
THRESHOLD = "model.test_cfg.score_thr=0.05"


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


def _run_dir(folder: Path, shapes_dir: Path, *overrides: str) -> Path:
    config = load_config(TINY, overrides_from_arguments(argparse.Namespace(overrides=overrides)))
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    save_detector_weights(_scattered(detector_from_config(config)), folder / "weights.pth", meta={})
    words = [str(TINY), "--checkpoint", str(folder / "weights.pth"), "--data", str(shapes_dir)]
    assert adopt.main([*words, "-o", str(folder / "run"), "--set", *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run_dir(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_dir(tmp_path_factory.mktemp("run"), shapes_dir, THRESHOLD)


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    output = run_dir.parent / "student.onnx"
    assert export.main([str(run_dir), "-o", str(output)]) == 0
    return output


def _assert_same_detections(path: Path, predict: Any, images: list[CocoImage]) -> int:
    """The number of detections, every one of which is the same in torch and on ONNX Runtime, all images at once."""
    found = 0
    with OrtSession(path, threads=1) as session:
        contract = session.contract
        size = len(images) if contract.input_shape[0] == export.DYNAMIC else 1
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


def test_detections_are_those_of_mmdet(run_dir: Path, exported: Path, shapes_dir: Path) -> None:
    config, detector, _ = load_run(run_dir)
    images = load_coco(*split_paths(shapes_dir, "train")).images
    assert len({image.width_px > image.height_px for image in images}) == 2  # some lie, some stand
    assert _assert_same_detections(exported, predictor(config, detector), images) > 20 * len(images)


def test_the_graph_is_static_and_holds_each_weight_once(exported: Path) -> None:
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


def test_the_sidecar_has_the_contract_and_the_hash_of_the_weights(exported: Path, run_dir: Path) -> None:
    from deploy.contract import read_sidecar

    contract = load_contract(exported)
    assert contract.input_shape == (1, 3, 64, 96)
    assert contract.channel_order == "rgb"
    assert contract.pad_value == (124.0, 116.0, 104.0)
    assert contract.class_names == ("circle", "triangle", "square", "star", "ring", "cross")
    assert contract.category_ids == (1, 2, 3, 4, 5, 6)
    assert (contract.score_threshold, contract.nms_iou_threshold, contract.max_detections) == (0.05, 0.6, 100)
    sidecar = read_sidecar(exported)
    assert sidecar["inputs"]["weights"]["sha256"] == read_sidecar(run_dir / "detector.pth")["artefact"]["sha256"]
    assert sidecar["details"]["parameters"] == sum(p.numel() for p in load_run(run_dir)[1].parameters())


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
    contract = export.contract_from_config(config, list("abcdef"), list(range(6)))
    assert contract.input_shape == (1, 3, 64, 96)
    assert contract.pad_value == contract.mean
    export.onnx_from_detector(detector, contract, tmp_path / "x.onnx")
    write_sidecar(tmp_path / "x.onnx", {}, contract)
    images = []
    for index, (width, height) in enumerate([(192, 128), (60, 40), (96, 64)]):
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), np.random.randint(0, 256, (height, width, 3), np.uint8))
        images.append(CocoImage(index, path, width, height, np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool)))
    assert _assert_same_detections(tmp_path / "x.onnx", predictor(config, detector), images) > 20 * len(images)


RTMDET = "rtmdet/rtmdet_tiny_8xb32-300e"
WITHOUT_SEPARATE_NORMS = {"type": "RTMDetHead", "with_objectness": True, "share_conv": None, "exp_on_reg": None}
HEADS = {
    "GFLHead": ("gfl/gfl_r50_fpn_1x", {}),
    "RetinaHead": ("retinanet/retinanet_r18_fpn_1x", {}),
    "ATSSHead": ("atss/atss_r50_fpn_1x", {}),
    "FCOSHead": ("fcos/fcos_r50-caffe_fpn_gn-head_1x", {}),
    "FCOSHead, normed": ("fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x", {}),
    "PAAHead": ("paa/paa_r50_fpn_1x", {"score_voting": False}),
    "DDODHead": ("ddod/ddod_r50_fpn_1x", {}),
    "TOODHead": ("tood/tood_r50_fpn_1x", {}),
    "TOODHead, anchors": ("tood/tood_r50_fpn_anchor-based_1x", {}),
    "TOODHead, dcn": ("tood/tood_r50_fpn_1x", {"num_dcn": 1}),
    "VFNetHead": ("vfnet/vfnet_r50_fpn_1x", {}),
    "RTMDetSepBNHead": (RTMDET, {}),
    "RTMDetHead": (RTMDET, WITHOUT_SEPARATE_NORMS),
}
OF_ANY_BATCH = ("FCOSHead", "TOODHead", "VFNetHead", "RTMDetHead")
"""Exported for any number of images; the others for one, which takes half the time."""


def _small(name: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """The tiny config with the head of one of mmdet's, and its detector, with random weights that find much."""
    config, published = load_config(TINY), load_config(f"mmdet::{name}_coco.py").model
    head = {key: value for key, value in {**published.bbox_head, **changes}.items() if value is not None}
    channels = config.model.neck.out_channels
    norm = {"type": "BN"} if head["type"] == "RTMDetSepBNHead" else {"type": "GN", "num_groups": 4}
    head.update(in_channels=channels, feat_channels=channels, stacked_convs=1, norm_cfg=norm)
    if head["type"] == "VFNetHead":  # its default has five levels
        anchors = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1}
        head["anchor_generator"] = {**anchors, "center_offset": 0.0, "strides": []}
    for part in (head, head.get("anchor_generator", {})):
        if "strides" in part:
            part["strides"] = [8, 16, 32]  # three levels show the same as five, in half the time
    # PAAHead takes as many places as others take pairs of place and class: it may take all here.
    test_cfg = {**published.test_cfg, "nms_pre": 1000 if head["type"] == "PAAHead" else 300, "max_per_img": 500}
    config.model.pop("bbox_head"), config.model.pop("test_cfg"), config.model.pop("train_cfg")
    config.merge_from_dict({"model.bbox_head": head, "model.test_cfg": test_cfg})
    config.model.neck.update(start_level=1, num_outs=3)
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    detector = detector_from_config(config).eval()
    for key, parameter in detector.bbox_head.named_parameters():
        predictor_of = key.split(".")[0].rpartition("_")[2]
        if parameter.dim() < 2:
            if predictor_of == "cls":
                torch.nn.init.constant_(parameter, -2.0)
            elif predictor_of == "reg" and name == RTMDET:
                torch.nn.init.constant_(parameter, 1.0)  # distances in strides
        elif predictor_of in ("cls", "reg"):
            torch.nn.init.normal_(parameter, std=(0.1 if predictor_of == "cls" else 0.03))
        else:  # mmdet's own are too small for different scores
            torch.nn.init.kaiming_normal_(parameter)
    return config, detector


@pytest.mark.parametrize("head", HEADS)
def test_detections_of_every_head_are_those_of_mmdet(head: str, shapes_dir: Path, tmp_path: Path) -> None:
    config, detector = _small(*HEADS[head])
    assert type(detector.bbox_head).__name__ == head.partition(",")[0]
    batch = export.DYNAMIC if head in OF_ANY_BATCH else 1
    contract = export.contract_from_config(config, list("abcdef"), list(range(6)), batch=batch)
    path = tmp_path / "x.onnx"
    export.onnx_from_detector(detector, contract, path)
    write_sidecar(path, {}, contract)
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


def _assert_deployable(path: Path) -> None:
    """Operators that every TensorRT takes, computed from no shape, of which only the number of images may be open."""
    model = load_onnx(path)
    for version in ("8.6", "10.3", "10.16", "11.1"):
        check_operators(model, version)
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
    family = export.family_with_decoder("PAAHead")
    assert "score_voting" in family.note_of_export(argparse.Namespace(with_score_voting=True))
    assert family.note_of_export(argparse.Namespace(with_score_voting=False)) == ""


def test_every_head_that_can_be_distilled_can_be_exported() -> None:
    from crosskd.models.heads import FAMILIES, heads_with_decoder

    assert heads_with_decoder() == sorted(FAMILIES)
    own = {name for name, family in FAMILIES.items() if type(family).__module__.startswith("crosskd.")}
    assert {head.partition(",")[0] for head in HEADS} == own


@pytest.fixture(scope="module")
def topk(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A detector whose scores are multiplied by a centerness, its config, and its exported file."""
    return _exported(tmp_path_factory.mktemp("topk"))


def _exported(folder: Path, **options: Any) -> tuple[Any, Any, Path]:
    config, detector = _small(*HEADS["ATSSHead"])
    contract = export.contract_from_config(config, list("abcdef"), list(range(6)), **options)
    export.onnx_from_detector(detector, contract, folder / "x.onnx")
    write_sidecar(folder / "x.onnx", {}, contract)
    return config, detector, folder / "x.onnx"


@pytest.mark.parametrize("batch", [2, export.DYNAMIC])
def test_nms_in_the_graph_keeps_what_nms_on_the_host_keeps(
    batch: int, topk: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    _, _, path = _exported(tmp_path, batch=batch, outputs="nms")
    operators = collections.Counter(node.op_type for node in load_onnx(path).graph.node)
    assert operators["NonMaxSuppression"] == 1
    assert not operators.keys() & {"Shape", "ConstantOfShape", "NonZero", "Range", "If", "Loop"}
    # They fill the network input: the host clips boxes to the image, the graph to the input, and overlaps differ then.
    images = [np.random.randint(0, 256, (height, height * 3 // 2, 3), np.uint8) for height in (64, 128, 32, 64, 64, 96)]
    size = 3 if batch == export.DYNAMIC else batch
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
    contract = export.contract_from_config(config, list("abcdef"), list(range(6)))
    export.onnx_from_detector(detector, contract, tmp_path / "x.onnx")
    write_sidecar(tmp_path / "x.onnx", {}, contract)
    _assert_deployable(tmp_path / "x.onnx")
    images = load_coco(*split_paths(shapes_dir, "train")).images[:3]
    assert _assert_same_detections(tmp_path / "x.onnx", predictor(config, detector), images) > 10 * len(images)


def test_what_is_more_than_a_size_of_the_batch_is_refused() -> None:
    def graph(images: int) -> Any:
        return onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            tile (float[{images},4] x) => (float[{images},4] y) <int64[2] times = {{1, 1}}, float[{images},4] ones = {{
            {", ".join(["1"] * 4 * images)}}}> {{ tiled = Tile(x, times) y = Mul(tiled, ones) }}"""
        )

    with pytest.raises(ExportError, match=r"depends on the number of images by .* the input ones of y \(Mul\)"):
        export.graph_of_any_batch(graph(2), graph(3))


def test_flags_are_written_in_the_contract(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    flags = ["--batch", "dynamic", "--input-type", "uint8", "--outputs", "nms"]
    assert export.main([str(run_dir), "-o", str(output), *flags]) == 0
    contract = load_contract(output)
    assert (contract.input_type, contract.outputs, contract.input_shape) == ("uint8", "nms", (-1, 64, 96, 3))
    with OrtSession(output, threads=1) as session:
        images = session.infer({"image": np.random.randint(0, 256, (3, 64, 96, 3), np.uint8)})["images"]
    assert set(images) <= {0, 1, 2}


@pytest.mark.parametrize("batch", ["0", "-2", "many"])
def test_a_batch_of_no_images_is_refused(batch: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main([str(run_dir), "-o", "x.onnx", f"--batch={batch}"])
    assert "expected 1 or more, or 'dynamic'" in capsys.readouterr().err


def test_another_size_is_exported_on_request(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "wide.onnx"
    assert export.main([str(run_dir), "-o", str(output), "--size", "160", "96"]) == 0
    assert load_contract(output).input_shape == (1, 3, 96, 160)
    with OrtSession(output, threads=1) as session:
        boxes = session.infer({"image": np.zeros((1, 3, 96, 160), np.float32)})["boxes"]
    assert boxes.shape == (1, load_onnx(output).graph.output[0].type.tensor_type.shape.dim[1].dim_value, 4)


def _contract(config: Any, **size: Any) -> ModelContract:
    return export.contract_from_config(config, ["a"], [1], **size)


def _config_with(*transforms: dict[str, Any]) -> Any:
    config = load_config(TINY)
    config.test_dataloader.dataset.pipeline = [
        dict(type="LoadImageFromFile"), *transforms, dict(type="PackDetInputs"),
    ]  # fmt: skip
    return config


def test_the_contract_of_mmdets_pipelines() -> None:
    stretched = _contract(_config_with(dict(type="Resize", scale=(1333, 800), keep_ratio=False)))
    assert (stretched.resize, stretched.input_shape) == ("stretch", (1, 3, 800, 1344))
    assert stretched.resize_wh_px == (1333, 800)  # the rest of the input is padding
    padded = _contract(
        _config_with(
            dict(type="Resize", scale=(640, 640), keep_ratio=True),
            dict(type="Pad", size=(640, 640), pad_val=dict(img=(1, 2, 3))),
        )
    )
    assert padded.resize_wh_px is None
    assert (padded.resize, padded.pad_value) == ("keep_ratio", (3, 2, 1))  # the network takes red-green-blue
    for pad in (dict(size_divisor=64), dict(size_divisor=64, pad_val=114), dict(size_divisor=64, pad_val=dict(seg=9))):
        config = _config_with(dict(type="Resize", scale=(1333, 800), keep_ratio=True), dict(type="Pad", **pad))
        contract = _contract(config)
        assert contract.input_shape == (1, 3, 832, 1344)
        assert contract.pad_value == ((114,) * 3 if pad.get("pad_val") == 114 else (0,) * 3)
    config.model.data_preprocessor = dict(type="DetDataPreprocessor")
    bare = _contract(config)
    assert (bare.channel_order, bare.mean, bare.std) == ("bgr", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("transforms", "named"),
    [
        ([], "neither Resize nor FitResize"),
        ([dict(type="Resize", scale=(96, 64)), dict(type="RandomFlip", prob=0.5)], "RandomFlip.*cannot repeat"),
        ([dict(type="Resize", scale_factor=0.5)], "resizes to None; .* Give --size"),
        ([dict(type="Resize", scale=640)], "resizes to 640"),
    ],
)
def test_a_pipeline_that_deployment_cannot_repeat_is_refused(transforms: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ExportError, match=named):
        _contract(_config_with(*transforms))


def test_a_size_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ExportError, match=r"the network input is 96 x 72; expected multiples of 32. Give --size"):
        _contract(load_config(TINY), size_px=(96, 72))


def test_soft_nms_is_refused() -> None:
    config = load_config(TINY, {"model.test_cfg.nms.type": "soft_nms"})
    with pytest.raises(ExportError, match="'soft_nms'; deployment knows 'nms' only"):
        _contract(config)


def test_a_head_without_a_decoder_is_named_with_those_that_have_one() -> None:
    detector = torch.nn.Module()
    detector.bbox_head = torch.nn.Linear(1, 1)  # no dense head of any kind
    with pytest.raises(ExportError, match=r"cannot export the head Linear; can export .*GFLHead"):
        export.deployed_model(detector, _contract(load_config(TINY)))


def test_a_graph_that_computes_something_else_is_refused(exported: Path) -> None:
    contract = load_contract(exported)
    image = np.random.normal(size=contract.input_shape).astype(np.float32)
    with OrtSession(exported, threads=1) as session:
        boxes, scores, labels = (session.infer({"image": image})[name] for name in contract.output_names)
    export.check_same_outputs(exported, "image", image, [boxes, scores, labels])
    for wrong in ([boxes + 0.1, scores, labels], [boxes, scores * 0.999, labels], [boxes, scores * np.nan, labels]):
        with pytest.raises(ExportError, match="does not compute what the detector does"):
            export.check_same_outputs(exported, "image", image, wrong)


def test_a_failed_export_leaves_no_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: Any) -> None:
        raise ExportError("on purpose")

    monkeypatch.setattr(export, "check_same_outputs", refuse)
    assert export.main([str(run_dir), "-o", str(tmp_path / "x.onnx")]) == 2
    assert capsys.readouterr().err == "error: on purpose\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("detector.pth", "not the file that its sidecar describes"),
        ("config.py", "config.py is missing or was changed"),
        ("detector.pth.json", "schema_version is"),
    ],
)
def test_a_run_that_was_changed_is_refused(
    changed: str, named: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("detector.pth", "detector.pth.json", "config.py"):
        (copy / name).write_bytes((run_dir / name).read_bytes())
    content = (copy / changed).read_bytes()
    (copy / changed).write_bytes(content.replace(b'"schema_version": 1', b'"schema_version": 0') + b"\n")
    assert export.main([str(copy), "-o", str(tmp_path / "x.onnx")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-o", "x.engine"], "expected a name that ends in .onnx"),
        (["-o", "x.onnx", "--size", "100", "64"], "expected multiples of 32. Give --size WIDTH HEIGHT"),
        (["-o", "x.onnx", "--size", "0", "64"], "input_shape is (1, 3, 64, 0)"),
        (["-o", "file/x.onnx"], "cannot write file/x.onnx"),
    ],
)
def test_bad_flags_are_refused(
    words: list[str], named: str, run_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert export.main([str(run_dir), *words]) == 2
    assert named in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]
