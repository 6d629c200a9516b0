"""From the report's document to its page and Markdown: the charts, the gallery, the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmarks.measuring.detections import NO_BOXES, Boxes, boxes_by_image
from benchmarks.measuring.result import STAGES
from benchmarks.measuring.subject import ROLES
from benchmarks.reporting.columns import CHANGED, FLEET_COLUMNS, TABLES
from benchmarks.reporting.document import Results
from benchmarks.reporting.figures import LINE_STYLES, curves_from_precisions, plot_from_points
from benchmarks.reporting.gallery import Side, gallery, most_disagreed
from benchmarks.reporting.verdict import LIMITS, latency_ms
from benchmarks.reporting.wording import (
    Markup,
    amount,
    amount_between,
    code,
    count,
    decimals,
    duration,
    hundredths,
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
from deploy.dataset import coco_document, load_coco
from deploy.errors import MeasurementError, MissingDependencyError
from deploy.files import AnyPath, sha256_of

FILTERS = (
    points, signed_points, ms, mib, millions, times, amount, amount_between, percent, code, verbatim, part, decimals,
    count, signed_score, duration, hundredths,
)  # fmt: skip
"""Functions that the templates may use, by their names."""


def plot_from_report(report: Mapping[str, Any], allowed: Mapping[str, float]) -> Optional[Dict[str, Any]]:
    """Speed against AP, with the region that the limits allow."""
    rows = {row["role"]: row for row in report["rows"]}
    teacher = rows.get(report["teacher"], {})  # there, if a limit compares with it
    kinds = {report["teacher"]: "teacher", report["verdict"]["ship"]: "ship"}
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
    ship = rows[report["verdict"]["ship"]]
    slowest_ms = [kind.most_ms(limit, ship) for kind, limit in given if kind.most_ms]
    most_ms = [value for value in slowest_ms if value is not None]
    least = [kind.least_ap_points(limit, teacher) for kind, limit in given if kind.least_ap_points]
    return plot_from_points(plotted, min(most_ms, default=None), max(least, default=None))


def curves_from_groups(groups: Mapping[str, Results], teacher: str, ship: str) -> Dict[str, Any]:
    """
    The precision-recall curves: `mean`, kind -> all models; `per_class`, class name -> the teacher and what ships.
    """
    found = {role: group["accuracy"]["numbers"]["pr_curves"] for role, group in groups.items() if "accuracy" in group}
    pair = [role for role in dict.fromkeys((teacher, ship)) if role in found]
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
    ship, teacher = report["verdict"]["ship"], report["teacher"]
    if ship not in detections or teacher not in detections or ship == teacher:
        return [], []
    sides = []
    for role in (teacher, ship):
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
    document = coco_document(load_coco(path, images_dir, check_files=False), as_annotated=True)
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
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=is_html,
        finalize=None if is_html else escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in FILTERS:
        environment.filters[function.__name__] = function
    bars = [stage for stage in STAGES if stage not in ("read", "total")]  # the total begins at the decoded image
    return environment.get_template(template).render(
        report=report, tables=TABLES, stages=bars, changed=CHANGED, line_styles=LINE_STYLES, **pictures
    )


def render_fleet(report: Mapping[str, Any], template: str) -> str:
    """The text of a fleet's template, as `render`."""
    flags = {limit["flag"]: limit for board in report["boards"] for limit in board["limits"]}
    given = [flags[kind.flag] for kind in LIMITS if kind.flag in flags]
    return render(report, template, columns=FLEET_COLUMNS, given=given)
