"""What changed between two rollouts: an earlier report's document against this one's."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional

from deploy.contract import check_seal
from deploy.errors import MeasurementError
from deploy.files import AnyPath, read_json
from deploy.schema import check_content

_ESTIMATE = {"value": float, "low": float, "high": float}
_TEXT = (str, None)
REPORT = {
    "created_utc": str,
    "verdict": {"sentence": str},
    "data": {"annotations_sha256": str, "class_names": [str], "images": int},
    "rows": [
        {"role": str, "title": str, "sha256": str, "AP": (float, None), "estimates": {str: (_ESTIMATE, None)}},
    ],
    "environments": [{"facts": {"cpu": _TEXT}}],
}
"""Table of what is read of an earlier report."""


def read_report(path: AnyPath, report_version: int) -> Dict[str, Any]:
    """
    The document of an earlier report.

    Raises:
        MeasurementError: it is missing, no report, of another version, or was edited.
    """
    document = read_json(path, MeasurementError, "the report.json of an earlier report")
    if not isinstance(document, dict) or "report_version" not in document:
        raise MeasurementError(f"{path} is not a report: it has no report_version. Give a report.json.")
    if document["report_version"] != report_version:
        raise MeasurementError(
            f"{path}: report_version is {document['report_version']!r}; expected {report_version}. Make the report of "
            "those results again."
        )
    check_content(document, REPORT, path, MeasurementError, "Make the report of those results again.")
    check_seal(document, path)
    return document


def changes_from_reports(old: Mapping[str, Any], new: Mapping[str, Any], old_path: AnyPath) -> Dict[str, Any]:
    """
    What changed from one report's document to another's.

    `rows`: per role of both the `changes` of its estimates (`old`, `new`, and `sure` where the two ranges do not meet)
    and whether it is the very `same_file`; `gone` and `added`: titles of the others. `machines` names both sets of
    machines where they differ, else None: then speeds compare more than the models. Also the old report's `file`,
    `created_utc` and `verdict`.

    Raises:
        MeasurementError: the reports are of different data or classes.
    """
    both_accurate = all(any(row["AP"] is not None for row in report["rows"]) for report in (old, new))
    for key in ("annotations_sha256", "class_names", *(["images"] if both_accurate else [])):
        if old["data"][key] != new["data"][key]:
            raise MeasurementError(
                f"{old_path} and the results differ in data.{key}: {old['data'][key]!r:.80} and "
                f"{new['data'][key]!r:.80}. Rollouts on different data do not compare."
            )
    before = {row["role"]: row for row in old["rows"]}
    rows = [
        {
            "title": row["title"],
            "same_file": before[row["role"]]["sha256"] == row["sha256"],
            "changes": {
                name: _change(before[row["role"]]["estimates"].get(name), found)
                for name, found in row["estimates"].items()
            },
        }
        for row in new["rows"]
        if row["role"] in before
    ]
    now = [row["role"] for row in new["rows"]]
    machines = [sorted({_machine(one) for one in report["environments"]}) for report in (old, new)]
    return {
        "file": str(old_path),
        "created_utc": old["created_utc"],
        "verdict": old["verdict"],
        "rows": rows,
        "gone": [row["title"] for role, row in before.items() if role not in now],
        "added": [row["title"] for row in new["rows"] if row["role"] not in before],
        "machines": machines if machines[0] != machines[1] else None,
    }


def _machine(environment: Mapping[str, Any]) -> str:
    facts = environment["facts"]
    return ", ".join(str(one) for one in (facts.get("machine") or facts.get("cpu"), facts.get("gpu")) if one)


def _change(old: Optional[Mapping[str, float]], new: Optional[Mapping[str, float]]) -> Optional[Dict[str, Any]]:
    if old is None or new is None:
        return None
    apart = new["low"] > old["high"] or new["high"] < old["low"]
    return {"old": old["value"], "new": new["value"], "sure": apart}
