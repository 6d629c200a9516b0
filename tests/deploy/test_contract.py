from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Dict

import pytest

from deploy.contract import (
    ModelContract,
    load_contract,
    package_versions,
    provenance,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from deploy.errors import ContractError

CONTRACT = ModelContract(
    input_name="images",
    input_shape=(1, 3, 240, 320),
    channel_order="rgb",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    pad_value=(0.0, 0.0, 0.0),
    resize="keep_ratio",
    output_names=("boxes", "scores", "labels"),
    class_names=("nut", "bolt"),
    category_ids=(20, 5),
    score_threshold=0.05,
    nms_iou_threshold=0.6,
    max_detections=100,
)


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"weights")
    source = tmp_path / "student.pth"
    source.write_bytes(b"checkpoint")
    write_sidecar(path, {"checkpoint": source}, CONTRACT, {"opset": 17})
    return path


def _edit_sidecar(artefact: Path, field: str, value: Any) -> None:
    document = json.loads(sidecar_path(artefact).read_text())
    document[field] = value
    sidecar_path(artefact).write_text(json.dumps(document))


def _contract_json(**values: Any) -> Dict[str, Any]:
    return {**json.loads(json.dumps(CONTRACT.to_json())), **values}


def test_a_sidecar_brings_the_contract_back(artefact: Path) -> None:
    assert load_contract(artefact) == CONTRACT
    assert (CONTRACT.input_height_px, CONTRACT.input_width_px) == (240, 320)


def test_a_sidecar_says_what_made_its_file(artefact: Path) -> None:
    document = read_sidecar(artefact)
    assert document["artefact"] == {
        "file": "model.onnx",
        "sha256": hashlib.sha256(b"weights").hexdigest(),
        "bytes": len(b"weights"),
    }
    source = artefact.with_name("student.pth")
    assert document["inputs"] == {
        "checkpoint": {"file": str(source), "sha256": hashlib.sha256(b"checkpoint").hexdigest()}
    }
    assert document["details"] == {"opset": 17}
    assert document["command"][0] == "python"
    assert document["versions"]["numpy"]
    assert document["created_utc"].endswith("+00:00")


def test_provenance_takes_the_command_it_is_given() -> None:
    assert provenance({}, ["a", "b"])["command"] == ["a", "b"]


def test_package_versions_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.contract.PACKAGES", ("numpy", "no-such-package"))
    assert sorted(package_versions()) == ["numpy", "python"]


def test_a_changed_file_is_refused(artefact: Path) -> None:
    artefact.write_bytes(b"weight")
    with pytest.raises(ContractError, match=r"model\.onnx is not the file that its sidecar describes"):
        load_contract(artefact)


def test_a_missing_file_or_sidecar_is_refused(artefact: Path) -> None:
    sidecar_path(artefact).rename(artefact.with_name("elsewhere.json"))
    with pytest.raises(ContractError, match=r"cannot read .*model\.onnx\.json"):
        load_contract(artefact)
    artefact.unlink()
    with pytest.raises(ContractError, match=r"no such file: .*model\.onnx"):
        load_contract(artefact)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_sidecar_that_is_none_is_refused(artefact: Path, text: str) -> None:
    sidecar_path(artefact).write_text(text)
    with pytest.raises(ContractError, match=r"model\.onnx"):
        load_contract(artefact)


@pytest.mark.parametrize("field", ["artefact", "contract"])
@pytest.mark.parametrize("value", [None, "words", []])
def test_a_sidecar_with_another_value_is_refused(artefact: Path, field: str, value: Any) -> None:
    _edit_sidecar(artefact, field, value)
    with pytest.raises(ContractError, match=r"model\.onnx"):
        load_contract(artefact)


def test_a_sidecar_without_contract_is_refused(artefact: Path) -> None:
    write_sidecar(artefact, {})
    with pytest.raises(ContractError, match="no model contract"):
        load_contract(artefact)


def test_missing_and_unknown_keys_are_named(artefact: Path) -> None:
    contract = _contract_json(colour="blue")
    del contract["mean"]
    _edit_sidecar(artefact, "contract", contract)
    with pytest.raises(ContractError, match=r"model\.onnx\.json.*\['colour', 'mean'\]"):
        load_contract(artefact)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_shape", (3, 240, 320)),
        ("input_shape", (1, 1, 240, 320)),
        ("input_shape", (1, 3, 0, 320)),
        ("input_shape", "1x3x240x320"),
        ("channel_order", "RGB"),
        ("resize", "crop"),
        ("mean", (1.0, 2.0)),
        ("std", (1.0, 1.0, 0.0)),
        ("pad_value", (1.0,)),
        ("output_names", ("boxes", "scores")),
        ("class_names", ()),
        ("category_ids", (1,)),
        ("score_threshold", 1.0),
        ("score_threshold", -0.1),
        ("nms_iou_threshold", 0.0),
        ("max_detections", 0),
    ],
)
def test_a_wrong_value_is_refused_and_named(field: str, value: Any) -> None:
    with pytest.raises(ContractError, match=rf"{field}(\[\d\])? is .*expected"):
        dataclasses.replace(CONTRACT, **{field: value})
    with pytest.raises(ContractError, match=rf"here\.json: .*{field}"):
        ModelContract.from_json(_contract_json(**{field: value}), "here.json")


@pytest.mark.parametrize(("field", "value"), [("input_shape", 3), ("std", ["a", "b", "c"]), ("max_detections", None)])
def test_a_value_of_a_wrong_type_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ContractError, match=r"here\.json"):
        ModelContract.from_json(_contract_json(**{field: value}), "here.json")
