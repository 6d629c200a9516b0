"""A detector small enough to read, as `deploy.export` would write it, and data to calibrate it on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration import quantize as quantize_command
from calibration.activation_statistics import Collected, Seen, Statistics
from calibration.collect import empty_statistics, extend_statistics, statistics_of_images
from calibration.placement import PLACEMENTS, FloatGraph
from calibration.qdq import quantize_graph
from calibration.quantizer import Quantizer, tensors_of_any_choice
from calibration.ranges import PERCENTILE, RANGE_METHODS
from deploy.contract import ModelContract, write_sidecar
from deploy.dataset import load_split
from deploy.graphs.graph import constants, save_onnx
from deploy.graphs.operators import check_operators
from tests.calibration.activations import statistics_of

TENSORRT = ("8.5", "8.6", "10.0", "10.3", "10.15")
HEIGHT_PX, WIDTH_PX, CLASSES, BINS, TOP = 32, 48, 2, 5, 12


class Builder:
    """Nodes and initialisers of a graph; every method returns the name of the tensor that it makes."""

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.nodes, self.tensors = [], []

    def constant(self, name, values):
        self.tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op_type, inputs, name, outputs=None, **attributes):
        outputs = outputs or [name]
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"node_{name}", **attributes))
        return outputs[0]

    def weights(self, name, channels_in, channels_out, kernel):
        deviation = (2 / (channels_in * kernel * kernel)) ** 0.5
        weight = self.random.normal(0, deviation, (channels_out, channels_in, kernel, kernel)).astype(np.float32)
        bias = self.random.normal(0, 0.1, channels_out).astype(np.float32)
        return self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)

    def conv(self, x, name, weights, kernel=3, stride=1):
        return self.node("Conv", [x, *weights], name, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def relu(self, x):
        return self.node("Relu", [x], f"{x}_relu")

    def conv_relu(self, x, name, channels_in, channels_out, stride=1):
        return self.relu(self.conv(x, name, self.weights(name, channels_in, channels_out, 3), stride=stride))


def build_detector():
    """
    Stem, MaxPool, a plain and a downsampling residual block, FPN of two levels, head with shared weights, decode.

    As in torch's export, the second level reads the head's weights through Identity nodes.
    """
    b = Builder()
    stem = b.conv_relu("image", "stem", 3, 8, stride=2)
    pooled = b.node("MaxPool", [stem], "pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)

    x = b.conv_relu(pooled, "plain1", 8, 8)
    x = b.conv(x, "plain2", b.weights("plain2", 8, 8, 3))
    c3 = b.relu(b.node("Add", [x, pooled], "plain_sum"))  # 8, 12

    x = b.conv_relu(c3, "down1", 8, 16, stride=2)
    x = b.conv(x, "down2", b.weights("down2", 16, 16, 3))
    skip = b.conv(c3, "down_skip", b.weights("down_skip", 8, 16, 1), kernel=1, stride=2)
    c4 = b.relu(b.node("Add", [x, skip], "down_sum"))  # 4, 6

    lateral3 = b.conv(c3, "lateral3", b.weights("lateral3", 8, 8, 1), kernel=1)
    lateral4 = b.conv(c4, "lateral4", b.weights("lateral4", 16, 8, 1), kernel=1)
    scales = b.constant("scales", np.float32([1, 1, 2, 2]))
    upsampled = b.node(
        "Resize", [lateral4, "", scales], "upsampled", mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    merged = b.node("Add", [lateral3, upsampled], "merged")
    p3 = b.conv(merged, "fpn3", b.weights("fpn3", 8, 8, 3))
    p4 = b.conv(lateral4, "fpn4", b.weights("fpn4", 8, 8, 3))

    tower, predictor = b.weights("tower", 8, 8, 3), b.weights("predictor", 8, CLASSES + 4 * BINS, 3)
    bins = b.constant("bins", np.arange(BINS, dtype=np.float32))
    levels = []
    for level, feature, height, width, stride in ((3, p3, 8, 12, 4), (4, p4, 4, 6, 8)):
        if level == 4:
            tower = [b.node("Identity", [name], f"{name}@{level}") for name in tower]
            predictor = [b.node("Identity", [name], f"{name}@{level}") for name in predictor]
        x = b.relu(b.conv(feature, f"tower_{level}", tower))
        x = b.conv(x, f"prediction_{level}", predictor)
        levels.append(decode(b, x, level, bins, height, width, stride))
    for output, parts in zip(("boxes", "scores", "labels"), zip(*levels, strict=True), strict=True):
        b.node("Concat", list(parts), output, axis=1)

    candidates = 2 * TOP
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, candidates, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, candidates]),
        helper.make_tensor_value_info("labels", TensorProto.INT64, [1, candidates]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, HEIGHT_PX, WIDTH_PX])
    graph = helper.make_graph(b.nodes, "detector", [image], outputs, b.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def decode(b, prediction, level, bins, height, width, stride):
    """(boxes (1, TOP, 4), scores (1, TOP), labels (1, TOP)) of a level: integral, points, sigmoid, top-k."""
    number = height * width

    def integers(name, *values):
        return b.constant(f"{name}_{level}", np.int64(values))

    x = b.node("Transpose", [prediction], f"last_{level}", perm=[0, 2, 3, 1])
    flat = b.node("Reshape", [x, integers("flat_shape", number, CLASSES + 4 * BINS)], f"flat_{level}")
    axis = integers("axis", 1)
    start, middle, end = integers("start", 0), integers("middle", CLASSES), integers("end", CLASSES + 4 * BINS)
    logits = b.node("Slice", [flat, start, middle, axis], f"logits_{level}")
    sides = b.node("Slice", [flat, middle, end, axis], f"sides_{level}")
    sides = b.node("Reshape", [sides, integers("sides_shape", number, 4, BINS)], f"sides_bins_{level}")
    sides = b.node("MatMul", [b.node("Softmax", [sides], f"softmax_{level}", axis=-1), bins], f"integral_{level}")
    signs = b.constant(f"signs_{level}", np.float32([-stride, -stride, stride, stride]))
    y, x = np.mgrid[:height, :width].reshape(2, -1) * stride
    points = b.constant(f"points_{level}", np.stack([x, y, x, y], axis=1).astype(np.float32))
    boxes = b.node("Add", [b.node("Mul", [sides, signs], f"offsets_{level}"), points], f"boxes_all_{level}")

    scores = b.node("Reshape", [b.node("Sigmoid", [logits], f"sigmoid_{level}"), integers("one", 1, -1)], f"s_{level}")
    top = f"top_scores_{level}", f"top_index_{level}"
    b.node("TopK", [scores, integers("k", TOP)], f"topk_{level}", outputs=list(top), axis=1)
    classes = integers("classes", CLASSES)
    chosen = b.node("Gather", [boxes, b.node("Div", [top[1], classes], f"point_{level}")], f"chosen_{level}", axis=0)
    return chosen, top[0], b.node("Mod", [top[1], classes], f"label_{level}")


@pytest.fixture(autouse=True)
def every_file_for_tensorrt_is_taken(monkeypatch):
    """What `calibration.quantize` writes for TensorRT is what the parser of each JetPack's TensorRT takes."""

    def save_checked(model, path):
        save_onnx(model, path)
        known = constants(model)
        zeros = (node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear")
        if all(known[name].data_type == TensorProto.INT8 for name in zeros):
            assert [check_operators(model, version) for version in TENSORRT] == [[]] * len(TENSORRT)

    monkeypatch.setattr(quantize_command, "save_onnx", save_checked)


@pytest.fixture(scope="session")
def detector():
    """The mini detector; not to be changed."""
    model = build_detector()
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def contract():
    return ModelContract(
        input_name="image",
        input_shape=(1, 3, HEIGHT_PX, WIDTH_PX),
        channel_order="rgb",
        mean=(120.0, 115.0, 100.0),
        std=(58.0, 57.0, 57.0),
        pad_value=(0.0, 0.0, 0.0),
        resize="keep_ratio",
        output_names=("boxes", "scores", "labels"),
        class_names=("round", "square"),
        category_ids=(1, 2),
        score_threshold=0.05,
        nms_iou_threshold=0.6,
        max_detections=100,
    )


@pytest.fixture
def model_path(tmp_path, detector, contract):
    """The mini detector as a file with its sidecar."""
    path = tmp_path / "student.onnx"
    onnx.save(detector, path)
    write_sidecar(path, {}, contract)
    return path


def write_annotations(path, names, first_id=1):
    document = {
        "images": [
            {"id": first_id + index, "file_name": name, "width": WIDTH_PX, "height": HEIGHT_PX}
            for index, name in enumerate(names)
        ],
        "annotations": [
            {"id": 1, "image_id": first_id, "category_id": 1, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "round"}, {"id": 2, "name": "square"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def data_dir(tmp_path):
    """A data folder: 8 images of noise and a bright box for training, 3 for validation; no test split."""
    folder, random = tmp_path / "data", np.random.default_rng(1)
    (folder / "images").mkdir(parents=True)
    names = [f"{index:02}.png" for index in range(11)]
    for index, name in enumerate(names):
        pixels = random.integers(0, 120, (HEIGHT_PX, WIDTH_PX, 3), dtype=np.uint8)
        pixels[4 : 8 + index, 5 : 20 + index] += 100
        cv2.imwrite(str(folder / "images" / name), pixels)
    write_annotations(folder / "annotations" / "instances_train.json", names[:8])
    write_annotations(folder / "annotations" / "instances_val.json", names[8:], first_id=9)
    return folder


@pytest.fixture
def words(model_path, data_dir):
    """Of a command on 5 images that writes student.int8.onnx."""
    output = model_path.with_name("student.int8.onnx")
    return [str(model_path), "--data", str(data_dir), "-o", str(output), "--num-images", "5"]


@pytest.fixture
def images(data_dir):
    """The 8 for training."""
    return load_split(data_dir, "train").images


@pytest.fixture(params=["tensorrt", "onnxruntime"])
def target(request):
    return request.param


@pytest.fixture
def quantizer_of(images, contract):
    """(model, target, method, percentile, ...) -> what quantises the model with statistics of the images."""

    def made(model, target, method="max", percentile=PERCENTILE, keep_float=(), images=images):
        tensors = tensors_of_any_choice(FloatGraph(model), target)
        statistics = statistics_of_images(model, tensors, images, contract, None, Path("student.onnx"), RANGE_METHODS)
        return Quantizer(model, target, method, percentile, keep_float, statistics)

    return made


@pytest.fixture
def quantize(images, contract):
    """(model, target) -> the model in INT8, with ranges (method max) over the images."""

    def quantized(model, target, keep_float=(), images=images):
        graph = FloatGraph(model, keep_float)
        placement = PLACEMENTS[target](graph)
        seen = empty_statistics([], sorted(set(placement.pairs.values())))
        extend_statistics(seen, model, images, contract)
        ranges = {name: (one.minimum, one.maximum) for name, one in seen.statistics.items()}
        return quantize_graph(graph, placement, ranges, target)

    return quantized


@pytest.fixture
def quantized(quantize, detector, target):
    """The mini detector in INT8 for each target."""
    return quantize(detector, target)


@pytest.fixture
def for_tensorrt(quantize, detector):
    return quantize(detector, "tensorrt")


@pytest.fixture
def for_onnxruntime(quantize, detector):
    return quantize(detector, "onnxruntime")


@pytest.fixture
def arrays():
    """Images whose largest values differ a thousandfold, with zeros, as after a ReLU, and without."""
    random = np.random.default_rng(0)
    arrays = [random.normal(0, scale, (1, 4, 5, 7)).astype(np.float32) for scale in (0.3, 40, 1e-2, 3)]
    arrays[1] = np.maximum(arrays[1], 0)
    return [*arrays, np.zeros((1, 4, 5, 7), np.float32)]


@pytest.fixture
def collected(arrays):
    flat = Statistics.minmax_only()
    flat.update(Seen.of(arrays[0]))
    statistics = {"late": statistics_of(arrays), "flat": flat, "early": statistics_of(arrays[:1] * 5)}
    return Collected(statistics, {"ab" * 32: 7, "cd" * 32: 3})
