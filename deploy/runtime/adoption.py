"""
A detector from elsewhere made one of ours: its outputs understood, decoded in the graph, and tried on pictures.

Needs the packages onnx and onnxruntime.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

import numpy as np

from deploy.contract import ModelContract, write_sidecar
from deploy.errors import ContractError
from deploy.files import AnyPath, read_json
from deploy.graphs.decoding import LAYOUT_FIELDS, ORDINARY, Output, OutputLayout, add_decoding, opset_of, propose_parts
from deploy.graphs.foreign import (
    fix_output_shapes,
    float_from_half,
    fold_weights,
    free_our_names,
    keep_outputs,
    name_nodes,
    normalise_inputs,
)
from deploy.graphs.graph import check_graph, check_no_subgraph, save_onnx
from deploy.runtime.output_values import (
    CLEAR_FIT,
    CLEAR_GAP,
    are_fractions,
    are_logits,
    check_shapes,
    check_values,
    fits_of_formats,
    judged_rows,
    ordered_share,
)
from deploy.runtime.preprocess import preprocess
from deploy.runtime.session import Arrays, OrtSession

if TYPE_CHECKING:
    import onnx

OUTPUT_NAMES = ("boxes", "scores", "labels")
Pictures = Sequence[Tuple[str, np.ndarray]]


def check_pixel_scale(contract: ModelContract) -> None:
    """Raises ContractError if mean, std or pad_value are of pixels from 0 to 1, not from 0 to 255."""
    for field in ("mean", "pad_value"):
        values = getattr(contract, field)
        if 0 < max(values) <= 1 or max(values) > 255 or (field == "pad_value" and min(values) < 0):
            raise ContractError(
                f"{field} is {list(values)}; expected values of pixels, 0 to 255: multiply those of 0 to 1 by 255"
            )
    if min(contract.std) < 1:
        raise ContractError(
            f"std is {list(contract.std)}; expected what pixels of 0 to 255 are divided by: multiply one for pixels of "
            "0 to 1 by 255 (0.229 becomes 58.395; pixels that are only divided by 255 have mean 0 and std 255)"
        )


def read_adoption(path: AnyPath) -> Tuple[ModelContract, OutputLayout, Optional[Tuple[str, ...]]]:
    """
    (contract, layout of the outputs, their names or None for all) in a contract file for a model from elsewhere.

    The contract has the names that its outputs will have where they are decoded.

    Raises:
        ContractError: a field is missing, unknown or wrong.
    """
    document = read_json(path, ContractError, "a model contract")
    if not isinstance(document, dict):
        raise ContractError(f"{path}: contract is {document!r}; expected an object")
    fields = {name: value for name, value in document.items() if name in LAYOUT_FIELDS}
    rest = {name: value for name, value in document.items() if name not in LAYOUT_FIELDS}
    names = rest.pop("output_names", None)
    if names is not None and not (isinstance(names, list) and names and all(isinstance(one, str) for one in names)):
        raise ContractError(f"{path}: output_names is {names!r}; expected a list of names")
    if rest.get("outputs") == "rows":
        raise ContractError(
            f"{path}: outputs is 'rows'; expected 'topk' or 'nms'. Say with output_parts what is in the columns of one "
            "output, and it is taken apart: see docs/adopt-a-detector.md"
        )
    if rest.get("outputs") == "nms":
        if fields:
            raise ContractError(f"{path}: {sorted(fields)} are given; expected none of them with outputs 'nms'")
        return ModelContract.from_json({**rest, "output_names": names or []}, path), OutputLayout(), tuple(names or ())
    contract = ModelContract.from_json({**rest, "output_names": list(OUTPUT_NAMES)}, path)
    try:
        layout = OutputLayout.from_json(fields)
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from error
    return contract, layout, tuple(names) if names else None


def outputs_on(model: onnx.ModelProto, contract: ModelContract, pictures: Pictures, folder: Path) -> List[Arrays]:
    """
    The outputs for each picture, all of the batch alike.

    Raises:
        ContractError: ONNX Runtime cannot run the graph, or the sizes of the outputs depend on the picture.
    """
    import onnxruntime

    path = folder / "tried.onnx"
    save_onnx(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    names = [value.name for value in model.graph.output]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = [
            dict(zip(names, session.run(names, {contract.input_name: _feed(picture, contract)})))
            for _, picture in pictures
        ]
    except Exception as error:  # ONNX Runtime raises a dozen types, none of them documented
        raise ContractError(f"ONNX Runtime cannot run the graph: {error}. Export the model again") from error
    shapes = [{name: array.shape for name, array in one.items()} for one in found]
    if contract.outputs == "topk" and any(one != shapes[0] for one in shapes):
        raise ContractError(
            f"the sizes of the outputs depend on the picture: {shapes[0]}, then {shapes[1]}; expected fixed ones. "
            "Export the model without non-maximum suppression, or with a fixed number of rows"
        )
    return found


def _feed(picture: np.ndarray, contract: ModelContract) -> np.ndarray:
    batch = contract.input_shape[0]
    return np.repeat(preprocess(picture, contract).input, batch if batch > 0 else 2, axis=0)


def settled_layout(
    model: onnx.ModelProto, outputs: List[Output], layout: OutputLayout, contract: ModelContract, pictures: Pictures,
    folder: Path,
) -> Tuple[OutputLayout, List[str]]:  # fmt: skip
    """
    (the layout without an open field, a sentence for each that was found out from values).

    Raises:
        ContractError: the values leave a choice.
    """
    tried = _decoded(model, outputs, layout, contract)
    values = outputs_on(tried, contract, pictures, folder)
    rows = [judged_rows(one, contract) for one in values]
    scores = np.concatenate([one[contract.output_names[1]].ravel() for one in values])
    notes = []
    if layout.score_format is None:
        layout = dataclasses.replace(layout, score_format="probabilities")
        if are_logits(scores):
            lowest, highest = scores.min(), scores.max()
            if layout.background != "none":
                raise ContractError(
                    f"the scores are from {lowest:.3g} to {highest:.3g}: logits. With a background they may be of "
                    'a sigmoid or of a softmax; expected "score_format": "logits" or "softmax_logits"'
                )
            layout = dataclasses.replace(layout, score_format="logits")
            notes.append(f"score_format is logits: scores are from {lowest:.3g} to {highest:.3g}")
    if layout.decode == "none" and layout.box_units is None:
        fractions = are_fractions(rows, contract)
        if fractions and any("scores" in parts for parts in layout.output_parts or ()):
            raise ContractError(
                f"boxes are from {_ends(rows)} in a {contract.input_width_px} x {contract.input_height_px} input; "
                'expected "box_units": "fractions" if they are fractions of its size, or decode if they are yet to be '
                'decoded: "grid" as of YOLOX, "distances" or "bins"'
            )
        layout = dataclasses.replace(layout, box_units="fractions" if fractions else "pixels")
        if fractions:
            notes.append(f"box_units is fractions: boxes are from {_ends(rows)}")
    if layout.decode == "none" and layout.box_format is None:
        box_format, note = _format_of_boxes(rows, layout, contract)
        layout = dataclasses.replace(layout, box_format=box_format)
        notes += [note] if note else []
    if layout.decode != "none":
        layout = dataclasses.replace(layout, box_units="pixels")
    return layout, notes


def _ends(rows: Sequence[Any]) -> str:
    boxes = np.concatenate([one.boxes for one in rows])
    return f"{boxes.min():.3g} to {boxes.max():.3g}"


def _format_of_boxes(rows: Sequence[Any], layout: OutputLayout, contract: ModelContract) -> Tuple[str, str]:
    """(box_format, a sentence on why, empty for the default)."""
    fractions = layout.box_units == "fractions"
    width, height = (1, 1) if fractions else (contract.input_width_px, contract.input_height_px)
    share, fits = ordered_share(rows), fits_of_formats(rows, width, height)
    if share >= CLEAR_FIT:
        return "xyxy", ""
    told = ", ".join(f"{name} {100 * fit:.0f} %" for name, fit in fits.items())
    best, second = sorted(fits, key=lambda name: -fits[name])[:2]
    if fits["cxcywh"] >= CLEAR_FIT and any("scores" in parts for parts in layout.output_parts or ()):
        best, second = "cxcywh", "xyxy"  # what comes beside scores of each class is centres, where it is no corners
    if fits[best] < CLEAR_FIT or fits[best] - fits[second] < CLEAR_GAP:
        raise ContractError(
            f"the boxes are no two corners: only {100 * share:.0f} % have x1 < x2 and y1 < y2. Formats make sense of "
            f'so many boxes: {told}, which is not clear enough; expected "box_format": "cxcywh" (centre, width, '
            'height: YOLO, DETR) or "xywh" (first corner, width, height), or decode where they are yet to be decoded'
        )
    return best, f"box_format is {best}: formats make sense of so many boxes: {told}"


def _decoded(
    model: onnx.ModelProto, outputs: Sequence[Output], layout: OutputLayout, contract: ModelContract
) -> onnx.ModelProto:
    decoded = type(model)()
    decoded.CopyFrom(model)
    add_decoding(decoded, outputs, layout, contract)
    return decoded


def _layout_of_outputs(
    outputs: List[Output], layout: OutputLayout, contract: ModelContract, named: Optional[Sequence[str]]
) -> Tuple[OutputLayout, List[Output]]:
    """The layout with parts, and the outputs in the order of the contract where they are its three."""
    ranks = [len(output.shape) for output in outputs]
    if layout.output_parts is None and named and ranks == [3, 2, 2] and outputs[0].shape[2] == 4:
        if np.issubdtype(outputs[1].dtype, np.integer):
            _refuse(outputs, contract, named)
        return dataclasses.replace(layout, output_parts=ORDINARY), outputs
    layout = propose_parts(outputs, layout, contract)
    parts = layout.output_parts or ()
    if sorted(parts) == sorted(ORDINARY):
        if named and parts != ORDINARY:
            _refuse(outputs, contract, named)
        order = [parts.index(part) for part in ORDINARY]
        return dataclasses.replace(layout, output_parts=ORDINARY), [outputs[index] for index in order]
    return layout, outputs


def _refuse(outputs: Sequence[Output], contract: ModelContract, named: Sequence[str]) -> None:
    """Raises ContractError: the three outputs are not those that the contract names in this order."""
    empty = {output.name: np.zeros(output.shape, output.dtype) for output in outputs}
    check_shapes(empty, dataclasses.replace(contract, output_names=tuple(named)))


def adopt(
    model: onnx.ModelProto, contract: ModelContract, layout: OutputLayout, named: Optional[Tuple[str, ...]],
    pictures: Pictures, folder: Path,
) -> Tuple[onnx.ModelProto, ModelContract, List[str]]:  # fmt: skip
    """
    (graph of the one layout, its contract, what was done in sentences); the graph is the given one where that is none.

    Raises:
        ContractError: graph and contract do not go together, or what they leave open cannot be told.
        ExportError: the graph cannot be deployed.
    """
    check_graph(model)
    check_no_subgraph(model)
    notes = list(normalise_inputs(model, contract, layout.constant_inputs))
    notes += keep_outputs(model, named or [value.name for value in model.graph.output])
    notes += [*fold_weights(model), *float_from_half(model), *name_nodes(model), *free_our_names(model)]
    raw = outputs_on(model, contract, pictures, folder)
    if contract.outputs == "nms":
        check_shapes(raw[0], contract)
        return model, contract, notes
    outputs = [Output(name, array.shape, array.dtype) for name, array in raw[0].items()]
    layout, outputs = _layout_of_outputs(outputs, layout, contract, named)
    _check_labels(raw, outputs, layout)
    order = [output.name for output in outputs]
    if [value.name for value in model.graph.output] != order:
        list(keep_outputs(model, order))  # the same, in another order
    if layout.output_parts == ORDINARY and all(_is_of_contract(output, i) for i, output in enumerate(outputs)):
        ordinary = dataclasses.replace(contract, output_names=tuple(order))
    else:
        ordinary = None
    # What the values are found to be is asked of names that no output of the graph has.
    layout, found = settled_layout(model, outputs, layout, contract, pictures, folder)
    notes += found
    if ordinary is not None and layout.is_ordinary:
        contract = ordinary
        if contract.input_shape[0] > 0:
            notes += fix_output_shapes(model, {output.name: output.shape for output in outputs})
    else:
        parts = ", ".join(f"{output.name}: {' + '.join(p)}" for output, p in zip(outputs, layout.output_parts or ()))
        opset, model = opset_of(model), _decoded(model, outputs, layout, contract)
        if opset_of(model) != opset:
            notes.append(f"the opset is raised from {opset} to {opset_of(model)}")
        notes.append(f"the outputs ({parts}) are decoded in the graph to {', '.join(contract.output_names)}")
    return model, contract, notes


def _check_labels(raw: Sequence[Arrays], outputs: Sequence[Output], layout: OutputLayout) -> None:
    """Raises ContractError if what is taken for labels, where they are no integers by type, has other values."""
    for output, parts in zip(outputs, layout.output_parts or ()):
        if parts[-1] != "label":
            continue
        for arrays in raw:
            values = arrays[output.name]
            labels = values if len(parts) == 1 else np.moveaxis(values, -1, 0)[-1]
            if not np.array_equal(labels, np.rint(labels)):
                raise ContractError(
                    f"{output.name!r} is taken for labels and has values such as {labels.ravel()[0]:.4g}; expected "
                    "whole numbers. Correct the order of output_names, or say with output_parts what each output holds"
                )


def _is_of_contract(output: Output, index: int) -> bool:
    """Whether it has the rank and the type of the output at `index` of a contract."""
    if index == 2:
        return len(output.shape) == 2 and bool(np.issubdtype(output.dtype, np.integer))
    return len(output.shape) == (3 if index == 0 else 2) and output.dtype == np.float32


def check_on_pictures(model: onnx.ModelProto, contract: ModelContract, pictures: Pictures, folder: Path) -> int:
    """
    How many rows count, of all pictures together.

    Raises:
        ContractError: what the model gives for a picture cannot be detections, as `check_values`.
    """
    found = 0
    path = folder / "adopted.onnx"
    save_onnx(model, path)
    write_sidecar(path, {}, contract)
    with OrtSession(path) as session:
        for name, picture in pictures:
            outputs = session.infer({contract.input_name: _feed(picture, contract)})
            check_shapes(outputs, contract)
            check_values(outputs, contract, name)
            found += int(np.sum(outputs[contract.output_names[1]] > contract.score_threshold))
    return found
