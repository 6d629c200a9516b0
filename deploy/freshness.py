"""
Whether a file was made by this command from these inputs, so that it need not be made again.

The answer comes from the record that every artefact has: its sidecar, or, of a result file or report, the file itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from deploy.contract import INPUTS, RESULT_VERSION, check_seal, read_sidecar
from deploy.errors import MeasurementError, PipelineError
from deploy.files import AnyPath, sha256_of, write_json
from deploy.schema import read_checked

STARTED = "started.json"
"""In a run directory: what the training there was started from, written before its first step."""
STARTED_KINDS = {"command": [str], "files": {str: str}}
"""Table of that file, but for what else a training depends on."""
RECORD = {"command": [str], "inputs": INPUTS}
"""Table of what is read here of a result file or report."""


def read_record(artefact: AnyPath) -> Dict[str, Any]:
    """
    What is recorded of how the artefact was made; the artefact has been compared with it.

    Raises:
        PipelineError: there is none, it is damaged, or the artefact is not the one that it describes.
    """
    if Path(artefact).suffix != ".json":
        return read_sidecar(artefact)
    record: Dict[str, Any] = read_checked(artefact, RECORD, MeasurementError, "a result file")
    if "result_version" in record or "report_version" in record:
        check_seal(record, artefact)
    return record


def made_by(record: Mapping[str, Any]) -> List[str]:
    """The command of a record. That a training was resumed makes no difference."""
    return [word for word in record["command"] if word != "--resume"]


def changed_inputs(record: Mapping[str, Any]) -> List[str]:
    """The files that a record's artefact was made from and that are others now, or gone."""
    return [
        one["file"]
        for one in record["inputs"].values()
        if not Path(one["file"]).is_file() or sha256_of(one["file"]) != one["sha256"]
    ]


def is_current(artefact: AnyPath, cpu: Optional[str] = None) -> bool:
    """
    Whether the artefact is as it was made, from files that are still the same, with the files that belong to it.

    Args:
        cpu: the processor that a result has to be of; any, if None.
    """
    try:
        record = read_record(artefact)
        if record.get("result_version", RESULT_VERSION) != RESULT_VERSION:
            return False
        if cpu is not None and "environment" in record and record["environment"]["cpu"] != cpu:
            return False
        kept = record.get("detections")  # beside an accuracy result
        if kept is not None and sha256_of(Path(artefact).with_name(kept["file"])) != kept["sha256"]:
            return False
        return not changed_inputs(record)
    except (PipelineError, OSError, KeyError, TypeError, AttributeError):
        return False


def is_made(artefact: AnyPath, words: Sequence[str], cpu: Optional[str] = None) -> bool:
    """Whether `python -m WORDS` has made the artefact, and it is current: see `is_current`."""
    return is_current(artefact, cpu) and made_by(read_record(artefact)) == ["python", "-m", *words]


def start_from(words: Sequence[str], files: Sequence[str], **more: Any) -> Dict[str, Any]:
    """
    What a training is started from, for `write_start`.

    Args:
        words: the module and its arguments, without `python -m`.
        files: those that its result depends on; what is no file is left out.
        more: what else it depends on.
    """
    hashes = {name: sha256_of(name) for name in files if Path(name).is_file()}
    return {"command": ["python", "-m", *words], "files": hashes, **more}


def write_start(run_dir: AnyPath, start: Mapping[str, Any]) -> None:
    """Notes in the run directory what its training is started from."""
    write_json(Path(run_dir) / STARTED, dict(start))


def read_start(run_dir: AnyPath) -> Dict[str, Any]:
    """What `write_start` noted; empty for a run that was started by hand, or where the note is damaged."""
    try:
        return dict(read_checked(Path(run_dir) / STARTED, STARTED_KINDS, PipelineError, "the start of a run"))
    except PipelineError:
        return {}


def changed_keys(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> List[str]:
    """What measurements depended on and is not the same now, by name, in the order of `now`."""
    return [name for name in dict.fromkeys([*now, *recorded]) if recorded.get(name) != now.get(name)]
