"""
Every kind of file that the program reads: a sound one, how it is damaged, and what reads it.

The sound ones lie in one folder, the bench, and are made by the commands themselves. All paths here count from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import cv2
import numpy as np

from deploy.contract import sealed, sidecar_path, write_sidecar
from deploy.files import sha256_of, write_json
from tests.faults.mutations import (
    bytes_damaged,
    image_damaged,
    json_damaged,
    npy_damaged,
    onnx_damaged,
    text_damaged,
    zip_damaged,
)

Damage = Callable[[random.Random, bytes], bytes]
Reader = Callable[[], Any]
OUT = "out"
"""The folder that commands write to; it is emptied after each input."""
TENSORRT = "10.3.0"
"""That the stand-in stands for."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file that is read."""

    name: str
    files: Tuple[str, ...]
    """Sound ones; each input damages one of them."""
    damage: Damage
    readers: Tuple[Reader, ...] = ()
    """What reads the file, quickly: each input goes through all of them."""
    commands: Tuple[Tuple[str, ...], ...] = ()
    """Modules with their arguments; a share of the inputs goes through one of them."""
    settle: Optional[Callable[[str], Sequence[str]]] = None
    """
    Writes into other files what belongs to the damaged one, such as its hash, so that it is read at all; returns their
    names.
    """
    needs: Tuple[str, ...] = ()
    """Packages, without which it is left out."""
    stand_in: bool = False
    """Whether TensorRT's stand-in has to be there."""


# The bench


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """With `folder` as the present one, within the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_bench(folder: Path) -> None:
    """Makes the sound files, by the commands, in the present folder's `folder`; it has to be new."""
    import onnx

    from tests.stand_ins.detector import mini_detector, write_detector
    from tests.stand_ins.foreign import CONTRACT, FAMILIES, foreign_model

    folder.mkdir(parents=True)
    with in_folder(folder):
        _run("crosskd.shapes", "data", "--images", "12", "--size", "64")
        _take_two_classes(Path("data/annotations"))
        write_detector(Path("m.onnx"))
        write_detector(Path("q.onnx"), np.int8, {"model": Path("m.onnx")})
        measured = ("--data", "data", "--split", "val")
        _run(
            "calibration.quantize",
            "m.onnx",
            "--data",
            "data",
            "--num-images",
            "3",
            "--statistics",
            "s.npz",
            "-o",
            "m.int8.onnx",
            "--write-calibration-cache",
            "c.cache",
            "--tensorrt-version",
            "8.5.3",
        )
        Path("results").mkdir()
        for role, model in (("teacher", "m.onnx"), ("onnx-fp32", "m.onnx"), ("onnx-int8", "m.int8.onnx")):
            _run("benchmarks.accuracy", model, *measured, "--role", role, "-o", f"results/{role}.accuracy.result.json")
            _run(
                "benchmarks.latency",
                model,
                *measured,
                "--role",
                role,
                "--runs",
                "10",
                "--max-warmup-s",
                "0.1",
                "-o",
                f"results/{role}.latency.result.json",
            )
        _run("benchmarks.report", *_results(), "-o", "earlier.html", status=(0, 1))
        _run("deploy.bundle", "m.onnx", "m.int8.onnx", "-o", "b.tar.gz")
        from deploy.board.archive import unpack

        unpack("b.tar.gz", "board")
        for family in ("yolov8", "end_to_end", "detr"):
            onnx.save(foreign_model(family), f"{family}.onnx")
            write_json(f"{family}.contract.json", {**CONTRACT, **FAMILIES[family]})
        Path("e.engine").write_bytes(mini_detector().SerializeToString())
        _write_pictures(Path("pictures"))
        _write_small_files()


def _take_two_classes(folder: Path) -> None:
    """Gives the drawn shapes the two classes of the small detector."""
    for path in folder.glob("*.json"):
        document = json.loads(path.read_bytes())
        document["categories"] = [{"id": 1, "name": "disc"}, {"id": 2, "name": "bar"}]
        for box in document["annotations"]:
            box["category_id"] = 1 + box["category_id"] % 2
        write_json(path, document)


def _run(module: str, *words: str, status: Tuple[int, ...] = (0,)) -> None:
    found = importlib.import_module(module).main(list(words))
    if found not in status:
        raise AssertionError(f"{module} {words} ended with {found} on sound files")


def _results() -> List[str]:
    return sorted(map(str, Path("results").glob("*.result.json")))


def _write_pictures(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for suffix in ("jpg", "png", "bmp", "webp", "tiff", "jp2", "gif"):
        with contextlib.suppress(cv2.error):  # GIF came with OpenCV 4.11
            cv2.imwrite(str(folder / f"colour.{suffix}"), pixels)
    cv2.imwrite(str(folder / "deep.png"), pixels.astype(np.uint16) * 200)
    cv2.imwrite(str(folder / "grey.png"), pixels[..., 0])
    whole = (folder / "colour.jpg").read_bytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    marker = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (folder / "turned.jpg").write_bytes(whole[:2] + marker + whole[2:])


def _machine_of_stand_in() -> Dict[str, Optional[str]]:
    from deploy.tensorrt.cuda import load_cuda
    from deploy.tensorrt.session import describe_machine

    install_stand_in()
    cuda = load_cuda("these tests")
    try:
        return describe_machine(sys.modules["tensorrt"], cuda)
    finally:
        cuda.close()


def _write_small_files() -> None:
    """What other commands write, or people do, that is not made here by the commands themselves."""
    from deploy.contract import read_sidecar

    details = {
        **_machine_of_stand_in(),
        "precision": "int8",
        "dla_core": None,
        "version_compatible": False,
        "hardware_compatible": False,
        "keep_differing": False,
        "parameters": 2048,
        "golden": {"matched": 1.0, "largest_box": 0.01, "largest_logit": 0.02, "compared": 10, "agrees": True},
        "coverage": {
            "layers": {name: {"count": 1, "share": 0.25} for name in ("int8", "fp16", "fp32", "other")},
            "convolutions": None,
            "reformats": 1,
            "compiled": 0,
            "reason": None,
        },
    }
    from deploy.contract import ModelContract

    contract = ModelContract.from_json(read_sidecar("m.onnx")["contract"], "m.onnx.json")
    write_sidecar("e.engine", {"onnx": "m.onnx"}, contract, details)
    layer = {
        "Name": "conv1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
        "Outputs": [],
        "ParameterType": "Convolution",
        "Weights": {"Type": "Int8", "Count": 9},
        "TacticName": "sm80_fprop",
    }
    write_json("inspector.json", {"Layers": [layer, {**layer, "LayerType": "Reformat"}, "conv3"], "Bindings": ["x"]})
    Path("boards.toml").write_text(
        '[[board]]\nname = "orin"\nhost = "orin.local"\nport = 22\nuser = "nvidia"\nkey = "boards.toml"\n'
        'known_hosts = "boards.toml"\nfolder = "~/crosskd"\npython = "python3"\nprecisions = ["int8", "fp16"]\n'
        'timeout_s = 600\n[board.environment]\nPYTHONPATH = "/opt/x"\n[[board]]\nname = "nano"\nhost = "10.0.0.7"\n'
    )
    Path("limits.toml").write_text("max_ap_drop = 1.5\nmin_ap = 20\nmax_latency_ms = 40\nmax_p99_ms = 60\n")
    Path("tegrastats.txt").write_text(
        "11-29-2026 12:00:00 RAM 3117/7620MB (lfb 8x4MB) SWAP 0/3810MB CPU [3%@729,0%@729,off,off] EMC_FREQ 0% "
        "GR3D_FREQ 0% cpu@49.5C gpu@48.2C tj@49.5C VDD_IN 4067mW/4067mW VDD_CPU_GPU_CV 475mW/475mW "
        "VDD_SOC 1466mW/1466mW\n"
    )
    Path("nvpmodel.txt").write_text("NV Power Mode: MAXN_SUPER\n2\n")
    Path("nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    )
    tensors = list(json.loads(Path("m.int8.onnx.json").read_text())["details"]["ranges"])
    write_json(
        "int8.json",
        {
            "target": "tensorrt",
            "keep_float": [],
            "weights_sha256": "0" * 64,
            "ranges": {name: [-1.0, 1.0] for name in tensors},
        },
    )
    write_json(
        "journal.json",
        {
            "key": {"model": "x"},
            "float_ap": 0.5,
            "errors": {"a": 0.1},
            "drops": [{"kept": ["a"], "ap": 0.4, "drop": 0.01, "low": 0.0, "high": 0.02}],
        },
    )
    write_json("timing.cache.json", _machine_of_stand_in())
    Path("timing.cache").write_bytes(b"x")
    Path("run").mkdir()
    data = {"images": 8, "boxes": 20, "sha256": "0" * 64}
    write_json(
        "run/training.json",
        {
            "class_names": ["a"],
            "annotations": {"train": data, "val": data},
            "inputs": {"x": "0"},
            "settings": {"train_cfg.max_epochs": 1, "model.type": "GFL"},
        },
    )
    write_json(
        "run/started.json", {"command": ["python", "-m", "crosskd.train"], "files": {"x": "0"}, "config_sha256": "0"}
    )
    Path("run/log.jsonl").write_text('{"epoch": 1, "iter": 1, "loss": 0.5}\n{"epoch": 1, "iter": 2, "loss": 0.4}\n')
    holder = {"command": "python -m crosskd.train", "pid": 1, "host": "h", "since": "2026-11-29T12:00:00+00:00"}
    Path("run/held.json").write_text(json.dumps(holder))


# What belongs to a damaged file


def with_sidecar(name: str) -> Sequence[str]:
    """Writes the damaged file's hash into its sidecar."""
    path = sidecar_path(name)
    document = json.loads(path.read_bytes())
    document["artefact"]["sha256"] = sha256_of(name)
    path.write_text(json.dumps(document))
    return [str(path)]


def sealed_again(name: str) -> Sequence[str]:
    """Seals the damaged result or report anew, if it still is an object."""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(Path(name).read_bytes())
        if isinstance(document, dict):
            Path(name).write_text(json.dumps(sealed(document)))
    return []


def detections_sealed_again(name: str) -> Sequence[str]:
    """Writes the hash of damaged detections into their result."""
    result = Path(name.replace(".detections.json", ".result.json"))
    document = json.loads(result.read_bytes())
    document["detections"]["sha256"] = sha256_of(name)
    result.write_text(json.dumps(sealed(document)))
    return [str(result)]


def with_manifest(name: str) -> Sequence[str]:
    """Writes the hash of a damaged file of an unpacked bundle into its manifest."""
    folder = Path("board/b")
    manifest = folder / "MANIFEST.json"
    document = json.loads(manifest.read_bytes())
    inner = str(Path(name).relative_to(folder))
    content = Path(name).read_bytes()
    document["files"][inner] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest.write_text(json.dumps(document))
    return [str(manifest)]


# Readers


def _read_split() -> None:
    from deploy.dataset import load_split

    load_split("data", "val")


def _check_data() -> None:
    from crosskd.check_data import report_of_split

    report_of_split(Path("data/annotations/instances_val.json"), Path("data/images"), correct=True)


def _read_pictures() -> None:
    from deploy.images import read_header, read_image, shown_size_px

    for path in Path("pictures").iterdir():
        if path.suffix != ".txt":
            header = read_header(path)
            if not header.fault:
                shown_size_px(path, header)
            read_image(path)


def _sidecar_of(name: str) -> Reader:
    def read() -> None:
        from deploy.contract import load_contract, read_sidecar
        from deploy.freshness import is_current

        is_current(name)
        read_sidecar(name)
        load_contract(name)

    return read


def _read_onnx() -> None:
    from deploy.graphs.onnx_file import read_onnx_file
    from deploy.graphs.precision import typed_graph
    from deploy.runtime.session import OrtSession

    for name in ("m.onnx", "m.int8.onnx"):
        source = read_onnx_file(Path(name))
        found = source.dla_ranges, source.parameters, source.is_quantised
        typed_graph(source.model, "fp16", {"ranges": source.sidecar["details"].get("ranges", {})})
        assert found
    with OrtSession("m.onnx") as session:
        feed = np.zeros(session.contract.input_shape, session.contract.input_type)
        session.infer({session.contract.input_name: feed})


def _read_foreign(family: str) -> Reader:
    def read() -> None:
        from deploy.graphs.graph import load_onnx
        from deploy.runtime.adoption import read_adoption

        read_adoption(f"{family}.contract.json")
        load_onnx(f"{family}.onnx")

    return read


def _read_results() -> None:
    from benchmarks.measuring.detections import read_detections
    from benchmarks.measuring.result import read_result
    from deploy.freshness import is_current

    for path in _results():
        is_current(path)
        result = read_result(path)
        if result["kind"] == "accuracy":
            read_detections(result, path)


def _read_earlier() -> None:
    from benchmarks.reporting.changes import changes_from_reports, read_report
    from benchmarks.reporting.document import REPORT_VERSION

    changes_from_reports(read_report("earlier.json", REPORT_VERSION), json.loads(SOUND["earlier.json"]), "earlier.json")


def _read_statistics() -> None:
    from calibration.activation_statistics import load_statistics
    from calibration.ranges import RANGE_METHODS, range_from_statistics
    from deploy.contract import load_contract

    collected = load_statistics("s.npz", "m.onnx", load_contract("m.onnx"))
    for seen in list(collected.statistics.values())[:3]:
        if seen.has_histogram:
            for method in RANGE_METHODS:
                range_from_statistics(seen, method, True)


def _read_cache() -> None:
    from deploy.graphs.calibration_cache import read_cache

    read_cache("c.cache")
    read_cache("c.cache", {"images"})


def _read_ranges() -> None:
    from calibration.given_ranges import read_trained_ranges

    read_trained_ranges("int8.json")


def _read_journal() -> None:
    from calibration.search import Journal

    Journal(Path("journal.json"), {"model": "x"})


def _read_checkpoint() -> None:
    from crosskd.models.checkpoint import (
        classes_of_checkpoint,
        load_detector_weights,
        read_checkpoint,
        state_of_checkpoint,
    )

    checkpoint = read_checkpoint("w.pth")
    classes_of_checkpoint("w.pth", checkpoint)
    state_of_checkpoint("w.pth", checkpoint)
    load_detector_weights(_tiny_detector(), "w.pth", ("a", "b", "c"))


def _tiny_detector() -> Any:
    """A detector that can be loaded into again and again."""
    if not _detectors:
        from crosskd.config import load_config, set_classes
        from crosskd.models.detector import detector_from_config

        config = load_config(CONFIGS / "gfl_tiny.py")
        set_classes(config, ("a", "b", "c"))
        _detectors.append(detector_from_config(config, load_weights=False))
    return _detectors[0]


_detectors: List[Any] = []
CONFIGS = Path(__file__).resolve().parents[1] / "crosskd" / "configs"


def make_checkpoints() -> None:
    """Writes w.pth, weights of a tiny detector with what mmengine keeps beside them, into the bench."""
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    meta = {
        "dataset_meta": {"classes": ("a", "b", "c")},
        "epoch": 1,
        "iter": np.int64(2),
        "seed": 0,
        "cfg": "model = dict()",
        "array": np.arange(4.0),
        "history": HistoryBuffer([1.0], [1]),
    }
    torch.save(
        {"state_dict": _tiny_detector().state_dict(), "meta": meta, "optimizer": {"state": {0: {"step": 1}}}}, "w.pth"
    )
    Path("run/last_checkpoint").write_text("iter_1.pth")
    shutil.copy("w.pth", "run/iter_1.pth")


def checkpoint_damaged(rng: random.Random, content: bytes) -> bytes:
    """A checkpoint whose archive, pickle or values are damaged; the values as somebody would save them."""
    if rng.random() < 0.6:
        return zip_damaged(rng, content, lambda rng, name, entry: bytes_damaged(rng, entry))
    import io

    import torch

    from crosskd.models.checkpoint import read_checkpoint
    from tests.faults.mutations import HOSTILE_TEXTS, hostile_value

    checkpoint = read_checkpoint("run/iter_1.pth")  # the same as this one
    state, name = checkpoint["state_dict"], rng.choice(list(checkpoint["state_dict"]))
    kind = rng.randrange(8)
    if kind == 0:
        state[name] = hostile_value(rng)
    elif kind == 1:
        state[rng.choice(HOSTILE_TEXTS)] = state.pop(name)
    elif kind == 2:
        state[name] = state[name].double() * rng.choice((float("nan"), 1e300, 0.0))
    elif kind == 3:
        state[name] = state[name].reshape(-1)[:1].expand(rng.choice((0, 1, 1000, 2**20)))
    elif kind == 4:
        checkpoint["meta"] = hostile_value(rng)
    elif kind == 5:
        checkpoint["meta"]["dataset_meta"] = {"classes": hostile_value(rng)}
    elif kind == 6:
        checkpoint = rng.choice(
            (state, [checkpoint], {"model": checkpoint}, {"state_dict": hostile_value(rng)}, state[name])
        )
    else:
        checkpoint[rng.choice(HOSTILE_TEXTS)] = hostile_value(rng)
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    return stream.getvalue()


def _read_archive() -> None:
    from deploy.board.archive import unpack

    try:
        unpack("b.tar.gz", OUT)
    finally:
        assert not [path for path in Path(OUT).iterdir() if path.name.startswith(".")]


def _board(*words: str) -> Reader:
    def read() -> Any:
        from deploy.board import run

        return run.main(list(words), Path("board/b"))

    return read


def _read_bundle() -> None:
    from deploy.board.commands import SOURCE_OF, Bundle
    from deploy.board.run import fault_of_files
    from deploy.errors import ContractError

    fault = fault_of_files(Path("board/b"))
    if fault:
        raise ContractError(fault)
    bundle = Bundle(Path("board/b"))
    for runtime in SOURCE_OF:
        for precision in bundle.precisions(runtime):
            bundle.golden_outputs(precision, runtime)
            bundle.tolerance(precision, runtime, None)
    bundle.golden_inputs()


def _read_boards() -> None:
    from benchmarks.boards.list import boards_from_file
    from benchmarks.boards.ssh import command_line

    for board in boards_from_file("boards.toml"):
        command_line(board.folder, board.python, ["build"], board.environment, board.timeout_s)


def _read_limits() -> None:
    from benchmarks.reporting.verdict import check_limits, limits_from_file

    check_limits(limits_from_file("limits.toml"))


def _read_inspector() -> None:
    from deploy.tensorrt.coverage import check_precision, coverage_from_json, words_of_precision

    found = coverage_from_json(Path("inspector.json").read_text(encoding="utf-8", errors="replace"))
    words_of_precision({"precision": "int8", "coverage": found})
    check_precision(found, "int8")


def _open_engine() -> None:
    from deploy.tensorrt.session import TrtSession

    with TrtSession("e.engine") as session:
        assert session.description


def _read_timing_cache() -> None:
    from deploy.tensorrt import engine

    here = json.loads(SOUND["timing.cache.json"])
    engine._check_timing_cache(Path("timing.cache"), here)


def _read_what_boards_print() -> None:
    from benchmarks.measuring.environment import NotHere
    from benchmarks.measuring.power import module_rails, rails_from_tegrastats
    from deploy import machine

    for line in Path("tegrastats.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(NotHere):
            module_rails(rails_from_tegrastats(line))
    kept, machine.ROOT = machine.ROOT, Path.cwd()
    release, printed = machine.L4T_RELEASE, machine.output_of
    try:
        machine.L4T_RELEASE = "nv_tegra_release"
        machine.output_of = lambda *_words: Path("nvpmodel.txt").read_text(encoding="utf-8", errors="replace")
        str(machine.l4t_release()), machine.power_mode()
        from deploy.jetpack import unknown_jetpack

        unknown_jetpack()
    finally:
        machine.ROOT, machine.L4T_RELEASE, machine.output_of = kept, release, printed


def _read_run_dir() -> None:
    from crosskd.loop.hooks import _is_line_until
    from crosskd.run_dir import check_resumed
    from deploy.freshness import read_start

    read_start("run")
    for line in Path("run/log.jsonl").read_text(errors="replace").splitlines():
        _is_line_until(line, 5)
    check_resumed(json.loads(SOUND["run/training.json"]), Path("run"))


def _read_last_checkpoint() -> None:
    from crosskd.models.checkpoint import latest_checkpoint

    latest_checkpoint("run")


def _read_marker() -> None:
    from crosskd.shapes import write_shapes

    write_shapes(Path("data"), 12, 64, 0)


def _read_holder() -> None:
    from deploy.errors import PipelineError
    from deploy.folder_lock import _message, _read_holder

    raise PipelineError(_message(Path("run"), _read_holder(Path("run/held.json"))))


class _Answers:
    """In place of a board: its files are those of the bench."""

    def __init__(self) -> None:
        from benchmarks.boards.list import Board

        self.board = Board("orin", "orin.local", folder="/x")

    def path(self, path: str) -> str:
        return path

    async def read(self, path: str, most: int) -> Optional[bytes]:
        name = "e.engine.json" if path.endswith(".engine.json") else "results/onnx-int8.latency.result.json"
        return Path(name).read_bytes()[:most]

    async def run(self, _folder: str, _words: List[str], output: bytearray) -> None:
        output += Path("tegrastats.txt").read_bytes()

    async def upload(self, _local: Path, _remote: str) -> bool:
        return True

    @contextlib.asynccontextmanager
    async def held(self, _limit_s: float) -> AsyncIterator[None]:
        yield


def _visit_board() -> None:
    """What `benchmarks.fleet` makes of a board's answers."""
    from benchmarks import fleet
    from benchmarks.boards import visit

    @contextlib.asynccontextmanager
    async def connected(_board: Any) -> AsyncIterator[Any]:
        yield _Answers()

    bundle: Any = type("Bundle", (), {"folder": Path("board/b")})()
    outcome = visit.Outcome("orin", "orin.local", "int8")
    kept, visit.connected = visit.connected, connected  # type: ignore[assignment]
    try:
        asyncio.run(visit.visit(_Answers().board, visit.Job(bundle, "b-0", Path(OUT)), [outcome]))
    finally:
        visit.connected = kept
    print(fleet.table([outcome]))


def _use_config() -> None:
    from crosskd.config import load_config
    from crosskd.models.detector import detector_from_config
    from crosskd.settings import check_settings
    from deploy.errors import ConfigError
    from deploy.schema import short

    overrides = json.loads(Path("overrides.json").read_bytes())
    if not isinstance(overrides, dict):
        raise ConfigError(f"{short(overrides)} is no object")
    config = load_config(CONFIGS / "gfl_tiny.py", overrides)
    check_settings(config, "gfl_tiny.py")
    detector_from_config(config, load_weights=False)


def overrides_damaged(rng: random.Random, content: bytes) -> bytes:
    """Keys of a config, each with a value that nobody expects: what --set and a config's author may write."""
    from crosskd.config import load_config
    from tests.faults.mutations import HOSTILE_TEXTS, hostile_value

    if not _keys:
        _keys.extend(_dotted(load_config(CONFIGS / "gfl_tiny.py").to_dict()))
    key = rng.choice(_keys)
    if rng.random() < 0.1:
        key += "." + rng.choice(HOSTILE_TEXTS)
    return json.dumps({key: hostile_value(rng)}).encode()


_keys: List[str] = []


def _dotted(values: Mapping[str, Any], head: str = "") -> List[str]:
    found = []
    for key, value in values.items():
        found.append(f"{head}{key}")
        if isinstance(value, dict):
            found += _dotted(value, f"{head}{key}.")
    return found


def as_text(rng: random.Random, content: bytes) -> bytes:
    return text_damaged(rng, content.decode()).encode("utf-8", "surrogatepass")


def npz_damaged(rng: random.Random, content: bytes) -> bytes:
    return zip_damaged(rng, content, npy_damaged)


def one_npy_damaged(rng: random.Random, content: bytes) -> bytes:
    return npy_damaged(rng, "", content)


SOUND: Dict[str, bytes] = {}
"""Name -> content of the bench's files, as they are made; set by `tests.faults.fuzz`."""
DETECT = ("deploy.detect", "m.onnx", "pictures/grey.png", "-o", OUT)
QUANTIZE = ("calibration.quantize", "m.onnx", "--data", "data", "--num-images", "2", "-o", f"{OUT}/q.onnx")
FOREIGN = ("yolov8", "end_to_end", "detr")


def kinds() -> List[Kind]:
    """Every kind of file, by what reads it."""
    from glob import glob

    results, pictures = tuple(_results()), tuple(sorted(glob("pictures/*")))
    roles = ("teacher", "onnx-fp32", "onnx-int8")
    report = ("benchmarks.report", *results, "--max-ap-drop", "5", "-o", f"{OUT}/r.html", "--junit", f"{OUT}/j.xml")
    return [
        Kind(
            "annotations",
            ("data/annotations/instances_val.json",),
            json_damaged,
            (_read_split, _check_data),
            (
                ("crosskd.check_data", "data"),
                ("crosskd.check_data", "data", "--write", f"{OUT}/clean"),
                ("calibration.quantize", "m.onnx", "--data", "data", "--split", "val", "-o", f"{OUT}/q.onnx"),
                (
                    "benchmarks.latency",
                    "m.onnx",
                    "--data",
                    "data",
                    "--split",
                    "val",
                    "--runs",
                    "10",
                    "--max-warmup-s",
                    "0.1",
                    "-o",
                    f"{OUT}/l.result.json",
                ),
            ),
        ),
        Kind(
            "images",
            pictures,
            image_damaged,
            (_read_pictures,),
            (("deploy.detect", "m.onnx", "pictures", "-o", OUT), ("deploy.detect", "m.onnx", *pictures, "-o", OUT)),
        ),
        Kind(
            "sidecars",
            ("m.onnx.json", "m.int8.onnx.json"),
            json_damaged,
            (_sidecar_of("m.onnx"), _sidecar_of("m.int8.onnx"), _read_onnx),
            (
                DETECT,
                QUANTIZE,
                ("calibration.audit", "m.int8.onnx"),
                ("deploy.bundle", "m.onnx", "m.int8.onnx", "-o", f"{OUT}/b.tar.gz"),
                ("deploy.build_trt", "m.int8.onnx", "--int8", "--target", "10.3"),
            ),
        ),
        Kind(
            "ONNX files",
            ("m.onnx", "m.int8.onnx"),
            onnx_damaged,
            (_read_onnx,),
            (
                DETECT,
                QUANTIZE,
                ("calibration.audit", "m.int8.onnx"),
                ("deploy.build_trt", "m.int8.onnx", "--int8", "--target", "8.5"),
                ("deploy.build_trt", "m.onnx", "--fp16", "--target", "10.3"),
                ("deploy.bundle", "m.onnx", "-o", f"{OUT}/b.tar.gz"),
            ),
            with_sidecar,
        ),
        Kind(
            "ONNX files from elsewhere",
            tuple(f"{family}.onnx" for family in FOREIGN),
            onnx_damaged,
            tuple(_read_foreign(family) for family in FOREIGN),
            tuple(
                ("deploy.adopt_onnx", f"{family}.onnx", "--contract", f"{family}.contract.json", "-o", f"{OUT}/a.onnx")
                for family in FOREIGN
            ),
        ),
        Kind(
            "contracts for ONNX files from elsewhere",
            tuple(f"{family}.contract.json" for family in FOREIGN),
            json_damaged,
            tuple(_read_foreign(family) for family in FOREIGN),
            tuple(
                ("deploy.adopt_onnx", f"{family}.onnx", "--contract", f"{family}.contract.json", "-o", f"{OUT}/a.onnx")
                for family in FOREIGN
            ),
        ),
        Kind("results", results, json_damaged, (_read_results,), (report,), sealed_again),
        Kind(
            "detections",
            tuple(f"results/{role}.accuracy.detections.json" for role in roles),
            json_damaged,
            (_read_results,),
            (
                report,
                (
                    "benchmarks.accuracy",
                    "results/teacher.accuracy.detections.json",
                    "--data",
                    "data",
                    "--split",
                    "val",
                    "-o",
                    f"{OUT}/a.result.json",
                ),
            ),
            detections_sealed_again,
        ),
        Kind(
            "earlier reports",
            ("earlier.json",),
            json_damaged,
            (_read_earlier,),
            ((*report, "--against", "earlier.json"),),
            sealed_again,
        ),
        Kind(
            "statistics",
            ("s.npz",),
            npz_damaged,
            (_read_statistics,),
            (("calibration.statistics", "s.npz"), (*QUANTIZE, "--statistics", "s.npz", "--method", "entropy")),
        ),
        Kind(
            "calibration caches",
            ("c.cache",),
            as_text,
            (_read_cache,),
            (("calibration.quantize", "m.onnx", "--calibration-cache", "c.cache", "-o", f"{OUT}/q.onnx"),),
        ),
        Kind(
            "trained ranges",
            ("int8.json",),
            json_damaged,
            (_read_ranges,),
            (("calibration.quantize", "m.onnx", "--ranges", "int8.json", "-o", f"{OUT}/q.onnx"),),
        ),
        Kind("search journals", ("journal.json",), json_damaged, (_read_journal,)),
        Kind("checkpoints", ("w.pth",), checkpoint_damaged, (_read_checkpoint,), needs=("torch", "mmengine")),
        Kind(
            "checkpoints to resume",
            ("run/last_checkpoint", "run/iter_1.pth"),
            bytes_damaged,
            (_read_last_checkpoint,),
            needs=("torch", "mmengine"),
        ),
        Kind(
            "records of runs",
            ("run/training.json", "run/started.json", "run/log.jsonl"),
            json_lines_damaged,
            (_read_run_dir,),
            needs=("torch", "mmengine"),
        ),
        Kind("settings", ("overrides.json",), overrides_damaged, (_use_config,), needs=("torch", "mmengine")),
        Kind("bundles", ("b.tar.gz",), gzip_damaged, (_read_archive,)),
        Kind(
            "manifests",
            ("board/b/MANIFEST.json",),
            json_damaged,
            (_read_bundle, _board("build", "--int8", "-o", f"{OUT}/e.engine", "--no-timing-cache")),
            stand_in=True,
        ),
        Kind(
            "golden arrays of bundles",
            tuple(sorted(glob("board/b/golden/*.npy"))),
            one_npy_damaged,
            (_read_bundle,),
            settle=with_manifest,
        ),
        Kind(
            "lists of boards",
            ("boards.toml",),
            as_text,
            (_read_boards,),
            (("benchmarks.fleet", "boards.toml", "missing.tar.gz", "-o", f"{OUT}/fleet"),),
        ),
        Kind(
            "limits",
            ("limits.toml",),
            as_text,
            (_read_limits,),
            (("benchmarks.report", "x.result.json", "--check", "--limits", "limits.toml", "-o", f"{OUT}/r.html"),),
        ),
        Kind("TensorRT's inspector", ("inspector.json",), json_damaged, (_read_inspector,)),
        Kind(
            "sidecars of engines",
            ("e.engine.json",),
            json_damaged,
            (_open_engine,),
            (("deploy.detect", "e.engine", "pictures/grey.png", "-o", OUT),),
            stand_in=True,
        ),
        Kind("records of timing caches", ("timing.cache.json",), json_damaged, (_read_timing_cache,)),
        Kind(
            "what boards print",
            ("tegrastats.txt", "nvpmodel.txt", "nv_tegra_release"),
            as_text,
            (_read_what_boards_print,),
        ),
        Kind(
            "files from boards",
            ("e.engine.json", "results/onnx-int8.latency.result.json"),
            json_damaged,
            (_visit_board,),
            settle=sealed_again,
        ),
        Kind("markers of drawn data", ("data/shapes.json",), json_damaged, (_read_marker,)),
        Kind("holders of locks", ("run/held.json",), json_damaged, (_read_holder,)),
    ]


def json_lines_damaged(rng: random.Random, content: bytes) -> bytes:
    """A JSON file, or a file of JSON lines, damaged."""
    return as_text(rng, content) if content.count(b"\n{") else json_damaged(rng, content)


def gzip_damaged(rng: random.Random, content: bytes) -> bytes:
    """A .tar.gz whose bytes, or those of the archive inside, are damaged: mostly in the headers of its members."""
    import gzip

    if rng.random() < 0.4:
        return bytes_damaged(rng, content)
    inner = bytearray(gzip.decompress(content))
    for _ in range(rng.choice((1, 2, 4))):
        start = 512 * rng.randrange(min(64, len(inner) // 512)) if rng.random() < 0.8 else 0
        header = bytes_damaged(rng, bytes(inner[start : start + 512]))
        inner[start : start + 512] = (header + bytes(512))[:512]
    return gzip.compress(bytes(inner), 1)


def has_packages(kind: Kind) -> bool:
    """Whether what a kind needs is installed."""
    import importlib.util

    return all(importlib.util.find_spec(name) for name in kind.needs)


def install_stand_in() -> None:
    """Puts TensorRT's stand-in in its place, of the very device that the engine of the bench is for."""
    if "tensorrt" not in sys.modules:
        from tests.stand_ins.tensorrt import install

        install(TENSORRT)
