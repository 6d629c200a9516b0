"""crosskd.distill --quantize int8: the run it leaves, the INT8 file with trained ranges, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from calibration import quantize
from crosskd import distill, export
from crosskd.config import load_config, set_classes
from crosskd.int8 import int8_aware
from crosskd.models.checkpoint import read_checkpoint
from crosskd.models.deployed import example_input
from crosskd.models.detector import detector_from_config
from crosskd.models.starting_weights import start_from_checkpoint
from crosskd.run_dir import load_run
from crosskd.training import TrainingOptions
from deploy.contract import load_contract, read_sidecar, write_sidecar
from deploy.errors import CheckpointError, ConfigError
from deploy.files import sha256_of
from deploy.graphs.cleaning import run_once
from deploy.graphs.graph import load_onnx
from deploy.int8_format import SCALE_SUFFIX


@pytest.fixture(scope="module")
def words(configs: Path, shapes_dir: Path, teacher_run: Path) -> list[str]:
    """Of crosskd.distill, without what makes it INT8-aware."""
    teacher = ["--teacher-checkpoint", str(teacher_run / "detector.pth"), "--teacher-images", "0"]
    return [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), *teacher]


@pytest.fixture(scope="module")
def run_dir(words: list[str], student_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8-aware run for ONNX Runtime, of one epoch."""
    run_dir = tmp_path_factory.mktemp("runs") / "int8"
    start = ["--quantize", "int8", "--from", str(student_run / "student.pth"), "--target", "onnxruntime"]
    assert distill.main([*words, *start, "-o", str(run_dir), "--set", f"{distill.LEARNING_RATE}=0.01"]) == 0
    return run_dir


def _nodes(path: Path) -> list[tuple[str, list[str], list[str]]]:
    """Of an ONNX file: operator, inputs but for constants, outputs."""
    model = load_onnx(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        (node.op_type, [name for name in node.input if name not in constants], list(node.output))
        for node in model.graph.node
    ]


def _scales(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith(SCALE_SUFFIX)}


def test_the_int8_file_is_the_same_graph_with_the_trained_ranges(run_dir: Path) -> None:
    assert _nodes(run_dir / "student.int8.onnx") == _nodes(run_dir / int8_aware.START)
    before, after = (_scales(load_onnx(run_dir / name)) for name in (int8_aware.START, "student.int8.onnx"))
    document = json.loads((run_dir / "int8.json").read_text())
    assert document["target"] == "onnxruntime"
    assert document["keep_float"] == []
    assert len(document["ranges"]) > 30
    for tensor, (smallest, largest) in document["ranges"].items():
        assert after[f"{tensor}_scale"] == pytest.approx((largest - smallest) / 255, rel=1e-6)
    moved = [tensor for tensor in document["ranges"] if after[f"{tensor}_scale"] != before[f"{tensor}_scale"]]
    assert len(moved) > 10  # of two steps of warming up


def test_the_student_is_a_plain_one_that_learnt(run_dir: Path, student_run: Path) -> None:
    _, student, sidecar = load_run(run_dir)
    _, before, _ = load_run(student_run)
    assert sidecar["inputs"]["load_from"]["sha256"] == sha256_of(student_run / "student.pth")
    assert sidecar["inputs"]["calibrated"]["sha256"] == sha256_of(run_dir / int8_aware.START)
    assert sidecar["details"]["precision"] == "OptimWrapper"  # float32
    state, old = student.state_dict(), before.state_dict()
    assert state.keys() == old.keys()
    assert not torch.equal(state["bbox_head.cls_convs.0.conv.weight"], old["bbox_head.cls_convs.0.conv.weight"])
    assert all(torch.equal(state[key], old[key]) for key in state if "running" in key)


def test_a_checkpoint_to_resume_from_holds_the_ranges(run_dir: Path) -> None:
    state = read_checkpoint(run_dir / "epoch_1.pth")["state_dict"]
    assert state["quantization.offsets"].abs().max() > 0


def test_a_run_goes_on_with_the_ranges_that_it_was_started_with(
    run_dir: Path, student_run: Path, configs: Path
) -> None:
    config = load_config(configs / "crosskd_tiny.py")
    class_names = tuple(read_sidecar(run_dir / "student.pth")["details"]["class_names"])
    set_classes(config, class_names)
    detector = detector_from_config(config, load_weights=False)
    state = read_checkpoint(run_dir / "epoch_1.pth")["state_dict"]
    with pytest.raises(ConfigError, match="other ranges of INT8, or one of the two is without INT8"):
        detector.load_state_dict(state)
    weights = student_run / "student.pth"
    start_from_checkpoint(detector.student, weights, class_names)
    detector.quantization = int8_aware.fake_quantization_of(detector.student, run_dir / int8_aware.START, weights)
    detector.load_state_dict(state)
    assert torch.equal(detector.quantization.offsets, state["quantization.offsets"])
    detector.quantization.calibrated.mul_(1.01)
    with pytest.raises(ConfigError, match="other ranges of INT8"):
        detector.load_state_dict(state)
    with pytest.raises(ConfigError, match="other ranges of INT8"):
        detector.load_state_dict({key: value for key, value in state.items() if "quantization" not in key})


def test_a_resumed_run_makes_no_other_int8_file(run_dir: Path, tmp_path: Path) -> None:
    def started_with(folder: Path, calibrated: Path | None = None, target: str | None = None) -> Path:
        training = TrainingOptions(folder, resume=True)
        distillation = distill.DistillationOptions(int8=True, calibrated=calibrated, target=target)
        return distill.int8_to_start_with(training, distillation, None)

    assert started_with(run_dir) == started_with(run_dir, target="onnxruntime") == run_dir / int8_aware.START
    with pytest.raises(ConfigError, match="started for the target onnxruntime, --target is tensorrt"):
        started_with(run_dir, target="tensorrt")
    with pytest.raises(ConfigError, match="resume with the --calibrated that the run was started with"):
        started_with(run_dir, calibrated=tmp_path / "gone.onnx")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        started_with(tmp_path)


def test_the_files_run_and_say_what_they_are_of(run_dir: Path) -> None:
    contract = load_contract(run_dir / "student.int8.onnx")
    feed = {contract.input_name: example_input(contract, 1).numpy()}
    assert len(run_once(run_dir / "student.int8.onnx", feed)) == 3
    sidecar = read_sidecar(run_dir / "student.int8.onnx")
    assert sidecar["inputs"]["model"]["sha256"] == sha256_of(run_dir / "student.onnx")
    assert sidecar["inputs"]["ranges"]["sha256"] == sha256_of(run_dir / "int8.json")


def test_another_export_is_told_of_the_ranges(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, int8 = tmp_path / "x.onnx", tmp_path / "x.int8.onnx"
    assert export.main([str(run_dir), "--input-type", "uint8", "-o", str(model)]) == 0
    assert f"calibration.quantize --ranges {run_dir / 'int8.json'} takes" in capsys.readouterr().out
    assert quantize.main([str(model), "--ranges", str(run_dir / "int8.json"), "-o", str(int8)]) == 0


def test_a_model_that_is_calibrated_already_is_taken_as_it_is(run_dir: Path, student_run: Path) -> None:
    _, student, _ = load_run(student_run)
    fake = int8_aware.fake_quantization_of(student, run_dir / int8_aware.START, student_run / "student.pth")
    scales = _scales(load_onnx(run_dir / int8_aware.START))
    for source, scale in zip(fake.sources, fake.scales.tolist(), strict=True):
        assert scale == pytest.approx(float(scales[f"{source}_scale"]), rel=1e-6)


def test_a_calibrated_model_of_other_weights_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"was made of the weights .*; expected those of --from"):
        int8_aware.float_model_of(run_dir / int8_aware.START, run_dir / "student.pth")


def test_a_calibrated_model_without_its_float_model_is_refused(
    run_dir: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("start.int8.onnx", "start.int8.onnx.json"):
        shutil.copy(run_dir / name, tmp_path)
    write_sidecar("start.int8.onnx", {"model": str(run_dir / "start.onnx")}, load_contract("start.int8.onnx"))
    document = json.loads(Path("start.int8.onnx.json").read_text())
    document["inputs"]["model"]["file"] = "gone.onnx"
    Path("start.int8.onnx.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"made of gone.onnx, which is not there any more"):
        int8_aware.float_model_of(Path("start.int8.onnx"), student_run / "student.pth")
    write_sidecar("start.int8.onnx", {}, load_contract("start.int8.onnx"))
    with pytest.raises(ConfigError, match=r"was not written by calibration.quantize"):
        int8_aware.float_model_of(Path("start.int8.onnx"), student_run / "student.pth")


def test_the_float_model_is_found_in_a_folder_that_was_moved(run_dir: Path, student_run: Path, tmp_path: Path) -> None:
    for path in run_dir.glob("start*"):
        shutil.copy(path, tmp_path)
    sidecar = tmp_path / f"{int8_aware.START}.json"
    document = json.loads(sidecar.read_text())
    document["inputs"]["model"]["file"] = "gone/start.onnx"
    sidecar.write_text(json.dumps(document))
    found = int8_aware.float_model_of(tmp_path / int8_aware.START, student_run / "student.pth")
    assert found == tmp_path / "start.onnx"


@pytest.mark.parametrize(
    "override", [{}, {"optim_wrapper.optimizer.lr": 0.5}, {"optim_wrapper.optimizer": {"type": "SGD", "lr": 0.5}}]
)
def test_the_learning_rate_is_a_tenth_unless_it_is_given_and_weights_are_not_averaged(
    override: dict[str, Any], configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TrainingOptions(Path("run"), override)
    config = load_config(configs / "crosskd_tiny.py", override)
    default = load_config(configs / "crosskd_tiny.py").optim_wrapper.optimizer.lr / 10
    assert distill.fine_tuning_options(config, "c.py", training).precision == "fp32"
    assert config.optim_wrapper.optimizer.lr == (0.5 if override else default)
    config.custom_hooks = [dict(type="EMAHook"), *config.custom_hooks]
    distill.fine_tuning_options(config, "c.py", training)
    assert [hook.type for hook in config.custom_hooks] == ["FreezeHeadNormsHook"]
    assert "the EMAHook of c.py is left out" in capsys.readouterr().out


def test_weights_that_are_no_finished_run_are_refused(student_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--from is .*; expected student.pth or detector.pth"):
        int8_aware.check_start(student_run / "epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"--from is nope.pth"):
        int8_aware.check_start(Path("nope.pth"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quantize", "int8"], "--quantize int8 is given without --from"),
        (["--target", "tensorrt"], "--target is given without --quantize int8"),
        (["--calibrated", "x.onnx"], "--calibrated is given without --quantize int8"),
        (["--quantize", "int8", "--from", "x.pth", "--ema"], "--ema is given with --quantize int8"),
        (
            ["--quantize", "int8", "--from", "x.pth", "--target", "tensorrt", "--calibrated", "x.onnx"],
            "--target is given with --calibrated",
        ),
        (["--quantize", "int8", "--from", "x.pth"], "--from is x.pth; expected student.pth or detector.pth"),
    ],
)
def test_what_does_not_go_together_is_one_message(
    more: list[str], message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main([*words, *more, "-o", str(tmp_path / "run")]) == 2
    *notes, error = capsys.readouterr().err.splitlines()  # notes on the data may come before
    assert error.startswith(f"error: {message}")
    assert not [note for note in notes if note.startswith(("error", "Traceback"))]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
