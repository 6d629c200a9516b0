"""
A run that is killed, at any point, and resumed ends with exactly the weights of a run that was not.

Runs are forked from the process of the tests, so that a kill is a real one and the packages are imported once.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop

from crosskd import distill, train

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on a CPU; forked processes have no GPU"),
    pytest.mark.usefixtures("unformatted_configs"),
]

CONFIG = """
_base_ = {base!r}
train_dataloader = dict(
    batch_size=2,
    num_workers={workers},
    dataset=dict(pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="FitResize", scale=(96, 64)),
        dict(type="RandomFlip", prob=0.5),
        dict(type="FitPad", size=(96, 64), pad_value=(104, 116, 124)),
        dict(type="PackDetInputs"),
    ]),
)
param_scheduler = [dict(type="CosineAnnealingLR", begin=0, end=25, T_max=25, convert_to_iter_based=True)]
max_epochs = 3
"""


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_child(work: Callable[[], int]) -> int:
    """The wait status of a forked process that runs `work`, which returns its exit status."""
    gc.freeze()  # or each collection in the child would touch, and copy, all that it shares with this process
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the pool of threads of the parent is not there
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    gc.unfreeze()
    return os.waitpid(child, 0)[1]


def _kill_in_step(epoch: int, step: int) -> Callable[[], None]:
    """Makes the process kill itself when it comes to this step, both from 0."""

    def arrange() -> None:
        run_iter = EpochBasedTrainLoop.run_iter

        def killed_iter(loop: Any, index: int, batch: Any) -> None:
            if (loop.epoch, index) == (epoch, step):
                _killed()
            run_iter(loop, index, batch)

        EpochBasedTrainLoop.run_iter = killed_iter

    return arrange


def _kill_in_write(name: str) -> Callable[[], None]:
    """Makes the process kill itself when half of this checkpoint is written."""

    def arrange() -> None:
        write_bytes = Path.write_bytes

        def killed_write(path: Path, data: bytes) -> int:
            if path.name.startswith(f".{Path(name).stem}."):
                write_bytes(path, data[: len(data) // 2])
                _killed()
            return write_bytes(path, data)

        Path.write_bytes = killed_write

    return arrange


def _kill_before(function: str, name: str, nth: int = 1) -> Callable[[], None]:
    """Makes the process kill itself when it is about to do this with the file `name` for the nth time."""

    def arrange() -> None:
        original, calls = getattr(os, function), []

        def killed(*paths: Any, **options: Any) -> None:
            if os.path.basename(paths[-1]) == name:
                calls.append(paths)
                if len(calls) == nth:
                    _killed()
            original(*paths, **options)

        setattr(os, function, killed)

    return arrange


def _weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


def _lines(run_dir: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [(line["kind"], line["epoch"], line["iter"], line.get("lr"), line.get("loss")) for line in lines]


def _assert_same_run(run_dir: Path, other: Path, weights_name: str) -> None:
    mine, theirs = _weights(run_dir / weights_name), _weights(other / weights_name)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [path.name for path in run_dir.glob("epoch_*.pth")] == ["epoch_3.pth"]
    assert not list(run_dir.glob(".*"))
    assert _lines(run_dir) == _lines(other)


@pytest.fixture(scope="module")
def words(configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """
    Of crosskd.train: three epochs of four steps on images that are flipped at random.

    With `teacher_run` this process has trained once, and all that a training imports is there for the forked ones.
    """
    config = tmp_path_factory.mktemp("config") / "flipped.py"
    config.write_text(CONFIG.format(base=str(configs / "gfl_tiny.py"), workers=0))
    # Validation comes after the last epoch only, but for a run that is killed then.
    return [str(config), "--data", str(shapes_dir), "--set", "train_cfg.val_interval=9"]


@pytest.fixture(scope="module")
def uninterrupted(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert _in_child(lambda: train.main([*words, "-o", str(run_dir)])) == 0
    return run_dir


@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(_kill_in_step(1, 2), id="in the second epoch"),
        pytest.param(_kill_in_write("epoch_2.pth"), id="half of a checkpoint is written"),
        pytest.param(_kill_before("replace", "last_checkpoint", 2), id="a checkpoint is written, not yet pointed to"),
        pytest.param(_kill_before("unlink", "epoch_1.pth"), id="the old checkpoint is not yet removed"),
        pytest.param(_kill_before("replace", "detector.pth"), id="the weights are not yet there"),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    arrange: Callable[[], None], words: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def killed() -> int:
        arrange()
        return train.main([*words, "-o", str(run_dir)])

    assert os.WTERMSIG(_in_child(killed)) == signal.SIGKILL
    assert not (run_dir / "detector.pth").exists()
    with (run_dir / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "it')  # as a kill in the middle of a line leaves it
    assert _in_child(lambda: train.main([*words, "-o", str(run_dir), "--resume"])) == 0
    _assert_same_run(run_dir, uninterrupted, "detector.pth")


def test_so_does_a_distillation_with_workers_accumulation_and_average(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path
) -> None:
    config = tmp_path / "flipped.py"
    base = tmp_path / "base.py"  # beside the teacher's config
    base.write_text((configs / "crosskd_tiny.py").read_text().replace("./gfl_tiny.py", str(configs / "gfl_tiny.py")))
    (tmp_path / "gfl_tiny_teacher.py").write_text(
        (configs / "gfl_tiny_teacher.py").read_text().replace("./gfl_tiny.py", str(configs / "gfl_tiny.py"))
    )
    config.write_text(CONFIG.format(base=str(base), workers=2))
    # Four steps an epoch, three to a step of the optimiser: each epoch ends in the middle of an accumulation.
    words = [str(config), "--data", str(shapes_dir), "--teacher-checkpoint", str(teacher_run / "detector.pth")]
    words += ["--accumulate", "3", "--ema", "0.5", "--set", "train_cfg.val_interval=9"]
    runs = {name: [*words, "-o", str(tmp_path / name)] for name in ("uninterrupted", "killed")}
    assert _in_child(lambda: distill.main(runs["uninterrupted"])) == 0

    def killed() -> int:
        _kill_in_step(1, 3)()
        return distill.main(runs["killed"])

    assert os.WTERMSIG(_in_child(killed)) == signal.SIGKILL
    assert _in_child(lambda: distill.main([*runs["killed"], "--resume"])) == 0
    _assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted", "student.pth")


def test_a_run_that_is_started_afresh_cannot_be_resumed_from_an_earlier_one(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "last_checkpoint").write_text(str(run_dir / "epoch_9.pth"))

    def killed() -> int:
        _kill_in_step(0, 1)()
        return train.main([*words, "-o", str(run_dir)])

    assert os.WTERMSIG(_in_child(killed)) == signal.SIGKILL
    assert _in_child(lambda: train.main([*words, "-o", str(run_dir), "--resume"])) >> 8 == 2


def test_a_run_is_resumed_only_as_it_was_started(
    words: list[str], shapes_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    others = {}
    for name, change in (
        ("other_classes", lambda document: document["categories"][0].update(name="disc")),
        ("other_boxes", lambda document: document["annotations"].pop()),
    ):
        others[name] = tmp_path / name
        shutil.copytree(shapes_dir, others[name])
        for split in ("train", "val", "test"):
            path = others[name] / "annotations" / f"instances_{split}.json"
            document = json.loads(path.read_text())
            change(document)
            path.write_text(json.dumps(document))
    run_dir = tmp_path / "run"

    def killed() -> int:
        _kill_in_step(1, 0)()
        return train.main([*words, "-o", str(run_dir)])

    _in_child(killed)
    for changed, named in (
        (["--seed", "1"], "the run has the seed 0, --seed is 1; resume with the same"),
        (["--ema"], "started without a moving average of the weights and is resumed with one"),
        (["train_dataloader.batch_size=4"], "had taken 4 steps after 1 epochs; with these data, batch size and number"),
        (["--epochs", "5"], "started with another setting: train_cfg.max_epochs was 3, now it is 5 (and"),
        (["optim_wrapper.optimizer.lr=0.5"], "optim_wrapper.optimizer.lr was 0.0015, now it is 0.5. Resume it with"),
        (["model.bbox_head.feat_channels=24"], "model.bbox_head.feat_channels was 16, now it is 24"),
        (["--data", str(others["other_classes"])], "started with the classes ['circle', 'triangle', "),
        (["--data", str(others["other_boxes"])], "started with other train data (8 images, "),
    ):
        # The last word of `words` is one of --set, whose values the batch size joins.
        resumed = [*words, *changed, "-o", str(run_dir), "--resume"]
        assert _in_child(lambda resumed=resumed: train.main(resumed)) >> 8 == 2
        assert named in capfd.readouterr().err
    (run_dir / "training.json").unlink()  # a run of an earlier version has none
    resumed = [*words, "model.bbox_head.feat_channels=24", "-o", str(run_dir), "--resume"]
    assert _in_child(lambda: train.main(resumed)) >> 8 == 2
    assert "started with another model or other classes" in capfd.readouterr().err
