"""Short trainings by successive halving: who goes on, what is made again, what is told of a trial that fails."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from crosskd import choose
from crosskd.choice import measure
from crosskd.choice.halving import TrialOptions, halve
from crosskd.choice.search import Candidate, Measured
from crosskd.config import load_config
from deploy.contract import RESULT_VERSION, provenance, read_sidecar, sealed, sidecar_path, write_sidecar
from deploy.dataset import load_split
from deploy.errors import MeasurementError
from deploy.files import write_json
from deploy.trials import Processes

SMALLEST = Candidate("mobilenetv4_conv_small_050", 32, 1, 96, 10**6)
STUDENTS = [dataclasses.replace(SMALLEST, side_px=32 * n, macs=n * 10**6) for n in range(3, 9)]


class FakeProcesses(Processes):
    """The commands without training and measuring: they write what the real ones do."""

    def __init__(self, aps: dict[str, float], fails: dict[str, list[int]] | None = None) -> None:
        """
        Args:
            aps: name of a student -> AP after a round of one epoch. fails: the same -> statuses of its next trainings.
        """
        super().__init__(1)
        self.aps, self.fails = aps, fails or {}
        self.words: list[list[str]] = []

    def run(self, words: Sequence[str], log: Path, alone: bool = False) -> int:
        self.words.append(list(words))
        output = Path(words[words.index("-o") + 1])
        name = output.parent.name
        if words[0] == "benchmarks.accuracy":
            weights = Path(words[1]) / "student.pth"
            ap = self.aps[name] * float(weights.read_text())
            document = {"result_version": RESULT_VERSION, "numbers": {"AP": ap}}
            write_json(output, sealed({**document, **provenance({"weights": weights}, ["python", "-m", *words])}))
            return 0
        output.mkdir(parents=True, exist_ok=True)
        if self.fails.get(name):
            (output / "last_checkpoint").write_text("epoch_1.pth")
            log.write_text("error: the loss is not finite\n")
            return self.fails[name].pop(0)
        weights = output / ("detector.pth" if words[0] == "crosskd.train" else "student.pth")
        weights.write_text(words[words.index("--epochs") + 1] if "--epochs" in words else "1")
        write_sidecar(weights, {"config": words[1]})
        command = ["python", "-m", *words]
        write_json(sidecar_path(weights), {**read_sidecar(weights), "command": command})
        return 0

    def trained(self) -> list[str]:
        """STUDENT/roundN of each training, in order; what is resumed with a star."""
        rows = [
            (Path(words[words.index("-o") + 1]), words[-1]) for words in self.words if words[0] == "crosskd.distill"
        ]
        return [f"{run.parent.name[-3:].strip('-')}/{run.name}{'*' * (last == '--resume')}" for run, last in rows]


@pytest.fixture
def halved(shapes_dir: Path, tmp_path: Path) -> Callable:
    """(processes, students) -> what `halve` makes of them."""
    teacher = tmp_path / "teacher.pth"
    teacher.write_text("weights")
    options = TrialOptions(4, str(shapes_dir), 1000, teacher_checkpoint=str(teacher), epochs=1)
    return lambda processes, students=STUDENTS[:4]: halve(students, options, tmp_path / "out", processes)


APS = {one.name: ap for one, ap in zip(STUDENTS, (0.1, 0.3, 0.2, 0.25, 0.15, 0.15), strict=True)}


def test_the_better_half_goes_on_for_twice_as_long_from_where_it_was(halved: Callable, tmp_path: Path) -> None:
    fake = FakeProcesses(APS)
    halving = halved(fake, STUDENTS)
    sides = [one.side_px for one in halving.ranking]
    assert sides == [128, 192, 160, 256, 224, 96]  # of equal AP the one with more multiplications
    rounds = [[trial.candidate.side_px for trial in halving.ap if trial.round == number] for number in (1, 2, 3)]
    assert rounds == [[96, 128, 160, 192, 224, 256], [128, 192, 160], [128, 192]]
    assert {trial.round: trial.epochs for trial in halving.ap} == {1: 1, 2: 2, 3: 4}
    last = fake.words[-2]
    assert last[0] == "crosskd.distill"
    assert last[last.index("--from") + 1].endswith("192/round2/student.pth")
    config = load_config(last[1])
    assert config.model.student.backbone.model == SMALLEST.backbone
    assert config.model.distill.split == 0
    assert config.train_dataloader.dataset.pipeline[-2].size == (192, 192)


def test_what_was_made_is_not_made_again_and_what_was_cut_off_goes_on(halved: Callable) -> None:
    first = FakeProcesses(APS, {STUDENTS[2].name: [-15]})

    def interrupted(words: Sequence[str], log: Path, alone: bool = False) -> int:
        if FakeProcesses.run(first, words, log, alone):
            raise KeyboardInterrupt
        return 0

    first.run = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        halved(first)
    again = FakeProcesses(APS)
    halved(again)
    trained = again.trained()
    assert trained[0] == "160/round1*"
    assert trained[-2:] == ["128/round2", "192/round2"]
    assert set(trained[1:-2]) <= {"192/round1"}  # which may have begun before the interruption was heard
    third = FakeProcesses(APS)
    assert [one.side_px for one in halved(third).ranking] == [128, 192, 160, 96]
    assert third.words == []


def test_a_trial_that_died_is_repeated_once_and_goes_on_where_it_was(
    halved: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeProcesses(APS, {STUDENTS[1].name: [-9]})
    halving = halved(fake)
    assert fake.trained()[:2] == ["96/round1", "128/round1"]
    assert "128/round1*" in fake.trained()
    assert halving.failed == []
    assert halving.ranking[0] == STUDENTS[1]
    told = f"{STUDENTS[1].name}, round 1 died, and is repeated once: crosskd.distill ended with status -9 (killed: "
    assert told in capsys.readouterr().err


def test_a_trial_that_cannot_be_trained_is_left_out_and_the_others_go_on(
    halved: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    halving = halved(FakeProcesses(APS, {STUDENTS[1].name: [2]}))
    assert [str(trial) for trial in halving.failed] == [f"{STUDENTS[1].name}, round 1"]
    assert [one.side_px for one in halving.ranking] == [192, 160, 96]
    assert f"error: {STUDENTS[1].name}, round 1: the loss is not finite\n" in capsys.readouterr().err


def test_where_all_fail_nothing_is_chosen(halved: Callable) -> None:
    with pytest.raises(MeasurementError, match="all 4 trials of round 1 failed"):
        halved(FakeProcesses(APS, {one.name: [2] for one in STUDENTS}))


def test_without_a_checkpoint_the_teacher_is_trained_first_and_once(shapes_dir: Path, tmp_path: Path) -> None:
    options = TrialOptions(2, str(shapes_dir), 1000, teacher="large")
    fake = FakeProcesses(APS)
    halve(STUDENTS[:2], options, tmp_path, fake)
    assert fake.words[0][:2] == ["crosskd.train", str(tmp_path / "recipe" / "teacher.py")]
    assert "gfl_large" in (tmp_path / "recipe" / "teacher.py").read_text()
    distilled = fake.words[1]
    assert distilled[distilled.index("--teacher-checkpoint") + 1] == str(tmp_path / "teacher" / "detector.pth")
    assert distilled[distilled.index("--epochs") + 1] == "6"  # a twelfth of what 1000 images get
    again = FakeProcesses(APS)
    halve(STUDENTS[:2], options, tmp_path, again)
    assert again.words == []


# ---- the command


@pytest.fixture
def search(shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`choose.main` with --train-top 3 over STUDENTS, which take a millisecond a megabyte of multiplications."""
    (tmp_path / "teacher.pth").write_text("weights")
    monkeypatch.setattr(choose, "families", lambda: [STUDENTS])
    monkeypatch.setattr(measure, "measured_once", lambda one, *_: Measured(one.macs / 1e6, 1.0, None))
    words = ["--budget-ms", "6.5", "--train-top", "3", "--trial-epochs", "1", "--data", str(shapes_dir)]
    words += ["--teacher-checkpoint", str(tmp_path / "teacher.pth"), "-o", str(tmp_path / "out")]

    def run(fake: Processes) -> int:
        monkeypatch.setattr("deploy.trials.Processes", lambda _jobs: fake)
        return choose.main(words)

    return run


def test_the_best_by_ap_of_the_most_promising_is_chosen(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(FakeProcesses(APS)) == 0
    printed = capsys.readouterr().out
    assert f"to be trained: {STUDENTS[3].name}, {STUDENTS[2].name}, {STUDENTS[1].name}\n" in printed
    assert f"{STUDENTS[1].name:<34}         30.0         60.0\n" in printed
    assert f"chosen: {STUDENTS[1].name}, measured again: p99 4.00 ms" in printed
    assert f"--teacher base --teacher-checkpoint {tmp_path / 'teacher.pth'} -o DIR" in printed
    document = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert document["chosen"]["side_px"] == 128
    assert [(one["name"], one["round"], one["epochs"]) for one in document["trials"]][-1] == (STUDENTS[3].name, 2, 2)
    assert "(128, 128)" in (tmp_path / "out" / "student.py").read_text()


def test_a_choice_among_the_others_is_kept_and_the_failure_told(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(FakeProcesses(APS, {STUDENTS[1].name: [2]})) == 2
    error = capsys.readouterr().err
    assert f"error: 1 trials failed: {STUDENTS[1].name}, round 1; why is above. {STUDENTS[3].name} was chosen" in error
    assert json.loads((tmp_path / "out" / "choice.json").read_text())["chosen"]["side_px"] == 192


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--train-top", "1"], "--train-top is 1; expected at least 2"),
        (["--train-top", "2", "--trial-epochs", "0"], "--trial-epochs is 0; expected at least 1"),
        (["--train-top", "2", "--seed", "-1"], "--seed is -1; expected at least 0"),
        (["--train-top", "2", "--teacher", "huge"], "no recipe 'huge'; expected one of base, large"),
        (["--train-top", "2", "--teacher-checkpoint", "nope.pth"], "no such file: nope.pth; expected weights"),
        (["--train-top", "2", "--ray", "nowhere"], "--ray is nowhere; expected local, auto, or HOST:PORT"),
        (["--ray", "local"], "--ray is given without --train-top"),
        (["--teacher", "base"], "--teacher is given without --train-top"),
    ],
)
def test_what_cannot_be_trained_is_one_message(
    words: list[str], named: str, shapes_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert choose.main(["--budget-ms", "5", "--data", str(shapes_dir), *words, "-o", str(output)]) == 2
    assert named in capsys.readouterr().err
    assert not output.exists()


def test_trainings_want_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose.main(["--budget-ms", "5", "--train-top", "2", "-o", str(tmp_path / "out")]) == 2
    assert "--train-top is given without --data" in capsys.readouterr().err


# ---- with real trainings


@pytest.mark.slow
@pytest.mark.parametrize("ray", [[], ["--ray", "local"]])
def test_real_students_are_trained_on_drawn_shapes(
    ray: list[str], shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from crosskd.choice import halving, space
    from crosskd.models.detector import detector_from_config

    if ray:
        pytest.importorskip("ray")
    text_of = space.config_text

    def without_download(candidate: Candidate, head: str) -> str:
        text = text_of(candidate, head)
        return text.replace("model = {'backbone': {", "model = {'backbone': {'pretrained': False, ")

    monkeypatch.setattr(halving, "config_text", without_download)
    monkeypatch.setattr(choose, "families", lambda: [STUDENTS[:2]])
    monkeypatch.setattr(measure, "measured_once", lambda one, *_: Measured(one.macs / 1e6, 1.0, None))
    class_names = load_split(shapes_dir, "val").class_names
    config = load_config(space.FOLDER / "gfl_base.py", {"model.bbox_head.num_classes": len(class_names)})
    teacher = detector_from_config(config, load_weights=False)
    checkpoint = tmp_path / "teacher.pth"
    torch.save({"state_dict": teacher.state_dict(), "meta": {"dataset_meta": {"classes": class_names}}}, checkpoint)
    output = tmp_path / "out"
    words = ["--budget-ms", "50", "--data", str(shapes_dir), "--train-top", "2", "--trial-epochs", "1"]
    words += ["--teacher-checkpoint", str(checkpoint), *ray, "-o", str(output)]
    assert choose.main(words) == 0
    trials = json.loads((output / "choice.json").read_text())["trials"]
    assert {one["name"] for one in trials} == {one.name for one in STUDENTS[:2]}
    made = {path: path.stat().st_mtime_ns for path in output.glob("trials/*/round1/student.pth")}
    assert len(made) == 2
    assert choose.main(words) == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}
