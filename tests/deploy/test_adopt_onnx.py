from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from deploy.adopt_onnx import main
from deploy.contract import load_contract, read_sidecar, sidecar_path
from deploy.files import sha256_of

Foreign = Callable[..., Path]


@pytest.fixture
def foreign(small_file: Callable[..., Path]) -> Foreign:
    """`foreign(outputs, batch, input_type)` -> ONNX file without a sidecar; its contract lies in contract.json."""

    def write(*arguments: Any) -> Path:
        path = small_file(*arguments)
        contract = load_contract(path)
        path.with_name("contract.json").write_text(json.dumps(contract.to_json()))
        sidecar_path(path).unlink()
        return path

    return write


def adopt(path: Path, **changes: Any) -> int:
    """Adopts the file, with other values for some keys of its contract."""
    contract: Dict[str, Any] = {**json.loads(path.with_name("contract.json").read_text()), **changes}
    path.with_name("contract.json").write_text(json.dumps(contract))
    return main([str(path), "--contract", str(path.with_name("contract.json"))])


@pytest.mark.parametrize("arguments", [("topk", 2, "float32"), ("topk", -1, "uint8"), ("nms", 1, "float32")])
def test_model_with_a_written_contract_becomes_one_of_ours(foreign: Foreign, arguments: Any) -> None:
    path = foreign(*arguments)
    assert adopt(path) == 0
    written = path.with_name("contract.json")
    assert json.loads(json.dumps(load_contract(path).to_json())) == json.loads(written.read_text())
    assert read_sidecar(path)["inputs"]["contract"]["sha256"] == sha256_of(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_name": "image"}, "has the inputs"),
        ({"input_shape": [1, 3, 4, 4]}, "has the inputs"),
        ({"output_names": ["boxes", "scores", "classes"]}, "has the outputs"),
        ({"output_names": ["scores", "boxes", "labels"]}, "expected boxes: (N, K, 4), float32"),
        ({"output_names": ["boxes", "labels", "scores"]}, "expected scores: (N, K), float32"),
        ({"resize": "crop"}, "resize is 'crop'"),
        ({"colour": "red"}, "unknown keys ['colour']"),
    ],
)
def test_contract_that_does_not_fit_leaves_no_sidecar(
    foreign: Foreign, changes: Dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign("topk")
    assert adopt(path, **changes) == 2
    assert message in capsys.readouterr().err
    assert not sidecar_path(path).exists()


def test_sidecar_that_is_there_is_not_written_over(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign("topk")
    assert adopt(path) == 0
    before = sha256_of(sidecar_path(path))
    assert adopt(path) == 2
    assert "is there already" in capsys.readouterr().err
    assert sha256_of(sidecar_path(path)) == before


def test_contract_file_must_be_json(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign("topk")
    path.with_name("contract.json").write_text("input_name: image")
    assert main([str(path), "--contract", str(path.with_name("contract.json"))]) == 2
    assert "is not JSON" in capsys.readouterr().err
