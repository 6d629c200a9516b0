"""In which precision an engine's layers run, as TensorRT's inspector says it."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType
from typing import Any, Dict, List, Mapping

from deploy.errors import EngineBuildError
from deploy.tensorrt.bindings import logger
from deploy.tensorrt.options import BuildOptions

TYPE_WORDS = (("int8", r"int8"), ("fp16", r"fp16|half"), ("fp32", r"fp32|float(?!\d)|float32"))
"""Precision -> how the inspector writes it: "Row major linear FP32", "... vectorized row major Int8 format", "Half"."""


def coverage(trt: ModuleType, plan: bytes, options: BuildOptions) -> Dict[str, Any]:
    """
    What TensorRT's inspector says about the engine's layers, as `coverage_from_json`.

    Raises:
        EngineBuildError: the engine cannot be read back.
    """
    log = logger(trt)
    log.errors.clear()
    runtime = trt.Runtime(log)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # such an engine holds code of the host's; it was built just now
    if options.dla_core is not None:
        runtime.DLA_core = options.dla_core
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError(f"TensorRT {trt.__version__} cannot read its own engine: {log.reasons()}")
    return coverage_from_json(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def coverage_from_json(text: str) -> Dict[str, Any]:
    """
    Count and share of layers by the type that they work on (that of their first floating-point or INT8 input).

    Keys: `layers` and `convolutions`, each {"int8" | "fp16" | "fp32" | "other": {"count", "share"}}; `reformats`:
    layers that only copy and convert, which are not counted in `layers`; `compiled`: blocks that TensorRT compiled as
    one, whose inside it does not tell; `reason`: None, or why the others are None, where the text's form is not known.

    Args:
        text: of EngineInspector.get_engine_information, JSON. Each layer is an object if the engine was built with
            detailed profiling, else a name. Its inputs have a "Format/Datatype" up to TensorRT 10, and these two apart
            in 11.
    """
    try:
        document = json.loads(text)
        layers = document["Layers"]
        if not layers or not all(isinstance(layer, dict) for layer in layers):
            return _unknown("the inspector gives names of layers and no types")
        kinds = [_kind_of(layer) for layer in layers]
        precisions = [_precision_of(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _unknown(f"the inspector's text has an unknown form: {error!r}")
    if all(precision == "other" for precision in precisions):
        return _unknown("the inspector gives no types that are known")
    pairs = list(zip(kinds, precisions))
    return {
        "layers": _shares([precision for kind, precision in pairs if kind != "reformat"]),
        "convolutions": _shares([precision for kind, precision in pairs if kind == "convolution"]),
        "reformats": kinds.count("reformat"),
        "compiled": kinds.count("compiled"),
        "reason": None,
    }


def _unknown(reason: str) -> Dict[str, Any]:
    return {"layers": None, "convolutions": None, "reformats": None, "compiled": None, "reason": reason}


def _kind_of(layer: Mapping[str, Any]) -> str:
    words = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
    if "reformat" in words or "noop" in words:
        return "reformat"
    if "ForeignNode" in str(layer["Name"]) or "myelin" in words:
        return "compiled"
    return "convolution" if "conv" in words else "other"


def _precision_of(layer: Mapping[str, Any]) -> str:
    for tensor in layer["Inputs"] or layer["Outputs"]:
        text = " ".join(str(value) for key, value in tensor.items() if "datatype" in key.lower()).lower()
        for precision, words in TYPE_WORDS:
            if re.search(rf"\b(?:{words})\b", text):
                return precision
    return "other"


def _shares(precisions: List[str]) -> Dict[str, Dict[str, float]]:
    return {
        precision: {
            "count": precisions.count(precision),
            "share": round(precisions.count(precision) / len(precisions), 4) if precisions else 0.0,
        }
        for precision in ("int8", "fp16", "fp32", "other")
    }


def check_precision(found: Mapping[str, Any], precision: str) -> None:
    """
    Raises EngineBuildError if an engine that shall have INT8 has none.

    Args:
        found: of `coverage`.
    """
    if precision != "int8":
        return
    if found["layers"] is None:
        print(f"warning: nothing tells whether the engine has INT8 layers: {found['reason']}", file=sys.stderr)
    elif found["layers"]["int8"]["count"] == 0:
        if found["compiled"] == 0:
            raise EngineBuildError(
                "the engine has no INT8 layer, so it was not kept: TensorRT found FP16 faster everywhere, or the "
                "device has no INT8. Build with --fp16, or try another --scales or --opt-level."
            )
        print(
            f"warning: no INT8 layer is seen in the engine; {found['compiled']} blocks were compiled as one, and may "
            "have some inside: compare its latency with that of --fp16",
            file=sys.stderr,
        )
