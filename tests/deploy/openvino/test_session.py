from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from deploy import Detector
from deploy.contract import load_contract, write_sidecar
from deploy.errors import ContractError, MissingDependencyError, PipelineError
from deploy.openvino.session import OpenVinoSession
from deploy.runtime.session import open_session

pytest.importorskip("onnxruntime")
File = Callable[..., Path]


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "missing" not in request.node.name:
        pytest.importorskip("openvino")


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [
        np.kron(generator.integers(0, 256, (height // 8, 12, 3)), np.ones((8, 8, 1), np.int64)).astype(np.uint8)
        for height in (64, 80, 120)
    ]


def test_detections_are_those_of_onnx_runtime(detector_file: File) -> None:
    model = detector_file("mini.onnx")
    with Detector(model) as expected, Detector(model, runtime="openvino") as found:
        assert found.description.startswith("OpenVINO ")
        for picture in pictures():
            ours, theirs = found(picture), expected(picture)
            assert len(ours.scores) == len(theirs.scores) > 5
            assert np.abs(ours.boxes_xyxy - theirs.boxes_xyxy).max() < 0.05
            assert np.abs(ours.scores - theirs.scores).max() < 1e-4
            assert np.array_equal(ours.labels, theirs.labels)


def test_the_graph_for_tensorrt_is_rounded_as_its_pairs_say(
    detector_file: File, capfd: pytest.CaptureFixture[str]
) -> None:
    """OpenVINO keeps the scales of the Q/DQ: it answers as the quantised graph does, not as the float one."""
    quantised, plain = detector_file("mini.int8.onnx", np.int8), detector_file("mini.onnx")
    feed = {"images": np.random.default_rng(0).normal(0, 1, (1, 3, 64, 64)).astype(np.float32)}
    with open_session(quantised, runtime="openvino") as session:
        assert session.description.endswith(", no INT8 kernels")
        assert "activations are signed, for which OpenVINO's INT8 kernels give wrong results" in capfd.readouterr().err
        found = np.sort(session.infer(feed)["scores"])
    with open_session(quantised) as session:
        expected = np.sort(session.infer(feed)["scores"])
    with open_session(plain) as session:
        floating = np.sort(session.infer(feed)["scores"])
    assert np.abs(found - expected).mean() < 0.3 * np.abs(found - floating).mean()


def test_threads_are_those_that_were_asked_for(detector_file: File) -> None:
    times: dict[str, float] = {}
    with open_session(detector_file("mini.onnx"), threads=1, runtime="openvino") as session:
        assert isinstance(session, OpenVinoSession)
        assert session.description.endswith("CPU, 1 threads")
        session.infer({"images": np.zeros((1, 3, 64, 64), np.float32)}, times)
    assert list(times) == ["inference"]
    assert times["inference"] > 0


def test_what_cannot_be_opened_is_said(detector_file: File) -> None:
    model = detector_file("mini.onnx")
    contract = load_contract(model)
    model.write_bytes(model.read_bytes()[:300])
    write_sidecar(model, {}, contract)
    with pytest.raises(ContractError, match=r"OpenVINO cannot open .*mini.onnx: .*Export the model again"):
        OpenVinoSession(model)


def test_a_runtime_that_fails_is_said(detector_file: File) -> None:
    session = OpenVinoSession(detector_file("mini.onnx"))

    class Broken:
        def infer(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

    session._request = Broken()
    with pytest.raises(PipelineError, match=r"OpenVINO .*could not run the model: out of memory"):
        session.infer({"images": np.zeros((1, 3, 64, 64), np.float32)})


def test_a_missing_package_is_named(detector_file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingDependencyError, match=r"running mini.onnx needs the package openvino.*pip install openvino"
    ):
        OpenVinoSession(detector_file("mini.onnx"))
