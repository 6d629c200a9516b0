"""
Command: result files -> one report with a verdict, as HTML, Markdown and JSON.

    python -m benchmarks.report *.result.json -o report.html --max-ap-drop 1.5 --max-latency-ms 40
    python -m benchmarks.report student.fleet --teacher teacher.fleet -o fleet.html --limits limits.toml

Results of boards, a folder that benchmarks.fleet wrote or its */*.result.json, become one page with a verdict for each
board; roll out only where all boards do.

It measures nothing: the same result files give the same report. Exit status 0: roll out, or no limits were given;
1: do not roll out, or it cannot be told; 2: bad input. Needs jinja2, and the detections beside the accuracy results;
the gallery also needs the annotations and images where they were when measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.power import check_power_is_told
from benchmarks.measuring.result import read_result
from benchmarks.measuring.subject import ROLES
from benchmarks.reporting.changes import changes_from_reports, read_report
from benchmarks.reporting.document import (
    REPORT_VERSION,
    SHIPPED_FORMS,
    ReadResult,
    detections_of_roles,
    group_results,
    report_from_results,
    role_to_ship,
    teacher_of_accuracy,
)
from benchmarks.reporting.figures import distribution_from_samples
from benchmarks.reporting.fleet import (
    as_teachers,
    failures_from_files,
    fleet_report,
    notes_on_other_boards,
    result_files,
    results_by_board,
)
from benchmarks.reporting.int8_budget import read_int8_budget
from benchmarks.reporting.junit import junit_from_limits
from benchmarks.reporting.page import (
    curves_from_groups,
    gallery_from_report,
    plot_from_report,
    render,
    render_fleet,
)
from benchmarks.reporting.verdict import LIMITS, check_limits, limits_from_file
from deploy.contract import sealed
from deploy.errors import ConfigError, command
from deploy.files import check_writable, replacing, write_json


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Render result files as one report with a verdict. Exit status 0: roll out, or no limits given; "
        "1: do not roll out, or it cannot be told; 2: bad input.",
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULT",
        help="result files of benchmarks.accuracy and benchmarks.latency, or the folder that benchmarks.fleet wrote",
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        default=[],
        metavar="RESULT",
        help="such files or folders of the teacher, whatever their role: onnx-fp32 counts as teacher-onnx-fp32",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="report.html; report.md and report.json go beside it"
    )
    parser.add_argument(
        "--ship",
        metavar="ROLE",
        help="the model that ships (default: the last role of the table, or what --int8-budget says)",
    )
    parser.add_argument(
        "--int8-budget", metavar="FILE",
        help="INT8 file that calibration.choose wrote: how it was reached, and what ships if it is not to",
    )  # fmt: skip
    parser.add_argument("--against", metavar="FILE", help="report.json of an earlier rollout, to show what changed")
    parser.add_argument("--junit", metavar="FILE", help="also write the limits as JUnit XML")
    parser.add_argument(
        "--annotations", metavar="FILE", help="annotations for the gallery (default: where they were when measured)"
    )
    parser.add_argument(
        "--images-dir", metavar="DIR", help="folder of the gallery's images (default: where they were when measured)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say whether the limits and the output will do: nothing is measured yet",
    )
    limits = parser.add_argument_group("limits on the model that ships")
    limits.add_argument("--limits", metavar="FILE", help="TOML file of limits: max_ap_drop = 1.5, and so on")
    for kind in LIMITS:
        limits.add_argument(
            kind.flag, type=float, metavar=kind.unit.upper(), help=f"{kind.title}, {kind.bound} this many {kind.unit}"
        )
    return parser


def limits_from_arguments(arguments: argparse.Namespace) -> Dict[str, float]:
    """
    Key of a limit -> what is allowed, of the file and the flags.

    Raises:
        ConfigError: a limit is given twice, or is none.
    """
    allowed = limits_from_file(arguments.limits) if arguments.limits is not None else {}
    for kind in LIMITS:
        value = getattr(arguments, kind.key)
        if value is not None and kind.key in allowed:
            raise ConfigError(f"{kind.flag} is also in {arguments.limits}; give it once")
        if value is not None:
            allowed[kind.key] = value
    check_limits(allowed)
    return allowed


def output_paths(output: str, inputs: Sequence[Optional[str]]) -> List[Path]:
    """
    The files to write: HTML, Markdown, JSON.

    Args:
        inputs: files that are read, which must not be among them; None: not given.
    """
    html = Path(output)
    if html.suffix != ".html":
        raise ConfigError(f"--output is {html}; expected a name that ends in .html")
    paths = [html, html.with_suffix(".md"), html.with_suffix(".json")]
    read = {Path(path).resolve() for path in inputs if path}
    for path in paths:
        if path.resolve() in read:
            raise ConfigError(f"{path} would be written over an input; choose another --output")
        check_writable(path)
    return paths


@command
def main(argv: Optional[List[str]] = None) -> int:
    """Writes the files, prints the verdict, and returns 1 if it is not to roll out."""
    arguments = _parser().parse_args(argv)
    allowed = limits_from_arguments(arguments)
    given = [*arguments.results, *arguments.teacher]
    html, markdown, document = output_paths(
        arguments.output, [*given, arguments.against, arguments.limits, arguments.int8_budget]
    )
    if arguments.check:
        if "max_energy_mj" in allowed and all(path.endswith(".json") for path in given):  # else boards tell it
            check_power_is_told()
        return 0
    if arguments.junit is not None:
        if not allowed:
            raise ConfigError("--junit writes limits, but none are given")
        check_writable(arguments.junit)
    old = read_report(arguments.against, REPORT_VERSION) if arguments.against is not None else None
    results, teachers = result_files(arguments.results), result_files(arguments.teacher)
    read = [(path, read_result(path)) for path in results]
    read += [(path, as_teachers(read_result(path))) for path in teachers]
    failures = failures_from_files(results)
    boards = results_by_board(read, failures, any(Path(path).is_dir() for path in arguments.results))
    if boards is None:
        report, page, text, limits = _of_one_machine(arguments, read, allowed, old, failures)
    elif old is not None or arguments.int8_budget is not None:
        flag = "--int8-budget" if old is None else "--against"
        raise ConfigError(f"{flag} is for the report of one machine, but these results are of boards; leave it out")
    else:
        report = fleet_report([*results, *teachers], boards, failures, arguments.ship, allowed)
        page, text = (render_fleet(report, f"fleet.{suffix}.jinja") for suffix in ("html", "md"))
        limits = {f"{entry['ship'] or 'what ships'} on {entry['board']}": entry["limits"] for entry in report["boards"]}
    for path, content in ((html, page), (markdown, text)):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # a path that is no text
    write_json(document, sealed(report))
    if arguments.junit is not None:
        with replacing(arguments.junit) as temporary:
            temporary.write_text(junit_from_limits(limits), encoding="utf-8")
    print(report["verdict"]["sentence"])
    print(f"report: {html}, {markdown.name}, {document.name}")
    return 1 if report["verdict"]["roll_out"] is False else 0


def _of_one_machine(
    arguments: argparse.Namespace,
    read: Sequence[ReadResult],
    allowed: Mapping[str, float],
    old: Optional[Mapping[str, Any]],
    failures: Mapping[str, Mapping[str, str]],
) -> Tuple[Dict[str, Any], str, str, Dict[str, Any]]:
    """(document, page, Markdown, limits by what they are on) of the results of one machine."""
    groups = group_results(read)
    budget = read_int8_budget(arguments.int8_budget, groups) if arguments.int8_budget is not None else None
    ship = role_to_ship(list(groups), arguments.ship or (budget["ships"] if budget else None))
    detections = detections_of_roles(read, [teacher_of_accuracy(groups), ship, "student", *SHIPPED_FORMS])
    files = [*(path for path, _ in read), *filter(None, [arguments.int8_budget])]
    report = report_from_results(files, groups, detections, ship, allowed, budget)
    data = report["data"]
    pictures, notes = gallery_from_report(
        report, detections, arguments.annotations or data["annotations"], arguments.images_dir or data["images_dir"]
    )
    report["notes"] += notes + notes_on_other_boards([result for _, result in read], failures)
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
        curves=curves_from_groups(groups, report["teacher"], ship),
        gallery=pictures,
    )
    return report, page, render(report, "report.md.jinja"), {ship: report["limits"]}


if __name__ == "__main__":
    sys.exit(main())
