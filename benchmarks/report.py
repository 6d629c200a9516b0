"""
Command: result files -> one report with a verdict, as HTML, Markdown and JSON.

    python -m benchmarks.report *.result.json -o report.html --max-ap-drop 1.5 --max-latency-ms 40

It measures nothing: the same result files give the same report. Exit status 0: roll out, or no limits were given;
1: do not roll out; 2: bad input. Needs jinja2; the gallery needs the sample images where they were when measured.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from benchmarks.figures import COLOURS, DRAWN_SCORE, gallery_from_samples, plot_from_points
from benchmarks.result import STAGES, read_result
from benchmarks.subject import ROLES
from benchmarks.verdict import LIMITS, Row, judge, latency_ms, verdict_from_limits
from benchmarks.wording import amount, cell, mib, millions, ms, percent, points, signed_points, times
from deploy.contract import provenance
from deploy.errors import ConfigError, MeasurementError, MissingDependencyError, command
from deploy.files import AnyPath, check_writable, replacing, write_json

REPORT_VERSION = 1
MADE_FROM = {
    "student": "teacher",
    "onnx-fp32": "student",
    "onnx-int8": "onnx-fp32",
    "engine-fp16": "onnx-fp32",
    "engine-int8": "onnx-int8",
}
"""Role -> the role whose file it is made from: the rungs of the ladder, but for the first."""
SHOWN_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")

COLUMN_GROUPS = (
    ("Accuracy, AP in points", (
        ("AP", lambda row: points(row["AP"])),
        ("vs teacher", lambda row: signed_points(row["AP_gain"])),
        ("AP50", lambda row: points(row["AP50"])),
        ("AP75", lambda row: points(row["AP75"])),
        ("small", lambda row: points(row["AP_small"])),
        ("medium", lambda row: points(row["AP_medium"])),
        ("large", lambda row: points(row["AP_large"])),
    )),
    ("Latency per image, ms", (
        ("median", lambda row: ms(latency_ms(row, "total", "median"))),
        ("p99", lambda row: ms(latency_ms(row, "total", "p99"))),
        ("infer. median", lambda row: ms(latency_ms(row, "inference", "median"))),
        ("infer. p99", lambda row: ms(latency_ms(row, "inference", "p99"))),
        ("speed-up", lambda row: times(row["speedup"])),
    )),
    ("Size", (
        ("disk, MiB", lambda row: mib(row["bytes"])),
        ("params, M", lambda row: millions(row["parameters"])),
    )),
)  # fmt: skip
"""(title, columns) of the table; a column is (heading, its text for a row)."""

Results = Dict[str, Dict[str, Any]]


# Reading


def group_results(paths: Sequence[AnyPath]) -> Dict[str, Results]:
    """
    Role -> kind ("accuracy", "latency") -> result, in the order of the table.

    Raises:
        MeasurementError: a file is not a result, two are of the same role and kind, the two of a role are of different
            files, or data sets differ.
    """
    read = [(path, read_result(path)) for path in paths]
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


def check_same_data(read: Sequence[Any]) -> None:
    """Raises MeasurementError if the results are of different annotations, classes or numbers of evaluated images."""
    for key in ("annotations_sha256", "class_names", "images"):
        of_kind = [pair for pair in read if key != "images" or pair[1]["kind"] == "accuracy"]
        for path, result in of_kind[1:]:
            first_path, first = of_kind[0]
            if result["data"][key] != first["data"][key]:
                raise MeasurementError(
                    f"{path} and {first_path} differ in data.{key}: "
                    f"{result['data'][key]!r:.80} and {first['data'][key]!r:.80}. "
                    "Numbers from different data do not compare: measure all models on the same images."
                )


# From results to the report's document


def rows_from_groups(groups: Mapping[str, Results]) -> List[Row]:
    """One row per role. AP as fractions, latency in ms; None where a result is missing."""
    rows = [_row(role, group) for role, group in groups.items()]
    teacher = next((row for row in rows if row["role"] == "teacher"), None)
    for row in rows:
        row["AP_gain"] = row["speedup"] = None
        if teacher is None or row is teacher:
            continue
        if teacher["AP"] is not None and row["AP"] is not None:
            row["AP_gain"] = row["AP"] - teacher["AP"]
        if teacher["latency_ms"] and row["latency_ms"]:
            row["speedup"] = teacher["latency_ms"]["total"]["median"] / row["latency_ms"]["total"]["median"]
    return rows


def _row(role: str, group: Results) -> Row:
    model = next(iter(group.values()))["model"]
    accuracy, latency = group.get("accuracy"), group.get("latency")
    return {
        "role": role,
        "title": ROLES.get(role, role),
        "format": model["format"],
        "file": model["file"],
        "sha256": model["sha256"],
        "bytes": model["bytes"],
        "parameters": model["parameters"],
        **{name: accuracy["numbers"][name] if accuracy else None for name in SHOWN_METRICS},
        "latency_ms": latency["numbers"]["summary_ms"] if latency else None,
        "stable": latency["numbers"]["stable"] if latency else None,
        "runs_on": latency["numbers"]["description"] if latency else None,
    }


def ship_row(rows: Sequence[Row], role: Optional[str]) -> Row:
    """
    The row of the model that ships: `role`, else the last one whose role is known.

    Raises:
        ConfigError: there is no such row.
    """
    if role is None:
        return ([row for row in rows if row["role"] in ROLES] or list(rows))[-1]
    for row in rows:
        if row["role"] == role:
            return row
    raise ConfigError(f"--ship is {role!r}, but the results are of {[row['role'] for row in rows]}; name one of these")


def ladder_from_rows(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """The rungs from the distilled student on, with the change of AP from the rung each is made from."""
    by_role = {row["role"]: row for row in rows}
    rungs = []
    for role in ROLES:
        row, parent = by_role.get(role), by_role.get(MADE_FROM.get(role, ""))
        if row is None or row["AP"] is None or role in ("teacher", "baseline"):
            continue
        rung = {"role": role, "title": row["title"], "AP": row["AP"], "from": None, "change": None}
        if parent is not None and parent["AP"] is not None and role != "student":
            rung.update({"from": parent["title"], "change": row["AP"] - parent["AP"]})
        rungs.append(rung)
    return rungs


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
            "command": shlex.join(model["command"]),
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
            facts = {key: value for key, value in result["environment"].items() if key != "load_average"}
            key = json.dumps([facts, result["versions"]], sort_keys=True)
            entry = found.setdefault(key, {"results": [], "facts": facts, "versions": result["versions"]})
            entry["results"].append(f"{ROLES.get(role, role)} ({kind})")
    return list(found.values())


def notes_from_groups(groups: Mapping[str, Results], lineage: Sequence[Mapping[str, Any]]) -> List[str]:
    """What a reader must know before trusting the numbers."""
    notes = []
    latencies = {role: group["latency"] for role, group in groups.items() if "latency" in group}
    for role, result in latencies.items():
        if not result["numbers"]["stable"]:
            share = 100 * result["numbers"]["spread"]
            notes.append(
                f"{ROLES.get(role, role)}: latency was unstable, interquartile range {share:.0f} % of the median."
            )
    for what, values in (
        ("machines", {(one["environment"].get("machine"), one["environment"]["cpu"]) for one in latencies.values()}),
        (
            "thread counts",
            {one["numbers"]["threads"] for one in latencies.values() if one["model"]["format"] != "engine"},
        ),
    ):
        if len(values) > 1:
            notes.append(f"Latencies were measured with different {what}: the speed-ups compare more than the models.")
    for role, group in groups.items():
        for kind in ("accuracy", "latency"):
            if kind not in group:
                notes.append(f"{ROLES.get(role, role)}: {kind} was not measured.")
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
    return list(dict.fromkeys(shlex.join(words) for words in commands if words))


def report_from_results(
    paths: Sequence[AnyPath], groups: Mapping[str, Results], ship_role: Optional[str], allowed: Mapping[str, float]
) -> Dict[str, Any]:
    """The report's document: what `report.json` holds and the other two show."""
    rows = rows_from_groups(groups)
    ship = ship_row(rows, ship_role)
    limits = judge(ship, allowed)
    lineage = lineage_from_groups(groups)
    accuracies = {role: group["accuracy"] for role, group in groups.items() if "accuracy" in group}
    data = next(iter(accuracies.values() or next(iter(groups.values())).values()))["data"]
    return {
        "report_version": REPORT_VERSION,
        **provenance({str(path): path for path in paths}),
        "verdict": verdict_from_limits(ship, limits),
        "limits": limits,
        "notes": notes_from_groups(groups, lineage),
        "data": data,
        "rows": rows,
        "ladder": ladder_from_rows(rows),
        "per_class": {
            name: {role: result["numbers"]["per_class"].get(name) for role, result in accuracies.items()}
            for name in data["class_names"]
        },
        "lineage": lineage,
        "environments": environments_from_groups(groups),
        "commands": commands_from_groups(groups),
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
    most_ms = [allowed[key] for key in ("max_latency_ms",) if key in allowed]
    if "min_speedup" in allowed:
        most_ms.append(teacher["latency_ms"]["total"]["median"] / allowed["min_speedup"])
    least = [allowed[key] for key in ("min_ap",) if key in allowed]
    if "max_ap_drop" in allowed:
        least.append(100 * teacher["AP"] - allowed["max_ap_drop"])
    return plot_from_points(plotted, min(most_ms, default=None), max(least, default=None))


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (points, signed_points, ms, mib, millions, times, amount, percent, cell):
        environment.filters[function.__name__] = function
    return environment.get_template(template).render(
        report=report, column_groups=COLUMN_GROUPS, stages=STAGES, **pictures
    )


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Render result files as one report with a verdict. "
        "Exit status 0: roll out, or no limits given; 1: do not roll out; 2: bad input.",
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="result files of benchmarks.accuracy and benchmarks.latency"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="report.html; report.md and report.json go beside it"
    )
    parser.add_argument("--ship", metavar="ROLE", help="the model that ships (default: the last role of the table)")
    parser.add_argument(
        "--images-dir", metavar="DIR", help="folder of the sample images (default: where they were when measured)"
    )
    limits = parser.add_argument_group("limits on the model that ships")
    for kind in LIMITS:
        limits.add_argument(
            kind.flag, type=float, metavar=kind.unit.upper(), help=f"{kind.title}, {kind.bound} this many {kind.unit}"
        )
    return parser


def _allowed(arguments: argparse.Namespace) -> Dict[str, float]:
    allowed = {kind.key: getattr(arguments, kind.key) for kind in LIMITS if getattr(arguments, kind.key) is not None}
    for key, value in allowed.items():
        flag = "--" + key.replace("_", "-")
        if not math.isfinite(value):
            raise ConfigError(f"{flag} is {value}; expected a number")
        if key != "max_ap_drop" and value <= 0:
            raise ConfigError(f"{flag} is {value}; expected a positive number")
    if allowed.get("min_ap", 1) < 1:
        raise ConfigError(
            f"--min-ap is {allowed['min_ap']}; expected points, 1 to 100: {100 * allowed['min_ap']:g} for that fraction"
        )
    return allowed


def _output_paths(arguments: argparse.Namespace) -> List[Path]:
    html = Path(arguments.output)
    if html.suffix != ".html":
        raise ConfigError(f"--output is {html}; expected a name that ends in .html")
    paths = [html, html.with_suffix(".md"), html.with_suffix(".json")]
    inputs = {Path(path).resolve() for path in arguments.results}
    for path in paths:
        if path.resolve() in inputs:
            raise ConfigError(f"{path} would be written over a result file; choose another --output")
        check_writable(path)
    return paths


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Writes the three files, prints the verdict, and returns 1 if it is not to roll out."""
    arguments = _parser().parse_args(argv)
    allowed, (html, markdown, document) = _allowed(arguments), _output_paths(arguments)
    groups = group_results(arguments.results)
    report = report_from_results(arguments.results, groups, arguments.ship, allowed)
    samples = {role: group["accuracy"]["samples"] for role, group in groups.items() if "accuracy" in group}
    images_dir = arguments.images_dir or report["data"]["images_dir"]
    gallery, missing = gallery_from_samples(samples, images_dir, report["data"]["class_names"])
    if missing:
        report["notes"].append(
            f"Sample images not shown: {len(missing)}. {missing[0]} cannot be read in {images_dir}, or is another "
            "image than was measured; --images-dir names another folder."
        )
    page = render(
        report,
        "report.html.jinja",
        plot=plot_from_report(report, allowed),
        gallery=gallery,
        drawn_score=DRAWN_SCORE,
        colours=COLOURS,
    )
    for path, text in ((html, page), (markdown, render(report, "report.md.jinja"))):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(document, report)
    print(report["verdict"]["sentence"])
    print(f"report: {html}, {markdown.name}, {document.name}")
    return 1 if report["verdict"]["roll_out"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
