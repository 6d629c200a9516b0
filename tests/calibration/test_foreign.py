"""Detectors as other projects export them, adopted and then quantised for each target."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import parser

from calibration import audit, quantize
from deploy import Detector, adopt_onnx, build_trt, bundle
from deploy.contract import read_sidecar
from deploy.graphs.products import Products
from tests.stand_ins.foreign import write_foreign

PREDICTORS = {"yolox": 6, "yolov5": 9, "yolov8": 6, "rtdetr": 9, "ssd": 6, "picodet": 6, "nanodet": 3}
"""Family -> convolutions that predict."""
DECODING = {"yolov8": 1}
"""Family -> convolutions behind them that only decode."""
CONVOLUTIONS = 4
"""Of the backbone that all share, which are to be quantised."""


@pytest.mark.parametrize("family", PREDICTORS)
def test_an_adopted_family_is_quantised_but_for_its_predictors(family, data_dir, tmp_path, target, capsys):
    path = write_foreign(tmp_path, family)
    assert adopt_onnx.main([str(path), "--contract", str(path.with_suffix(".contract.json"))]) == 0
    adopted, output = tmp_path / f"{family}.adopted.onnx", tmp_path / f"{family}.int8.onnx"
    if not adopted.exists():
        adopted = path
    words = [str(adopted), "--data", str(data_dir), "--num-images", "4", "--target", target, "-o", str(output)]
    assert quantize.main(words) == 0
    details = read_sidecar(output)["details"]
    assert len(details["quantized_convolutions"]) == CONVOLUTIONS
    assert set(details["float_convolutions"].values()) == {"final prediction"}
    assert len(details["float_convolutions"]) == PREDICTORS[family] + DECODING.get(family, 0)
    assert audit.main([str(output)]) == 0
    assert f"{CONVOLUTIONS} INT8, 0 weight-only" in capsys.readouterr().out
    with Detector(adopted) as of_float, Detector(output) as of_int8:
        wanted, found = (detect(data_dir / "images" / "00.png") for detect in (of_float, of_int8))
    assert found.scores[:20] == pytest.approx(wanted.scores[:20], abs=0.1)
    assert not np.array_equal(found.scores, wanted.scores)
    if target == "tensorrt":
        for version in ("8.6", "10.3", "11.0"):
            assert build_trt.main([str(output), "--int8", "--target", version]) == 0
        assert bundle.main([str(output), str(adopted), "-o", str(tmp_path / "board.tar.gz")]) == 0


def test_an_output_that_a_convolution_reads_does_not_keep_it_in_float(data_dir, tmp_path):
    path = write_foreign(tmp_path, "yolox")
    model = onnx.load(path)
    middle = [node for node in model.graph.node if node.op_type == "Relu"][1]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(middle.output[0], onnx.TensorProto.FLOAT, [1, 8, 8, 8])
    )
    onnx.save(model, path)
    assert adopt_onnx.main([str(path), "--contract", str(path.with_suffix(".contract.json"))]) == 0
    adopted, output = tmp_path / "yolox.adopted.onnx", tmp_path / "int8.onnx"
    words = [str(adopted), "--data", str(data_dir), "--num-images", "2", "-o", str(output)]
    assert quantize.main(words) == 0
    assert len(read_sidecar(output)["details"]["quantized_convolutions"]) == CONVOLUTIONS


def test_a_convolution_that_only_decodes_is_passed_and_one_that_is_learnt_is_not():
    def model(weights, kernel=1):
        count = len(weights)
        return parser.parse_model(f"""
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[1, {count}, 8, 8] x) => (float[1, 1, m, n] y)
            <float[{count}, {count}, 1, 1] w = {{{", ".join(["0.3"] * count**2)}}},
             float[1, {count}, 1, 1] fixed = {{{", ".join(map(str, weights))}}}>
            {{
                prediction = Conv (x, w)
                shares = Softmax <axis = 1> (prediction)
                y = Conv (shares, fixed)
            }}
        """)

    assert Products(model([0, 1, 2, 3])).final == {"prediction", "y"}
    assert Products(model([1, 0, -0.5, 0])).final == {"prediction", "y"}
    assert Products(model([0.1, 1, 2, 3])).final == {"y"}


def test_contract_of_an_adopted_file_is_an_ordinary_one(tmp_path):
    path = write_foreign(tmp_path, "picodet")
    assert adopt_onnx.main([str(path), "--contract", str(path.with_suffix(".contract.json"))]) == 0
    contract = json.loads((tmp_path / "picodet.adopted.onnx.json").read_text())["contract"]
    assert contract["outputs"] == "topk"
    assert contract["output_names"] == ["boxes", "scores", "labels"]
    assert "decode" not in contract
