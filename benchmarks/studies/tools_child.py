"""
Command: what one process of benchmarks.studies.tools does: images through a model, alone or to calibrate a tool.

    python -m benchmarks.studies.tools_child plain student.onnx --annotations images.json --images-dir DIR
    python -m benchmarks.studies.tools_child modelopt student.onnx --method entropy \\
        --annotations images.json --images-dir DIR -o student.int8.onnx
    python -m benchmarks.studies.tools_child latency student.onnx --int8 student.int8.onnx --runtime openvino \\
        --annotations images.json --images-dir DIR -o latency.json

Run in the folder of the checkout by the Python that has the tool, which need not be ours; it needs numpy, OpenCV and
onnx besides. Settings are the tool's defaults, but for what `int8_by_modelopt` says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Set

import numpy as np

from deploy.contract import load_contract
from deploy.dataset import load_coco
from deploy.errors import CalibrationError, ConfigError, command
from deploy.files import check_writable, write_json
from deploy.images import read_image
from deploy.runtime.postprocess import postprocess
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import OrtSession, Session, open_session
from deploy.targets import TARGETS

LATENCY, DETECT = "latency", "detect"
Feed = Dict[str, np.ndarray]


class Images:
    """
    The feeds of a model, one image each, made as they are asked for.

    The methods are those of a data reader of ONNX Runtime (`CalibrationDataReader`), and of ModelOpt, which wants to
    see the first feed without taking it.
    """

    def __init__(self, model: str, annotations: str, images_dir: str) -> None:
        self._contract = load_contract(model)
        self._images = load_coco(annotations, images_dir, check_files=False).images
        self._taken = 0

    def get_next(self) -> Optional[Feed]:
        if self._taken == len(self._images):
            return None
        self._taken += 1
        return self._feed(self._taken - 1)

    def get_first(self) -> Feed:
        return self._feed(0)

    def rewind(self) -> None:
        self._taken = 0

    def _feed(self, index: int) -> Feed:
        prepared = preprocess(read_image(self._images[index].path), self._contract)
        return {self._contract.input_name: np.repeat(prepared.input, max(1, self._contract.input_shape[0]), axis=0)}


def nodes_from(model_path: str, names: Sequence[str]) -> List[str]:
    """
    The names of these nodes and of all that read what comes of them.

    Raises:
        CalibrationError: one of them is not in the graph, or has no name to be excluded by.
    """
    from deploy.graphs.graph import load_onnx

    reached: Set[str] = set()
    found = []
    for node in load_onnx(model_path).graph.node:  # each after those that it reads
        if node.name in names or reached.intersection(node.input):
            reached.update(name for name in node.output if name)
            found.append(node.name)
    missing = set(names) - set(found)
    if missing or not all(found):
        raise CalibrationError(
            f"{model_path} has {sorted(missing) or 'nodes without a name'}; expected the name of each node to exclude"
        )
    return found


def run_plainly(images: Images, model: str) -> None:
    """One inference of each image, as in deployment."""
    with OrtSession(model) as session:
        for feed in iter(images.get_next, None):
            session.infer(feed)


def int8_by_onnxruntime(images: Images, model: str, method: str, excluded: List[str], output: str) -> None:
    """`method` is the name of a CalibrationMethod."""
    from onnxruntime import quantization

    quantization.quantize_static(
        model,
        output,
        images,
        nodes_to_exclude=excluded,
        calibrate_method=quantization.CalibrationMethod[method],
    )


def int8_by_modelopt(images: Images, model: str, method: str, excluded: List[str], output: str) -> None:
    """
    `method` is "max" or "entropy".

    By default ModelOpt 0.47 looks for GPUs first and turns to FP16 what it leaves in float; here it calibrates on the
    processor, and leaves it in FP32, as the others do. It takes nodes to exclude as patterns of `re.match`.
    """
    from modelopt.onnx.quantization import quantize

    quantize(
        model,
        calibration_data_reader=images,
        calibration_method=method,
        calibration_eps=["cpu"],
        nodes_to_exclude=[f"{re.escape(name)}$" for name in excluded],
        high_precision_dtype="fp32",
        output_path=output,
    )


def int8_by_nncf(images: Images, model: str, method: str, excluded: List[str], output: str) -> None:
    """
    `method` is a preset, "performance" or "mixed".

    The file is of OpenVINO's own format: with files of NNCF's backend for ONNX, OpenVINO 2026.4 detects nothing. There
    a convolution that has a bias is two nodes, the second of its name.
    """
    import nncf
    import openvino

    feeds = list(iter(images.get_next, None))
    names = [name for node in excluded for name in (node, f"{node}/WithoutBiases")]
    quantized = nncf.quantize(
        openvino.convert_model(model),
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset(method),
        subset_size=len(feeds),
        ignored_scope=nncf.IgnoredScope(names=names, validate=False) if names else None,
    )
    openvino.save_model(quantized, output, compress_to_fp16=False)


def opened(path: str, runtime: str) -> Session:
    """The session of a file on one thread; one of OpenVINO's own format, too, which no command takes."""
    if Path(path).suffix == ".xml":
        from deploy.openvino.session import OpenVinoSession

        return OpenVinoSession(path, threads=1)
    return open_session(path, threads=1, runtime=runtime)


def write_detections(model: str, annotations: str, images_dir: str, output: str) -> None:
    """Writes COCO results of a file of OpenVINO's own format, of all images."""
    results = []
    with opened(model, "openvino") as session:
        contract = session.contract
        for image in load_coco(annotations, images_dir, check_files=False).images:
            prepared = preprocess(read_image(image.path), contract)
            batch = np.repeat(prepared.input, max(1, contract.input_shape[0]), axis=0)
            detections = postprocess(session.infer({contract.input_name: batch}), contract, prepared, image=image.path)
            results += [
                {"image_id": image.image_id, "category_id": contract.category_ids[label], "bbox": box, "score": score}
                for box, score, label in detections.rows()
            ]
    Path(output).write_text(json.dumps(results), encoding="utf-8")


def time_in_turn(image: Path, model: str, int8: str, runtime: str, output: str) -> None:
    """Writes `fp32_ms`, `int8_ms`, `times` (FP32 over INT8, as `ratio`) and `description`, of one run."""
    from benchmarks.studies.turns import latencies, ratio  # which needs more than other Pythons have

    measured = latencies({"fp32": opened(model, runtime), "int8": opened(int8, runtime)}, image)
    numbers = {f"{name}_ms": value for name, value in measured["ms"].items()}
    write_json(
        output,
        {**numbers, "times": ratio(measured, "fp32", "int8"), "description": measured["description"]["int8"]},
    )


QUANTIZERS: Dict[str, Callable[[Images, str, str, List[str], str], None]] = {
    "onnxruntime": int8_by_onnxruntime,
    "modelopt": int8_by_modelopt,
    "nncf": int8_by_nncf,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.tools_child",
        description="Run images through a model, alone, to calibrate another's tool, or to time its INT8 file.",
    )
    parser.add_argument(
        "tool", choices=("plain", *QUANTIZERS, LATENCY, DETECT),
        help="plain: inference alone; latency: of the model and its INT8 file, in turn; detect: a file of OpenVINO's",
    )  # fmt: skip
    parser.add_argument("model", help="float ONNX file, with its sidecar; to detect, OpenVINO's file")
    parser.add_argument("--method", help="of calibration, as the tool calls it")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO file of the images")
    parser.add_argument("--images-dir", required=True, metavar="DIR", help="their folder")
    parser.add_argument("--float-from", nargs="+", default=[], metavar="NAME",
                        help="nodes to keep in float, with all that reads what comes of them")  # fmt: skip
    parser.add_argument("--int8", metavar="FILE", help="for latency: the INT8 file")
    parser.add_argument("--runtime", choices=tuple(TARGETS), help="for latency: what runs them")
    parser.add_argument("-o", "--output", metavar="FILE",
                        help="INT8 file to write, for latency and detect JSON; none for plain")  # fmt: skip
    return parser


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Runs one pass; see the module's docstring."""
    arguments = _parser().parse_args(argv)
    if arguments.tool == LATENCY:
        if not (arguments.int8 and arguments.runtime and arguments.output):
            raise ConfigError("the tool is latency; expected --int8, --runtime and --output")
        image = load_coco(arguments.annotations, arguments.images_dir, check_files=False).images[0].path
        time_in_turn(image, arguments.model, arguments.int8, arguments.runtime, arguments.output)
        return 0
    if arguments.tool == DETECT:
        if not arguments.output:
            raise ConfigError("the tool is detect; expected --output")
        write_detections(arguments.model, arguments.annotations, arguments.images_dir, arguments.output)
        return 0
    calibrates = arguments.tool != "plain"
    if any(bool(one) != calibrates for one in (arguments.method, arguments.output)):
        raise ConfigError(
            f"the tool is {arguments.tool}; expected {'both' if calibrates else 'neither'} of --method and --output"
        )
    if calibrates:
        check_writable(arguments.output)
    images = Images(arguments.model, arguments.annotations, arguments.images_dir)
    if calibrates:
        excluded = nodes_from(arguments.model, arguments.float_from) if arguments.float_from else []
        QUANTIZERS[arguments.tool](images, arguments.model, arguments.method, excluded, arguments.output)
    else:
        run_plainly(images, arguments.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
