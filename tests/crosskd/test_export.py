"""The commands crosskd.export, and deploy.export, which starts it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("mmdet")

from crosskd import adopt, export  # noqa: E402
from crosskd.config import load_config, set_classes  # noqa: E402
from crosskd.models import deployed  # noqa: E402
from crosskd.models.checkpoint import save_detector_weights  # noqa: E402
from crosskd.models.detector import detector_from_config  # noqa: E402
from crosskd.run_dir import load_run  # noqa: E402
from crosskd.shapes import write_shapes  # noqa: E402
from deploy import export as deploy_export  # noqa: E402
from deploy.contract import load_contract, read_sidecar  # noqa: E402
from deploy.errors import ExportError  # noqa: E402
from deploy.graphs.graph import load_onnx  # noqa: E402
from deploy.runtime.session import OrtSession, candidates  # noqa: E402

TINY = Path(__file__).parent / "configs" / "gfl_tiny.py"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_shapes(folder / "shapes", images=12, size_px=96, seed=2)
    config = load_config(TINY)
    set_classes(config, tuple("abcdef"))
    torch.manual_seed(0)
    save_detector_weights(detector_from_config(config), folder / "weights.pth", meta={})
    words = [str(TINY), "--checkpoint", str(folder / "weights.pth"), "--data", str(folder / "shapes")]
    assert adopt.main([*words, "-o", str(folder / "run"), "--set", "model.test_cfg.score_thr=0.05"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    output = run_dir.parent / "student.onnx"
    assert export.main([str(run_dir), "-o", str(output)]) == 0
    return output


def test_the_sidecar_has_the_contract_and_the_hash_of_the_weights(exported: Path, run_dir: Path) -> None:
    contract = load_contract(exported)
    assert contract.input_shape == (1, 3, 64, 96)
    assert contract.channel_order == "rgb"
    assert contract.pad_value == (124.0, 116.0, 104.0)
    assert contract.class_names == ("circle", "triangle", "square", "star", "ring", "cross")
    assert contract.category_ids == (1, 2, 3, 4, 5, 6)
    assert (contract.score_threshold, contract.nms_iou_threshold, contract.max_detections) == (0.05, 0.6, 100)
    sidecar = read_sidecar(exported)
    assert sidecar["inputs"]["weights"]["sha256"] == read_sidecar(run_dir / "detector.pth")["artefact"]["sha256"]
    assert sidecar["details"]["parameters"] == sum(p.numel() for p in load_run(run_dir)[1].parameters())


def test_flags_are_written_in_the_contract(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    flags = ["--batch", "dynamic", "--input-type", "uint8", "--outputs", "nms"]
    assert export.main([str(run_dir), "-o", str(output), *flags]) == 0
    contract = load_contract(output)
    assert (contract.input_type, contract.outputs, contract.input_shape) == ("uint8", "nms", (-1, 64, 96, 3))
    with OrtSession(output, threads=1) as session:
        images = session.infer({"image": np.random.randint(0, 256, (3, 64, 96, 3), np.uint8)})["images"]
    assert set(images) <= {0, 1, 2}


def test_outputs_are_laid_out_and_named_as_asked(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    rows, named = tmp_path / "rows.onnx", tmp_path / "named.onnx"
    assert export.main([str(run_dir), "-o", str(rows), "--outputs", "rows", "--output-names", "output0"]) == 0
    assert export.main([str(run_dir), "-o", str(named), "--output-names", "where", "how_sure", "what"]) == 0
    image = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    found = []
    for path in (exported, rows, named):
        with OrtSession(path, threads=1) as session:
            found.append(candidates(session.infer({"image": image}), session.contract, 0))
    assert load_contract(rows).output_names == ("output0",)
    assert load_contract(named).output_names == ("where", "how_sure", "what")
    for parts in zip(*found, strict=True):
        assert np.array_equal(parts[0], parts[1])
        assert np.array_equal(parts[0], parts[2])


@pytest.mark.parametrize("batch", ["0", "-2", "many"])
def test_a_batch_of_no_images_is_refused(batch: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main([str(run_dir), "-o", "x.onnx", f"--batch={batch}"])
    assert "expected 1 or more, or 'dynamic'" in capsys.readouterr().err


def test_another_size_is_exported_on_request(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "wide.onnx"
    assert export.main([str(run_dir), "-o", str(output), "--size", "160", "96"]) == 0
    assert load_contract(output).input_shape == (1, 3, 96, 160)
    with OrtSession(output, threads=1) as session:
        boxes = session.infer({"image": np.zeros((1, 3, 96, 160), np.float32)})["boxes"]
    assert boxes.shape == (1, load_onnx(output).graph.output[0].type.tensor_type.shape.dim[1].dim_value, 4)


def test_a_failed_export_leaves_no_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: Any) -> None:
        raise ExportError("on purpose")

    monkeypatch.setattr(deployed, "check_same_outputs", refuse)
    assert export.main([str(run_dir), "-o", str(tmp_path / "x.onnx")]) == 2
    assert capsys.readouterr().err == "error: on purpose\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("detector.pth", "not the file that its sidecar describes"),
        ("config.py", "config.py is missing or was changed"),
        ("detector.pth.json", "schema_version is"),
    ],
)
def test_a_run_that_was_changed_is_refused(
    changed: str, named: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("detector.pth", "detector.pth.json", "config.py"):
        (copy / name).write_bytes((run_dir / name).read_bytes())
    content = (copy / changed).read_bytes()
    (copy / changed).write_bytes(content.replace(b'"schema_version": 1', b'"schema_version": 0') + b"\n")
    assert export.main([str(copy), "-o", str(tmp_path / "x.onnx")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-o", "x.engine"], "expected a name that ends in .onnx"),
        (["-o", "x.onnx", "--size", "100", "64"], "expected multiples of 32. Give --size WIDTH HEIGHT"),
        (["-o", "x.onnx", "--size", "0", "64"], "input_shape is (1, 3, 64, 0)"),
        (["-o", "file/x.onnx"], "cannot write file/x.onnx"),
        (
            ["-o", "x.onnx", "--output-names", "a", "b"],
            "--output-names is a b; expected 3 names that differ, for boxes",
        ),
        (["-o", "x.onnx", "--outputs", "rows", "--output-names", "image"], "expected 1 names that differ"),
        (["-o", "x.onnx", "--output-names", "a", "a", "b"], "expected 3 names that differ"),
        (["-o", "x.onnx", "--output-names", "a", "b/c", "nms_d"], "each of letters, digits and _"),
    ],
)
def test_bad_flags_are_refused(
    words: list[str], named: str, run_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert export.main([str(run_dir), *words]) == 2
    assert named in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]


def test_deploy_export_starts_it_and_passes_its_message_and_status_on(
    run_dir: Path, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_dir), "-o", str(tmp_path / "x.onnx")]
    assert deploy_export.main(words) == 0
    assert capfd.readouterr().out.startswith(f"wrote {tmp_path / 'x.onnx'} (")
    assert (tmp_path / "x.onnx").read_bytes() == exported.read_bytes()
    assert read_sidecar(tmp_path / "x.onnx")["command"] == ["python", "-m", "deploy.export", *words]

    assert deploy_export.main([str(tmp_path / "nope"), "-o", str(tmp_path / "y.onnx")]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'nope'} holds neither of student.pth and detector.pth")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("missing", ["torch", "mmdet"])
def test_where_training_packages_are_missing_deploy_export_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert deploy_export.main(["run", "-o", str(tmp_path / "x.onnx")]) == 2
    error = capsys.readouterr().err
    assert f"needs the package {missing}, which is not installed here. Do: pip install 'crosskd[train]'" in error
