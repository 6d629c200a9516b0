"""Models of timm as backbones: what they give, where their weights come from, and that they fit what follows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm")
safetensors_torch = pytest.importorskip("safetensors.torch")

from crosskd import distill, export  # noqa: E402
from crosskd.config import load_config  # noqa: E402
from crosskd.models.backbones import TimmBackbone  # noqa: E402
from crosskd.models.detector import detector_from_config  # noqa: E402
from deploy.contract import load_contract  # noqa: E402
from deploy.errors import CheckpointError, ConfigError, MissingDependencyError  # noqa: E402

ROOT = Path(__file__).parents[3]
LEVELS = (1, 2, 3, 4)  # strides 4, 8, 16, 32
TINY_SWIN = dict(img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2)


def _timm_backbone(model: str = "test_efficientnet", prefix: str = "model", **keys: Any) -> dict[str, Any]:
    """Overrides that put a timm model in place of a config's backbone; it tells the neck its channels."""
    backbone = dict(_delete_=True, type="TimmBackbone", model=model, **{"out_indices": LEVELS, **keys})
    return {f"{prefix}.backbone": backbone, f"{prefix}.neck.in_channels": "backbone"}


# ---- what it gives


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("test_resnet", dict(out_indices=LEVELS)),
        ("test_efficientnet", dict(out_indices=(2, 4))),
        ("test_convnext", dict(out_indices=(0, 1, 2, 3))),
        ("swin_tiny_patch4_window7_224", dict(out_indices=(0, 1, 2, 3), model_kwargs=TINY_SWIN)),  # channels come last
    ],
)
def test_maps_have_the_channels_and_strides_it_names(model: str, keys: dict[str, Any]) -> None:
    backbone = TimmBackbone(model, **keys).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 64))
    assert len(maps) == len(keys["out_indices"])
    assert [tuple(level.shape) for level in maps] == [
        (2, channels, 64 // stride, 64 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (dict(model="mobilenetv3_smal_100"), r"no model 'mobilenetv3_smal_100'; there are \['mobilenetv3_small_100'"),
        (dict(model="???"), r"no model '\?\?\?'; timm.list_models\(\) lists"),
        (dict(model="test_resnet.nope"), "cannot build test_resnet.nope"),
        (dict(out_indices=(1, 9)), r"cannot build test_efficientnet with out_indices=\(1, 9\)"),
        (dict(model_kwargs=dict(nope=1)), "cannot build test_efficientnet .*nope"),
        (dict(frozen_stages=5), "frozen_stages is 5; expected at most the highest of out_indices"),
        (dict(depth=18, norm_cfg=dict(type="BN")), r"keys \['depth', 'norm_cfg'\].*add _delete_=True"),
    ],
)
def test_what_timm_cannot_build_is_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TimmBackbone(**{"model": "test_efficientnet", "out_indices": LEVELS, **keys})


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"package timm.*pip install 'crosskd\[train\]'"):
        TimmBackbone("resnet18", LEVELS)


# ---- weights


@pytest.fixture
def whole() -> Any:
    """timm's whole model, with a classifier of seven classes, as if trained."""
    model = timm.create_model("test_efficientnet", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture(params=["weights.safetensors", "weights.pth"])
def weights(request: pytest.FixtureRequest, whole: Any, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".pth":
        torch.save({"state_dict": whole.state_dict()}, path)
    else:
        safetensors_torch.save_file(whole.state_dict(), path)
    return path


def test_a_file_of_weights_is_loaded_when_a_training_starts(whole: Any, weights: Path) -> None:
    backbone = TimmBackbone("test_efficientnet", (4,), pretrained=str(weights)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, indices=[4], intermediates_only=True)[0]
        before = backbone(images)[0]
        backbone.init_weights()
        after = backbone(images)[0]
    assert (before - expected).abs().max() > 0.01  # building reads no file: the board that exports may not have it
    torch.testing.assert_close(after, expected)


def test_the_student_of_a_distillation_is_initialised_by_them(configs: Path, whole: Any, weights: Path) -> None:
    overrides = _timm_backbone(prefix="model.student", pretrained=str(weights))
    detector = detector_from_config(load_config(configs / "crosskd_tiny.py", overrides), load_weights=False)
    detector.init_weights()
    assert torch.equal(detector.student.backbone.model.conv_stem.weight, whole.conv_stem.weight)


def test_timms_own_weights_come_by_timms_own_way(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(whole.state_dict(), path)
    from_file = dict(pretrained_cfg_overlay=dict(file=str(path)))  # instead of the network
    backbone = TimmBackbone("test_efficientnet", LEVELS, pretrained=True, model_kwargs=from_file)
    backbone.init_weights()
    assert torch.equal(backbone.model.conv_stem.weight, whole.conv_stem.weight)


def test_a_model_without_weights_of_timms_says_so() -> None:
    backbone = TimmBackbone("lcnet_035", LEVELS, pretrained=True)
    with pytest.raises(CheckpointError, match=r"cannot get its weights of lcnet_035 .*Set backbone\.pretrained"):
        backbone.init_weights()


def test_without_pretrained_weights_timms_random_ones_stay() -> None:
    backbone = TimmBackbone("test_efficientnet", LEVELS)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_weights_of_another_model_or_none_are_refused(weights: Path, tmp_path: Path) -> None:
    def load(model: str, path: Path) -> None:
        TimmBackbone(model, LEVELS, pretrained=str(path)).init_weights()

    with pytest.raises(CheckpointError, match=r"does not hold weights of timm's test_resnet: \d+ of the backbone's"):
        load("test_resnet", weights)
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(CheckpointError, match=f"cannot read the .*{weights.name}"):
        load("test_efficientnet", weights)
    missing = tmp_path / f"missing{weights.suffix}"
    with pytest.raises(CheckpointError, match=missing.name):
        load("test_efficientnet", missing)


def test_weights_behind_a_prefix_are_taken_and_those_that_are_nan_are_refused(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {f"_orig_mod.{key}": value for key, value in whole.state_dict().items()}}, path)
    backbone = TimmBackbone("test_efficientnet", LEVELS, pretrained=str(path))
    backbone.init_weights()
    assert torch.equal(backbone.model.conv_stem.weight, whole.conv_stem.weight)
    assert "took the weights in model with names that begin with '_orig_mod.'" in capsys.readouterr().out
    whole.conv_stem.weight.data[0, 0, 0, 0] = torch.nan
    torch.save(whole.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"conv_stem\.weight has 1 of \d+ values that are NaN"):
        backbone.init_weights()


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv4_conv_small_035").state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone("mobilenetv4_conv_small_050", LEVELS, pretrained=str(tmp_path / "weights.pth"))
    with pytest.raises(
        CheckpointError, match=r"weights of timm's mobilenetv4_conv_small_050 .*size mismatch for \S+: copying [^:]*$"
    ):
        backbone.init_weights()


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_vit"])
def test_every_tensor_is_found_however_timm_cuts_the_model_open(model: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(model).state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(model, (0, 1), pretrained=str(tmp_path / "weights.pth"))
    before = {key: value.clone() for key, value in backbone.named_parameters() if key.endswith("weight")}
    backbone.init_weights()
    changed = {
        key for key, value in backbone.named_parameters() if key in before and not torch.equal(before[key], value)
    }
    assert {key for key, value in before.items() if value.dim() > 1} <= changed  # norms are ones in both


def test_a_single_missing_tensor_is_found(whole: Any, tmp_path: Path) -> None:
    state = whole.state_dict()
    del state["blocks.1.0.bn2.running_mean"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"1 of the backbone's tensors .*such as blocks\.1\.0\.bn2\.running_mean"):
        TimmBackbone("test_efficientnet", LEVELS, pretrained=str(tmp_path / "weights.pth")).init_weights()


# ---- training


@pytest.mark.parametrize("model", ["test_resnet", "mobilenetv4_conv_small_050", "test_convnext"])
@pytest.mark.parametrize("stages", [0, 2])
def test_frozen_are_the_layers_that_a_level_is_computed_from(model: str, stages: int) -> None:
    backbone = TimmBackbone(model, (0, 1, 2, 3), frozen_stages=stages).train()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    norms = {f"{name}.weight": m for name, m in backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    still = {name for name, norm in norms.items() if not norm.training}
    backbone.requires_grad_(True)
    backbone.eval()(torch.randn(1, 3, 64, 64))[stages].sum().backward()
    assert frozen == {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert still == frozen & norms.keys()


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_the_running_statistics(norm_eval: bool) -> None:
    backbone = TimmBackbone("test_resnet", LEVELS, norm_eval=norm_eval)
    before = {key: value.clone() for key, value in backbone.state_dict().items() if "running" in key}
    backbone.train()(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) == norm_eval for key in before)


# ---- in a config


def test_the_neck_takes_the_backbones_channels(configs: Path) -> None:
    config = load_config(configs / "gfl_tiny.py", _timm_backbone())
    assert config.model.neck.in_channels == [24, 32, 48, 64]
    student = load_config(configs / "crosskd_tiny.py", _timm_backbone("test_resnet", "model.student"))
    assert student.model.student.neck.in_channels == [32, 48, 192, 96]
    assert student.model.teacher.model.neck.in_channels == [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            {**_timm_backbone(), "model.neck.in_channels": [8, 16, 32, 64]},
            r"neck.in_channels is \[8, 16, 32, 64\], but test_efficientnet gives \[24, 32, 48, 64\] .*strides \[4, 8",
        ),
        (_timm_backbone(out_indices=(2, 3, 4)), r"strides \[4, 8, 16, 32, 64\], but .* maps of \[8, 16, 32\]"),
        ({**_timm_backbone(), "model.neck.start_level": 1}, r"maps of \[8, 16, 32\] from neck.start_level on"),
        ({"model.neck.in_channels": "backbone"}, 'neck.in_channels is "backbone" and the backbone ResNet'),
        (_timm_backbone("test_efficient"), "there are .*test_efficientnet"),
        ({"model.backbone": dict(_delete_=True, type="TimmBackbone")}, "backbone cannot be built: .*'model'"),
        ({"model.backbone.type": "TimmBackbone", "model.backbone.model": "resnet18"}, "add _delete_=True"),
        (
            _timm_backbone("mobilenetv4_conv_small_050", pretrained=True),  # trained on images of -1 to 1
            r"want a data_preprocessor with \{'mean': \[127.5, .*found \{'mean': \[123.675",
        ),
        (
            {**_timm_backbone(pretrained=True), "model.data_preprocessor.bgr_to_rgb": False},
            r"want a data_preprocessor .*'bgr_to_rgb': True\}; found .*'bgr_to_rgb': False",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(configs: Path, overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(configs / "gfl_tiny.py", overrides)


def test_weights_trained_on_the_configs_normalisation_are_accepted(configs: Path) -> None:
    assert load_config(configs / "gfl_tiny.py", _timm_backbone(pretrained=True)).model.backbone.pretrained is True


def test_mmdets_own_backbones_are_left_as_they_are() -> None:
    from mmengine.hub import get_config

    name = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
    assert load_config(name).model.to_dict() == get_config(name).model.to_dict()


# ---- the whole way


def test_an_edge_student_trains_under_a_resnet_and_is_exported(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path
) -> None:
    shipped = load_config(ROOT / "configs" / "crosskd_gfl_mobilenetv4_r34_320.py")
    assert shipped.model.teacher.model.backbone.type == "ResNet"
    model = shipped.model.student.backbone.model
    run_dir, backbone = tmp_path / "run", f"{{'_delete_': True, 'type': 'TimmBackbone', 'model': '{model}', "
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(run_dir)]
    words += ["--teacher-checkpoint", str(teacher_run / "detector.pth"), "--set"]
    words += [
        f"model.student.backbone={backbone}'out_indices': (1, 2, 3, 4)}}",
        "model.student.neck.in_channels=backbone",
    ]
    assert distill.main(words) == 0
    trained = torch.load(run_dir / "student.pth", weights_only=True)["state_dict"]
    assert trained["backbone.model.conv_stem.weight"].shape == (32, 3, 3, 3)
    assert trained["backbone.model.bn1.num_batches_tracked"] == 2  # eight images, four at a time
    assert export.main([str(run_dir), "-o", str(tmp_path / "student.onnx")]) == 0  # compares with torch
    assert load_contract(tmp_path / "student.onnx").input_shape == (1, 3, 64, 96)
