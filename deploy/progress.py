"""Progress of long work: a bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Iterable, Iterator, TypeVar

T = TypeVar("T")
PLAIN_LINE_EVERY_S = 10.0


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields `items`, telling stderr how far it is; `what` names the work."""
    start = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done < total and now - shown < (0.2 if terminal else PLAIN_LINE_EVERY_S):
            continue
        shown = now
        rest_s = (now - start) / done * max(0, total - done)
        words = f"{what}: {done}/{total}, {now - start:.0f} s, ETA {rest_s:.0f} s"
        if terminal:
            filled = 24 * done // max(1, total)
            print(
                f"\r[{'#' * filled}{'.' * (24 - filled)}] {words}\x1b[K",
                end="\n" if done >= total else "",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(words, file=sys.stderr, flush=True)
