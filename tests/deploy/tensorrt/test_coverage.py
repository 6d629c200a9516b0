from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import pytest

from deploy.errors import EngineBuildError
from deploy.graphs.precision import typed_graph
from deploy.tensorrt.builder import build_plan
from deploy.tensorrt.coverage import check_precision, coverage, coverage_from_json, words_of_precision
from deploy.tensorrt.options import BuildOptions

pytest.importorskip("onnx")
Build = Callable[..., Any]
Install = Callable[[str], Any]


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
    assert counts(found["layers"]) == [2, 3, 3, 2]
    assert counts(found["convolutions"]) == [2, 2, 0, 0]
    assert (found["reformats"], found["compiled"], found["reason"]) == (2, 1, None)
    assert found["layers"]["int8"]["share"] == 0.2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "unknown form"),
        ("[]", "unknown form"),
        ("[" * 100_000, "unknown form: RecursionError"),
        ('{"Layers": [{"Name": ' + "9" * 5000 + "}]}", "unknown form: ValueError"),
        ('{"Nodes": []}', "unknown form: KeyError"),
        ('{"Layers": []}', "names of layers and no types"),
        ('{"Layers": ["conv1 + relu", "conv2"], "Bindings": []}', "names of layers and no types"),
        ('{"Layers": [{"Name": "conv1", "LayerType": "CaskConvolution"}]}', "no types that are known"),
        ('{"Layers": [{"Inputs": null, "Outputs": ["x"], "Weights": 3}, "conv2"]}', "no types that are known"),
        (
            json.dumps({"Layers": [layer("DLA", "Int8", name="{ForeignNode[Conv_0...Concat_198]}")]}),
            "no types that are known; 1 of its layers are blocks that were compiled as one",
        ),
        (json.dumps({"Layers": [layer("CaskConvolution", "E9M9")]}), "no types that are known"),
    ],
)
def test_an_unknown_form_is_said(text: str, reason: str) -> None:
    found = coverage_from_json(text)
    assert reason in found["reason"]
    assert found["layers"] is None
    assert found["convolutions"] is None


REAL = Path(__file__).parent / "data"


def test_what_real_engines_say() -> None:
    """Layers of NVIDIA's trt-engine-explorer (Apache-2.0), each kind once, as TensorRT 8 wrote them on a GPU."""
    text = (REAL / "inspector_mobilenet_qat.json").read_text()
    found = coverage_from_json(text)
    assert counts(found["convolutions"]) == [3, 0, 0, 0]
    assert counts(found["layers"]) == [3, 1, 0, 0]
    assert (found["reformats"], found["compiled"], found["reason"]) == (2, 0, None)
    unknown = re.sub(r'("Format/Datatype": )"[^"]*"', r'\1"N/A due to dynamic shapes"', text)
    assert counts(coverage_from_json(unknown)["convolutions"]) == [3, 0, 0, 0]  # by their weights
    found = coverage_from_json((REAL / "inspector_resnet_fp16.json").read_text())
    assert counts(found["convolutions"]) == [0, 2, 0, 0]
    assert counts(found["layers"]) == [0, 3, 0, 0]


def test_layers_of_myelin() -> None:
    layers = [
        {**layer("gemm", "Int8"), "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32"},
        layer("kgen", "Half", name="__myl_CastCastAddMax_myl0_3"),
        layer("fusion", "Half"),
        {"Name": "x", "LayerType": "kgen"},
    ]
    found = coverage_from_json(json.dumps({"Layers": layers}))
    assert counts(found["layers"]) == [1, 2, 0, 1]
    assert counts(found["convolutions"]) == [1, 0, 0, 0]


def test_an_engine_is_called_what_is_seen_in_it() -> None:
    known = coverage_from_json(json.dumps({"Layers": [layer("CaskConvolution", "Int8")]}))
    assert words_of_precision({"precision": "int8", "coverage": known}) == "int8"
    assert words_of_precision({"precision": "fp16"}) == "fp16"
    foreign = coverage_from_json(json.dumps({"Layers": [layer("DLA", "Int8", name="{ForeignNode[a...b]}")]}))
    half = coverage_from_json(json.dumps({"Layers": [layer("CaskConvolution", "Half")]}))
    for details in ({"coverage": foreign}, {"coverage": half}, {"coverage": None}, {}):
        assert words_of_precision({"precision": "int8", **details}) == "int8 asked for, not seen in its layers"


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


@pytest.mark.parametrize("version", ["8.5.3", "10.3.0", "11.4.0.106"])
def test_coverage_where_shapes_are_dynamic(version: str, fake_tensorrt: Install, small_file: Build) -> None:
    trt, options = fake_tensorrt(version), BuildOptions(shapes=(1, 2, 4))
    plan = build_plan(trt, small_file("topk", batch=-1).read_bytes(), options)
    assert coverage(trt, plan, options)["layers"]["fp32"]["count"] > 0
    trt.test.context_error = "out of memory"
    with pytest.raises(EngineBuildError, match="cannot start its own engine: out of memory"):
        coverage(trt, plan, options)
    trt.test.context_error = ""
    assert coverage(trt, plan, BuildOptions())["layers"] is None  # without shapes the inspector tells no types


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_coverage_of_a_plan(version: str, fake_tensorrt: Install, detector_model: Build) -> None:
    trt = fake_tensorrt(version)
    options = BuildOptions("int8")
    graph = typed_graph(detector_model(np.int8), "int8", {})
    plan = build_plan(trt, graph.model.SerializeToString(), options, graph.float_tensors)
    found = coverage(trt, plan, options)
    assert counts(found["convolutions"]) == [6, 4, 0, 0]  # the predictions are not quantised
    assert found["layers"]["fp32"]["count"] > 0
    with pytest.raises(EngineBuildError, match="cannot read its own engine: "):
        coverage(trt, b"", options)
