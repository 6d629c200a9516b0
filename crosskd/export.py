"""
Checkpoint -> ONNX, the part that needs torch and mmdet: what `python -m deploy.export RUN_DIR -o student.onnx` starts.

Takes the arguments of that command, and its sidecar names that command, whichever of the two was called.
"""

from __future__ import annotations

import sys
from typing import Any

from deploy.contract import weights_of_run, write_sidecar
from deploy.errors import command
from deploy.export_options import read_export_options


@command
def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    options = read_export_options("crosskd.export", words)

    from crosskd.models.contract import contract_from_config
    from crosskd.models.deployed import OPSET, onnx_from_detector
    from crosskd.run_dir import load_run

    config, detector, sidecar = load_run(options.run_dir)
    details = sidecar["details"]
    contract = contract_from_config(
        config,
        details["class_names"],
        details["category_ids"],
        options.size_px,
        batch=options.batch,
        input_type=options.input_type,
        outputs=options.outputs,
        output_names=options.output_names,
    )
    print_notes(config, detector.bbox_head, contract.resize)
    onnx_from_detector(detector, contract, options.output)
    write_sidecar(
        options.output,
        {"weights": weights_of_run(options.run_dir)},
        contract,
        {"opset": OPSET, "parameters": details["parameters"]},
        command=["python", "-m", "deploy.export", *words],
    )
    ranges = options.run_dir / "int8.json"
    if ranges.is_file():
        print(f"note: the run learnt ranges for INT8, which calibration.quantize --ranges {ranges} takes")
    print(
        f"wrote {options.output} ({options.output.stat().st_size / 2**20:.1f} MiB), input {contract.input_width_px} x "
        f"{contract.input_height_px}"
    )
    return 0


def print_notes(config: Any, head: Any, resize: str) -> None:
    """Prints in what the exported detector differs from mmdet's, a line each."""
    from crosskd.models.families import family_with_decoder

    note = family_with_decoder(type(head).__name__).note_of_export(head)
    if note:
        print(f"note: {note}")
    if resize == "keep_ratio" and any(
        one["type"] == "Resize" and len(set(one.get("scale", ()))) > 1
        for one in config.test_dataloader.dataset.pipeline
    ):
        print(
            "note: mmdet's Resize turns its size for images that are taller than wide; the network input has one size, "
            "into which they are fitted, smaller"
        )


if __name__ == "__main__":
    sys.exit(main())
