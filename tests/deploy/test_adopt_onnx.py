from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import cv2
import numpy as np
import pytest

from deploy import Detector, build_trt, bundle, detect
from deploy.adopt_onnx import main
from deploy.contract import ModelContract, load_contract, read_sidecar, sidecar_path, write_sidecar
from deploy.errors import ContractError
from deploy.files import sha256_of
from deploy.runtime.output_values import generated_pictures
from deploy.runtime.preprocess import preprocess
from tests.stand_ins.foreign import CONTRACT, FAMILIES, SIZE_PX, foreign_model, slow_detections, write_foreign

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
Foreign = Callable[..., Path]


def small_graph(outputs: str = "topk", batch: int = 1, input_type: str = "float32") -> Any:
    """A graph whose rows are boxes, scores and labels; the first score follows the picture."""
    size = "N" if batch == -1 else str(batch)
    is_uint8 = input_type == "uint8"
    given = f"{'uint8' if is_uint8 else 'float'}[{size},{'32,32,3' if is_uint8 else '3,32,32'}] pixels"
    body = """
            floats = Cast <to=1> (pixels)
            mean = ReduceMean <axes=[1, 2, 3], keepdims=1> (floats)
            column = Flatten (mean)
            share = Sigmoid (column)"""
    if outputs == "topk":
        returned = f"float[{size},2,4] boxes, float[{size},2] scores, int64[{size},2] labels"
        body += """
            scores = Mul (share, both)
            zero = Mul (scores, none)
            space = Unsqueeze (zero, two)
            boxes = Add (space, fixed)
            integers = Cast <to=7> (zero)
            labels = Add (integers, classes)"""
    else:
        returned = "float[D,4] boxes, float[D] scores, int64[D] labels, int64[D] images"
        body += """
            high = Greater (share, none)
            where = NonZero (high)
            images = Gather <axis=0> (where, first)
            labels = Gather <axis=0> (where, second)
            places = Transpose <perm=[1, 0]> (where)
            scores = GatherND (share, places)
            column_of = Unsqueeze (scores, second_axis)
            zero = Mul (column_of, none)
            boxes = Add (zero, fixed_row)"""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        small ({given}) => ({returned})
        <float[1,2] both = {{0.9, 0.5}}, float none = {{0}}, int64[1] two = {{2}}, int64[1] second_axis = {{1}},
         int64[1,2] classes = {{0, 1}}, int64 first = {{0}}, int64 second = {{1}},
         float[1,2,4] fixed = {{3, 4, 20, 30, 5, 6, 22, 31}}, float[1,4] fixed_row = {{3, 4, 20, 30}}> {{{body}
        }}"""
    )
    for tensor in model.graph.initializer:  # as exporters write them: in bytes
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return model


SMALL_CONTRACT: Dict[str, Any] = {
    **CONTRACT,
    "input_name": "pixels",
    "class_names": ["disc", "bar"],
    "category_ids": [1, 2],
    "output_names": ["boxes", "scores", "labels"],
}


@pytest.fixture
def foreign(tmp_path: Path) -> Foreign:
    """`foreign(outputs, batch, input_type)` -> ONNX file without a sidecar; its contract lies in contract.json."""

    def write(outputs: str = "topk", batch: int = 1, input_type: str = "float32", model: Any = None) -> Path:
        path = tmp_path / "foreign.onnx"
        model = model or small_graph(outputs, batch, input_type)
        for index, node in enumerate(model.graph.node):
            node.name = f"node_{index}"
        onnx.save(model, str(path))
        contract = {
            **SMALL_CONTRACT,
            "input_shape": [batch, 32, 32, 3] if input_type == "uint8" else [batch, 3, 32, 32],
            "input_type": input_type,
            "outputs": outputs,
            "output_names": ["boxes", "scores", "labels", "images"][: 4 if outputs == "nms" else 3],
            "resize_wh_px": None,
        }
        path.with_name("contract.json").write_text(json.dumps(contract))
        return path

    return write


def adopt(path: Path, *words: str, **changes: Any) -> int:
    """Adopts the file, with other values for some keys of its contract; a value of ... takes the key out."""
    contract: Dict[str, Any] = {**json.loads(path.with_name("contract.json").read_text()), **changes}
    contract = {key: value for key, value in contract.items() if value is not ...}
    path.with_name("contract.json").write_text(json.dumps(contract))
    return main([str(path), "--contract", str(path.with_name("contract.json")), *words])


def adopted_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.adopted.onnx")


@pytest.mark.parametrize("arguments", [("topk", 2, "float32"), ("topk", -1, "uint8"), ("nms", 1, "float32")])
def test_model_with_a_written_contract_becomes_one_of_ours(foreign: Foreign, arguments: Any) -> None:
    path = foreign(*arguments)
    before = sha256_of(path)
    assert adopt(path) == 0
    written = path.with_name("contract.json")
    assert json.loads(json.dumps(load_contract(path).to_json())) == json.loads(written.read_text())
    assert read_sidecar(path)["inputs"]["contract"]["sha256"] == sha256_of(written)
    assert sha256_of(path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_name": "image"}, "has the inputs"),
        ({"input_shape": [1, 3, 4, 4]}, "has the inputs"),
        ({"output_names": ["boxes", "scores", "classes"]}, "has the outputs"),
        ({"output_names": ["scores", "boxes", "labels"]}, "expected boxes: (N, K, 4), float32"),
        ({"output_names": ["boxes", "labels", "scores"]}, "expected scores: (N, K), float32"),
        ({"resize": "crop"}, "resize is 'crop'"),
        ({"colour": "red"}, "unknown keys ['colour']"),
        ({"input_shape": [1, 3, 32.5, 32]}, "input_shape[2] is 32.5; expected a whole number"),
        ({"mean": [0.485, 0.456, 0.406]}, "mean is [0.485, 0.456, 0.406]; expected values of pixels, 0 to 255"),
        ({"std": [0.229, 0.224, 0.225]}, "0.229 becomes 58.395"),
        ({"pad_value": [0.447, 0.447, 0.447]}, "pad_value is [0.447"),
        ({"box_format": "xyxyr"}, "box_format is 'xyxyr'; expected one of ['xyxy', 'cxcywh', 'xywh']"),
        ({"strides": [8]}, "decode is not"),
        ({"decode": "grid", "box_format": "xyxy"}, "expected one of the two"),
        ({"candidates": 4000}, "expected 1 to 3840"),
        ({"output_parts": [["boxes"], ["scores"]]}, "expected one for each of the outputs"),
        ({"output_parts": [["boxes"], ["points"], ["label"]]}, "output_parts is"),
        ({"output_parts": [["boxes"], [], ["label"]]}, "output_parts is"),
        (
            {"output_parts": [["boxes"], ["score"], ["score"]]},
            "boxes in as many outputs as scores, or as score and label",
        ),
        ({"output_parts": "boxes"}, "output_parts is 'boxes'"),
        ({"candidates": True}, "candidates is True"),
        ({"score_threshold": "0.05"}, "score_threshold is '0.05'; expected a number"),
        ({"constant_inputs": {"pixels": [1]}}, "constant_inputs has ['pixels']; expected inputs of the graph"),
        ({"constant_inputs": {"size": [1, 1]}}, "constant_inputs has ['size']; expected inputs of the graph"),
        ({"class_names": ["disc"], "category_ids": [1]}, "labels from 0 to 1 in rows that count"),
        ({"box_units": "fractions"}, "most boxes in 'boxes' lie outside"),
    ],
)
def test_contract_that_does_not_fit_leaves_no_sidecar(
    foreign: Foreign, changes: Dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign("topk")
    assert adopt(path, **changes) == 2
    assert message in capsys.readouterr().err
    assert sorted(one.name for one in path.parent.iterdir()) == ["contract.json", "foreign.onnx"]


def test_sidecar_that_is_there_is_not_written_over(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign("topk")
    assert adopt(path) == 0
    before = sha256_of(sidecar_path(path))
    assert adopt(path) == 2
    assert "is there already" in capsys.readouterr().err
    assert sha256_of(sidecar_path(path)) == before


def test_contract_file_must_be_json(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign("topk")
    path.with_name("contract.json").write_text("input_name: image")
    assert main([str(path), "--contract", str(path.with_name("contract.json"))]) == 2
    assert "is not JSON" in capsys.readouterr().err


def adopted_family(folder: Path, family: str, opset: int = 17, **changes: Any) -> Path:
    path = write_foreign(folder, family, opset)
    contract = path.with_suffix(".contract.json")
    contract.write_text(json.dumps({**json.loads(contract.read_text()), **changes}))
    assert main([str(path), "--contract", str(contract)]) == 0
    return adopted_path(path)


def raw_outputs(model: Any, picture: np.ndarray, contract: ModelContract) -> Dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"image": preprocess(picture, contract).input}
    if len(session.get_inputs()) > 1:
        feed["orig_target_sizes"] = np.array([[SIZE_PX, SIZE_PX]])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_detections_of_a_family_are_those_of_a_decoding_of_ones_own(family: str, opset: int, tmp_path: Path) -> None:
    path = adopted_family(tmp_path, family, opset)
    detector = Detector(path)
    for _, picture in generated_pictures(SIZE_PX, SIZE_PX):
        found = detector(picture)
        expected = slow_detections(family, raw_outputs(foreign_model(family), picture, detector.contract))
        assert len(expected) > 20
        assert found.scores == pytest.approx([score for score, _, _ in expected], abs=1e-4)
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert found.boxes_xyxy == pytest.approx(np.array([box for _, _, box in expected]), abs=0.05)
    assert load_contract(path).output_names == ("boxes", "scores", "labels")


def test_centres_and_logits_are_found_out_from_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_foreign(tmp_path, "yolov5")
    path.with_name("contract.json").write_text(json.dumps(CONTRACT))
    assert adopt(path) == 0
    assert "box_format is cxcywh: formats make sense of so many boxes: xyxy 2 %" in capsys.readouterr().out
    path = write_foreign(tmp_path, "nanodet")
    path.with_name("contract.json").write_text(json.dumps({**CONTRACT, **FAMILIES["nanodet"]}))
    assert adopt(path, score_format=...) == 0
    assert "score_format is logits: scores are from " in capsys.readouterr().out
    picture = generated_pictures(SIZE_PX, SIZE_PX)[0][1]
    for family in ("yolov5", "nanodet"):
        with Detector(tmp_path / f"{family}.adopted.onnx") as detector:
            expected = slow_detections(family, raw_outputs(foreign_model(family), picture, detector.contract))
            assert detector(picture).scores == pytest.approx([score for score, _, _ in expected], abs=1e-4)


def test_a_graph_in_fp16_becomes_one_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, half = foreign_model("yolov5"), onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = half
    path = tmp_path / "half.onnx"
    onnx.save(model, str(path))
    path.with_name("contract.json").write_text(json.dumps({**CONTRACT, **FAMILIES["yolov5"]}))
    assert adopt(path) == 0
    assert "the graph is in FP16: it is in FP32 now" in capsys.readouterr().out
    picture = generated_pictures(SIZE_PX, SIZE_PX)[0][1]
    with Detector(adopted_path(path)) as detector:
        expected = slow_detections("yolov5", raw_outputs(foreign_model("yolov5"), picture, detector.contract))
        assert detector(picture).scores[:10] == pytest.approx([score for score, _, _ in expected[:10]], abs=5e-3)


@pytest.mark.parametrize("batch", [-1, 2])
def test_a_decoded_graph_takes_as_many_pictures_as_before(batch: int, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        grid (float[N,3,64,96] image) => (float[N,m,8] output) <int64[3] shape = {0, 8, -1}> {
            a = Conv <strides=[8,8], kernel_shape=[8,8]> (image, weight)
            r = Reshape (a, shape)
            output = Transpose <perm=[0,2,1]> (r)
        }"""
    )
    weight = np.random.default_rng(0).normal(0, 0.05, (8, 3, 8, 8)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    path = tmp_path / "grid.onnx"
    onnx.save(model, str(path))
    fields = {"decode": "grid", "score_format": "logits", "strides": [8], "input_shape": [batch, 3, 64, 96]}
    path.with_name("contract.json").write_text(json.dumps({**CONTRACT, **fields}))
    assert adopt(path) == 0
    pictures = [picture for _, picture in generated_pictures(96, 64)]
    with Detector(adopted_path(path)) as detector:
        both = detector.batch(pictures)
        assert len(both[0].scores) > 20
        for picture, found in zip(pictures, both, strict=True):
            alone = detector(picture)
            assert found.scores == pytest.approx(alone.scores, abs=1e-5)
            assert found.boxes_xyxy == pytest.approx(alone.boxes_xyxy, abs=1e-3)


def test_few_candidates_are_the_best_of_all(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    contract = {"nms_iou_threshold": 1.0}
    few = adopted_family(tmp_path / "few", "yolov8", candidates=20, **contract)
    with Detector(few) as first, Detector(adopted_family(tmp_path, "yolov8", **contract)) as second:
        picture = generated_pictures(SIZE_PX, SIZE_PX)[0][1]
        found, expected = first(picture), second(picture)
    assert len(found.scores) > 10
    assert found.scores == pytest.approx(expected.scores[: len(found.scores)])
    assert found.boxes_xyxy == pytest.approx(expected.boxes_xyxy[: len(found.scores)])


@pytest.mark.parametrize("family", ["yolox", "rtdetr", "ssd", "picodet", "yolov8"])
def test_an_adopted_family_can_be_built_and_bundled(family: str, tmp_path: Path) -> None:
    path = adopted_family(tmp_path, family)
    for version in ("8.6", "9.3", "10.3", "10.13", "11.0"):
        assert build_trt.main([str(path), "--fp16", "--target", version]) == 0
    assert bundle.main([str(path), "-o", str(tmp_path / "board.tar.gz")]) == 0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("yolox", {"decode": ...}, '"grid" as of YOLOX'),
        (
            "yolox",
            {"class_names": ["disc"], "category_ids": [1]},
            "output (1, 84, 8) float32, of a detector with 1 classes",
        ),
        ("ssd", {"background": ...}, "with background where the scores have a class more"),
        ("picodet", {"decode": ..., "strides": ...}, "with decode where boxes are yet to be decoded"),
        ("picodet", {"decode": ..., "strides": ...}, 'They fit with "decode": "bins".'),
        ("detr", {"background": ...}, 'They fit with "background": "first" (SSD, torchvision) or "last" (DETR), or'),
        ("detr", {"score_format": ...}, '"score_format": "logits" or "softmax_logits"'),
        ("picodet", {"strides": [4, 8, 16]}, "cannot be told"),
        ("yolov5", {"box_format": "xyxy"}, "Say which it is with box_format"),
        ("yolov5", {"box_units": "fractions"}, "lie outside"),
        ("nanodet", {"score_format": "probabilities"}, '"score_format": "logits"'),
        ("rtdetr", {"constant_inputs": {"orig_target_sizes": [1, 2, 3]}}, "expected numbers of the shape [1, 2]"),
    ],
)
def test_a_layout_that_cannot_be_or_cannot_be_told_is_refused_with_the_cure(
    family: str, changes: Dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_foreign(tmp_path, family)
    path.with_name("contract.json").write_text(json.dumps({**CONTRACT, **FAMILIES[family]}))
    assert adopt(path, **changes) == 2
    assert message in capsys.readouterr().err
    assert not adopted_path(path).exists()


def test_second_input_that_is_not_square_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_graph()
    model.graph.input.append(onnx.helper.make_tensor_value_info("im_shape", onnx.TensorProto.FLOAT, [1, 2]))
    path = tmp_path / "foreign.onnx"
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 64
    onnx.save(model, str(path))
    path.with_name("contract.json").write_text(json.dumps({**SMALL_CONTRACT, "input_shape": [1, 3, 32, 64]}))
    assert adopt(path) == 2
    assert '"constant_inputs": {"im_shape": [64, 32]}' in capsys.readouterr().err
    assert adopt(path, constant_inputs={"im_shape": [32, 64]}) == 0
    assert [value.name for value in onnx.load(adopted_path(path)).graph.input] == ["pixels"]


def test_weights_in_other_files_come_into_the_one(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign()
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(path), str(path), **options)
    data = path.with_name("weights.bin")
    assert adopt(path) == 0
    assert "weights.bin are in the one file" in capsys.readouterr().out
    sidecar = read_sidecar(adopted_path(path))
    assert sidecar["inputs"]["model data 1"] == {"file": str(data), "sha256": sha256_of(data)}
    data.unlink()
    assert len(Detector(adopted_path(path))(np.zeros((9, 9, 3), np.uint8)).scores) == 2
    assert adopt(path, "-o", str(path.with_name("again.onnx"))) == 2
    assert "keeps weights in other files" in capsys.readouterr().err


def test_weights_that_no_hash_covers_are_refused_by_all(foreign: Foreign) -> None:
    path = foreign()
    assert adopt(path) == 0
    document = json.loads(sidecar_path(path).read_text())
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(path), str(path), **options)
    document["artefact"]["sha256"] = sha256_of(path)
    sidecar_path(path).write_text(json.dumps(document))
    with pytest.raises(ContractError, match=r"weights in other files \(weights.bin\).*adopt the model anew"):
        Detector(path)


def test_files_beyond_the_limit_of_onnx_are_refused(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign()
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(path), str(path), **options)
    with path.with_name("weights.bin").open("r+b") as file:
        file.truncate(3 << 30)  # sparse: it takes no room
    assert adopt(path) == 2
    assert "has 3.0 GiB with its other files; expected below 2 GiB" in capsys.readouterr().err


def changed_graph(change: Callable[[Any], None]) -> Any:
    model = small_graph()
    change(model.graph)
    return model


def double_initialisers(graph: Any) -> None:
    for tensor in graph.initializer:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def give_more(graph: Any) -> None:
    graph.output.append(onnx.helper.make_tensor_value_info("share", onnx.TensorProto.FLOAT, [1, 1]))


def open_sizes(graph: Any) -> None:
    for value in (graph.input[0], *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def name_like_ours(graph: Any) -> None:
    for node in graph.node:
        node.input[:] = ["pixels_scale" if name == "both" else name for name in node.input]
    next(tensor for tensor in graph.initializer if tensor.name == "both").name = "pixels_scale"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (double_initialisers, "9 initialisers were inputs, too"),
        (give_more, "the outputs share are dropped"),
        (open_sizes, "the input is ['batch', 3, 'height', 32] in the graph: fixed to [1, 3, 32, 32]"),
        (name_like_ours, "1 tensors had names that later stages use, and got others: pixels_scale"),
    ],
)
def test_what_is_put_in_order_is_told(
    foreign: Foreign, change: Callable[[Any], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(model=changed_graph(change))
    before = sha256_of(path)
    assert adopt(path, input_shape=[1.0, 3.0, 32.0, 32.0], max_detections=100.0, category_ids=[1.0, 2.0]) == 0
    assert told in capsys.readouterr().out
    assert sha256_of(path) == before
    assert any(told in note for note in read_sidecar(adopted_path(path))["details"]["adopted"])
    model = onnx.load(adopted_path(path))
    assert [value.name for value in model.graph.input] == ["pixels"]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels"]
    contract = load_contract(adopted_path(path))
    assert (contract.input_shape, contract.max_detections, contract.category_ids) == ((1, 3, 32, 32), 100, (1, 2))
    found = Detector(adopted_path(path))(np.full((32, 32, 3), 255, np.uint8))
    assert found.boxes_xyxy.tolist() == [[3, 4, 20, 30], [5, 6, 22, 31]]


@pytest.mark.parametrize("names", [["", "", ""], ["one", "one", "one"]])
def test_nodes_get_names_of_their_own(foreign: Foreign, names: List[str]) -> None:
    path = foreign()
    model = onnx.load(path)
    for node, name in zip(model.graph.node, names, strict=False):
        node.name = name
    onnx.save(model, str(path))
    assert adopt(path) == 0
    found = [node.name for node in onnx.load(adopted_path(path)).graph.node]
    assert len(set(found)) == len(found)
    assert all(found)


def stored_weights(kind: str) -> Any:
    """The YOLOX-like model, its weights stored as FP16 behind a Cast or as integers behind a DequantizeLinear."""
    model = foreign_model("yolox")
    graph, nodes = model.graph, []
    for node in list(graph.node):
        if node.op_type == "Conv":
            tensor = next(one for one in graph.initializer if one.name == node.input[1])
            values = onnx.numpy_helper.to_array(tensor)
            name, given = f"{tensor.name}_stored", [f"{tensor.name}_stored"]
            if kind == "Cast":
                stored = [values.astype(np.float16)]
                operator = onnx.helper.make_node("Cast", given, [f"{tensor.name}_read"], to=onnx.TensorProto.FLOAT)
            else:
                scale = np.float32(np.abs(values).max() / 127)
                stored = [np.rint(values / scale).astype(np.int8), scale]
                given = [name, f"{name}_s"]
                operator = onnx.helper.make_node("DequantizeLinear", given, [f"{tensor.name}_read"])
            graph.initializer.extend(
                onnx.numpy_helper.from_array(one, two) for one, two in zip(stored, given, strict=True)
            )
            graph.initializer.remove(tensor)
            nodes.append(operator)
            node.input[1] = f"{tensor.name}_read"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("kind", ["Cast", "DequantizeLinear"])
def test_weights_that_are_stored_smaller_are_read(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "small.onnx", stored_weights(kind)
    onnx.save(model, str(path))
    path.with_name("contract.json").write_text(json.dumps({**CONTRACT, **FAMILIES["yolox"]}))
    assert adopt(path) == 0
    assert f"10 weights were computed from constants ({kind})" in capsys.readouterr().out
    picture = generated_pictures(SIZE_PX, SIZE_PX)[0][1]
    with Detector(adopted_path(path)) as detector:
        expected = slow_detections("yolox", raw_outputs(model, picture, detector.contract))
        assert detector(picture).scores == pytest.approx([score for score, _, _ in expected], abs=1e-4)
    kinds = {node.op_type for node in onnx.load(adopted_path(path)).graph.node}
    assert not kinds & {"DequantizeLinear"}


def faulty(scores: str = "scores0", labels: str = "labels0") -> Any:
    """The small graph, with what happens on bright pictures alone: in `bright`, 0 or 1."""
    model = small_graph()
    graph = model.graph
    for node in graph.node:
        node.output[:] = [f"{name}0" if name in ("scores", "labels") else name for name in node.output]
        node.input[:] = [f"{name}0" if name in ("scores", "labels") else name for name in node.input]
    more = onnx.parser.parse_graph(
        f"""more (float[1,3,32,32] pixels) => (float[1,2] scores)
        <float[1] edge = {{1.9}}, float[1] five = {{5}}, int64[1,1] many = {{7}}> {{
            largest = ReduceMax <keepdims=0> (pixels)
            over = Greater (largest, edge)
            bright = Cast <to=1> (over)
            bright_labels = Cast <to=7> (over)
            shift = Mul (bright_labels, many)
            below = Neg (bright)
            root = Sqrt (below)
            scores = Add (scores0, {scores})
            labels = Add (labels0, {labels})
        }}"""
    )
    graph.node.extend(more.node)
    graph.initializer.extend(more.initializer)
    zero = onnx.numpy_helper.from_array(np.zeros((1, 1), np.float32), "scores00")
    graph.initializer.extend([zero, onnx.numpy_helper.from_array(np.zeros((1, 1), np.int64), "labels00")])
    return model


NOT_NUMBERS, NO_CLASS = {"scores": "root", "labels": "labels00"}, {"scores": "scores00", "labels": "shift"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [(NOT_NUMBERS, "values that are not numbers"), (NO_CLASS, "labels from 7 to 8 in rows that count")],
)
def test_values_are_looked_at_on_pictures_with_structure(
    foreign: Foreign, fault: Dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(model=faulty(**fault))
    assert adopt(path) == 2
    assert f"{message}, of a generated picture" in capsys.readouterr().err
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize(("fault", "message"), [(NOT_NUMBERS, "not numbers"), (NO_CLASS, "labels from 7 to 8")])
def test_a_photo_on_which_it_fails_later_is_named(
    foreign: Foreign, fault: Dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(model=faulty(**fault))
    contract = ModelContract.from_json(json.loads(path.with_name("contract.json").read_text()), path)
    write_sidecar(path, {}, contract)
    dark, bright = tmp_path / "dark.png", tmp_path / "bright.png"
    cv2.imwrite(str(dark), np.full((32, 32, 3), 60, np.uint8))
    cv2.imwrite(str(bright), np.full((32, 32, 3), 255, np.uint8))
    with Detector(path) as detector:
        assert len(detector(dark).scores) == 2
        with pytest.raises(ContractError, match=f"bright.png: the model gave .*{message}"):
            detector(bright)
        with pytest.raises(ContractError, match=f"the image: the model gave .*{message}"):
            detector(np.full((32, 32, 3), 255, np.uint8))
    assert detect.main([str(path), str(bright), "-o", str(tmp_path / "seen")]) == 2
    assert "bright.png" in capsys.readouterr().err


def test_rows_that_do_not_count_may_be_padding(foreign: Foreign) -> None:
    model = small_graph()
    for tensor, values in (("both", [[0.9, 0.0]]), ("classes", [[0, -1]])):
        old = next(one for one in model.graph.initializer if one.name == tensor)
        old.CopyFrom(onnx.numpy_helper.from_array(np.array(values, onnx.numpy_helper.to_array(old).dtype), tensor))
    path = foreign(model=model)
    assert adopt(path) == 0
    assert len(Detector(path)(np.full((32, 32, 3), 255, np.uint8)).scores) == 1


def test_it_is_said_when_nothing_was_found_to_look_at(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign()
    assert adopt(path, score_threshold=0.95) == 0
    assert "no row scored above 0.95 on 2 pictures" in capsys.readouterr().out
    sidecar_path(path).unlink()
    assert adopt(path, score_threshold=0.05) == 0
    assert "no row scored" not in capsys.readouterr().out


def test_boxes_from_0_to_1_are_recognised(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_graph()
    old = next(one for one in model.graph.initializer if one.name == "fixed")
    old.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(old) / np.float32(32), "fixed"))
    path = foreign(model=model)
    assert adopt(path) == 0
    assert "box_units is fractions: boxes are from 0.0938 to 0.969" in capsys.readouterr().out
    found = Detector(adopted_path(path))(np.full((32, 32, 3), 255, np.uint8))
    assert found.boxes_xyxy == pytest.approx(np.float32([[3, 4, 20, 30], [5, 6, 22, 31]]))


@pytest.mark.parametrize(("words", "name"), [(["-o", "mine.onnx"], "mine.onnx"), ([], "foreign.adopted.onnx")])
def test_a_changed_graph_is_another_file(
    foreign: Foreign, words: Sequence[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign(model=changed_graph(give_more))
    monkeypatch.chdir(path.parent)
    assert adopt(path, *words) == 0
    assert sorted(one.name for one in path.parent.iterdir()) == sorted(
        ["contract.json", "foreign.onnx", name, f"{name}.json"]
    )
    assert adopt(path, *words) == 2


def float_labels() -> Any:
    model = small_graph()
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["labels0" if name == "labels" else name for name in node.output]
    graph.node.append(onnx.helper.make_node("Cast", ["labels0"], ["labels"], to=onnx.TensorProto.FLOAT))
    graph.output[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model


def test_labels_of_floating_point_are_read_and_scores_are_not_taken_for_them(
    foreign: Foreign, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(model=float_labels())
    assert adopt(path, output_names=["boxes", "labels", "scores"]) == 2
    assert "'scores' is taken for labels and has values such as 0." in capsys.readouterr().err
    assert adopt(path, output_names=["boxes", "scores", "labels"]) == 0
    found = Detector(adopted_path(path))(np.full((32, 32, 3), 255, np.uint8))
    assert found.labels.tolist() == [0, 1]


def test_the_model_itself_is_never_written_over(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign(model=changed_graph(give_more))
    before = sha256_of(path)
    assert adopt(path, "-o", str(path)) == 2
    assert "--output is the model itself, whose graph has to be changed (the outputs share" in capsys.readouterr().err
    assert sha256_of(path) == before
    assert not sidecar_path(path).exists()


def test_image_is_one_that_can_be_read(foreign: Foreign, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign()
    assert adopt(path, "--image", str(tmp_path / "none.jpg")) == 2
    assert "none.jpg" in capsys.readouterr().err
    cv2.imwrite(str(tmp_path / "some.png"), np.full((40, 30, 3), 200, np.uint8))
    assert adopt(path, "--image", str(tmp_path / "some.png")) == 0
