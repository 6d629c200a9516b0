from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest

from deploy.errors import EngineBuildError
from deploy.graphs.calibration_cache import amax_from_quantised, amax_from_text
from deploy.graphs.precision import typed_graph
from deploy.runtime.golden import BLACK_AND_WHITE, noise_input
from deploy.tensorrt import builder
from deploy.tensorrt.builder import build_plan
from deploy.tensorrt.cuda import load_cuda
from deploy.tensorrt.options import BuildOptions, recipe_for, typing_of
from deploy.tensorrt.session import PlanSession

onnx = pytest.importorskip("onnx")
Build = Callable[..., Any]
Install = Callable[[str], Any]
VERSIONS = ("8.5.3", "8.6.1", "10.3.0", "10.16.1.11", "11.4.0.106")


def plan_of(trt: Any, model: Any, options: BuildOptions, **more: Any) -> bytes:
    """Builds the model in the form that the recipe wants, with all that belongs to it."""
    graph = typed_graph(model, recipe_for(options, typing_of(trt)).graph, {})
    amax = amax_from_quantised(model)
    return build_plan(trt, graph.model.SerializeToString(), options, graph.float_tensors, amax, **more)


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


# What TensorRT refuses, or gets wrong, as its stand-in does


def test_a_larger_k_than_tensorrt_has_is_refused(fake_tensorrt: Install) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        best (float[1,5000] scores) => (float[1,4000] values, int64[1,4000] labels) <int64[1] count = {4000}> {
            values, labels = TopK (scores, count)
        }"""
    )
    for version in VERSIONS:
        with pytest.raises(EngineBuildError, match=r"cannot parse the graph:\n  .*K is 4000, the maximum is 3840"):
            build_plan(fake_tensorrt(version), model.SerializeToString(), BuildOptions())


def test_a_strongly_typed_network_casts_nothing_itself(fake_tensorrt: Install) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        mixed (float[1,4] images, float16[1,4] gates) => (float[1,4] maps) { maps = Mul (images, gates) }"""
    )
    with pytest.raises(EngineBuildError, match=r"built no engine: types do not agree: .*float16"):
        build_plan(fake_tensorrt("10.3.0"), model.SerializeToString(), BuildOptions())


NORM = """<ir_version: 8, opset_import: ["" : 17]>
norm (float[1,3,64,64] images) => (float[1,3,64] boxes, float[1,3] scores, int64[1,3] labels)
<float[3] ones = {1, 1, 1}, float[3] zeros = {0, 0, 0}, float[3,1,1,1] large = {400, 400, 400},
 float[3,1,1,1] same = {1, 1, 1}> {
    features = Conv <group=3> (images, large)
    normed = InstanceNormalization (features, ones, zeros)
    maps = Conv <group=3> (normed, same)
    boxes = ReduceMax <axes=[3], keepdims=0> (maps)
    scores = ReduceMax <axes=[2], keepdims=0> (boxes)
    labels = ArgMax <axis=2, keepdims=0> (boxes)
}"""
"""Its norm's input is up to 800 from its mean."""


def test_a_norm_that_overflows_in_half_is_wrong_and_kept_in_float_it_is_right(
    fake_tensorrt: Install, run_detector: Build, detector_contract: Any, fake_cuda: Any
) -> None:
    trt, model = fake_tensorrt("10.3.0"), onnx.parser.parse_model(NORM)
    options = BuildOptions("fp16")
    typed = typed_graph(model, "fp16", {}).model
    careless = half_everywhere(typed)
    feed = {"images": noise_input(detector_contract, BLACK_AND_WHITE)}
    expected = run_detector(model, feed)["boxes"]
    for graph, right in ((typed, True), (careless, False)):
        plan = build_plan(trt, graph.SerializeToString(), options)
        with PlanSession(plan, detector_contract, trt, load_cuda("a test")) as session:
            found = session.infer(feed)["boxes"]
        assert np.allclose(found, expected, atol=0.01) == right
        assert np.isfinite(found).all() == right


def half_everywhere(model: Any) -> Any:
    """The graph with its norm's input and parameters in FP16, without the casts around it."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    norm = next(node for node in changed.graph.node if node.op_type == "InstanceNormalization")
    casts = {node.output[0]: node for node in changed.graph.node if node.op_type == "Cast"}
    back = next(node for node in casts.values() if node.input[0] == norm.output[0])
    for position, name in enumerate(norm.input[1:], 1):
        values = next(tensor for tensor in changed.graph.initializer if tensor.name == name)
        half = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(values).astype(np.float16), f"{name}_half")
        changed.graph.initializer.append(half)
        norm.input[position] = half.name
    into = casts[norm.input[0]]
    norm.input[0], norm.output[0] = into.input[0], back.output[0]
    for node in (into, back):
        changed.graph.node.remove(node)
    return changed
