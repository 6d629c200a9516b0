"""
A model for DeepStream's Gst-nvinfer: its configuration, labels, and the box parser's source.

nvinfer computes `y = net-scale-factor * (x - offsets)` of each pixel, with one factor for all channels, pads with black
and gives float32 in planes (N, 3, height, width). What of a contract it cannot do is put into the graph, or refused.
What it does otherwise is said, and stands in the contract of the ONNX file that is handed over, so that
`benchmarks.accuracy` of that file measures it.

Sources: "Gst-nvinfer" of the DeepStream documentation (docs.nvidia.com/metropolis/deepstream/dev-guide), and its API
reference of nvdsinfer.h and nvdsinfer_custom_impl.h.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple

import numpy as np

from deploy.contract import DYNAMIC, ModelContract, write_sidecar
from deploy.errors import ConfigError, ContractError
from deploy.files import new_folder
from deploy.graphs.decoding import free_names, rename_tensors
from deploy.graphs.graph import check_graph, save_onnx
from deploy.graphs.precision import check_symmetric_int8
from deploy.serving.model import ServedModel
from deploy.serving.triton import quoted

if TYPE_CHECKING:
    import onnx

MODES = {"fp32": 0, "int8": 1, "fp16": 2}
"""Precision -> nvinfer's network-mode."""
COLOURS = {"rgb": 0, "bgr": 1}
"""Order of channels -> nvinfer's model-color-format."""
BILINEAR = 1
"""NvBufSurfTransformInter_Bilinear of nvbufsurftransform.h."""
ON_GPU = 1
"""NvBufSurfTransformCompute_GPU: the VIC of a Jetson, the default there, filters otherwise."""
NO_CLUSTERING = 4
PARSER = Path(__file__).with_name("nvdsinfer_parser.cpp")
PIXELS = "nvinfer_pixels"
"""Name of the input of a graph that divides by a std for each channel."""


def write_deepstream(model: ServedModel, name: str, precision: Optional[str], most: int, folder: Path) -> List[str]:
    """
    Writes the model, its configuration, labels and box parser into the new folder `folder`; sentences for a user.

    Args:
        name: of the files and of the parser.
        precision: "fp16" or "fp32", of a float graph, which nvinfer builds; None for other models.
        most: images of one inference, where the model takes any number.

    Raises:
        ConfigError: the model cannot be had in this precision or batch, or there is none for this model.
        ContractError: nvinfer cannot feed the model, or cannot be given its labels.
        EngineBuildError: the graph was quantised for ONNX Runtime.
    """
    check_fit(model)
    precision = _precision(model, precision)
    batch = _batch(model, most)
    contract, notes = nvinfer_contract(model.contract)
    with new_folder(folder) as temporary:
        if model.onnx is None:
            file = f"{name}.engine"
            (temporary / file).write_bytes(model.path.read_bytes())
            write_sidecar(temporary / file, {"model": model.path}, contract, model.details)
        else:
            file = f"{name}.onnx"
            graph, contract, changes = graph_for_nvinfer(model, contract)
            save_onnx(graph, temporary / file)
            write_sidecar(temporary / file, {"model": model.path}, contract, model.details)
            notes = [*changes, *notes]
            if precision == "fp16":
                notes.append(
                    "the engine that nvinfer builds may have boxes and norms in FP16, too, which deploy.build_trt "
                    f"keeps in FP32: build {name}.engine with it and name that, if results are off"
                )
        files = {
            f"config_infer_{name}.txt": config_text(model, contract, name, precision, batch, notes),
            "labels.txt": "".join(f"{label}\n" for label in contract.class_names),
            f"nvdsinfer_{name}.cpp": parser_source(contract, name),
            "Makefile": MAKEFILE.replace("@name@", name),
        }
        for path, text in files.items():
            (temporary / path).write_text(text, encoding="utf-8")
    if model.onnx is not None and model.onnx.is_quantised:
        notes.append(
            f"nvinfer builds no INT8 engine without a calibration cache: build {name}.engine with deploy.build_trt "
            f"{folder / file} --int8 on the machine that runs it, into the same folder"
        )
    if model.is_engine:
        notes.append(
            f"the engine runs on {model.details.get('device')} with TensorRT {model.details['tensorrt']} alone, and "
            "nvinfer is given nothing to build another from"
        )
    return notes


def check_fit(model: ServedModel) -> None:
    """Raises ContractError if nvinfer cannot feed the model, read its outputs or its labels."""
    contract = model.contract
    fault = ""
    if contract.outputs == "nms":
        fault = "it has NMS in the graph, and nvinfer takes no outputs whose size depends on the image"
        cure = "Export it with --outputs topk or rows"
    elif contract.input_type != "float32":
        fault, cure = (
            f"it reads {contract.input_type}, and nvinfer gives float32",
            "Export it with --input-type float32",
        )
    elif model.is_engine and len(set(contract.std)) > 1:
        fault = f"it divides its channels by {list(contract.std)}, and nvinfer has one net-scale-factor for all"
        cure = "Hand over the ONNX file, which is changed to do so itself, and build the engine from what is written"
    unfit = [label for label in contract.class_names if re.search(r"[;\r\n]", label) or not label.strip()]
    if unfit:
        fault = f"its class {unfit[0]!r} cannot stand in a file of labels, where lines and ';' separate them"
        cure = "Rename the class in the data"
    if fault:
        raise ContractError(f"{model.path} cannot be handed over to DeepStream: {fault}. {cure}")


def _precision(model: ServedModel, asked: Optional[str]) -> str:
    fixed = model.details["precision"] if model.is_engine else None
    if model.onnx is not None and model.onnx.is_quantised:
        check_symmetric_int8(model.onnx.model)
        fixed = "int8"
    if fixed is not None and asked is not None:
        raise ConfigError(f"--precision is {asked}; {model.path} is {fixed} already: leave it out")
    if fixed is None and asked is None:
        raise ConfigError(f"nvinfer builds an engine of {model.path}: say in which precision, --precision fp16 or fp32")
    return fixed or str(asked)


def _batch(model: ServedModel, most: int) -> int:
    if model.contract.input_shape[0] != DYNAMIC:
        return model.contract.input_shape[0]
    if model.most is not None and most > model.most:
        raise ConfigError(f"--max-batch is {most}; the engine takes {model.most} images at most (its --shapes)")
    return most


# ---- what nvinfer does to a frame


def nvinfer_contract(contract: ModelContract) -> Tuple[ModelContract, List[str]]:
    """(the contract with the pre-processing that nvinfer does, a sentence for each difference)."""
    notes = []
    if contract.resize == "keep_ratio":
        if any(contract.pad_value):
            notes.append(f"nvinfer pads with black, where the training padded with {_numbers(contract.pad_value)}")
        if contract.resize_wh_px is not None:
            width, height = contract.resize_wh_px
            notes.append(
                f"nvinfer fits frames into the whole {contract.input_width_px} x {contract.input_height_px} input, "
                f"where the training fitted them into {width} x {height} of it"
            )
        notes.append("nvinfer rounds the size of the resized frame down, where the training rounded it to the nearest")
        notes.append(
            "boxes that reach into the padding are clipped after NMS, since the parser is not told the frame's size"
        )
        contract = dataclasses.replace(contract, pad_value=(0.0, 0.0, 0.0), resize_wh_px=None)
    elif contract.resize_wh_px is not None:
        raise ContractError(
            f"images are stretched into {contract.resize_wh_px} of the {contract.input_width_px} x "
            f"{contract.input_height_px} input, which nvinfer cannot do. Export with --size {contract.resize_wh_px[0]} "
            f"{contract.resize_wh_px[1]}"
        )
    return contract, notes


def graph_for_nvinfer(model: ServedModel, contract: ModelContract) -> Tuple[onnx.ModelProto, ModelContract, List[str]]:
    """
    (a graph that nvinfer can feed and read, its contract, a sentence for each change), of an ONNX file.

    Where the channels have a std each, the graph divides by it. Labels become int32, which every nvinfer reads.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    assert model.onnx is not None
    graph = onnx.ModelProto()
    graph.CopyFrom(model.onnx.model)
    notes = []
    if len(set(contract.std)) > 1:
        factor = (1 / np.array(contract.std)).astype(np.float32).reshape(1, 3, 1, 1)
        graph.graph.initializer.append(numpy_helper.from_array(factor, f"{PIXELS}_factor"))
        # What was the input keeps its name: ranges in the sidecar are of that tensor.
        multiply = helper.make_node("Mul", [PIXELS, f"{PIXELS}_factor"], [contract.input_name], name=f"{PIXELS}/scaled")
        graph.graph.node.insert(0, multiply)
        (value,) = (value for value in graph.graph.input if value.name == contract.input_name)
        value.name = PIXELS
        notes.append(
            f"the graph itself divides the channels by {_numbers(contract.std)}: nvinfer has one factor for all"
        )
        contract = dataclasses.replace(contract, input_name=PIXELS, std=(1.0, 1.0, 1.0))
    if contract.outputs == "topk":
        name = contract.output_names[2]
        (value,) = (value for value in graph.graph.output if value.name == name)
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            wide = f"{name}_int64"
            free_names(graph, [wide])
            rename_tensors(graph, {name: wide})
            cast = helper.make_node("Cast", [wide], [name], name=f"{name}/int32", to=TensorProto.INT32)
            graph.graph.node.append(cast)
            value.name, value.type.tensor_type.elem_type = name, TensorProto.INT32
            notes.append("labels are int32 in place of int64, which not every nvinfer reads")
    check_graph(graph)
    return graph, contract, notes


# ---- files


def config_text(
    model: ServedModel, contract: ModelContract, name: str, precision: str, batch: int, notes: List[str]
) -> str:
    """nvinfer's configuration file."""
    files: Dict[str, object] = {"model-engine-file": f"{name}.engine"}
    if model.onnx is not None and precision != "int8":
        files = {"onnx-file": f"{name}.onnx", "model-engine-file": f"{name}.onnx_b{batch}_gpu0_{precision}.engine"}
    values: Dict[str, object] = {
        "gpu-id": 0,
        **files,
        "labelfile-path": "labels.txt",
        "custom-lib-path": f"libnvdsinfer_{name}.so",
        "parse-bbox-func-name": f"NvDsInferParse{function_suffix(name)}",
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": 0,
        "network-mode": MODES[precision],
        "batch-size": batch,
        "infer-dims": f"3;{contract.input_height_px};{contract.input_width_px}",
        "num-detected-classes": len(contract.class_names),
        "net-scale-factor": repr(float(1 / contract.std[0])),
        "offsets": ";".join(repr(float(value)) for value in contract.mean),
        "model-color-format": COLOURS[contract.channel_order],
        "maintain-aspect-ratio": int(contract.resize == "keep_ratio"),
        "symmetric-padding": 0,
        "scaling-filter": BILINEAR,
        "scaling-compute-hw": ON_GPU,
        "cluster-mode": NO_CLUSTERING,
    }
    lines = [f"# {note}" for note in ("Gst-nvinfer's configuration, written by deploy.handover.", *notes)]
    lines += ["", "[property]", *(f"{key}={value}" for key, value in values.items())]
    lines += ["", "[class-attrs-all]", f"pre-cluster-threshold={contract.score_threshold!r}"]
    return "\n".join(lines) + "\n"


def parser_source(contract: ModelContract, name: str) -> str:
    """The C++ source of the box parser."""
    values = {
        "name": name,
        "function": function_suffix(name),
        "nms_iou_threshold": repr(float(contract.nms_iou_threshold)),
        "max_detections": str(contract.max_detections),
        "in_rows": "true" if contract.outputs == "rows" else "false",
        "output_names": ", ".join(map(quoted, contract.output_names)),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], PARSER.read_text(encoding="utf-8"))


def function_suffix(name: str) -> str:
    """The end of the parser's name in C++."""
    return "_" + re.sub(r"\W", "_", name)


def _numbers(values: Tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


MAKEFILE = """\
# The box parser, in a DeepStream container or on a Jetson with DeepStream: make
DEEPSTREAM ?= /opt/nvidia/deepstream/deepstream
CUDA ?= /usr/local/cuda

libnvdsinfer_@name@.so: nvdsinfer_@name@.cpp
\t$(CXX) -std=c++14 -O2 -Wall -shared -fPIC -I$(DEEPSTREAM)/sources/includes -I$(CUDA)/include -o $@ $<
"""
