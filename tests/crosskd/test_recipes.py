"""configs/recipes: they fit each other; the pipeline without a config takes a pair of them, and says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosskd import pipeline
from crosskd.config import load_config
from crosskd.models.detector import detector_from_config
from crosskd.pipeline import fetch_weights, planned_stages
from crosskd.recipes import FAMILIES, FOLDER, STUDENTS, TEACHERS, RecipeOptions, epochs_for, recipe_path, write_recipe
from deploy.errors import CheckpointError, ConfigError


def test_every_recipe_is_a_file_and_every_file_a_recipe() -> None:
    names = {f"{family}_{size}.py" for family in FAMILIES for size in (*STUDENTS, *TEACHERS)}
    assert {path.name for path in FOLDER.glob("*.py")} == names


@pytest.mark.parametrize("student", [f"{family}_{size}" for family in FAMILIES for size in STUDENTS])
def test_a_student_fits_its_teacher_and_its_head_can_run_in_int8(student: str, tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path, RecipeOptions(student, input_size_px=(416, 320)), images=2000))
    with torch.device("meta"):  # layers without memory
        detector = detector_from_config(config, load_weights=False)
    assert detector.methods[0].taps.student_split == detector.student.bbox_head.stacked_convs - 1
    norms = {type(module).__name__ for module in detector.student.modules() if "Norm" in type(module).__name__}
    assert not norms & {"GroupNorm", "LayerNorm"}
    pipelines = [loader.dataset.pipeline for loader in (config.train_dataloader, config.test_dataloader)]
    sizes = [step.get("scale") or step.get("size") for steps in pipelines for step in steps if "Fit" in step.type]
    assert sizes == [(416, 320)] * 4
    assert (config.train_cfg.max_epochs, config.param_scheduler[1].end) == (epochs_for(2000),) * 2
    assert "mmdet::" in load_config(tmp_path / "teacher.py").load_from


def test_few_images_are_seen_often_and_many_seldom() -> None:
    counts = [10, 500, 5000, 50_000, 1_000_000]
    assert [epochs_for(count) for count in counts] == [100, 100, 35, 12, 12]


def test_a_size_alone_is_of_the_first_family_and_a_teacher_of_its_students() -> None:
    assert recipe_path("tiny", STUDENTS).stem == "gfl_tiny"
    assert recipe_path("base", TEACHERS, "rtmdet").stem == "rtmdet_base"
    with pytest.raises(
        ConfigError, match=r"no recipe 'huge'; expected one of nano, tiny, small, medium \(of gfl\), gfl_n"
    ):
        recipe_path("huge", STUDENTS)
    with pytest.raises(ConfigError, match="no recipe 'tiny'; expected one of base, large"):
        recipe_path("tiny", TEACHERS)


def test_what_was_written_is_written_anew_and_what_was_edited_is_kept(tmp_path: Path) -> None:
    config = write_recipe(tmp_path, RecipeOptions("nano"), images=600)
    write_recipe(tmp_path, RecipeOptions("tiny", flips="all"), images=600)
    assert "gfl_tiny" in (tmp_path / "student.py").read_text()
    flip = next(one for one in load_config(config).train_dataloader.dataset.pipeline if one.type == "RandomFlip")
    assert flip.direction == ["horizontal", "vertical", "diagonal"]
    edited = (tmp_path / "student.py").read_text().replace("max_epochs = ", "max_epochs = 1")
    (tmp_path / "student.py").write_text(edited)
    with pytest.raises(ConfigError, match=r"student.py was edited after .* Give .*crosskd.py as CONFIG"):
        write_recipe(tmp_path, RecipeOptions("nano"), images=600)
    assert (tmp_path / "student.py").read_text() == edited


def test_students_and_teachers_of_two_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gfl_tiny and the teacher rtmdet_base are of two .* gfl_base, gfl_large"):
        write_recipe(tmp_path, RecipeOptions("tiny", "rtmdet_base"), images=600)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--input-size", "500"], "--input-size is 500; expected one side or width and height, multiples of 32, "),
        (["--input-size", "512", "0"], "such as 512 32"),
        (["--student", "resnet"], "there is no recipe 'resnet'; expected one of nano"),
        (["c.py", "--student", "tiny"], "--student chooses a recipe, and c.py is given"),
        (["--student", "nope.py"], "no such config: nope.py"),
    ],
)
def test_what_cannot_be_chosen_is_one_message(
    words: list[str], named: str, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main([*words, "--data", str(shapes_dir), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.rglob("*.py"))


def test_without_a_config_a_recipe_is_planned_and_weights_that_cannot_be_fetched_are_all_named(
    shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_url", lambda repository, name: f"https://hub.invalid/{repository}/{name}"
    )
    monkeypatch.setattr("crosskd.download.published_url", lambda _name: "https://zoo.invalid/gfl-01234567.pth")
    words = ["--data", str(shapes_dir), "-o", str(tmp_path / "out"), "--student", "nano"]
    options, recipe = pipeline.options_from_arguments(pipeline.command_parser().parse_args(words))
    assert recipe is not None
    assert write_recipe(Path(options.config).parent, recipe, pipeline.number_of_images(options.data)).samefile(
        options.config
    )
    config = load_config(options.config)
    stages = planned_stages(options, config)
    assert stages[0].words[:2] == ["crosskd.train", str(tmp_path / "out" / "recipe" / "teacher.py")]
    with torch.device("meta"):
        detector = detector_from_config(config, load_weights=False)
    places = rf"put it at {tmp_path}/cache/timm--.*safetensors.* Also: .*put it at {tmp_path}/cache/gfl-01234567.pth"
    with pytest.raises(CheckpointError, match=places):
        fetch_weights(config, stages, detector)
