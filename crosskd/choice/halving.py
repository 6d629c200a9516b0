"""
Students that are trained for a short time, by successive halving: the better half goes on, for twice as long.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (AISTATS 2016). Each
round starts from the weights of the one before, with a schedule of its own. What a round has left is not made again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Sequence
from pathlib import Path

from crosskd.choice.search import Candidate
from crosskd.choice.space import config_text
from crosskd.recipes import RecipeOptions, epochs_for, write_recipe
from crosskd.stages import Stage, is_up_to_date, words_to_run
from deploy.errors import MeasurementError
from deploy.files import read_json, replacing
from deploy.trials import Processes, run_trial, work_through

SHORT = 12
"""The first round is the recipe's length divided by this."""
_config_guard = threading.Lock()
"""mmengine reads one config at a time."""


@dataclasses.dataclass(frozen=True)
class TrialOptions:
    """How the most promising students are trained."""

    count: int
    """How many."""
    data: str
    """Folder of the images to train and measure on."""
    images: int
    """In its training set."""
    teacher: str = "base"
    """Recipe of their teacher."""
    teacher_checkpoint: str | None = None
    """Its weights; None: it is trained first, as long as its recipe says."""
    epochs: int | None = None
    """Of the first round; None: a twelfth of the recipe's."""
    seed: int = 0
    """Of the trainings."""

    def checkpoint_in(self, output: Path) -> str:
        """The teacher's weights, which are trained in this folder if none are given."""
        return self.teacher_checkpoint or str(output / "teacher" / "detector.pth")

    @property
    def first_epochs(self) -> int:
        return self.epochs or max(1, round(epochs_for(self.images) / SHORT))


@dataclasses.dataclass(frozen=True)
class Trial:
    """A student in a round."""

    candidate: Candidate
    round: int
    """From 1."""
    epochs: int
    folder: Path
    """Of this student's files."""

    def __str__(self) -> str:
        return f"{self.candidate.name}, round {self.round}"

    @property
    def run_dir(self) -> Path:
        return self.folder / f"round{self.round}"

    @property
    def result(self) -> Path:
        return self.folder / f"round{self.round}.accuracy.result.json"


@dataclasses.dataclass(frozen=True)
class Halving:
    """What the rounds have come to."""

    ap: dict[Trial, float]
    """Of the validation images."""
    ranking: list[Candidate]
    """The best first: what went further, and then what had the higher AP."""
    failed: list[Trial]
    """Each was told of."""


def halve(candidates: Sequence[Candidate], options: TrialOptions, output: Path, processes: Processes) -> Halving:
    """
    Trains and measures candidates in rounds, of which each leaves the better half, until one is left.

    Raises:
        MeasurementError: the teacher cannot be trained, or every trial of a round failed.
    """
    if options.teacher_checkpoint is None:
        train_teacher(options, output, processes)
    checkpoint = options.checkpoint_in(output)
    left, epochs = list(candidates), options.first_epochs
    ap: dict[Trial, float] = {}
    ranking: list[Candidate] = []
    failed: list[Trial] = []
    for number in itertools.count(1):
        trials = [Trial(one, number, epochs, output / "trials" / one.name) for one in left]
        print(f"round {number}: {len(trials)} students, {epochs} epochs each", flush=True)
        stages = {trial: stages_of_trial(trial, options, checkpoint) for trial in trials}

        def work(trial: Trial, stages: dict[Trial, list[Stage]] = stages) -> float:
            for stage in stages[trial]:
                complete(stage, processes)
            return float(read_json(trial.result, MeasurementError, "a result file")["numbers"]["AP"])

        def done(trial: Trial, reached: float) -> None:
            ap[trial] = reached
            print(f"{trial}: AP {100 * reached:.1f}", flush=True)

        failed += work_through(trials, work, done, processes, processes.jobs)
        measured = [trial for trial in trials if trial in ap]
        ranked = sorted(measured, key=lambda trial: (ap[trial], trial.candidate.macs), reverse=True)
        if not ranked:
            raise MeasurementError(
                f"all {len(trials)} trials of round {number} failed; why is above and in the logs below "
                f"{output / 'trials'}. Put that right and run the same command again: what was measured is kept"
            )
        left = [trial.candidate for trial in ranked[: math.ceil(len(ranked) / 2)]]
        further = [trial.candidate for trial in ranked]
        ranking = [*further, *(one for one in ranking if one not in further)]
        if len(left) == 1:
            return Halving(ap, ranking, failed)
        epochs *= 2
    raise AssertionError("the rounds have no end")


def train_teacher(options: TrialOptions, output: Path, processes: Processes) -> None:
    """
    Trains the teacher unless it is.

    Raises:
        MeasurementError: its training failed.
    """
    config = write_recipe(output / "recipe", RecipeOptions(teacher=options.teacher), options.images, tell=False)
    weights = Path(options.checkpoint_in(output))
    words = ["crosskd.train", str(config.with_name("teacher.py")), "--data", options.data, *_seed(options)]
    stage = Stage("teacher", [*words, "-o", str(weights.parent)], weights)
    print(f"the teacher, {options.teacher}, is trained first; --teacher-checkpoint takes one that is", flush=True)
    complete(stage, processes)


def stages_of_trial(trial: Trial, options: TrialOptions, teacher_checkpoint: str) -> list[Stage]:
    """The training of a trial and the measurement of what it made; writes its config."""
    student = trial.folder / "candidate.py"
    with replacing(student) as temporary:
        temporary.write_text(config_text(trial.candidate, f"A trial: {trial.candidate.name}."), encoding="utf-8")
    recipe = RecipeOptions(str(student), options.teacher)
    config = write_recipe(trial.folder / "recipe", recipe, options.images, tell=False)
    weights = trial.run_dir / "student.pth"
    words = [
        "crosskd.distill", str(config), "--data", options.data, "--teacher-checkpoint", teacher_checkpoint,
        "--teacher-images", "0", "--epochs", str(trial.epochs), *_seed(options),
    ]  # fmt: skip
    if trial.round > 1:
        words += ["--from", str(trial.folder / f"round{trial.round - 1}" / "student.pth")]
    measure = ["benchmarks.accuracy", str(trial.run_dir), "--data", options.data, "--split", "val", "--role", "student"]
    return [
        Stage(f"{trial}: train", [*words, "-o", str(trial.run_dir)], weights),
        Stage(f"{trial}: measure", [*measure, "-o", str(trial.result)], trial.result),
    ]


def _seed(options: TrialOptions) -> list[str]:
    return ["--seed", str(options.seed)]


def complete(stage: Stage, processes: Processes) -> None:
    """
    Runs a stage unless it is up to date; what was cut off goes on.

    Raises:
        MeasurementError: it failed.
    """
    with _config_guard:
        if is_up_to_date(stage):
            return
        words = words_to_run(stage)
    log = stage.artefact.parent.with_suffix(".log") if stage.makes_run else stage.artefact.with_suffix(".log")
    run_trial(words, log, processes)
