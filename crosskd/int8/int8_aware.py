"""
What `crosskd.distill --quantize int8` does around the training: the INT8 model it starts with, and that it ends with.

The commands of the other stages do it, in processes of their own: `deploy.export` and `calibration.quantize`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosskd.data import TrainingData
from deploy.commands import run_command
from deploy.contract import ModelContract, load_contract, read_sidecar, weights_of_run
from deploy.errors import CheckpointError, ConfigError
from deploy.files import sha256_of, write_json
from deploy.int8_format import FloatReason, float_codes

if TYPE_CHECKING:
    from crosskd.int8.fake_quantization import FakeQuantization

START = "start.int8.onnx"
"""In the run directory: the student before the training, quantised."""


def check_start(weights: Path) -> None:
    """Raises CheckpointError if `--from` is not the weights file of a finished run."""
    if not weights.is_file() or weights != weights_of_run(weights.parent):
        raise CheckpointError(
            f"--from is {weights}; expected student.pth or detector.pth in the folder of a finished run, whose "
            "config.py lies beside it"
        )
    read_sidecar(weights)


def quantize_start(weights: Path, data: TrainingData, target: str, seed: int, run_dir: Path) -> None:
    """
    Writes the student of `weights` as the INT8 file START in `run_dir`, with ranges of images of its training.

    Raises:
        PipelineError: it cannot be exported or quantised; the reason is on stderr.
    """
    model = run_dir / "start.onnx"
    run_command("deploy.export", weights.parent, "-o", model)
    run_command(
        "calibration.quantize", model, "--target", target, "--seed", seed, "-o", run_dir / START,
        "--annotations", data.train.annotations_path, "--images-dir", data.train.images_dir,
        "--evaluation-annotations", data.val.annotations_path, "--evaluation-images-dir", data.val.images_dir,
    )  # fmt: skip


def float_model_of(int8: Path, weights: Path) -> Path:
    """
    The float ONNX file that an INT8 file was made of, found and checked by its sidecar.

    Raises:
        ContractError: a file is missing or was changed.
        ConfigError: it is not there any more, or is of other weights.
    """
    made_of = read_sidecar(int8)["inputs"].get("model")
    if made_of is None:
        raise ConfigError(f"{int8} was not written by calibration.quantize; expected an INT8 model with its sidecar")
    model = Path(made_of["file"])
    if not model.is_file():
        model = int8.with_name(model.name)  # the folder of both was moved
    if not model.is_file() or sha256_of(model) != made_of["sha256"]:
        raise ConfigError(
            f"{int8} was made of {made_of['file']}, which is not there any more, or changed; quantise it again"
        )
    exported = read_sidecar(model)["inputs"].get("weights", {})
    if exported.get("sha256") != sha256_of(weights):
        raise ConfigError(
            f"{int8} was made of the weights {exported.get('file')}; expected those of --from, {weights}: export and "
            "quantise those"
        )
    return model


def fake_quantization_of(detector: Any, int8: Path, weights: Path) -> FakeQuantization:
    """
    The rounding of the INT8 file for the detector, which has the weights that it was made of.

    Raises:
        As `float_model_of`, `read_quantized_graph` and `FakeQuantization`.
        ConfigError: the file is not for float32 images, one at a time, or has predictions in INT8.
    """
    import torch

    from crosskd.int8.fake_quantization import FakeQuantization
    from crosskd.int8.quantized_graph import read_quantized_graph
    from crosskd.models.deployed import example_input

    contract: ModelContract = load_contract(int8)
    model = float_model_of(int8, weights)
    if contract.input_type != "float32" or contract.input_shape[0] != 1:
        raise ConfigError(
            f"{int8} takes {contract.input_type} images of the shape {contract.input_shape}; expected one of an export "
            "without --batch and --input-type"
        )
    images: torch.Tensor = example_input(contract, 1)
    if read_sidecar(int8)["details"].get("int8_predictors"):
        raise ConfigError(
            f"{int8} has the products of its final predictions in INT8, which are not followed in training; expected "
            "them in float: quantise without --int8-predictors, and without --max-ap-drop, which tries it"
        )
    graph = read_quantized_graph(int8, model, {contract.input_name: images.numpy()})
    return FakeQuantization(detector, graph, images)


def write_int8(run_dir: Path, int8: Path, quantization: FakeQuantization) -> None:
    """
    Writes `student.onnx` and, with the trained ranges where `int8` had calibrated ones, `student.int8.onnx`.

    Raises:
        PipelineError: the student cannot be exported or quantised; the reason is on stderr.
    """
    details = read_sidecar(int8, details=("target",))["details"]
    chosen = [reason.code for reason in FloatReason if reason.is_chosen]
    kept = [name for name, code in float_codes(details).items() if code in chosen]
    ranges = run_dir / "int8.json"
    document = {
        "target": details["target"],
        "keep_float": kept,
        "weights_sha256": sha256_of(weights_of_run(run_dir)),
        "ranges": quantization.ranges(),
    }
    write_json(ranges, document)
    run_command("deploy.export", run_dir, "-o", run_dir / "student.onnx")
    trained = run_dir / "student.int8.onnx"
    run_command("calibration.quantize", run_dir / "student.onnx", "--ranges", ranges, "-o", trained)
    print(
        f"what training gained over {int8}: measure both with benchmarks.accuracy, the second with --against the first"
    )
