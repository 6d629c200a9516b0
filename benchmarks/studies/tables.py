"""Tables of results in Markdown, with the JSON of all numbers beside them. AP in points, to hundredths."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

from benchmarks.measuring.timing import OTHERS_CORES
from benchmarks.reporting.wording import UNKNOWN, markdown
from deploy.files import AnyPath, check_writable, replacing, write_json


def check_tables(output: AnyPath) -> None:
    """Raises PipelineError if `write_tables` could not write: asked before long work."""
    for suffix in ("json", "md"):
        check_writable(f"{output}.{suffix}")


def write_tables(output: AnyPath, document: Dict[str, Any], markdown: str) -> None:
    """Writes `<output>.json` and `<output>.md`."""
    write_json(f"{output}.json", document)
    with replacing(f"{output}.md") as temporary:
        temporary.write_text(markdown, encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    lines = [" | ".join(markdown(text) for text in row) for row in (columns, *rows)]
    return [f"| {lines[0]} |", "|" + " --- |" * len(columns), *(f"| {line} |" for line in lines[1:])]


def points(fraction: Optional[float], sign: str = "") -> str:
    return UNKNOWN if fraction is None else f"{round(100 * fraction, 2) + 0.0:{sign}.2f}"


def disturbed(others_cores: Optional[float]) -> str:
    """What stands behind a time before which other programs kept so many processors busy."""
    return ", disturbed" if others_cores is not None and others_cores > OTHERS_CORES else ""


def interval(bounds: Mapping[str, float]) -> str:
    return f"{points(bounds['low'], '+')} to {points(bounds['high'], '+')}"
