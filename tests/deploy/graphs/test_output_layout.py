from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Tuple

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from deploy.contract import OUTPUTS, ModelContract, write_sidecar  # noqa: E402
from deploy.graphs.graph import check_graph, check_static, save_onnx  # noqa: E402
from deploy.graphs.output_layout import lay_out  # noqa: E402
from deploy.runtime.golden import match_distances  # noqa: E402
from deploy.runtime.postprocess import Detections, postprocess  # noqa: E402
from deploy.runtime.preprocess import Prepared  # noqa: E402
from deploy.runtime.session import OrtSession, candidates  # noqa: E402
from tests.stand_ins.detector import CONTRACT  # noqa: E402

GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
    small (float[{batch},9,6] x) =>
        (float[{batch},9,4] candidate_boxes, float[{batch},9] candidate_scores, int64[{batch},9] candidate_labels) {{
        one = Constant <value_ints=[4, 1, 1]> ()
        candidate_boxes, score, label = Split <axis=2> (x, one)
        last = Constant <value_ints=[2]> ()
        confidence = Squeeze (score, last)
        candidate_scores = Identity (confidence)
        boxes = Squeeze (label, last)
        candidate_labels = Cast <to=7> (boxes)
    }}"""
"""Its input are the rows themselves; an inner tensor has the name of an output."""


def laid_out(path: Path, outputs: str, names: Tuple[str, ...], batch: int = 2) -> Path:
    model = onnx.parser.parse_model(GRAPH.format(batch="N" if batch < 0 else batch))
    contract = dataclasses.replace(
        CONTRACT, input_name="x", outputs=outputs, output_names=names, input_shape=(batch, 3, 64, 64)
    )
    lay_out(model, contract)
    check_graph(model)
    check_static(model, batch < 0, outputs == "nms")
    save_onnx(model, path)
    write_sidecar(path, {}, contract)
    return path


def detections(path: Path, rows: np.ndarray, contract: ModelContract) -> Detections:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = dict(zip(contract.output_names, session.run(list(contract.output_names), {"x": rows}), strict=True))
    whole = Prepared(np.zeros(0), (1.0, 1.0), (64, 64), (64, 64))
    return postprocess(found, contract, whole, index=1)


@pytest.mark.parametrize("batch", [2, -1])
@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        *OUTPUTS.items(),
        ("topk", ("dets", "confidence", "classes")),
        ("rows", ("boxes",)),
        ("nms", ("a", "b", "confidence", "d")),
    ],
)
def test_each_layout_gives_the_same_detections(
    outputs: str, names: Tuple[str, ...], batch: int, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 40, (2, 9, 2))
    sides = generator.uniform(5, 24, (2, 9, 2))
    scores, labels = generator.uniform(0, 1, (2, 9, 1)), generator.integers(0, 2, (2, 9, 1))
    rows = np.concatenate([corners, corners + sides, scores, labels], -1).astype(np.float32)
    path = laid_out(tmp_path / "x.onnx", outputs, names, batch)
    contract = dataclasses.replace(CONTRACT, outputs=outputs, output_names=names)
    assert [value.name for value in onnx.load(path).graph.output] == list(names)
    found = detections(path, rows, contract)
    plain = dataclasses.replace(CONTRACT, outputs="topk", output_names=OUTPUTS["topk"])
    given = {"boxes": rows[..., :4], "scores": rows[..., 4], "labels": rows[..., 5].astype(np.int64)}
    expected = postprocess(given, plain, Prepared(np.zeros(0), (1.0, 1.0), (64, 64), (64, 64)), index=1)
    assert len(found.scores) > 3
    for one, other in zip(dataclasses.astuple(found), dataclasses.astuple(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_are_read_and_compared_like_three_outputs() -> None:
    rows = np.array([[[1, 2, 3, 4, 0.5, 1], [5, 6, 7, 8, 0.25, 0]]], np.float32)
    contract = dataclasses.replace(CONTRACT, outputs="rows", output_names=("found",))
    boxes, scores, labels = candidates({"found": rows}, contract, 0)
    assert (boxes.tolist(), scores.tolist(), labels.tolist()) == (
        [[1, 2, 3, 4], [5, 6, 7, 8]], [0.5, 0.25], [1, 0]
    )  # fmt: skip
    assert labels.dtype == np.int64
    assert match_distances({"found": rows}, {"found": rows}, contract, 1).tolist() == [[0, 0], [0, 0]]


def test_a_session_runs_a_graph_of_rows(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> small (float[N,3,64,64] images) =>
            (float[N,192,4] candidate_boxes, float[N,192] candidate_scores, int64[N,192] candidate_labels) {
            zero = Constant <value_ints=[0, 0, 0]> ()
            four = Constant <value_ints=[0, 192, 4]> ()
            part, rest = Split <axis=3> (images, sizes)
            sizes = Constant <value_ints=[4, 60]> ()
            candidate_boxes = Reshape (part, four)
            candidate_scores = ReduceMax <axes=[2], keepdims=0> (candidate_boxes)
            candidate_labels = ArgMax <axis=2, keepdims=0> (candidate_boxes)
        }"""
    )
    model.graph.node.insert(0, model.graph.node.pop(3))
    contract = dataclasses.replace(
        CONTRACT, input_shape=(-1, 3, 64, 64), outputs="rows", output_names=("found",), class_names=tuple("abcd"),
        category_ids=(1, 2, 3, 4),
    )  # fmt: skip
    lay_out(model, contract)
    save_onnx(model, tmp_path / "x.onnx")
    write_sidecar(tmp_path / "x.onnx", {}, contract)
    images = np.random.default_rng(0).uniform(0, 1, (2, 3, 64, 64)).astype(np.float32)
    with OrtSession(tmp_path / "x.onnx", threads=1) as session:
        boxes, scores, labels = candidates(session.infer({"images": images}), session.contract, 1)
    assert np.array_equal(boxes, images[1, :, :, :4].reshape(-1, 4))
    assert np.array_equal(scores, boxes.max(1))
    assert np.array_equal(labels, boxes.argmax(1))
