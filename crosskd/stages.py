"""
The stages of a pipeline: commands in order, each of which leaves a file. What is up to date is not run again.

An interrupted training goes on where it was; any other stage that was cut off begins anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

from crosskd.config import load_config
from deploy.ap_drop import drop_from_result
from deploy.commands import command_line, run_status
from deploy.errors import PipelineError
from deploy.freshness import is_current, is_made, read_start, start_from, write_start
from deploy.layouts import annotations_path

JUDGED_BY = ("report_limits", "max_int8_drop")
"""Keys of a config that no training reads."""
VERDICT = 1
"""Status of a report whose verdict is not to roll out."""
BOARD_FAILED = 2
"""Status of a fleet of which a board failed, or of bad input, but then it writes no file."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of the pipeline and the file that it leaves."""

    name: str
    words: list[str]
    """The module and its arguments, without `python -m`."""
    artefact: Path
    record: Path | None = None
    """The file whose sidecar has this command, where the artefact's has another: that of a command on the way to it."""
    unless: tuple[Path, ...] = ()
    """Accuracy results of INT8 models. The stage is left out where one of them keeps the budget."""
    max_int8_drop: float = 0.0
    """That budget, in points of AP."""
    advice: str = ""
    """What else to do, if it fails."""
    answers: tuple[int, ...] = ()
    """Statuses but 0 with which it has written its file, and no failure; a stage that has any runs each time."""

    @property
    def makes_run(self) -> bool:
        """Whether it makes a run directory, from the config that is its first argument."""
        return self.words[0].startswith("crosskd.")

    @property
    def is_training(self) -> bool:
        return self.words[0] in ("crosskd.train", "crosskd.distill")

    @property
    def command(self) -> list[str]:
        return ["python", "-m", *self.words]

    @property
    def is_needed(self) -> bool:
        """Whether none of the results in `unless` keeps the budget, as far as they are there."""
        measured = [drop_from_result(path) for path in self.unless if path.exists()]
        return not any(drop.keeps(self.max_int8_drop) for drop in measured)


def run_stages(stages: list[Stage]) -> int:
    """
    Runs what is not up to date and returns the status of the last stage, a report's: 0 roll out, 1 do not.

    Raises:
        PipelineError: a stage failed, or did not write its file. Its own message is on stderr.
    """
    started = time.monotonic()
    status = 0
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        if not stage.is_needed:
            print(f"{head}: not needed, INT8 keeps its budget without it", flush=True)
            continue
        answers = (*stage.answers, VERDICT) if stage is stages[-1] else stage.answers
        if not answers and is_up_to_date(stage):
            print(f"{head}: up to date, {stage.artefact}", flush=True)
            continue
        words = words_to_run(stage)
        print(f"{head}: {command_line(*words)}", flush=True)
        began = time.monotonic()
        before = file_identity(stage.artefact)
        status = run_status(*words)
        if status not in (0, *answers):
            raise PipelineError(
                f"stage {stage.name!r} ended with status {status}; its message is above. Put that right and run the "
                f"same command again: what is finished is kept{stage.advice}"
            )
        if file_identity(stage.artefact) in (None, before):
            raise PipelineError(
                f"stage {stage.name!r} ended with status {status} and did not write {stage.artefact}; what it said is "
                "above"
            )
        now = time.monotonic()
        print(f"{head}: done in {now - began:.0f} s, {now - started:.0f} s in all", flush=True)
    return status


def words_to_run(stage: Stage) -> list[str]:
    """The module and its arguments that run a stage: anew, which its run directory notes, or from where it was."""
    if can_resume(stage):
        return [*stage.words, "--resume"]
    if stage.makes_run:
        note_start(stage)
    return stage.words


def file_identity(path: Path) -> tuple[int, int] | None:
    """What differs after a file has been written anew; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def note_start(stage: Stage) -> None:
    """Notes in the run directory what it is made from; what another command or config left there no longer counts."""
    run_dir = stage.artefact.parent
    for stale in (stage.artefact, stage.record or stage.artefact, run_dir / "last_checkpoint"):
        stale.unlink(missing_ok=True)
    write_start(run_dir, start_of(stage))


def start_of(stage: Stage, whole_config: bool = False) -> dict[str, Any]:
    """What a run directory is made from: command, files with their hashes, the values of the config."""
    data = Path(stage.words[stage.words.index("--data") + 1])
    annotations = [str(annotations_path(data, split)) for split in ("train", "val")]
    return start_from(stage.words, [*stage.words[2:], *annotations], config_sha256=config_sha256(stage, whole_config))


def config_sha256(stage: Stage, whole: bool = False) -> str:
    """
    The hash of the config's values that the stage uses: with all that it inherits, and for the student its teacher's.

    Args:
        whole: of all values, as it was noted up to version 0.1.
    """
    values = load_config(stage.words[1]).to_dict()
    if not whole:
        for key in JUDGED_BY:
            values.pop(key, None)
        if stage.words[0] == "crosskd.train":
            values["model"] = values["model"].get("student", values["model"])
    return hashlib.sha256(repr(values).encode()).hexdigest()


def can_resume(stage: Stage) -> bool:
    """Whether an interrupted training of the very same command and files left a checkpoint to go on from."""
    left_one = not stage.artefact.exists() and (stage.artefact.parent / "last_checkpoint").exists()
    return (
        stage.is_training
        and left_one
        and any(read_start(stage.artefact.parent) == start_of(stage, whole_config) for whole_config in (False, True))
    )


def is_up_to_date(stage: Stage) -> bool:
    """Whether the artefact is there, as recorded, made by this very command from inputs that are still the same."""
    if not is_made(stage.record or stage.artefact, stage.words) or (stage.record and not is_current(stage.artefact)):
        return False
    noted = read_start(stage.artefact.parent).get("config_sha256") if stage.makes_run else None
    return noted is None or any(noted == config_sha256(stage, whole) for whole in (False, True))
