"""
One report for many boards, of the results that lie in a folder for each board, as `benchmarks.fleet` leaves them.

Each board is judged as it would be in a report of its own. The fleet rolls out where every board does.
"""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.result import check_same_data, reasons_from_numbers
from benchmarks.measuring.subject import TEACHER, TEACHER_FORMS
from benchmarks.reporting.document import (
    REPORT_VERSION,
    ReadResult,
    environments_from_groups,
    group_results,
    notes_on_latency,
    role_to_ship,
    rows_from_groups,
)
from benchmarks.reporting.verdict import LIMITS, judge, say_what_is_missing, verdict_from_limits, words_of_limit
from deploy.contract import provenance
from deploy.errors import ConfigError, MeasurementError
from deploy.files import AnyPath, read_json
from deploy.schema import check_content

FLEET_FILE = "fleet.json"
_OUTCOMES = {"outcomes": [{"board": str, "precision": str, "state": str, "reason": (str, None)}]}
"""Table of what is read of a fleet's own file."""

_TEACHERS = (TEACHER, *TEACHER_FORMS)

BoardResults = Dict[str, List[ReadResult]]


def result_files(given: Sequence[AnyPath]) -> List[AnyPath]:
    """
    `given`, with the result files of its boards in place of a folder.

    Raises:
        MeasurementError: a folder has none.
    """
    files: List[AnyPath] = []
    for path in given:
        if not Path(path).is_dir():
            files.append(path)
            continue
        of_boards = sorted(Path(path).glob("*/*.result.json"))
        if not of_boards:
            raise MeasurementError(f"{path} has no */*.result.json; expected a folder that benchmarks.fleet wrote")
        files += of_boards
    return files


def as_teachers(result: Dict[str, Any]) -> Dict[str, Any]:
    """
    The result with the teacher's role on its runtime in place of the student's.

    Raises:
        MeasurementError: its role is that of no runtime.
    """
    role = result["role"] if result["role"] in _TEACHERS else f"{TEACHER}-{result['role']}"
    if role not in _TEACHERS:
        raise MeasurementError(
            f"--teacher has a result of role {result['role']!r}; expected {TEACHER}, or a form of it: "
            f"{', '.join(form[len(TEACHER) + 1 :] for form in TEACHER_FORMS)}"
        )
    return {**result, "role": role}


def results_by_board(
    read: Sequence[ReadResult], failures: Mapping[str, Any], is_fleet: bool = False
) -> Optional[BoardResults]:
    """
    Board -> its results; None where all are of one machine.

    A result is of the board that it names, else of the one that its folder is called after. There are several where
    the same was measured on each. Accuracy in a folder that has nothing but the teacher's is taken for each board that
    lacks it.

    Args:
        failures: as `failures_from_files`; these boards are on the page, too.
        is_fleet: whether it is a fleet, if of one board alone.
    """
    folders: BoardResults = collections.defaultdict(list)
    for path, result in read:
        folders[result["environment"].get("board") or _folder(path).name].append((path, result))
    measured = collections.Counter(
        what
        for results in folders.values()
        for what in {(result["role"], result["kind"]) for _, result in results if result["role"] not in _TEACHERS}
    )
    if not is_fleet and max(measured.values(), default=0) < 2:
        return None
    boards = {
        name: results
        for name, results in folders.items()
        if name in failures or any(result["role"] not in _TEACHERS for _, result in results)
    }
    shared = [
        (path, result)
        for name, results in folders.items()
        for path, result in results
        if name not in boards and result["kind"] == "accuracy"
    ]
    for results in boards.values():
        there = {result["role"] for _, result in results if result["kind"] == "accuracy"}
        results += [(path, result) for path, result in shared if result["role"] not in there]
    return {**boards, **{name: [] for name in failures if name not in boards}}


def _folder(path: AnyPath) -> Path:
    return Path(path).absolute().parent


def failures_from_files(paths: Sequence[AnyPath]) -> Dict[str, Dict[str, str]]:
    """
    Board -> precision -> why it failed, of the fleets' files in the folders above those of the results.

    Raises:
        MeasurementError: such a file is none of a fleet.
    """
    failures: Dict[str, Dict[str, str]] = {}
    for file in dict.fromkeys(_folder(path).parent / FLEET_FILE for path in paths):
        if not file.is_file():
            continue
        document = read_json(file, MeasurementError, "what benchmarks.fleet wrote")
        check_content(document, _OUTCOMES, file, MeasurementError, "Run benchmarks.fleet again.")
        named = {outcome["board"] for outcome in document["outcomes"]}
        if not any(_folder(path).name in named for path in paths):
            continue
        for outcome in document["outcomes"]:
            failed = failures.setdefault(outcome["board"], {})
            if outcome["state"] != "ok":
                failed[outcome["precision"]] = outcome["reason"] or "it failed"
    return failures


def notes_on_other_boards(results: Sequence[Mapping[str, Any]], failures: Mapping[str, Mapping[str, str]]) -> List[str]:
    """In a report of one board: which others of its fleet it does not speak of."""
    there = {result["environment"].get("board") for result in results}
    others = [name for name in failures if name not in there]
    if there == {None} or not others:
        return []
    return [f"This is the report of one board. Its fleet has others, which it does not judge: {', '.join(others)}."]


def fleet_report(
    paths: Sequence[AnyPath],
    boards: BoardResults,
    failures: Mapping[str, Mapping[str, str]],
    asked: Optional[str],
    allowed: Mapping[str, float],
) -> Dict[str, Any]:
    """
    The document of a fleet's report: what `report.json` holds and the page shows.

    Args:
        boards: as `results_by_board`. failures: as `failures_from_files`.
        asked: the role that ships; None: on each board the last one that is known.

    Raises:
        ConfigError: no board has the role. MeasurementError: results do not belong together.
    """
    read = [pair for results in boards.values() for pair in results]
    if asked is not None and asked not in {result["role"] for _, result in read}:
        raise ConfigError(f"--ship is {asked!r}, but no board has results of it")
    check_same_data(read)
    entries = [_board(name, results, failures.get(name, {}), asked, allowed) for name, results in boards.items()]
    _doubt_other_files(entries, allowed)
    return {
        "report_version": REPORT_VERSION,
        **provenance({str(path): path for path in paths}),
        "verdict": verdict_of_fleet(entries, bool(allowed)),
        "data": next(
            result["data"] for kind in ("accuracy", "latency") for _, result in read if result["kind"] == kind
        ),
        "boards": entries,
    }


def _board(
    name: str,
    read: Sequence[ReadResult],
    failures: Mapping[str, str],
    asked: Optional[str],
    allowed: Mapping[str, float],
) -> Dict[str, Any]:
    """What is told of one board: its models, its limits, its verdict."""
    reasons = [f"{precision}: {reason}" for precision, reason in failures.items()]
    groups = group_results(read)
    entry: Dict[str, Any] = {
        "board": name,
        "machine": None,
        "ship": None,
        "rows": [],
        "notes": [f"Failed: {reason}" for reason in reasons],
        "environments": environments_from_groups(groups),
    }
    roles = [role for role in groups if role not in _TEACHERS]
    if not roles or (asked is not None and asked not in roles):
        why = reasons or [f"{asked} was not measured" if asked else "nothing but the teacher was measured"]
        return {**entry, **_untold(why, allowed)}
    ship = role_to_ship(roles, asked)
    rows = rows_from_groups(groups)
    row = next(row for row in rows if row["role"] == ship)
    say_what_is_missing(row)
    timed = groups[ship].get("latency")
    limits = judge(row, allowed, reasons_from_numbers(timed["numbers"]) if timed else ())
    verdict = verdict_from_limits(row, limits)
    judged = {"limits": limits, "verdict": verdict}
    if reasons and asked is None and verdict["outcome"] == "pass":  # what failed may be what was to ship
        judged = _untold(reasons, allowed)
    environment = (timed or next(iter(groups[ship].values())))["environment"]
    return {
        **entry,
        "machine": environment.get("machine") or environment["cpu"],
        "ship": ship,
        "rows": rows,
        "notes": entry["notes"] + notes_on_latency(groups),
        **judged,
    }


def _doubt_other_files(boards: Sequence[Dict[str, Any]], allowed: Mapping[str, float]) -> None:
    """Boards whose ONNX file is another than most measured in its role do not tell of the model that ships."""
    ships = [(board, row) for board in boards for row in board["rows"] if row["role"] == board["ship"]]
    files = collections.Counter((row["role"], row["sha256"]) for _, row in ships if row["format"] == "onnx")
    for board, row in ships:
        usual = max((key for key in files if key[0] == row["role"]), key=files.__getitem__, default=None)
        if usual is not None and row["format"] == "onnx" and row["sha256"] != usual[1]:
            why = f"its {row['role']} is another file than that of the other boards, by its hash: measure the same"
            board["notes"].append(why)
            board.update(_untold([why], allowed))


def _untold(reasons: Sequence[str], allowed: Mapping[str, float]) -> Dict[str, Any]:
    """Limits and verdict of a board that has not measured what ships."""
    why = "; ".join(reasons)
    outcome, label = ("cannot tell", "Cannot tell") if allowed else ("no limits", "No limits given")
    unknown = {kind.estimate: why for kind in LIMITS}
    row = {"role": "", "estimates": dict.fromkeys(unknown), "doubts": unknown}
    roll_out = False if allowed else None
    verdict = {"ship": None, "outcome": outcome, "roll_out": roll_out, "label": label, "sentence": why}
    return {"limits": judge(row, allowed), "verdict": verdict}


def slack(limit: Mapping[str, Any]) -> float:
    """By which part of what is allowed the worse bound is within a limit; negative beyond it, -inf where unknown."""
    if limit["measured"] is None or limit["why"]:
        return -math.inf
    room = limit["allowed"] - limit["high"] if limit["bound"] == "at most" else limit["low"] - limit["allowed"]
    return float(room / (abs(limit["allowed"]) or 1.0))


def verdict_of_fleet(boards: Sequence[Mapping[str, Any]], has_limits: bool) -> Dict[str, Any]:
    """
    `outcome`, `roll_out`, `label`, the verdict in one `sentence`, and the name of the board that `decides`: of those
    that break a limit, else of those that cannot be told, else of all, the one that is worst within its limits.
    """
    if not has_limits:
        sentence = f"No limits were given, so there is no verdict on {_counted(len(boards))}."
        return {
            "outcome": "no limits",
            "roll_out": None,
            "label": "No limits given",
            "sentence": sentence,
            "decides": None,
        }
    failed, unsure = (
        [board for board in boards if board["verdict"]["outcome"] == what] for what in ("fail", "cannot tell")
    )
    decides, reason = min(map(_tightest, failed or unsure or boards), key=lambda found: found[0])[1:]
    name = decides["board"]
    others = f", and on {len(unsure)} it cannot be told" if failed and unsure else ""
    if failed:
        outcome, label, breaks = "fail", "Do not roll out", "breaks" if len(failed) == 1 else "break"
        sentence = f"Do not roll out: {len(failed)} of {_counted(len(boards))} {breaks} a limit{others}."
    elif unsure:
        outcome, label = "cannot tell", "Cannot tell"
        sentence = f"It cannot be told whether to roll out, on {len(unsure)} of {_counted(len(boards))}."
    else:
        outcome, label = "pass", "Roll out"
        sentence = f"Roll out to {_counted(len(boards))}: all limits hold on each."
    role = "Nearest to a limit is" if outcome == "pass" else "It is decided by"
    return {
        "outcome": outcome,
        "roll_out": outcome == "pass",
        "label": label,
        "sentence": f"{sentence} {role} {name}: {reason}.",
        "decides": name,
    }


def _counted(boards: int) -> str:
    return "1 board" if boards == 1 else f"{boards} boards"


def _tightest(board: Mapping[str, Any]) -> Tuple[float, Mapping[str, Any], str]:
    """(how far within it is, the board, in words) of the limit that decides its verdict."""
    outcome = board["verdict"]["outcome"]
    limit = min((limit for limit in board["limits"] if limit["outcome"] == outcome), key=slack)
    untold = board["verdict"]["ship"] is None
    return slack(limit), board, board["verdict"]["sentence"] if untold else words_of_limit(limit)
