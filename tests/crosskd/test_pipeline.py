"""crosskd.pipeline: which commands it plans, what it asks first, and the whole job."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from mmdet.registry import MODELS

from crosskd import pipeline
from crosskd.config import load_config, set_classes
from crosskd.disk_space import bytes_of_training
from crosskd.models.checkpoint import save_detector_weights
from crosskd.pipeline import (
    PipelineOptions,
    check_output,
    check_packages,
    check_space,
    check_validation_set,
    planned_stages,
    with_classes_taught,
)
from crosskd.stages import Stage, start_of
from deploy.commands import run_captured
from deploy.contract import read_sidecar
from deploy.dataset import load_coco
from deploy.errors import CheckpointError, ConfigError, DataError, PipelineError
from deploy.files import read_json, write_json
from deploy.layouts import SPLITS, split_paths

ROOT = Path(__file__).parents[2]


def _planned(config: Path, *flags: str) -> list[Stage]:
    arguments = pipeline.command_parser().parse_args([str(config), "--data", "D", "--output", "O", *flags])
    options, _ = pipeline.options_from_arguments(arguments)
    return planned_stages(options, load_config(config))


def _command(stages: list[Stage], name: str) -> str:
    return " ".join(next(stage for stage in stages if stage.name == name).words)


# ---- the plan


def test_the_plan_goes_from_training_to_the_report(configs: Path) -> None:
    stages = _planned(configs / "crosskd_tiny.py", "--seed", "3")
    names = [stage.name for stage in stages]
    assert names[:6] == ["teacher", "export teacher", "baseline", "student", "export", "quantise"]
    measured = [name for name in names if name.startswith(("accuracy", "latency"))]
    roles = ["teacher", "teacher-onnx-fp32", "baseline", "student", "onnx-fp32", "onnx-int8"]
    assert measured == [f"{what} {role}" for role in roles for what in ("accuracy", "latency")]
    assert names[-1] == "report"
    config = configs / "crosskd_tiny.py"
    teacher_config = configs / "gfl_tiny_teacher.py"
    assert _command(stages, "teacher") == f"crosskd.train {teacher_config} --data D -o O/teacher --seed 3"
    assert _command(stages, "baseline") == f"crosskd.train {config} --data D --seed 3 -o O/baseline"
    assert _command(stages, "student") == (
        f"crosskd.distill {config} --data D --seed 3 --teacher-checkpoint O/teacher/detector.pth -o O/student"
    )
    assert _command(stages, "export") == "deploy.export O/student -o O/student.onnx"
    report = _command(stages, "report")
    assert report.endswith("--max-ap-drop=5.0 -o O/report.html")
    assert report.count(".result.json") == 12
    limited = _planned(configs / "crosskd_tiny.py", "--limits", "limits.toml")
    assert _command(limited, "report").endswith(".result.json --limits limits.toml -o O/report.html")


def test_every_planned_command_is_one_that_its_module_understands(
    configs: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in _planned(configs / "crosskd_tiny.py", "--target", "tensorrt", "--max-int8-drop", "0.5"):
        module = importlib.import_module(stage.words[0])
        # The paths do not exist, which is an error of its own; an unknown flag would end in SystemExit.
        assert module.main(stage.words[1:]) == 2
        assert capfd.readouterr().err.startswith("error: ")


def test_for_tensorrt_it_builds_two_engines_and_measures_them(configs: Path) -> None:
    stages = _planned(configs / "crosskd_tiny.py", "--target", "tensorrt")
    assert "--target tensorrt" in _command(stages, "quantise")
    assert (
        _command(stages, "build engine-int8") == "deploy.build_trt O/student.int8.onnx --int8 -o O/engine-int8.engine"
    )
    assert "accuracy engine-fp16" in [stage.name for stage in stages]
    teacher = "deploy.build_trt O/teacher.onnx --fp16 -o O/teacher-engine-fp16.engine"
    assert _command(stages, "build teacher-engine-fp16") == teacher
    assert "--role teacher-engine-fp16" in _command(stages, "latency teacher-engine-fp16")


def test_with_a_budget_the_ways_to_int8_follow_one_another(configs: Path) -> None:
    stages = _planned(configs / "crosskd_tiny.py", "--max-int8-drop", "0.5")
    names = [stage.name for stage in stages]
    ways = ["quantise by INT8 predictors", "quantise by max", "quantise by auto", "quantise by bias correction",
            "quantise by blocks in float", "INT8-aware CrossKD"]  # fmt: skip
    assert [name for name in names if name in ways] == ways
    first = [ways[0], "accuracy INT8 predictors", "latency INT8 predictors"]
    assert names[4:13] == ["export", "accuracy float on val", *first, ways[1], "accuracy max", "latency max", ways[2]]
    assert _command(stages, ways[0]).endswith("--method max --int8-predictors -o O/int8/INT8_predictors.onnx")
    chosen = names.index("choose INT8")
    assert names[chosen - 3 : chosen] == [ways[-1], "accuracy INT8-aware CrossKD", "latency INT8-aware CrossKD"]
    assert names[chosen + 1] == "accuracy teacher"
    assert _command(stages, "accuracy auto") == (
        "benchmarks.accuracy O/int8/auto.onnx --data D --split val --role auto --against "
        "O/int8/float.accuracy.result.json -o O/int8/auto.accuracy.result.json"
    )
    assert _command(stages, "quantise by blocks in float").endswith(
        "--target onnxruntime --method auto --max-ap-drop 0.5 --nearest -o O/int8/blocks_in_float.onnx"
    )
    assert _command(stages, "INT8-aware CrossKD").endswith(
        "--teacher-checkpoint O/teacher/detector.pth --quantize int8 --from O/student/student.pth --calibrated "
        "O/int8/auto.onnx -o O/int8_aware"
    )
    assert _command(stages, "choose INT8").endswith("--max-int8-drop 0.5 --otherwise onnx-fp32 -o O/student.int8.onnx")
    assert _command(stages, "choose INT8").count("--rung") == 6
    assert "--int8-budget O/student.int8.onnx" in _command(stages, "report")
    training = stages[chosen - 3]
    assert training.is_training
    assert training.artefact == Path("O/int8_aware/student.int8.onnx")
    assert training.unless == tuple(
        Path(f"O/int8/{way}.accuracy.result.json")
        for way in ("INT8_predictors", "max", "auto", "bias_correction", "blocks_in_float")
    )
    assert not any(stage.unless for stage in (*stages[: names.index(ways[1])], *stages[chosen:]))
    shorter = _planned(configs / "crosskd_tiny.py", "--max-int8-drop", "0.5", "--no-int8-training")
    assert "INT8-aware CrossKD" not in [stage.name for stage in shorter]


def test_with_a_budget_engines_are_what_is_measured_and_fp16_is_the_last_way(configs: Path) -> None:
    words = ["--max-int8-drop", "0.5", "--target", "tensorrt"]
    stages = _planned(configs / "crosskd_tiny.py", *words)
    assert _command(stages, "build auto") == "deploy.build_trt O/int8/auto.onnx --int8 -o O/int8/auto.engine"
    assert _command(stages, "latency auto").startswith("benchmarks.latency O/int8/auto.engine ")
    assert _command(stages, "accuracy engine-fp16").startswith("benchmarks.accuracy O/engine-fp16.engine ")
    choose = _command(stages, "choose INT8")
    assert "--fp16 O/int8/engine-fp16.accuracy.result.json O/int8/engine-fp16.latency.result.json" in choose
    assert "--otherwise engine-fp16" in choose
    fp16 = "deploy.build_trt O/student.onnx --fp16 --ranges-from O/int8/INT8_predictors.onnx -o O/engine-fp16.engine"
    assert _command(stages, "build engine-fp16") == fp16
    names = [stage.name for stage in stages]
    assert names.index("quantise by INT8 predictors") < names.index("build engine-fp16") < names.index("choose INT8")
    in_fp32 = _planned(configs / "crosskd_tiny.py", *words, "--without-int8", "fp32")
    assert "--otherwise engine-fp32" in _command(in_fp32, "choose INT8")
    assert _command(in_fp32, "build engine-fp32") == "deploy.build_trt O/student.onnx --fp32 -o O/engine-fp32.engine"
    assert "O/results/engine-fp32.latency.result.json" in _command(in_fp32, "report")


def test_a_budget_can_stand_in_the_config(configs: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(configs / 'crosskd_tiny.py')!r}\n"
        f"model = dict(teacher=dict(config={str(configs / 'gfl_tiny_teacher.py')!r}))\nmax_int8_drop = 1\n"
    )
    assert "--max-int8-drop 1 " in _command(_planned(config), "choose INT8")
    assert "--max-int8-drop 0.5 " in _command(_planned(config, "--max-int8-drop", "0.5"), "choose INT8")
    config.write_text(config.read_text() + "custom_hooks = [dict(type='EMAHook')]\n")
    assert "INT8-aware CrossKD" in [stage.name for stage in _planned(config)]  # which leaves the hook out, and says so


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (["--max-int8-drop", "-0.1"], "", "--max-int8-drop is -0.1; expected points of AP, 0 or more and at most 100"),
        (["--max-int8-drop", "100.1"], "", "--max-int8-drop is 100.1; expected points"),
        ([], "max_int8_drop = '0.5'", "config.py: max_int8_drop is '0.5'; expected points"),
        ([], "max_int8_drop = True", "config.py: max_int8_drop is True; expected points"),
        (["--without-int8", "fp32"], "", "--without-int8 is given without --max-int8-drop"),
        (["--no-int8-training"], "", "--no-int8-training is given without --max-int8-drop"),
        (["--max-int8-drop", "1", "--without-int8", "fp16"], "", "expected fp32 with --target onnxruntime"),
    ],
)
def test_a_budget_that_is_none_is_refused_before_anything_runs(
    configs: Path, tmp_path: Path, words: list[str], content: str, message: str
) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(configs / 'crosskd_tiny.py')!r}\n"
        f"model = dict(teacher=dict(config={str(configs / 'gfl_tiny_teacher.py')!r}))\n{content}\n"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        _planned(config, *words)


def test_a_validation_set_for_a_budget_has_boxes_and_enough_images(
    shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_coco(*split_paths(shapes_dir, "val"))
    check_validation_set(data, 0.5)
    assert "warning: INT8 may cost 0.5 points of AP on the 2 images of" in capsys.readouterr().out
    check_validation_set(dataclasses.replace(data, images=data.images * 25), 0.5)
    assert capsys.readouterr().out == ""
    bare = [
        dataclasses.replace(image, boxes_xyxy=image.boxes_xyxy[:0], labels=image.labels[:0]) for image in data.images
    ]
    with pytest.raises(DataError, match=r"instances_val.json has no box; expected some"):
        check_validation_set(dataclasses.replace(data, images=bare), 0.5)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_with_boards_student_and_teacher_are_measured_there_and_their_report_decides(
    configs: Path, target: str
) -> None:
    stages = _planned(configs / "crosskd_tiny.py", "--boards", "boards.toml", "--target", target)
    names = [stage.name for stage in stages]
    assert names[-6:] == [
        "report", "bundle teacher", "teacher on boards", "bundle student", "student on boards", "report of boards",
    ]  # fmt: skip
    assert not [name for name in names if "engine" in name]  # they are built on the boards
    assert _command(stages, "bundle student") == "deploy.bundle O/student.int8.onnx O/student.onnx -o O/student.tar.gz"
    assert _command(stages, "teacher on boards") == (
        "benchmarks.fleet boards.toml O/teacher.tar.gz --data D --split val --teacher -o O/boards/teacher"
    )
    assert "--max-ap-drop" not in _command(stages, "report")
    assert _command(stages, "report of boards") == (
        "benchmarks.report O/boards/student --teacher O/results/teacher.accuracy.result.json O/boards/teacher "
        "--max-ap-drop=5.0 -o O/boards.html"
    )
    without = _planned(configs / "crosskd_tiny.py", "--boards", "boards.toml", "--no-teacher-export")
    assert "O/boards/teacher" not in _command(without, "report of boards")


def test_a_budget_that_engines_here_would_have_to_measure_does_not_go_with_boards(configs: Path) -> None:
    words = ("--boards", "boards.toml", "--target", "tensorrt", "--max-int8-drop", "1")
    with pytest.raises(ConfigError, match="expected one of both"):
        _planned(configs / "crosskd_tiny.py", *words)


def test_a_trained_teacher_is_taken_in_instead_of_trained(configs: Path) -> None:
    words = _command(_planned(configs / "crosskd_tiny.py", "--teacher-checkpoint", "t.pth"), "teacher")
    assert words == f"crosskd.adopt {configs}/gfl_tiny_teacher.py --data D -o O/teacher --checkpoint t.pth"
    published = _command(_planned(ROOT / "configs" / "crosskd_gfl_r50_r101_1x_coco.py"), "teacher")
    assert published.startswith("crosskd.adopt mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py")
    assert "--checkpoint https://" in published


def test_a_teacher_of_other_classes_is_fine_tuned_before_it_teaches(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(configs / "crosskd_tiny.py")
    teacher = MODELS.build(config.model.teacher.model)  # of 80 classes
    names = tuple(f"class {number}" for number in range(teacher.bbox_head.num_classes))
    save_detector_weights(teacher, tmp_path / "t.pth", {"dataset_meta": {"classes": names}})
    monkeypatch.setattr("crosskd.download.published_checkpoint", lambda _name: tmp_path / "t.pth")

    def taught(checkpoint: str, wanted: tuple[str, ...]) -> str:
        set_classes(config, wanted)
        stage = _planned(configs / "crosskd_tiny.py", "--teacher-checkpoint", checkpoint)[0]
        return " ".join(with_classes_taught(stage, config, wanted, 3).words)

    common = f"{configs}/gfl_tiny_teacher.py --data D -o O/teacher"
    assert taught("published", names[5:7]) == f"crosskd.adopt {common} --checkpoint published"
    assert taught("published", ("class 5", "cell")) == f"crosskd.train {common} --from published --seed 3"
    assert capsys.readouterr().out == (
        f"the teacher is fine-tuned on the data first: {tmp_path}/t.pth does not know the classes ['cell']; it knows "
        f"{list(names)}\n"
    )
    save_detector_weights(teacher, tmp_path / "t.pth", {})  # without names
    assert taught(str(tmp_path / "t.pth"), ("cell",)).endswith(f" --from {tmp_path}/t.pth --seed 3")
    whole = (tmp_path / "t.pth").read_bytes()
    (tmp_path / "t.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*t\.pth .*truncated"):
        taught("published", ("cell",))


def test_a_config_without_a_teacher_is_refused(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"gfl_tiny.py: model.type is GFL; expected CrossKDDetector"):
        _planned(configs / "gfl_tiny.py")


def test_a_student_that_cannot_be_exported_is_refused_before_hours_of_training(tmp_path: Path) -> None:
    config = tmp_path / "fovea.py"
    config.write_text(
        """_base_ = "mmdet::foveabox/fovea_r50_fpn_4xb4-1x_coco.py"
model = dict(_delete_=True, type="CrossKDDetector", student={{_base_.model}}, distill=dict(method="pkd"),
             teacher=dict(config="mmdet::foveabox/fovea_r101_fpn_4xb4-1x_coco.py"))"""
    )
    with pytest.raises(ConfigError, match=r"student's head is a FoveaHead, .* be exported; expected one of .*GFLHead"):
        _planned(config)


def test_a_teacher_that_cannot_be_exported_is_measured_in_torch_alone(configs: Path, tmp_path: Path) -> None:
    config = tmp_path / "under_fovea.py"
    config.write_text(
        f"""_base_ = {str(configs / "crosskd_tiny.py")!r}
model = dict(teacher=dict(config="mmdet::foveabox/fovea_r101_fpn_4xb4-1x_coco.py"), distill=dict(method="pkd"))"""
    )
    with pytest.raises(ConfigError, match=r"teacher's head is a FoveaHead, .* be exported.*: --no-teacher-export"):
        _planned(config)
    names = [stage.name for stage in _planned(config, "--no-teacher-export")]
    assert "latency teacher" in names
    assert not [name for name in names if "teacher-" in name or name == "export teacher"]


# ---- what is asked before the first training


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("dict(max_ap_dropp=1.5)", "--max-ap-dropp=1.5"),
        ("dict(max_ap_drop='much')", "invalid float value: 'much'"),
        ("dict(min_ap=700)", "--min-ap is 700"),
        ("dict(max_latency_ms=float('nan'))", "--max-latency-ms is nan"),
        ("[1.5]", "report_limits is [1.5]; expected dict(max_ap_drop=1.5, ...)"),
    ],
)
def test_limits_are_judged_before_hours_of_training(
    limits: str, message: str, configs: Path, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "run_stages", lambda _stages: pytest.fail("it ran"))
    monkeypatch.setattr(pipeline, "check_packages", lambda *_words: None)
    config = tmp_path / "limited.py"
    config.write_text(
        f"_base_ = {str(configs / 'crosskd_tiny.py')!r}\n"
        f"model = dict(teacher=dict(config={str(configs / 'gfl_tiny_teacher.py')!r}))\nreport_limits = {limits}\n"
    )
    assert pipeline.main([str(config), "--data", str(shapes_dir), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outputs_are_tried_before_hours_of_training(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(PipelineError, match=r"cannot write .*x.json: .*results is a file"):
        check_output(tmp_path, tmp_path / "results" / "x.json")
    (tmp_path / "student.onnx").mkdir()
    with pytest.raises(PipelineError, match=r"cannot write .*student.onnx: .* is a folder"):
        check_output(tmp_path, tmp_path / "student.onnx")
    check_output(tmp_path, tmp_path / "new" / "x.json")
    assert sorted(os.listdir(tmp_path)) == ["results", "student.onnx"]


def test_a_missing_package_of_a_later_stage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor(*words: str) -> str:
        found = json.loads(run_captured(*words))
        found["commands"]["crosskd.pipeline"] = {"works": False, "to_do": ["pip install jinja2"]}
        return json.dumps(found)

    check_packages("onnxruntime")
    monkeypatch.setattr(pipeline, "run_captured", doctor)
    with pytest.raises(PipelineError, match=r"Do: pip install jinja2"):
        check_packages("onnxruntime")


def test_a_disk_that_is_too_small_is_told_with_both_numbers(
    configs: Path, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    stages = _planned(configs / "crosskd_tiny.py")
    options = PipelineOptions(str(configs / "crosskd_tiny.py"), str(shapes_dir), tmp_path)
    sets = [load_coco(*split_paths(shapes_dir, split)) for split in SPLITS]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=5 << 20))
    with pytest.raises(ConfigError, match=r"will take about 0\.\d+ GiB, of which 0.00 GiB .* 0.00 GiB free"):
        check_space(options, load_config(options.config), stages, sets)
    with (tmp_path / "there").open("wb") as file:  # what is made already needs no more space
        file.truncate(1 << 30)
    check_space(options, load_config(options.config), stages, sets)


def test_what_a_training_takes_is_not_underestimated(configs: Path, teacher_run: Path, shapes_dir: Path) -> None:
    config = load_config(configs / "gfl_tiny_teacher.py")
    parameters = read_sidecar(teacher_run / "detector.pth")["details"]["parameters"]
    annotation_bytes = sum(split_paths(shapes_dir, split)[0].stat().st_size for split in ("train", "val"))
    estimated = bytes_of_training(config, parameters, annotation_bytes)
    taken = sum(path.stat().st_size for path in teacher_run.rglob("*") if path.is_file())
    assert taken < estimated + (1 << 18)  # and logs
    assert estimated < 4 * taken
    config.default_hooks.checkpoint.max_keep_ckpts = -1
    config.train_cfg.max_epochs = 100
    assert bytes_of_training(config, parameters, 0) > 30 * taken


# ---- the whole job


def test_a_list_of_boards_is_judged_before_hours_of_training(
    configs: Path, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its keys, options of builds, and whether the bundle that will be made has what its boards are to run."""
    pytest.importorskip("asyncssh")
    monkeypatch.setattr(pipeline, "run_stages", lambda _stages: pytest.fail("it ran"))
    monkeypatch.setattr(pipeline, "check_packages", lambda *_words: None)
    boards = tmp_path / "boards.toml"
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "out")]
    board = "[[board]]\nname = 'a'\nhost = 'h'\n"
    for text, message in (
        ("build = ['--dla-core', 'x']", "build, for fp16: argument --dla-core: invalid int value"),
        ("precisions = ['int8']", "--int8 needs the graph quantised for TensorRT, which is not in this bundle"),
    ):
        boards.write_text(board + text)
        assert pipeline.main([*words, "--boards", str(boards), "--target", "onnxruntime"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pipeline, "run_stages", lambda _stages: 0)
    boards.write_text(board)
    assert pipeline.main([*words, "--boards", str(boards), "--target", "onnxruntime"]) == 0
    plan = capsys.readouterr().out
    assert "teacher on boards: a: fp16 with TensorRT\n" in plan
    assert "student on boards: a: fp16 with TensorRT; not INT8, since the bundle has the graph quantised" in plan


def test_bad_input_stops_it_before_anything_runs(
    configs: Path, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(pipeline, "run_stages", lambda _stages: pytest.fail("it ran"))
    (tmp_path / "file").write_text("in the way")
    other = tmp_path / "other"
    shutil.copytree(shapes_dir, other)
    renamed = other / "annotations" / "instances_test.json"
    renamed.write_text(renamed.read_text().replace('"circle"', '"ball"'))
    config, data, out = str(configs / "crosskd_tiny.py"), str(shapes_dir), str(tmp_path / "out")
    for words, named in (
        (["nope.py", "--data", data, "-o", out], "no such config: nope.py"),
        ([config, "--data", data, "-o", out, "--limits", "nope.toml"], "nope.toml"),
        ([config, "--data", str(other), "-o", out], "expected the same names with the same ids in all files"),
        ([config, "--data", "nope", "-o", out], "no such file or folder: nope"),
        ([config, "--data", data, "-o", str(tmp_path / "file" / "out")], "cannot write"),
        ([str(configs / "gfl_tiny.py"), "--data", data, "-o", out], "expected CrossKDDetector"),
    ):
        assert pipeline.main(words) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert named in error
    shutil.rmtree(other)
    assert os.listdir(tmp_path) == ["file"]


def _ap(folder: Path, role: str, threshold: str = "") -> float:
    result = read_json(folder / "results" / f"{role}.accuracy.result.json", PipelineError, "a result")
    return result["numbers"][f"AP{threshold}"]


def test_from_images_to_a_verdict(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each stage in torch costs the start of a process or two: the slow test runs those that are left out here.
    left_out = ("baseline", "export teacher", "accuracy teacher", "accuracy teacher-onnx-fp32", "accuracy baseline",
                "latency teacher", "latency teacher-onnx-fp32", "latency baseline", "latency student")  # fmt: skip
    planned = pipeline.planned_stages

    def fewer(*args: Any) -> list[Stage]:
        stages = planned(*args)
        absent = {str(stage.artefact) for stage in stages if stage.name in left_out}
        report = [word for word in stages[-1].words if word not in absent and not word.startswith("--max-ap-drop")]
        kept = [stage for stage in stages[:-1] if stage.name not in left_out]
        return [*kept, Stage("report", report, stages[-1].artefact)]

    monkeypatch.setattr(pipeline, "planned_stages", fewer)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(out)]
    words += ["--teacher-checkpoint", str(teacher_run / "detector.pth")]
    assert pipeline.main(words) == 0
    assert _ap(out, "onnx-fp32") == pytest.approx(_ap(out, "student"), abs=1e-3)
    assert "verdict" in json.loads((out / "report.json").read_text())
    assert "<html" in (out / "report.html").read_text()
    assert read_sidecar(out / "student.onnx")["inputs"]["weights"]["file"] == str(out / "student" / "student.pth")
    # The same line again has nothing to do but the report.
    ran: list[str] = []

    def run(module: str, *_words: str) -> int:
        ran.append(module)
        write_json(out / "report.json", {})
        return 0

    monkeypatch.setattr("crosskd.stages.run_status", run)
    assert pipeline.main(words) == 0
    assert ran == ["benchmarks.report"]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(5400)
def test_blood_cells(shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's detectors on real images, a few epochs each."""
    demo = ROOT / "configs" / "demo"
    (tmp_path / "teacher.py").write_text(f"_base_ = {str(demo / 'teacher.py')!r}\nmax_epochs = 4\n")
    content = (demo / "crosskd.py").read_text()
    (tmp_path / "crosskd.py").write_text(
        content.replace('"./student.py"', repr(str(demo / "student.py"))) + "max_epochs = 6\n"
    )
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    words = [str(tmp_path / "crosskd.py"), "--data", str(shared_dir / "data" / "bccd"), "-o", str(out)]
    assert pipeline.main(words) in (0, 1)
    assert _ap(out, "student", "50") > 0.3
    assert abs(_ap(out, "onnx-fp32") - _ap(out, "student")) <= 0.001
    assert _ap(out, "onnx-int8") >= _ap(out, "onnx-fp32") - 0.015
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"]
    assert "<html" in (out / "report.html").read_text()


def test_cocos_own_names_are_taken_and_without_a_test_split_val_is_measured(configs: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "coco" / f"{split}2017").mkdir(parents=True)
        (tmp_path / "coco" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "coco" / "annotations" / f"instances_{split}2017.json").write_text("{}")
    options = pipeline.PipelineOptions(
        str(configs / "crosskd_tiny.py"), str(tmp_path / "coco"), tmp_path / "out", strict=True, drop_empty_classes=True
    )
    stages = planned_stages(options, load_config(options.config))
    for stage in stages:
        module, words = stage.words[0], stage.words
        assert (
            (words[words.index("--split") + 1] == "val")
            if module.startswith("benchmarks.") and "--data" in words
            else "--split" not in words
        )
        assert ("--strict" in words) == ("--data" in words)
        assert ("--drop-empty-classes" in words) == (module in ("crosskd.train", "crosskd.distill", "crosskd.adopt"))
    training = next(stage for stage in stages if stage.is_training)
    files = str(start_of(training)["files"])
    assert "instances_train2017.json" in files
    assert "instances_val2017.json" in files
