"""The box parser is compiled and run. nvinfer itself is not here: its configuration is compared with the contract."""

from __future__ import annotations

import configparser
import dataclasses
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from deploy.contract import ModelContract, load_contract, read_sidecar, sidecar_path, write_sidecar  # noqa: E402
from deploy.handover import main  # noqa: E402
from deploy.runtime.golden import noise_input  # noqa: E402
from deploy.runtime.postprocess import postprocess  # noqa: E402
from deploy.runtime.preprocess import Prepared  # noqa: E402
from deploy.runtime.session import OrtSession  # noqa: E402
from deploy.serving.deepstream import parser_source  # noqa: E402
from tests.stand_ins.detector import CONTRACT, mini_detector, write_detector, write_small_detector  # noqa: E402

HERE = Path(__file__).parent
STAND_INS = HERE.parents[1] / "stand_ins"
TYPES = {"float32": 0, "int32": 3, "int64": 4}
"""numpy's name -> NvDsInferDataType."""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
Parser = Callable[..., "subprocess.CompletedProcess[str]"]


def handed_over(model: Path, *words: str) -> Dict[str, str]:
    """The [property] of nvinfer's configuration that deploy.handover writes into `model`'s folder/out."""
    folder = model.with_name("out")
    assert main([str(model), "--to", "deepstream", "-o", str(folder), *words]) == 0
    (path,) = folder.glob("config_infer_*.txt")
    config = configparser.ConfigParser()
    config.read(path)
    return {**config["property"], **config["class-attrs-all"]}


def write_with(path: Path, **changes: Any) -> Path:
    """A detector whose contract has these changes."""
    onnx.save(mini_detector(), str(path))
    write_sidecar(path, {}, dataclasses.replace(CONTRACT, **changes))
    return path


@functools.cache
def compiled(source: str, folder: Path) -> Path:
    """A program that calls the parser of this source."""
    program = folder / "parser"
    name = source[source.index("CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(") :].partition("(")[2].partition(")")[0]
    (folder / "parser.cpp").write_text(source)
    words = [
        "g++",
        "-std=c++14",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-infinite-recursion",
        "-Wno-unused-function",
    ]
    sources = [folder / "parser.cpp", HERE / "parser_driver.cpp"]
    subprocess.run([*words, f"-DPARSER={name}", "-isystem", STAND_INS, *sources, "-o", program], check=True)
    return program


def parsed(program: Path, contract: ModelContract, outputs: Dict[str, np.ndarray]) -> subprocess.CompletedProcess[str]:
    """What the parser prints of the outputs of one image."""
    words: List[object] = [contract.input_width_px, contract.input_height_px, len(contract.class_names)]
    words.append(contract.score_threshold)
    for index, (name, values) in enumerate(outputs.items()):
        path = program.with_name(f"{index}.bin")
        path.write_bytes(np.ascontiguousarray(values).tobytes())
        words += [name, TYPES[values.dtype.name], path]
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)


def objects_of(text: str) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes as two corners, scores, labels of what the parser printed."""
    rows = np.array([line.split() for line in text.splitlines()], np.float32).reshape(-1, 6)
    boxes = np.concatenate([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], 1)
    return boxes, rows[:, 5], rows[:, 0].astype(np.int64)


def of_whole_input(contract: ModelContract) -> Prepared:
    size = contract.input_width_px, contract.input_height_px
    return Prepared(np.zeros(0), (1.0, 1.0), size, size)


def assert_same_boxes(program: Path, contract: ModelContract, outputs: Dict[str, np.ndarray]) -> int:
    expected = postprocess(outputs, contract, of_whole_input(contract))
    done = parsed(program, contract, {name: values[0] for name, values in outputs.items()})
    assert done.returncode == 0, done.stderr
    boxes, scores, labels = objects_of(done.stdout)
    assert labels.tolist() == expected.labels.tolist()
    assert scores.tolist() == expected.scores.tolist()
    np.testing.assert_allclose(boxes, expected.boxes_xyxy, rtol=1e-6, atol=1e-5)
    return len(scores)


@needs_compiler
def test_the_parser_gives_the_boxes_of_postprocess_on_golden_outputs(tmp_path: Path) -> None:
    model = write_detector(tmp_path / "mini.onnx")
    handed_over(model, "--precision", "fp16")
    program = compiled((tmp_path / "out" / "nvdsinfer_mini.cpp").read_text(), tmp_path)
    count = 0
    for path in (model, tmp_path / "out" / "mini.onnx"):  # labels of int64, and of int32
        with OrtSession(path, threads=1) as session:
            for seed in range(4):
                outputs = session.infer({"images": noise_input(session.contract, seed)})
                count += assert_same_boxes(program, session.contract, outputs)
    assert count > 100


@needs_compiler
def test_crowds_edges_and_ties_are_as_in_postprocess_in_both_layouts(tmp_path: Path) -> None:
    contract = dataclasses.replace(CONTRACT, max_detections=30, nms_iou_threshold=0.5, score_threshold=0.1)
    in_rows = dataclasses.replace(contract, outputs="rows", output_names=('a "name" of é',))
    folders = [tmp_path / "topk", tmp_path / "rows"]
    for folder in folders:
        folder.mkdir()
    of_three, of_rows = (
        compiled(parser_source(one, "x-y"), at) for one, at in zip((contract, in_rows), folders, strict=True)
    )
    random = np.random.default_rng(1)
    for crowd in (0, 1, 400):
        first = random.integers(-20, 60, (crowd, 2)).astype(np.float32)
        boxes = np.concatenate([first, first + random.integers(-2, 30, (crowd, 2))], 1).astype(np.float32)
        scores = (random.integers(0, 20, crowd) / 20).astype(np.float32)  # many are equal
        labels = random.integers(0, 2, crowd)
        labels[scores <= 0.1] = 99  # padding
        count = assert_same_boxes(
            of_three, contract, {"boxes": boxes[None], "scores": scores[None], "labels": labels[None]}
        )
        rows = np.concatenate([boxes, scores[:, None], labels[:, None]], 1).astype(np.float32)[None]
        assert assert_same_boxes(of_rows, in_rows, {in_rows.output_names[0]: rows}) == count
        assert count == {0: 0, 400: 30}.get(crowd, count)


@needs_compiler
def test_the_parser_refuses_what_postprocess_refuses(tmp_path: Path) -> None:
    program = compiled(parser_source(CONTRACT, "x"), tmp_path)
    good = {
        "boxes": np.array([[1, 2, 30, 40]], np.float32), "scores": np.array([0.5], np.float32), "labels": np.array([1])
    }  # fmt: skip
    assert parsed(program, CONTRACT, good).stdout == "1 1 2 29 38 0.5\n"
    for part, value, reason in (
        ("scores", np.float32([np.nan]), "a score is no number"),
        ("boxes", np.float32([[1, np.inf, 3, 4]]), "a box is no number"),
        ("labels", np.array([2]), "a label is that of no class"),
        ("labels", np.array([-1]), "a label is that of no class"),
        ("boxes", np.array([[1, 2, 3, 4]], np.int32), "the output boxes is of another type"),
    ):
        done = parsed(program, CONTRACT, {**good, part: value})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"NvDsInferParse_x: {reason}")
    done = parsed(program, CONTRACT, {"boxes": good["boxes"], "scores": good["scores"]})
    assert "the network has no output labels" in done.stderr


def test_the_configuration_says_what_the_contract_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_with(
        tmp_path / "mini.v2.onnx", mean=(123.675, 116.28, 103.53), std=(57.5, 57.5, 57.5), channel_order="bgr",
        resize="stretch", score_threshold=0.3,
    )  # fmt: skip
    values = handed_over(model, "--precision", "fp32")
    assert float(values["net-scale-factor"]) == pytest.approx(1 / 57.5)
    assert values == {
        **values,
        "offsets": "123.675;116.28;103.53",
        "model-color-format": "1",
        "maintain-aspect-ratio": "0",
        "symmetric-padding": "0",
        "scaling-filter": "1",
        "network-mode": "0",
        "network-type": "0",
        "cluster-mode": "4",
        "batch-size": "1",
        "infer-dims": "3;64;64",
        "num-detected-classes": "2",
        "pre-cluster-threshold": "0.3",
        "onnx-file": "mini.onnx",
        "labelfile-path": "labels.txt",
        "parse-bbox-func-name": "NvDsInferParse_mini",
        "custom-lib-path": "libnvdsinfer_mini.so",
    }
    out = tmp_path / "out"
    assert (out / "labels.txt").read_text() == "disc\nbar\n"
    assert "libnvdsinfer_mini.so: nvdsinfer_mini.cpp\n\t$(CXX)" in (out / "Makefile").read_text()
    assert load_contract(out / "mini.onnx") == load_contract(model)  # nvinfer does all that it says
    assert "nvinfer pads with black" not in capsys.readouterr().out


def test_what_nvinfer_does_otherwise_is_said_and_stands_in_the_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_with(tmp_path / "mini.onnx", resize_wh_px=(60, 48), pad_value=(120.0, 119.0, 118.0))
    assert handed_over(model, "--precision", "fp16")["maintain-aspect-ratio"] == "1"
    out = capsys.readouterr().out
    text = (tmp_path / "out" / "config_infer_mini.txt").read_text()
    for said in (
        "nvinfer pads with black, where the training padded with 120, 119, 118",
        "nvinfer fits frames into the whole 64 x 64 input, where the training fitted them into 60 x 48",
        "nvinfer rounds the size of the resized frame down",
        "clipped after NMS",
    ):
        assert f"note: {said}" in out or said in out
        assert said in text
    contract = load_contract(tmp_path / "out" / "mini.onnx")
    assert (contract.pad_value, contract.resize_wh_px) == ((0.0, 0.0, 0.0), None)


def nvinfer_input(pixels: np.ndarray, values: Dict[str, str]) -> np.ndarray:
    """What nvinfer makes of (3, height, width) pixels: its formula."""
    offsets = np.float32(values["offsets"].split(";")).reshape(3, 1, 1)
    return np.float32(values["net-scale-factor"]) * (pixels - offsets)[None]


@pytest.mark.parametrize("quantised", [None, np.int8])
def test_a_std_for_each_channel_is_put_into_the_graph(
    quantised: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = dataclasses.replace(CONTRACT, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    model = tmp_path / "mini.int8.onnx"
    onnx.save(mini_detector(quantised), str(model))
    write_sidecar(model, {}, contract, {"ranges": {"images": [-3.0, 3.0]}})
    values = handed_over(model, *([] if quantised else ["--precision", "fp16"]))
    assert "the graph itself divides the channels by 58.395, 57.12, 57.375" in capsys.readouterr().out
    assert values["net-scale-factor"] == "1.0"
    written = tmp_path / "out" / "mini.onnx"
    assert load_contract(written).std == (1.0, 1.0, 1.0)
    assert read_sidecar(written)["details"]["ranges"] == {"images": [-3.0, 3.0]}  # a tensor of the graph still
    assert any("images" in node.output for node in onnx.load(str(written)).graph.node)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64)).astype(np.float32)
    with OrtSession(model, threads=1) as plain, OrtSession(written, threads=1) as served:
        mean, std = (np.float32(part).reshape(3, 1, 1) for part in (contract.mean, contract.std))
        expected = plain.infer({"images": ((pixels - mean) / std)[None]})
        found = served.infer({served.contract.input_name: nvinfer_input(pixels, values)})
        assert found["labels"].dtype == np.int32
        np.testing.assert_allclose(
            np.sort(found["scores"]), np.sort(expected["scores"]), rtol=0.02 if quantised else 1e-4
        )


def test_a_quantised_file_is_built_on_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = handed_over(write_detector(tmp_path / "mini.int8.onnx", np.int8))
    assert (values["network-mode"], values["model-engine-file"]) == ("1", "mini.engine")
    assert "onnx-file" not in values  # nvinfer would build FP16 of it
    assert "build mini.engine with deploy.build_trt" in capsys.readouterr().out


def engine_of(source: Path, path: Path, **details: Any) -> Path:
    path.write_bytes(b"an engine")
    known = {"tensorrt": "10.3.0", "precision": "int8", "device": "Orin", **details}
    write_sidecar(path, {"onnx": source}, load_contract(source), known)
    return path


def test_an_engine_is_handed_over_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of(
        write_small_detector(tmp_path / "x.onnx", "topk", batch=-1), tmp_path / "x.engine", shapes=[1, 4, 6]
    )
    values = handed_over(engine, "--max-batch", "6")
    assert (values["network-mode"], values["batch-size"], values["model-engine-file"]) == ("1", "6", "x.engine")
    assert "onnx-file" not in values
    assert (tmp_path / "out" / "x.engine").read_bytes() == b"an engine"
    assert load_contract(tmp_path / "out" / "x.engine").pad_value == (0.0, 0.0, 0.0)
    assert "the engine runs on Orin with TensorRT 10.3.0 alone" in capsys.readouterr().out


def test_what_cannot_be_handed_over_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(model: Path, *words: str) -> str:
        assert main([str(model), "--to", "deepstream", "-o", str(tmp_path / "out"), *words]) == 2
        assert not list(tmp_path.glob("*out*"))
        (line,) = capsys.readouterr().err.splitlines()
        return line

    plain = write_detector(tmp_path / "plain.onnx")
    assert "say in which precision, --precision fp16 or fp32" in message(plain)
    int8 = write_detector(tmp_path / "plain.int8.onnx", np.int8)
    assert "--precision is fp16; " in message(int8, "--precision", "fp16")
    assert "quantised for target onnxruntime" in message(write_detector(tmp_path / "u8.onnx", np.uint8))
    nms = write_small_detector(tmp_path / "nms.onnx", "nms")
    assert "it has NMS in the graph" in message(nms, "--precision", "fp16")
    pixels = write_small_detector(tmp_path / "pixels.onnx", "topk", input_type="uint8")
    assert "it reads uint8, and nvinfer gives float32. Export it with --input-type" in message(
        pixels, "--precision", "fp16"
    )
    named = write_with(tmp_path / "named.onnx", class_names=("a;b", "c"))
    assert "its class 'a;b' cannot stand in a file of labels" in message(named, "--precision", "fp16")
    part = write_with(tmp_path / "part.onnx", resize="stretch", resize_wh_px=(32, 48))
    assert "which nvinfer cannot do. Export with --size 32 48" in message(part, "--precision", "fp16")
    uneven = engine_of(write_with(tmp_path / "uneven.onnx", std=(1.0, 2.0, 3.0)), tmp_path / "uneven.engine")
    assert "Hand over the ONNX file, which is changed to do so itself" in message(uneven)
    small = engine_of(
        write_small_detector(tmp_path / "s.onnx", "topk", batch=-1), tmp_path / "s.engine", shapes=[1, 2, 4]
    )
    assert "--max-batch is 8; the engine takes 4 images at most" in message(small)
    (tmp_path / "s.onnx").unlink()
    assert "which is not there as it was; expected that file where it was, or beside" in message(small)
    assert "--model-version is given with --to deepstream" in message(plain, "--model-version", "2")
    assert "no such file" in message(tmp_path / "none.onnx")
    sidecar_path(plain).unlink()
    assert "expected the sidecar" in message(plain)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    assert main([str(int8), "--to", "deepstream", "-o", str(tmp_path / "out")]) == 2
    assert "out is there already" in capsys.readouterr().err
