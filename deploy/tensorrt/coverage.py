"""In which precision an engine's layers run, as TensorRT's inspector says it."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType
from typing import Any, Dict, List, Mapping, Tuple

from deploy.errors import EngineBuildError
from deploy.tensorrt.bindings import logger
from deploy.tensorrt.options import BuildOptions

TYPE_WORDS = (("int8", r"int8"), ("fp16", r"fp16|half"), ("fp32", r"fp32|float(?!\d)|float32"))
"""Precision -> how the inspector writes it: "Row major linear FP32", "... vectorized row major Int8 format", "Half"."""


def coverage(trt: ModuleType, plan: bytes, options: BuildOptions) -> Dict[str, Any]:
    """
    What TensorRT's inspector says about the engine's layers, as `coverage_from_json`.

    Where shapes are dynamic it says nothing of types without a context whose shapes are set ("N/A due to dynamic
    shapes"): they are those of the usual batch.

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
    inspector = engine.create_engine_inspector()
    if options.shapes is not None:
        inspector.execution_context = _context_of_usual_batch(trt, engine)
    return coverage_from_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _context_of_usual_batch(trt: ModuleType, engine: Any) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise EngineBuildError(f"TensorRT {trt.__version__} cannot start its own engine: {logger(trt).reasons()}")
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            context.set_input_shape(name, tuple(engine.get_tensor_profile_shape(name, 0)[1]))
    return context


def coverage_from_json(text: str) -> Dict[str, Any]:
    """
    Count and share of layers by the type that they work on: that of their first floating-point or INT8 input, or of
    their weights where the types of tensors are not told.

    Keys: `layers` and `convolutions`, each {"int8" | "fp16" | "fp32" | "other": {"count", "share"}}; `reformats`:
    layers that only copy and convert, which are not counted in `layers`; `compiled`: blocks that TensorRT compiled as
    one (Myelin's and the DLA's "ForeignNode"), whose inside it does not tell, and which are "other"; `reason`: None, or
    why the others are None, where the text's form is not known.

    Args:
        text: of EngineInspector.get_engine_information, JSON. Each layer is an object if the engine was built with
            detailed profiling, else a name. Its inputs have a "Format/Datatype" up to TensorRT 10, and these two apart
            in 11.
    """
    try:
        document = json.loads(text)
        layers = document["Layers"]
        if not any(isinstance(layer, dict) for layer in layers):
            return _unknown("the inspector gives names of layers and no types")
        pairs = [_kind_and_precision(layer) if isinstance(layer, dict) else ("other", "other") for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _unknown(f"the inspector's text has an unknown form: {error!r:.100}")
    kinds = [kind for kind, _ in pairs]
    if all(precision == "other" for _, precision in pairs):
        blocks = kinds.count("compiled")
        inside = f"; {blocks} of its layers are blocks that were compiled as one (on a DLA, say)" if blocks else ""
        return {**_unknown(f"the inspector gives no types that are known{inside}"), "compiled": blocks}
    return {
        "layers": _shares([precision for kind, precision in pairs if kind != "reformat"]),
        "convolutions": _shares([precision for kind, precision in pairs if kind == "convolution"]),
        "reformats": kinds.count("reformat"),
        "compiled": kinds.count("compiled"),
        "reason": None,
    }


def _unknown(reason: str) -> Dict[str, Any]:
    return {"layers": None, "convolutions": None, "reformats": None, "compiled": None, "reason": reason}


def _kind_and_precision(layer: Mapping[str, Any]) -> Tuple[str, str]:
    words = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
    if "ForeignNode" in str(layer.get("Name", "")) or "myelin" in words:
        return "compiled", "other"
    if "reformat" in words or "noop" in words:
        return "reformat", _precision_of(layer)
    # What Myelin makes of a convolution is a "gemm" or "fusion"; the kernel's name has cuDNN's word for its kind.
    is_convolution = "conv" in words or "fprop" in str(layer.get("TacticName", "")).lower()
    return "convolution" if is_convolution else "other", _precision_of(layer)


def _precision_of(layer: Mapping[str, Any]) -> str:
    tensors = [tensor for tensor in layer.get("Inputs") or layer.get("Outputs") or [] if isinstance(tensor, dict)]
    texts = [
        " ".join(str(value) for key, value in tensor.items() if "datatype" in key.lower()).lower() for tensor in tensors
    ]
    weights = layer.get("Weights")
    if isinstance(weights, dict):
        texts.append(str(weights.get("Type", "")).lower())
    for text in texts:
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
        print(
            f"warning: nothing tells whether the engine has INT8 layers: {found['reason']}. It is kept, and not called "
            "INT8: compare its latency with that of --fp16.",
            file=sys.stderr,
        )
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


def words_of_precision(details: Mapping[str, Any]) -> str:
    """
    What an engine may be called: its precision, but not "int8" where no layer is known to be INT8.

    Args:
        details: of an engine's sidecar.
    """
    precision, layers = str(details["precision"]), (details.get("coverage") or {}).get("layers")
    if precision != "int8" or (layers is not None and layers["int8"]["count"]):
        return precision
    return "int8 asked for, not seen in its layers"
