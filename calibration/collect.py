"""
The statistics of a float model's activations over calibration images.

One pass with ONNX Runtime, one image at a time. The activations looked at are outputs of the graph, which ONNX Runtime
keeps until a run ends; where they would be larger than LARGEST_GROUP_BYTES, there are several passes, each of which
looks at some of them and runs the graph only that far. Memory does not depend on the number of images, but for two
numbers of each tensor and image. Needs the packages onnx and onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, AbstractSet, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from calibration.activation_statistics import Collected, Seen, Statistics, load_statistics, save_statistics
from deploy.contract import ModelContract
from deploy.dataset import CocoImage
from deploy.errors import CalibrationError, MissingDependencyError
from deploy.files import sha256_of
from deploy.graphs.graph import producers, with_outputs
from deploy.graphs.precision import GROWING_OPS
from deploy.graphs.products import Products
from deploy.images import read_image
from deploy.machine import thread_limit
from deploy.progress import progress
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import ORT_TYPES

if TYPE_CHECKING:
    import onnx
    import onnxruntime


IMAGES_PER_COUNT = 8
"""How many images' samples are counted together: numpy's calls, and the way through the bins, cost time."""
SLOPES = {"Relu": 0.0, "LeakyRelu": 0.01}
"""Operator -> slope of negative values where no attribute says it."""
LARGEST_GROUP_BYTES = 512 * 2**20
"""The most bytes of activations that one run keeps."""


def tensors_that_may_grow(model: onnx.ModelProto) -> List[str]:
    """
    The float32 outputs of GROWING_OPS, as far as the last products: the decoding after them may use infinity.
    """
    from onnx import TensorProto, shape_inference

    values = shape_inference.infer_shapes(model).graph.value_info
    floating = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    products = Products(model)
    needed = {node.output[0] for node in products.nodes if products.weight(node) is not None}
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in GROWING_OPS and node.output[0] in floating & needed
    ]


def statistics_of_images(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Sequence[CocoImage],
    contract: ModelContract,
    file: Optional[Path],
    model_path: Path,
    methods: Iterable[str],
) -> Dict[str, Statistics]:
    """
    Tensor -> statistics over the images: of `tensors`, and extremes of those of `tensors_that_may_grow`.

    Args:
        file: where they are kept, for any method; statistics that it has already are not collected again.
        methods: that they are for. `max` alone needs no histograms, which cost time.
        model_path: of the model.

    Raises:
        CalibrationError: the file is of another model, of other images or for another target, or an activation is not
            finite.
    """
    growing = tensors_that_may_grow(model)
    if file is None and set(methods) == {"max"}:
        tensors, growing = [], [*tensors, *growing]
    minmax_only = sorted(set(growing) - set(tensors))
    if file is not None and file.is_file():
        collected = load_statistics(file, model_path, contract)
        collected.check_tensors(tensors, minmax_only, file)
        others = set(collected.image_ids) - {sha256_of(image.path) for image in images}
        if others:
            raise CalibrationError(
                f"{file} holds statistics of {len(collected.image_ids)} images, {len(others)} of which are not among "
                f"the {len(images)} chosen now; expected no others. Choose the same data, --num-images and --seed, "
                "or name another file with --statistics."
            )
    else:
        collected = empty_statistics(tensors, minmax_only)
    known = len(collected.image_ids)
    extend_statistics(collected, model, images, contract)
    if file is not None and len(collected.image_ids) > known:
        save_statistics(file, collected, model_path, contract)
    return collected.statistics


def empty_statistics(tensors: Sequence[str], minmax_only: Sequence[str] = ()) -> Collected:
    """
    Statistics of no image yet, to be extended.

    Args:
        tensors: activations or inputs of the graph, float32.
        minmax_only: further ones of which only minimum and maximum are wanted, which costs less.
    """
    statistics = {name: Statistics() for name in tensors}
    statistics.update((name, Statistics.minmax_only()) for name in minmax_only)
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
    if not further:
        return
    rectified = _rectified(model, collected.statistics)
    counted = {name for name, statistics in collected.statistics.items() if statistics.has_histogram}
    counted.update(name for name, outputs in rectified.items() if counted.intersection(outputs))
    groups = _groups(model, set(collected.statistics).difference(*rectified.values()), contract)
    for number, group in enumerate(groups, start=1):
        part = f"calibration, part {number} of {len(groups)}" if len(groups) > 1 else "calibration"
        session = runtime_session(with_outputs(model, group), "calibration", quiet=True)
        run = _runner(session, contract.input_name)
        waiting: Dict[str, List[Seen]] = {name: [] for name in group}
        for done, image in enumerate(progress(further.values(), len(further), part), start=1):
            for name, seen in _seen(run, image, contract, counted):
                waiting[name].append(seen)
            if done % IMAGES_PER_COUNT == 0 or done == len(further):
                _count(collected.statistics, waiting, rectified)
        del run, session  # and its memory, before there is another
    collected.image_ids.update((digest, image.image_id) for digest, image in further.items())


def _runner(session: onnxruntime.InferenceSession, input_name: str) -> Callable[[np.ndarray], Dict[str, np.ndarray]]:
    """
    The function that runs the session on a batch: output name -> values, valid until the next call.

    Outputs of known shape lie in arrays that are allocated once, where ONNX Runtime would copy each to a new one.
    """
    names = [output.name for output in session.get_outputs()]
    made = [output for output in session.get_outputs() if output.name != input_name]
    if not made or not all(isinstance(size, int) for output in made for size in output.shape):
        return lambda batch: dict(zip(names, session.run(names, {input_name: batch})))
    binding = session.io_binding()
    arrays = {output.name: np.empty(output.shape, ORT_TYPES[output.type]) for output in made}
    for name, array in arrays.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(batch: np.ndarray) -> Dict[str, np.ndarray]:
        binding.bind_cpu_input(input_name, batch)
        session.run_with_iobinding(binding)
        return {name: batch if name == input_name else arrays[name] for name in names}

    return run


def _seen(
    run: Callable[[np.ndarray], Dict[str, np.ndarray]], image: CocoImage, contract: ModelContract,
    counted: AbstractSet[str],
) -> Iterator[Tuple[str, Seen]]:  # fmt: skip
    """
    (name, what the image shows) of each output of the session; raises as `extend_statistics`.

    Args:
        run: as of `_runner`.
        counted: the outputs whose values are sampled, too.
    """
    batch = np.repeat(preprocess(read_image(image.path), contract).input, _images_per_run(contract), axis=0)
    for name, values in run(batch).items():
        if values.ndim == 4 and len(values) == len(batch):  # (N, channels, height, width)
            values = values[:1]
        seen = Seen.of(values, name in counted)
        if not seen.is_finite:
            raise CalibrationError(
                f"the tensor {name} holds NaN or infinity for the image {image.path}; expected finite activations. "
                "The weights may have diverged in training: measure the float model first."
            )
        yield name, seen


def _count(
    statistics: Dict[str, Statistics], waiting: Dict[str, List[Seen]], rectified: Dict[str, Dict[str, float]]
) -> None:
    """Moves what waits into the statistics, and what follows from it."""
    for name, parts in waiting.items():
        seen = Seen.joined(parts)
        parts.clear()
        statistics[name].update(seen)
        for output, slope in rectified.get(name, {}).items():
            statistics[output].update(seen.rectified(slope))


def _rectified(model: onnx.ModelProto, tensors: Iterable[str]) -> Dict[str, Dict[str, float]]:
    """
    Of these tensors: input of a ReLU or LeakyReLU -> its outputs, with their slopes of negative values.

    What the outputs show follows from what the inputs show: they need not leave the graph.
    """
    wanted = set(tensors)
    rectified: Dict[str, Dict[str, float]] = {}
    for node in model.graph.node:
        if node.op_type in SLOPES and wanted.issuperset([node.input[0], node.output[0]]):
            slope = next((field.f for field in node.attribute if field.name == "alpha"), SLOPES[node.op_type])
            if 0 <= slope <= 1:
                rectified.setdefault(node.input[0], {})[node.output[0]] = slope
                wanted.remove(node.output[0])
    return rectified


def runtime_session(model: onnx.ModelProto, needed_for: str, quiet: bool = False) -> onnxruntime.InferenceSession:
    """
    The model on ONNX Runtime's CPU provider.

    Args:
        quiet: leave the processor alone between runs, for sessions beside which Python counts.

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
    options.intra_op_num_threads = thread_limit() or 0  # 0: its own choice
    if quiet:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise CalibrationError(f"ONNX Runtime cannot run the model: {error}. Export it again.") from error


def _images_per_run(contract: ModelContract) -> int:
    return max(1, contract.input_shape[0])  # -1: any number


def _groups(model: onnx.ModelProto, tensors: Iterable[str], contract: ModelContract) -> List[List[str]]:
    """The tensors as they follow in the graph, in groups of at most LARGEST_GROUP_BYTES."""
    wanted, sizes = set(tensors), _sizes_in_bytes(model, contract)
    unknown = max(sizes.values(), default=0)  # onnx cannot infer every size: then as large as the largest known
    groups: List[List[str]] = []
    free_bytes = 0
    for name in [contract.input_name, *producers(model)]:
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
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
    }
    return {name: 4 * int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
