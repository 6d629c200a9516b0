from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import numpy_helper

from calibration.placement import PLACEMENTS, FloatGraph
from calibration.quantize import main
from deploy.contract import load_contract, read_sidecar, write_sidecar
from deploy.files import sha256_of
from deploy.graphs.calibration_cache import amax_from_quantised, read_cache, write_cache
from deploy.graphs.graph import initializers, load_onnx

WEIGHTS = "5e" * 32
"""SHA-256 of weights."""


def test_calibration_cache_gives_the_ranges_back(words, model_path, tmp_path):
    cache, output = tmp_path / "calibration.cache", model_path.with_name("student.int8.onnx")
    assert main([*words, "--write-calibration-cache", str(cache), "--tensorrt-version", "8.5.3"]) == 0
    assert cache.read_text().startswith("TRT-8503-EntropyCalibration2\n")
    scales = amax_from_quantised(load_onnx(output))
    assert read_cache(cache) == pytest.approx(scales)
    assert main([str(model_path), "--calibration-cache", str(cache), "-o", str(output)]) == 0
    assert amax_from_quantised(load_onnx(output)) == pytest.approx(scales)
    sidecar = read_sidecar(output)
    assert sidecar["details"]["method"] == "calibration cache"
    assert sidecar["inputs"]["calibration_cache"]["sha256"] == sha256_of(cache)


def test_a_calibration_cache_tells_fp16_of_tensors_that_get_no_pair(words, model_path, tmp_path):
    cache, output = tmp_path / "calibration.cache", model_path.with_name("student.int8.onnx")
    assert main([*words, "--write-calibration-cache", str(cache), "--tensorrt-version", "8.5.3"]) == 0
    pairs = amax_from_quantised(load_onnx(output))
    other = next(name for name in read_sidecar(output)["details"]["ranges"] if name not in pairs)
    write_cache(cache, {**read_cache(cache), other: 70000.0}, "8.5.3")
    assert main([str(model_path), "--calibration-cache", str(cache), "-o", str(output)]) == 0
    ranges = read_sidecar(output)["details"]["ranges"]
    assert ranges.keys() == {*pairs, other}
    assert ranges[other] == pytest.approx([-70000, 70000])


def test_a_calibration_cache_with_what_is_no_scale(words, model_path, tmp_path, capsys):
    cache, output = tmp_path / "calibration.cache", model_path.with_name("student.int8.onnx")
    assert main([*words, "--write-calibration-cache", str(cache), "--tensorrt-version", "8.5.3"]) == 0
    from_cache = [str(model_path), "--calibration-cache", str(cache), "-o", str(output)]
    whole = cache.read_text()
    cache.write_text(f"{whole}a tensor that gets no pair: 7f800000\n")
    assert main(from_cache) == 0
    output.unlink()
    header, first, *others = whole.splitlines()
    cache.write_text("\n".join([header, f"{first[:-8]}7f800000", *others]))
    capsys.readouterr()
    assert main(from_cache) == 2
    assert f"line 2: the scale of the tensor {first[:-10]!r} is inf (7f800000)" in capsys.readouterr().err
    assert not output.exists()


def test_calibration_cache_of_another_model_is_refused(model_path, tmp_path, capsys):
    cache = tmp_path / "calibration.cache"
    write_cache(cache, {"image": 2.0}, "8.5.3")
    words = [str(model_path), "-o", str(model_path.with_name("student.int8.onnx"))]
    assert main([*words, "--calibration-cache", str(cache)]) == 2
    assert "has no range for 10 of 11 tensors" in capsys.readouterr().err


def quantization_of(model):
    """Tensor -> (scale, zero point) of each activation that has a pair."""
    known = initializers(model)
    return {
        node.input[0]: tuple(numpy_helper.to_array(known[name]) for name in node.input[1:3])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in known
    }


def trained_file(path, target, quantization, keep_float=()):
    """As the training writes it: the ends of INT8, from scale and zero point."""
    lowest, highest = (-127, 127) if target == "tensorrt" else (0, 255)
    ranges = {
        name: [float(scale) * (lowest - int(zero)), float(scale) * (highest - int(zero))]
        for name, (scale, zero) in quantization.items()
    }
    document = {"target": target, "keep_float": list(keep_float), "weights_sha256": WEIGHTS, "ranges": ranges}
    path.write_text(json.dumps(document))
    return path


def test_trained_ranges_give_the_same_model_back(words, model_path, target, tmp_path):
    """Made by calibration first, with two convolutions in float: scales, zero points and biases, bit for bit."""
    output, kept = model_path.with_name("student.int8.onnx"), ["node_down1", "node_tower_3"]
    assert main([*words, "--target", target, "--keep-float", *kept]) == 0
    expected, float_convolutions = sha256_of(output), read_sidecar(output)["details"]["float_convolutions"]
    quantization = quantization_of(load_onnx(output))
    needed = set(PLACEMENTS[target](FloatGraph(load_onnx(model_path), kept)).pairs.values())
    assert needed <= set(quantization)
    quantization = {name: one for name, one in quantization.items() if name in needed}
    trained = trained_file(tmp_path / "int8.json", target, quantization, kept)
    assert main([str(model_path), "--ranges", str(trained), "-o", str(output)]) == 0
    assert sha256_of(output) == expected
    sidecar = read_sidecar(output)
    assert sidecar["inputs"]["ranges"]["sha256"] == sha256_of(trained)
    details = sidecar["details"]
    assert (details["method"], details["target"], details["keep_float"]) == ("trained ranges", target, kept)
    assert details["float_convolutions"] == float_convolutions
    assert details["ranges"] == json.loads(trained.read_text())["ranges"]
    assert load_contract(output) == load_contract(model_path)


def test_trained_scales_and_zero_points_come_back(model_path, target, tmp_path):
    random, output = np.random.default_rng(0), model_path.with_name("student.int8.onnx")
    tensors = sorted(set(PLACEMENTS[target](FloatGraph(load_onnx(model_path))).pairs.values()))
    scales = np.exp(random.uniform(-12, 6, len(tensors))).astype(np.float32)
    zeros = random.integers(0, 256, len(tensors)) if target == "onnxruntime" else np.zeros(len(tensors), np.int64)
    zeros[:2] = (0, 255) if target == "onnxruntime" else 0  # behind a ReLU; and nothing above 0
    expected = dict(zip(tensors, zip(scales, zeros, strict=True), strict=True))
    trained = trained_file(tmp_path / "int8.json", target, expected)
    assert main([str(model_path), "--ranges", str(trained), "-o", str(output)]) == 0
    found = quantization_of(load_onnx(output))
    for name, (scale, zero) in expected.items():
        assert found[name][0] == pytest.approx(scale, rel=2**-23)
        assert found[name][1] == zero


def test_trained_ranges_write_a_calibration_cache_too(words, model_path, tmp_path):
    output, cache = model_path.with_name("student.int8.onnx"), tmp_path / "calibration.cache"
    assert main(words) == 0
    trained = trained_file(tmp_path / "int8.json", "tensorrt", quantization_of(load_onnx(output)))
    further = ["--write-calibration-cache", str(cache), "--tensorrt-version", "8.5.3"]
    assert main([str(model_path), "--ranges", str(trained), "-o", str(output), *further]) == 0
    assert read_cache(cache) == pytest.approx(amax_from_quantised(load_onnx(output)))


QUANTIZED = [
    "node_stem", "node_plain1", "node_plain2", "node_down1", "node_down2", "node_down_skip",
    "node_lateral3", "node_lateral4", "node_fpn3", "node_fpn4", "node_tower_3", "node_tower_4",
]  # fmt: skip
GOOD = {"target": "tensorrt", "keep_float": [], "weights_sha256": WEIGHTS, "ranges": {"image": [-1.0, 1.0]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ('{"target": "tensorrt", "keep', "is not JSON"),
        ("[1, 2]", "it holds [1, 2]; expected an object"),
        ({**GOOD, "target": "openvino"}, "target is 'openvino'; expected one of"),
        ({**GOOD, "target": ["tensorrt"]}, "target is ['tensorrt']"),
        ({"target": "tensorrt"}, "keep_float is missing; expected a list"),
        ({**GOOD, "keep_float": "node_stem"}, "keep_float is 'node_stem'; expected a list"),
        ({**GOOD, "ranges": [1]}, "ranges is [1]"),
        ({**GOOD, "ranges": {"image": [0, float("nan")]}}, "ranges.image[1] is nan; expected a number"),
        ({**GOOD, "ranges": {"image": [0, float("inf")]}}, "ranges.image[1] is inf; expected a number"),
        ({**GOOD, "ranges": {"image": [0, 10**400]}}, "ranges.image[1] is 1000"),
        ({**GOOD, "ranges": {"image": [0, 1e300]}}, "ranges.image[1] is 1e+300; expected a number"),
        ({**GOOD, "ranges": {"image": [1, -1]}}, "the first below the second"),
        ({**GOOD, "ranges": {"image": [1]}}, "ranges.image is [1]; expected a list of 2"),
        ({**GOOD, "ranges": {"image": ["0", "1"]}}, "ranges.image[0] is '0'; expected a number"),
        ({**GOOD, "ranges": {"image": 3}}, "ranges.image is 3; expected a list of 2"),
        (GOOD, "was made for another graph: it has no range for 10 of 11 tensors: "),
        ({**GOOD, "keep_float": ["/neck"]}, "it keeps 1 products in float that the model has not: /neck"),
        (
            {**GOOD, "keep_float": QUANTIZED},
            "none of the 14 convolutions and matrix products can be quantised",
        ),
    ],
)
def test_bad_trained_ranges_are_one_message_and_no_file(model_path, tmp_path, capsys, content, message):
    trained, output = tmp_path / "int8.json", model_path.with_name("student.int8.onnx")
    if content is not None:
        trained.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main([str(model_path), "--ranges", str(trained), "-o", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_trained_ranges_without_use_are_of_another_graph(words, model_path, tmp_path, capsys):
    output = model_path.with_name("student.int8.onnx")
    assert main(words) == 0
    quantization = quantization_of(load_onnx(output))
    output.unlink()
    quantization["backbone_5"] = quantization["image"]
    trained = trained_file(tmp_path / "int8.json", "tensorrt", quantization)
    assert main([str(model_path), "--ranges", str(trained), "-o", str(output)]) == 2
    assert "it has ranges of tensors that need none, 1: backbone_5" in capsys.readouterr().err
    assert not output.exists()


def test_a_calibration_cache_is_not_for_trained_ranges_of_onnxruntime(model_path, tmp_path, capsys):
    trained = tmp_path / "int8.json"
    trained.write_text(json.dumps({**GOOD, "target": "onnxruntime"}))
    words = ["--ranges", str(trained), "--write-calibration-cache", str(tmp_path / "c"), "--tensorrt-version", "8.5.3"]
    assert main([str(model_path), *words, "-o", str(model_path.with_name("student.int8.onnx"))]) == 2
    assert "the target is onnxruntime; expected tensorrt with a calibration cache" in capsys.readouterr().err


def test_ranges_of_other_weights_are_refused(words, model_path, tmp_path, capsys):
    output, weights = model_path.with_name("student.int8.onnx"), tmp_path / "student.pth"
    assert main(words) == 0
    trained = trained_file(tmp_path / "int8.json", "tensorrt", quantization_of(load_onnx(output)))
    weights.write_bytes(b"weights")
    write_sidecar(model_path, {"weights": weights}, load_contract(model_path))
    again = [str(model_path), "--ranges", str(trained), "-o", str(output)]
    assert main(again) == 2
    assert f"has the ranges of other weights than {weights}" in capsys.readouterr().err
    trained.write_text(trained.read_text().replace(WEIGHTS, sha256_of(weights)))
    assert main(again) == 0
