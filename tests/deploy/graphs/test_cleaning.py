"""What is done to a traced graph, on graphs small enough to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from deploy.errors import ExportError  # noqa: E402
from deploy.graphs.cleaning import check_same_outputs, graph_of_any_batch  # noqa: E402
from deploy.graphs.graph import save_onnx  # noqa: E402

DETECTOR = """<ir_version: 8, opset_import: ["" : 17]>
detector (float[1, 12] image) => (float[1, 3, 4] boxes, float[1, 3] scores, int64[1, 3] labels)
<int64[3] shape = {1, 3, 4}>
{
    boxes = Reshape (image, shape)
    scores = ReduceMax <axes = [2], keepdims = 0> (boxes)
    labels = Cast <to = 7> (scores)
}"""


def test_what_is_more_than_a_size_of_the_batch_is_refused() -> None:
    def graph(images: int) -> Any:
        return onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            tile (float[{images},4] x) => (float[{images},4] y) <int64[2] times = {{1, 1}}, float[{images},4] ones = {{
            {", ".join(["1"] * 4 * images)}}}> {{ tiled = Tile(x, times) y = Mul(tiled, ones) }}"""
        )

    with pytest.raises(ExportError, match=r"depends on the number of images by .* the input ones of y \(Mul\)"):
        graph_of_any_batch(graph(2), graph(3))


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    save_onnx(onnx.parser.parse_model(DETECTOR), path)
    image = np.random.normal(size=(1, 12)).astype(np.float32)
    boxes = image.reshape(1, 3, 4)
    scores = boxes.max(2)
    labels = scores.astype(np.int64)
    check_same_outputs(path, "image", image, [boxes, scores, labels])
    for wrong in ([boxes + 0.1, scores, labels], [boxes, scores + 0.001, labels], [boxes, scores * np.nan, labels]):
        with pytest.raises(ExportError, match="does not compute what the detector does"):
            check_same_outputs(path, "image", image, wrong)
