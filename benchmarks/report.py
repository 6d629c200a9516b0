"""
Command: result files -> one report with a verdict, as HTML, Markdown and JSON.

    python -m benchmarks.report *.result.json -o report.html --max-ap-drop 1.5 --max-latency-ms 40

It measures nothing: the same result files give the same report. Exit status 0: roll out, or no limits were given;
1: do not roll out, or it cannot be told; 2: bad input. Needs jinja2, and the detections beside the accuracy results;
the gallery also needs the annotations and images where they were when measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from benchmarks.measuring.bootstrap import bounds_of_draws, resampled_percentile
from benchmarks.measuring.coco import METRICS
from benchmarks.measuring.detections import NO_BOXES, Boxes, boxes_by_image, read_detections
from benchmarks.measuring.environment import VARYING
from benchmarks.measuring.result import STAGES, STATISTICS, check_same_data, read_result, reasons_from_numbers
from benchmarks.measuring.subject import ROLES
from benchmarks.reporting.changes import changes_from_reports, read_report
from benchmarks.reporting.figures import (
    LINE_STYLES,
    curves_from_precisions,
    distribution_from_samples,
    plot_from_points,
)
from benchmarks.reporting.gallery import Side, gallery, most_disagreed
from benchmarks.reporting.junit import junit_from_limits
from benchmarks.reporting.ladder import RUNGS, faults, movement
from benchmarks.reporting.operating_point import comparison
from benchmarks.reporting.verdict import (
    LIMITS,
    Estimate,
    Row,
    check_limits,
    judge,
    latency_ms,
    limits_from_file,
    verdict_from_limits,
)
from benchmarks.reporting.wording import (
    Markup,
    amount,
    amount_between,
    code,
    count,
    decimals,
    markdown,
    mib,
    millions,
    ms,
    part,
    percent,
    points,
    signed_points,
    signed_score,
    times,
    verbatim,
)
from deploy.commands import shell_line
from deploy.contract import provenance, sealed
from deploy.errors import ConfigError, MeasurementError, MissingDependencyError, command
from deploy.files import AnyPath, check_writable, read_json, replacing, sha256_of, write_json

REPORT_VERSION = 2
MADE_FROM = {"student": "teacher", **{role: parent for role, parent, _ in RUNGS}}
"""Role -> the role whose file it is made from."""
SHIPPED_FORMS = tuple(role for role, _, _ in RUNGS)
"""Roles that are the distilled student in another form."""
INT8_PAIRS = (("engine-int8", "engine-fp16"), ("onnx-int8", "onnx-fp32"))
"""What INT8 is compared with, to see whether it is worth it: the first pair that was measured."""
INT8_LOSS_POINTS = 1.0
"""The AP that INT8 may cost to be called worth it: a choice of this project; --max-ap-drop is the user's own."""


CHANGED = (
    ("AP", "AP", points),
    ("median_ms", "median, ms", ms),
    ("p99_ms", "p99, ms", ms),
    ("memory_mib", "memory, MiB", lambda value: decimals(value, 0)),
    ("energy_mj", "energy, mJ", lambda value: decimals(value, 1)),
)
"""(estimate, heading, its text) of what is told of two rollouts."""


class Column(NamedTuple):
    """A column of a table of models."""

    heading: str
    text: Callable[[Row], str]
    value: Callable[[Row], Optional[float]]
    """What the table is sorted by."""
    between: Callable[[Row], str] = lambda row: ""
    """The bounds, shown smaller."""


def _metric(heading: str, name: str) -> Column:
    return Column(heading, lambda row: points(row[name]), lambda row: row[name])


def _stage(heading: str, stage: str, statistic: str) -> Column:
    return Column(
        heading, lambda row: ms(latency_ms(row, stage, statistic)), lambda row: latency_ms(row, stage, statistic)
    )


def _bounds(row: Row, name: str, words: Callable[[float], str]) -> str:
    found = row["estimates"][name]
    return "" if found is None or found["low"] == found["high"] else f"{words(found['low'])} to {words(found['high'])}"


def _estimate(row: Row, name: str) -> Optional[float]:
    found = row["estimates"][name]
    return found["value"] if found else None


_GAIN = Column(
    "vs teacher", lambda row: signed_points(row["AP_gain"]), lambda row: row["AP_gain"],
    lambda row: _bounds(row, "AP_gain", signed_points),
)  # fmt: skip
_SIZE = Column("disk, MiB", lambda row: mib(row["bytes"]), lambda row: row["bytes"])
TABLES: Tuple[Tuple[str, str, str, Tuple[Column, ...]], ...] = (
    ("models", "All models", "rows", (
        Column("AP", lambda row: points(row["AP"]), lambda row: row["AP"], lambda row: _bounds(row, "AP", points)),
        _GAIN,
        Column("gain kept", lambda row: part(row["gain_kept"]), lambda row: row["gain_kept"]),
        Column("median, ms", lambda row: ms(_estimate(row, "median_ms")), lambda row: _estimate(row, "median_ms"),
               lambda row: _bounds(row, "median_ms", ms)),
        Column("p99, ms", lambda row: ms(_estimate(row, "p99_ms")), lambda row: _estimate(row, "p99_ms"),
               lambda row: _bounds(row, "p99_ms", ms)),
        Column("speed-up", lambda row: times(row["speedup"]), lambda row: row["speedup"],
               lambda row: _bounds(row, "speedup", times)),
        _SIZE,
    )),
    ("accuracy", "Accuracy in detail", "measured", (
        *(_metric(name.replace("AP_", ""), name) for name in METRICS[:6]),
        Column("best F1", lambda row: decimals(_best(row, "f1")), lambda row: _best(row, "f1")),
        Column("at score", lambda row: decimals(_best(row, "score")), lambda row: _best(row, "score")),
        Column("shift", lambda row: signed_score(row["score_shift"]), lambda row: row["score_shift"]),
        Column("precision", lambda row: decimals(_best(row, "precision")), lambda row: _best(row, "precision")),
        Column("recall", lambda row: decimals(_best(row, "recall")), lambda row: _best(row, "recall")),
        Column("lost", lambda row: count(row["lost"]), lambda row: row["lost"]),
        Column("gained", lambda row: count(row["gained"]), lambda row: row["gained"]),
    )),
    ("latency", "Latency and cost in detail", "timed", (
        *(_stage(name, "total", name) for name in STATISTICS),
        _stage("inference median", "inference", "median"),
        Column("memory, MiB", lambda row: decimals(_estimate(row, "memory_mib"), 0),
               lambda row: _estimate(row, "memory_mib")),
        Column("energy, mJ", lambda row: decimals(_estimate(row, "energy_mj"), 1),
               lambda row: _estimate(row, "energy_mj")),
        Column("params, M", lambda row: millions(row["parameters"]), lambda row: row["parameters"]),
    )),
)  # fmt: skip
"""(id, title, which rows, columns) of each table of models."""


def _best(row: Row, name: str) -> Optional[float]:
    return row["best_f1"][name] if row["best_f1"] else None


Results = Dict[str, Dict[str, Any]]
ReadResult = Tuple[AnyPath, Dict[str, Any]]
"""A result with the file that it was read from."""


# Reading


def group_results(read: Sequence[ReadResult]) -> Dict[str, Results]:
    """
    Role -> kind ("accuracy", "latency") -> result, in the order of the table.

    Raises:
        MeasurementError: two results are of the same role and kind, the two of a role are of different files, or data
            sets differ.
    """
    check_same_data(read)
    groups: Dict[str, Results] = {}
    for path, result in read:
        group = groups.setdefault(result["role"], {})
        if result["kind"] in group:
            raise MeasurementError(
                f"{path} is a second {result['kind']} result of role {result['role']!r}; give one, or change --role"
            )
        for other in group.values():
            if other["model"]["sha256"] != result["model"]["sha256"]:
                raise MeasurementError(
                    f"{path}: role {result['role']!r} has accuracy and latency of different files, "
                    f"{other['model']['file']} and {result['model']['file']} (by their hashes). Measure both on one."
                )
        group[result["kind"]] = result
    order = list(ROLES)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def detections_of_roles(read: Sequence[ReadResult], roles: Sequence[str]) -> Dict[str, Dict[int, Boxes]]:
    """Role -> image id -> boxes, of those of these roles whose accuracy was measured."""
    return {
        result["role"]: boxes_by_image(read_detections(result, path))
        for path, result in read
        if result["kind"] == "accuracy" and result["role"] in roles
    }


# From results to the report's document


def rows_from_groups(groups: Mapping[str, Results]) -> List[Row]:
    """One row per role. AP as fractions, latency in ms; None where a result is missing."""
    teacher = groups.get("teacher", {})
    rows = [_row(role, group, teacher, seed) for seed, (role, group) in enumerate(groups.items(), start=1)]
    by_role = {row["role"]: row for row in rows}
    alone, distilled = (by_role[role]["AP"] if role in by_role else None for role in ("baseline", "student"))
    for row in rows:
        row["gain_kept"] = None
        gained = distilled - alone if alone is not None and distilled is not None else 0.0
        if row["role"] in SHIPPED_FORMS and row["AP"] is not None and gained > 0:
            row["gain_kept"] = (row["AP"] - alone) / gained
    return rows


def setting_of(result: Mapping[str, Any]) -> Tuple[Any, ...]:
    """Machine, CPU, GPU, power mode, mode and pace: what two latencies must share to be compared."""
    facts = [result["environment"].get(key) for key in ("machine", "cpu", "gpu", "nvpmodel")]
    return (*map(str, facts), result["numbers"]["mode"], result["numbers"]["fps"])


def _row(role: str, group: Results, teacher: Results, seed: int) -> Row:
    model = next(iter(group.values()))["model"]
    accuracy, latency = (group[kind]["numbers"] if kind in group else {} for kind in ("accuracy", "latency"))
    against: Dict[str, Any] = {}
    if accuracy and "accuracy" in teacher and group is not teacher:
        against = comparison(accuracy, teacher["accuracy"]["numbers"])
    estimates = _estimates(accuracy, latency, against, teacher if group is not teacher else {}, seed)
    return {
        "role": role,
        "title": ROLES.get(role, role),
        "format": model["format"],
        "file": model["file"],
        "sha256": model["sha256"],
        "bytes": model["bytes"],
        "parameters": model["parameters"],
        **{name: accuracy.get(name) for name in METRICS},
        "AP_gain": against.get("AP_difference"),
        "best_f1": accuracy.get("best_f1"),
        **{name: against.get(name) for name in ("score_shift", "lost", "gained")},
        "speedup": estimates["speedup"].value if estimates["speedup"] else None,
        "same_setting": "latency" not in group
        or "latency" not in teacher
        or setting_of(group["latency"]) == setting_of(teacher["latency"]),
        "latency_ms": latency.get("summary_ms"),
        **{
            name: latency.get(name)
            for name in (
                "stable",
                "comparable",
                "comparable_reasons",
                "mode",
                "sweep",
                "power",
                "memory_mib",
            )
        },
        "runs_on": latency.get("description"),
        "estimates": {name: dataclasses.asdict(found) if found else None for name, found in estimates.items()},
    }


def _estimates(
    accuracy: Mapping[str, Any], latency: Mapping[str, Any], against: Mapping[str, Any], teacher: Results, seed: int
) -> Dict[str, Optional[Estimate]]:
    """What limits are set on, each with its bounds; None where it was not measured."""
    found: Dict[str, Optional[Estimate]] = dict.fromkeys(
        ("AP", "AP_gain", "median_ms", "p99_ms", "speedup", "memory_mib", "energy_mj")
    )
    if accuracy:
        found["AP"] = Estimate(*bounds_of_draws(np.array(accuracy["bootstrap"]["ap"], np.float64)))
    if against:
        found["AP_gain"] = Estimate(against["AP_difference"], against["low"], against["high"])
    if latency:
        samples = latency["samples_ms"]["total"]
        medians = resampled_percentile(samples, 50, seed)
        found["median_ms"] = Estimate(*bounds_of_draws(medians))
        found["p99_ms"] = Estimate(*bounds_of_draws(resampled_percentile(samples, 99, seed)))
        if "latency" in teacher:
            slow = resampled_percentile(teacher["latency"]["numbers"]["samples_ms"]["total"], 50, 0)
            found["speedup"] = Estimate(*bounds_of_draws(slow / medians))
        peak = latency.get("memory_mib") or {}
        memory = peak.get("host_peak") if peak.get("device_peak") is None else peak["device_peak"]
        energy = (latency.get("power") or {}).get("energy_mj_per_inference")
        found["memory_mib"], found["energy_mj"] = (
            None if value is None else Estimate(value, value, value) for value in (memory, energy)
        )
    return found


def role_to_ship(roles: Sequence[str], asked: Optional[str]) -> str:
    """
    The role of the model that ships: `asked`, else the last one that is known.

    Raises:
        ConfigError: there is none such.
    """
    if asked is None:
        return ([role for role in roles if role in ROLES] or list(roles))[-1]
    if asked not in roles:
        raise ConfigError(f"--ship is {asked!r}, but the results are of {list(roles)}; name one of these")
    return asked


def ladder_from_groups(
    groups: Mapping[str, Results], detections: Mapping[str, Mapping[int, Boxes]]
) -> List[Dict[str, Any]]:
    """
    The rungs from the distilled student on.

    Each with its AP and, where the rung it is made `from` was measured, the `change` of AP (`low`, `high`: paired
    bootstrap), how far detections move (`movement`) and its `faults`. The first with faults is where to look.
    """
    rungs: List[Dict[str, Any]] = []
    steps = {role: (parent, limit) for role, parent, limit in RUNGS}
    for role in ("student", *SHIPPED_FORMS):
        if role not in detections:
            continue
        numbers = groups[role]["accuracy"]["numbers"]
        rung: Dict[str, Any] = {"role": role, "title": ROLES[role], "AP": numbers["AP"], "from": None, "faults": []}
        if role in steps and steps[role][0] in detections:
            parent, limit = steps[role]
            before = groups[parent]["accuracy"]["numbers"]
            score = before["best_f1"]["score"] if before["best_f1"] else 1.0
            changed = comparison(numbers, before)
            moved = movement(
                {image_id: boxes.at_least(score) for image_id, boxes in detections[parent].items()},
                detections[role],
                limit,
            )
            rung.update(
                {
                    "from": ROLES[parent],
                    "change": changed["AP_difference"],
                    "low": changed["low"],
                    "high": changed["high"],
                    "movement": moved,
                    "limit": dataclasses.asdict(limit),
                    "faults": faults(changed["AP_difference"], moved, limit),
                }
            )
        rungs.append(rung)
    return rungs


def int8_from_groups(groups: Mapping[str, Results]) -> Optional[Dict[str, Any]]:
    """
    Whether INT8 is worth it against the same model in float on the same runtime; None where none of INT8_PAIRS was
    measured. `AP` and `speedup` are estimates (None: not measured), `answer` is 'yes', 'no' or 'cannot tell'.
    """
    pair = next((pair for pair in INT8_PAIRS if all(role in groups for role in pair)), None)
    if pair is None:
        return None
    int8, float_ = (groups[role] for role in pair)
    gain = speedup = None
    if "accuracy" in int8 and "accuracy" in float_:
        found = comparison(int8["accuracy"]["numbers"], float_["accuracy"]["numbers"])
        gain = Estimate(found["AP_difference"], found["low"], found["high"])
    timed = "latency" in int8 and "latency" in float_
    if timed and setting_of(int8["latency"]) == setting_of(float_["latency"]):
        slow, fast = (
            resampled_percentile(group["latency"]["numbers"]["samples_ms"]["total"], 50, seed)
            for seed, group in enumerate((float_, int8))
        )
        speedup = Estimate(*bounds_of_draws(slow / fast))
    answer = "cannot tell"
    if gain is not None and speedup is not None:
        if speedup.low > 1 and 100 * gain.low >= -INT8_LOSS_POINTS:
            answer = "yes"
        elif speedup.high <= 1 or 100 * gain.high < -INT8_LOSS_POINTS:
            answer = "no"
    titles = [ROLES[role] for role in pair]
    return {
        "titles": titles,
        "rows": list(pair),
        "AP": dataclasses.asdict(gain) if gain else None,
        "speedup": dataclasses.asdict(speedup) if speedup else None,
        "answer": answer,
        "sentence": _int8_sentence(titles, gain, speedup, answer),
    }


def _int8_sentence(titles: Sequence[str], gain: Optional[Estimate], speedup: Optional[Estimate], answer: str) -> str:
    start = {"yes": "Yes: ", "no": "No: ", "cannot tell": "It cannot be told: "}[answer]
    if gain is None or speedup is None:
        return f"{start}accuracy and latency of both {titles[0]} and {titles[1]} on one device are needed."
    return (
        f"{start}{titles[0]} is {speedup.value:.2f} times as fast as {titles[1]} ({speedup.low:.2f} to "
        f"{speedup.high:.2f}) and changes AP by {signed_points(gain.value)} points ({signed_points(gain.low)} to "
        f"{signed_points(gain.high)}); a loss of up to {INT8_LOSS_POINTS:g} is called worth it."
    )


def distillation_from_groups(groups: Mapping[str, Results]) -> Optional[Dict[str, float]]:
    """`gain` of the distilled student over the one trained alone, with `low` and `high`; None without both."""
    if any("accuracy" not in groups.get(role, {}) for role in ("baseline", "student")):
        return None
    found = comparison(groups["student"]["accuracy"]["numbers"], groups["baseline"]["accuracy"]["numbers"])
    return {"gain": found["AP_difference"], "low": found["low"], "high": found["high"]}


def classes_from_groups(groups: Mapping[str, Results], ship: str) -> List[Dict[str, Any]]:
    """Per class: `ap` by role, the shipped model's `difference` from the teacher, `lost`, `gained`, its best score."""
    accuracies = {role: group["accuracy"]["numbers"] for role, group in groups.items() if "accuracy" in group}
    if not accuracies:
        return []
    own, teacher = accuracies.get(ship), accuracies.get("teacher")
    against = comparison(own, teacher)["per_class"] if own and teacher and own is not teacher else None
    rows = []
    for name in next(iter(accuracies.values()))["per_class"]:
        ap = {role: numbers["per_class"][name] for role, numbers in accuracies.items()}
        best = own["best_f1_per_class"][name] if own else None
        known = against is not None and ap[ship] is not None and ap["teacher"] is not None
        rows.append(
            {
                "name": name,
                "ap": ap,
                "difference": ap[ship] - ap["teacher"] if known else None,
                **(against[name] if against else {"lost": None, "gained": None}),
                "score": best["score"] if best else None,
            }
        )
    return sorted(rows, key=lambda row: (row["difference"] is None, row["difference"] or 0.0))


def lineage_from_groups(groups: Mapping[str, Results]) -> List[Dict[str, Any]]:
    """Per role: its file and hash, the command that made it, its inputs with hashes, and roles if measured here."""
    models = {role: next(iter(group.values()))["model"] for role, group in groups.items()}
    roles = {model["sha256"]: role for role, model in models.items()}
    return [
        {
            "role": role,
            "title": ROLES.get(role, role),
            "file": model["file"],
            "sha256": model["sha256"],
            "command": shell_line(model["command"]),
            "inputs": [
                {"name": name, "role": roles.get(entry.get("sha256")), **entry}
                for name, entry in model["inputs"].items()
            ],
        }
        for role, model in models.items()
    ]


def environments_from_groups(groups: Mapping[str, Results]) -> List[Dict[str, Any]]:
    """The distinct machines and package versions, each with the results measured there."""
    found: Dict[str, Dict[str, Any]] = {}
    for role, group in groups.items():
        for kind, result in group.items():
            facts = {key: value for key, value in result["environment"].items() if key not in VARYING}
            key = json.dumps([facts, result["versions"]], sort_keys=True)
            entry = found.setdefault(key, {"results": [], "facts": facts, "versions": result["versions"]})
            entry["results"].append(f"{ROLES.get(role, role)} ({kind})")
    return list(found.values())


def notes_from_groups(
    groups: Mapping[str, Results], lineage: Sequence[Mapping[str, Any]], distillation: Optional[Mapping[str, float]]
) -> List[str]:
    """What a reader must know before trusting the numbers."""
    notes = []
    latencies = {role: group["latency"] for role, group in groups.items() if "latency" in group}
    reasons: Dict[str, List[str]] = {}
    for role, result in latencies.items():
        if result["numbers"]["comparable_reasons"]:
            reasons.setdefault("; ".join(result["numbers"]["comparable_reasons"]), []).append(ROLES.get(role, role))
    for reason, titles in reasons.items():
        notes.append(f"Latency not comparable ({', '.join(titles)}): {reason}.".replace("..", "."))
    for what, values in (
        ("machines", {setting_of(one)[:4] for one in latencies.values()}),
        (
            "thread counts",
            {one["numbers"]["threads"] for one in latencies.values() if one["model"]["format"] != "engine"},
        ),
        ("modes", {(one["numbers"].get("mode"), one["numbers"].get("fps")) for one in latencies.values()}),
    ):
        if len(values) > 1:
            notes.append(f"Latencies were measured with different {what}: the speed-ups compare more than the models.")
    for role, group in groups.items():
        for kind in ("accuracy", "latency"):
            if kind not in group and group[next(iter(group))]["model"]["format"] != "detections":
                notes.append(f"{ROLES.get(role, role)}: {kind} was not measured.")
    if distillation is not None and distillation["low"] <= 0:
        notes.append(
            f"What distillation gained is not certain: {signed_points(distillation['gain'])} points "
            f"({signed_points(distillation['low'])} to {signed_points(distillation['high'])})."
        )
    for entry in lineage:
        parent = MADE_FROM.get(entry["role"])
        if parent is not None and parent in groups and parent not in [one["role"] for one in entry["inputs"]]:
            notes.append(
                f"{entry['title']} does not come from the measured {ROLES[parent]}: "
                "no input in its sidecar has the hash of that file."
            )
    return notes


def commands_from_groups(groups: Mapping[str, Results]) -> List[str]:
    """The commands that made the models and measured them, as shell lines, each once, in the order of the table."""
    commands = []
    for group in groups.values():
        commands += [result["model"]["command"] for result in group.values()]
        commands += [result["command"] for result in group.values()]
    return list(dict.fromkeys(shell_line(words) for words in commands if words))


def report_from_results(
    paths: Sequence[AnyPath],
    groups: Mapping[str, Results],
    detections: Mapping[str, Mapping[int, Boxes]],
    ship_role: str,
    allowed: Mapping[str, float],
) -> Dict[str, Any]:
    """The report's document: what `report.json` holds and the other two show."""
    rows = rows_from_groups(groups)
    ship = next(row for row in rows if row["role"] == ship_role)
    timed = groups[ship_role].get("latency")
    limits = judge(ship, allowed, reasons_from_numbers(timed["numbers"]) if timed else ())
    lineage = lineage_from_groups(groups)
    distillation = distillation_from_groups(groups)
    accuracies = [group["accuracy"] for group in groups.values() if "accuracy" in group]
    ladder = ladder_from_groups(groups, detections)
    return {
        "report_version": REPORT_VERSION,
        **provenance({str(path): path for path in paths}),
        "verdict": verdict_from_limits(ship, limits),
        "limits": limits,
        "notes": notes_from_groups(groups, lineage, distillation),
        "data": (accuracies or list(next(iter(groups.values())).values()))[0]["data"],
        "rows": rows,
        "distillation": distillation,
        "int8": int8_from_groups(groups),
        "ladder": ladder,
        "first_bad_rung": next((rung["role"] for rung in ladder if rung["faults"]), None),
        "classes": classes_from_groups(groups, ship["role"]),
        "lineage": lineage,
        "environments": environments_from_groups(groups),
        "commands": commands_from_groups(groups),
        "changes": None,
    }


# From the document to the pictures


def plot_from_report(report: Mapping[str, Any], allowed: Mapping[str, float]) -> Optional[Dict[str, Any]]:
    """Speed against AP, with the region that the limits allow."""
    teacher = {row["role"]: row for row in report["rows"]}.get("teacher", {})  # there, if a limit compares with it
    kinds = {"teacher": "teacher", report["verdict"]["ship"]: "ship"}
    plotted = [
        {
            "title": row["title"],
            "ms": latency_ms(row, "total", "median"),
            "ap_points": 100 * row["AP"],
            "kind": kinds.get(row["role"], "other"),
        }
        for row in report["rows"]
        if row["AP"] is not None and row["latency_ms"]
    ]
    given = [(kind, allowed[kind.key]) for kind in LIMITS if kind.key in allowed]
    most_ms = [kind.most_ms(limit, teacher) for kind, limit in given if kind.most_ms]
    least = [kind.least_ap_points(limit, teacher) for kind, limit in given if kind.least_ap_points]
    return plot_from_points(plotted, min(most_ms, default=None), max(least, default=None))


def curves_from_groups(groups: Mapping[str, Results], ship: str) -> Dict[str, Any]:
    """
    The precision-recall curves: `mean`, kind -> all models; `per_class`, class name -> the teacher and what ships.
    """
    found = {role: group["accuracy"]["numbers"]["pr_curves"] for role, group in groups.items() if "accuracy" in group}
    pair = [role for role in dict.fromkeys(("teacher", ship)) if role in found]
    classes = next(iter(found.values()))["AP50"]["per_class"] if found else {}

    def chart(kind: str, roles: Sequence[str], name: Optional[str]) -> Dict[str, Any]:
        curves = {role: found[role][kind] for role in roles}
        return curves_from_precisions(
            {
                ROLES.get(role, role): one["mean"] if name is None else one["per_class"][name]
                for role, one in curves.items()
            }
        )

    return {
        "mean": {kind: chart(kind, list(found), None) for kind in ("AP50", "AP")} if found else {},
        "per_class": {name: chart("AP50", pair, name) for name in classes} if pair else {},
    }


def gallery_from_report(
    report: Dict[str, Any],
    detections: Mapping[str, Mapping[int, Boxes]],
    annotations_path: AnyPath,
    images_dir: AnyPath,
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """
    (pictures, notes): the images where the shipped model and the teacher disagree most, each at its best F1 score.

    Raises:
        MeasurementError: the annotations are others than those measured with.
    """
    rows = {row["role"]: row for row in report["rows"]}
    ship = report["verdict"]["ship"]
    if ship not in detections or "teacher" not in detections or ship == "teacher":
        return [], []
    sides = []
    for role in ("teacher", ship):
        best = rows[role]["best_f1"]
        if best is None:
            return [], [f"No gallery: {rows[role]['title']} finds nothing."]
        shown = {image_id: boxes.at_least(best["score"]) for image_id, boxes in detections[role].items()}
        sides.append(Side(f"{rows[role]['title']}, score {best['score']:.2f}", shown))
    path = Path(annotations_path)
    if not path.is_file():
        return [], [f"No gallery: {path} is not there; --annotations names another place."]
    if sha256_of(path) != report["data"]["annotations_sha256"]:
        raise MeasurementError(
            f"{path} is not the annotation file that the models were measured with (by its hash). Name that one with "
            "--annotations."
        )
    document = read_json(path, MeasurementError, "COCO annotations")
    entries = {image["id"]: image for image in document["images"][: report["data"]["images"]]}
    sides = [Side(side.title, {key: side.boxes.get(key, NO_BOXES) for key in entries}) for side in sides]
    names = {category["id"]: category["name"] for category in document["categories"]}
    chosen = most_disagreed(sides[0], sides[1])
    annotated = boxes_by_image([box for box in document["annotations"] if box["image_id"] in chosen])
    pictures, missing = gallery(
        [entries[image_id] for image_id in chosen], Path(images_dir), annotated, (sides[0], sides[1]), names
    )
    if missing:
        return pictures, [
            f"Gallery images not shown: {len(missing)}. {missing[0]} cannot be read in {images_dir}, or is another "
            "image than was measured; --images-dir names another folder."
        ]
    return pictures, []


def render(report: Mapping[str, Any], template: str, **pictures: Any) -> str:
    """
    The text of the template of that name beside this file; HTML templates escape what they show.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2", "the report", "pip install jinja2") from error

    def escaped(value: Any) -> Any:
        return markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    is_html = template.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=is_html,
        finalize=None if is_html else escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        points,
        signed_points,
        ms,
        mib,
        millions,
        times,
        amount,
        amount_between,
        percent,
        code,
        verbatim,
        verbatim,
        part,
        decimals,
        count,
        signed_score,
    ):
        environment.filters[function.__name__] = function
    bars = [stage for stage in STAGES if stage not in ("read", "total")]  # the total begins at the decoded image
    return environment.get_template(template).render(
        report=report, tables=TABLES, stages=bars, changed=CHANGED, line_styles=LINE_STYLES, **pictures
    )


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Render result files as one report with a verdict. Exit status 0: roll out, or no limits given; "
        "1: do not roll out, or it cannot be told; 2: bad input.",
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="result files of benchmarks.accuracy and benchmarks.latency"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="report.html; report.md and report.json go beside it"
    )
    parser.add_argument("--ship", metavar="ROLE", help="the model that ships (default: the last role of the table)")
    parser.add_argument("--against", metavar="FILE", help="report.json of an earlier rollout, to show what changed")
    parser.add_argument("--junit", metavar="FILE", help="also write the limits as JUnit XML")
    parser.add_argument(
        "--annotations", metavar="FILE", help="annotations for the gallery (default: where they were when measured)"
    )
    parser.add_argument(
        "--images-dir", metavar="DIR", help="folder of the gallery's images (default: where they were when measured)"
    )
    limits = parser.add_argument_group("limits on the model that ships")
    limits.add_argument("--limits", metavar="FILE", help="TOML file of limits: max_ap_drop = 1.5, and so on")
    for kind in LIMITS:
        limits.add_argument(
            kind.flag, type=float, metavar=kind.unit.upper(), help=f"{kind.title}, {kind.bound} this many {kind.unit}"
        )
    return parser


def _allowed(arguments: argparse.Namespace) -> Dict[str, float]:
    allowed = limits_from_file(arguments.limits) if arguments.limits is not None else {}
    for kind in LIMITS:
        value = getattr(arguments, kind.key)
        if value is not None and kind.key in allowed:
            raise ConfigError(f"{kind.flag} is also in {arguments.limits}; give it once")
        if value is not None:
            allowed[kind.key] = value
    check_limits(allowed)
    return allowed


def _output_paths(arguments: argparse.Namespace) -> List[Path]:
    html = Path(arguments.output)
    if html.suffix != ".html":
        raise ConfigError(f"--output is {html}; expected a name that ends in .html")
    paths = [html, html.with_suffix(".md"), html.with_suffix(".json")]
    inputs = {Path(path).resolve() for path in [*arguments.results, arguments.against, arguments.limits] if path}
    for path in paths:
        if path.resolve() in inputs:
            raise ConfigError(f"{path} would be written over an input; choose another --output")
        check_writable(path)
    return paths


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Writes the files, prints the verdict, and returns 1 if it is not to roll out."""
    arguments = _parser().parse_args(argv)
    allowed, (html, markdown, document) = _allowed(arguments), _output_paths(arguments)
    if arguments.junit is not None:
        if not allowed:
            raise ConfigError("--junit writes limits, but none are given")
        check_writable(arguments.junit)
    old = read_report(arguments.against, REPORT_VERSION) if arguments.against is not None else None
    read = [(path, read_result(path)) for path in arguments.results]
    groups = group_results(read)
    ship = role_to_ship(list(groups), arguments.ship)
    detections = detections_of_roles(read, ["teacher", ship, "student", *SHIPPED_FORMS])
    report = report_from_results(arguments.results, groups, detections, ship, allowed)
    data = report["data"]
    pictures, notes = gallery_from_report(
        report, detections, arguments.annotations or data["annotations"], arguments.images_dir or data["images_dir"]
    )
    report["notes"] += notes
    if old is not None:
        report["changes"] = changes_from_reports(old, report, arguments.against)
    timed = {ROLES.get(role, role): group["latency"] for role, group in groups.items() if "latency" in group}
    page = render(
        report,
        "report.html.jinja",
        plot=plot_from_report(report, allowed),
        distribution=distribution_from_samples(
            {title: result["numbers"]["samples_ms"]["total"] for title, result in timed.items()}
        ),
        curves=curves_from_groups(groups, ship),
        gallery=pictures,
    )
    for path, text in ((html, page), (markdown, render(report, "report.md.jinja"))):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(document, sealed(report))
    if arguments.junit is not None:
        with replacing(arguments.junit) as temporary:
            temporary.write_text(junit_from_limits(ship, report["limits"]), encoding="utf-8")
    print(report["verdict"]["sentence"])
    print(f"report: {html}, {markdown.name}, {document.name}")
    return 1 if report["verdict"]["roll_out"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
