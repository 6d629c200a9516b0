"""Triton's configuration, read by Triton's own protobuf; the server itself is not here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from deploy.contract import ModelContract, load_contract, write_sidecar  # noqa: E402
from deploy.handover import main  # noqa: E402
from deploy.runtime.session import OrtSession  # noqa: E402
from deploy.serving.triton import TYPES, quoted  # noqa: E402
from tests.stand_ins.detector import CONTRACT, mini_detector, write_detector, write_small_detector  # noqa: E402


@pytest.fixture(scope="module")
def model_config_pb2() -> Any:
    """Of tritonclient, by its file: its package would import grpc."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs tritonclient")
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def served(model: Path, pb2: Any, *words: str, version: int = 1) -> Any:
    """Triton's reading of the configuration that is written for `model`."""
    from google.protobuf import text_format

    repository = model.with_name("repository")
    assert main([str(model), "--to", "triton", "-o", str(repository), *words]) == 0
    (path,) = repository.glob("*/config.pbtxt")
    config = text_format.Parse(path.read_text(), pb2.ModelConfig())
    assert config.name == path.parent.name
    assert (path.parent / str(version) / config.default_model_filename).read_bytes() == model.read_bytes()
    return config


def tensors(values: Any, pb2: Any) -> List[Any]:
    return [(value.name, pb2.DataType.Name(value.data_type), list(value.dims)) for value in values]


@pytest.mark.parametrize(("outputs", "batch"), [("topk", -1), ("topk", 2), ("nms", -1), ("nms", 2)])
@pytest.mark.parametrize("input_type", ["float32", "uint8"])
def test_the_tensors_are_those_that_onnx_runtime_finds(
    outputs: str, batch: int, input_type: str, tmp_path: Path, model_config_pb2: Any
) -> None:
    model = write_small_detector(tmp_path / "small.onnx", outputs, batch, input_type)
    config = served(model, model_config_pb2, "--max-batch", "5")
    is_batched = batch == -1 and outputs == "topk"
    assert config.max_batch_size == (5 if is_batched else 0)
    assert config.HasField("dynamic_batching") == is_batched
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    with OrtSession(model, threads=1) as session:
        names = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}
        for found, expected in (
            (config.input, session.runtime.get_inputs()),
            (config.output, session.runtime.get_outputs()),
        ):
            shapes = [[size if isinstance(size, int) else -1 for size in one.shape] for one in expected]
            assert tensors(found, model_config_pb2) == [
                (one.name, TYPES[names[one.type]], shape[1:] if is_batched else shape)
                for one, shape in zip(expected, shapes, strict=True)
            ]


def test_a_client_finds_the_contract_in_the_configuration(tmp_path: Path, model_config_pb2: Any) -> None:
    model = tmp_path / "mini.onnx"
    onnx.save(mini_detector(), str(model))
    contract = dataclasses.replace(CONTRACT, class_names=('é "quoted" \\ 名', "b\nc"))
    write_sidecar(model, {}, contract, {"parameters": 7})
    config = served(model, model_config_pb2)
    document = json.loads(config.parameters["contract"].string_value)
    assert ModelContract.from_json(document, "config.pbtxt") == contract
    copy = tmp_path / "repository" / "mini" / "1" / "model.onnx"
    assert load_contract(copy) == contract  # so that our commands measure what is served
    assert quoted('a"\\\n名') == '"a\\042\\134\\012\\345\\220\\215"'


def test_quantised_files_and_engines_say_where_they_run(
    tmp_path: Path, model_config_pb2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pb2 = model_config_pb2
    (tmp_path / "a").mkdir()
    model = write_detector(tmp_path / "a" / "mini.int8.onnx", np.uint8)
    write_sidecar(model, {}, CONTRACT, {"target": "onnxruntime"})
    config = served(model, pb2)
    assert [group.kind for group in config.instance_group] == [pb2.ModelInstanceGroup.KIND_CPU]
    assert "it runs on the CPU" in capsys.readouterr().out

    (tmp_path / "b").mkdir()
    model = write_detector(tmp_path / "b" / "x.onnx", np.int8)
    write_sidecar(model, {}, CONTRACT, {"target": "tensorrt"})
    assert not served(model, pb2).instance_group
    assert (
        "the file was quantised for TensorRT: ONNX Runtime computes the same, and is not fast"
        in capsys.readouterr().out
    )

    (tmp_path / "c").mkdir()
    source = write_small_detector(tmp_path / "c" / "x.onnx", "topk", batch=-1)
    engine = tmp_path / "c" / "x.engine"
    for version, kind, shapes, most in (("8.6.2", "TYPE_INT32", [1, 2, 8], 8), ("10.3.0", "TYPE_INT64", [2, 2, 8], 0)):
        engine.write_bytes(version.encode())
        known = {"tensorrt": version, "precision": "fp16", "device": "Orin", "shapes": shapes}
        write_sidecar(engine, {"onnx": source}, load_contract(source), known)
        config = served(engine, pb2, "--name", f"of-{most}") if most else None
        if config is not None:
            assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
            assert [group.kind for group in config.instance_group] == [pb2.ModelInstanceGroup.KIND_GPU]
            assert config.max_batch_size == most
            assert tensors(config.output, pb2)[2] == ("labels", kind, [3])
            assert "Triton's must be that one" in capsys.readouterr().out
        else:
            assert main([str(engine), "--to", "triton", "-o", str(tmp_path / "other")]) == 0
            assert "the engine takes 2 images at least" in capsys.readouterr().out
            assert "TYPE_INT64 dims: [ -1, 3 ]" in (tmp_path / "other" / "x" / "config.pbtxt").read_text()


def test_versions_of_one_model_and_what_is_in_the_way(
    tmp_path: Path, model_config_pb2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_detector(tmp_path / "mini.onnx")
    words = [str(model), "--to", "triton", "-o", str(tmp_path / "repository")]
    served(model, model_config_pb2)
    served(model, model_config_pb2, "--model-version", "2", version=2)

    def message(*more: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([*words, *more]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        (line,) = capsys.readouterr().err.splitlines()
        return line

    capsys.readouterr()
    assert "2 is there already; remove it, or give another --model-version" in message("--model-version", "2")
    assert "--model-version is 0; expected 1 or more" in message("--model-version", "0")
    assert "--max-batch is 0; expected at least 1" in message("--max-batch", "0")
    assert "the model is called 'a/b'" in message("--name", "a/b")
    assert "--precision is given with --to triton" in message("--precision", "fp16")
    onnx.save(mini_detector(), str(model))
    write_sidecar(model, {}, dataclasses.replace(CONTRACT, score_threshold=0.5))
    assert "config.pbtxt is not what this model needs" in message("--model-version", "3")
    model.write_bytes(model.read_bytes() + b"\0")
    assert "is not the file that its sidecar describes" in message("--name", "changed")
