"""
A model repository of Triton Inference Server, and its `config.pbtxt`.

Sources: docs/user_guide/model_repository.md and model_configuration.md of github.com/triton-inference-server/server,
and protobuf/model_config.proto of its repository `common`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, Sequence, Tuple

from deploy.contract import write_sidecar
from deploy.errors import ConfigError
from deploy.files import check_writable, new_folder, replacing
from deploy.runtime.session import TensorInfo
from deploy.serving.model import ServedModel
from deploy.targets import TARGETS

TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
}  # fmt: skip
"""numpy's name of a type -> Triton's."""
FILES = {False: ("onnxruntime", "model.onnx"), True: ("tensorrt", "model.plan")}
"""Whether it is an engine -> Triton's backend, and what that calls its file."""
CONTRACT = "contract"
"""The parameter in which a client finds the contract."""


def write_repository(model: ServedModel, name: str, version: int, most: int, repository: Path) -> List[str]:
    """
    Writes the model as `repository`/`name`, or adds a version to it; sentences for a user.

    Args:
        most: the largest batch that Triton may make, of a model that takes any number of images.

    Raises:
        ConfigError: this version is there already, or the model that is there has another configuration.
        PipelineError: it cannot be written.
    """
    text, notes = config_text(model, name, most)
    folder = repository / name
    config = folder / "config.pbtxt"
    if folder.exists():
        if (folder / str(version)).exists():
            raise ConfigError(
                f"{folder / str(version)} is there already; remove it, or give another --model-version or --name"
            )
        if not config.is_file() or config.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{config} is not what this model needs; expected a version of the same model: give another --name"
            )
        check_writable(config)
        with new_folder(folder / str(version)) as temporary:
            _write_version(model, temporary)
    else:
        with new_folder(folder) as temporary:  # whole or not there: Triton may be watching
            _write_version(model, temporary / str(version))
            (temporary / config.name).write_text(text, encoding="utf-8")
    return notes


def _write_version(model: ServedModel, folder: Path) -> None:
    path = folder / FILES[model.is_engine][1]
    with replacing(path) as temporary:
        temporary.write_bytes(model.path.read_bytes())
    write_sidecar(path, {"model": model.path}, model.contract, model.details)


def config_text(model: ServedModel, name: str, most: int) -> Tuple[str, List[str]]:
    """(`config.pbtxt`, sentences for a user)."""
    contract, notes = model.contract, []
    largest, reason = largest_batch(model, most)
    if reason:
        notes.append(f"no dynamic batching: {reason}")
    inputs: Sequence[TensorInfo] = [(contract.input_name, contract.input_type, contract.input_shape)]
    lines = [
        f"name: {quoted(name)}",
        f"backend: {quoted(FILES[model.is_engine][0])}",
        f"default_model_filename: {quoted(FILES[model.is_engine][1])}",
        f"max_batch_size: {largest}",
        *(_tensor("input", tensor, largest > 0) for tensor in inputs),
        *(_tensor("output", tensor, largest > 0) for tensor in model.outputs),
    ]
    if largest > 1:
        lines.append("dynamic_batching { }")
    if model.onnx is not None and model.onnx.is_quantised:
        if model.details.get("target") == TARGETS["tensorrt"].name:
            notes.append(
                "the file was quantised for TensorRT: ONNX Runtime computes the same, and is not fast at it. Hand over "
                "the engine that deploy.build_trt makes of it, or a file quantised with --target onnxruntime"
            )
        else:
            lines.append("instance_group { kind: KIND_CPU }")
            notes.append("it runs on the CPU, where ONNX Runtime has kernels for integers")
    if model.is_engine:
        lines.append("instance_group { kind: KIND_GPU }")
        notes.append(
            f"the engine runs on {model.details.get('device')} with TensorRT {model.details['tensorrt']} alone: "
            "Triton's must be that one"
        )
    value = quoted(json.dumps(contract.to_json()))
    lines.append(f"parameters {{ key: {quoted(CONTRACT)} value {{ string_value: {value} }} }}")
    return "\n".join(lines) + "\n", notes


def largest_batch(model: ServedModel, most: int) -> Tuple[int, str]:
    """
    (Triton's max_batch_size, why there is no dynamic batching or ""). 0: tensors have all their sizes, the first too.

    Raises:
        ConfigError: `most` is more than the engine takes.
    """
    if model.contract.outputs == "nms":
        return 0, "with NMS in the graph the outputs have no dimension for images. Export with --outputs topk or rows"
    if model.fewest == model.most:
        return 0, f"the graph takes {model.most} image(s), no other number. Export with --batch dynamic"
    if model.fewest > 1:
        return 0, f"the engine takes {model.fewest} images at least. Build it with --shapes 1 OPT MAX"
    if model.most is not None and most > model.most:
        raise ConfigError(f"--max-batch is {most}; the engine takes {model.most} images at most (its --shapes)")
    return most, ""


def _tensor(kind: str, tensor: TensorInfo, is_batched: bool) -> str:
    name, dtype, sizes = tensor
    dims = ", ".join(map(str, sizes[1:] if is_batched else sizes))
    return f"{kind} {{ name: {quoted(name)} data_type: {TYPES[dtype]} dims: [ {dims} ] }}"


def quoted(text: str) -> str:
    """A string of protobuf's text format: what is not plain ASCII as octal bytes."""
    letters = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode("utf-8")
    )
    return '"' + "".join(letters) + '"'
