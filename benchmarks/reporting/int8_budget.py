"""How INT8 was reached within a budget of AP: what `calibration.choose` left in the sidecar of the INT8 file."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from deploy.contract import read_sidecar
from deploy.errors import MeasurementError
from deploy.files import AnyPath


def read_int8_budget(path: AnyPath, groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Dict[str, Any]:
    """
    `max_int8_drop`, `rungs`, `sentence` and `ships`, the role of what is to ship in place of INT8 (None: INT8 is).

    Args:
        path: the INT8 file that was chosen.
        groups: role -> kind -> result, of the report.

    Raises:
        ContractError: it does not match its sidecar, or `calibration.choose` did not write it.
        MeasurementError: none of the results is of this file, or of what was built from it.
    """
    sidecar = read_sidecar(path, details=("int8_budget",))
    models = [result["model"] for group in groups.values() for result in group.values()]
    measured = {model["sha256"] for model in models}
    measured.update(entry["sha256"] for model in models for entry in model["inputs"].values())
    if sidecar["artefact"]["sha256"] not in measured:
        raise MeasurementError(
            f"--int8-budget is {path}, of which none of the results is (by their hashes); expected the INT8 file that "
            "was measured, or that its engine was built from"
        )
    budget: Dict[str, Any] = sidecar["details"]["int8_budget"]
    return budget


def words_of_miss(int8_budget: Mapping[str, Any]) -> str:
    """What a verdict on a model in float has to add: INT8 is not it; nothing where INT8 keeps its budget."""
    if int8_budget["ships"] is None:
        return ""
    return f" No way to INT8 keeps the budget of {int8_budget['max_int8_drop']:g} points of AP: do not roll out INT8."
