from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.errors import ConfigError, EngineBuildError
from deploy.graphs.calibration_cache import amax_from_quantised, amax_from_text
from deploy.graphs.precision import GRAPHS, typed_graph
from deploy.tensorrt import builder
from deploy.tensorrt.builder import (
    BuildOptions,
    Recipe,
    Typing,
    build_plan,
    check_options,
    check_precision,
    coverage,
    coverage_from_json,
    default_timing_cache,
    recipe_for,
    typing_of,
    typing_of_version,
)

onnx = pytest.importorskip("onnx")
Build = Callable[..., Any]
Install = Callable[[str], Any]
VERSIONS = ("8.5.3", "8.6.1", "10.3.0", "10.16.1.11", "11.4.0.106")
STRONG, FLAGS, BOTH = Typing("11.4", True, False), Typing("8.6", False, True), Typing("10.3", True, True)


def plan_of(trt: Any, model: Any, options: BuildOptions, **more: Any) -> bytes:
    """Builds the model in the form that the recipe wants, with all that belongs to it."""
    graph = typed_graph(model, recipe_for(options, typing_of(trt)).graph, {})
    amax = amax_from_quantised(model)
    return build_plan(trt, graph.model.SerializeToString(), options, graph.float_tensors, amax, **more)


# Which way


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_known_by_its_bindings_as_by_its_number(version: str, fake_tensorrt: Install) -> None:
    assert typing_of(fake_tensorrt(version)) == typing_of_version(version)
    with pytest.raises(ConfigError, match="'new' is no version"):
        typing_of_version("new")


@pytest.mark.parametrize(
    ("options", "strong", "both", "flags"),
    [
        (BuildOptions("fp32"), Recipe("fp32", True), Recipe("fp32", True), Recipe("fp32", False)),
        (BuildOptions("fp16"), Recipe("fp16", True), Recipe("fp16", True), Recipe("fp32", False, ("FP16",))),
        (
            BuildOptions("int8"),
            Recipe("int8", True),
            Recipe("int8", True),
            Recipe("int8_fp32_scales", False, ("FP16", "INT8")),
        ),
        (BuildOptions("int8", scales="fp16"), Recipe("int8", True), Recipe("int8", True), "expected TensorRT 10.0"),
        (
            BuildOptions("int8", scales="fp32"),
            Recipe("int8_fp32_scales", True),
            Recipe("int8_fp32_scales", False, ("FP16", "INT8")),
            Recipe("int8_fp32_scales", False, ("FP16", "INT8")),
        ),
        (BuildOptions("fp32", dla_core=0), *["a DLA runs FP16 and INT8 only"] * 3),
        (BuildOptions("fp16", dla_core=0), Recipe("fp16", True), *[Recipe("fp32", False, ("FP16",))] * 2),
        (
            BuildOptions("int8", dla_core=0),
            Recipe("int8", True),
            *[Recipe("fp32", False, ("FP16", "INT8"), calibrated=True)] * 2,
        ),
        (
            BuildOptions("int8", dla_core=0, scales="fp32"),
            Recipe("int8_fp32_scales", True),
            *["takes ranges, no Q/DQ"] * 2,
        ),
    ],
)
def test_the_recipe(options: BuildOptions, strong: Any, both: Any, flags: Any) -> None:
    for typing, expected in ((STRONG, strong), (BOTH, both), (FLAGS, flags)):
        if isinstance(expected, str):
            with pytest.raises(EngineBuildError, match=expected):
                recipe_for(options, typing)
            continue
        recipe = recipe_for(options, typing)
        assert recipe == expected
        assert recipe.graph in GRAPHS
        if options.precision == "int8":  # INT8 is in the graph, or allowed and given ranges
            assert "int8" in recipe.graph or ("INT8" in recipe.flags and recipe.calibrated)
        assert not (recipe.strongly_typed and recipe.flags)  # TensorRT refuses both together


# What TensorRT is told


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_flags_go_with_the_typing(version: str, precision: str, fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt(version)
    plan_of(trt, detector_model(np.int8 if precision == "int8" else None), BuildOptions(precision))
    config, creation = trt.test.config, trt.NetworkDefinitionCreationFlag
    if version.startswith("8"):
        allowed = {"fp32": [], "fp16": ["FP16"], "int8": ["FP16", "INT8"]}[precision]
        assert config._flags == allowed + (["OBEY_PRECISION_CONSTRAINTS"] if allowed else [])
        assert trt.test.flags == 1 << int(creation.EXPLICIT_BATCH)
    else:
        assert config._flags == []
        assert trt.test.flags == 1 << int(creation.STRONGLY_TYPED)
    assert config._cleared == [trt.BuilderFlag.TF32]
    assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED


def test_weak_typing_on_10_has_no_creation_flag(fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt("10.16.1.11")
    plan_of(trt, detector_model(np.int8), BuildOptions("int8", scales="fp32"))
    assert trt.test.flags == 0
    assert set(trt.test.config._flags) == {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}


def test_layers_that_must_stay_float_are_tied_to_it(fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt("8.6.1")
    model = detector_model(np.int8)
    told = set(typed_graph(model, "int8_fp32_scales", {}).float_tensors)
    plan_of(trt, model, BuildOptions("int8"))
    unnamed = 0
    for layer in trt.test.network._layers:
        for index, output in enumerate(layer._outputs):
            unnamed += output.name.startswith("(Unnamed")
            tied = output.name in told or output.name.startswith("(Unnamed")  # those serve a Softmax
            assert layer._output_types.get(index) == (trt.DataType.FLOAT if tied else None), output.name
            assert (layer.precision is trt.DataType.FLOAT) == (tied or any(o.name in told for o in layer._outputs))
    assert unnamed == 2


def test_every_option(fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt("10.3.0")
    options = BuildOptions("fp16", workspace_mib=64, opt_level=5, hardware_compatible=True, version_compatible=True)
    plan_of(trt, detector_model(), options)
    config = trt.test.config
    assert config._pools == {trt.MemoryPoolType.WORKSPACE: 64 << 20}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config._flags == ["VERSION_COMPATIBLE"]
    assert trt.test.parser_flags == ["NATIVE_INSTANCENORM"]
    plan_of(trt, detector_model(), BuildOptions())
    assert (trt.test.config.builder_optimization_level, trt.test.config._pools) == (3, {})
    assert trt.test.parser_flags == ["NATIVE_INSTANCENORM"]  # no second one


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (BuildOptions(opt_level=3), "--opt-level"),
        (BuildOptions(hardware_compatible=True), "--hardware-compatible"),
        (BuildOptions(version_compatible=True), "--version-compatible"),
    ],
)
def test_an_option_that_came_later_is_refused(
    options: BuildOptions, flag: str, fake_tensorrt: Install, detector_contract: ModelContract
) -> None:
    message = f"TensorRT 8.5.3 does not have {flag}; expected TensorRT 8.6 or newer: leave it out"
    with pytest.raises(EngineBuildError, match=message):
        check_options(fake_tensorrt("8.5.3"), options, detector_contract)
    check_options(fake_tensorrt("8.6.1"), options, detector_contract)


def test_shapes_are_for_a_dynamic_batch_and_needed_there(
    fake_tensorrt: Install, detector_contract: ModelContract
) -> None:
    trt = fake_tensorrt("10.3.0")
    dynamic = ModelContract.from_json({**detector_contract.to_json(), "input_shape": [-1, 3, 64, 64]}, "here")
    check_options(trt, BuildOptions(shapes=(1, 2, 4)), dynamic)
    with pytest.raises(ConfigError, match="takes any number of images, --shapes is missing"):
        check_options(trt, BuildOptions(), dynamic)
    with pytest.raises(ConfigError, match=r"takes 1 image\(s\) at a time: leave it out"):
        check_options(trt, BuildOptions(shapes=(1, 2, 4)), detector_contract)


@pytest.mark.parametrize("version", ["8.5.3", "11.4.0.106"])
def test_a_dynamic_batch_gets_a_profile(version: str, fake_tensorrt: Install, detector_model: Build) -> None:
    trt, model = fake_tensorrt(version), detector_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    build_plan(trt, model.SerializeToString(), BuildOptions(shapes=(1, 4, 8)))
    (profile,) = trt.test.config._profiles
    assert profile._shapes == {"images": tuple((batch, 3, 64, 64) for batch in (1, 4, 8))}


@pytest.mark.parametrize("version", ["8.5.3", "10.3.0"])
def test_the_dla_gets_ranges_and_a_graph_without_pairs(
    version: str, fake_tensorrt: Install, detector_model: Build
) -> None:
    trt, model = fake_tensorrt(version), detector_model(np.int8)
    trt.test.dla_cores = 2
    plan = plan_of(trt, model, BuildOptions("int8", dla_core=1, gpu_fallback=True))
    config = trt.test.config
    assert (config.default_device_type, config.DLA_core) == (trt.DeviceType.DLA, 1)
    assert config._flags == ["GPU_FALLBACK", "FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    text = trt.test.cache.decode()
    assert text.startswith({"8.5.3": "TRT-8503-", "10.3.0": "TRT-100300-"}[version])
    ranges = amax_from_text(text, "here")
    assert ranges == pytest.approx(amax_from_quantised(model))
    nodes = onnx.load_from_string(plan).graph.node
    assert "QuantizeLinear" not in {node.op_type for node in nodes}
    assert set(ranges) <= {name for node in nodes for name in node.input}


def test_a_cache_that_is_not_taken_is_said(fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt("8.6.1")
    trt.test.dla_cores, trt.test.takes_cache = 1, False
    with pytest.raises(EngineBuildError, match=r"did not take the ranges.*no calibration data"):
        plan_of(trt, detector_model(np.int8), BuildOptions("int8", dla_core=0))


def test_a_dla_core_that_is_not_there(fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt("11.0.0.114")
    with pytest.raises(EngineBuildError, match=r"--dla-core is 0; TensorRT 11.0.0.114 finds 0 DLA cores"):
        plan_of(trt, detector_model(), BuildOptions("fp16", dla_core=0))


# What can go wrong


def test_parser_errors_have_no_names_on_8(fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt("8.6.1")
    trt.test.parser_errors = [("TopK", "TopK_7", "K is too large")]
    with pytest.raises(EngineBuildError, match=r"TensorRT 8.6.1 cannot parse the graph:\n  node number 7: K is too la"):
        plan_of(trt, detector_model(), BuildOptions())


def test_a_builder_that_does_not_start(fake_tensorrt: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_tensorrt("10.3.0")

    def nothing(log: Any) -> None:
        log.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", nothing)
    with pytest.raises(EngineBuildError, match=r"does not start: CUDA initialization failure.*nvidia-smi"):
        build_plan(trt, b"", BuildOptions())


def test_progress_is_told(fake_tensorrt: Install, detector_model: Build, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of(fake_tensorrt("10.3.0"), detector_model(), BuildOptions())
    shown = capsys.readouterr().err
    assert "Building Engine: 1/1" in shown
    assert "Timing" not in shown  # an inner phase
    plan_of(fake_tensorrt("8.6.1"), detector_model(), BuildOptions())
    assert "TensorRT 8.6.1 does not tell its progress" in capsys.readouterr().err


def test_steps_that_tensorrt_skips_end_the_bar(fake_tensorrt: Install, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = builder._progress_monitor(fake_tensorrt("10.3.0"))
    monitor.phase_start("Building Engine", None, 5)
    assert monitor.step_complete("Building Engine", 0)
    monitor.phase_finish("Building Engine")
    assert "Building Engine: 5/5" in capsys.readouterr().err
    assert monitor.step_complete("Building Engine", 5)  # late, from another thread
    assert capsys.readouterr().err == ""


def test_the_timing_cache_is_of_one_device_tensorrt_and_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = {"device": "NVIDIA A10/24 GB", "tensorrt": "10.3.0", "cuda_runtime": "12.6", "cuda_driver": "12.8"}
    path = default_timing_cache(machine)
    assert path.parent == tmp_path / "crosskd" / "timing"
    assert path.name == "NVIDIA-A10-24-GB-tensorrt10.3.0-cuda12.6.cache"
    for key in ("device", "tensorrt", "cuda_runtime"):
        assert default_timing_cache({**machine, key: "other"}) != path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_timing_cache(machine).parent == tmp_path / "home" / ".cache" / "crosskd" / "timing"


# What was built


def layer(kind: str, *types: str, split: bool = False, name: str = "conv", outputs: Any = ()) -> Dict[str, Any]:
    """A layer as the inspector writes it, with inputs of these types."""

    def tensor(text: str) -> Dict[str, Any]:
        key = "Datatype" if split else "Format/Datatype"
        return {"Name": "x", "Location": "Device", "Dimensions": [1, 8, 4, 4], key: text}

    return {
        "Name": name, "LayerType": kind, "ParameterType": "Convolution" if kind == "CaskConvolution" else "",
        "Inputs": [tensor(text) for text in types], "Outputs": [tensor(text) for text in outputs],
    }  # fmt: skip


def counts(shares: Optional[Dict[str, Any]]) -> List[int]:
    assert shares is not None
    assert sum(entry["share"] for entry in shares.values()) == pytest.approx(1.0, abs=1e-3)
    return [shares[precision]["count"] for precision in ("int8", "fp16", "fp32", "other")]


@pytest.mark.parametrize("split", [False, True])
def test_types_are_read_in_every_form(split: bool) -> None:
    document = {
        "Layers": [
            layer("CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format", split=split),
            layer("CaskConvolution", "Int8", "Row major linear FP16 format", split=split),
            layer("CaskConvolution", "Channel major FP16 format where channel % 8 == 0", split=split),
            layer("CaskDeconvolutionV2", "Half", split=split),
            layer("PointWiseV2", "Row major linear FP32", split=split),
            layer("TopK", "Float", split=split),
            layer("Gather", "Row major linear Int64 format", "Row major linear FP32", split=split),
            layer("Shuffle", "Int32", split=split),
            layer("Reformat", "Int8", split=split),
            layer("NoOp", "Half", split=split),
            layer("Constant", outputs=["Half"], split=split),
            layer("Myelin", "Half", split=split, name="{ForeignNode[/head/Add.../head/Mul]}"),
        ],
        "I/O Tensors" if split else "Bindings": [],
    }
    found = coverage_from_json(json.dumps(document))
    assert counts(found["layers"]) == [2, 4, 3, 1]
    assert counts(found["convolutions"]) == [2, 2, 0, 0]
    assert (found["reformats"], found["compiled"], found["reason"]) == (2, 1, None)
    assert found["layers"]["int8"]["share"] == 0.2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "unknown form"),
        ("[]", "unknown form"),
        ('{"Nodes": []}', "unknown form: KeyError"),
        ('{"Layers": []}', "names of layers and no types"),
        ('{"Layers": ["conv1 + relu", "conv2"], "Bindings": []}', "names of layers and no types"),
        ('{"Layers": [{"Name": "conv1", "LayerType": "CaskConvolution"}]}', "unknown form: KeyError"),
        (json.dumps({"Layers": [layer("CaskConvolution", "E9M9")]}), "no types that are known"),
    ],
)
def test_an_unknown_form_is_said(text: str, reason: str) -> None:
    found = coverage_from_json(text)
    assert reason in found["reason"]
    assert found["layers"] is None
    assert found["convolutions"] is None


def test_an_int8_engine_has_int8_layers(capsys: pytest.CaptureFixture[str]) -> None:
    half = [layer("CaskConvolution", "Half")]
    foreign = [*half, layer("Myelin", "Half", name="{ForeignNode[a...b]}")]
    found = {
        name: coverage_from_json(json.dumps({"Layers": layers}))
        for name, layers in (("int8", [layer("CaskConvolution", "Int8")]), ("half", half), ("foreign", foreign))
    }
    check_precision(found["int8"], "int8")
    check_precision(found["half"], "fp16")
    assert capsys.readouterr().err == ""
    with pytest.raises(EngineBuildError, match="no INT8 layer, so it was not kept"):
        check_precision(found["half"], "int8")
    check_precision(found["foreign"], "int8")
    assert "1 blocks were compiled as one" in capsys.readouterr().err
    check_precision(coverage_from_json("{}"), "int8")
    assert "nothing tells whether the engine has INT8 layers" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_coverage_of_a_plan(version: str, fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt(version)
    options = BuildOptions("int8")
    plan = plan_of(trt, detector_model(np.int8), options)
    found = coverage(trt, plan, options)
    assert counts(found["convolutions"]) == [6, 4, 0, 0]  # the predictions are not quantised
    assert found["layers"]["fp32"]["count"] > 0
    with pytest.raises(EngineBuildError, match="cannot read its own engine: "):
        coverage(trt, b"", options)
