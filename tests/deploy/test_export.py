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
from crosskd.checkpoint import save_detector_weights  # noqa: E402
from crosskd.config import load_config, overrides_from_arguments, set_classes  # noqa: E402
from crosskd.detector import detector_from_config  # noqa: E402
from crosskd.predict import predictor  # noqa: E402
from crosskd.shapes import write_shapes  # noqa: E402
from crosskd.training import load_run  # noqa: E402
from deploy import export  # noqa: E402
from deploy.contract import ModelContract, load_contract, write_sidecar  # noqa: E402
from deploy.dataset import CocoImage, load_coco, read_image, split_paths  # noqa: E402
from deploy.errors import ExportError  # noqa: E402
from deploy.graph import count_parameters, load_onnx  # noqa: E402
from deploy.postprocess import postprocess  # noqa: E402
from deploy.preprocess import preprocess  # noqa: E402
from deploy.session import OrtSession  # noqa: E402

TINY = Path(__file__).parents[1] / "crosskd" / "configs" / "gfl_tiny.py"
THRESHOLD = "model.test_cfg.score_thr=0.05"
GROUP_NORM = "model.bbox_head.norm_cfg={'type': 'GN', 'num_groups': 4, 'requires_grad': True}"


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


@pytest.fixture(scope="module", params=["BatchNorm", "GroupNorm"])
def run_dir(request: pytest.FixtureRequest, shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [THRESHOLD, GROUP_NORM] if request.param == "GroupNorm" else [THRESHOLD]
    return _run_dir(tmp_path_factory.mktemp(request.param), shapes_dir, *overrides)


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    output = run_dir.parent / "student.onnx"
    assert export.main([str(run_dir), "-o", str(output)]) == 0
    return output


def _assert_same_detections(path: Path, predict: Any, images: list[CocoImage]) -> int:
    """The number of detections, every one of which is the same in torch and on ONNX Runtime."""
    found = 0
    with OrtSession(path, threads=1) as session:
        for image in images:
            prepared = preprocess(read_image(image.path), session.contract)
            detections = postprocess(session.infer({"image": prepared.input}), session.contract, prepared)
            boxes, scores, labels = predict(image)
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


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("retinanet/retinanet_r18_fpn_1x", "retina_cls"),
        ("atss/atss_r50_fpn_1x", "atss_cls"),
        ("fcos/fcos_r50-caffe_fpn_gn-head_1x", "conv_cls"),
        ("fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x", "conv_cls"),
    ],
)
def test_detections_of_the_other_heads_are_those_of_mmdet(
    name: str, classifier: str, shapes_dir: Path, tmp_path: Path
) -> None:
    config = load_config(f"mmdet::{name}_coco.py")
    config.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    config.model.neck.in_channels = [8, 16, 32, 64]
    config.test_dataloader.dataset.pipeline = load_config(TINY).test_dataloader.dataset.pipeline
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    detector = detector_from_config(config).eval()
    for key, parameter in detector.bbox_head.named_parameters():
        if "convs" in key and parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)  # mmdet's own are too small for different scores
        elif key.startswith(classifier):
            torch.nn.init.constant_(parameter, -2.0) if parameter.dim() == 1 else torch.nn.init.normal_(
                parameter, std=0.03
            )
        elif "reg.weight" in key and "convs" not in key:
            torch.nn.init.normal_(parameter, std=0.01)
    contract = export.contract_from_config(config, list("abcdef"), list(range(6)))
    export.onnx_from_detector(detector, contract, tmp_path / "x.onnx")
    write_sidecar(tmp_path / "x.onnx", {}, contract)
    images = load_coco(*split_paths(shapes_dir, "val")).images
    assert _assert_same_detections(tmp_path / "x.onnx", predictor(config, detector), images) > 20 * len(images)


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
    padded = _contract(
        _config_with(
            dict(type="Resize", scale=(640, 640), keep_ratio=True),
            dict(type="Pad", size=(640, 640), pad_val=dict(img=(1, 2, 3))),
        )
    )
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
    export.check_same_outputs(exported, contract, image, [boxes, scores, labels])
    for wrong in ([boxes + 0.1, scores, labels], [boxes, scores * 0.999, labels]):
        with pytest.raises(ExportError, match="does not compute what the detector does"):
            export.check_same_outputs(exported, contract, image, wrong)


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
