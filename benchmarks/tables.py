"""Tables of results in Markdown, with the JSON of all numbers beside them. AP in points, to hundredths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from benchmarks.wording import UNKNOWN, cell
from deploy.files import replacing, write_json


def write_tables(output: Path, document: Dict[str, Any], markdown: str) -> None:
    write_json(f"{output}.json", document)
    with replacing(f"{output}.md") as temporary:
        temporary.write_text(markdown, encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    lines = [" | ".join(cell(text) for text in row) for row in (columns, *rows)]
    return [f"| {lines[0]} |", "|" + " --- |" * len(columns), *(f"| {line} |" for line in lines[1:])]


def points(fraction: Optional[float], sign: str = "") -> str:
    return UNKNOWN if fraction is None else f"{round(100 * fraction, 2) + 0.0:{sign}.2f}"


def interval(bounds: Mapping[str, float]) -> str:
    return f"{points(bounds['low'], '+')} to {points(bounds['high'], '+')}"
