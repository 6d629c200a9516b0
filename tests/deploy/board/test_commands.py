from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest

from benchmarks.measuring.result import STAGES, read_result
from deploy.board import run
from deploy.board.archive import MODULES, unpack
from deploy.board.run import MANIFEST
from deploy.bundle import main as make_bundle
from deploy.contract import ModelContract, sidecar_path, write_sidecar
from deploy.tensorrt import builder
from tests.stand_ins.tensorrt import write_module

pytest.importorskip("onnxruntime")
BLOCKED = ("onnx", "onnxruntime", "torch", "mmdet", "cv2", "jinja2", "faster_coco_eval")
DRIVER = """
import builtins, json, runpy, sys
from pathlib import Path

folder, site, blocked, commands = json.loads(sys.argv[1])
sys.path[:1] = [folder, *site]
real = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if importer in ("deploy", "benchmarks", "__main__") and name.partition(".")[0] in blocked:
        raise ImportError(f"{name} is blocked")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
statuses = []
for words in commands:
    sys.argv = ["run.py", *words]
    try:
        runpy.run_path(str(Path(folder) / "run.py"), run_name="__main__")
    except SystemExit as end:
        statuses.append(end.code)
ours = sorted(str(Path(m.__file__).relative_to(folder)) for n, m in sys.modules.items() if n.startswith("deploy."))
print(json.dumps([statuses, ours]))
"""
Install = Callable[[str], Any]


@pytest.fixture
def folder(detector_file: Callable[..., Path], detector_contract: ModelContract, tmp_path: Path) -> Path:
    """An unpacked bundle of both graphs."""
    plain, quantised = detector_file("student.onnx"), detector_file("student.int8.onnx", np.int8)
    write_sidecar(quantised, {"model": plain}, detector_contract)
    assert make_bundle([str(plain), str(quantised), "-o", str(tmp_path / "mini.tar.gz")]) == 0
    return unpack(tmp_path / "mini.tar.gz", tmp_path / "board")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def on_a_board(folder: Path, version: str, *commands: List[str]) -> Tuple[List[int], List[str], str, str]:
    """Statuses, modules of ours that were imported, stdout and stderr, of the bundle's own files in a process."""
    site = folder.with_name("site")
    if version:
        write_module(site, version)
    argument = json.dumps([str(folder), [str(site)] if version else [], BLOCKED, commands])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, argument],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    statuses, ours = json.loads(last)
    return statuses, ours, "\n".join(lines), done.stderr


def details_of(engine: Path) -> Dict[str, Any]:
    return json.loads(sidecar_path(engine).read_text())["details"]


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.4.0.106"])
def test_the_bundle_alone_builds_checks_and_measures(folder: Path, version: str) -> None:
    """With its own modules, and without onnx, ONNX Runtime, torch and OpenCV."""
    statuses, ours, shown, errors = on_a_board(
        folder, version, ["build"], ["check"], ["bench", "--runs", "12", "--warmup", "2"], ["detect", "photo.jpg"]
    )
    assert statuses == [0, 0, 0, 2], errors
    assert set(ours) <= set(MODULES)
    engine = folder / "mini.int8.engine"
    details = details_of(engine)
    assert (details["precision"], details["tensorrt"]) == ("int8", version)
    assert details["graph"] == ("int8_tensorrt8" if version == "8.6.1" else "int8")
    assert details["golden"]["matched"] > 0.9
    assert "candidates as in ONNX Runtime" in shown
    result = read_result(folder / "mini.int8.latency.result.json")
    assert result["role"] == "engine-int8"
    samples = result["numbers"]["samples_ms"]
    measured = [stage for stage in STAGES if samples[stage] is not None]
    assert measured == ["host_to_device", "inference", "device_to_host", "total"]
    assert {len(samples[stage]) for stage in measured} == {12}
    assert not result["numbers"]["comparable"]
    assert "NOT COMPARABLE: total is that of the network alone" in shown
    assert "error: python3 run.py detect, alone of the commands, needs the package opencv" in errors


def test_the_engine_can_be_traced_to_the_files_it_was_made_of(
    folder: Path, fake_tensorrt: Install, detector_file: Any
) -> None:
    fake_tensorrt("10.3.0")
    assert run.main(["build", "--fp16"], folder) == 0
    inputs = json.loads(sidecar_path(folder / "mini.fp16.engine").read_text())["inputs"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert inputs["onnx"]["sha256"] == manifest["files"]["student.onnx"]["sha256"]
    assert inputs["graph"]["sha256"] == manifest["files"]["graphs/float.fp16.onnx"]["sha256"]


@pytest.mark.parametrize(
    ("version", "words", "graph", "flags"),
    [
        ("8.6.1", ["--fp32"], "fp32", ()),
        ("8.6.1", ["--fp16"], "fp32", ("FP16",)),
        ("8.6.1", ["--int8"], "int8_tensorrt8", ("FP16", "INT8")),
        ("10.3.0", ["--fp16"], "fp16", ()),
        ("10.3.0", ["--int8"], "int8", ()),
        ("10.3.0", ["--int8", "--scales", "fp32"], "int8_fp32_scales", ("FP16", "INT8")),
        ("11.4.0.106", ["--int8", "--scales", "fp32"], "int8_fp32_scales", ()),
        ("10.3.0", ["--int8", "--dla-core", "0", "--gpu-fallback"], "fp32", ("FP16", "INT8")),
    ],
)
def test_the_graph_is_that_of_the_version(
    version: str, words: List[str], graph: str, flags: Tuple[str, ...], folder: Path, fake_tensorrt: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trt = fake_tensorrt(version)
    built: Dict[str, Any] = {}
    real = builder.build_plan

    def record(module: Any, model: bytes, options: Any, float_tensors: Any, amax: Any, *rest: Any) -> bytes:
        built.update(model=model, float_tensors=float_tensors, amax=amax)
        return real(module, model, options, float_tensors, amax, *rest)

    monkeypatch.setattr("deploy.tensorrt.engine.build_plan", record)
    trt.test.dla_cores = 1
    if "--dla-core" in words:  # the stand-in sees INT8 in Q/DQ alone
        trt.test.inspector = '{"Layers": [{"Name": "all", "Inputs": [{"Format/Datatype": "Int8"}], "Outputs": []}]}'
    assert run.main(["build", *words, "-o", str(folder / "x.engine")], folder) == 0
    details = details_of(folder / "x.engine")
    assert (details["graph"], tuple(details["flags"])) == (graph, flags)
    kind = "int8" if "--int8" in words else "float"
    manifest = json.loads((folder / MANIFEST).read_text())["sources"][kind]
    assert built["model"] == (folder / manifest["graphs"][graph]["file"]).read_bytes()
    assert built["float_tensors"] == manifest["graphs"][graph]["float_tensors"]
    assert ("images" in built["amax"]) == (kind == "int8")


@pytest.mark.parametrize("outputs", ["topk", "nms"])
@pytest.mark.parametrize("input_type", ["float32", "uint8"])
def test_every_kind_of_detector(
    outputs: str, input_type: str, small_file: Callable[..., Path], fake_tensorrt: Install, tmp_path: Path
) -> None:
    fake_tensorrt("10.3.0")
    source = small_file(outputs, -1, input_type)
    assert make_bundle([str(source), "-o", str(tmp_path / "b.tar.gz")]) == 0
    there = unpack(tmp_path / "b.tar.gz", tmp_path / "there")
    assert run.main(["build", "--fp32", "--shapes", "1", "2", "4"], there) == 0
    assert details_of(there / "b.fp32.engine")["shapes"] == [1, 2, 4]
    assert run.main(["check"], there) == 0
    assert run.main(["bench", "--runs", "10", "-o", str(tmp_path / "x.json")], there) == 0
    assert "each run takes 2 images" in read_result(tmp_path / "x.json")["numbers"]["comparable_reasons"]


def test_other_noise_is_said(
    folder: Path, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt("10.3.0")
    monkeypatch.setattr("deploy.runtime.golden.SEEDS", (7,))  # as another numpy might draw
    assert run.main(["build"], folder) == 2
    assert f"numpy {np.__version__} draws other noise here than numpy" in capsys.readouterr().err
    assert not list(folder.glob("*.engine*"))


def test_a_wrong_engine_is_not_kept_and_not_taken(
    folder: Path, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str], detector_contract: ModelContract
) -> None:
    trt, engine = fake_tensorrt("11.4.0.106"), folder / "mini.int8.engine"
    trt.test.shift_px = 8.0
    assert run.main(["build"], folder) == 2
    assert "the engine is wrong" in capsys.readouterr().err
    assert not list(folder.glob("*.engine*"))

    trt.test.shift_px = 0.0
    assert run.main(["build"], folder) == 0
    trt.test.shift_px = 8.0
    assert run.main(["check"], folder) == 2
    assert "the engine is wrong" in capsys.readouterr().err
    trt.test.shift_px = 0.0

    plan, details = engine.read_bytes(), details_of(engine)
    engine.write_bytes(plan[:-1])
    assert run.main(["check"], folder) == 2
    assert "not the file that its sidecar describes" in capsys.readouterr().err
    engine.write_bytes(plan)
    write_sidecar(engine, {"onnx": Path(__file__)}, detector_contract, details)
    for command in (["check"], ["bench", "--runs", "12"]):
        assert run.main(command, folder) == 2
        assert "which is not in this bundle; expected an engine of this bundle's" in capsys.readouterr().err


def test_which_engine_is_meant(folder: Path, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_tensorrt("11.4.0.106")
    assert run.main(["check"], folder) == 2
    assert "holds no engine: run python3 run.py build first" in capsys.readouterr().err
    for precision in ("int8", "fp16"):
        assert run.main(["build", f"--{precision}"], folder) == 0
    assert run.main(["bench"], folder) == 2
    assert "mini.fp16.engine, mini.int8.engine; name one with --engine" in capsys.readouterr().err
    assert run.main(["check", "--engine", str(folder / "mini.fp16.engine")], folder) == 0
    assert f"{folder / 'mini.fp16.engine'}: 100.0% of 200 candidates" in capsys.readouterr().out


def test_onnx_runtime_runs_the_files_of_the_bundle(
    folder: Path, detector_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["check", "--engine", str(folder / "student.onnx")], folder) == 0
    assert "candidates as in ONNX Runtime, by ONNX Runtime 1." in capsys.readouterr().out
    assert run.main(["bench", "--engine", str(folder / "student.onnx"), "--runs", "10", "--warmup", "1"], folder) == 0
    result = read_result(folder / "student.latency.result.json")
    assert (result["role"], result["model"]["runtime"]) == ("onnx-fp32", "onnxruntime")
    capsys.readouterr()
    assert run.main(["check", "--engine", str(folder / "student.int8.onnx")], folder) == 2
    assert "no graph of this bundle that is meant for ONNX Runtime; expected student.onnx" in capsys.readouterr().err
    assert run.main(["check"], folder) == 2
    assert "or name --engine, or for ONNX Runtime --engine student.onnx" in capsys.readouterr().err

    alone = detector_file("alone.onnx", np.uint8)
    assert make_bundle([str(alone), "-o", str(tmp_path / "b.tar.gz")]) == 0
    assert "python3 run.py check --engine alone.onnx" in capsys.readouterr().out
    there = unpack(tmp_path / "b.tar.gz", tmp_path / "there")
    assert run.main(["check", "--engine", str(there / "alone.onnx")], there) == 0
    capsys.readouterr()
    assert run.main(["build"], there) == 2
    error = capsys.readouterr().err
    assert "this bundle has nothing for TensorRT, only a graph quantised for ONNX Runtime. Give python -m dep" in error


def test_detections_of_an_engine(folder: Path, fake_tensorrt: Install, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    fake_tensorrt("11.4.0.106")
    assert run.main(["build", "--fp32"], folder) == 0
    image = tmp_path / "photo.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8))
    seen = tmp_path / "seen"
    assert run.main(["detect", str(image), "-o", str(seen), "--score", "0.2"], folder) == 0
    assert cv2.imread(str(seen / "photo.png")).shape == (80, 100, 3)
    found = json.loads((seen / "results.json").read_text())
    assert len(found) > 0
    assert min(one["score"] for one in found) >= 0.2


def test_a_precision_that_the_bundle_lacks(
    detector_file: Any, fake_tensorrt: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("11.4.0.106")
    assert make_bundle([str(detector_file("student.onnx")), "-o", str(tmp_path / "b.tar.gz")]) == 0
    there = unpack(tmp_path / "b.tar.gz", tmp_path / "there")
    assert run.main(["build", "--int8"], there) == 2
    error = capsys.readouterr().err
    assert (
        "--int8 needs the graph quantised for TensorRT, which is not in this bundle; of it TensorRT can run fp16"
        in error
    )
    assert run.main(["build"], there) == 0
    assert (there / "b.fp16.engine").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "-o", "x.plan"], "expected a name that ends in .engine"),
        (["build", "--workspace-mib", "0"], "--workspace-mib is 0; expected a positive number"),
        (["build", "--shapes", "1", "2", "4"], "--shapes is given for a model that takes 1 image"),
        (["build", "--gpu-fallback"], "--gpu-fallback is given without --dla-core"),
        (["bench", "--runs", "3"], "--runs is 3; expected at least 10"),
        (["bench", "--fps", "30"], "--fps does not go without --set"),
        (["bench", "--set", "x.json"], "one of --set and --images-dir is given; expected both"),
        (["bench", "--set", "x", "--images-dir", "x", "--warmup", "5"], "--warmup does not go with --set"),
        (["check", "--engine", "none.engine"], "no such file: none.engine"),
        (["fly"], "unknown command 'fly'; expected one of build, check, bench, predict"),
    ],
)
def test_wrong_words(
    words: List[str], message: str, folder: Path, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tensorrt("11.4.0.106")
    before = sorted(folder.rglob("*"))
    assert run.main(words, folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deploy/tensorrt/session.py", "deploy/tensorrt/session.py was changed: its SHA-256 is"),
        ("golden/0.int8.boxes.npy", "golden/0.int8.boxes.npy was changed"),
        ("student.int8.onnx", "student.int8.onnx was changed"),
        (MANIFEST, f"{MANIFEST} is not the manifest of a bundle: it was changed or cut"),
    ],
)
def test_a_changed_or_missing_file_is_refused_before_it_is_used(name: str, message: str, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-3] + b"(((")
    statuses, ours, _, errors = on_a_board(folder, "", ["build"])
    assert (statuses, ours) == ([2], [])
    assert message in errors
    assert "Unpack the bundle again" in errors
    (folder / name).unlink()
    statuses, ours, _, errors = on_a_board(folder, "", ["check"])
    assert (statuses, ours) == ([2], [])
    assert f"cannot read {folder / name}" in errors


def test_what_the_board_lacks_is_named(folder: Path) -> None:
    statuses, _, _, errors = on_a_board(folder, "", ["build"])
    assert statuses == [2]
    assert "needs the package tensorrt, which is not installed here. Do: " in errors


def test_no_numpy(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert run.main(["check"], folder) == 2
    assert "run.py needs numpy. Do: pip install numpy (or apt install python3-numpy)" in capsys.readouterr().err


def test_an_old_python(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "sys", SimpleNamespace(version_info=(3, 6, 9), stderr=sys.stderr))
    assert run.main(["check"], folder) == 2
    assert "this is Python 3.6; expected 3.8 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("function", ["write_bytes", "write_text"])
def test_a_full_disk_leaves_no_engine(
    function: str, folder: Path, fake_tensorrt: Install, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While the engine is written, and while its sidecar is."""
    fake_tensorrt("11.4.0.106")

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, function, full)
    before = sorted(folder.rglob("*"))
    assert run.main(["build", "--no-timing-cache"], folder) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert sorted(folder.rglob("*")) == before


def test_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert run.main(words, folder) == 0
        assert "python3 run.py build [--fp32 | --fp16 | --int8]" in capsys.readouterr().out
    for command in run.COMMANDS:
        with pytest.raises(SystemExit) as end:
            run.main([command, "--help"], folder)
        assert end.value.code == 0
        assert f"usage: python3 run.py {command}" in capsys.readouterr().out


def test_another_version_of_the_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "bundle_version": 99}))
    assert run.main(["check"], folder) == 2
    assert "bundle_version is 99; expected 2. Make the bundle again" in capsys.readouterr().err
