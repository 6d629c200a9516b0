"""
Command: takes in an ONNX detector from elsewhere, with a contract that a person wrote, and writes its sidecar.

    python -m deploy.adopt_onnx nanodet.onnx --contract nanodet.json --image photo.jpg

Then every command takes the file, as it takes one of `deploy.export`. The contract is a JSON object with the fields of
`deploy.contract.ModelContract`, which says what each of them means:

    {"input_name": "image", "input_shape": [1, 3, 320, 320], "channel_order": "rgb",
     "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "pad_value": [0, 0, 0], "resize": "keep_ratio",
     "output_names": ["boxes", "scores", "labels"], "class_names": ["person", "car"], "category_ids": [1, 3],
     "score_threshold": 0.05, "nms_iou_threshold": 0.6, "max_detections": 100}

Where the outputs are others than boxes in pixels, scores and labels, further fields say how to read them, those of
`deploy.graphs.decoding.OutputLayout`; docs/adopt-a-detector.md has them for families of detectors. The decoding becomes
part of the graph. A graph that has to be changed is written to another file (`-o`, or NAME.adopted.onnx), its weights
with it; the model itself stays as it is.

The values are looked at on pictures: that of `--image`, on which the detector should find something, and two that are
generated. Needs numpy, OpenCV, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence

from deploy.contract import external_files, sidecar_path, write_sidecar
from deploy.errors import ConfigError, ContractError, command
from deploy.files import check_writable
from deploy.graphs.graph import check_graph, check_static, load_onnx, save_onnx
from deploy.images import read_image
from deploy.runtime.adoption import adopt, check_on_pictures, check_pixel_scale, read_adoption
from deploy.runtime.output_values import generated_pictures


@command
def main(argv: Optional[List[str]] = None) -> int:
    arguments = _parser().parse_args(argv)
    contract, layout, named = read_adoption(arguments.contract)
    check_pixel_scale(contract)
    source: Path = arguments.model
    pictures = generated_pictures(contract.input_width_px, contract.input_height_px)
    if arguments.image:
        pictures = [(str(arguments.image), read_image(arguments.image)), *pictures]
    model = load_onnx(source)
    data = external_files(source)
    with tempfile.TemporaryDirectory() as folder:
        model, contract, notes = adopt(model, contract, layout, named, pictures, Path(folder))
        if data:
            notes.insert(0, f"the weights in {', '.join(data)} are in the one file")
        output = arguments.output or (source.with_name(f"{source.stem}.adopted{source.suffix}") if notes else source)
        _check_output(output, source, notes)
        check_graph(model)
        check_static(model, contract.input_shape[0] == -1, contract.outputs == "nms")
        found = check_on_pictures(model, contract, pictures, Path(folder))
    is_new = output.resolve() != source.resolve()
    inputs = {"contract": arguments.contract}
    if is_new:
        save_onnx(model, output)
        inputs["model"] = source
        inputs.update((f"model data {index + 1}", source.with_name(name)) for index, name in enumerate(data))
    write_sidecar(output, inputs, contract, {"adopted": notes})
    for note in notes:
        print(note)
    if not found:
        print(
            f"no row scored above {contract.score_threshold:g} on {len(pictures)} pictures: that boxes and labels are "
            "as the contract says is not tried. Give a photo in which the detector finds something, with --image"
        )
    print(f"wrote {output if is_new else sidecar_path(output)}: {output} can be used like a file of deploy.export")
    return 0


def _check_output(output: Path, source: Path, notes: Sequence[str]) -> None:
    """Raises ConfigError, ContractError or PipelineError if the file, or its sidecar, is not to be written."""
    is_source = output.resolve() == source.resolve()
    if output.suffix != ".onnx":
        raise ConfigError(f"{output} is to be written; expected a file with the suffix .onnx. Name one with --output")
    if is_source and notes:
        raise ConfigError(
            f"--output is the model itself, whose graph has to be changed ({notes[0]}); expected another file"
        )
    for path in [sidecar_path(output)] if is_source else [output, sidecar_path(output)]:
        if path.exists():
            expected = "a model without a sidecar" if is_source else "a new file"
            raise ContractError(f"{path} is there already; expected {expected}. Remove it to adopt the model anew")
        check_writable(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.adopt_onnx",
        description="Take in an ONNX detector from elsewhere, and write its sidecar.",
    )
    parser.add_argument("model", type=Path, help="ONNX file")
    parser.add_argument("--contract", required=True, metavar="FILE", help="JSON file: how to feed and read the model")
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="a photo in which it finds something (default: generated pictures)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="ONNX file to write (default: none where the model can stay as it is, else NAME.adopted.onnx)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
