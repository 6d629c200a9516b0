"""
A detector that is not ours, trained on COCO: NanoDet-m, from torch to ONNX to INT8, with a contract written by hand.

nanodet.py beside this file writes it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest

from benchmarks import accuracy
from calibration import audit, quantize
from deploy.contract import read_sidecar

pytestmark = pytest.mark.shared


def write_nanodet(shared_dir, folder, *words):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    path, script = folder / "nanodet.onnx", Path(__file__).with_name("nanodet.py")
    subprocess.run([sys.executable, str(script), str(shared_dir / "data"), "-o", str(path), *words], check=True)
    return path


@pytest.fixture(scope="module")
def nanodet(shared_dir, tmp_path_factory):
    """The detector as ONNX, as torch writes it, with the sidecar that a hand-written contract gives it."""
    return write_nanodet(shared_dir, tmp_path_factory.mktemp("nanodet"))


def ap_of(path, data, limit=16):
    """AP on the first images of the test split."""
    output = path.with_suffix(".result.json")
    assert accuracy.main([str(path), "--data", str(data), "--limit", str(limit), "-o", str(output)]) == 0
    return json.loads(output.read_text())["numbers"]["AP"]


@pytest.fixture(scope="module")
def float_ap(nanodet, shared_dir):
    pytest.importorskip("faster_coco_eval")
    return ap_of(nanodet, shared_dir / "data" / "coco_open")


def test_int8_of_a_foreign_detector_detects(nanodet, float_ap, shared_dir, tmp_path, target, capsys):
    data, output = shared_dir / "data" / "coco_open", tmp_path / "nanodet.int8.onnx"
    words = [str(nanodet), "--data", str(data), "--num-images", "16", "--target", target, "-o", str(output)]
    assert quantize.main(words) == 0
    details = read_sidecar(output)["details"]
    assert details["float_convolutions"] == {f"/gfl_cls.{level}/Conv": "final prediction" for level in range(3)}
    assert len(details["quantized_convolutions"]) == 70
    assert audit.main([str(output)]) == 0
    assert "70 INT8, 0 weight-only, 3 float" in capsys.readouterr().out
    found = ap_of(output, data)
    assert float_ap > 0.2
    assert found == pytest.approx(float_ap, abs=0.05)  # 16 images: AP is coarse
    assert found != float_ap


def test_integer_kernels_run_all_but_the_predictions(nanodet, shared_dir, tmp_path):
    data, output = shared_dir / "data" / "coco_open", tmp_path / "nanodet.int8.onnx"
    words = [str(nanodet), "--data", str(data), "--num-images", "1", "--target", "onnxruntime", "-o", str(output)]
    assert quantize.main(words) == 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(output), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["QLinearConv"] == 70
    assert counts["QLinearLeakyRelu"] == 45  # the other 3 are read by the predictions, which are float
    assert counts["QLinearConcat"] == 16
    assert counts["Conv"] + counts["FusedConv"] == counts["LeakyRelu"] == 3


@pytest.mark.slow
def test_as_its_own_exporter_writes_it_it_keeps_its_ap(shared_dir, tmp_path):
    pytest.importorskip("faster_coco_eval")
    write_nanodet(shared_dir, tmp_path, "--raw")
    found = ap_of(tmp_path / "nanodet.adopted.onnx", shared_dir / "data" / "coco_open", limit=55)
    assert found == pytest.approx(0.316, abs=5e-4)  # as of the graph that decodes by torch
