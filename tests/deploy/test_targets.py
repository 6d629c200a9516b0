from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from calibration.placement import PLACEMENTS
from deploy.errors import ConfigError, ContractError
from deploy.runtime.session import Session
from deploy.targets import QUANTISED_FOR, TARGETS, target_from_path, version_numbers


@pytest.mark.parametrize(
    ("path", "runtime", "expected"),
    [
        ("x.onnx", None, "onnxruntime"),
        ("x.onnx", "onnxruntime", "onnxruntime"),
        ("x.onnx", "openvino", "openvino"),
        ("x.engine", None, "tensorrt"),
        ("x.engine", "tensorrt", "tensorrt"),
    ],
)
def test_a_file_is_run_by_what_takes_it(path: str, runtime: str | None, expected: str) -> None:
    assert target_from_path(path, runtime).name == expected


def test_what_cannot_run_is_said() -> None:
    with pytest.raises(ContractError, match=r"suffix is '.pt'; expected .onnx or .engine"):
        target_from_path("x.pt", "openvino")
    with pytest.raises(ConfigError, match="the runtime is 'openVINO'; expected one of onnxruntime, openvino, tensorrt"):
        target_from_path("x.onnx", "openVINO")
    with pytest.raises(ConfigError, match=r"TensorRT does not run x.onnx; expected a file that ends in .engine, or"):
        target_from_path(Path("x.onnx"), "tensorrt")
    with pytest.raises(ConfigError, match=r"OpenVINO does not run x.engine; .*or the runtime tensorrt"):
        target_from_path(Path("x.engine"), "openvino")


@pytest.mark.parametrize("name", TARGETS)
def test_each_entry_is_whole(name: str) -> None:
    """What the entry says of the session is true, and the ladder can place its roles."""
    target = TARGETS[name]
    module, _, class_name = target.session.rpartition(".")
    session = getattr(importlib.import_module(module), class_name)
    assert issubclass(session, Session)
    taken = list(inspect.signature(session).parameters)[1:]
    assert set(target.session_options) <= set(taken)
    assert set(target.session_options) == {"threads", "provider"} & set(taken)
    known = {"student", *(role.name for other in TARGETS.values() for role in other.roles)}
    assert {role.made_from for role in target.roles} <= known
    assert [role.precision == "int8" for role in target.roles] == [False, True]  # float, then INT8


def test_int8_graphs_are_made_for_two_of_them() -> None:
    assert QUANTISED_FOR == ("onnxruntime", "tensorrt")
    assert sorted(PLACEMENTS) == sorted(QUANTISED_FOR)


def test_numbers_of_a_version() -> None:
    assert version_numbers("10.13.3.9.post1") == (10, 13, 3, 9)
