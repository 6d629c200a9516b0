"""
The recipes of configs/recipes: students and teachers for photos of one's own, and the configs of a pair of them.

A recipe's name is FAMILY_SIZE, such as `gfl_tiny`. A size alone is of the first family, a teacher's of its student's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from pathlib import Path

from crosskd.config import FLIPS, load_config
from deploy.errors import ConfigError
from deploy.files import replacing

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
FAMILIES = ("gfl", "rtmdet")
STUDENTS = ("nano", "tiny", "small", "medium")
TEACHERS = ("base", "large")
SIDES_PX = (416, 512, 640)
"""Input sizes that the recipes are meant for."""
LEAST_EPOCHS, MOST_EPOCHS = 12, 100
LEAST_IMAGES = 500
"""Of a training set, for which MOST_EPOCHS are meant; 50,000 images get LEAST_EPOCHS."""


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """Which recipes to take, and what is changed in them."""

    student: str = "tiny"
    """A config file, or the name of a recipe."""
    teacher: str = "base"
    """The name of a recipe."""
    input_size_px: tuple[int, int] | None = None
    """Width and height; None: the student's own."""
    flips: str | None = None
    """A key of FLIPS; None: the student's own."""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student", metavar="RECIPE", help=f"{', '.join(STUDENTS)}, or rtmdet_tiny and so on (default: tiny)"
    )
    parser.add_argument("--teacher", metavar="RECIPE", help=f"{', '.join(TEACHERS)} (default: base)")
    parser.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PX",
        help=f"the image's side, or width and height: {', '.join(map(str, SIDES_PX))}, or other multiples of 32 "
        "(default: 512)",
    )
    parser.add_argument(
        "--flips",
        choices=tuple(FLIPS),
        help="of training images; 'all' for microscopes and aerial images (default: horizontal)",
    )


def recipe_options_from_arguments(arguments: argparse.Namespace) -> RecipeOptions:
    """
    The options that the arguments of `add_recipe_arguments` ask for.

    Raises:
        ConfigError: an image size of no use.
    """
    sides = arguments.input_size
    if sides is not None and (len(sides) > 2 or any(side < 32 or side % 32 for side in sides)):
        closest = " ".join(str(max(32, round(side / 32) * 32)) for side in sides[:2])
        raise ConfigError(
            f"--input-size is {' '.join(map(str, sides))}; expected one side or width and height, multiples of 32, the "
            f"largest stride of the backbones, such as {closest}"
        )
    size = None if sides is None else (sides[0], sides[-1])
    return RecipeOptions(arguments.student or "tiny", arguments.teacher or "base", size, arguments.flips)


def recipe_path(name: str, sizes: tuple[str, ...], family: str = FAMILIES[0]) -> Path:
    """
    The config of a recipe.

    Args:
        sizes: STUDENTS or TEACHERS. family: of a name that is a size alone.

    Raises:
        ConfigError: there is no such recipe.
    """
    if not FOLDER.is_dir():
        raise ConfigError(f"there is no folder {FOLDER}; expected the recipes of a checkout. Give a config")
    full = f"{family}_{name}" if name in sizes else name
    known = [f"{one}_{size}" for one in FAMILIES for size in sizes]
    if full not in known:
        raise ConfigError(
            f"there is no recipe {name!r}; expected one of {', '.join(sizes)} (of {family}), {', '.join(known)}"
        )
    return FOLDER / f"{full}.py"


def epochs_for(images: int) -> int:
    """
    The length of a training on so many images: the more there are, the less often each is seen, and the more steps.

    A power law through MOST_EPOCHS at LEAST_IMAGES and LEAST_EPOCHS at a hundred times as many.
    """
    hundreds = math.log(max(images, LEAST_IMAGES) / LEAST_IMAGES, 100)
    return max(LEAST_EPOCHS, round(MOST_EPOCHS * (LEAST_EPOCHS / MOST_EPOCHS) ** hundreds))


def write_recipe(folder: Path, options: RecipeOptions, images: int, tell: bool = True) -> Path:
    """
    Writes student.py, teacher.py and crosskd.py into `folder`, and returns the last, the config of the distillation.

    Args:
        images: of the training set. tell: whether to print which it is.

    Raises:
        ConfigError: there are no such recipes, they are of two families, or files in the folder were edited.
    """
    given = Path(options.student)
    student = given if given.suffix == ".py" else recipe_path(options.student, STUDENTS)
    config = load_config(student)
    family = config.model.type.lower() if config.model.type.lower() in FAMILIES else FAMILIES[0]
    teacher = recipe_path(options.teacher, TEACHERS, family)
    if not teacher.stem.startswith(f"{family}_"):
        raise ConfigError(
            f"the student {student.stem} and the teacher {teacher.stem} are of two families, and CrossKD wants heads "
            f"of one; expected one of {', '.join(f'{family}_{size}' for size in TEACHERS)}"
        )
    size = options.input_size_px or tuple(config.input_size)
    changes = f"input_size = {size}\nflips = {options.flips or config.flips!r}\nmax_epochs = {epochs_for(images)}\n"
    files = {
        name: f"_base_ = {str(path.resolve())!r}\n\n{changes}"
        for name, path in (("student", student), ("teacher", teacher))
    }
    files["crosskd"] = f"""_base_ = "./student.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{{{_base_.model}}}},
    teacher=dict(config="teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split={config.model.bbox_head.stacked_convs - 1}),
)
report_limits = dict(max_ap_drop=5.0, min_speedup=2.0)  # of the model that ships, against the teacher
"""
    edited = [path for path in (folder / f"{name}.py" for name in files) if path.is_file() and _is_edited(path)]
    if edited:
        raise ConfigError(
            f"{edited[0]} was edited after it was written from a recipe. Give {folder / 'crosskd.py'} as CONFIG to go "
            f"on with it, or another -o, or delete {folder}"
        )
    for name, text in files.items():
        with replacing(folder / f"{name}.py") as temporary:
            temporary.write_text(f"{_first_line(text)}\n{text}", encoding="utf-8")
    if tell:
        print(
            f"recipe: student {student.stem}, teacher {teacher.stem}, images of {size[0]} x {size[1]} pixels, "
            f"{epochs_for(images)} epochs; {folder / 'crosskd.py'}"
        )
    return folder / "crosskd.py"


def _first_line(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"# From a recipe ({digest}). To change it, copy this folder and give its crosskd.py as CONFIG."


def _is_edited(path: Path) -> bool:
    first, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    return first != _first_line(text)
