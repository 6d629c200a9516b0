"""From result files to the report's document: what report.json holds, and the page and the Markdown show."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from benchmarks.measuring.bootstrap import bounds_of_draws, resampled_percentile
from benchmarks.measuring.coco import METRICS
from benchmarks.measuring.detections import Boxes, boxes_by_image, read_detections
from benchmarks.measuring.environment import VARYING
from benchmarks.measuring.result import UNSTABLE, check_same_data, reasons_from_numbers, samples_by_image
from benchmarks.measuring.subject import ROLES, TEACHER, TEACHER_FORMS
from benchmarks.reporting.int8_budget import words_of_miss
from benchmarks.reporting.ladder import RUNGS, faults, movement
from benchmarks.reporting.operating_point import comparison
from benchmarks.reporting.verdict import Estimate, ReportRow, judge, verdict_from_limits
from benchmarks.reporting.wording import ms, signed_points
from deploy.commands import shell_line
from deploy.contract import provenance
from deploy.errors import ConfigError, MeasurementError
from deploy.files import AnyPath
from deploy.targets import TARGETS

REPORT_VERSION = 2
MADE_FROM = {
    "student": TEACHER,
    **{role: parent for role, parent, _ in RUNGS},
    **{f"{TEACHER}-{role}": TEACHER if parent == "student" else f"{TEACHER}-{parent}" for role, parent, _ in RUNGS},
}
"""Role -> the role whose file it is made from."""
SHIPPED_FORMS = tuple(role for role, _, _ in RUNGS)
"""Roles that are the distilled student in another form."""
SECOND_OPINIONS = tuple(role.name for target in TARGETS.values() if target.signed is None for role in target.roles)
"""Roles of runtimes that run what was made for another: they are not what ships, unless somebody says so."""
INT8_PAIRS = tuple(
    (target.roles[1].name, target.roles[0].name)
    for target in sorted(TARGETS.values(), key=lambda target: (target.signed is None, not target.on_gpu))
)
"""What INT8 is compared with, to see whether it is worth it: the first pair that was measured."""
MACHINE_FACTS = ("machine", "cpu", "gpu", "nvpmodel")
CLOCK_FACTS = (
    "cpu_governor", "cpu_clock_min_mhz", "cpu_clock_max_mhz", "cpu_turbo", "gpu_clock_min_mhz", "gpu_clock_max_mhz",
    "gpu_power_limit_w",
)  # fmt: skip
"""Of a result's environment, what two latencies must share to be compared."""
INT8_LOSS_POINTS = 1.0
"""The AP that INT8 may cost to be called worth it: a choice of this project; --max-ap-drop is the user's own."""

Results = Dict[str, Dict[str, Any]]
ReadResult = Tuple[AnyPath, Dict[str, Any]]
"""A result with the file that it was read from."""


def group_results(read: Sequence[ReadResult]) -> Dict[str, Results]:
    """
    Role -> kind ("accuracy", "latency") -> result, in the order of the table; "paced" is a latency at the pace of a
    camera beside one back to back.

    Raises:
        MeasurementError: two results are of the same role and kind, the two of a role are of different files, or data
            sets differ.
    """
    check_same_data(read)
    groups: Dict[str, Results] = {}
    for path, result in sorted(read, key=lambda pair: _is_paced(pair[1])):
        group = groups.setdefault(result["role"], {})
        kind = result["kind"]
        if _is_paced(result) and "latency" in group and not _is_paced(group["latency"]):
            kind = "paced"
        if kind in group:
            raise MeasurementError(
                f"{path} is a second {result['kind']} result of role {result['role']!r}; give one, or change --role"
            )
        for other in group.values():
            if other["model"]["sha256"] != result["model"]["sha256"]:
                raise MeasurementError(
                    f"{path}: role {result['role']!r} has accuracy and latency of different files, "
                    f"{other['model']['file']} and {result['model']['file']} (by their hashes). Measure both on one."
                )
            runtimes = [one["model"].get("runtime") for one in (other, result)]
            if None not in runtimes and runtimes[0] != runtimes[1]:
                raise MeasurementError(
                    f"{path}: role {result['role']!r} has accuracy and latency of different runtimes, "
                    f"{runtimes[0]} and {runtimes[1]}. Measure both on one, with --runtime."
                )
        group[kind] = result
    order = list(ROLES)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _is_paced(result: Mapping[str, Any]) -> bool:
    return result["kind"] == "latency" and result["numbers"]["mode"] == "paced"


def detections_of_roles(read: Sequence[ReadResult], roles: Sequence[str]) -> Dict[str, Dict[int, Boxes]]:
    """Role -> image id -> boxes, of those of these roles whose accuracy was measured."""
    return {
        result["role"]: boxes_by_image(read_detections(result, path))
        for path, result in read
        if result["kind"] == "accuracy" and result["role"] in roles
    }


def rows_from_groups(groups: Mapping[str, Results]) -> List[ReportRow]:
    """One row per role. AP as fractions, latency in ms; None where a result is missing."""
    rows = [_row(role, groups, seed) for seed, role in enumerate(groups, start=1)]
    by_role = {row["role"]: row for row in rows}
    alone, distilled = (by_role[role]["AP"] if role in by_role else None for role in ("baseline", "student"))
    for row in rows:
        row["gain_kept"] = None
        gained = distilled - alone if alone is not None and distilled is not None else 0.0
        if row["role"] in SHIPPED_FORMS and row["AP"] is not None and gained > 0:
            row["gain_kept"] = (row["AP"] - alone) / gained
    return rows


def setting_of(result: Mapping[str, Any]) -> Dict[str, Any]:
    """Fact -> value of what two latencies must share for one to be called so many times as fast as the other."""
    model, environment, numbers = (result[key] for key in ("model", "environment", "numbers"))
    runtime = model.get("runtime") or model["format"]
    return {
        "runtime": f"{runtime} {result['versions'].get(runtime, '')}".strip(),
        **{key: environment.get(key) for key in (*MACHINE_FACTS, *CLOCK_FACTS)},
        **{key: numbers[key] for key in ("threads", "mode", "fps")},
    }


def teacher_of_accuracy(groups: Mapping[str, Results]) -> str:
    """The role whose detections the others are compared with: the teacher's, or its form that was measured."""
    forms = [role for role in (TEACHER, *TEACHER_FORMS) if "accuracy" in groups.get(role, {})]
    return (forms or [TEACHER])[0]


def teacher_of_latency(role: str, groups: Mapping[str, Results]) -> Tuple[Optional[str], Optional[str]]:
    """
    (the teacher's role that `role` is so many times as fast as, why that is in doubt or why there is none).

    Of the forms that were timed in the same setting that of the same precision counts, else the first. Both are None
    for the teacher itself, and without its latency.
    """
    timed = [form for form in (TEACHER, *TEACHER_FORMS) if "latency" in groups.get(form, {})]
    if role in (TEACHER, *TEACHER_FORMS) or not timed or "latency" not in groups[role]:
        return None, None
    setting = setting_of(groups[role]["latency"])
    differences = {
        form: [key for key, value in setting_of(groups[form]["latency"]).items() if value != setting[key]]
        for form in timed
    }
    same = [form for form, keys in differences.items() if not keys]
    if not same:
        nearest = min(timed, key=lambda form: len(differences[form]))
        other, keys = setting_of(groups[nearest]["latency"]), differences[nearest]
        those, these = (", ".join(f"{key} {values[key]}" for key in keys) for values in (other, setting))
        return None, f"the teacher was timed with {those}, this model with {these}"
    form = f"{TEACHER}-{role}" if f"{TEACHER}-{role}" in same else same[0]
    reasons = reasons_from_numbers(groups[form]["latency"]["numbers"])
    biased = [reason.text for reason in reasons if reason.code != UNSTABLE]
    return form, f"the teacher's latency is not comparable: {biased[0]}" if biased else None


def _totals_ms(result: Mapping[str, Any]) -> List[np.ndarray]:
    """The samples of each image of a latency result."""
    return samples_by_image(result["numbers"]["samples_ms"]["total"], result["data"]["images"])


def _row(role: str, groups: Mapping[str, Results], seed: int) -> ReportRow:
    group, teacher = groups[role], teacher_of_accuracy(groups)
    model = next(iter(group.values()))["model"]
    accuracy, latency = (group[kind]["numbers"] if kind in group else {} for kind in ("accuracy", "latency"))
    against: Dict[str, Any] = {}
    if accuracy and role != teacher and "accuracy" in groups.get(teacher, {}):
        against = comparison(accuracy, groups[teacher]["accuracy"]["numbers"])
    slower, doubt = teacher_of_latency(role, groups)
    estimates = _estimates(group, against, groups[slower]["latency"] if slower else None, seed)
    medians_ms = [float(np.median(samples)) for samples in _totals_ms(group["latency"])] if latency else []
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
        "speedup_against": ROLES.get(slower) if slower else None,
        "doubts": {"speedup": doubt} if doubt else {},
        "paced": _pace(group["paced"]["numbers"]) if "paced" in group else None,
        "by_image_ms": [min(medians_ms), max(medians_ms)] if len(medians_ms) > 1 else None,
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


def _pace(numbers: Mapping[str, Any]) -> Dict[str, Any]:
    """What a latency at a camera's pace says: frames per second, p99 in ms, how many of how many runs began late."""
    return {
        "fps": numbers["fps"],
        "p99_ms": numbers["summary_ms"]["total"]["p99"],
        "late": numbers["late_frames"],
        "runs": len(numbers["samples_ms"]["total"]),
    }


def _estimates(
    group: Results, against: Mapping[str, Any], slower: Optional[Mapping[str, Any]], seed: int
) -> Dict[str, Optional[Estimate]]:
    """
    What limits are set on, each with its bounds; None where it was not measured.

    Args:
        against: the comparison of its detections with the teacher's.
        slower: the teacher's latency result that the speed-up is against.
    """
    found: Dict[str, Optional[Estimate]] = dict.fromkeys(
        ("AP", "AP_gain", "median_ms", "p99_ms", "speedup", "memory_mib", "energy_mj")
    )
    if "accuracy" in group:
        draws = group["accuracy"]["numbers"]["bootstrap"]["ap"]
        found["AP"] = Estimate(*bounds_of_draws(np.array(draws, np.float64)))
    if against:
        found["AP_gain"] = Estimate(against["AP_difference"], against["low"], against["high"])
    if "latency" in group:
        latency, samples = group["latency"]["numbers"], _totals_ms(group["latency"])
        medians = resampled_percentile(samples, 50, seed)
        found["median_ms"] = Estimate(*bounds_of_draws(medians))
        found["p99_ms"] = Estimate(*bounds_of_draws(resampled_percentile(samples, 99, seed)))
        if slower is not None:
            found["speedup"] = Estimate(*bounds_of_draws(resampled_percentile(_totals_ms(slower), 50, 0) / medians))
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
        known = [role for role in roles if role in ROLES and role not in SECOND_OPINIONS]
        return (known or list(roles))[-1]
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
            resampled_percentile(_totals_ms(group["latency"]), 50, seed) for seed, group in enumerate((float_, int8))
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
    teacher_role = teacher_of_accuracy(groups)
    own, teacher = accuracies.get(ship), accuracies.get(teacher_role)
    against = comparison(own, teacher)["per_class"] if own and teacher and own is not teacher else None
    rows = []
    for name in next(iter(accuracies.values()))["per_class"]:
        ap = {role: numbers["per_class"][name] for role, numbers in accuracies.items()}
        best = own["best_f1_per_class"][name] if own else None
        known = against is not None and ap[ship] is not None and ap[teacher_role] is not None
        rows.append(
            {
                "name": name,
                "ap": ap,
                "difference": ap[ship] - ap[teacher_role] if known else None,
                **(against[name] if against else {"lost": None, "gained": None}),
                "score": best["score"] if best else None,
            }
        )
    return sorted(rows, key=lambda row: (row["difference"] is None, row["difference"] or 0.0))


def lineage_from_groups(groups: Mapping[str, Results]) -> List[Dict[str, Any]]:
    """Per role: its file and hash, the command that made it, its inputs with hashes, and roles if measured here."""
    models = {role: next(iter(group.values()))["model"] for role, group in groups.items()}
    roles: Dict[str, str] = {}
    for role, model in models.items():
        roles.setdefault(model["sha256"], role)  # a second runtime measures the same file in a role of its own
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


def notes_on_latency(groups: Mapping[str, Results]) -> List[str]:
    """What speaks against comparing the latencies."""
    notes = []
    latencies = {role: group["latency"] for role, group in groups.items() if "latency" in group}
    reasons: Dict[str, List[str]] = {}
    for role, result in latencies.items():
        if result["numbers"]["comparable_reasons"]:
            reasons.setdefault("; ".join(result["numbers"]["comparable_reasons"]), []).append(ROLES.get(role, role))
    for reason, titles in reasons.items():
        notes.append(f"Latency not comparable ({', '.join(titles)}): {reason}.".replace("..", "."))
    settings = [setting_of(result) for result in latencies.values()]
    for what, keys in (
        ("machines", MACHINE_FACTS),
        ("clocks", CLOCK_FACTS),
        ("thread counts", ("threads",)),
        ("modes", ("mode", "fps")),
    ):
        # What runs on a GPU has no number of threads.
        values = {str([one[key] for key in keys]) for one in settings if keys != ("threads",) or one["threads"]}
        if len(values) > 1:
            notes.append(f"Latencies were measured with different {what}: no speed-up is told from one to another.")
    return notes


def notes_from_groups(
    groups: Mapping[str, Results], lineage: Sequence[Mapping[str, Any]], distillation: Optional[Mapping[str, float]]
) -> List[str]:
    """What a reader must know before trusting the numbers."""
    notes = notes_on_latency(groups)
    for role, group in groups.items():
        if "paced" in group:
            numbers = group["paced"]["numbers"]
            summary, frames = numbers["summary_ms"]["total"], len(numbers["samples_ms"]["total"])
            notes.append(
                f"{ROLES.get(role, role)} at {numbers['fps']:g} frames/s: median {ms(summary['median'])} ms, p99 "
                f"{ms(summary['p99'])} ms, {numbers['late_frames']} of {frames} frames late."
            )
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
        if parent is None or parent not in groups:
            continue
        measured = next(iter(groups[parent].values()))["model"]["sha256"]
        if measured not in [entry["sha256"], *(one.get("sha256") for one in entry["inputs"])]:
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
    int8_budget: Optional[Mapping[str, Any]] = None,
) -> Dict[str, Any]:
    """
    The report's document: what `report.json` holds and the other two show.

    Args:
        int8_budget: as `read_int8_budget` gives it.
    """
    rows = rows_from_groups(groups)
    ship = next(row for row in rows if row["role"] == ship_role)
    timed = groups[ship_role].get("latency")
    limits = judge(ship, allowed, reasons_from_numbers(timed["numbers"]) if timed else ())
    lineage = lineage_from_groups(groups)
    distillation = distillation_from_groups(groups)
    accuracies = [group["accuracy"] for group in groups.values() if "accuracy" in group]
    ladder = ladder_from_groups(groups, detections)
    verdict = verdict_from_limits(ship, limits)
    if int8_budget is not None:
        verdict["sentence"] += words_of_miss(int8_budget)
    return {
        "report_version": REPORT_VERSION,
        **provenance({str(path): path for path in paths}),
        "teacher": teacher_of_accuracy(groups),
        "verdict": verdict,
        "limits": limits,
        "notes": notes_from_groups(groups, lineage, distillation),
        "data": (accuracies or list(next(iter(groups.values())).values()))[0]["data"],
        "rows": rows,
        "distillation": distillation,
        "int8": int8_from_groups(groups),
        "int8_budget": int8_budget,
        "ladder": ladder,
        "first_bad_rung": next((rung["role"] for rung in ladder if rung["faults"]), None),
        "classes": classes_from_groups(groups, ship["role"]),
        "lineage": lineage,
        "environments": environments_from_groups(groups),
        "commands": commands_from_groups(groups),
        "changes": None,
    }
