from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from deploy.contract import ModelContract
from deploy.errors import CalibrationError, EngineBuildError
from deploy.graphs.calibration_cache import (
    amax_from_quantised,
    amax_from_text,
    float_from_quantised,
    read_cache,
    text_from_amax,
    write_cache,
)
from deploy.runtime.golden import noise_input

onnx = pytest.importorskip("onnx")
Build = Callable[..., Any]


def test_the_text_is_that_of_tensorrt() -> None:
    # 0x3f800000 is 1.0, 0x3c010204 is 1 / 127, as IEEE 754 writes them
    text = text_from_amax({"images": 127.0, "/neck/Relu_output_0": 1.0}, "8.5.3.1")
    assert text == "TRT-8503-EntropyCalibration2\nimages: 3f800000\n/neck/Relu_output_0: 3c010204\n"
    assert struct.unpack(">f", bytes.fromhex("3c010204"))[0] == np.float32(1 / 127)
    assert text_from_amax({}, "8.6.1") == "TRT-8601-EntropyCalibration2\n"
    assert text_from_amax({}, "10.13.3.9.post1") == "TRT-101303-EntropyCalibration2\n"


def test_a_name_with_a_line_break_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"'a\\nTRT-8503' has a line break in its name"):
        text_from_amax({"a\nTRT-8503": 1.0}, "8.5.3")


def test_write_and_read(tmp_path: Path) -> None:
    amax = {"images": 2.64, "a: b": 1e-6, "neck": 70000.0}
    write_cache(tmp_path / "student.cache", amax, "10.3.0")
    assert read_cache(tmp_path / "student.cache") == pytest.approx(amax, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''; expected a calibration cache"),
        ("images: 3f800000\n", "begins with 'images: 3f800000'; expected a calibration cache"),
        (
            "TRT-8503-EntropyCalibration2\nimages: 3f8000\n",
            "here, line 2 is 'images: 3f8000'; expected 'tensor: ' and 8",
        ),
        ("TRT-8503-EntropyCalibration2\na: 3f800000\nima", "here, line 3 is 'ima'"),
    ],
)
def test_what_is_no_cache_is_refused(text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        amax_from_text(text, "here")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read .*none\.cache"):
        read_cache(tmp_path / "none.cache")
    (tmp_path / "binary.cache").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"cannot read .*binary\.cache"):
        read_cache(tmp_path / "binary.cache")


@pytest.mark.parametrize(
    ("digits", "value"),
    [("00000000", "0.0"), ("80000000", "-0.0"), ("00000003", "4.2"), ("bd012345", "-0.03"), ("7f800000", "inf"),
     ("ff800000", "-inf"), ("7fc00001", "nan")],
)  # fmt: skip
def test_what_is_no_scale_is_refused_where_it_is_wanted(tmp_path: Path, digits: str, value: str) -> None:
    text = f"TRT-8503-EntropyCalibration2\nimages: 3f800000\nmask: {digits}\n"
    with pytest.raises(CalibrationError, match=rf"here, line 3: .*'mask' is {value}.* \({digits}\)"):
        amax_from_text(text, "here")
    (tmp_path / "a.cache").write_text(text)
    assert read_cache(tmp_path / "a.cache", {"images"}) == {"images": 127.0}
    with pytest.raises(CalibrationError, match=r"a\.cache, line 3"):
        read_cache(tmp_path / "a.cache", {"images", "mask"})


def test_line_ends_of_windows_and_capital_digits_are_read() -> None:
    text = "TRT-8503-MinMaxCalibration\r\nimages: 3F800000\r\nneck: 3F000000\r\n"
    assert amax_from_text(text, "here") == {"images": 127.0, "neck": 63.5}


@pytest.mark.parametrize("largest", [0.0, -1.0, 1e-37, 1e41, float("nan"), float("inf")])
def test_a_range_of_nothing_is_refused(largest: float) -> None:
    with pytest.raises(CalibrationError, match="'images' is "):
        text_from_amax({"images": largest}, "8.5.3")


def test_ranges_are_those_of_the_activations(detector_model: Build) -> None:
    model = detector_model(np.int8)
    amax = amax_from_quantised(model)
    assert amax["images"] == pytest.approx(6.0)
    assert set(amax.values()) == {amax["images"]}  # weights, whose largest values differ, are not in it


def test_the_float_graph_comes_back(
    detector_model: Build, run_detector: Build, detector_contract: ModelContract
) -> None:
    quantised = detector_model(np.int8)
    model = float_from_quantised(quantised)
    onnx.checker.check_model(model, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph.node}
    assert len(model.graph.node) == len(detector_model().graph.node)
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    assert set(amax_from_quantised(quantised)) <= names  # a cache for this graph finds its tensors
    feed = {"images": noise_input(detector_contract, 0)}
    for name, values in run_detector(detector_model(), feed).items():
        assert np.array_equal(values, run_detector(model, feed)[name])
    assert (
        quantised.SerializeToString() == detector_model(np.int8).SerializeToString()
    )  # the argument is left as it was


def test_integers_from_elsewhere_are_refused(detector_model: Build) -> None:
    model = detector_model(np.int8)
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((8, 3, 3, 3), np.int8), "integers"))
    node.input[0] = "integers"
    with pytest.raises(EngineBuildError, match=rf"{node.name} \(DequantizeLinear\) is not the second of a pair"):
        float_from_quantised(model)
