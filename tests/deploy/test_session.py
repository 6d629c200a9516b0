from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.contract import ModelContract, sidecar_path, write_sidecar
from deploy.errors import ContractError, MissingDependencyError
from deploy.session import OrtSession, open_session

CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, 4, 4),
    channel_order="rgb",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    pad_value=(0.0, 0.0, 0.0),
    resize="stretch",
    output_names=("boxes", "scores", "labels"),
    class_names=("thing",),
    category_ids=(1,),
    score_threshold=0.05,
    nms_iou_threshold=0.6,
    max_detections=100,
)


def _write_model(path: Path) -> Path:
    """A graph whose outputs are the input plus 0, plus 1 and plus 2, in another order than the contract's."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants = [], []
    for index, name in enumerate(CONTRACT.output_names):
        constants.append(onnx.numpy_helper.from_array(np.float32(index), f"plus_{name}"))
        nodes.append(helper.make_node("Add", ["images", f"plus_{name}"], [name]))
    shape = list(CONTRACT.input_shape)
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("images", float32, shape)],
        [helper.make_tensor_value_info(name, float32, shape) for name in reversed(CONTRACT.output_names)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    write_sidecar(path, {}, CONTRACT)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _write_model(tmp_path / "sums.onnx")


def test_outputs_come_by_name(model: Path) -> None:
    feed = {"images": np.random.rand(*CONTRACT.input_shape).astype(np.float32)}
    with open_session(model, threads=1) as session:
        assert isinstance(session, OrtSession)
        assert session.contract == CONTRACT
        assert "CPUExecutionProvider, 1 threads" in session.description
        outputs = session.infer(feed)
    assert list(outputs) == list(CONTRACT.output_names)
    for index, name in enumerate(CONTRACT.output_names):
        np.testing.assert_array_equal(outputs[name], feed["images"] + np.float32(index))


def test_a_truncated_file_is_refused(model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(ContractError, match=r"sums\.onnx is not the file that its sidecar describes"):
        open_session(model)
    write_sidecar(model, {}, CONTRACT)  # now the two agree, and the file is still no model
    with pytest.raises(ContractError, match=r"cannot open .*sums\.onnx"):
        open_session(model)


def test_a_missing_sidecar_is_refused(model: Path) -> None:
    sidecar_path(model).unlink()
    with pytest.raises(ContractError, match=r"sums\.onnx\.json"):
        open_session(model)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_another_provider_is_never_taken_instead(model: Path) -> None:
    with pytest.raises(ContractError, match="NoSuchExecutionProvider"):
        OrtSession(model, provider="NoSuchExecutionProvider")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"\.pt'.*\.onnx or \.engine"):
        open_session(tmp_path / "model.pt")


def test_a_missing_onnxruntime_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime.*pip install onnxruntime"):
        OrtSession(model)
