from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest

from deploy.contract import load_contract, sidecar_path, write_sidecar
from deploy.errors import ConfigError, ContractError, MissingDependencyError, PipelineError
from deploy.runtime import session as session_module
from deploy.runtime.session import OrtSession, Session, open_session
from deploy.targets import TARGETS
from deploy.tensorrt.cuda import load_cuda
from deploy.tensorrt.session import describe_machine

KINDS = list(TARGETS)
Open = Callable[..., Session]


@pytest.fixture
def open_small(small_file: Callable[..., Path], fake_tensorrt: Callable[[str], Any]) -> Open:
    """`open_small(runtime, outputs, batch=2, input_type="float32")` -> session of the same graph."""
    trt = fake_tensorrt("10.3.0")

    def open_(kind: str, *arguments: Any, **settings: Any) -> Session:
        path = small_file(*arguments, **settings)
        if kind == "openvino":
            pytest.importorskip("openvino")
        if kind == "tensorrt":
            engine = path.with_suffix(".engine")
            engine.write_bytes(path.read_bytes())
            cuda = load_cuda("a test")
            write_sidecar(engine, {}, load_contract(path), {"precision": "fp32", **describe_machine(trt, cuda)})
            path = engine
        return open_session(path, runtime=kind)

    return open_


def images(batch: int, input_type: str = "float32") -> np.ndarray:
    shape = (batch, 4, 4, 3) if input_type == "uint8" else (batch, 3, 4, 4)
    return (255 * np.random.default_rng(batch).random(shape)).astype(input_type)


def topk_of(x: np.ndarray) -> Dict[str, np.ndarray]:
    """What the small graph finds in images of any type and layout."""
    boxes = (x.transpose(0, 3, 1, 2) if x.dtype == np.uint8 else x).astype(np.float32).max(axis=3)
    return {"boxes": boxes, "scores": boxes.max(axis=2), "labels": boxes.argmax(axis=2)}


def nms_of(x: np.ndarray) -> Dict[str, np.ndarray]:
    places = np.argwhere(x > 0.5)
    boxes, scores = places.astype(np.float32), x[tuple(places.T)]
    return {"boxes": boxes, "scores": scores, "labels": places[:, 1], "images": places[:, 0]}


def assert_equal(found: Dict[str, np.ndarray], expected: Dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("input_type", ["float32", "uint8"])
def test_outputs_come_by_name(open_small: Open, kind: str, input_type: str) -> None:
    x = images(2, input_type)
    with open_small(kind, "topk", input_type=input_type) as session:
        assert session.batch_limits == (2, 2)
        for turned in (x, x[::-1], x[:, ::-1]):  # the last two are not contiguous
            found = session.infer({"pixels": turned})
            assert_equal(found, topk_of(turned))
    assert_equal(found, topk_of(turned))  # which outlive the session


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_images(open_small: Open, kind: str) -> None:
    with open_small(kind, "topk", batch=-1) as session:
        for batch in (1, 3, 3, 3, 4, 1, 1):
            x = images(batch)
            assert_equal(session.infer({"pixels": x}), topk_of(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [2, -1])
def test_outputs_whose_size_depends_on_the_image(open_small: Open, kind: str, batch: int) -> None:
    with open_small(kind, "nms", batch=batch) as session:
        for largest in (1.0, 0.4, 0.6, 1.0):  # at 0.4 there are none
            x = np.random.default_rng(3).random((2, 3, 4, 4)).astype(np.float32) * np.float32(largest)
            found = session.infer({"pixels": x})
            assert_equal(found, nms_of(x))
            assert (len(found["boxes"]) == 0) == (largest < 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_allocated_for_an_inference(open_small: Open, kind: str, fake_cuda: Any) -> None:
    with open_small(kind, "topk", batch=-1) as session:
        first = session.infer({"pixels": images(3)})
        addresses = {name: values.ctypes.data for name, values in first.items()}
        memory = list(fake_cuda.memory)
        second = session.infer({"pixels": images(3) + 1})
        assert {name: values.ctypes.data for name, values in second.items()} == addresses
        assert list(fake_cuda.memory) == memory
        np.testing.assert_array_equal(first["boxes"], images(3).max(axis=3) + 1)  # valid until the next call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", ["topk", "nms"])
def test_times_are_told_on_request(open_small: Open, kind: str, outputs: str) -> None:
    with open_small(kind, outputs) as session:
        times: Dict[str, float] = {}
        session.infer({"pixels": images(2)}, times)
    steps = ["host_to_device", "inference", "device_to_host"] if TARGETS[kind].on_gpu else ["inference"]
    assert list(times) == steps
    assert 0 < times["inference"] < 1000
    assert min(times.values()) >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"fed \[\]; expected its one input, 'pixels'"),
        ({"image": images(2)}, r"fed \['image'\]; expected its one input, 'pixels'"),
        ({"pixels": images(2), "more": images(2)}, r"fed \['more', 'pixels'\]"),
        ({"pixels": images(2).tolist()}, "'pixels' is list; expected a numpy array of float32"),
        ({"pixels": images(2).astype(np.float64)}, "'pixels' is float64; expected a numpy array of float32"),
        ({"pixels": images(2, "uint8")}, "'pixels' is uint8; .*prepare images with deploy.runtime.preprocess"),
        ({"pixels": images(2).astype(">f4")}, "'pixels' is >f4; expected a numpy array of float32"),
        ({"pixels": images(2)[..., :2]}, r"the shape \(2, 3, 4, 2\); expected \(2, 3, 4, 4\)"),
        ({"pixels": images(2)[0]}, r"the shape \(3, 4, 4\); expected \(2, 3, 4, 4\)"),
        ({"pixels": images(1)}, r"the shape \(1, 3, 4, 4\); expected \(2, 3, 4, 4\)"),
    ],
)
def test_another_input_is_refused(open_small: Open, kind: str, feed: Dict[str, Any], message: str) -> None:
    with open_small(kind, "topk") as session:
        with pytest.raises(ContractError, match=message):
            session.infer(feed)
        assert_equal(session.infer({"pixels": images(2)}), topk_of(images(2)))  # and the session is as good as before


@pytest.mark.parametrize(
    ("kind", "batch", "limits"),
    [("onnxruntime", 0, "any number"), ("openvino", 0, "any number"), ("tensorrt", 5, "1 to 4")],
)
def test_too_few_or_too_many_images_are_refused(open_small: Open, kind: str, batch: int, limits: str) -> None:
    with (
        open_small(kind, "topk", batch=-1) as session,
        pytest.raises(ContractError, match=rf"the shape \({batch}, 3, 4, 4\); expected \({limits}, 3, 4, 4\)"),
    ):
        session.infer({"pixels": images(batch)})


@pytest.mark.parametrize("kind", KINDS)
def test_closing_twice_does_nothing(open_small: Open, kind: str) -> None:
    session = open_small(kind, "topk")
    session.close()
    session.close()


@pytest.fixture
def model(small_file: Callable[..., Path]) -> Path:
    return small_file("topk")


def test_threads_and_provider_are_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "thread_limit", lambda: None)
    with open_session(model, threads=1) as session:
        assert isinstance(session, OrtSession)
        assert session.contract == load_contract(model)
        assert "CPUExecutionProvider, 1 threads" in session.description
    with open_session(model, provider="CPUExecutionProvider") as session:
        assert "CPUExecutionProvider, default threads" in session.description
    monkeypatch.setattr(session_module, "thread_limit", lambda: 3)  # a container's quota
    with OrtSession(model) as session:
        assert "CPUExecutionProvider, 3 threads" in session.description


def test_a_truncated_file_is_refused(model: Path) -> None:
    content, contract = model.read_bytes(), load_contract(model)
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(ContractError, match=r"topk\.onnx is not the file that its sidecar describes"):
        open_session(model)
    write_sidecar(model, {}, contract)  # now the two agree, and the file is still no model
    with pytest.raises(ContractError, match=r"cannot open .*topk\.onnx"):
        open_session(model)


def test_a_missing_sidecar_is_refused(model: Path) -> None:
    sidecar_path(model).unlink()
    with pytest.raises(ContractError, match=r"topk\.onnx\.json"):
        open_session(model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_name", "images", r"has the inputs \[\('pixels', 'float32', \(2, 3, 4, 4\)\)\]; .*Export it again"),
        ("input_shape", [1, 3, 4, 4], r"\(2, 3, 4, 4\)\)\]; its contract expects .*\(1, 3, 4, 4\)"),
        ("output_names", ["boxes", "scores", "classes"], r"has the outputs .*expects \['boxes', 'scores', 'classes'\]"),
    ],
)
def test_a_contract_of_another_graph_is_refused(model: Path, key: str, value: Any, message: str) -> None:
    document = json.loads(sidecar_path(model).read_text())
    document["contract"][key] = value
    sidecar_path(model).write_text(json.dumps(document))
    with pytest.raises(ContractError, match=message):
        OrtSession(model)


def test_another_provider_is_never_taken_instead(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no NoSuchExecutionProvider; expected one of .*CPUExecutionProvider"):
        OrtSession(model, provider="NoSuchExecutionProvider")


def test_a_provider_that_leaves_operators_to_the_cpu_is_refused(model: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime's CPU package has this provider, which runs none of our operators; it is not here")
    with pytest.raises(ConfigError, match=r"AzureExecutionProvider does not take the whole graph .*fall back"):
        OrtSession(model, provider="AzureExecutionProvider")


def test_a_runtime_that_fails_is_said(model: Path) -> None:
    session = OrtSession(model)

    class Broken:
        def io_binding(self) -> Any:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 7")

    session.runtime = Broken()
    with pytest.raises(PipelineError, match=r"ONNX Runtime .*could not run the model: Failed to allocate"):
        session.infer({"pixels": images(2)})


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"\.pt'.*\.onnx or \.engine"):
        open_session(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("setting", "able"),
    [({"threads": 2}, "ONNX Runtime and OpenVINO"), ({"provider": "CPUExecutionProvider"}, "ONNX Runtime")],
)
def test_settings_of_other_runtimes_are_refused(tmp_path: Path, setting: Dict[str, Any], able: str) -> None:
    name = next(iter(setting))
    with pytest.raises(
        ConfigError, match=rf"{name} is given for .*model\.engine, and is for {able} alone: leave it out"
    ):
        open_session(tmp_path / "model.engine", **setting)


def test_a_provider_is_not_for_openvino(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is for ONNX Runtime alone: leave it out with OpenVINO"):
        open_session(tmp_path / "model.onnx", provider="CPUExecutionProvider", runtime="openvino")


def test_a_missing_onnxruntime_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime.*pip install onnxruntime"):
        OrtSession(model)
