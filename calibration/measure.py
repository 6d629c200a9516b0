"""
What a model loses: in AP, as the benchmarks' own command measures it, and in its detections on a few images.

AP needs what `benchmarks.accuracy` needs; the error of the output needs onnxruntime alone.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from deploy.commands import run_captured
from deploy.contract import ModelContract, load_contract, write_sidecar
from deploy.dataset import CocoImage
from deploy.errors import CalibrationError, MeasurementError
from deploy.files import read_json
from deploy.graphs.graph import save_onnx
from deploy.images import read_image
from deploy.runtime.postprocess import Detections, postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import OrtSession

if TYPE_CHECKING:
    import onnx

ERROR_IMAGES = 16
"""How many of the images that AP is measured on, by seed 0, `OutputError` compares detections on."""


@contextlib.contextmanager
def saved(model: onnx.ModelProto, contract: ModelContract) -> Iterator[Path]:
    """Yields the path of the model with its sidecar, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        save_onnx(model, path)
        write_sidecar(path, {}, contract)
        yield path


def accuracy_numbers(
    model: Path,
    annotations: Path,
    images_dir: Path,
    limit: Optional[int] = None,
    against: Optional[Path] = None,
    output: Optional[Path] = None,
) -> Dict[str, Any]:
    """
    The `numbers` of a result of benchmarks.accuracy, which runs in a process of its own: it is of a layer above.

    Args:
        limit: the first of the images only.
        against: result of another model, which `numbers["against"]` compares with.
        output: where the result is kept, to be such another; else it is not.

    Raises:
        CalibrationError: the command failed, or there is no AP: nothing is annotated.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = output or Path(folder) / "trial.result.json"
        words = [str(model), "--annotations", str(annotations), "--images-dir", str(images_dir), "-o", str(result)]
        words += ["--limit", str(limit)] if limit is not None else []
        words += ["--against", str(against)] if against is not None else []
        try:
            run_captured("benchmarks.accuracy", *words)
        except MeasurementError as error:
            raise CalibrationError(
                f"the AP could not be measured on {annotations}: {error}. Put that right, or do without AP."
            ) from error
        numbers: Dict[str, Any] = read_json(result, CalibrationError, "a result of benchmarks.accuracy")["numbers"]
    if numbers["AP"] is None:
        raise CalibrationError(f"{annotations} gives no AP: no box is annotated. Annotate some, or do without AP.")
    return numbers


class OutputError:
    """
    How far the detections of other models are from those of the float model, on a few images.

    A detection of one is compared with that of the same class in the other that overlaps it most: `boxes` is 1 - IoU,
    `scores` the difference of their scores; 1 and its own score where there is none. Both are means over the
    detections of either model, weighted by score, so that the many next to the threshold do not outweigh the others.

    Args:
        model: file of the float model.

    Raises:
        CalibrationError: the float model detects nothing.
    """

    def __init__(self, model: Path, images: Sequence[CocoImage]) -> None:
        contract = load_contract(model)
        self._images = images
        self._prepared = [preprocess(read_image(image.path), contract) for image in images]
        self._reference = self._detections(model)
        if not any(len(detections.scores) for detections in self._reference):
            raise CalibrationError(
                f"{model} detects nothing in {len(images)} images above the score {contract.score_threshold}; expected "
                "detections, to see how INT8 moves them. Is the model trained, and are these images for it?"
            )

    def of(self, model: Path) -> Dict[str, float]:
        """`boxes` and `scores`, both 0 to 1, of the model in a file."""
        rows: List[Tuple[float, float, float]] = []  # weight, error of the box, error of the score
        for reference, detections in zip(self._reference, self._detections(model)):
            rows += _errors(reference, detections) + _errors(detections, reference)
        weights, boxes, scores = np.array(rows, np.float64).T
        return {"boxes": float(weights @ boxes / weights.sum()), "scores": float(weights @ scores / weights.sum())}

    def _detections(self, model: Path) -> List[Detections]:
        with OrtSession(model) as session:
            contract, detections = session.contract, []
            for image, prepared in zip(self._images, self._prepared):
                batch = np.repeat(prepared.input, max(1, contract.input_shape[0]), axis=0)
                outputs = session.infer({contract.input_name: batch})
                detections.append(postprocess(outputs, contract, prepared, image=image.path))
        return detections


def total_error(error: Dict[str, float]) -> float:
    """One number of the two of `OutputError.of`, 0 to 2."""
    return error["boxes"] + error["scores"]


def _errors(these: Detections, others: Detections) -> List[Tuple[float, float, float]]:
    """(score, 1 - IoU, difference of scores) of each of `these` and what overlaps it most."""
    rows = []
    for box, score, label in zip(these.boxes_xyxy, these.scores, these.labels):
        same = others.labels == label
        overlaps = _overlaps(box, others.boxes_xyxy[same])
        if overlaps.size and overlaps.max() > 0:
            best = int(overlaps.argmax())
            other_score = float(others.scores[same][best])
            rows.append((float(score), 1 - float(overlaps[best]), abs(float(score) - other_score)))
        else:
            rows.append((float(score), 1.0, float(score)))
    return rows


def _overlaps(box_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """(n,): the IoU of one box with each of n."""
    sides = np.minimum(box_xyxy[2:], boxes_xyxy[:, 2:]) - np.maximum(box_xyxy[:2], boxes_xyxy[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    return shared / ((box_xyxy[2:] - box_xyxy[:2]).prod() + areas - shared)
