"""
Calibration images, and the statistics of a float model's activations over them.

One pass with ONNX Runtime, one image at a time. The activations looked at are outputs of the graph, which ONNX Runtime
keeps until a run ends; where they would be larger than LARGEST_GROUP_BYTES, a run looks at some of them only and runs
the graph only that far. Memory does not depend on the number of images, but for two sums (16 bytes) of each tensor and
image. Needs the packages onnx and onnxruntime.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np

from calibration.statistics import Collected, Statistics
from deploy.contract import ModelContract
from deploy.dataset import CocoImage, CocoSet, read_image
from deploy.errors import CalibrationError, ConfigError, DataError, MissingDependencyError
from deploy.files import sha256_of
from deploy.graph import producers, remove_unused
from deploy.preprocess import preprocess
from deploy.progress import progress

if TYPE_CHECKING:
    import onnx
    import onnxruntime


LARGEST_GROUP_BYTES = 512 * 2**20
"""Of the activations that one run keeps."""


def choose_images(images: Sequence[CocoImage], number: int, seed: int) -> List[CocoImage]:
    """
    `number` of the images, or all if there are fewer, by increasing id.

    The choice depends on the ids and the seed, not on the order of `images`.

    Raises:
        ConfigError: `number` is below 1.
    """
    if number < 1:
        raise ConfigError(f"--num-images is {number}; expected at least 1")
    by_id = sorted(images, key=lambda image: image.image_id)
    chosen = random.Random(seed).sample(by_id, min(number, len(by_id)))
    return sorted(chosen, key=lambda image: image.image_id)


def sha256_of_images(images: Sequence[CocoImage]) -> str:
    """One SHA-256 over the contents of the image files, whatever their order and names."""
    return hashlib.sha256("".join(sorted(sha256_of(image.path) for image in images)).encode()).hexdigest()


def check_no_overlap(images: Sequence[CocoImage], evaluation: CocoSet) -> None:
    """
    Raises CalibrationError if a calibration image is also in the evaluation set, under whatever name.

    Contents are compared; only files of equal size are read.

    Raises:
        DataError: an image of the evaluation set is not there.
    """
    by_size: Dict[int, List[CocoImage]] = {}
    for image in evaluation.images:
        try:
            by_size.setdefault(image.path.stat().st_size, []).append(image)
        except OSError as error:
            raise DataError(
                f"cannot read {image.path} ({error.strerror}), image id {image.image_id} of "
                f"{evaluation.annotations_path}; expected it, to compare the calibration images with. Give the folder "
                "of these images with --evaluation-images-dir."
            ) from error
    for image in images:
        candidates = by_size.get(image.path.stat().st_size, [])
        digest = sha256_of(image.path) if candidates else ""
        for other in candidates:
            if sha256_of(other.path) == digest:
                raise CalibrationError(
                    f"the calibration image {image.path} is the image {other.path.name} (id {other.image_id}) of the "
                    f"evaluation set {evaluation.annotations_path}; expected no image in both, or the AP measured "
                    "there is too good. Calibrate on the training split, or remove the image from one of them."
                )


def collect_statistics(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Sequence[CocoImage],
    contract: ModelContract,
    minmax_only: Sequence[str] = (),
) -> Dict[str, Statistics]:
    """
    Tensor name -> its statistics over the images, pre-processed as in deployment.

    Args:
        tensors: activations or inputs of the graph, float32.
        minmax_only: further ones of which only minimum and maximum are wanted, which costs less.

    Raises:
        as `extend_statistics`.
    """
    collected = empty_statistics(tensors, minmax_only)
    extend_statistics(collected, model, images, contract)
    return collected.statistics


def empty_statistics(tensors: Sequence[str], minmax_only: Sequence[str] = ()) -> Collected:
    """Statistics of no image yet, to be extended; the arguments are those of `collect_statistics`."""
    statistics = {name: Statistics.minmax_only() for name in minmax_only}
    statistics.update((name, Statistics()) for name in tensors)
    return Collected(statistics)


def extend_statistics(
    collected: Collected, model: onnx.ModelProto, images: Sequence[CocoImage], contract: ModelContract
) -> None:
    """
    Adds images to the statistics, in place. Those that are in already, by their contents, are not added again.

    A batch is one image; where the graph wants N of them, it is repeated, and the feature maps of the first are read.

    Args:
        collected: of this model. It must not be used further if this raises: some images may be in by half.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CalibrationError: ONNX Runtime cannot run the graph, or a tensor holds NaN or infinity.
        DataError: an image cannot be read.
    """
    by_content = {sha256_of(image.path): image for image in images}
    further = {digest: image for digest, image in by_content.items() if digest not in collected.image_ids}
    sessions = _sessions(model, collected.statistics, contract) if further else []
    for digest, image in progress(further.items(), len(further), "calibration"):
        for name, values in _activations(sessions, image, contract):
            if values.ndim == 4 and len(values) == _images_per_run(contract):  # (N, channels, height, width)
                values = values[:1]
            if name in collected.statistics and not collected.statistics[name].update(values):
                raise CalibrationError(
                    f"the tensor {name} holds NaN or infinity for the image {image.path}; expected finite activations. "
                    "The weights may have diverged in training: measure the float model first."
                )
        collected.image_ids[digest] = image.image_id


def _activations(
    sessions: Sequence[onnxruntime.InferenceSession], image: CocoImage, contract: ModelContract
) -> Iterator[Tuple[str, np.ndarray]]:
    """(name, values) of the network's input and of each output of the sessions."""
    batch = np.repeat(preprocess(read_image(image.path), contract).input, _images_per_run(contract), axis=0)
    yield contract.input_name, batch
    for session in sessions:
        names = [output.name for output in session.get_outputs()]
        yield from zip(names, session.run(names, {contract.input_name: batch}))


def _images_per_run(contract: ModelContract) -> int:
    return max(1, contract.input_shape[0])  # -1: any number


def _sessions(
    model: onnx.ModelProto, tensors: Iterable[str], contract: ModelContract
) -> List[onnxruntime.InferenceSession]:
    """One for each group of tensors, which are its outputs."""
    return [
        runtime_session(_with_outputs(model, group), "calibration", lean=True)
        for group in _groups(model, tensors, contract)
    ]


def runtime_session(model: onnx.ModelProto, needed_for: str, lean: bool = False) -> onnxruntime.InferenceSession:
    """
    The model on ONNX Runtime's CPU provider.

    Args:
        lean: take less memory and leave the processor alone between runs, for sessions beside which Python counts.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CalibrationError: ONNX Runtime cannot open the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", needed_for, "pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if lean:
        options.enable_cpu_mem_arena = False  # which would keep what each session took
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # not while Python counts
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise CalibrationError(f"ONNX Runtime cannot run the model: {error}. Export it again.") from error


def _groups(model: onnx.ModelProto, tensors: Iterable[str], contract: ModelContract) -> List[List[str]]:
    """The tensors but for the input, as they follow in the graph, in groups of at most LARGEST_GROUP_BYTES."""
    wanted, sizes = set(tensors) - {contract.input_name}, _sizes_in_bytes(model, contract)
    unknown = max(sizes.values(), default=0)  # onnx cannot infer every size: then as large as the largest known
    groups: List[List[str]] = []
    free_bytes = 0
    for name in producers(model):
        if name in wanted:
            size = sizes.get(name) or unknown
            if not groups or size > free_bytes:
                groups.append([])
                free_bytes = LARGEST_GROUP_BYTES
            groups[-1].append(name)
            free_bytes -= size
    return groups


def _sizes_in_bytes(model: onnx.ModelProto, contract: ModelContract) -> Dict[str, int]:
    """Tensor -> what it takes as float32, where its shape is known."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name == contract.input_name:
            value.type.tensor_type.shape.dim[0].dim_value = _images_per_run(contract)
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph.value_info
    }
    return {name: 4 * int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose only outputs are these tensors, without what they do not need."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    remove_unused(changed)
    return changed
