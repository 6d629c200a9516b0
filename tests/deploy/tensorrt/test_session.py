from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from deploy.contract import load_contract, sidecar_path, write_sidecar
from deploy.errors import ContractError, PipelineError
from deploy.runtime.golden import noise_input
from deploy.runtime.session import OrtSession
from deploy.tensorrt import session as module
from deploy.tensorrt.bindings import load_tensorrt, logger
from deploy.tensorrt.builder import build_plan
from deploy.tensorrt.cuda import load_cuda
from deploy.tensorrt.options import BuildOptions
from deploy.tensorrt.session import PlanSession, TrtSession, check_same_machine

onnx = pytest.importorskip("onnx")
File = Callable[..., Path]


def assert_all_given_back(cuda: Any) -> None:
    assert not cuda.memory
    assert not cuda.handles


def test_runs_as_onnx_runtime_does(engine_file: Path, fake_cuda: Any, run_detector: Any, detector_model: Any) -> None:
    with TrtSession(engine_file) as session:
        assert session.description == "TensorRT 11.4.0.106, Stand-in GPU, CUDA graph, fp32"
        for seed in (0, 1):
            feed = {"images": noise_input(session.contract, seed)}
            expected, found = run_detector(detector_model(), feed), session.infer(feed)
            assert list(found) == ["boxes", "scores", "labels"]
            for name, values in expected.items():
                assert values.dtype == found[name].dtype
                assert np.array_equal(values, found[name])
    assert_all_given_back(fake_cuda)
    session.close()  # a second time does nothing
    assert np.array_equal(found["boxes"], expected["boxes"])  # no views of freed memory


def change_details(engine: Path, **details: Any) -> None:
    document = json.loads(sidecar_path(engine).read_text())
    document["details"].update(details)
    sidecar_path(engine).write_text(json.dumps(document))


@pytest.mark.parametrize("key", ["tensorrt", "device", "compute_capability", "multiprocessors"])
def test_an_engine_of_another_machine_is_refused(engine_file: Path, key: str, fake_cuda: Any) -> None:
    change_details(engine_file, **{key: "other"})
    with pytest.raises(ContractError, match=rf"built with {key} 'other'; here it is .*build it again"):
        TrtSession(engine_file)
    assert_all_given_back(fake_cuda)


def test_an_engine_of_another_orin(engine_file: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are named "Orin", of compute capability 8.7."""
    change_details(engine_file, board="NVIDIA Jetson AGX Orin Developer Kit", power_mode="MAXN")
    with TrtSession(engine_file):  # in a container that does not see the board
        pass
    monkeypatch.setattr(module, "board_model", lambda: "NVIDIA Jetson Orin NX Engineering Reference Developer Kit")
    with pytest.raises(
        ContractError, match=r"built with board 'NVIDIA Jetson AGX .* here it is 'NVIDIA Jetson Orin NX"
    ):
        TrtSession(engine_file)
    change_details(engine_file, board=None, multiprocessors="16")
    with pytest.raises(ContractError, match=r"built with multiprocessors '16'; here it is '8'\. Engines do not move"):
        TrtSession(engine_file)
    assert_all_given_back(fake_cuda)


def test_a_change_of_the_power_mode_is_said(
    engine_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_details(engine_file, power_mode="MAXN")
    for mode, words in (
        ("MAXN", ""),
        ("15W", f"{engine_file} was built in the power mode MAXN, the board is in 15W now"),
    ):
        monkeypatch.setattr(module, "power_mode", lambda mode=mode: mode)
        with TrtSession(engine_file):
            pass
        error = capsys.readouterr().err
        assert words in error
        assert bool(error) == bool(words)


def test_what_tensorrt_does_with_an_engine_of_another_multiprocessor_count(
    small_file: File, fake_tensorrt: Callable[[str], Any], fake_cuda: Any
) -> None:
    """It loads, with a warning in the log, and fails: seen where no sidecar warns before."""
    trt, path = fake_tensorrt("10.3.0"), small_file("topk")
    plan = build_plan(trt, path.read_bytes(), BuildOptions())
    fake_cuda.cudaGetDeviceProperties(0)[1].multiProcessorCount = 16
    with pytest.raises(PipelineError, match="could not run the engine: Cask unknown internal error"):
        PlanSession(plan, load_contract(path), load_tensorrt("a test"), load_cuda("a test"))
    assert_all_given_back(fake_cuda)


NORM = """<ir_version: 8, opset_import: ["" : 17]>
norm (float[2,3,4,4] pixels) => (float[2,3,4] boxes, float[2,3] scores, int64[2,3] labels)
<float[3] scale = {1, 1, 1}, float[3] bias = {0, 0, 0}> {
    x = InstanceNormalization (pixels, scale, bias)
    boxes = ReduceMax <axes=[3], keepdims=0> (x)
    scores = ReduceMax <axes=[2], keepdims=0> (boxes)
    labels = ArgMax <axis=2, keepdims=0> (boxes)
}"""


@pytest.mark.parametrize(
    ("version", "options", "plugin"),
    [
        ("8.5.3", BuildOptions(), True),
        ("8.6.1", BuildOptions(), True),
        ("8.6.1", BuildOptions(version_compatible=True), False),
        ("10.3.0", BuildOptions(), False),
    ],
)
def test_norms_of_tensorrt_8_are_plugins_that_each_process_registers(
    version: str, options: BuildOptions, plugin: bool, small_file: File, fake_tensorrt: Callable[[str], Any]
) -> None:
    contract, model = load_contract(small_file("topk")), onnx.parser.parse_model(NORM)
    plan = build_plan(fake_tensorrt(version), model.SerializeToString(), options)
    other_process = fake_tensorrt(version)
    runtime = other_process.Runtime(logger(other_process))
    assert (runtime.deserialize_cuda_engine(plan) is None) == plugin
    assert bool(logger(other_process).errors) == plugin
    with PlanSession(plan, contract, load_tensorrt("a test"), load_cuda("a test")) as session:
        assert session.infer(small_images(2))["boxes"].max() > 1  # normalised


HERE = {
    "tensorrt": "10.13.3.9.post1", "device": "Stand-in GPU", "compute_capability": "8.7", "multiprocessors": "8",
    "board": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("built_on", "runs"),
    [
        ({}, True),
        ({"tensorrt": "10.3.0", "version_compatible": True}, True),
        ({"tensorrt": "10.13.3.9", "version_compatible": True}, True),
        ({"tensorrt": "10.14.1.48", "version_compatible": True}, False),
        ({"tensorrt": "8.6.1", "version_compatible": True}, False),
        ({"tensorrt": "10.3.0", "version_compatible": False}, False),
        ({"tensorrt": "10.3.0", "device": "other", "version_compatible": True}, False),
        ({"device": "other", "compute_capability": "9.0", "hardware_compatible": True}, True),
        ({"device": "other", "compute_capability": "9.0"}, False),
        ({"multiprocessors": "16", "board": "other", "hardware_compatible": True}, True),
        ({"multiprocessors": "16"}, False),
        ({"board": "other"}, True),
        ({"device": "other", "tensorrt": "10.3.0", "hardware_compatible": True}, False),
        ({"device": "other", "tensorrt": "10.3.0", "hardware_compatible": True, "version_compatible": True}, True),
    ],
)
def test_what_an_engine_is_bound_to(built_on: Dict[str, Any], runs: bool) -> None:
    built_on = {**HERE, **built_on}
    if runs:
        check_same_machine(built_on, HERE, "an.engine")
    else:
        with pytest.raises(ContractError, match=r"an\.engine was built with .*build it again here"):
            check_same_machine(built_on, HERE, "an.engine")


def test_hardware_compatible_engines_need_ampere() -> None:
    with pytest.raises(ContractError, match=r"here it is '7\.5'\. Hardware-compatible.*8\.0 or higher"):
        check_same_machine({**HERE, "hardware_compatible": True}, {**HERE, "compute_capability": "7.5"}, "an.engine")


def test_how_it_was_built_is_how_it_is_loaded(engine_file: Path, fake_tensorrt: Callable[[str], Any]) -> None:
    test = fake_tensorrt("11.4.0.106").test
    test.dla_cores = 2
    with TrtSession(engine_file):
        assert (test.runtime.DLA_core, test.runtime.engine_host_code_allowed) == (-1, False)
    change_details(engine_file, dla_core=1, version_compatible=True)
    with TrtSession(engine_file):
        assert (test.runtime.DLA_core, test.runtime.engine_host_code_allowed) == (1, True)
    test.dla_cores = 1
    with pytest.raises(ContractError, match=r"for DLA core 1; this device has 1 DLA cores"):
        TrtSession(engine_file)


def test_a_sidecar_that_is_not_an_engine_s_is_refused(engine_file: Path) -> None:
    write_sidecar(engine_file, {}, OrtSession(engine_file.with_suffix(".onnx")).contract)
    with pytest.raises(
        ContractError, match=r"mini\.engine\.json: details\.precision is missing.*Make mini\.engine again"
    ):
        TrtSession(engine_file)
    sidecar_path(engine_file).unlink()
    with pytest.raises(ContractError, match=r"cannot read .*mini\.engine\.json"):
        TrtSession(engine_file)


def test_a_changed_engine_is_refused(engine_file: Path, fake_cuda: Any) -> None:
    content, contract = engine_file.read_bytes(), OrtSession(engine_file.with_suffix(".onnx")).contract
    engine_file.write_bytes(content[:-10])
    with pytest.raises(ContractError, match="not the file that its sidecar describes"):
        TrtSession(engine_file)
    for foreign in (content[: len(content) // 2], b"\x89PNG", b""):
        with pytest.raises(ContractError, match=r"cannot read the engine: no plan: .*Build it again here"):
            PlanSession(foreign, contract, load_tensorrt("a test"), load_cuda("a test"))
        assert_all_given_back(fake_cuda)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_name", "image", r"has the tensors \['images', .*expects \['image'"),
        ("input_shape", (2, 3, 64, 64), r"takes float32 \(1, 3, 64, 64\); its contract expects float32 \(2, 3, 64, 64"),
        ("input_type", "uint8", r"takes float32 \(1, 3, 64, 64\); its contract expects uint8"),
    ],
)
def test_an_engine_of_another_contract_is_refused(
    engine_file: Path, fake_cuda: Any, field: str, value: Any, message: str
) -> None:
    contract = OrtSession(engine_file.with_suffix(".onnx")).contract
    changes = {field: value}
    if value == "uint8":
        changes["input_shape"] = (1, 64, 64, 3)
    with pytest.raises(ContractError, match=message):
        PlanSession(
            engine_file.read_bytes(),
            dataclasses.replace(contract, **changes),
            load_tensorrt("a test"),
            load_cuda("a test"),
        )
    assert_all_given_back(fake_cuda)


CREATIONS = (
    "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaMalloc", "cudaMallocHost", "cudaGraphInstantiateWithFlags",
)  # fmt: skip


def test_a_device_that_is_full_at_any_moment(
    engine_file: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: List[str] = []
    room = sys.maxsize

    def limited(name: str, create: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            made.append(name)
            fake_cuda.full = len(made) > room
            return create(*arguments)

        return call

    for name in CREATIONS:
        monkeypatch.setattr(fake_cuda, name, limited(name, getattr(fake_cuda, name)))
    with TrtSession(engine_file):
        all_made = list(made)
    assert set(all_made) == set(CREATIONS)
    assert all_made.count("cudaMalloc") == all_made.count("cudaMallocHost") == 4  # one input, three outputs
    for index, name in enumerate(all_made):
        made.clear()
        room = index
        with pytest.raises(PipelineError, match=f"CUDA: {name} says cudaErrorMemoryAllocation: .*End other programs"):
            TrtSession(engine_file)
        assert_all_given_back(fake_cuda)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("context_error", "cannot start the engine: out of memory. Free memory of the GPU"),
        ("run_error", "could not run the engine: out of memory"),
    ],
)
def test_what_tensorrt_itself_cannot_do_is_said(
    engine_file: Path, fake_tensorrt: Callable[[str], Any], fake_cuda: Any, fault: str, message: str
) -> None:
    test = fake_tensorrt("11.4.0.106").test
    setattr(test, fault, "out of memory")
    with pytest.raises(PipelineError, match=message):
        TrtSession(engine_file)
    assert_all_given_back(fake_cuda)


def test_a_failure_on_the_way_is_said_and_cleaned_up(
    engine_file: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrtSession(engine_file) as session:
        broken = lambda *arguments: (fake_cuda.cudaError_t.cudaErrorIllegalAddress,)  # noqa: E731
        monkeypatch.setattr(fake_cuda, "cudaStreamSynchronize", broken)
        with pytest.raises(PipelineError, match="cudaStreamSynchronize says cudaErrorIllegalAddress"):
            session.infer({"images": noise_input(session.contract, 0)})
        free = fake_cuda.cudaFree
        monkeypatch.setattr(fake_cuda, "cudaFree", lambda address: (free(address), broken())[1])  # as CUDA does then
    assert_all_given_back(fake_cuda)


# CUDA graphs, dynamic batches and outputs of unknown size -------------------------------------------------------------


def start(path: Path) -> PlanSession:
    return PlanSession(path.read_bytes(), load_contract(path), load_tensorrt("a test"), load_cuda("a test"))


def small_images(batch: int) -> Dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(batch).random((batch, 3, 4, 4)).astype(np.float32)}


def test_every_inference_is_a_launch_of_the_graph(
    small_file: File, fake_tensorrt: Callable[[str], Any], fake_cuda: Any
) -> None:
    test = fake_tensorrt("10.3.0").test
    with start(small_file("topk")) as session:
        assert session.description.endswith(", CUDA graph")
        assert test.context._runs == 1  # before the capture
        launches = fake_cuda.launches
        for _ in range(3):
            session.infer(small_images(2))
        assert test.context._runs == 1
        assert fake_cuda.launches == launches + 3


def test_a_graph_is_captured_anew_for_another_batch(
    small_file: File, fake_tensorrt: Callable[[str], Any], fake_cuda: Any
) -> None:
    test = fake_tensorrt("10.3.0").test
    with start(small_file("topk", batch=-1)) as session:
        assert session.batch_limits == (1, 4)
        assert test.context._runs == 1  # for a batch of 4, the largest
        for batch, runs in ((4, 1), (3, 2), (3, 2), (3, 2), (1, 3), (1, 3)):
            feed = small_images(batch)
            assert np.array_equal(session.infer(feed)["boxes"], feed["pixels"].max(axis=3))
            assert test.context._runs == runs
        graphs = [value for value in fake_cuda.handles.values() if isinstance(value, list)]
        assert len(graphs) == 1
    assert_all_given_back(fake_cuda)


@pytest.mark.parametrize("by", ["tensorrt", "cuda"])
def test_where_no_graph_can_be_captured_the_engine_runs_without(
    small_file: File, fake_tensorrt: Callable[[str], Any], fake_cuda: Any, by: str
) -> None:
    test = fake_tensorrt("10.3.0").test
    test.capture_error = "not permitted when stream is capturing" if by == "tensorrt" else ""
    fake_cuda.capture_fails = by == "cuda"
    reason = {"tensorrt": "not permitted when stream is capturing", "cuda": "cudaErrorStreamCaptureUnsupported"}[by]
    with start(small_file("topk")) as session:
        assert "no CUDA graph (" in session.description
        assert reason in session.description
        feed = small_images(2)
        assert np.array_equal(session.infer(feed)["boxes"], feed["pixels"].max(axis=3))
        assert fake_cuda.launches == 0
    assert_all_given_back(fake_cuda)


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.4.0.106"])
def test_outputs_of_unknown_size_come_through_the_allocator(
    small_file: File, fake_tensorrt: Callable[[str], Any], fake_cuda: Any, version: str
) -> None:
    test = fake_tensorrt(version).test
    with start(small_file("nms", batch=-1)) as session:
        assert session.description.endswith("no CUDA graph (the number of detections is known only afterwards)")
        feed = small_images(2)
        found = session.infer(feed)
        places = np.argwhere(feed["pixels"] > 0.5)
        assert 0 < len(places) < test.most_rows
        assert np.array_equal(found["boxes"], places)
        assert np.array_equal(found["images"], places[:, 0])
        assert found["labels"].dtype == (np.int32 if version == "8.6.1" else np.int64)  # 8.x has no INT64
    assert_all_given_back(fake_cuda)


def test_more_than_tensorrt_s_own_bound_is_refused(
    small_file: File, fake_tensorrt: Callable[[str], Any], fake_cuda: Any
) -> None:
    fake_tensorrt("10.3.0").test.most_rows = 10
    with (
        start(small_file("nms")) as session,
        pytest.raises(PipelineError, match="could not run the engine"),
    ):
        session.infer(small_images(2))
    assert_all_given_back(fake_cuda)
