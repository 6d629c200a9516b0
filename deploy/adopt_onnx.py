"""
Takes in an ONNX detector from elsewhere: checks it against a contract that a person wrote, and writes its sidecar.

    python -m deploy.adopt_onnx nanodet.onnx --contract nanodet.json

Then every command takes the file, as it takes one of `deploy.export`. The contract is a JSON object with the fields of
`deploy.contract.ModelContract`, which says what each of them means:

    {"input_name": "image", "input_shape": [1, 3, 320, 320], "channel_order": "rgb",
     "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "pad_value": [0, 0, 0], "resize": "keep_ratio",
     "output_names": ["boxes", "scores", "labels"], "class_names": ["person", "car"], "category_ids": [1, 3],
     "score_threshold": 0.05, "nms_iou_threshold": 0.6, "max_detections": 100}

The graph itself has to give boxes, scores and labels in that form: decoding is the exporter's part. Needs onnx and, to
try the model on an empty image, onnxruntime.
"""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional

import numpy as np

from deploy.contract import OUTPUTS, ModelContract, sidecar_path, write_sidecar
from deploy.errors import ContractError, command
from deploy.files import check_writable, read_json
from deploy.graphs.graph import check_graph, check_static, load_onnx
from deploy.runtime.session import Arrays, OrtSession


def check_outputs(outputs: Arrays, contract: ModelContract) -> None:
    """
    Raises ContractError if the outputs of one inference are not of the types and shapes that the contract stands for.
    """
    rows = "N, K" if contract.outputs == "topk" else "D"
    for kind, name in zip(OUTPUTS[contract.outputs], contract.output_names):
        values = outputs[name]
        shape = f"({rows}, 4)" if kind == "boxes" else f"({rows})"
        type_ = "float32" if kind in ("boxes", "scores") else "integer"
        fits = values.ndim == shape.count(",") + 1 and (kind != "boxes" or values.shape[-1] == 4)
        of_type = values.dtype == np.float32 if type_ == "float32" else np.issubdtype(values.dtype, np.integer)
        if not (fits and of_type):
            raise ContractError(
                f"the output {name!r} is {values.shape}, {values.dtype}; expected {kind}: {shape}, {type_}. Export the "
                "model with its boxes decoded, or correct output_names"
            )
        if kind == "labels" and values.size and not 0 <= values.min() <= values.max() < len(contract.class_names):
            raise ContractError(
                f"the output {name!r} has labels from {values.min()} to {values.max()}; expected indices into the "
                f"{len(contract.class_names)} class_names"
            )


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Checks one model and writes its sidecar; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.adopt_onnx", description="Write the sidecar of an ONNX detector from elsewhere."
    )
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("--contract", required=True, metavar="FILE", help="JSON file: how to feed and read the model")
    arguments = parser.parse_args(argv)
    document = read_json(arguments.contract, ContractError, "a model contract")
    contract = ModelContract.from_json(document, arguments.contract)
    model = load_onnx(arguments.model)
    check_graph(model)
    check_static(model, dynamic_batch=contract.input_shape[0] == -1, dynamic_outputs=contract.outputs == "nms")
    path = sidecar_path(arguments.model)
    if path.exists():
        raise ContractError(f"{path} is there already; expected a model without a sidecar. Remove it to adopt it anew")
    check_writable(path)
    write_sidecar(arguments.model, {"contract": arguments.contract}, contract)
    try:
        with OrtSession(arguments.model) as session:
            shape = (max(1, contract.input_shape[0]), *contract.input_shape[1:])
            check_outputs(session.infer({contract.input_name: np.zeros(shape, contract.input_type)}), contract)
    except BaseException:
        path.unlink()
        raise
    print(f"wrote {path}: {arguments.model} can be used like a file of deploy.export")
    return 0


if __name__ == "__main__":
    sys.exit(main())
