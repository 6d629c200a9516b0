"""A tiny data set, a tiny ONNX detector that finds its boxes, and result files as the commands write them."""

from __future__ import annotations

import hashlib
import json

import cv2
import numpy as np
import pytest

from benchmarks import report
from benchmarks.measuring.coco import METRICS
from benchmarks.measuring.detections import replacing_detections
from benchmarks.measuring.result import STAGES, STATISTICS, write_result
from deploy.contract import ModelContract, write_sidecar
from deploy.files import sha256_of

BOXES_XYXY = [[20.0, 10.0, 80.0, 60.0], [100.0, 40.0, 180.0, 120.0]]  # pixels of the 192 x 128 images
CLASSES = ("disc", "star")
AP = {"teacher": 0.52, "baseline": 0.47, "student": 0.50, "onnx-fp32": 0.5001, "onnx-int8": 0.495}
MS = {"teacher": 200.0, "baseline": 60.0, "student": 60.0, "onnx-fp32": 40.0, "onnx-int8": 16.0}
"""Role -> what the results of a whole run say."""
CATEGORY_IDS = (3, 7)


@pytest.fixture
def data_dir(tmp_path):
    """Five images of noise, each annotated with both boxes, as a data folder."""
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images" / "sub").mkdir(parents=True)
    images, annotations = [], []
    for index in range(1, 6):
        name = f"sub/{index}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (128, 192, 3), np.uint8)
        cv2.imwrite(str(folder / "images" / name), pixels)
        images.append({"id": index, "file_name": name, "width": 192, "height": 128})
        for label, (x1, y1, x2, y2) in enumerate(BOXES_XYXY):
            box = [x1, y1, x2 - x1, y2 - y1]
            number = len(annotations)  # from 0: the id that COCO's matching cannot tell from "not matched"
            annotations.append({"id": number, "image_id": index, "category_id": CATEGORY_IDS[label], "bbox": box})
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_test.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def detector(tmp_path):
    """Makes an ONNX detector, 96 x 64 pixels, that always finds `boxes` with score 0.9, and its sidecar."""

    def make(name="student.onnx", boxes=BOXES_XYXY, **contract):
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        found = np.float32(boxes).reshape(1, -1, 4) / 2  # the network sees half the size
        count = found.shape[1]
        constants = {
            "weight": np.zeros((1, 3, 1, 1), np.float32),
            "found": found,
            "score": np.full((1, count), 0.9, np.float32),
            "labels_": np.arange(count, dtype=np.int64)[None] % len(CLASSES),
        }
        nodes = [
            helper.make_node("Conv", ["image", "weight"], ["map"]),
            helper.make_node("ReduceMax", ["map"], ["zero"], axes=[1, 2, 3], keepdims=0),  # (1,): 0
            helper.make_node("Add", ["found", "zero"], ["boxes"]),
            helper.make_node("Add", ["score", "zero"], ["scores"]),
            helper.make_node("Identity", ["labels_"], ["labels"]),
        ]
        graph = helper.make_graph(
            nodes,
            "detector",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, 64, 96))],
            [
                helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (1, count, 4)),
                helper.make_tensor_value_info("scores", TensorProto.FLOAT, (1, count)),
                helper.make_tensor_value_info("labels", TensorProto.INT64, (1, count)),
            ],
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        )
        path = tmp_path / name
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        values = {
            "input_name": "image",
            "input_shape": (1, 3, 64, 96),
            "channel_order": "bgr",
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "pad_value": (0.0, 0.0, 0.0),
            "resize": "keep_ratio",
            "output_names": ("boxes", "scores", "labels"),
            "class_names": CLASSES,
            "category_ids": CATEGORY_IDS,
            "score_threshold": 0.05,
            "nms_iou_threshold": 0.6,
            "max_detections": 100,
        }
        write_sidecar(path, {}, ModelContract(**{**values, **contract}))
        return path

    return make


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def detections_of(role):
    """COCO results on the five images: the teacher finds all, others lose a box and move the rest a little."""
    results = []
    for image_id in range(1, 6):
        for (x1, y1, x2, y2), category in zip(BOXES_XYXY, CATEGORY_IDS, strict=True):
            if role == "teacher" or (image_id, category) != (2, CATEGORY_IDS[1]):
                shift = 0.0 if role == "teacher" else 0.5
                box = [x1 + shift, y1, x2 - x1, y2 - y1]
                results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": 0.9 - shift / 10})
    return results


def accuracy_numbers(role, ap):
    """As `accuracy` writes them: draws that mostly vary alike, and one box that all but the teacher lose."""
    common = np.random.default_rng(0).normal(0, 0.01, 200)
    own = np.random.default_rng(int(sha(role)[:8], 16)).normal(0, 0.001, 200)
    best = {"score": 0.5, "f1": 0.9, "precision": 0.9, "recall": 0.9, "true": 9, "false": 1, "missed": 1}
    curve = np.round(np.linspace(1.0, 0.0, 101) * ap, 4).tolist()
    found = [0.9, 0.9 if role == "teacher" else None, 0.9, 0.9, 0.9]
    return {
        **dict.fromkeys(METRICS, ap),
        "AP_small": None,
        "per_class": dict.fromkeys(CLASSES, ap),
        "best_f1": best,
        "best_f1_per_class": dict.fromkeys(CLASSES, best),
        "found_scores": {CLASSES[0]: [0.9] * 5, CLASSES[1]: found},
        "pr_curves": {kind: {"mean": curve, "per_class": dict.fromkeys(CLASSES, curve)} for kind in ("AP50", "AP")},
        "bootstrap": {"seed": 0, "ap": [ap, *np.clip(ap + common + own, 0, 1).round(6).tolist()]},
        "against": None,
    }


def latency_numbers(ms, spread):
    """As `latency` writes them, of a run whose samples lie evenly within `spread` of the middle."""
    samples = {
        "read": [0.5] * 101,
        "preprocess": [1.0] * 101,
        "host_to_device": None,
        "inference": ((ms - 2.0) * (1 + spread * np.linspace(-1, 1, 101))).tolist(),
        "device_to_host": None,
        "postprocess": [1.0] * 101,
    }
    samples["total"] = [inference + 2.0 for inference in samples["inference"]]
    summaries = {}
    for stage in STAGES:
        values = samples[stage]
        percentiles = [] if values is None else np.percentile(values, [50, 90, 95, 99]).tolist()
        summaries[stage] = (
            None
            if values is None
            else dict(
                zip(STATISTICS, (percentiles[0], float(np.mean(values)), *percentiles[1:], max(values)), strict=True)
            )
        )
    return {
        "summary_ms": summaries,
        "samples_ms": samples,
        "stable": spread <= 0.1,
        "spread": spread * 0.8,
        "comparable": spread <= 0.1,
        "comparable_reasons": [] if spread <= 0.1 else ["it is unstable"],
        "threads": 2,
        "description": "some runtime, 2 threads",
        "warmup_runs": 10,
        "mode": "back-to-back",
        "fps": None,
        "late_frames": None,
        "memory_mib": {"host_peak": 321.0, "device_peak": None},
        "power": None,
        "power_reason": "no power meter",
        "sweep": None,
    }


@pytest.fixture
def result(tmp_path):
    """Writes a result file: result("onnx-int8", ap=0.47) or result("onnx-int8", ms=12.0); `made_from` is a role."""

    annotations = tmp_path / "data" / "annotations" / "instances_test.json"

    def make(role, ap=None, ms=None, made_from=None, spread=0.01, suffix="", **changes):
        document = {
            "role": role,
            "model": {
                "file": f"out/{role}.onnx",
                "format": "onnx",
                "sha256": sha(role),
                "bytes": 3 << 20,
                "parameters": 1_500_000,
                "inputs": {"model": {"file": f"out/{made_from}", "sha256": sha(made_from)}} if made_from else {},
                "command": ["python", "-m", "deploy.export", f"runs/{role}"],
            },
            "data": {
                "annotations": str(annotations),
                "annotations_sha256": sha256_of(annotations) if annotations.is_file() else sha("annotations"),
                "images_dir": str(tmp_path / "data" / "images"),
                "images": 5,
                "class_names": list(CLASSES),
            },
            "environment": {"cpu": "some processor", "cores": 2, "os": "some system", "machine": None},
        }
        if ap is not None:
            document["kind"] = "accuracy"
            document["numbers"] = accuracy_numbers(role, ap)
        else:
            document["kind"] = "latency"
            document["numbers"] = latency_numbers(ms, spread)
        for key, value in changes.items():
            part, _, name = key.partition("__")
            document[part][name] = value
        path = tmp_path / f"{role}{suffix}.{document['kind']}.result.json"
        if ap is None:
            write_result(path, document, {})
        else:
            with replacing_detections(path, detections_of(role)) as document["detections"]:
                write_result(path, document, {})
        return path

    return make


@pytest.fixture
def results(result):
    """The ten result files of a whole run."""
    made_from = {"student": "teacher", "onnx-fp32": "student", "onnx-int8": "onnx-fp32"}
    paths = [result(role, ap=AP[role], made_from=made_from.get(role)) for role in AP]
    return paths + [result(role, ms=MS[role], made_from=made_from.get(role)) for role in reversed(list(AP))]


@pytest.fixture
def run_report(tmp_path, capsys):
    """Runs the command: (status, stderr, report.json or None)."""

    def run_report(results, *words):
        output = tmp_path / "out" / "report.html"
        status = report.main([*map(str, results), "-o", str(output), *map(str, words)])
        document = output.with_suffix(".json")
        return status, capsys.readouterr().err, json.loads(document.read_text()) if document.exists() else None

    return run_report
