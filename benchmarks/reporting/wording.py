"""Numbers as the report and its verdict word them; a dash stands for what was not measured."""

from __future__ import annotations

import re
from typing import Any, Mapping, Optional

from deploy.errors import one_line

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def points(fraction: Optional[float]) -> str:
    """A fraction in points, hundredths, with one decimal."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.1f}"


def signed_points(fraction: Optional[float]) -> str:
    """A difference in points with its sign; 0.0 has none."""
    if fraction is None:
        return UNKNOWN
    tenths = round(1000 * fraction)
    return "0.0" if tenths == 0 else f"{'+' if tenths > 0 else MINUS}{abs(tenths) / 10:.1f}"


def hundredths(fraction: float) -> str:
    """A fraction in points with two decimals, as fine as a budget of AP; a minus where AP rises."""
    return f"{round(100 * fraction, 2) + 0.0:.2f}".replace("-", MINUS)


def ms(value: Optional[float]) -> str:
    """Milliseconds, finer below ten."""
    return UNKNOWN if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mib(size_bytes: Optional[int]) -> str:
    """Bytes in MiB."""
    return UNKNOWN if size_bytes is None else f"{size_bytes / 2**20:.2f}"


def duration(seconds: float) -> str:
    """A time that somebody waits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def millions(count: Optional[int]) -> str:
    """A count in millions."""
    return UNKNOWN if count is None else f"{count / 1e6:.2f}"


def times(factor: Optional[float]) -> str:
    """A speed-up."""
    return UNKNOWN if factor is None else f"{factor:.2f}\N{MULTIPLICATION SIGN}"


def percent(part: float, whole: float) -> str:
    """`part` of `whole`, as CSS wants it but for the sign."""
    return f"{100 * part / whole:.2f}"


def amount(value: Optional[float], unit: str) -> str:
    """A number of a limit: finer than the table's, so that a near miss shows as one."""
    if value is None:
        return UNKNOWN
    return times(value) if unit == "times" else f"{value:.2f} {unit}"


def amount_between(limit: Mapping[str, Any]) -> str:
    """The bounds of a limit's number, in brackets; nothing where none are known."""
    if limit["low"] == limit["high"]:
        return ""
    return f" ({limit['low']:.2f} to {limit['high']:.2f})".replace("-", MINUS)


def between_points(low: Optional[float], high: Optional[float]) -> str:
    """The bounds of a difference in points; nothing where none are known."""
    return "" if low is None or high is None else f"{signed_points(low)} to {signed_points(high)}"


def part(fraction: Optional[float]) -> str:
    """A fraction in percent, without decimals."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.0f} %".replace("-", MINUS)


def decimals(value: Optional[float], digits: int = 2) -> str:
    """A plain number."""
    return UNKNOWN if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def count(value: Optional[int]) -> str:
    """A whole number."""
    return UNKNOWN if value is None else str(value)


def signed_score(value: Optional[float]) -> str:
    """A difference of scores with its sign."""
    return UNKNOWN if value is None else f"{value:+.2f}".replace("-", MINUS)


class Markup(str):
    """Markdown that is meant to be read as such; all other text is escaped where it is shown."""


def verbatim(text: str) -> Markup:
    """A line of `text` within a block of code, where Markdown means nothing."""
    return Markup(one_line(text, most=None))


def markdown(text: str) -> Markup:
    """`text` so that Markdown shows just that, in a table's cell too: names come from data and may be anybody's."""
    return Markup(re.sub(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text, most=None)))


def code(text: str) -> Markup:
    """`text` as Markdown's code, between more backticks than it has: a file name, a hash."""
    line = one_line(text, most=None)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return Markup(f"{fence}{space}{line}{space}{fence}")
